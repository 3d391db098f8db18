"""What crosses processes: a plain dict with a state, never an exception.

A worker method that raises leaves later replies out of step with their calls, so whatever goes wrong becomes an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from ..errors import SteerError

Answer = dict[str, Any]
"""{"state": one of `STATES`, ...}: what crosses processes."""

STATES = ("failed", "undone", "busy", "ready", "done")
"""From the worst to the best."""


def worst_of(answers: Iterable[Answer]) -> Answer:
    """The answer that stands for all of them: what a rank could not do, the engine could not."""
    return min(answers, key=lambda answer: STATES.index(answer["state"]))


def answered(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """Turn whatever goes wrong into an answer."""

    @wraps(method)
    def safe(*args: Any) -> Answer:
        try:
            return method(*args)
        except SteerError as error:
            return {"state": "failed", "code": error.code, "message": error.message}
        except Exception as error:
            return {"state": "failed", "code": "engine_unavailable", "message": f"{type(error).__name__}: {error}"}

    return safe
