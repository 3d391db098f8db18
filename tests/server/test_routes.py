"""List, load and unload over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from httpx import AsyncClient

from .conftest import ADMIN, FakeEngine, Make, lofit

LOAD, UNLOAD = "/v1/load_intervention", "/v1/unload_intervention"


async def test_list_and_show(client: AsyncClient) -> None:
    listed = (await client.get("/v1/interventions")).json()
    assert [entry["id"] for entry in listed["data"]] == ["edit", "honest", "polite"]
    honest = (await client.get("/v1/interventions/honest")).json()
    assert honest == listed["data"][1]
    assert {key: honest[key] for key in ("method", "sites", "layers", "positions", "default_scale", "base_model")} == {
        "method": "lofit",
        "sites": ["attention_output"],
        "layers": [0, 1],
        "positions": "all",
        "default_scale": 1.0,
        "base_model": "tiny",
    }
    assert len(honest["digest"]) == 64
    missing = await client.get("/v1/interventions/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_load_serve_unload(client: AsyncClient, make: Make, engine: FakeEngine) -> None:
    make("more", lofit(9))
    loaded = await client.post(LOAD, json={"name": "more", "source": "more"}, headers=ADMIN)
    assert loaded.status_code == 200
    assert loaded.json()["id"] == "more"
    assert (await client.post("/v1/completions", json={"model": "tiny:more"})).status_code == 200
    gone = await client.post(UNLOAD, json={"name": "more"}, headers=ADMIN)
    assert gone.json()["deleted"] is True
    assert (await client.post("/v1/completions", json={"model": "tiny:more"})).status_code == 404
    assert (await client.post(UNLOAD, json={"name": "more"}, headers=ADMIN)).status_code == 404


async def test_replace(client: AsyncClient, make: Make) -> None:
    make("more", lofit(9))
    body: dict[str, Any] = {"name": "honest", "source": "more"}
    taken = await client.post(LOAD, json=body, headers=ADMIN)
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "artifact_exists")
    assert (await client.post(LOAD, json={**body, "load_inplace": True}, headers=ADMIN)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (LOAD, {}, 400, "name"),
        (LOAD, {"name": "a"}, 400, "source"),
        (LOAD, {"name": "a", "source": "honest", "pinned": True}, 400, "pinned"),
        (LOAD, {"name": "a", "source": "honest", "load_inplace": "yes"}, 400, "load_inplace"),
        (LOAD, {"name": "../a", "source": "honest"}, 400, "name"),
        (LOAD, {"name": "tiny", "source": "honest"}, 400, "name"),
        (LOAD, {"name": 3, "source": "honest"}, 400, "name"),
        (LOAD, {"name": "a", "source": "../honest"}, 400, "source"),
        (LOAD, {"name": "a", "source": "/etc"}, 400, "source"),
        (LOAD, {"name": "a", "source": "nowhere"}, 422, None),
        (LOAD, ["a"], 400, None),
        (UNLOAD, {"name": "a", "force": True}, 400, "force"),
        (UNLOAD, {}, 400, "name"),
    ],
)
async def test_refused(client: AsyncClient, path: str, body: Any, status: int, param: str | None) -> None:
    answer = await client.post(path, json=body, headers=ADMIN)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
