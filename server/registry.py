"""Loading and unloading while requests run: a name is seen once the engine has it, content goes with its last user.

Any of several servers may be asked; the book of names gives each content's turn to one at a time. Sits between the
names and the engine, which it knows by protocols. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import uuid4

from ..catalog import Catalog, Entry, check_name
from ..config import SteerConfig
from ..errors import EngineUnavailable
from ..fingerprint import Fingerprint
from ..fit import check_fit
from ..intervention import Intervention
from ..plan import Summary
from .names import Board, Book, Names, log
from .store import Store

_FIRST, _LONGEST = 0.02, 2.0  # seconds between attempts to get a turn, or to free what a request still uses


class Engine(Protocol):
    """What the registry asks of the engine."""

    async def load(self, folder: str, digest: str) -> Summary:
        """Load on every rank; no error where it is there. Errors: `ArtifactInvalid`, `HostMemoryFull`,
        `EngineUnavailable`."""

    async def base(self) -> Fingerprint:
        """The model served now. Errors: `EngineUnavailable` while that is not known."""

    async def unload(self, digest: str) -> bool:
        """Free on every rank; False while a request in the engine uses it."""

    async def settle(self) -> None:
        """Come back when everything sent before is done. Errors: `EngineUnavailable`."""


class Registry:
    """Names and what they point to, for one event loop."""

    def __init__(
        self,
        engine: Engine,
        book: Book,
        board: Board,
        store: Store,
        config: SteerConfig,
        base_names: tuple[str, ...],
    ) -> None:
        self.names = Names(book, board, self._free_soon)
        self.base_names = base_names
        self._engine = engine
        self._book = book
        self._store = store
        self._config = config
        self._unused: set[str] = set()
        self._freeing: set[str] = set()

    @property
    def catalog(self) -> Catalog:
        """The names as this server last saw them; `refresh` first."""
        return self.names.catalog

    async def refresh(self) -> None:
        """See what every server has published and withdrawn up to now. Errors: `EngineUnavailable`."""
        await self.names.refresh()

    async def load(self, name: object, source: object, *, load_inplace: bool = False) -> Entry:
        """Load an artifact and publish it. The same content under the same name again is no error.

        Errors: `InvalidIntervention` for the name or source; `ArtifactInvalid`; `ArtifactExists` when the name has
        other content and load_inplace is false; `HostMemoryFull`; `EngineUnavailable`. On any error everything is as
        before.
        """
        for base_name in self.base_names:
            name = check_name(name, base_name)
        name = check_name(name)
        folder = self._store.folder(source)
        intervention = await asyncio.to_thread(Intervention.load, folder)
        digest = intervention.digest
        await self.refresh()
        self.catalog.check_free(name, digest, load_inplace)
        try:
            async with self._turn(digest) as token:
                # The ranks check what they read; here, what the digest of content that is there leaves open. Asked
                # anew, as a reload may have brought another model, and beside the load, as any answer takes a step.
                asked = self.names.in_background(self._engine.base())
                asked.add_done_callback(lambda done: done.cancelled() or done.exception())  # of a load that fails
                summary = await self._engine.load(str(folder), digest)
                check_fit(intervention, await asked, self._config, str(folder))
                entry = Entry.of(name, str(source), intervention, summary)
                await self.names.publish(entry, token, replace=load_inplace)
        except BaseException:
            self._free_soon({digest})  # the engine may have it by now
            raise
        log.info("intervention %s: %s, sha256 %s, from %s", name, entry.method, digest[:12], source)
        return entry

    async def unload(self, name: str) -> Entry:
        """Withdraw a name at once; its content is freed when the last request that uses it has ended.

        Errors: `ModelNotFound`, `EngineUnavailable`.
        """
        entry = await self.names.withdraw(name)
        log.info("intervention %s is withdrawn", name)
        return entry

    def enter(self, digests: set[str]) -> None:
        """A request begins to use these contents. Nothing may be awaited since they were looked up."""
        self.names.enter(digests)

    def leave(self, digests: set[str]) -> None:
        """A request has ended."""
        self.names.leave(digests)

    async def settle(self) -> None:
        """Come back when the engine has done everything that was sent before. Errors: `EngineUnavailable`."""
        await self._engine.settle()

    @asynccontextmanager
    async def _turn(self, digest: str) -> AsyncIterator[str]:
        """Wait until nobody else loads or frees this content, on any server. Gives the turn's token."""
        token = uuid4().hex
        pause = _FIRST
        try:
            while not await self._book.take_turn(digest, token):
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST)
            yield token
        finally:  # also without an answer: a call that was cancelled may have got the turn
            self.names.in_background(self._end_turn(digest, token))  # nobody waits for the answer

    async def _end_turn(self, digest: str, token: str) -> None:
        try:
            await self._book.end_turn(digest, token)
        except EngineUnavailable as error:
            log.warning("sha256 %s may stay as it is: %s", digest[:12], error)

    def _free_soon(self, digests: Collection[str]) -> None:
        for digest in digests:
            self._unused.add(digest)
            if digest not in self._freeing:
                self._freeing.add(digest)
                self.names.in_background(self._free(digest))

    async def _free(self, digest: str) -> None:
        try:
            while digest in self._unused:  # it may be found again while it is being freed
                self._unused.discard(digest)
                await self._free_once(digest)
        except EngineUnavailable as error:
            log.warning("sha256 %s stays in the engine: %s", digest[:12], error)
        finally:
            self._unused.discard(digest)
            self._freeing.discard(digest)

    async def _free_once(self, digest: str) -> None:
        """Free content as soon as no request in the engine uses it, unless it came back into use meanwhile."""
        token = uuid4().hex
        pause = _FIRST
        while True:
            freed = False
            try:
                taken = await self._book.take_turn_to_free(digest, token)
                if taken:
                    freed = await self._engine.unload(digest)
            finally:
                await self.names.to_the_end(self._book.end_turn(digest, token, freed=freed))
            if freed:
                log.info("sha256 %s is freed", digest[:12])
            if freed or taken is None:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)
