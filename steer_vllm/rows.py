"""Who holds which row of a slot table.

The ledger hands out row numbers for contents and counts their users. A row whose last user left keeps its content, so
that the next request for it finds it in place, until the row is needed. It knows contents only as keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from .errors import NoRows
from .segments import Term

Content = tuple[Term, ...]
"""What a row holds: a single part at scale 1, or several with their scales baked in."""


class RowLedger:
    """Rows 1..count of one table. Not thread-safe: its owner holds a lock."""

    def __init__(self, count: int, table: str) -> None:
        self.count = count
        self.table = table
        self._users: dict[Content, int] = {}
        self._row: dict[Content, int] = {}
        self._idle: OrderedDict[Content, None] = OrderedDict()
        self._free = list(range(count, 0, -1))

    def acquire(self, content: Content) -> int:
        """A row for one more user of this content. Errors: `NoRows` when every row has users."""
        if content in self._row:
            self._idle.pop(content, None)
        elif self._free:
            self._row[content] = self._free.pop()
        elif self._idle:
            oldest, _ = self._idle.popitem(last=False)
            self._row[content] = self._row.pop(oldest)
        else:
            raise NoRows(f"all {self.count} {self.table} rows are in use by requests in flight; try again")
        self._users[content] = self._users.get(content, 0) + 1
        return self._row[content]

    def acquire_all(self, contents: Iterable[Content]) -> dict[Content, int]:
        """A row for each of several contents, or for none. Errors: `NoRows`."""
        rows: dict[Content, int] = {}
        try:
            for content in sorted(contents):
                rows[content] = self.acquire(content)
        except NoRows:
            self.release_all(rows)
            raise
        return rows

    def release_all(self, contents: Iterable[Content]) -> None:
        """One user fewer for each."""
        for content in contents:
            self.release(content)

    def release(self, content: Content) -> None:
        """One user fewer. Errors: `KeyError` when there is none."""
        self._users[content] -= 1
        if self._users[content] == 0:
            del self._users[content]
            self._idle[content] = None

    def forget(self, digest: str) -> None:
        """Drop idle rows made of this digest: its content is gone for good."""
        for content in [content for content in self._idle if any(term.digest == digest for term in content)]:
            del self._idle[content]
            self._free.append(self._row.pop(content))

    @property
    def used(self) -> int:
        """Rows with users."""
        return len(self._users)
