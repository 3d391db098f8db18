"""A deliberate fault as data: what is changed in which file, and the tests that must fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """`before` becomes `after` in `path`; each of `killers` (pytest ids) must fail then.

    what: one line for people.
    """

    name: str
    what: str
    path: str
    before: str
    after: str
    killers: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Put the fault in. Errors: `ValueError` unless `before` stands in the file exactly once."""
        file = root / self.path
        text = file.read_text()
        if text.count(self.before) != 1:
            raise ValueError(f"{self.name}: {text.count(self.before)} places in {self.path} read {self.before!r}")
        file.write_text(text.replace(self.before, self.after))
