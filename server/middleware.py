"""The door in front of vLLM's OpenAI server: every request passes here first.

A plain ASGI class, so that a client's going away reaches vLLM. It finds the front in `app.state.steer`, which the
endpoint plugin puts there; without it nothing is served. What a body means is decided elsewhere (`front`, `body`).
"""

from __future__ import annotations

import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import EngineUnavailable, NoRows, SteerError
from . import body as bodies
from . import forms
from .answers import error_answer
from .asked import asked_model
from .front import Decision, Front
from .inbox import Inbox
from .keys import OPEN_PATHS
from .models import with_aliases

APPLIED = "x-steer-applied"
"""Response header: what edited the answer, `honest@sha256:ab12cd34ef56*1.2`, with commas; absent for the base."""

_NO_BODY = frozenset({"GET", "HEAD", "OPTIONS"})


class SteerMiddleware:
    """For vLLM's `--middleware`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
        elif scope["type"] == "websocket":
            # Their messages cannot be inspected, and vLLM ignores fields it does not know.
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)  # a browser's preflight carries no key
        else:
            await self._guard(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From start to stop. Without the endpoint plugin there is no start: vLLM only logs one it cannot import."""
        front = _front(scope)
        if front is not None:
            try:
                await self.app(scope, receive, send)
            finally:
                await front.registry.names.close()
            return
        await receive()
        message = "steer_vllm: the endpoint plugin is not there, so nothing would be steered; its error is above"
        await send({"type": "lifespan.startup.failed", "message": message})

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn errors into answers, unless an answer is on its way already."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._serve(scope, receive, watched)
        except SteerError as error:
            if started:
                raise
            await error_answer(error)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope)
        front = _front(scope)
        if front is None:
            if path not in OPEN_PATHS:
                raise EngineUnavailable("the server is starting or stopping")
            await self.app(scope, receive, send)
            return
        front.keys.check(path, Headers(scope=scope).get("authorization"))
        if scope["method"] in _NO_BODY:
            if path == "/v1/models" and scope["method"] == "GET":
                await front.registry.refresh()
                send = with_aliases(send, front.registry)
            await self.app(scope, receive, send)
            return
        inbox = Inbox(scope, receive)
        content = await inbox.body(front.limits.body_bytes)
        if content is None:
            return
        if scope["method"] == "POST" and path in bodies.STEERABLE:
            await self._steer(front, path, content, inbox, scope, send)
        else:
            bodies.refuse_form(await forms.read(scope, content), path, front.base_names)
            bodies.refuse_steering(content, path, front.base_names)  # of forms too: some bodies are both
            await self.app(scope, inbox.replay(content), send)

    async def _steer(self, front: Front, path: str, content: bytes, inbox: Inbox, scope: Scope, send: Send) -> None:
        """Decide, wait for rows, serve, give back: once, however it ends."""
        body = bodies.read(content)
        lease = await front.admit(body, path)
        decision = lease.decision
        answered = False

        async def watched(message: Message) -> None:
            nonlocal answered
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            if lease.ticket is not None:
                try:
                    if not await inbox.first(lease.ticket.granted, front.limits.row_wait):
                        return
                except TimeoutError:
                    raise NoRows(
                        f"every row the request needs was in use for {front.limits.row_wait:g} s; try again"
                    ) from None
            await front.check_adapter(decision)
            content = json.dumps(body).encode()
            name = asked_model.set(decision.model)
            try:
                await self.app(
                    _with_length(scope, len(content)), inbox.replay(content), _with_header(watched, decision)
                )
            finally:
                asked_model.reset(name)
        finally:
            inbox.close()
            lease.end(answered)


def _front(scope: Scope) -> Front | None:
    # vLLM deletes the app's state when it stops
    front = getattr(getattr(scope["app"], "state", None), "steer", None)
    assert front is None or isinstance(front, Front)
    return front


def _path(scope: Scope) -> str:
    """The path as routes see it, without the prefix of a proxy (--root-path)."""
    path: str = scope["path"]
    root = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _with_length(scope: Scope, length: int) -> Scope:
    kept = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}


def _with_header(send: Send, decision: Decision) -> Send:
    if not decision.applied:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            MutableHeaders(scope=message)[APPLIED] = decision.applied
        await send(message)

    return sending
