"""Conversations with the engine core, against a core that answers as told: busy, failed, gone."""

from __future__ import annotations

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
BUSY, READY = {"state": "busy"}, {"state": "ready"}
DONE = {"state": "done", "parts": [PART._asdict()]}
BAD = {"state": "failed", "code": "artifact_invalid", "message": "out/x: head 99 does not exist"}
LOST = RuntimeError("the pipe is closed")


class Core:
    """Answers by method; an exception among the answers is raised. Keeps every call."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = {f"steer_{name}": list(found) for name, found in answers.items()}
        self.calls: list[tuple[str, ...]] = []

    def call_utility(self, method: str, *args: str) -> Any:
        self.calls.append((method, *args))
        answer = self.answers[method].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call_utility_async(self, method: str, *args: str) -> Any:
        return self.call_utility(method, *args)

    @property
    def methods(self) -> list[str]:
        return [call[0].removeprefix("steer_") for call in self.calls]


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Calls a method of the engine over a core; both drivers have the same conversations, without their waiting."""
    import asyncio

    sleep = asyncio.sleep
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(client.asyncio, "sleep", lambda seconds: sleep(0))

    class Holder:
        def __init__(self, core: Core) -> None:
            self.engine_core = core

    def run(core: Core, method: str, *args: str) -> Any:
        if request.param == "sync":
            return getattr(SyncEngine(Holder(core)), method)(*args)
        return asyncio.run(getattr(AsyncEngine(Holder(core)), method)(*args))

    return run


def test_load(ask: Ask) -> None:
    core = Core(begin=[BUSY], poll=[BUSY, BUSY, READY], commit=[DONE])
    assert ask(core, "load", "folder", "digest") == Summary("digest", (PART,))
    assert core.calls == [
        ("steer_begin", "folder", "digest"),
        *[("steer_poll", "digest")] * 3,
        ("steer_commit", "digest"),
    ]


def test_content_that_is_there_costs_one_call(ask: Ask) -> None:
    core = Core(begin=[DONE])
    assert ask(core, "load", "folder", "digest") == Summary("digest", (PART,))
    assert core.methods == ["begin"]


@pytest.mark.parametrize(
    "answers",
    [
        {"begin": [BAD]},
        {"begin": [BUSY], "poll": [BAD]},
        {"begin": [BUSY], "poll": [BUSY, BAD]},
    ],
)
def test_a_refusal_is_cleaned_up_and_said(ask: Ask, answers: dict[str, list[Any]]) -> None:
    """Invariant: on every rank or on none: what some ranks have read is dropped, and the first refusal is the error."""
    core = Core(**answers, drop=[{"state": "done"}])
    with pytest.raises(ArtifactInvalid, match="head 99"):
        ask(core, "load", "folder", "digest")
    assert core.calls[-1] == ("steer_drop", "digest")
    assert "commit" not in core.methods


def test_a_failed_commit_is_said(ask: Ask) -> None:
    """The core has dropped it by then."""
    core = Core(begin=[BUSY], poll=[READY], commit=[BAD], drop=[{"state": "done"}])
    with pytest.raises(ArtifactInvalid, match="head 99"):
        ask(core, "load", "folder", "digest")


@pytest.mark.parametrize("at", ["begin", "poll"])
def test_a_lost_reply_is_cleaned_up(ask: Ask, at: str) -> None:
    """The call may have been done: what it left is dropped, and the front is told that the engine did not answer."""
    answers: dict[str, list[Any]] = {"begin": [BUSY], "poll": [READY], "drop": [{"state": "done"}]}
    answers[at] = [LOST]
    core = Core(**answers)
    with pytest.raises(EngineUnavailable, match="RuntimeError: the pipe is closed"):
        ask(core, "load", "folder", "digest")
    assert core.calls[-1] == ("steer_drop", "digest")


def test_a_lost_commit_is_no_success(ask: Ask) -> None:
    """Nothing is published on a guess; a later load finds the content held, if it is. Dropping it here could take it
    from under a name that another load has published meanwhile."""
    core = Core(begin=[BUSY, DONE], poll=[READY], commit=[LOST])
    with pytest.raises(EngineUnavailable, match="RuntimeError: the pipe is closed"):
        ask(core, "load", "folder", "digest")
    assert ask(core, "load", "folder", "digest") == Summary("digest", (PART,))


def test_a_core_that_is_gone_is_one_error(ask: Ask) -> None:
    """Also when cleaning up fails: the first error is the one that is said."""
    core = Core(begin=[LOST], drop=[RuntimeError("still closed")])
    with pytest.raises(EngineUnavailable, match="the pipe is closed"):
        ask(core, "load", "folder", "digest")


def test_unknown_codes_are_the_engines_fault(ask: Ask) -> None:
    core = Core(begin=[{"state": "failed", "code": "new_code", "message": "m"}], drop=[{"state": "done"}])
    with pytest.raises(EngineUnavailable, match="m"):
        ask(core, "load", "folder", "digest")


@pytest.mark.parametrize(("answer", "freed"), [({"state": "done"}, True), (BUSY, False)])
def test_unload(ask: Ask, answer: dict[str, Any], freed: bool) -> None:
    core = Core(free=[answer])
    assert ask(core, "unload", "digest") is freed
    assert core.calls == [("steer_free", "digest")]


@pytest.mark.parametrize("answer", [BAD, LOST])
def test_unload_that_fails(ask: Ask, answer: Any) -> None:
    with pytest.raises(SteerError):
        ask(Core(free=[answer]), "unload", "digest")


def facts(**more: Any) -> dict[str, Any]:
    ranks = [{"state": "done", "table_bytes": size, "loaded": []} for size in (100, 120)]
    return {
        "state": "done", "config": SteerConfig(max_rank=4).to_dict(), "dtype": "float16", "largest": 65504.0,
        "base": BASE.to_config(), "ranks": ranks, "admission": {}, **more,
    }  # fmt: skip


def test_facts(ask: Ask) -> None:
    found = ask(Core(facts=[facts()]), "facts")
    assert found.config == SteerConfig(max_rank=4)
    assert found.base == BASE
    assert (found.dtype, found.largest, found.table_bytes, found.ranks) == ("float16", 65504.0, 120, 2)


@pytest.mark.parametrize("answer", [{"state": "failed", "code": "internal_error", "message": "off"}, LOST])
def test_an_engine_without_steering_refuses_to_start(ask: Ask, answer: Any) -> None:
    with pytest.raises(StartupRefused, match="without steer-vllm"):
        ask(Core(facts=[answer]), "facts")


def test_an_engine_in_this_process() -> None:
    """vLLM's offline client without processes has no call_utility: the core's method is called."""

    class Inner:
        def steer_free(self, digest: str) -> dict[str, str]:
            return {"state": "done" if digest == "d" else "busy"}

    class InProcess:
        engine_core = Inner()

    class Holder:
        engine_core = InProcess()

    assert SyncEngine(Holder()).unload("d")
    assert not SyncEngine(Holder()).unload("e")


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of a second is polled a dozen times, not five hundred."""
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    core = Core(begin=[BUSY], poll=[BUSY] * 12 + [READY], commit=[DONE])

    class Holder:
        engine_core = core

    SyncEngine(Holder()).load("folder", "digest")
    assert waits == sorted(waits)
    assert waits[-1] == 0.1
    assert sum(waits) < 2
