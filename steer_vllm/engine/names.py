"""The book of names: what every API server believes about names comes from here.

It says which content a name points to, which servers still hold a content, and who is loading or freeing it right now.
It neither loads nor frees; the servers do that, in turns that the book grants. A server that is alone keeps it itself,
several find it in the core of engine 0. No vLLM object is known but the core that the utilities are put on, which calls
them one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile
from typing import Any

from ..catalog import Catalog, Entry
from ..errors import EngineUnavailable
from .answer import Answer, answered


class NameBook:
    """Names, holders and turns, for one thread. Servers are numbers, a turn belongs to a token.

    epoch: grows with every change of a name. opened: the artifacts of the start are loaded.

    Content is known here from its first turn until it is freed. It may be freed when no name points to it, no server
    holds it and nobody has its turn. A server holds what its copy of the book names and what its requests use, so a
    request that was decided on with an older copy still finds its content.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.opened = False
        self._catalog = Catalog()
        self._published: dict[str, int] = {}  # name -> epoch, ascending
        self._gone: dict[str, int] = {}  # likewise, as long as a server may still have the name
        self._seen: dict[int, int] = {}  # server -> epoch of the copy it has
        self._known: set[str] = set()
        self._held: dict[int, set[str]] = {}  # by server
        self._turns: dict[str, str] = {}

    def copy(self, server: int, needed: Collection[str], since: int) -> tuple[list[Entry], list[str]]:
        """What has changed since that epoch: entries that are new, names that are gone.

        From now on the server holds what all names point to, and what it says it needs, and nothing else.
        """
        self._held[server] = self._catalog.named.union(needed) & self._known
        self._seen[server] = since
        entries = [self._catalog.get(name) for name in _later(self._published, since)]
        gone = _later(self._gone, since)
        for name in [name for name, epoch in self._gone.items() if epoch <= min(self._seen.values())]:
            del self._gone[name]  # a server that has not asked yet knows no name
        return entries, gone

    def unused(self) -> list[str]:
        """Contents that may be freed."""
        return sorted(self._known.difference(self._catalog.named, self._turns, *self._held.values()))

    def publish(self, entry: Entry, token: str, replace: bool) -> None:
        """Point a name to content.

        Errors: `ArtifactExists` when it points to other content and may not be moved; `EngineUnavailable` when the
        token does not have the content's turn, so that it may be freed at any moment.
        """
        if self._turns.get(entry.digest) != token:
            raise EngineUnavailable(f"sha256 {entry.digest[:12]} was not loaded in its turn")
        self._catalog.check_free(entry.name, entry.digest, replace)
        self._catalog.publish(entry)
        self.epoch += 1
        for names in (self._gone, self._published):  # so that it comes last
            names.pop(entry.name, None)
        self._published[entry.name] = self.epoch

    def withdraw(self, name: str) -> Entry:
        """Take a name away. Errors: `ModelNotFound`."""
        entry = self._catalog.withdraw(name)
        self.epoch += 1
        del self._published[name]
        self._gone[name] = self.epoch
        return entry

    def take_turn(self, digest: str, token: str) -> bool:
        """Whether the token may now load this content: nobody else loads or frees it."""
        free = self._turns.setdefault(digest, token) == token
        if free:
            self._known.add(digest)
        return free

    def take_turn_to_free(self, digest: str, token: str) -> bool | None:
        """Whether the token may now free this content; None when there is nothing to free, or no more."""
        if digest not in self._known or self._in_use(digest):
            return None
        return self.take_turn(digest, token)

    def end_turn(self, digest: str, token: str, freed: bool) -> None:
        """Let others have the content's turn; freed: the engines do not have it any more. No error without a turn."""
        if self._turns.get(digest) == token:
            del self._turns[digest]
            if freed:
                self._known.discard(digest)

    def _in_use(self, digest: str) -> bool:
        return self._catalog.names(digest) or any(digest in held for held in self._held.values())


def _later(epochs: dict[str, int], since: int) -> list[str]:
    """The names that have changed after that epoch, without a look at the others."""
    return list(takewhile(lambda name: epochs[name] > since, reversed(epochs)))


def install() -> None:
    """Ledger: adds utilities to `EngineCore`.

    Why: the core of engine 0 is the one process that several API servers all talk to, and vLLM calls its utilities one
    after the other. Since 0.26. Can go when plugins can register utilities.
    """
    from vllm.v1.engine.core import EngineCore

    for utility in (
        steer_names_copy,
        steer_names_open,
        steer_names_publish,
        steer_names_withdraw,
        steer_names_turn,
        steer_names_turn_to_free,
        steer_names_end_turn,
    ):
        setattr(EngineCore, utility.__name__, utility)


def _book(core: Any) -> NameBook:
    """Ledger: adds `steer_names` to vLLM's `EngineCore`, or to the client of a server that is alone.

    Why: the book lives as long as that object, and whoever talks to the same engine finds the same one. Made when first
    asked for: plugins may be loaded in the middle of the core's constructor. Since 0.26. Can go when plugins can keep
    something with the core.
    """
    if not hasattr(core, "steer_names"):
        core.steer_names = NameBook()
    book: NameBook = core.steer_names
    return book


@answered
def steer_names_copy(self: Any, server: int, needed: list[str], since: int) -> Answer:
    """Utility: what has changed in the book since an epoch, and what may be freed.

    Who keeps the book does nothing else meanwhile: entries are those that changed, and the rest are operations on whole
    sets, about a millisecond with ten thousand artifacts.
    """
    book = _book(self)
    entries, gone = book.copy(server, needed, since)
    return {
        "state": "done",
        "epoch": book.epoch,
        "opened": book.opened,
        "entries": [entry.to_wire() for entry in entries],
        "gone": gone,
        "unused": book.unused(),
    }


@answered
def steer_names_open(self: Any) -> Answer:
    """Utility: the artifacts of the start are loaded."""
    _book(self).opened = True
    return {"state": "done"}


@answered
def steer_names_publish(self: Any, entry: Mapping[str, Any], token: str, replace: bool) -> Answer:
    """Utility: see `NameBook.publish`."""
    book = _book(self)
    book.publish(Entry.from_wire(entry), token, replace)
    return {"state": "done", "epoch": book.epoch}


@answered
def steer_names_withdraw(self: Any, name: str) -> Answer:
    """Utility: see `NameBook.withdraw`."""
    book = _book(self)
    entry = book.withdraw(name)
    return {"state": "done", "epoch": book.epoch, "entry": entry.to_wire()}


@answered
def steer_names_turn(self: Any, digest: str, token: str) -> Answer:
    """Utility: "busy" while somebody else has the turn."""
    return {"state": "done" if _book(self).take_turn(digest, token) else "busy"}


@answered
def steer_names_turn_to_free(self: Any, digest: str, token: str) -> Answer:
    """Utility: as `steer_names_turn`; needed is False when there is nothing to free."""
    taken = _book(self).take_turn_to_free(digest, token)
    return {"state": "busy" if taken is False else "done", "needed": taken is not None}


@answered
def steer_names_end_turn(self: Any, digest: str, token: str, freed: bool) -> Answer:
    """Utility: see `NameBook.end_turn`."""
    _book(self).end_turn(digest, token, freed)
    return {"state": "done"}
