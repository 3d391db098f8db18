"""The HTTP benchmark's first part runs without an engine; what it computes is checked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import ModuleType
from typing import Any

Script = Callable[[str], ModuleType]


def test_added_is_taken_within_a_round(script: Script) -> None:
    http = script("http_path")
    forms = {http.isolated.WITHOUT: 10.0, **dict.fromkeys(http.isolated.FORMS, 25.0)}
    samples = [
        {"round": number, "streams": 4, "form": form, "us": us + 100 * number}
        for number in range(3)
        for form, us in forms.items()
    ]
    rows = http.added(samples, [4])
    assert [row["form"] for row in rows] == list(http.isolated.FORMS)
    assert all(row["us"] == {"median": 15.0, "q1": 15.0, "q3": 15.0} for row in rows)


def test_every_form_passes_the_middleware(script: Script) -> None:
    """What is timed is the whole way: the app sees the request rewritten, and everything is given back."""
    isolated = script("http_path").isolated
    state = isolated.front(["direction-0", "direction-1"])
    samples = asyncio.run(isolated.measure([2], 3, 100, 4))
    rounds = [[one["form"] for one in samples if one["round"] == number] for number in range(4)]
    assert len(samples) == 4 * (1 + len(isolated.FORMS)), "a first round is not counted"
    assert all(set(forms) == {isolated.WITHOUT, *isolated.FORMS} for forms in rounds)
    assert len({tuple(forms) for forms in rounds}) > 1, "in another order each"

    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guarded = isolated.SteerMiddleware(app)
    body = b'{"model": "base:direction-0", "prompt": "what"}'
    asyncio.run(isolated.requests(guarded, state, body, 1, 1))
    assert b"vllm_xargs" in seen[0]["body"]
    assert not state.gate._held
