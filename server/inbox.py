"""A request's incoming messages: its body within a limit, then only the news that the client has gone.

Reading ahead is possible, so that a request can wait for something else and for its client at once.
"""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope

from ..errors import BodyTooLarge, UserError


class Inbox:
    """Wraps one request's `receive`. At most one task waits in it; `close` ends it."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._headers = scope["headers"]
        self._receive = receive
        self._ahead: asyncio.Task[Message] | None = None

    async def body(self, limit: int) -> bytes | None:
        """The whole body, or None when the client is gone before its end. Errors: `BodyTooLarge`, `UserError`."""
        announced = next((value for name, value in self._headers if name == b"content-length"), b"0")
        if not announced.isdigit():
            raise UserError(f"content-length {announced[:32]!r} is not a number")
        if len(announced) > 18 or int(announced) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def first(self, future: asyncio.Future[None], timeout: float) -> bool:
        """Wait until the future is done (True), the client is gone (False) or the time is up.

        Errors: `TimeoutError` after `timeout` seconds.
        """
        if future.done():
            return True
        if self._ahead is None:
            self._ahead = asyncio.ensure_future(self._receive())
        await asyncio.wait((future, self._ahead), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return True
        if self._ahead.done():
            return False
        raise TimeoutError

    def replay(self, body: bytes) -> Receive:
        """A `receive` that gives this body and after it what the client sends."""
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            if self._ahead is not None:
                ahead, self._ahead = self._ahead, None
                return await ahead
            return await self._receive()

        return receive

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.cancel()


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit} bytes")
