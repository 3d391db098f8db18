"""What the plugin may cost: the share of plain vLLM's throughput that each mode has to keep, and whether it did.

The one table of it. Met: the whole interval of the ratio reaches the target; not met: none of it does; else open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .modes import MODES
from .result import Measured, Row, measured
from .shapes import SHAPES
from .spread import Ratio
from .workload import Load

MET, MISSED, OPEN = "met", "not met", "open"


@dataclass(frozen=True)
class Targets:
    """Which results it is for, where it holds, and what is asked.

    device: in the name of the results' accelerator; None: a CPU. loads: the columns, of these sizes and no others.
    least: by mode. alone: for every mode where one request decodes. lora: whether what LoRA loses is a bound too.
    Distinct interventions are as many as requests.
    """

    title: str
    shape: str
    dtype: str
    device: str | None
    prefix_cache: bool
    loads: tuple[Load, ...]
    least: Mapping[str, float]
    alone: float | None = None
    lora: bool = False

    def covers(self, result: Mapping[str, Any]) -> bool:
        """Whether a result is about this: the model's shape and dtype, compiled, the prefix cache, the device."""
        workload, device = result["workload"], result["hardware"]["device"]
        on_cpu = device in (None, "cpu")
        return (
            dict(workload["shape"]) == asdict(SHAPES[self.shape])
            and workload["dtype"] == self.dtype
            and bool(workload["compiled"])
            and bool(workload["prefix_cache"]) == self.prefix_cache
            and (on_cpu if self.device is None else not on_cpu and self.device in device)
        )

    def of(self, load: Load, mode: str) -> float | None:
        """The least ratio there; None where there is no target."""
        if mode not in self.least or not any(_same_size(load, one) for one in self.loads):
            return None
        return self.alone if self.alone is not None and load.decodes and load.requests == 1 else self.least[mode]


def _same_size(a: Load, b: Load) -> bool:
    """How often a load is run in a turn does not matter."""
    return replace(a, repeats=1) == replace(b, repeats=1)


GPU = Targets(
    "one H200, 8B-shaped Llama in bfloat16, 512 tokens in and 256 out, prefix cache off",
    shape="8b",
    dtype="bfloat16",
    device="H200",
    prefix_cache=False,
    loads=(
        *(Load(requests, 512, 256) for requests in (1, 32, 256)),
        *(Load(requests, tokens, 1) for requests, tokens in ((1, 2048), (1, 8192), (4, 2048))),
    ),
    least={
        "idle-additive": 0.995,
        "idle": 0.985,
        "shared-offsets": 0.99,
        "distinct-offsets": 0.98,
        "distinct-loreft": 0.97,
        "distinct-low-rank": 0.95,
    },
    alone=0.98,
    lora=True,
)
GPU_CACHED = replace(GPU, title=GPU.title.replace("cache off", "cache on"), prefix_cache=True, lora=False)
CPU = Targets(
    "CPU, 100M-shaped Llama in float32, 32 tokens in and 64 out",
    shape="100m",
    dtype="float32",
    device=None,
    prefix_cache=False,
    loads=tuple(Load(requests, 32, 64) for requests in (1, 16, 64)),
    least={"idle-additive": 0.97, "idle": 0.97, "distinct-offsets": 0.97, "distinct-loreft": 0.95},
)
ALL = (CPU, GPU, GPU_CACHED)

OF_LORA = 1 / 3
"""The part of what LoRA loses that low-rank edits of as many requests may lose."""


def target(result: Mapping[str, Any], row: Row) -> float | None:
    """The least ratio of a row; None where there is no target for it."""
    load = _loads(result)[row.load]
    if not _whole(load, row):
        return None
    return next((targets.of(load, row.mode) for targets in ALL if targets.covers(result)), None)


def _loads(result: Mapping[str, Any]) -> dict[str, Load]:
    """By the name that rows have."""
    loads = (Load(**load) for load in result["workload"]["loads"])
    return {load.name: load for load in loads}


def _whole(load: Load, row: Row | Measured) -> bool:
    """Every request has its own, where they are distinct."""
    return not MODES[row.mode].distinct or row.distinct == load.requests


def verdict(ratio: Ratio, least: float) -> str:
    """In a word. Of too few rounds nothing is said."""
    if not ratio.sure or ratio.low < least <= ratio.high:
        return OPEN
    return MET if ratio.low >= least else MISSED


def overview(results: Iterable[Mapping[str, Any]]) -> str:
    """A table for each set of targets, filled from what covers it. Unmeasured: empty.

    Of several results all rounds together: two processes differ by a little without a cause, and more rounds of the
    same processes do not tell that from what the plugin costs.
    """
    found = list(results)
    return "\n".join(_table(targets, filter(targets.covers, found)) for targets in ALL)


Ratios = dict[tuple[Load, str], Ratio]
"""By target's load and mode."""


def _ratios(targets: Targets, results: Iterable[Mapping[str, Any]]) -> Ratios:
    found: dict[tuple[Load, str], list[float]] = {}
    for result in results:
        loads = _loads(result)
        for case in measured(result):
            at = next((one for one in targets.loads if _same_size(one, loads[case.load])), None)
            if at is not None and _whole(at, case):
                found.setdefault((at, case.mode), []).extend(case.ratios)
    return {key: Ratio.of(ratios) for key, ratios in found.items()}


def _table(targets: Targets, results: Iterable[Mapping[str, Any]]) -> str:
    ratios = _ratios(targets, results)
    lines = [f"## Targets: {targets.title}", ""]
    if targets.alone is not None:
        lines += [f"Of one request that decodes {targets.alone:.0%} is asked, in every mode.", ""]
    names = " | ".join(load.name for load in targets.loads)
    lines += [f"| mode | at least | {names} |", "|---" * (2 + len(targets.loads)) + "|"]
    for mode, least in targets.least.items():
        cells = (_cell(ratios.get((load, mode)), targets.of(load, mode) or least) for load in targets.loads)
        lines.append(f"| {mode} | {least:.1%} | " + " | ".join(cells) + " |")
    if targets.lora:
        shares = (_of_lora(ratios, load) for load in targets.loads)
        lines.append(f"| loss of distinct-low-rank, of LoRA's | at most {OF_LORA:.0%} | " + " | ".join(shares) + " |")
    return "\n".join([*lines, ""])


def _cell(ratio: Ratio | None, least: float) -> str:
    """Ratio, interval, rounds, verdict."""
    if ratio is None:
        return ""
    rounds = f", {ratio.rounds} rounds" if ratio.sure else ""
    return f"{ratio.median:.1%} ({ratio.interval}{rounds}): {verdict(ratio, least)}"


def _of_lora(ratios: Ratios, load: Load) -> str:
    """What distinct low-rank edits lose, as a share of what LoRA loses under the same load.

    Met where it holds for every loss in both intervals, missed where it holds for none.
    """
    ours, lora = (ratios.get((load, mode)) for mode in ("distinct-low-rank", "lora"))
    if ours is None or lora is None:
        return ""
    if not (ours.sure and lora.sure):
        said = OPEN
    elif 1 - ours.low <= max(0.0, 1 - lora.high) * OF_LORA:
        said = MET
    else:
        said = MISSED if 1 - ours.high > max(0.0, 1 - lora.low) * OF_LORA else OPEN
    rounds = min(ours.rounds, lora.rounds)
    return f"{1 - ours.median:.1%} of {1 - lora.median:.1%}, {rounds} round{'s' * (rounds != 1)}: {said}"
