"""This server's copy of the book of names, never older than the last change that any server has answered.

A change is announced on a board in shared memory before it is answered, so to know that the copy is fresh costs a look
at the board, and the book is fetched only after a change. Knows neither artifacts nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from ..catalog import Catalog, Entry, Snapshot
from ..errors import EngineUnavailable

T = TypeVar("T")

log = logging.getLogger("vllm.steer_vllm")  # vLLM's handlers print what is below "vllm"

_IDLE, _AFTER_ERROR = 0.2, 2.0  # seconds between looks at the board while no request looks


class Book(Protocol):
    """What is asked of the book. Every call may raise `EngineUnavailable`."""

    @property
    def server(self) -> int:
        """The number of this server."""

    async def copy(self, needed: Collection[str], since: int) -> Snapshot:
        """What has changed since that epoch, 0 being before the first name. This server then holds what all names
        point to and what it needs besides, and nothing else."""

    async def open(self) -> None:
        """Say that the artifacts of the start are loaded."""

    async def publish(self, entry: Entry, token: str, *, replace: bool) -> int:
        """Point a name to loaded content; the epoch after it. Errors: `ArtifactExists`."""

    async def withdraw(self, name: str) -> tuple[int, Entry]:
        """Take a name away: the epoch after it, what it pointed to. Errors: `ModelNotFound`."""

    async def take_turn(self, digest: str, token: str) -> bool:
        """Whether the token may now load this content; False while another loads or frees it."""

    async def take_turn_to_free(self, digest: str, token: str) -> bool | None:
        """Likewise for freeing it; None when there is nothing to free."""

    async def end_turn(self, digest: str, token: str, *, freed: bool = False) -> None:
        """Give the turn back; no error without one."""


class Board(Protocol):
    """What the servers tell each other."""

    @property
    def latest(self) -> int:
        """The newest epoch that any server has announced."""

    def announce(self, server: int, epoch: int) -> None:
        """Tell all servers that the book has changed up to this epoch."""


class Names:
    """For one event loop. found_unused: told which contents may be freed, whenever the book is fetched."""

    def __init__(self, book: Book, board: Board, found_unused: Callable[[Collection[str]], None]) -> None:
        self.catalog = Catalog()
        self._book = book
        self._board = board
        self._found_unused = found_unused
        self._seen = -1
        self._held: set[str] = set()
        self._opened = False
        self._fetching = asyncio.Lock()
        self._stir = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()

    async def refresh(self) -> None:
        """Bring the copy up to date where it is not. Errors: `EngineUnavailable`."""
        wanted = self._board.latest
        if self._seen < wanted:
            async with self._fetching:
                if self._seen < wanted:  # who waited for the turn may have been served by the one before
                    await self._fetch()

    async def publish(self, entry: Entry, token: str, *, replace: bool) -> None:
        """Make a name visible on every server. Errors: `ArtifactExists`, `EngineUnavailable`."""

        async def change() -> None:
            self._announce(await self._book.publish(entry, token, replace=replace))

        await self.to_the_end(change())

    async def withdraw(self, name: str) -> Entry:
        """Make a name invisible on every server. Errors: `ModelNotFound`, `EngineUnavailable`."""

        async def change() -> Entry:
            epoch, entry = await self._book.withdraw(name)
            self._announce(epoch)
            return entry

        return await self.to_the_end(change())

    def enter(self, digests: set[str]) -> None:
        """A request begins to use these contents. Nothing may be awaited since they were looked up."""
        self.catalog.enter(digests)

    def leave(self, digests: set[str]) -> None:
        """A request has ended."""
        if self.catalog.leave(digests):
            self._stir.set()

    async def open(self) -> None:
        """Let the other servers start: what this one has published is all that there is at the start."""
        await self._book.open()

    async def opened(self) -> None:
        """Wait until the first server says that the start is complete."""
        while not self._opened:
            async with self._fetching:
                await self._fetch()
            if not self._opened:
                await asyncio.sleep(_IDLE)

    def follow(self) -> None:
        """Look at the board also while no request does, so that withdrawn content is given back."""
        self.in_background(self._follow())

    def in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that is kept until it ends, or `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that goes on when its caller is cancelled: half a change must not stay unannounced."""
        task = self.in_background(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a caller who left does not ask
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Stop what runs in the background."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _announce(self, epoch: int) -> None:
        self._board.announce(self._book.server, epoch)
        self._stir.set()

    async def _fetch(self) -> None:
        """Take a new copy. Whoever calls has the turn, so that an older one never replaces a newer.

        Requests may begin meanwhile, with names of the old copy: all that those point to is said to be needed.
        """
        needed = self.catalog.needed
        copy = await self._book.copy(needed, max(self._seen, 0))
        self.catalog.update(copy.entries, copy.gone)
        self._held = needed | self.catalog.named
        self._seen = copy.epoch
        self._opened = copy.opened
        if not self._held <= self.catalog.needed:
            self._stir.set()
        self._found_unused(copy.unused)

    async def _follow(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_IDLE):
                    await self._stir.wait()
            stirred = self._stir.is_set()
            self._stir.clear()
            try:
                await self.refresh()
                if stirred:  # else nothing is needed less than before, and to look takes longer the more there is
                    async with self._fetching:
                        if not self._held <= self.catalog.needed:  # gives back what is no longer needed
                            await self._fetch()
            except EngineUnavailable as error:
                self._stir.set()
                log.warning("names cannot be fetched: %s", error)
                await asyncio.sleep(_AFTER_ERROR)
