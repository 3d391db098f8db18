"""Requests to the server of a test, and what their answers say."""

from __future__ import annotations

from typing import Any

import httpx

from steer_vllm.request import Steering

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    return await client.post(path, json={"model": "tiny", "prompt": "x", **body})


def wire(answer: httpx.Response) -> Steering:
    return Steering.from_wire(answer.json()["body"]["vllm_xargs"]["steer_vllm"])


def refused(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    if param is not None:
        assert error["param"] == param
    assert ("retry-after" in answer.headers) == (status >= 500)
    return str(error["message"])
