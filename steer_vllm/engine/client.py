"""The front's side of the engine: load, unload and ask, asynchronously or not.

A conversation with the engine core is written once, as a generator that yields calls and waits; two small drivers run
it. Names, requests and HTTP are not known here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ..config import SteerConfig
from ..errors import EngineUnavailable, StartupRefused, by_code
from ..fingerprint import Fingerprint
from ..plan import PartSummary, Summary
from .answer import Answer

T = TypeVar("T")


@dataclass(frozen=True)
class EngineFacts:
    """What the engine says of itself. largest: the largest finite value of its dtype; table_bytes: of one rank."""

    config: SteerConfig
    base: Fingerprint
    dtype: str
    largest: float
    table_bytes: int
    ranks: int


class Call(NamedTuple):
    """A utility of the engine core, by name."""

    method: str
    args: tuple[str, ...]


class Wait(NamedTuple):
    """Let the engine get on."""

    seconds: float


Conversation = Generator[Call | Wait, Answer | None, T]


def _ask(method: str, *args: str) -> Conversation[Answer]:
    answer = yield Call(method, args)
    assert answer is not None
    return answer


def _raise(answer: Answer) -> None:
    if answer["state"] == "failed":
        raise by_code(answer["code"], answer["message"])


def _load(folder: str, digest: str) -> Conversation[Summary]:
    """Two phases: prepare on every rank while steps go on, then one short commit."""
    answer = yield from _ask("steer_begin", folder, digest)
    pause = 0.002
    while answer["state"] == "busy":
        yield Wait(pause)
        pause = min(2 * pause, 0.1)
        answer = yield from _ask("steer_poll", digest)
    if answer["state"] == "failed":
        yield from _ask("steer_drop", digest)
    if answer["state"] == "ready":
        answer = yield from _ask("steer_commit", digest)
    _raise(answer)
    return Summary(digest, tuple(PartSummary(**part) for part in answer["parts"]))


def _unload(digest: str) -> Conversation[bool]:
    answer = yield from _ask("steer_free", digest)
    _raise(answer)
    return bool(answer["state"] == "done")


def _facts() -> Conversation[EngineFacts]:
    answer = yield from _ask("steer_facts")
    if answer["state"] == "failed":
        raise StartupRefused(
            f"the engine runs without steer-vllm ({answer['message']}): is the plugin installed in its environment and "
            "allowed by VLLM_PLUGINS?"
        )
    return EngineFacts(
        config=SteerConfig.from_dict(answer["config"]),
        base=Fingerprint.from_config(answer["base"], "engine"),
        dtype=answer["dtype"],
        largest=answer["largest"],
        table_bytes=max(rank["table_bytes"] for rank in answer["ranks"]),
        ranks=len(answer["ranks"]),
    )


class AsyncEngine:
    """Over vLLM's `AsyncLLM`."""

    def __init__(self, engine_client: Any) -> None:
        self._core = engine_client.engine_core

    async def load(self, folder: str, digest: str) -> Summary:
        """Bring an artifact folder into every rank; content that is there already costs one call.

        Errors: `ArtifactInvalid` as the first rank to refuse says it, `EngineUnavailable`.
        """
        return await self._run(_load(folder, digest))

    async def unload(self, digest: str) -> bool:
        """Free content in every rank; False while requests in the engine use it (new ones are turned away already)."""
        return await self._run(_unload(digest))

    async def facts(self) -> EngineFacts:
        """Errors: `StartupRefused` when a process of the engine lacks the plugin or steering is off."""
        return await self._run(_facts())

    async def _run(self, conversation: Conversation[T]) -> T:
        answer: Answer | None = None
        while True:
            try:
                step = conversation.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(step, Wait):
                await asyncio.sleep(step.seconds)
                answer = None
            else:
                try:
                    answer = await self._core.call_utility_async(step.method, *step.args)
                except Exception as error:
                    answer = _failed(error)


class SyncEngine:
    """Over the engine of vLLM's offline `LLM`, in this process or another."""

    def __init__(self, llm_engine: Any) -> None:
        client = llm_engine.engine_core
        self._call = getattr(client, "call_utility", None) or (
            lambda method, *args: getattr(client.engine_core, method)(*args)
        )

    def load(self, folder: str, digest: str) -> Summary:
        """As `AsyncEngine.load`."""
        return self._run(_load(folder, digest))

    def unload(self, digest: str) -> bool:
        """As `AsyncEngine.unload`."""
        return self._run(_unload(digest))

    def facts(self) -> EngineFacts:
        """As `AsyncEngine.facts`."""
        return self._run(_facts())

    def _run(self, conversation: Conversation[T]) -> T:
        answer: Answer | None = None
        while True:
            try:
                step = conversation.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(step, Wait):
                time.sleep(step.seconds)
                answer = None
            else:
                try:
                    answer = self._call(step.method, *step.args)
                except Exception as error:
                    answer = _failed(error)


def _failed(error: Exception) -> Answer:
    """A call that did not come back: the conversation goes on with an answer, so that it can clean up."""
    return {"state": "failed", "code": EngineUnavailable.code, "message": f"{type(error).__name__}: {error}"}
