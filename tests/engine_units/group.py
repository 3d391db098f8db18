"""A data-parallel group without vLLM: the real utilities and books of the cores, ranks that only remember.

What happens to a call is decided by a plan: it can fail on a rank, get lost before or behind the engine, or the caller
can go away while it is on its way.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from core.make import BASE

from steer_vllm.config import SteerConfig
from steer_vllm.engine import core
from steer_vllm.engine.admission import Admission
from steer_vllm.plan import PartSummary

PARTS = [PartSummary(True, 0, 1.0)._asdict()]
FAILED = {"state": "failed", "code": "artifact_invalid", "message": "no"}


class Rank:
    """Answers as `loader` does; a load is busy for one poll. broken: methods that fail, once each."""

    def __init__(self) -> None:
        self.store: set[str] = set()
        self.pending: dict[str, int] = {}
        self.broken: set[str] = set()
        self.base = BASE

    def steer_begin(self, folder: str, digest: str) -> dict[str, Any]:
        self.pending[digest] = 1
        return {"state": "busy"}

    def steer_poll(self, digest: str) -> dict[str, Any]:
        if digest not in self.pending or "steer_poll" in self.broken:
            return FAILED
        self.pending[digest] -= 1
        return {"state": "ready" if self.pending[digest] < 0 else "busy"}

    def steer_commit(self, digest: str) -> dict[str, Any]:
        self.pending.pop(digest)
        if "steer_commit" in self.broken:
            return FAILED
        self.store.add(digest)
        return {"state": "done", "parts": PARTS}

    def steer_drop(self, digest: str) -> dict[str, Any]:
        self.pending.pop(digest, None)
        return {"state": "done"}

    def steer_free(self, digest: str) -> dict[str, Any]:
        self.store.discard(digest)
        return {"state": "done"}

    def steer_base(self) -> dict[str, Any]:
        return {"state": "done", "base": self.base.to_config()}


class Engine:
    """One core with two ranks."""

    def __init__(self) -> None:
        self.ranks = [Rank(), Rank()]
        config = SteerConfig(additive_rows=2, low_rank_rows=2)
        self.steering = Admission(config, 1e30)
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))

    def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[Any]:
        return [getattr(rank, method)(*args) for rank in self.ranks]

    def call(self, method: str, args: tuple[str, ...]) -> Any:
        return getattr(core, method)(self, *args)


class Client:
    """vLLM's asynchronous client of the group. fate(call, engine): what becomes of a call, None for nothing special."""

    def __init__(self, engines: int, fate: Callable[[int, int], str | None] = lambda call, engine: None) -> None:
        self.engines = [Engine() for _ in range(engines)]
        self.core_engines = list(range(engines))
        self.fate = fate
        self.calls = 0
        self.caller: Callable[[], object] | None = None
        self.engine_core = weakref.proxy(self)

    async def _call_utility_async(self, method: str, *args: str, engine: int) -> Any:
        number, self.calls = self.calls, self.calls + 1
        fate = self.fate(number, engine)
        if fate == "leave" and self.caller is not None:
            self.caller()
        await asyncio.sleep(0)
        if fate == "lost before":
            raise RuntimeError("lost on the way there")
        if fate in ("broken", "spoilt"):
            self.engines[engine].ranks[1].broken.add(method if fate == "broken" else "steer_poll")
        answer = self.engines[engine].call(method, args)
        self.engines[engine].ranks[1].broken.clear()
        if fate == "lost behind":
            raise RuntimeError("lost on the way back")
        return answer

    def ensure_alive(self) -> None: ...
