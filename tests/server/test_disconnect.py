"""A request ends in many ways; what it held is given back once, whichever it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from steer_vllm.errors import EngineUnavailable
from steer_vllm.server import body as bodies
from steer_vllm.server.front import Front
from steer_vllm.server.middleware import SteerMiddleware

from .conftest import FakeEngine, Make, assert_idle, direction, eventually, fill, lofit, used

HELD = {"model": "tiny:honest", "prompt": "x"}


class Server:
    """What stands for vLLM: `serve` decides what happens inside."""

    def __init__(self, front: Front) -> None:
        self.state = type("State", (), {"steer": front})()
        self.entered = asyncio.Event()
        self.finish = asyncio.Event()
        self.saw_disconnect = False
        self.fails = False
        self.streams = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert message["type"] == "http.request"
        self.entered.set()
        if self.fails:
            raise RuntimeError("the model fell over")
        if self.streams:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data", "more_body": True})
        gone = asyncio.ensure_future(receive())
        done = asyncio.ensure_future(self.finish.wait())
        await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            self.saw_disconnect = gone.result()["type"] == "http.disconnect"
            done.cancel()
            return
        gone.cancel()
        if not self.streams:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"end"})


class Call:
    """One request, message by message."""

    def __init__(
        self, server: Any, body: Any = None, path: str = "/v1/completions", headers: Mapping[str, str] | None = None
    ) -> None:
        self.sent: list[Message] = []
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": pairs, "app": server, "query_string": b""}
        if body is not None:
            self.say({"type": "http.request", "body": json.dumps(body).encode()})
        self.task = asyncio.create_task(SteerMiddleware(server)(scope, self._incoming.get, self._send))

    def say(self, message: Message) -> None:
        self._incoming.put_nowait(message)

    def disconnect(self) -> None:
        self.say({"type": "http.disconnect"})

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.sent[1]["body"])["error"]
        return content


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def server(front: Front) -> Server:
    return Server(front)


async def test_while_the_body_is_sent(server: Server, front: Front) -> None:
    call = Call(server)
    call.say({"type": "http.request", "body": b'{"mod', "more_body": True})
    call.disconnect()
    await call.task
    assert not server.entered.is_set()
    assert not call.sent
    await assert_idle(front)


@pytest.mark.parametrize("streams", [False, True])
async def test_while_it_is_served(server: Server, front: Front, streams: bool) -> None:
    server.streams = streams
    call = Call(server, HELD)
    await server.entered.wait()
    assert used(front.gate) == (1, 0)
    call.disconnect()
    await call.task
    assert server.saw_disconnect
    await assert_idle(front)


async def test_a_normal_end(server: Server, front: Front) -> None:
    call = Call(server, HELD)
    await server.entered.wait()
    server.finish.set()
    await call.task
    assert call.status == 200
    await assert_idle(front)


async def test_failing(server: Server, front: Front) -> None:
    server.fails = True
    call = Call(server, HELD)
    with pytest.raises(RuntimeError):
        await call.task
    await assert_idle(front)


@pytest.mark.parametrize("streams", [False, True])
async def test_cancelled_while_served(server: Server, front: Front, streams: bool) -> None:
    server.streams = streams
    call = Call(server, HELD)
    await server.entered.wait()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    await assert_idle(front)


class TestWaiting:
    """With a single row, held by a request in flight."""

    @pytest.fixture
    async def front(self, build: Callable[..., Front], make: Make) -> Front:
        front = build(additive_rows=1, row_wait=0.2)
        await fill(front, make)
        return front

    @pytest.fixture
    async def holder(self, server: Server) -> Call:
        call = Call(server, HELD)
        await server.entered.wait()
        server.entered.clear()
        return call

    async def end(self, server: Server, holder: Call, front: Front) -> None:
        server.finish.set()
        await holder.task
        await assert_idle(front)

    async def test_gets_its_turn(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {"model": "tiny:polite"})
        await turn()
        assert len(front.gate._waiting) == 1
        assert not server.entered.is_set()
        server.finish.set()
        await call.task
        assert call.status == 200
        await self.end(server, holder, front)

    async def test_disconnect_after_its_turn_reaches_vllm(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {"model": "tiny:polite"})
        await turn()
        holder.disconnect()
        await holder.task
        await server.entered.wait()
        server.saw_disconnect = False
        call.disconnect()
        await call.task
        assert server.saw_disconnect
        await assert_idle(front)

    async def test_time_is_up(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {"model": "tiny:polite"})
        await call.task
        assert (call.status, call.error["code"]) == (503, "no_rows")
        assert (b"retry-after", b"1") in call.sent[0]["headers"]
        assert used(front.gate) == (1, 0)
        await self.end(server, holder, front)

    async def test_disconnect(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {"model": "tiny:polite"})
        await turn()
        call.disconnect()
        await call.task
        assert not call.sent
        assert (used(front.gate), len(front.gate._waiting)) == ((1, 0), 0)
        await self.end(server, holder, front)

    async def test_cancelled(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {"model": "tiny:polite"})
        await turn()
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        assert len(front.gate._waiting) == 0
        await self.end(server, holder, front)

    async def test_turn_and_disconnect_at_once(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {"model": "tiny:polite"})
        await turn()
        holder.disconnect()
        call.disconnect()
        await asyncio.gather(holder.task, call.task)
        await assert_idle(front)

    async def test_the_base_never_waits(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {"model": "tiny"})
        await server.entered.wait()
        await self.end(server, holder, front)
        await call.task
        assert call.status == 200

    async def test_equal_edits_share(self, server: Server, front: Front, holder: Call) -> None:
        call = Call(server, {**HELD, "interventions": None, "n": 4})
        await server.entered.wait()
        assert used(front.gate) == (1, 0)
        await self.end(server, holder, front)
        await call.task


async def test_rows_of_a_composition(build: Callable[..., Front], make: Make) -> None:
    """honest everywhere, polite on the answer: one row for each piece, one table row for the low-rank part."""
    front = build()
    await fill(front, make)
    asks = [{"name": "honest", "positions": "all"}, {"name": "polite"}, {"name": "edit"}]
    body = {"model": "tiny", "interventions": asks}
    decision = front.decide(body, bodies.consume(body, "/v1/completions", front.base_names))
    assert (len(decision.rows.additive), len(decision.rows.low_rank)) == (2, 1)


async def test_more_rows_than_there_are(build: Callable[..., Front], make: Make) -> None:
    front = build(additive_rows=1)
    await fill(front, make)
    call = Call(Server(front), {"model": "tiny", "interventions": [{"name": "honest"}, {"name": "polite"}]})
    await call.task
    assert (call.status, call.error["code"]) == (400, "too_many_interventions")
    await assert_idle(front)


async def test_unload_and_replace_while_it_runs(server: Server, front: Front, make: Make) -> None:
    make("other", direction(3))
    call = Call(server, HELD)
    await server.entered.wait()
    old = front.registry.catalog.get("honest").digest
    await front.registry.load("honest", "other", load_inplace=True)
    await front.registry.unload("honest")
    await turn()
    engine: Any = front.registry._engine
    assert old in engine.loaded
    server.finish.set()
    await call.task
    await eventually(lambda: old not in engine.loaded)
    assert len(engine.loaded) == 2
    await assert_idle(front)


async def test_many_at_once(build: Callable[..., Front], make: Make) -> None:
    """A hundred requests for ten interventions through four rows; some leave. Everyone else is served."""
    front = build(additive_rows=4, row_wait=5)
    for i in range(10):
        make(f"a{i}", lofit(i))
        await front.registry.load(f"a{i}", f"a{i}")
    server = Server(front)
    server.finish.set()
    calls = [Call(server, {"model": f"tiny:a{i % 10}"}) for i in range(100)]
    for call in calls[::7]:
        call.disconnect()
    await asyncio.gather(*(call.task for call in calls))
    assert all(call.status == 200 for i, call in enumerate(calls) if i % 7)
    await assert_idle(front)


class TestLeaving:
    """The engine hears of a client that left, or of a stop string, a little later: until then no row is free."""

    @pytest.fixture
    async def front(self, build: Callable[..., Front], make: Make) -> Front:
        front = build(additive_rows=1, row_wait=5)
        await fill(front, make)
        return front

    async def check(self, server: Server, front: Front, engine: FakeEngine, leaver: Call) -> None:
        """With an engine that is still busy, the row of the one who left is not handed out yet."""
        await leaver.task
        server.entered.clear()
        call = Call(server, {"model": "tiny:polite"})
        await eventually(lambda: engine.settled == 1)
        await turn()
        assert (engine.settled, used(front.gate), len(front.gate._waiting)) == (1, (1, 0), 1)
        assert not server.entered.is_set()
        server.finish.set()
        engine.hold.set()
        await call.task
        assert call.status == 200
        await assert_idle(front)

    async def test_by_disconnect(self, server: Server, front: Front, engine: FakeEngine) -> None:
        engine.hold.clear()
        leaver = Call(server, HELD)
        await server.entered.wait()
        leaver.disconnect()
        await self.check(server, front, engine, leaver)

    async def test_with_a_stop_string(self, server: Server, front: Front, engine: FakeEngine) -> None:
        engine.hold.clear()
        leaver = Call(server, {**HELD, "stop": ["."]})
        await server.entered.wait()
        server.finish.set()
        await leaver.task
        server.finish.clear()
        await self.check(server, front, engine, leaver)

    async def test_a_normal_end_asks_nothing(self, server: Server, front: Front, engine: FakeEngine) -> None:
        call = Call(server, {**HELD, "stop": []})
        await server.entered.wait()
        server.finish.set()
        await call.task
        assert used(front.gate) == (0, 0)
        assert engine.settled == 0

    @pytest.mark.parametrize("error", [EngineUnavailable("gone"), KeyError("a bug")], ids=["gone", "a bug"])
    async def test_without_an_answer_of_the_engine(
        self, server: Server, front: Front, engine: FakeEngine, error: Exception
    ) -> None:
        """Also those who leave while it is asked give their rows back, with nobody after them."""
        engine.fails = error
        engine.hold.clear()
        leaver = Call(server, HELD)
        await server.entered.wait()
        leaver.disconnect()
        await leaver.task
        await eventually(lambda: engine.settled == 1)
        server.entered.clear()
        other = Call(server, HELD)  # the same edit: it shares the row
        await server.entered.wait()
        other.disconnect()
        await other.task
        engine.hold.set()
        await assert_idle(front)


async def test_many_leave_at_once(server: Server, front: Front, engine: FakeEngine) -> None:
    calls = [Call(server, HELD) for _ in range(100)]
    await turn()
    for call in calls:
        call.disconnect()
    await asyncio.gather(*(call.task for call in calls))
    await assert_idle(front)
    assert engine.settled <= 3
