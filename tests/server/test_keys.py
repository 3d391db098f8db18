"""Which paths are open to whom."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from httpx import AsyncClient

from steer_vllm.server.front import Front
from steer_vllm.server.keys import OPERATOR_PATHS, Keys

from .asking import CHAT, TEXT, refused
from .conftest import ADMIN, Make, app_of, client_of, fill, lofit

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
async def guarded(build: Callable[..., Front], make: Make) -> AsyncIterator[AsyncClient]:
    front = build(keys=Keys("the-api-key", "the-admin-key"))
    await fill(front, make)
    async with client_of(app_of(front)) as client:
        yield client


async def test_every_path_but_health(guarded: AsyncClient) -> None:
    for path in ("/v1/models", "/metrics", "/v1/interventions", "/v1/interventions/honest", "/docs", "/nowhere"):
        answer = await guarded.get(path)
        refused(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in (TEXT, CHAT, "/invocations", "/v1/load_intervention"):
        refused(await guarded.post(path, json={}), 401, "invalid_api_key")
    assert (await guarded.get("/health")).status_code == 200
    assert (await guarded.options(TEXT)).status_code == 405  # as far as vLLM


@pytest.mark.parametrize("header", ["Bearer wrong", "Basic the-api-key", "the-api-key", "Bearer", "Bearer ", ""])
async def test_wrong_keys(guarded: AsyncClient, header: str) -> None:
    refused(await guarded.get("/v1/models", headers={"Authorization": header}), 401, "invalid_api_key")


async def test_right_keys(guarded: AsyncClient) -> None:
    for key in ("the-api-key", "the-admin-key"):
        answer = await guarded.post(TEXT, json={"model": "tiny:honest"}, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


async def test_admin_paths(guarded: AsyncClient) -> None:
    api = {"Authorization": "Bearer the-api-key"}
    for path in ("/v1/load_intervention", "/v1/unload_intervention"):
        refused(await guarded.post(path, json={}, headers=api), 403, "admin_required")
        refused(await guarded.post(path, json={}, headers=ADMIN), 400, "invalid_intervention")


@pytest.mark.parametrize("path", [*sorted(OPERATOR_PATHS), "/adapters/mine"])
async def test_what_changes_the_engine_for_everyone(guarded: AsyncClient, path: str) -> None:
    api = {"Authorization": "Bearer the-api-key"}
    for method in ("GET", "POST", "DELETE"):
        refused(await guarded.request(method, path, headers=api), 403, "admin_required")
        assert (await guarded.request(method, path, headers=ADMIN)).status_code == 404  # as far as vLLM


async def test_admin_paths_are_closed_without_an_admin_key(build: Callable[..., Front], make: Make) -> None:
    front = build(keys=Keys(None, None))
    make("more", lofit(7))
    async with client_of(app_of(front)) as client:
        for header in ({}, ADMIN, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
            answer = await client.post("/v1/load_intervention", json={"name": "a", "source": "more"}, headers=header)
            refused(answer, 403, "admin_required")
