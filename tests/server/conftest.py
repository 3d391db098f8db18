"""A server without vLLM: a fake engine, artifacts made on the spot, and an app that shows what would reach vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from steer_vllm.config import SteerConfig
from steer_vllm.engine.board import Board
from steer_vllm.errors import ArtifactInvalid
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.intervention import Card, Intervention
from steer_vllm.methods import Direction, LoFiT, LoReFT, Method
from steer_vllm.plan import PartSummary, Summary
from steer_vllm.positions import Positions
from steer_vllm.server.asked import asked_model
from steer_vllm.server.front import Front
from steer_vllm.server.gate import Gate
from steer_vllm.server.keys import Keys
from steer_vllm.server.middleware import SteerMiddleware
from steer_vllm.server.registry import Registry
from steer_vllm.server.routes import router
from steer_vllm.server.settings import Limits
from steer_vllm.server.store import Store

from .clock import Clock
from .fake_core import FakeCore

BASE = Fingerprint(hidden_size=8, num_layers=2, num_heads=2, head_dim=4, vocab_size=99, weights="abc")
ADMIN = {"Authorization": "Bearer the-admin-key"}

Make = Callable[..., Path]


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """No test of this folder waits for real: a second has passed when nothing else is left to do."""
    return {"clock": Clock}


class FakeEngine:
    """Loads at once unless told to wait; `busy` digests are still used by a request in the engine."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.loads = 0
        self.at_once = 0
        self.most_at_once = 0
        self.settled = 0
        self.busy: set[str] = set()
        self.fails: Exception | None = None
        self.serves: Fingerprint | Exception = BASE
        self.hold = asyncio.Event()
        self.hold.set()

    async def load(self, folder: str, digest: str) -> Summary:
        self.loads += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.hold.wait()
            await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        if self.fails:
            raise self.fails
        intervention = Intervention.load(folder)
        if intervention.digest != digest:
            raise ArtifactInvalid("the folder changed while it was read")
        self.loaded[digest] = folder
        parts = intervention.compile(lambda layer, z: z.clone())
        return Summary(
            digest,
            tuple(
                PartSummary(
                    additive=any(edit.offset is not None for edit in edits.values()),
                    rank=max((edit.low_rank.rank for edit in edits.values() if edit.low_rank), default=0),
                    largest=1.0,
                )
                for edits in parts
            ),
        )

    async def base(self) -> Fingerprint:
        if isinstance(self.serves, Exception):
            raise self.serves
        return self.serves

    async def settle(self) -> None:
        self.settled += 1
        await self.hold.wait()
        if self.fails:
            raise self.fails

    async def unload(self, digest: str) -> bool:
        await asyncio.sleep(0)
        if digest in self.busy:
            return False
        self.loaded.pop(digest, None)
        return True


def lofit(seed: int = 0) -> tuple[Method, dict[str, torch.Tensor]]:
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    return LoFiT(((0, 0), (1, 1))), {"offsets": values}


def direction(seed: int = 0) -> tuple[Method, dict[str, torch.Tensor]]:
    values = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    return Direction((0, 1)), {"directions": values}


def loreft(seed: int = 0, rank: int = 2) -> tuple[Method, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    rotate = torch.linalg.qr(torch.randn(1, 2, 8, rank, generator=draw))[0].mT.contiguous()
    return LoReFT((0, 1), rank), {
        "rotate": rotate,
        "weight": torch.randn(1, 2, rank, 8, generator=draw),
        "bias": torch.randn(1, 2, rank, generator=draw),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The store."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def make(folder: Path) -> Make:
    """Writes an artifact into the store."""

    def write(name: str, content: Any = None, base: Fingerprint = BASE, **more: Any) -> Path:
        method, tensors = content or lofit()
        positions = more.pop("positions", method.positions)
        Intervention(method, tensors, base, positions, card=Card("tiny"), **more).save(folder / name)
        return folder / name

    return write


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def core() -> FakeCore:
    """Where the book of names of several servers is."""
    return FakeCore()


@pytest.fixture
async def build(engine: FakeEngine, folder: Path, core: FakeCore) -> AsyncIterator[Callable[..., Front]]:
    """Makes the front of the next of `servers` servers: limits as keywords, `keys` for other keys."""
    fronts: list[Front] = []
    boards: list[Board] = []
    free: list[int] = []  # numbers of the servers that are still to come to the newest board

    def make_front(
        keys: Keys | None = None,
        base_names: tuple[str, ...] = ("tiny", "second"),
        servers: int = 1,
        **limits: Any,
    ) -> Front:
        chosen = Limits(**{"row_wait": 0.2, **limits})
        config: SteerConfig = chosen.engine
        if not free:
            boards.append(Board(servers))
            free.extend(range(servers))
        book = core.client(free.pop(0), servers)
        registry = Registry(engine, book, boards[-1], Store(folder), config, base_names)
        registry.names.follow()
        fronts.append(Front(registry, keys or Keys(None, "the-admin-key"), config, 65504.0, chosen, servers=servers))
        return fronts[-1]

    yield make_front
    for front in fronts:
        await front.registry.names.close()


@pytest.fixture
async def front(build: Callable[..., Front], make: Make) -> Front:
    """With honest (LoFiT), polite (a direction) and edit (LoReFT) loaded."""
    front = build()
    await fill(front, make)
    return front


async def fill(front: Front, make: Make) -> None:
    for name, content in {"honest": lofit(), "polite": direction(), "edit": loreft()}.items():
        make(name, content)
        await front.registry.load(name, name)
    await front.registry.refresh()


def app_of(front: Front | None) -> FastAPI:
    """What stands for vLLM: every inference path answers with the body that reached it."""
    app = FastAPI()
    if front is not None:
        app.state.steer = front
    app.state.bodies = []

    async def infer(request: Request) -> Any:
        body = await request.json()
        app.state.bodies.append(body)
        if body.get("prompt") == "fail":
            raise RuntimeError("the model fell over")
        if body.get("prompt") == "bad":
            return JSONResponse(
                {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": 400}}, 400
            )
        if body.get("stream"):

            async def stream() -> AsyncIterator[str]:
                for i in range(3):
                    yield f"data: {i} {asked_model.get()}\n\n"
                    await asyncio.sleep(0)

            return StreamingResponse(stream(), media_type="text/event-stream")
        return {"model": asked_model.get() or "tiny", "body": body}

    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations"):
        app.post(path)(infer)
    app.post("/inference/v1/generate")(infer)

    @app.post("/v1/audio/transcriptions")
    async def transcribe(request: Request) -> str:
        async with request.form() as form:
            app.state.bodies.append({k: v if isinstance(v, str) else await v.read() for k, v in form.items()})
        return "ok"

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 7, "parent": None}]}

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.get("/metrics")
    async def metrics() -> str:
        return "steer_slots 0"

    app.include_router(router)
    app.add_middleware(SteerMiddleware)
    return app


def client_of(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://server", headers=headers
    )


@pytest.fixture
async def app(front: Front) -> FastAPI:
    return app_of(front)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


async def eventually(holds: Callable[[], bool]) -> None:
    """For what happens in the background, within seconds of the loop's clock."""
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not happen")


def used(gate: Gate) -> tuple[int, int]:
    """Rows in use: additive, low-rank."""
    return gate._additive.used, gate._low_rank.used


async def assert_idle(front: Front) -> None:
    """Nothing is held and nobody waits, as soon as the engine is done with requests that left."""
    await eventually(lambda: not front.departures._running)
    assert not front.departures._leaving
    assert used(front.gate) == (0, 0)
    assert not front.gate._waiting
    assert not front.registry.catalog._users


@pytest.fixture
async def nothing_is_left(front: Front) -> AsyncIterator[None]:
    """When the test ends."""
    yield
    await assert_idle(front)


@pytest.fixture
def positions() -> Callable[[str], Positions]:
    return Positions.parse
