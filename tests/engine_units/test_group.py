"""Content is on every rank of every engine of a data-parallel group, or on none, whatever happens on the way."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from core.make import BASE
from engine_units.group import Client
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm.engine import client as module
from steer_vllm.engine.client import AsyncEngine
from steer_vllm.errors import EngineUnavailable, SteerError
from steer_vllm.positions import Positions
from steer_vllm.request import Steering
from steer_vllm.segments import Component

D = "d" * 64
ASK = Steering((Component(D, 1.0, Positions.parse("all")),))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep
    monkeypatch.setattr(module.asyncio, "sleep", lambda seconds: sleep(0))


def held(client: Client) -> list[str]:
    """What each engine says, checked against its ranks."""
    for engine in client.engines:
        there = engine.steering.held(D) != "absent"
        assert [D in rank.store for rank in engine.ranks] == [there, there]
        assert not any(rank.pending for rank in engine.ranks), "a load was left on its way"
    return [engine.steering.held(D) for engine in client.engines]


def run(client: Client, method: str, *args: str) -> Any:
    """One conversation; an error of ours and a caller that went away are results, anything else is raised."""

    async def call() -> Any:
        task = asyncio.create_task(getattr(AsyncEngine(client), method)(*args))
        client.caller = task.cancel
        return (await asyncio.gather(task, return_exceptions=True))[0]

    client.calls = 0
    found = asyncio.run(call())
    if isinstance(found, BaseException) and not isinstance(found, (SteerError, asyncio.CancelledError)):
        raise found
    return found


def test_load_and_unload_reach_every_engine() -> None:
    client = Client(3)
    assert run(client, "load", "folder", D).digest == D
    assert held(client) == ["open"] * 3
    assert run(client, "unload", D) is True
    assert held(client) == ["absent"] * 3


@pytest.mark.parametrize("engine", [0, 1])
def test_one_engine_in_use_keeps_it_on_all(engine: int) -> None:
    client = Client(2)
    run(client, "load", "folder", D)
    plan = client.engines[engine].steering.admit(ASK, 5)
    assert run(client, "unload", D) is False
    assert held(client) == ["closing"] * 2
    assert run(client, "load", "folder", D).digest == D, "a load makes it usable again, everywhere"
    assert held(client) == ["open"] * 2
    client.engines[engine].steering.release(plan)
    assert run(client, "unload", D) is True
    assert held(client) == ["absent"] * 2


FAULTS = ["lost before", "lost behind", "broken", "spoilt", "leave"]
HARMLESS = {("broken", at) for at in range(4)} | {("spoilt", at) for at in range(2)}
"""What breaks is not called there."""


@pytest.mark.parametrize("fate", FAULTS)
@pytest.mark.parametrize("at", range(6))
def test_a_fault_on_one_engine(fate: str, at: int) -> None:
    """Calls 0 and 1 begin, 2 and 3 come too early, 4 and 5 commit."""
    client = Client(2, lambda call, engine: fate if call == at else None)
    found = run(client, "load", "folder", D)
    assert isinstance(found, BaseException) is not ((fate, at) in HARMLESS)
    expected = "absent" if isinstance(found, BaseException) else "open"
    assert held(client) == [expected] * 2
    client.fate = lambda call, engine: None
    assert run(client, "load", "folder", D).digest == D, "a later load works"
    assert held(client) == ["open"] * 2


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("before", ["open", "closing"])
def test_a_fault_where_it_was_held(at: int, before: str) -> None:
    """Another name has it, or its last request has not ended: that is so afterwards."""
    client = Client(2)
    run(client, "load", "folder", D)
    if before == "closing":
        client.engines[1].steering.admit(ASK, 5)
        run(client, "unload", D)
    client.fate = lambda call, engine: "lost behind" if call == at else None
    assert isinstance(run(client, "load", "folder", D), SteerError)
    assert held(client) == [before] * 2


FATES = st.dictionaries(st.integers(0, 14), st.sampled_from(FAULTS), max_size=2)


@given(engines=st.integers(1, 3), fates=FATES)
def test_any_faults_while_loading(engines: int, fates: dict[int, str]) -> None:
    """The engines agree when the cleaning up gets through: a call that is lost after another fault can prevent it."""
    client = Client(engines, lambda call, engine: fates.get(call))
    found = run(client, "load", "folder", D)
    if not isinstance(found, BaseException):
        assert held(client) == ["open"] * engines
    elif len(fates) < 2 or not any(fate.startswith("lost") for fate in fates.values()):
        assert held(client) == ["absent"] * engines
    client.fate = lambda call, engine: None
    assert run(client, "load", "folder", D).digest == D
    assert held(client) == ["open"] * engines
    assert run(client, "unload", D) is True
    assert held(client) == ["absent"] * engines


@given(fates=FATES, engines=st.integers(1, 3))
def test_any_faults_while_unloading(engines: int, fates: dict[int, str]) -> None:
    """Half an unload is mended by the next load or unload."""
    client = Client(engines)
    run(client, "load", "folder", D)
    client.fate = lambda call, engine: fates.get(call)
    run(client, "unload", D)
    client.fate = lambda call, engine: None
    assert run(client, "load", "folder", D).digest == D
    assert held(client) == ["open"] * engines
    assert run(client, "unload", D) is True
    assert held(client) == ["absent"] * engines


@pytest.mark.parametrize("at", [0, 1])
def test_one_engine_whose_weights_are_not_known_keeps_it_from_all(at: int) -> None:
    """Content that is there already included: it may be of the former weights."""
    client = Client(2)
    client.engines[at].steering.spoil("weights unknown")
    assert isinstance(run(client, "load", "folder", D), EngineUnavailable)
    assert held(client) == ["absent"] * 2
    assert isinstance(run(client, "base"), EngineUnavailable)
    client.engines[at].steering.follow([], {})
    run(client, "load", "folder", D)
    client.engines[at].steering.spoil("weights unknown")
    assert isinstance(run(client, "load", "folder", D), EngineUnavailable)
    assert run(client, "unload", D) is True, "what is not to be used can still go"


def test_engines_of_different_weights() -> None:
    client = Client(2)
    assert run(client, "base") == BASE
    for rank in client.engines[1].ranks:
        rank.base = dataclasses.replace(BASE, weights="cd" * 32)
    found = run(client, "base")
    assert isinstance(found, EngineUnavailable)
    assert "different" in found.message
