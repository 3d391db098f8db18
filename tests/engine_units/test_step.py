"""What a step costs before the model runs, by count: operations, copies, allocations. Nothing here is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from engine_units.test_worker import REQUESTS, TOTAL, Rank, plain
from torch.utils._python_dispatch import TorchDispatchMode

from steer_vllm.engine.worker import StepView

__all__ = ["plain"]

WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal")
"""Operations for which the host waits for the device."""


class Operations(TorchDispatchMode):
    """Counts every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rank() -> Rank:
    """With every request in it and prefilled."""
    rank = Rank()
    for name in REQUESTS:
        rank.add(name)
    rank.step(*((name, 0, TOTAL) for name in REQUESTS))
    return rank


def counted(call: Callable[[], Any]) -> Counter[str]:
    with Operations() as operations:
        call()
    return operations.counts


def view(names: list[str], at: int = TOTAL, *, decoding: bool = True, repeat: int = 1) -> StepView:
    """`repeat` tokens of each request, all at one position."""
    count = repeat * len(names)
    return StepView(names, torch.arange(0, count + 1, repeat), torch.full((count,), at), count, decoding)


def test_a_batch_that_goes_on_decoding_costs_nothing(rank: Rank) -> None:
    rank.steering.prepare(view(list(REQUESTS)))
    for at in range(TOTAL + 1, TOTAL + 5):
        step = view(list(REQUESTS), at)
        assert not counted(lambda step=step: rank.steering.prepare(step))


def test_nothing_steered_costs_nothing(rank: Rank) -> None:
    for name in REQUESTS:
        rank.steering.remove(name)
    rank.steering.prepare(view(["x"]))
    step = view(["x", "y"])
    assert not counted(lambda: rank.steering.prepare(step))


def test_another_batch_costs_the_same_however_large(rank: Rank) -> None:
    """A bound on what is launched; nothing per token or per request, and nothing that waits."""
    found = []
    for names in (["a"], ["a", "b"], list(REQUESTS)):
        for repeat in (1, 16):
            rank.steering.prepare(view([*names, "x"], decoding=False))
            step = view(names, decoding=False, repeat=repeat)
            found.append(counted(lambda step=step: rank.steering.prepare(step)))
    first, *others = found
    assert 0 < first.total() <= 45, first
    assert not any(first[name] for name in WAITS), first
    assert all(counts == first for counts in others), found


def test_what_changes_the_slots_of_a_decoding_batch(rank: Rank) -> None:
    """Whatever happens between two steps of the same ids, the second is routed again."""
    names, steering = list(REQUESTS), rank.steering
    steering.prepare(view(names))
    wanted = steering.tokens.scales.clone()
    assert wanted.any()
    changes: dict[str, Callable[[], Any]] = {
        "dummy batch": steering.rest,
        "woken": steering.restore,
        "other tokens": lambda: steering.prepare(view(names, 0, decoding=False, repeat=3)),
        "another batch": lambda: steering.prepare(view(["c"])),
        "resumed": lambda: steering.add("a", rank.plans["a"]),
    }
    for change in changes.values():
        change()
        steering.prepare(view(names))
        assert torch.equal(steering.tokens.scales, wanted)
    steering.add("a", None)
    steering.prepare(view(names))
    assert not steering.tokens.scales[names.index("a")]
