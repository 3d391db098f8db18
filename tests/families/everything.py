"""All that docs/models.md rests on: which families run, on which runner, and which of them on two ranks.

Engines of one kind share a process. It knows no verdicts and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import engines
from engine.engines import Engine

from .models import FAMILIES, Family, family
from .observe import Observation, observe

ON_V2 = ("Gemma 3", "Qwen3-MoE", "Falcon-H1")
"""Post-norms, experts, and recurrent state, with Triton's interpreter."""

ON_TWO_RANKS = ("Falcon 40B",)
"""Shares of sums; `tests/engine` has whole outputs on two ranks."""

TWO_RANKS = Engine(
    "two-ranks",
    {
        **engines.V1_EAGER.env,
        **engines.two_cores(),
        "PYTHONPATH": str(Path(__file__).parent / "workers"),
    },
    engines.V1_EAGER.llm,
)


@dataclass(frozen=True)
class Everything:
    """first: every family on V1; second: some on V2; parallel: some on two ranks."""

    first: list[Observation]
    second: list[Observation]
    parallel: list[Observation]


def first(folder: Path, families: Sequence[Family] = FAMILIES) -> list[Observation]:
    return observe(list(families), folder / "v1")


def second(folder: Path) -> list[Observation]:
    return observe([family(name) for name in ON_V2], folder / "v2", engines.V2)


def parallel(folder: Path) -> list[Observation]:
    chosen = [family(name) for name in ON_TWO_RANKS]
    return observe(chosen, folder / "two-ranks", TWO_RANKS, tensor_parallel_size=2)


def everything(folder: Path) -> Everything:
    return Everything(first(folder), second(folder), parallel(folder))
