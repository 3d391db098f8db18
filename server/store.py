"""Where artifacts may come from: folders below one root, and those the operator named at the start.

A source in a request is never a way out of the root: no absolute path, no `..`, no symlink on the way. Does not read
artifacts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidIntervention


class Store:
    """root: the folder for requests, or None. given: sources that may be named as they stand."""

    def __init__(self, root: Path | None, given: Iterable[str] = ()) -> None:
        self._root = root.resolve() if root else None
        self._given = {source: Path(source).absolute() for source in given}

    def folder(self, source: object) -> Path:
        """The folder a source stands for. Errors: `InvalidIntervention` for one outside the store."""
        if not isinstance(source, str) or not source or "\0" in source:
            raise InvalidIntervention(f"source: expected the path of a folder, got {source!r}", param="source")
        if source in self._given:
            return self._given[source]
        if self._root is None:
            raise InvalidIntervention(
                f"source {source!r}: this server has no store; it loads only the folders given at its start",
                param="source",
            )
        inner = Path(source)
        if inner.is_absolute() or ".." in inner.parts or inner == Path():
            raise InvalidIntervention(
                f"source {source!r}: expected a path below the store, relative and without ..", param="source"
            )
        folder = self._root / inner
        if folder.resolve() != folder:
            raise InvalidIntervention(f"source {source!r}: leads through a symlink", param="source")
        return folder
