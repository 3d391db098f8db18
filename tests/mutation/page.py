"""The table of deliberate faults in docs/exactness.md; `python -m mutation.page`, in the folder `tests`, writes it."""

from __future__ import annotations

import conftest

from .mutants import MUTANTS

PAGE = conftest.ROOT / "docs" / "exactness.md"
START, END = "<!-- faults: written by mutation.page -->\n", "<!-- end of faults -->\n"


def table() -> str:
    """One row for each fault."""
    rows = [f"| {mutant.what} | {', '.join(f'`{killer}`' for killer in mutant.killers)} |" for mutant in MUTANTS]
    return "\n".join(["| deliberate fault | noticed by |", "|---|---|", *rows]) + "\n"


def write() -> None:
    """Put the table in its place on the page."""
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(before + START + "\n" + table() + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    write()
