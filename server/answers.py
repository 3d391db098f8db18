"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from starlette.responses import JSONResponse

from ..errors import InvalidKey, SteerError, UserError

_RETRY_AFTER = 1  # seconds


def error_answer(error: SteerError) -> JSONResponse:
    """The status, body and headers of an error."""
    content = {
        "message": error.message,
        "type": "invalid_request_error" if isinstance(error, UserError) else "server_error",
        "param": error.param,
        "code": error.code,
    }
    headers = {}
    if isinstance(error, InvalidKey):
        headers["WWW-Authenticate"] = "Bearer"
    if error.status >= 500:
        headers["Retry-After"] = str(_RETRY_AFTER)
    return JSONResponse({"error": content}, error.status, headers)
