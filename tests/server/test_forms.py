"""Bodies that are not JSON: they reach vLLM as they came, and none of them steers."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from httpx import AsyncClient

from .asking import refused

pytestmark = pytest.mark.usefixtures("nothing_is_left")

TRANSCRIPTION = "/v1/audio/transcriptions"
FORM = "multipart/form-data; boundary=b"
UPLOAD = {"file": ("a.wav", b"\0\1\2" * 100)}
ESCAPED = r'{"steer\u005fvllm": "{}"}'  # what vLLM reads as JSON text, without the word in it


@pytest.mark.parametrize("files", [UPLOAD, None], ids=["multipart", "urlencoded"])
@pytest.mark.parametrize(
    "fields",
    [
        {"interventions": '[{"name": "honest"}]'},
        {"response_start": "3"},
        {"vllm_xargs": '{"steer_vllm": 1}'},
        {"vllm_xargs": ESCAPED},
        {"vllm_xargs": "{}"},
        {"steer_vllm": "{}"},
        {"model": "tiny:honest"},
    ],
    ids=str,
)
async def test_forms_cannot_steer(client: AsyncClient, app: FastAPI, fields: dict[str, str], files: Any) -> None:
    answer = await client.post(TRANSCRIPTION, data={"language": "en", **fields}, files=files)
    code = "invalid_intervention" if "steer_vllm" in fields else "unsupported_with_intervention"
    refused(answer, 400, code, next(iter(fields)))
    assert not app.state.bodies


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"vllm%5Fxargs=%7B%7D", "application/x-www-form-urlencoded"),
        (b'"&vllm_xargs={}&"', "Application/X-WWW-Form-Urlencoded; charset=utf-8"),  # JSON as well
        (b'--b\r\nContent-Disposition: form-data; name=vllm_xargs; filename="x"\r\n\r\n{}\r\n--b--\r\n', FORM),
        (b"--b\r\nContent-Disposition: form-data; filename*=utf-8''x; name=vllm_xargs\r\n\r\n{}\r\n--b--\r\n", FORM),
    ],
)
async def test_forms_are_read_as_vllm_reads_them(client: AsyncClient, app: FastAPI, content: bytes, kind: str) -> None:
    answer = await client.post(TRANSCRIPTION, content=content, headers={"content-type": kind})
    refused(answer, 400, "unsupported_with_intervention", "vllm_xargs")
    assert not app.state.bodies


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=other", FORM])
async def test_forms_that_cannot_be_read(client: AsyncClient, app: FastAPI, kind: str) -> None:
    content = b"--b\r\nno header\r\n\r\n{}\r\n--b--\r\n"
    refused(await client.post(TRANSCRIPTION, content=content, headers={"content-type": kind}), 400, "invalid_request")
    assert not app.state.bodies


async def test_a_form_reaches_vllm_as_it_came(client: AsyncClient, app: FastAPI) -> None:
    """Whatever the upload holds."""
    sound = b'RIFF name="interventions" {"steer_vllm": 1}'
    answer = await client.post(TRANSCRIPTION, data={"model": "tiny"}, files={"file": ("a.wav", sound)})
    assert answer.status_code == 200
    assert app.state.bodies == [{"model": "tiny", "file": sound}]
