"""The names of a form's fields, read by the parser that vLLM's form routes read it with.

A form is what transcriptions are asked for with: fields and an upload. What the fields mean is not known here.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.types import Message, Scope

from ..errors import UserError


async def read(scope: Scope, content: bytes) -> dict[str, Any]:
    """The fields of a request whose content type is a form, the last one of each name; none for any other type.

    Errors: `UserError` (400) for a form that cannot be read, which vLLM could not read either.
    """

    async def receive() -> Message:
        return {"type": "http.request", "body": content, "more_body": False}

    try:
        async with Request(scope, receive).form() as form:
            return dict(form)
    except Exception as error:  # the parsers have errors of their own, and some let Python's through
        reason = getattr(error, "detail", None) or str(error) or type(error).__name__
        raise UserError(f"the request body is no form: {str(reason)[:200]}") from error
