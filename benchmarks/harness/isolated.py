"""The middleware around an app that answers at once: what it takes of the server's one thread, without anything else.

The front is the server's, over a catalog that is filled by hand; there is neither an engine nor a socket.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from steer_vllm.bench.artifacts import KINDS
from steer_vllm.catalog import Entry
from steer_vllm.config import SteerConfig
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.plan import PartSummary, Summary
from steer_vllm.server.front import Front
from steer_vllm.server.keys import Keys
from steer_vllm.server.middleware import SteerMiddleware
from steer_vllm.server.registry import Registry
from steer_vllm.server.settings import Limits
from steer_vllm.server.store import Store

CHUNK = b"data: " + json.dumps({"choices": [{"text": " word", "index": 0}], "model": "base"}).encode() + b"\n\n"
FORMS: dict[str, dict[str, Any]] = {
    "the base model": {"model": "base"},
    "an alias": {"model": "base:direction-0"},
    "two interventions": {"model": "base", "interventions": [{"name": "direction-0"}, {"name": "direction-1"}]},
}
WITHOUT = "without the middleware"

App = Callable[..., Any]


class _Board:
    """Nothing has ever changed."""

    latest = -1

    def announce(self, server: int, epoch: int) -> None: ...


def front(names: Collection[str]) -> Front:
    """A server's front with these interventions."""
    base = Fingerprint(hidden_size=64, num_layers=4, num_heads=4, head_dim=16, vocab_size=1024, weights=None)
    registry = Registry(None, None, _Board(), Store(None), SteerConfig(), ("base",))  # type: ignore[arg-type]
    for number, name in enumerate(names):
        item = KINDS["direction"](base, torch.Generator().manual_seed(number))
        registry.catalog.publish(Entry.of(name, name, item, Summary(item.digest, (PartSummary(True, 0, 1.0),))))
    return Front(registry, Keys(None, None), SteerConfig(), 3e38, Limits())


def streaming(chunks: int) -> App:
    """An app that reads its request and streams; others have their turn after each chunk."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        json.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(chunks):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})

    return app


async def requests(app: App, state: Any, body: bytes, streams: int, count: int) -> float:
    """Seconds for `count` requests, `streams` at once."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

    async def send(message: Any) -> None:
        return None

    async def one() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        owner = SimpleNamespace(state=SimpleNamespace(steer=state))
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "app": owner}
        await app(scope, receive, send)

    began = time.perf_counter()
    for start in range(0, count, streams):
        await asyncio.gather(*(one() for _ in range(min(streams, count - start))))
    return time.perf_counter() - began


async def measure(streams: Sequence[int], chunks: int, characters: int, rounds: int) -> list[dict[str, Any]]:
    """A sample per round, number of streams and form of request, in random order: microseconds per request.

    A first round is not counted.
    """
    plain, state = streaming(chunks), front([f"direction-{number}" for number in range(8)])
    guarded = SteerMiddleware(plain)
    text = {"prompt": "what cows eat " * (characters // 14), "stream": True, "max_tokens": chunks}
    samples = []
    forms = {WITHOUT: {"model": "base"}, **FORMS}
    for number in range(-1, rounds):
        order = random.Random(number)
        for at_once in streams:
            count = max(256, at_once)
            for form in order.sample(list(forms), len(forms)):
                app = plain if form == WITHOUT else guarded
                took = await requests(app, state, json.dumps({**text, **forms[form]}).encode(), at_once, count)
                if number >= 0:
                    samples.append({"round": number, "streams": at_once, "form": form, "us": 1e6 * took / count})
    return samples
