"""The core of engine 0 without vLLM: the utilities of the book of names, called over a wire that takes its time.

Calls of one server arrive in their order, are handled one at a time, and are answered in their order, as in vLLM; what
crosses is plain JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

from steer_vllm.engine import names
from steer_vllm.engine.names import NameBook
from steer_vllm.engine.names_client import Names

ENGINES = [b"\0\0", b"\1\0"]


class FakeCore:
    """The core process. delay: the longest pause of a message on its way, seconds; calls: what arrived, in order."""

    def __init__(self, delay: float = 0.0, seed: int = 0) -> None:
        self.delay = delay
        self.calls: list[str] = []
        self.fails: Exception | None = None
        self.dead = False  # takes calls and answers none
        self._draw = random.Random(seed)
        self._process = SimpleNamespace()

    @property
    def book(self) -> NameBook:
        return names._book(self._process)

    def client(self, server: int, servers: int) -> Names:
        """The side of one API server. One that is alone asks this for nothing."""
        return Names(SimpleNamespace(engine_core=_Client(self, server, servers)))

    async def pause(self) -> None:
        await asyncio.sleep(self._draw.random() * self.delay)

    def handle(self, method: str, args: list[Any]) -> Any:
        self.calls.append(method)
        return getattr(names, method)(self._process, *args)


class _Client:
    """What the plugin knows of vLLM's client."""

    def __init__(self, core: FakeCore, server: int, servers: int) -> None:
        self.client_index, self.client_count = server, servers
        self.core_engines = ENGINES
        self._core = core
        self._there, self._back = asyncio.Lock(), asyncio.Lock()

    def ensure_alive(self) -> None:
        if self._core.dead:
            raise RuntimeError("the engine core is dead")

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        """As vLLM's: a caller that is cancelled loses the answer, not the call."""
        assert engine == ENGINES[0]
        answer = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._deliver(json.dumps([method, *args]), answer))
        task.add_done_callback(lambda done: done.cancelled() or done.result())
        return await answer

    async def _deliver(self, message: str, answer: asyncio.Future[Any]) -> None:
        async with self._there:  # locks are first come, first served
            await self._core.pause()
            method, *args = json.loads(message)
            fails = self._core.fails
            result = None if fails else json.dumps(self._core.handle(method, args))
        async with self._back:
            await self._core.pause()
            if answer.done() or self._core.dead:
                return
            if fails:
                answer.set_exception(fails)
            else:
                assert result is not None
                answer.set_result(json.loads(result))
