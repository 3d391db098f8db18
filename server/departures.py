"""Requests that have ended here before they have in the engine: their client left, or a stop string was found here.

vLLM aborts them, and until the engine has read that, they hold rows and contents there. So what they hold here is given
back when the engine has; to give it back at once would send it more requests than it has rows for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from .names import log

_ABORTED_WITHIN = 0.02  # seconds; vLLM does not tell when it has sent an abort


class Lease(Protocol):
    """What a request holds."""

    def release(self) -> None: ...


class Departures:
    """For one event loop. settle: comes back when the engine has done what was sent to it before."""

    def __init__(
        self, settle: Callable[[], Awaitable[None]], in_background: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        self._settle = settle
        self._in_background = in_background
        self._leaving: list[Lease] = []
        self._running = False

    def add(self, lease: Lease) -> None:
        """Release it a little later. Those that come together wait together."""
        self._leaving.append(lease)
        if not self._running:
            self._running = True
            self._in_background(self._run())

    async def _run(self) -> None:
        try:
            while self._leaving:
                await asyncio.sleep(_ABORTED_WITHIN)
                gone, self._leaving = self._leaving, []
                try:
                    await self._settle()
                except Exception as error:  # whatever it is, those who leave meanwhile must not wait for the next one
                    log.warning("the engine did not say that it is done with requests that left: %r", error)
                finally:
                    for lease in gone:
                        lease.release()
        finally:
            self._running = False
