"""The door: what reaches vLLM, what is refused before it, what the answer says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import AsyncClient

from steer_vllm.server.front import Front

from .asking import CHAT, TEXT, post, refused, wire
from .conftest import Make, app_of, client_of, fill
from .fake_core import FakeCore

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_alias(client: AsyncClient, front: Front, path: str) -> None:
    answer = await post(client, path, model="tiny:honest")
    digest = front.registry.catalog.get("honest").digest
    assert answer.headers["x-steer-applied"] == f"honest@sha256:{digest[:12]}*1"
    assert answer.json()["model"] == "tiny:honest"
    assert answer.json()["body"]["model"] == "tiny"
    (part,) = wire(answer).components
    assert (part.digest, part.scale, str(part.positions)) == (digest, 1.0, "all")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_field(client: AsyncClient, front: Front, path: str) -> None:
    asked = [{"name": "honest", "scale": 1.2, "positions": "response"}, {"name": "edit", "scale": -0.5}]
    answer = await post(client, path, interventions=asked, vllm_xargs={"session_id": "s"}, response_start=4)
    body = answer.json()["body"]
    assert "interventions" not in body
    assert "response_start" not in body
    assert body["vllm_xargs"]["session_id"] == "s"
    honest, edit = (front.registry.catalog.get(name).digest[:12] for name in ("honest", "edit"))
    assert answer.headers["x-steer-applied"] == f"honest@sha256:{honest}*1.2, edit@sha256:{edit}*-0.5"
    steering = wire(answer)
    assert steering.response_start == 4
    assert [str(part.positions) for part in steering.components] == ["response", "f7+l7"]
    assert steering.components[0].scale == pytest.approx(1.2)


@pytest.mark.parametrize("body", [{}, {"interventions": []}, {"interventions": None}, {"model": "second"}])
async def test_base(client: AsyncClient, app: FastAPI, body: dict[str, Any]) -> None:
    answer = await post(client, TEXT, **body)
    assert "x-steer-applied" not in answer.headers
    assert app.state.bodies == [{"model": body.get("model", "tiny"), "prompt": "x"}]
    assert answer.json()["model"] == body.get("model", "tiny")


@pytest.mark.parametrize("body", [{}, {"interventions": []}, {"model": "second"}, {"model": "other"}])
async def test_the_base_waits_for_no_names(
    build: Callable[..., Front], make: Make, core: FakeCore, body: dict[str, Any]
) -> None:
    """Another server has announced a change, and the book does not answer."""
    front = build(servers=2)
    await fill(front, make)
    client = client_of(app_of(front))
    core.fails = RuntimeError("the core is gone")
    board, seen = front.registry.names._board, front.registry.names._seen
    board.announce(0, seen + 1)
    assert (await post(client, TEXT, **body)).status_code == 200
    for asked in ({"model": "tiny:honest"}, {"interventions": [{"name": "honest"}]}):
        refused(await post(client, TEXT, **asked), 503, "engine_unavailable")
    core.fails = None


async def test_without_a_model(client: AsyncClient) -> None:
    answer = await client.post(TEXT, json={"prompt": "x", "interventions": [{"name": "honest"}]})
    assert answer.json()["body"]["model"] == "tiny"
    assert answer.json()["model"] == "tiny"


async def test_any_served_name_has_aliases(client: AsyncClient) -> None:
    answer = await post(client, TEXT, model="second:honest")
    assert answer.json()["body"]["model"] == "second"
    assert answer.json()["model"] == "second:honest"


async def test_the_word_base_stands_for_the_served_name(client: AsyncClient) -> None:
    """So that a client need not know what the model was called when it was served."""
    answer = await post(client, TEXT, model="base:honest")
    assert (answer.json()["body"]["model"], answer.json()["model"]) == ("tiny", "base:honest")
    refused(await post(client, TEXT, model="base:nobody"), 404, "model_not_found", "model")
    refused(await post(client, "/v1/responses", model="base:honest"), 400, "unsupported_with_intervention", "model")


async def test_served_names_with_colons(build: Callable[..., Front], make: Make) -> None:
    front = build(base_names=("llama", "llama:8b"))
    await fill(front, make)
    async with client_of(app_of(front)) as client:
        assert "x-steer-applied" not in (await post(client, TEXT, model="llama:8b")).headers
        assert (await post(client, TEXT, model="llama:8b:honest")).json()["body"]["model"] == "llama:8b"
        refused(await post(client, TEXT, model="llama:9b"), 404, "model_not_found", "model")


async def test_streaming(client: AsyncClient) -> None:
    answer = await post(client, TEXT, model="tiny:honest", stream=True)
    assert answer.headers["x-steer-applied"].startswith("honest@sha256:")
    assert answer.text == "".join(f"data: {i} tiny:honest\n\n" for i in range(3))


async def test_the_name_does_not_outlive_its_request(client: AsyncClient) -> None:
    await post(client, TEXT, model="tiny:honest")
    assert (await client.post(TEXT, json={"prompt": "x"})).json()["model"] == "tiny"


UNKNOWN = ["tiny:nobody", "tiny:", "tiny:honest:polite", "tiny:../honest", "tiny:HONEST"]


@pytest.mark.parametrize("model", UNKNOWN)
async def test_unknown_alias(client: AsyncClient, app: FastAPI, model: str) -> None:
    message = refused(await post(client, TEXT, model=model), 404, "model_not_found", "model")
    assert model in message
    assert not app.state.bodies


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"interventions": [{"name": "nobody"}]}, 404, "model_not_found"),
    ({"interventions": "honest"}, 400, "invalid_intervention"),
    ({"interventions": {"name": "honest"}}, 400, "invalid_intervention"),
    ({"interventions": ["honest"]}, 400, "invalid_intervention"),
    ({"interventions": [{"name": "honest", "strength": 1}]}, 400, "invalid_intervention"),
    ({"interventions": [{"name": ["honest"]}]}, 400, "invalid_intervention"),
    ({"interventions": 0}, 400, "invalid_intervention"),
    ({"interventions": [{"name": "honest", "scale": "1"}]}, 400, "invalid_intervention"),
    ({"interventions": [{"name": "honest", "scale": True}]}, 400, "invalid_intervention"),
    ({"interventions": [{"name": "honest", "scale": 8.5}]}, 400, "scale_out_of_range"),
    ({"interventions": [{"name": "honest", "scale": 1e308}]}, 400, "scale_out_of_range"),
    ({"interventions": [{"name": "honest", "scale": 10**400}]}, 400, "scale_out_of_range"),
    ({"interventions": [{"name": "honest", "positions": "middle"}]}, 400, "invalid_intervention"),
    ({"interventions": [{"name": "honest", "positions": "f1+l1/untied"}]}, 400, "invalid_intervention"),
    ({"interventions": [{"name": "honest"}] * 5}, 400, "too_many_interventions"),
    ({"interventions": [{"name": "honest"}], "response_start": 0}, 400, "invalid_intervention"),
    ({"response_start": "3"}, 400, "invalid_intervention"),
    ({"model": "tiny:honest", "interventions": []}, 400, "invalid_intervention"),
    ({"model": "tiny:honest", "interventions": [{"name": "honest"}]}, 400, "invalid_intervention"),
    ({"model": "other", "interventions": [{"name": "honest"}]}, 404, "model_not_found"),
    ({"model": 42, "interventions": [{"name": "honest"}]}, 400, "invalid_request"),
    ({"model": ["tiny:honest"]}, 400, "invalid_request"),
    ({"vllm_xargs": {"steer_vllm": "{}"}}, 400, "invalid_intervention"),
    ({"vllm_xargs": {"steer_vllm_more": 1}}, 400, "invalid_intervention"),
    ({"model": "tiny:honest", "vllm_xargs": {"steer_vllm": "{}"}}, 400, "invalid_intervention"),
    ({"kv_transfer_params": {"deep": [{"steer_vllm": 1}]}}, 400, "invalid_intervention"),
    ({"model": "tiny:honest", "vllm_xargs": ["steer"]}, 400, "invalid_intervention"),
    ({"model": "tiny:honest", "use_beam_search": True}, 400, "unsupported_with_intervention"),
    ({"model": "tiny:honest", "use_beam_search": "yes"}, 400, "unsupported_with_intervention"),
    ({"model": "tiny:honest", "n": 17}, 400, "unsupported_with_intervention"),
    ({"model": "tiny:honest", "n": "17"}, 400, "unsupported_with_intervention"),
    ({"model": "tiny:honest", "n": 10**12}, 400, "unsupported_with_intervention"),
    ({"model": "tiny:polite", "echo": True}, 400, "unsupported_with_intervention"),
    ({"model": "tiny:polite", "echo": "true", "logprobs": 1}, 400, "unsupported_with_intervention"),
    ({"model": "tiny:polite", "prompt_logprobs": 0}, 400, "unsupported_with_intervention"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD, ids=[json.dumps(body)[:70] for body, _, _ in BAD])
async def test_bad_requests(client: AsyncClient, app: FastAPI, body: dict[str, Any], status: int, code: str) -> None:
    refused(await post(client, TEXT, **body), status, code)
    assert not app.state.bodies
    assert (await post(client, TEXT, model="tiny:honest")).status_code == 200


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_scales_that_are_no_numbers(client: AsyncClient, scale: str) -> None:
    content = f'{{"model": "tiny", "interventions": [{{"name": "honest", "scale": {scale}}}]}}'
    refused(await client.post(TEXT, content=content), 400, "scale_out_of_range")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'"tiny"', b"\xff\xfe\x00", b'{"a":' * 100_000, b"[" * 200_000, b"NaN"]
)
async def test_bodies_that_are_no_objects(client: AsyncClient, app: FastAPI, content: bytes) -> None:
    refused(await client.post(TEXT, content=content), 400, "invalid_request")
    assert not app.state.bodies


async def test_scored_text(client: AsyncClient) -> None:
    """Positions that do not depend on the answer's start, or a start that is given, can be scored."""
    assert (await post(client, TEXT, model="tiny:honest", echo=True)).status_code == 200
    assert (await post(client, TEXT, model="tiny:polite", echo=True, response_start=2)).status_code == 200
    assert (await post(client, TEXT, model="tiny:polite", echo=False, logprobs=1)).status_code == 200
    assert (await post(client, CHAT, model="tiny:polite", echo=True)).status_code == 200  # in a chat: not scoring
    refused(await post(client, CHAT, model="tiny:polite", prompt_logprobs=1), 400, "unsupported_with_intervention")


async def test_features_are_free_without_interventions(client: AsyncClient) -> None:
    assert (await post(client, TEXT, use_beam_search=True, n=64)).status_code == 200


async def test_body_limit(build: Callable[..., Front], make: Make) -> None:
    front = build(body_mb=0.001)
    await fill(front, make)
    app = app_of(front)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 50

    async with client_of(app) as client:
        refused(await post(client, TEXT, prompt="x" * 2000), 413, "body_too_large")
        refused(await client.post(TEXT, content=chunks()), 413, "body_too_large")
        refused(await client.post("/v1/responses", content=b"x" * 2000), 413, "body_too_large")
        refused(await client.post(TEXT, headers={"content-length": "9" * 30}, content=b"x"), 413, "body_too_large")
        refused(await client.post(TEXT, headers={"content-length": "-1"}, content=b"x"), 400, "invalid_request")
    assert not app.state.bodies


ELSEWHERE = ["/v1/responses", "/v1/messages", "/invocations", "/inference/v1/generate"]


@pytest.mark.parametrize("path", [*ELSEWHERE, TEXT + "/", "/V1/completions", "/v1/completions/batch"])
@pytest.mark.parametrize(
    "body",
    [
        {"interventions": [{"name": "honest"}]},
        {"interventions": {"name": "honest"}},
        {"model": "tiny:honest"},
        {"model": "tiny:nobody"},
        {"response_start": 3},
        {"vllm_xargs": {"steer_vllm": "{}"}},
        {"sampling_params": {"extra_args": {"steer_vllm": "{}"}}},
    ],
)
async def test_paths_that_cannot_steer(client: AsyncClient, app: FastAPI, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("unsupported_with_intervention", "invalid_intervention")
    assert not app.state.bodies
    refused(await client.post(path, json=[{"model": "tiny", **body}]), 400, answer.json()["error"]["code"])


@pytest.mark.parametrize("path", ELSEWHERE)
async def test_other_paths_serve_the_base(client: AsyncClient, app: FastAPI, path: str) -> None:
    body = {"model": "tiny", "interventions": [], "tools": [{"properties": {"interventions": {"type": "array"}}}]}
    assert (await client.post(path, json=body)).status_code == 200
    assert app.state.bodies == [body]


async def test_deep_bodies_are_refused(client: AsyncClient) -> None:
    refused(await client.post("/invocations", content=b"[" * 200_000), 400, "invalid_request")


async def test_other_methods_are_looked_at_too(client: AsyncClient) -> None:
    answer = await client.request("PUT", TEXT, json={"interventions": [{"name": "honest"}]})
    refused(answer, 400, "unsupported_with_intervention")


async def test_behind_a_proxy_prefix(front: Front) -> None:
    app = app_of(front)
    app.root_path = "/llm"
    async with client_of(app) as client:
        assert "x-steer-applied" in (await post(client, f"/llm{TEXT}", model="tiny:honest")).headers
        refused(await client.post("/llm/v1/load_intervention", json={}), 403, "admin_required")


async def test_an_error_of_vllm_passes(client: AsyncClient) -> None:
    answer = await post(client, TEXT, model="tiny:honest", prompt="bad")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "no"
    assert "x-steer-applied" not in answer.headers
    assert (await post(client, TEXT, model="tiny:honest", prompt="fail")).status_code == 500


async def test_models(client: AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["tiny", "tiny:edit", "tiny:honest", "tiny:polite"]
    assert listed[0]["max_model_len"] == 7
    assert (listed[2]["parent"], listed[2]["root"]) == ("tiny", "honest")


async def test_without_the_endpoint_plugin_nothing_is_served() -> None:
    app = app_of(None)
    async with client_of(app) as client:
        refused(await post(client, TEXT), 503, "engine_unavailable")
        refused(await client.get("/v1/models"), 503, "engine_unavailable")
        assert (await client.get("/health")).status_code == 200
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "lifespan", "app": app}, receive, send)
    assert sent[0]["type"] == "lifespan.startup.failed"


async def test_nothing_runs_on_when_the_server_stops(front: Front) -> None:
    """vLLM has deleted the app's state by then."""
    app = app_of(front)
    names = front.registry.names
    assert names._background, "it follows the board"
    sent: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.shutdown" if sent else "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if sent == ["lifespan.startup.complete"]:
            del app.state.steer

    await app({"type": "lifespan", "app": app, "state": {}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert not names._background


async def test_websockets_are_closed(app: FastAPI) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/v1/realtime", "headers": [], "app": app}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
