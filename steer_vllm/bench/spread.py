"""Medians, their spread, and how sure a ratio is.

Rounds are paired: in each, a mode and plain vLLM ran on the same machine within a minute, or in alternation, so a ratio
is taken within a round and what the machine did between rounds cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_ROUNDS = 5
"""Of fewer, not even the range from the smallest to the largest holds the median in nearly 95% of all cases."""

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q1, median, q3 = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of mode / plain, its quartiles, and the 95% bootstrap interval of that median.

    low, high: the interval; of fewer than `LEAST_ROUNDS` it is none, and `interval` says so.
    """

    median: float
    q1: float
    q3: float
    low: float
    high: float
    rounds: int

    @classmethod
    def paired(cls, mode: Sequence[float], plain: Sequence[float], seed: int = 0) -> Ratio:
        """mode, plain: one value per round, in the same order. Errors: `ValueError` for unequal lengths."""
        return cls.of([a / b for a, b in zip(mode, plain, strict=True)], seed)

    @classmethod
    def of(cls, ratios: Sequence[float], seed: int = 0) -> Ratio:
        """One per round. Percentile bootstrap over rounds (Efron 1979), 10,000 resamples."""
        values = np.array(ratios)
        drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
        low, high = np.quantile(np.median(values[drawn], axis=1), [0.025, 0.975])
        spread = Spread.of(ratios)
        return cls(spread.median, spread.q1, spread.q3, float(low), float(high), len(ratios))

    @property
    def sure(self) -> bool:
        """Whether there were rounds enough for an interval."""
        return self.rounds >= LEAST_ROUNDS

    @property
    def interval(self) -> str:
        """`98.1 to 99.0%`; of too few rounds how many there were."""
        if self.sure:
            return between(self.low, self.high)
        return f"{self.rounds} round{'s' * (self.rounds != 1)}"


def between(low: float, high: float) -> str:
    """`98.1 to 99.0%`."""
    return f"{100 * low:.1f} to {high:.1%}"
