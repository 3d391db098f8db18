"""Dummy batches of the first runner: an idle engine of a group runs them in step with the others, unsteered."""

from __future__ import annotations

from typing import Any

import pytest

from steer_vllm.engine.runner_v1 import _patch_dummy
from steer_vllm.slots import TokenSlots


class Runner:
    """Its dummy run shows what the layers would read."""

    steering: Any = None

    def _dummy_run(self, num_tokens: int, uniform_decode: bool = False) -> list[float]:
        return self.steering.tokens.scales[:num_tokens].tolist() if self.steering else []


@pytest.fixture
def runner() -> Runner:
    class Patched(Runner):
        _dummy_run = Runner._dummy_run

    _patch_dummy(Patched)
    return Patched()


def test_slots_of_the_step_before_do_not_steer(runner: Runner) -> None:
    class Steering:
        tokens = TokenSlots(4, "cpu")
        rest = tokens.clear

    runner.steering = Steering
    for into in Steering.tokens.reach(3):
        into.fill_(1)
    assert runner._dummy_run(2, uniform_decode=True) == [0, 0]


def test_without_steering(runner: Runner) -> None:
    assert runner._dummy_run(2) == []
