"""Conversations with the engine core, against a core that answers as told: busy, failed, gone."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from steer_vllm.config import SteerConfig
from steer_vllm.engine import client
from steer_vllm.engine.client import AsyncEngine, SyncEngine
from steer_vllm.errors import ArtifactInvalid, EngineUnavailable, StartupRefused, SteerError
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.plan import PartSummary, Summary

BASE = Fingerprint(8, 2, 2, 4, 11, None)
PART = PartSummary(True, 2, 3.0)
BUSY, READY, FINE = {"state": "busy"}, {"state": "ready"}, {"state": "done"}
NEW = {"held": "absent"}
DONE = {"state": "done", "parts": [PART._asdict()]}
BAD = {"state": "failed", "code": "artifact_invalid", "message": "out/x: head 99 does not exist"}
LOST = RuntimeError("the pipe is closed")


class Core:
    """One engine that answers by method; an exception among the answers is raised. Keeps every call."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = {f"steer_{name}": list(found) for name, found in answers.items()}
        self.calls: list[tuple[str, ...]] = []
        self.core_engines = [self]

    def call_utility(self, method: str, *args: str) -> Any:
        self.calls.append((method, *args))
        answer = self.answers[method].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _call_utility_async(self, method: str, *args: str, engine: Core) -> Any:
        return engine.call_utility(method, *args)

    def ensure_alive(self) -> None: ...

    @property
    def methods(self) -> list[str]:
        return [call[0].removeprefix("steer_") for call in self.calls]


Ask = Callable[..., Any]


class Holder:
    def __init__(self, core: Any) -> None:
        self.engine_core = core


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Calls a method of the engine over a core; both drivers have the same conversations, without their waiting."""
    sleep = asyncio.sleep
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(client.asyncio, "sleep", lambda seconds: sleep(0))

    def run(core: Core, method: str, *args: str) -> Any:
        if request.param == "sync":
            return getattr(SyncEngine(Holder(core)), method)(*args)
        return asyncio.run(getattr(AsyncEngine(Holder(core)), method)(*args))

    return run


def test_load(ask: Ask) -> None:
    core = Core(begin=[{**BUSY, **NEW}], commit=[BUSY, BUSY, DONE])
    assert ask(core, "load", "folder", "digest") == Summary("digest", (PART,))
    assert core.calls == [
        ("steer_begin", "folder", "digest"),
        *[("steer_commit", "digest")] * 3,
    ]


def test_content_that_is_there_is_not_read_again(ask: Ask) -> None:
    core = Core(begin=[{**READY, "held": "open"}], commit=[DONE])
    assert ask(core, "load", "folder", "digest") == Summary("digest", (PART,))
    assert core.methods == ["begin", "commit"]


@pytest.mark.parametrize(
    "answers",
    [
        {"begin": [{**BAD, **NEW}]},
        {"begin": [{**BUSY, **NEW}], "commit": [BAD]},
        {"begin": [{**BUSY, **NEW}], "commit": [BUSY, BAD]},
    ],
)
def test_a_refusal_is_cleaned_up_and_said(ask: Ask, answers: dict[str, list[Any]]) -> None:
    """Invariant: on every rank or on none: what some ranks have read is dropped, and the first refusal is the error."""
    core = Core(**answers, drop=[FINE], close=[READY], free=[FINE])
    with pytest.raises(ArtifactInvalid, match="head 99"):
        ask(core, "load", "folder", "digest")
    asked = core.methods[sum(map(len, answers.values())) :]
    assert asked == (["drop", "close", "free"] if "commit" in answers else ["drop"])


@pytest.mark.parametrize("answer", [BAD, LOST])
def test_a_failed_commit_is_withdrawn(ask: Ask, answer: Any) -> None:
    """A lost reply may stand for a commit that was done: no content stays without a name."""
    core = Core(begin=[{**READY, **NEW}], commit=[answer], drop=[FINE], close=[READY], free=[FINE])
    with pytest.raises(SteerError, match=r"head 99|the pipe is closed"):
        ask(core, "load", "folder", "digest")
    assert core.methods == ["begin", "commit", "drop", "close", "free"]


def test_content_that_was_open_before_stays(ask: Ask) -> None:
    """Another name has it."""
    core = Core(begin=[{**READY, "held": "open"}], commit=[LOST], drop=[FINE])
    with pytest.raises(EngineUnavailable):
        ask(core, "load", "folder", "digest")
    assert core.methods == ["begin", "commit", "drop"]


@pytest.mark.parametrize("at", ["begin", "commit"])
def test_a_lost_reply_is_cleaned_up(ask: Ask, at: str) -> None:
    """The call may have been done: what it left is dropped, and the front is told that the engine did not answer."""
    answers: dict[str, list[Any]] = {"begin": [{**BUSY, **NEW}], "drop": [FINE], "close": [READY], "free": [FINE]}
    answers[at] = [LOST]
    core = Core(**answers)
    with pytest.raises(EngineUnavailable, match="RuntimeError: the pipe is closed"):
        ask(core, "load", "folder", "digest")
    assert core.methods == ["begin", "drop"] if at == "begin" else ["begin", "commit", "drop", "close", "free"]


def test_a_core_that_is_gone_is_one_error(ask: Ask) -> None:
    """Also when cleaning up fails: the first error is the one that is said."""
    core = Core(begin=[LOST], drop=[RuntimeError("still closed")])
    with pytest.raises(EngineUnavailable, match="the pipe is closed"):
        ask(core, "load", "folder", "digest")


def test_unknown_codes_are_the_engines_fault(ask: Ask) -> None:
    core = Core(begin=[{"state": "failed", "code": "new_code", "message": "m", **NEW}], drop=[FINE])
    with pytest.raises(EngineUnavailable, match="m"):
        ask(core, "load", "folder", "digest")


def test_unload(ask: Ask) -> None:
    core = Core(close=[READY], free=[FINE])
    assert ask(core, "unload", "digest")
    assert core.calls == [("steer_close", "digest"), ("steer_free", "digest")]


@pytest.mark.parametrize("answers", [{"close": [BUSY]}, {"close": [READY], "free": [BUSY]}])
def test_what_is_in_use_is_not_freed(ask: Ask, answers: dict[str, list[Any]]) -> None:
    assert not ask(Core(**answers), "unload", "digest")


@pytest.mark.parametrize("answer", [BAD, LOST])
def test_unload_that_fails(ask: Ask, answer: Any) -> None:
    with pytest.raises(SteerError):
        ask(Core(close=[answer]), "unload", "digest")
    with pytest.raises(SteerError):
        ask(Core(close=[READY], free=[answer]), "unload", "digest")


def facts(**more: Any) -> dict[str, Any]:
    ranks = [{"state": "done", "table_bytes": size, "loaded": []} for size in (100, 120)]
    return {
        "state": "done", "config": SteerConfig(max_rank=4).to_dict(), "dtype": "float16", "largest": 65504.0,
        "base": BASE.to_config(), "ranks": ranks, "admission": {}, **more,
    }  # fmt: skip


def test_facts(ask: Ask) -> None:
    found = ask(Core(facts=[facts()]), "facts")
    assert found.config == SteerConfig(max_rank=4)
    assert (found.dtype, found.largest, found.table_bytes) == ("float16", 65504.0, 120)
    assert (found.ranks, found.engines) == (2, 1)


def test_base(ask: Ask) -> None:
    """Asked anew each time; one engine that does not know its weights, or has others, is an error."""
    other = dataclasses.replace(BASE, weights="cd" * 32)
    core = Core(base=[{"state": "done", "base": found.to_config()} for found in (BASE, other)])
    assert [ask(core, "base"), ask(core, "base")] == [BASE, other]
    with pytest.raises(SteerError):
        ask(Core(base=[BAD]), "base")


@pytest.mark.parametrize("answer", [{"state": "failed", "code": "internal_error", "message": "off"}, LOST])
def test_an_engine_without_steering_refuses_to_start(ask: Ask, answer: Any) -> None:
    with pytest.raises(StartupRefused, match="without steer-vllm"):
        ask(Core(facts=[answer]), "facts")


def test_an_engine_in_this_process() -> None:
    """vLLM's offline client without processes has no call_utility: the core's method is called."""

    class Inner:
        def steer_close(self, digest: str) -> dict[str, str]:
            return {"state": "ready" if digest == "d" else "busy"}

        def steer_free(self, digest: str) -> dict[str, str]:
            return {"state": "done"}

    class InProcess:
        engine_core = Inner()

    assert SyncEngine(Holder(InProcess())).unload("d")
    assert not SyncEngine(Holder(InProcess())).unload("e")


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is asked a dozen times in a load of a second, not five hundred."""
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    core = Core(begin=[{**BUSY, **NEW}], commit=[*[BUSY] * 12, DONE])
    SyncEngine(Holder(core)).load("folder", "digest")
    assert waits == sorted(waits)
    assert waits[-1] == 0.05
    assert sum(waits) < 2


def test_an_interrupted_load_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, which goes on afterwards."""

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.time, "sleep", interrupted)
    core = Core(begin=[{**BUSY, **NEW}], drop=[FINE], close=[READY], free=[FINE])
    with pytest.raises(KeyboardInterrupt):
        SyncEngine(Holder(core)).load("folder", "digest")
    assert core.methods == ["begin", "drop", "close", "free"]


@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_while_it_cleans_up(monkeypatch: pytest.MonkeyPatch, interrupts: int) -> None:
    """The first is heard when it is done; who insists is let go at once."""
    ask, left = SyncEngine._ask, interrupts

    def interrupted(self: SyncEngine, method: str, *args: str) -> Any:
        nonlocal left
        if method == "steer_drop" and left:
            left -= 1
            raise KeyboardInterrupt
        return ask(self, method, *args)

    monkeypatch.setattr(SyncEngine, "_ask", interrupted)
    core = Core(begin=[{**BAD, **NEW}], drop=[FINE])
    with pytest.raises(KeyboardInterrupt):
        SyncEngine(Holder(core)).load("folder", "digest")
    assert core.methods == ["begin", "drop"][: 3 - interrupts]


@pytest.mark.parametrize("gone", ["before", "meanwhile"])
@pytest.mark.parametrize("driver", ["sync", "async"])
def test_a_dead_engine_is_no_hang(driver: str, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM leaves a call to an engine that died unanswered."""
    monkeypatch.setattr(client, "_ALIVE", 0.01)

    class Dead(Core):
        def call_utility(self, method: str, *args: str) -> Any:
            if gone == "before":
                self.ensure_alive()
            threading.Event().wait()

        async def _call_utility_async(self, method: str, *args: str, engine: Core) -> Any:
            if gone == "before":
                self.ensure_alive()
            await asyncio.Event().wait()

        def ensure_alive(self) -> None:
            raise RuntimeError("the engine is dead")

    drive = {
        "sync": lambda: SyncEngine(Holder(Dead())).load("folder", "digest"),
        "async": lambda: asyncio.run(AsyncEngine(Holder(Dead())).load("folder", "digest")),
    }
    with pytest.raises(EngineUnavailable, match="the engine is dead"):
        drive[driver]()
