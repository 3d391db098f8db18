"""What the prefix cache gave to each request of a list, against what the keys promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Step(Protocol):
    """A request's title, and how many cached tokens it must find."""

    @property
    def title(self) -> str: ...

    @property
    def cached(self) -> int: ...


def check_counts(steps: Sequence[Step], results: Sequence[dict[str, Any]]) -> None:
    """One result per step, in order."""
    found = {step.title: result["cached"] for step, result in zip(steps, results, strict=True)}
    assert found == {step.title: step.cached for step in steps}
