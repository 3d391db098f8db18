"""What is said between a front and the engine cores: load, unload, settle, base, facts.

Each conversation is written once, as a generator that yields calls and waits and is sent every engine's answer; the
drivers in `client` run it. It knows that there may be several engines (data parallelism), and no vLLM.

Content is on every engine or on none: what one engine cannot load, the others give up. Nothing here relies on an order
of calls between engines. It does rely on one conversation at a time for a digest: several fronts hold a lock for each.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ..config import SteerConfig
from ..errors import EngineUnavailable, StartupRefused, SteerError, by_code
from ..fingerprint import Fingerprint
from ..plan import PartSummary, Summary, merge
from .answer import Answer

T = TypeVar("T")
Answers = dict[int, Answer]
"""By the number of the engine."""


class Call(NamedTuple):
    """A utility of the engine cores, by name. engines: their numbers, None for all of them.

    leave: when the caller has gone meanwhile, `GivenUp` is thrown in place of the answers.
    """

    method: str
    args: tuple[Any, ...] = ()
    engines: tuple[int, ...] | None = None
    leave: bool = False


class Wait(NamedTuple):
    """Let the engines get on."""

    seconds: float
    leave: bool = True


class GivenUp(Exception):
    """Thrown into a conversation whose caller has gone: it cleans up and ends."""


Conversation = Generator[Call | Wait, Answers, T]


@dataclass(frozen=True)
class EngineFacts:
    """What the engines say of themselves. largest: the largest finite value of their dtype; table_bytes: of one rank;
    ranks: of all engines together."""

    config: SteerConfig
    dtype: str
    largest: float
    table_bytes: int
    ranks: int
    engines: int


def load(folder: str, digest: str) -> Conversation[Summary]:
    """Two phases: prepare on every rank of every engine while steps go on, then one short commit.

    A commit that comes too early is answered "busy". To ask beforehand would be one call more, and a call waits for a
    step of those who decode.

    Whatever goes wrong, a caller that gives up included, everything is as it was: a load that was begun is dropped, and
    what was committed is withdrawn where nothing had opened it before.
    """
    begun: Answers = {}
    done: Answers = {}
    committing = False
    try:
        begun = _all_well((yield Call("steer_begin", (folder, digest), leave=True)))
        coming, early, pause = tuple(begun), _having(begun, "busy"), 0.002
        committing = True
        while coming:
            if early:
                yield Wait(pause)
                pause = min(1.5 * pause, 0.05)
            done |= _all_well((yield Call("steer_commit", (digest,), coming, leave=True)))
            coming = early = _having(done, "busy")
    except Exception:
        yield Call("steer_drop", (digest,))
        if committing:
            yield from _withdraw(digest, tuple(engine for engine in begun if begun[engine]["held"] != "open"))
        raise
    return merge(digest, [[PartSummary(**part) for part in answer["parts"]] for answer in done.values()])


def _withdraw(digest: str, engines: tuple[int, ...]) -> Conversation[None]:
    """Free content that has just been committed and that no name has."""
    if engines:
        closed = yield Call("steer_close", (digest,), engines)
        if _having(closed, "ready") == engines:
            yield Call("steer_free", (digest,), engines)


def unload(digest: str) -> Conversation[bool]:
    """Close it on every engine, and free it when no request uses it on any: until then a load opens it again."""
    closed = _all_well((yield Call("steer_close", (digest,))))
    if _having(closed, "busy"):
        return False
    freed = _all_well((yield Call("steer_free", (digest,))))
    return not _having(freed, "busy")


def check_adapter(lora_request: Any, digest: str) -> Conversation[None]:
    """Let requests combine vLLM's `LoRARequest` with this content. Errors: `Unsupported` where that is not exact."""
    _all_well((yield Call("steer_adapter", (lora_request, digest))))


def settle() -> Conversation[None]:
    """What was sent to the engines before is done: a request that was aborted holds nothing any more."""
    _all_well((yield Call("steer_settle")))


def base() -> Conversation[Fingerprint]:
    """The model served now: a reload may bring another.

    Errors: `EngineUnavailable` while an engine does not know which weights it has, or they have different ones.
    """
    answers = _all_well((yield Call("steer_base")))
    first, *others = (answer["base"] for answer in answers.values())
    if any(other != first for other in others):
        raise EngineUnavailable("the engines serve different models: reload the weights of all of them")
    return Fingerprint.from_config(first, "engine")


def facts() -> Conversation[EngineFacts]:
    """Errors: `StartupRefused` when an engine lacks the plugin, or differs from the others."""
    try:
        answers = _all_well((yield Call("steer_facts")))
    except SteerError as error:
        raise StartupRefused(
            f"the engine runs without steer-vllm ({error.message}): is the plugin installed in its environment and "
            "allowed by VLLM_PLUGINS?"
        ) from error
    first, *others = answers.values()
    for name in ("config", "base", "dtype"):
        if any(other[name] != first[name] for other in others):
            raise StartupRefused(f"the engines differ in {name}: {[answer[name] for answer in answers.values()]}")
    ranks = [rank for answer in answers.values() for rank in answer["ranks"]]
    return EngineFacts(
        config=SteerConfig.from_dict(first["config"]),
        dtype=first["dtype"],
        largest=first["largest"],
        table_bytes=max(rank["table_bytes"] for rank in ranks),
        ranks=len(ranks),
        engines=len(answers),
    )


def lost(error: Exception) -> Answer:
    """In place of an answer that did not come: the conversation goes on with it, so that it can clean up."""
    return {"state": "failed", "code": EngineUnavailable.code, "message": f"{type(error).__name__}: {error}"}


def _having(answers: Answers, state: str) -> tuple[int, ...]:
    return tuple(engine for engine, answer in answers.items() if answer["state"] == state)


def _all_well(answers: Answers) -> Answers:
    """The answers. Errors: that of the first engine that failed."""
    failed = _having(answers, "failed")
    if failed:
        answer = answers[failed[0]]
        where = f"engine {failed[0]} of {len(answers)}: " if len(failed) < len(answers) else ""
        raise by_code(answer["code"], where + answer["message"])
    return answers
