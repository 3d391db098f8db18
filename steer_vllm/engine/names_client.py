"""An API server's side of the book of names.

Several servers share one in the core of engine 0, also where several engines share the load: a call is answered between
two steps. A server that is alone keeps the book itself. What the answers mean for requests is the server's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..catalog import Entry, Snapshot
from ..errors import by_code
from . import names
from .answer import Answer
from .client import ask

_ENGINE = 0
"""The engine whose core keeps the book of several servers."""


class Names:
    """Over vLLM's `AsyncLLM`. server, servers: which of how many API servers this is.

    Every method raises `EngineUnavailable` when the core is asked and does not answer.
    """

    def __init__(self, engine_client: Any) -> None:
        self._core = engine_client.engine_core
        self.server: int = self._core.client_index
        self.servers: int = self._core.client_count

    async def copy(self, needed: Collection[str], since: int) -> Snapshot:
        """The changes since that epoch; this server then holds what all names point to and what it needs besides, and
        nothing else."""
        answer = await self._ask("copy", self.server, list(needed), since)
        return Snapshot(
            answer["epoch"],
            answer["opened"],
            tuple(map(Entry.from_wire, answer["entries"])),
            tuple(answer["gone"]),
            tuple(answer["unused"]),
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
        utility = f"steer_names_{what}"
        answer: Answer
        if self.servers == 1:
            answer = getattr(names, utility)(self._core, *args)
        else:
            answer = await ask(self._core, _ENGINE, utility, *args)
        if answer["state"] == "failed":
            raise by_code(answer["code"], answer["message"])
        return answer
