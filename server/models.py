"""Adds the aliases to vLLM's own answer to GET /v1/models.

Done on the answer and not with a route of our own, so that the base model's card is vLLM's, and since vLLM 0.26 lets
no plugin replace one of its routes.
"""

from __future__ import annotations

import json
import time
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from .registry import Registry


def alias_cards(registry: Registry, created: int) -> list[dict[str, Any]]:
    """One card per intervention: id `base:name`, root its source, parent the base model."""
    base = registry.base_names[0]
    return [
        {
            "id": f"{base}:{entry.name}",
            "object": "model",
            "created": created,
            "owned_by": "steer-vllm",
            "root": entry.source,
            "parent": base,
            "permission": [],
        }
        for entry in registry.catalog
    ]


def with_aliases(send: Send, registry: Registry) -> Send:
    """Holds the answer back until it is whole. Errors pass as they are."""
    start: Message = {}
    parts: list[bytes] = []

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        content = b"".join(parts)
        if start["status"] == 200:
            listed = json.loads(content)
            listed["data"] += alias_cards(registry, int(time.time()))
            content = json.dumps(listed).encode()
            MutableHeaders(scope=start)["content-length"] = str(len(content))
        await send(start)
        await send({"type": "http.response.body", "body": content})

    return sending
