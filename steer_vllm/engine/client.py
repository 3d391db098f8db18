"""The front's side of the engine: load, unload and ask, asynchronously or not.

Two small drivers of the conversations: they carry calls to every engine of a data-parallel group and bring back each
one's answer. Names, requests and HTTP are not known here.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..fingerprint import Fingerprint
from ..plan import Summary
from . import conversation
from .answer import Answer
from .conversation import Answers, Call, Conversation, EngineFacts, GivenUp, Wait, lost

__all__ = ["AsyncEngine", "EngineFacts", "SyncEngine"]

T = TypeVar("T")
_ALIVE = 0.5
"""Seconds between looks at whether the engines still live: vLLM leaves the calls to a dead one unanswered."""


class AsyncEngine:
    """Over vLLM's `AsyncLLM`, for one event loop.

    Several of them, in several processes, may talk to the same engines; loads and unloads of one digest must then be
    kept apart by a lock that they share.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client.engine_core

    async def load(self, folder: str, digest: str) -> Summary:
        """Bring an artifact folder into every rank of every engine, or into none; a cancelled load leaves nothing.

        Errors: `ArtifactInvalid` and `HostMemoryFull` as the first rank to refuse says it, `EngineUnavailable`.
        """
        return await self._run(conversation.load(folder, digest))

    async def unload(self, digest: str) -> bool:
        """Free content in every engine; False while requests in one use it (new ones are turned away already)."""
        return await self._run(conversation.unload(digest))

    async def settle(self) -> None:
        """Come back when the engines have done everything that was sent before, aborts included."""
        await self._run(conversation.settle())

    async def check_adapter(self, lora_request: Any, digest: str) -> None:
        """Let requests combine vLLM's `LoRARequest` with this content. Errors: `Unsupported` if that is not exact."""
        await self._run(conversation.check_adapter(lora_request, digest))

    async def base(self) -> Fingerprint:
        """The model served now. Errors: `EngineUnavailable` while that is not known."""
        return await self._run(conversation.base())

    async def facts(self) -> EngineFacts:
        """Errors: `StartupRefused` when a process of the engine lacks the plugin or steering is off."""
        return await self._run(conversation.facts())

    async def _run(self, talk: Conversation[T]) -> T:
        """Run a conversation to its end. It is not left in the middle: a caller that is cancelled waits for the answer
        that is on its way, and until the conversation has cleaned up."""
        gone = False
        try:
            step = next(talk)
            while True:
                work = asyncio.ensure_future(self._do(step))
                gone |= await _outlast(work)
                step = talk.throw(GivenUp()) if gone and step.leave else talk.send(work.result())
        except StopIteration as end:
            result: T = end.value
        except Exception:
            if gone:
                raise asyncio.CancelledError from None
            raise
        if gone:
            raise asyncio.CancelledError
        return result

    async def _do(self, step: Call | Wait) -> Answers:
        if isinstance(step, Call):
            return await self._ask(step)
        await asyncio.sleep(step.seconds)
        return {}

    async def _ask(self, call: Call) -> Answers:
        chosen = tuple(range(len(self._client.core_engines))) if call.engines is None else call.engines
        answers = await asyncio.gather(*(ask(self._client, number, call.method, *call.args) for number in chosen))
        return dict(zip(chosen, answers, strict=True))


async def ask(client: Any, engine: int, method: str, *args: Any) -> Answer:
    """What the core of one engine answers; client: vLLM's `AsyncMPClient`. Raises nothing.

    Ledger: calls `AsyncMPClient._call_utility_async`, which takes the engine.

    Why: of a data-parallel group, the public call brings back the first engine's answer only. Since 0.26; 0.32 has
    `call_utility_all_async`, which reaches all engines or none of them. Can go when that takes engines.
    """
    reply = asyncio.ensure_future(client._call_utility_async(method, *args, engine=client.core_engines[engine]))
    try:
        while not (await asyncio.wait({reply}, timeout=_ALIVE))[0]:
            client.ensure_alive()
        answer: Answer = reply.result()
        return answer
    except Exception as error:
        return lost(error)
    finally:
        reply.cancel()


async def _outlast(work: asyncio.Future[Any]) -> bool:
    """Wait for its end in any case. True when the waiting task was cancelled meanwhile."""
    try:
        await asyncio.wait({work})
    except asyncio.CancelledError:
        await _outlast(work)
        return True
    return False


class SyncEngine:
    """Over the one engine of vLLM's offline `LLM`, in this process or another."""

    def __init__(self, llm_engine: Any) -> None:
        self._client = llm_engine.engine_core

    def load(self, folder: str, digest: str) -> Summary:
        """As `AsyncEngine.load`."""
        return self._run(conversation.load(folder, digest))

    def unload(self, digest: str) -> bool:
        """As `AsyncEngine.unload`."""
        return self._run(conversation.unload(digest))

    def check_adapter(self, lora_request: Any, digest: str) -> None:
        """As `AsyncEngine.check_adapter`."""
        self._run(conversation.check_adapter(lora_request, digest))

    def base(self) -> Fingerprint:
        """As `AsyncEngine.base`."""
        return self._run(conversation.base())

    def facts(self) -> EngineFacts:
        """As `AsyncEngine.facts`."""
        return self._run(conversation.facts())

    def _run(self, talk: Conversation[T]) -> T:
        """Run a conversation to its end. One that is interrupted cleans up; a second interrupt ends it at once."""
        gone = False
        try:
            step = next(talk)
            while True:
                answers = self._do(step)
                if answers is not None:
                    step = talk.send(answers)
                elif gone:
                    raise KeyboardInterrupt
                else:
                    gone = True
                    step = talk.throw(GivenUp()) if step.leave else step  # what cleans up may be asked for twice
        except StopIteration as end:
            result: T = end.value
        except Exception:
            if gone:
                raise KeyboardInterrupt from None
            raise
        if gone:
            raise KeyboardInterrupt
        return result

    def _do(self, step: Call | Wait) -> Answers | None:
        """None when it was interrupted."""
        try:
            if isinstance(step, Call):
                return {0: self._ask(step.method, *step.args)}
            time.sleep(step.seconds)
        except KeyboardInterrupt:
            return None
        return {}

    def _ask(self, method: str, *args: str) -> Answer:
        try:
            if not hasattr(self._client, "call_utility"):  # the engine is in this process
                answer: Answer = getattr(self._client.engine_core, method)(*args)
                return answer
            return _watched(lambda: self._client.call_utility(method, *args), self._client.ensure_alive)
        except Exception as error:
            return lost(error)


def _watched(call: Callable[[], Answer], check: Callable[[], None]) -> Answer:
    """What the call returns or raises, unless the check raises first: the call is left to its thread then."""
    found: list[Answer | Exception] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="steer-call", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_ALIVE)
        if not found:
            check()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
