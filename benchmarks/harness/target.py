"""What may be at most so large, beside the throughput that `steer_vllm.bench.targets` asks for, and whether it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A value, and between what it is with 95% certainty."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Interval:
        """Of their median, by percentile bootstrap (Efron 1979)."""
        values = np.asarray(samples)
        drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.quantile(np.median(values[drawn], axis=1), [0.025, 0.975])
        return cls(float(np.median(values)), float(low), float(high))


@dataclass(frozen=True)
class Target:
    """most: the value's bound. form: how values are written. measured: it in a result, None where that has none."""

    what: str
    most: float
    form: str
    measured: Callable[[Mapping[str, Any]], Interval | None]

    def verdict(self, found: Interval) -> str:
        """In a word: open where the interval lies on both sides."""
        return "met" if found.high <= self.most else "not met" if found.low > self.most else "open"


def on_gpu(result: Mapping[str, Any]) -> bool:
    """Whether it was measured on an accelerator."""
    return result["hardware"]["device"] not in (None, "cpu")


def overview(targets: Mapping[str, Sequence[Target]], results: Iterable[Mapping[str, Any]]) -> str:
    """A table of all targets by the benchmark that measures them, from the newest results. Unmeasured: empty."""
    newest = sorted(results, key=lambda result: str(result["time"]), reverse=True)
    lines = ["## Targets: latency and the host", "", "| at most | | on CPUs | on a GPU |", "|---|---|---|---|"]
    for benchmark, row in ((benchmark, one) for benchmark, those in targets.items() for one in those):
        of = [result for result in newest if result["benchmark"] == benchmark]
        cells = [_cell(row, [result for result in of if on_gpu(result) == gpu]) for gpu in (False, True)]
        lines.append(f"| {row.what} | {row.form.format(row.most)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(target: Target, results: Iterable[Mapping[str, Any]]) -> str:
    found = next(filter(None, map(target.measured, results)), None)
    if found is None:
        return ""
    value, low, high = map(target.form.format, found)
    return f"{value} ({low} to {high}), {target.verdict(found)}"
