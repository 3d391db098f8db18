"""Streams that decode side by side, and what of their gaps falls into a window of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

PROMPT = 16

Gap = tuple[float, float]
"""When it ended, and how long it was: seconds."""


def prompt(number: int) -> list[int]:
    """Token ids, other ones for each stream."""
    return [10 + (37 * number + i) % 900 for i in range(PROMPT)]


class Batch:
    """One request after the other in each stream. gaps: those between two tokens of a request."""

    def __init__(self, live: Any, streams: int, tokens: int) -> None:
        self.gaps: list[Gap] = []
        self._live = live
        self._tasks = [asyncio.create_task(self._run(i, tokens - i * tokens // (2 * streams))) for i in range(streams)]

    async def _run(self, number: int, tokens: int) -> None:
        """tokens: of each request; not the same for all streams, or they would end together."""
        while True:
            before = None
            async for now in self._live.stream(prompt(number), tokens):
                if before is not None:
                    self.gaps.append((now, now - before))
                before = now

    async def stop(self) -> None:
        """Errors: that of a stream that has failed."""
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
                raise outcome


@asynccontextmanager
async def decoding(live: Any, streams: int, tokens: int) -> AsyncIterator[Batch]:
    """A batch that decodes as long as this lasts, and has come to an even pace."""
    batch = Batch(live, streams, tokens)
    await asyncio.sleep(2.0)
    try:
        yield batch
    finally:
        await batch.stop()


def pauses(gaps: Sequence[Gap], windows: Iterable[tuple[float, float]]) -> list[float]:
    """Milliseconds: the longest gap that touches each window, less the median of all gaps."""
    usual = median(seconds for _, seconds in gaps)
    return [
        1000 * max((s - usual for ended, s in gaps if ended > began and ended - s < until), default=0.0)
        for began, until in windows
    ]
