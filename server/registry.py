"""Loading and unloading while requests run: a name is seen once the engine has it, content goes with its last user.

Sits between the catalog of names and the engine, which it knows by a protocol. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from pathlib import Path
from typing import Protocol

from ..catalog import Catalog, Entry, check_name
from ..config import SteerConfig
from ..errors import EngineUnavailable
from ..fingerprint import Fingerprint
from ..fit import check_fit
from ..intervention import Intervention
from ..plan import Summary
from .store import Store

log = logging.getLogger("vllm.steer_vllm")  # vLLM's handlers print what is below "vllm"

_FREE_FIRST, _FREE_LONGEST = 0.05, 2.0  # seconds between attempts to free what a request still uses


class Engine(Protocol):
    """What the registry asks of the engine."""

    async def load(self, folder: str, digest: str) -> Summary:
        """Load on every rank. Errors: `ArtifactInvalid`, `EngineUnavailable`. Loading what is there is no error."""

    async def unload(self, digest: str) -> bool:
        """Free on every rank; False while a request in the engine uses it."""


class Registry:
    """Names and what they point to, for one event loop."""

    def __init__(
        self, engine: Engine, store: Store, config: SteerConfig, base: Fingerprint, base_names: tuple[str, ...]
    ) -> None:
        self.catalog = Catalog()
        self.base_names = base_names
        self._engine = engine
        self._store = store
        self._config = config
        self._base = base
        self._by_name: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._by_digest: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._freeing: dict[str, asyncio.Task[None]] = {}

    async def load(self, name: object, source: object, *, load_inplace: bool = False) -> Entry:
        """Load an artifact and publish it. The same content under the same name again is no error.

        Errors: `InvalidIntervention` for the name or source; `ArtifactInvalid`; `ArtifactExists` when the name has
        other content and load_inplace is false; `EngineUnavailable`. On any error everything is as before.
        """
        for base_name in self.base_names:
            name = check_name(name, base_name)
        name = check_name(name)
        folder = self._store.folder(source)
        async with self._by_name[name]:
            intervention = await asyncio.to_thread(self._read, folder)
            digest = intervention.digest
            self.catalog.check_free(name, digest, load_inplace)
            async with self._by_digest[digest]:
                try:
                    summary = await self._engine.load(str(folder), digest)
                except asyncio.CancelledError:
                    self._free_unused({digest})  # the engine may have it by now
                    raise
                entry = Entry.of(name, str(source), intervention, summary)
                replaced = self.catalog.publish(entry)
            if replaced is not None:
                self._free_unused({replaced.digest})
            log.info("intervention %s: %s, sha256 %s, from %s", name, entry.method, digest[:12], source)
            return entry

    def unload(self, name: str) -> Entry:
        """Withdraw a name at once; its content is freed when the last request that uses it has ended.

        Errors: `ModelNotFound`.
        """
        entry = self.catalog.withdraw(name)
        self._free_unused({entry.digest})
        log.info("intervention %s is withdrawn", name)
        return entry

    def enter(self, digests: set[str]) -> None:
        """A request begins to use these contents."""
        self.catalog.enter(digests)

    def leave(self, digests: set[str]) -> None:
        """A request has ended."""
        self._free_unused(self.catalog.leave(digests))

    async def close(self) -> None:
        """Stop freeing in the background."""
        tasks = list(self._freeing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _read(self, folder: Path) -> Intervention:
        """Read and check an artifact against the model and the tables. Errors: `ArtifactInvalid`."""
        intervention = Intervention.load(folder)
        check_fit(intervention, self._base, self._config, str(folder))
        return intervention

    def _free_unused(self, digests: set[str]) -> None:
        for digest in digests:
            if self.catalog.is_unused(digest) and digest not in self._freeing:
                self._freeing[digest] = asyncio.get_running_loop().create_task(self._free(digest))

    async def _free(self, digest: str) -> None:
        """Free content in the engine, once nothing there uses it, unless it came back into use meanwhile."""
        pause = _FREE_FIRST
        try:
            while True:
                async with self._by_digest[digest]:
                    if not self.catalog.is_unused(digest) or await self._engine.unload(digest):
                        return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _FREE_LONGEST)
        except EngineUnavailable as error:
            log.warning("sha256 %s stays in the engine: %s", digest[:12], error)
        finally:
            del self._freeing[digest]  # nothing awaits between the last look at the catalog and here
