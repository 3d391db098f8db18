"""vLLM's asynchronous engine with interventions, loaded and asked for as a server does it, without HTTP.

The registry and the front are the server's own. What is measured is not known here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from steer_vllm.config import SteerConfig
from steer_vllm.engine.board import Board
from steer_vllm.engine.client import AsyncEngine
from steer_vllm.engine.conversation import Call
from steer_vllm.engine.names_client import Names
from steer_vllm.engine.settings import KEY, entry
from steer_vllm.server.front import Front
from steer_vllm.server.keys import Keys
from steer_vllm.server.registry import Registry
from steer_vllm.server.settings import Limits
from steer_vllm.server.store import Store

BASE = "base"
PATH = "/v1/completions"


class Live:
    """An engine in its own process and, in this one, what a server keeps beside it. Make it with `start`."""

    def __init__(self, llm: Any, engine: AsyncEngine, front: Front) -> None:
        self.llm = llm
        self.engine = engine
        self.front = front

    @classmethod
    async def start(cls, config: SteerConfig, store: Path, **arguments: Any) -> Live:
        """store: the folder that holds artifacts. arguments: vLLM's."""
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(additional_config={KEY: entry(config)}, **arguments))
        engine = AsyncEngine(llm)
        facts = await engine.facts()
        registry = Registry(engine, Names(llm), Board(1), Store(store, ()), facts.config, (BASE,))
        registry.names.follow()
        front = Front(registry, Keys(None, None), facts.config, facts.largest, Limits())
        return cls(llm, engine, front)

    async def load(self, name: str) -> float:
        """Seconds from the request to load `store/name` until requests may name it."""
        began = time.perf_counter()
        await self.front.registry.load(name, name)
        return time.perf_counter() - began

    async def unload(self, name: str) -> None:
        """Take the name away; its content is freed in the background."""
        await self.front.registry.unload(name)

    async def facts(self) -> dict[str, Any]:
        """What the engine says of itself and of its ranks."""
        (answer,) = (await self.engine._ask(Call("steer_facts"))).values()
        return answer

    async def stream(
        self, prompt: list[int], tokens: int, intervention: str | None = None
    ) -> AsyncGenerator[float, None]:
        """When each token came (`time.perf_counter`). prompt: token ids. intervention: a name, or None."""
        body: dict[str, Any] = {"model": BASE}
        if intervention is not None:
            body["interventions"] = [{"name": intervention}]
        lease = await self.front.admit(body, PATH)
        answered = False
        try:
            if lease.ticket is not None:
                await lease.ticket.granted
            params = SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args=body.get("vllm_xargs"),
            )
            async for _ in self.llm.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
                yield time.perf_counter()
            answered = True
        finally:
            lease.end(answered)

    async def close(self) -> None:
        """End the engine."""
        await self.front.registry.names.close()
        self.llm.shutdown()
