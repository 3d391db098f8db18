"""The table of deliberate faults in docs/exactness.md: `python -m mutation.page` writes it anew, from the folder `tests`."""

from __future__ import annotations

import conftest

from .mutants import MUTANTS

PAGE = conftest.ROOT / "docs" / "exactness.md"
START, END = "<!-- faults: written by mutation.page -->\n", "<!-- end of faults -->\n"


def table() -> str:
    """One row for each fault."""
    rows = ["| deliberate fault | noticed by |", "|---|---|"]
    for mutant in MUTANTS:
        rows.append(f"| {mutant.what} | {', '.join(f'`{killer}`' for killer in mutant.killers)} |")
    return "\n".join(rows) + "\n"


def write() -> None:
    """Put the table in its place on the page."""
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(before + START + "\n" + table() + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    write()
