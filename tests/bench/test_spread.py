"""Medians and ratios: known answers, and that the interval covers what it says."""

from __future__ import annotations

import numpy as np
import pytest

from steer_vllm.bench.spread import LEAST_ROUNDS, Ratio, Spread


def test_spread_of_known_values() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, q1=2.0, q3=4.0)


def test_what_the_machine_does_between_rounds_cancels() -> None:
    plain = [100.0, 50.0, 10.0, 80.0]
    ratio = Ratio.paired([0.97 * value for value in plain], plain)
    assert np.allclose([ratio.median, ratio.q1, ratio.q3, ratio.low, ratio.high], 0.97)


def test_rounds_are_paired_in_order() -> None:
    assert Ratio.paired([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]).median == 2.0
    with pytest.raises(ValueError, match="zip"):
        Ratio.paired([1.0, 2.0], [1.0])


def test_interval_covers_the_truth() -> None:
    """95% of the time, nearly: the bootstrap of a median is somewhat narrow at this many rounds."""
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(100):
        ratio = Ratio.paired(list(random.normal(0.98, 0.02, 25)), [1.0] * 25, seed=trial)
        assert ratio.low <= ratio.median <= ratio.high
        covered += ratio.low <= 0.98 <= ratio.high
    assert covered >= 85


def test_the_same_samples_give_the_same_interval() -> None:
    mode, plain = [0.9, 1.0, 1.1, 0.95], [1.0, 1.0, 1.0, 1.0]
    assert Ratio.paired(mode, plain) == Ratio.paired(mode, plain)


def test_too_few_rounds_have_no_interval() -> None:
    """One round would be its own interval, of no width."""
    one, few, enough = (Ratio.paired([0.97] * count, [1.0] * count) for count in (1, LEAST_ROUNDS - 1, LEAST_ROUNDS))
    assert [ratio.sure for ratio in (one, few, enough)] == [False, False, True]
    assert [ratio.interval for ratio in (one, few, enough)] == ["1 round", "4 rounds", "97.0 to 97.0%"]
