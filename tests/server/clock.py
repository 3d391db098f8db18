"""An event loop whose time passes only when everything waits: minutes take moments, and always the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class _AtOnce(ThreadPoolExecutor):
    """Threads would bring real time back."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class _Selector(selectors.DefaultSelector):
    """Jumps over every wait."""

    passed = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits for ever")
        if not ready and timeout:
            self.passed += timeout
        return ready


class Clock(asyncio.SelectorEventLoop):
    """For `asyncio.Runner(loop_factory=Clock)`; the asynchronous tests of this folder run on it."""

    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)
        self.set_default_executor(_AtOnce())

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """It has no threads; to wait for them, asyncio starts one, of which this loop would not know."""

    def time(self) -> float:
        return self._jumping.passed
