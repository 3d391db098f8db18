"""A LoRA adapter's name with the field `interventions`: the pair is checked before the request goes on."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from steer_vllm.errors import Unsupported
from steer_vllm.server.front import Front

from .conftest import app_of, assert_idle, client_of


class Adapters:
    """Two are served, one of which is exact with nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def __contains__(self, name: object) -> bool:
        return name in ("fine", "bad")

    async def check(self, name: str, digests: Iterable[str]) -> None:
        self.asked.append((name, list(digests)))
        if name == "bad":
            raise Unsupported("not exact together")


@pytest.fixture
def adapters(front: Front) -> Adapters:
    front._adapters = Adapters()
    return front._adapters


async def test_both_reach_vllm(front: Front, adapters: Adapters) -> None:
    async with client_of(app_of(front)) as client:
        body = {"model": "fine", "prompt": "x", "interventions": [{"name": "honest"}]}
        answer = (await client.post("/v1/completions", json=body)).json()
    assert (answer["model"], answer["body"]["model"]) == ("fine", "fine")
    assert "steer_vllm" in answer["body"]["vllm_xargs"]
    assert adapters.asked == [("fine", [front.registry.catalog.get("honest").digest])]


async def test_without_interventions_nothing_is_asked(front: Front, adapters: Adapters) -> None:
    async with client_of(app_of(front)) as client:
        for more in ({}, {"interventions": []}):
            answer = await client.post("/v1/completions", json={"model": "bad", "prompt": "x", **more})
            assert answer.json()["body"]["model"] == "bad"
    assert adapters.asked == []


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [("bad", 400, "unsupported_with_intervention"), ("unknown", 404, "model_not_found")],
)
async def test_what_is_refused_holds_nothing(
    front: Front, adapters: Adapters, model: str, status: int, code: str
) -> None:
    async with client_of(app_of(front)) as client:
        body = {"model": model, "prompt": "x", "interventions": [{"name": "honest"}]}
        answer = await client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    await assert_idle(front)
