"""What the plugin may cost: the share of plain vLLM's throughput that each mode has to keep, and whether it did.

The one table of it. A target is met when the median ratio reaches it; the interval stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .modes import MODES
from .result import Row, rows
from .shapes import SHAPES

ALONE = "decode 1"


@dataclass(frozen=True)
class Targets:
    """shape, dtype, accelerator: the results it is for. least: by mode. alone: for every mode at batch 1.

    loads: where it holds. Distinct interventions are as many as requests.
    """

    title: str
    shape: str
    dtype: str
    accelerator: bool
    loads: tuple[str, ...]
    least: Mapping[str, float]
    alone: float | None = None

    def covers(self, result: Mapping[str, Any]) -> bool:
        """Whether a result is about this: the model's shape and dtype, compiled, on such a device."""
        workload, device = result["workload"], result["hardware"]["device"]
        return (
            dict(workload["shape"]) == asdict(SHAPES[self.shape])
            and workload["dtype"] == self.dtype
            and bool(workload["compiled"])
            and (device not in (None, "cpu")) == self.accelerator
        )

    def of(self, load: str, mode: str) -> float | None:
        """The least ratio there; None where there is no target."""
        if load not in self.loads or mode not in self.least:
            return None
        return self.alone if load == ALONE and self.alone is not None else self.least[mode]


GPU = Targets(
    "one H200, 8B-shaped Llama in bfloat16",
    shape="8b",
    dtype="bfloat16",
    accelerator=True,
    loads=(ALONE, "decode 32", "decode 256", "prefill 1x2048", "prefill 1x8192"),
    least={
        "idle-additive": 0.995,
        "idle": 0.985,
        "shared-offsets": 0.99,
        "distinct-offsets": 0.98,
        "distinct-loreft": 0.97,
        "distinct-low-rank": 0.95,
    },
    alone=0.98,
)
CPU = Targets(
    "CPU, 100M-shaped Llama in float32",
    shape="100m",
    dtype="float32",
    accelerator=False,
    loads=(ALONE, "decode 16", "decode 64"),
    least={"idle-additive": 0.97, "idle": 0.97, "distinct-offsets": 0.97, "distinct-loreft": 0.95},
)
ALL = (CPU, GPU)

OF_LORA = 1 / 3
"""The part of what LoRA loses that low-rank edits of as many requests may lose."""


def target(result: Mapping[str, Any], row: Row) -> float | None:
    """The least ratio of a row; None where there is no target for it."""
    if not _whole(row):
        return None
    return next((targets.of(row.load, row.mode) for targets in ALL if targets.covers(result)), None)


def _whole(row: Row) -> bool:
    """Every request has its own, where they are distinct."""
    requests = int(row.load.split()[1].split("x")[0])
    return not MODES[row.mode].distinct or row.distinct == requests


def met(ratio: float, least: float) -> str:
    """In a word."""
    return "met" if ratio >= least else "not met"


def overview(results: Iterable[Mapping[str, Any]]) -> str:
    """A table for each set of targets, filled from what covers it; of several results the newest. Unmeasured: empty."""
    found = sorted((result for result in results), key=lambda result: str(result["time"]))
    return "\n".join(_table(targets, [result for result in found if targets.covers(result)]) for targets in ALL)


def _table(targets: Targets, results: list[Mapping[str, Any]]) -> str:
    ratios: dict[tuple[str, str], float] = {}
    for result in results:
        for row in rows(result):
            if _whole(row):
                ratios[row.load, row.mode] = row.ratio.median

    def cell(load: str, mode: str, least: float) -> str:
        ratio = ratios.get((load, mode))
        return "" if ratio is None else f"{ratio:.1%}, {met(ratio, least)}"

    alone = [] if targets.alone is None else [f"At batch 1 the target is {targets.alone:.0%} throughout.", ""]
    lines = [f"## Targets: {targets.title}", "", *alone]
    lines += ["| mode | at least | " + " | ".join(targets.loads) + " |", "|---" * (2 + len(targets.loads)) + "|"]
    for mode, least in targets.least.items():
        cells = [cell(load, mode, targets.of(load, mode) or least) for load in targets.loads]
        lines.append(f"| {mode} | {least:.1%} | " + " | ".join(cells) + " |")
    if targets.accelerator:
        shares = [_of_lora(ratios, load) for load in targets.loads]
        lines.append(f"| loss of distinct-low-rank, of LoRA's | at most {OF_LORA:.0%} | " + " | ".join(shares) + " |")
    return "\n".join([*lines, ""])


def _of_lora(ratios: Mapping[tuple[str, str], float], load: str) -> str:
    """What distinct low-rank edits lose, as a share of what LoRA loses under the same load."""
    if (load, "lora") not in ratios or (load, "distinct-low-rank") not in ratios:
        return ""
    lost, lora = 1 - ratios[load, "distinct-low-rank"], 1 - ratios[load, "lora"]
    return f"{lost:.1%} of {lora:.1%}, {'met' if lost <= max(0.0, lora) * OF_LORA else 'not met'}"
