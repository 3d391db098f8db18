"""The copy of the book: fresh at every request, fetched only after a change, never used when it cannot be fetched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from steer_vllm.engine import client
from steer_vllm.engine.names_client import Names
from steer_vllm.errors import EngineUnavailable
from steer_vllm.server import names as module
from steer_vllm.server.front import Front

from .conftest import ADMIN, FakeEngine, Make, app_of, client_of, direction, eventually, fill, lofit
from .fake_core import FakeCore
from .test_disconnect import Call, Server

Build = Callable[..., Front]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE", 0.02)


@pytest.fixture
async def fronts(build: Build, make: Make) -> list[Front]:
    """Two servers; the first has loaded honest, polite and edit."""
    found = [build(servers=2), build(servers=2)]
    await fill(found[0], make)
    return found


@pytest.fixture
async def clients(fronts: list[Front]) -> list[httpx.AsyncClient]:
    return [client_of(app_of(front), **ADMIN) for front in fronts]


async def settle() -> None:
    await asyncio.sleep(0.1)


async def status(client: httpx.AsyncClient, model: str) -> int:
    return (await client.post("/v1/completions", json={"model": model, "prompt": "x"})).status_code


async def test_every_server_answers_alike(clients: list[httpx.AsyncClient], make: Make) -> None:
    one, two = clients
    make("more", lofit(9))
    assert (await one.post("/v1/load_intervention", json={"name": "new", "source": "more"})).status_code == 200
    assert await status(two, "tiny:new") == 200
    for path in ("/v1/interventions", "/v1/interventions/new"):
        assert (await one.get(path)).json() == (await two.get(path)).json()
    cards = [[card["id"] for card in (await one.get("/v1/models")).json()["data"]] for one in clients]
    assert cards[0] == cards[1] == ["tiny", "tiny:edit", "tiny:honest", "tiny:new", "tiny:polite"]
    taken = await two.post("/v1/load_intervention", json={"name": "new", "source": "honest"})
    assert taken.status_code == 409
    assert (await two.post("/v1/unload_intervention", json={"name": "new"})).status_code == 200
    assert await status(one, "tiny:new") == 404
    assert (await one.get("/v1/interventions/new")).status_code == 404
    assert (await one.post("/v1/unload_intervention", json={"name": "new"})).status_code == 404


async def test_nothing_is_fetched_while_nothing_changes(clients: list[httpx.AsyncClient], core: FakeCore) -> None:
    assert [await status(one, "tiny:honest") for one in clients] == [200, 200]
    await settle()
    before = len(core.calls)
    assert [await status(one, "tiny:honest") for one in clients * 5] == [200] * 10
    await settle()
    assert len(core.calls) == before


async def test_many_requests_fetch_once(clients: list[httpx.AsyncClient], fronts: list[Front], core: FakeCore) -> None:
    await fronts[1].registry.refresh()
    await fronts[0].registry.unload("honest")
    before = core.calls.count("steer_names_copy")
    core.delay = 0.02
    found = await asyncio.gather(*(status(clients[1], "tiny:honest") for _ in range(20)))
    assert found == [404] * 20
    assert core.calls.count("steer_names_copy") - before <= 4  # each server once, and once more to give back


async def test_a_book_that_cannot_be_fetched_is_not_guessed(
    clients: list[httpx.AsyncClient], fronts: list[Front], core: FakeCore
) -> None:
    assert await status(clients[1], "tiny:honest") == 200
    await fronts[0].registry.unload("honest")
    core.fails = RuntimeError("the pipe is closed")
    answer = await clients[1].post("/v1/completions", json={"model": "tiny:honest", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert (await clients[1].get("/v1/models")).status_code == 503
    core.fails = None
    assert await status(clients[1], "tiny:honest") == 404


async def test_a_dead_core_is_noticed(fronts: list[Front], core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM leaves the calls to it unanswered."""
    monkeypatch.setattr(client, "_ALIVE", 0.01)
    core.dead = True
    with pytest.raises(EngineUnavailable, match="dead"):
        await fronts[1].registry.refresh()


async def test_an_idle_server_gives_back(fronts: list[Front], engine: FakeEngine) -> None:
    await asyncio.gather(*(front.registry.refresh() for front in fronts))
    await fronts[0].registry.unload("honest")
    await eventually(lambda: len(engine.loaded) == 2)


async def test_the_last_request_of_any_server(fronts: list[Front], engine: FakeEngine, make: Make) -> None:
    """Replaced and withdrawn through one server while a request runs on the other: it ends with what it began with."""
    make("other", direction(3))
    server = Server(fronts[1])
    call = Call(server, {"model": "tiny:honest", "prompt": "x"})
    await server.entered.wait()
    old = fronts[1].registry.catalog.get("honest").digest
    await fronts[0].registry.load("honest", "other", load_inplace=True)
    await fronts[0].registry.unload("honest")
    await settle()
    assert old in engine.loaded
    server.finish.set()
    await call.task
    await eventually(lambda: old not in engine.loaded)
    assert len(engine.loaded) == 2


async def test_a_client_that_leaves_while_its_load_runs(fronts: list[Front], engine: FakeEngine, make: Make) -> None:
    """The load goes on and every server knows its name."""
    make("more", lofit(9))
    app: Any = app_of(fronts[0])
    engine.hold.clear()
    body = {"name": "new", "source": "more"}
    call = Call(app, body, "/v1/load_intervention", ADMIN)
    await eventually(lambda: engine.at_once == 1)
    call.disconnect()
    await asyncio.sleep(0.05)
    engine.hold.set()
    await call.task
    await fronts[1].registry.refresh()
    assert "new" in fronts[1].registry.catalog


@pytest.mark.parametrize("delay", range(0, 70, 5))
async def test_a_load_cancelled_at_any_time(
    fronts: list[Front], engine: FakeEngine, make: Make, core: FakeCore, delay: int
) -> None:
    """It is there for everyone or for no one, and the next load of the same content is not held up."""
    make("more", lofit(9))
    core.delay = 0.01
    loading = asyncio.create_task(fronts[0].registry.load("new", "more"))
    await asyncio.sleep(delay / 1000)
    loading.cancel()
    await asyncio.wait({loading})
    await asyncio.sleep(0.1)
    names = []
    for front in fronts:
        await front.registry.refresh()
        names.append("new" in front.registry.catalog)
    assert names[0] == names[1]
    entry = await asyncio.wait_for(fronts[1].registry.load("again", "more"), 5)
    await fronts[1].registry.unload("again")
    await eventually(lambda: (entry.digest in engine.loaded) == names[0])


async def test_the_others_wait_for_the_first(build: Build, make: Make, core: FakeCore) -> None:
    make("honest")
    first, second = build(servers=2), build(servers=2)
    waiting = asyncio.create_task(second.registry.names.opened())
    await first.registry.load("honest", "honest")
    await settle()
    assert not waiting.done()
    await first.registry.names.open()
    await asyncio.gather(waiting, first.registry.names.opened())
    assert "honest" in second.registry.catalog


async def test_each_server_has_its_share_of_the_rows(build: Build) -> None:
    two = [build(servers=2, additive_rows=40, low_rank_rows=33, per_request=4) for _ in range(2)]
    assert [(gate._additive.count, gate._low_rank.count) for gate in (front.gate for front in two)] == [(20, 16)] * 2


async def test_a_server_that_is_alone_keeps_the_book_itself(
    build: Build, engine: FakeEngine, make: Make, core: FakeCore
) -> None:
    """Nothing of it waits for a step: it works where the core answers nothing."""
    core.dead = True
    front = build(servers=1)
    await fill(front, make)
    assert [entry.name for entry in front.registry.catalog] == ["edit", "honest", "polite"]
    await front.registry.unload("honest")
    await eventually(lambda: len(engine.loaded) == 2)
    assert core.calls == []
    assert await status(client_of(app_of(front), **ADMIN), "tiny:honest") == 404


async def test_fronts_of_one_engine_share_a_book() -> None:
    """Made by hand over one `AsyncLLM`: what the one has loaded the other does not free."""
    engine_client = SimpleNamespace(engine_core=SimpleNamespace(client_index=0, client_count=1))
    one, other = Names(engine_client), Names(engine_client)
    assert await one.take_turn("d", "token")
    assert not await other.take_turn("d", "another")
