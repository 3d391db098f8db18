"""An API server's side of the book of names: one call to the core of engine 0 each.

Always that core, also where several engines share the load. What the answers mean for requests is the server's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from ..catalog import Entry, Snapshot
from ..errors import EngineUnavailable, by_code
from .answer import Answer

_ALIVE = 0.5
"""Seconds between looks at whether the engines still live: vLLM leaves the calls to a dead one unanswered."""


class Names:
    """Over vLLM's `AsyncLLM`. server, servers: which of how many API servers this is.

    Every method raises `EngineUnavailable` when the core does not answer.
    """

    def __init__(self, engine_client: Any) -> None:
        self._core = engine_client.engine_core
        self.server: int = self._core.client_index
        self.servers: int = self._core.client_count

    async def copy(self, needed: Collection[str]) -> Snapshot:
        """All names; this server then holds what they point to and what it needs besides, and nothing else."""
        answer = await self._ask("copy", self.server, sorted(needed))
        return Snapshot(
            answer["epoch"], answer["opened"], tuple(map(Entry.from_wire, answer["entries"])), tuple(answer["unused"])
        )

    async def open(self) -> None:
        """Say that the artifacts of the start are loaded."""
        await self._ask("open")

    async def publish(self, entry: Entry, token: str, *, replace: bool) -> int:
        """Point a name to loaded content; the epoch after it. Errors: `ArtifactExists`."""
        return int((await self._ask("publish", entry.to_wire(), token, replace))["epoch"])

    async def withdraw(self, name: str) -> tuple[int, Entry]:
        """Take a name away: the epoch after it and what it pointed to. Errors: `ModelNotFound`."""
        answer = await self._ask("withdraw", name)
        return answer["epoch"], Entry.from_wire(answer["entry"])

    async def take_turn(self, digest: str, token: str) -> bool:
        """Whether the token may now load this content; False while another loads or frees it."""
        return bool((await self._ask("turn", digest, token))["state"] == "done")

    async def take_turn_to_free(self, digest: str, token: str) -> bool | None:
        """Likewise for freeing it; None when there is nothing to free."""
        answer = await self._ask("turn_to_free", digest, token)
        return bool(answer["state"] == "done") if answer["needed"] else None

    async def end_turn(self, digest: str, token: str, *, freed: bool = False) -> None:
        """Give the turn back; no error without one."""
        await self._ask("end_turn", digest, token, freed)

    async def _ask(self, what: str, *args: Any) -> Answer:
        """Ledger: calls `AsyncMPClient._call_utility_async`, which takes the engine.

        Why: of a data-parallel group, the public call reaches every engine. Since 0.26. Can go when that takes engines.
        """
        core = self._core
        reply = asyncio.ensure_future(
            core._call_utility_async(f"steer_names_{what}", *args, engine=core.core_engine),
        )
        try:
            while not (await asyncio.wait({reply}, timeout=_ALIVE))[0]:
                core.ensure_alive()
            answer: Answer = reply.result()
        except Exception as error:
            raise EngineUnavailable(f"{type(error).__name__}: {error}") from error
        finally:
            reply.cancel()
        if answer["state"] == "failed":
            raise by_code(answer["code"], answer["message"])
        return answer
