"""What is said of profiled launches: differences by name, totals, shares of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType

import pytest

from steer_vllm.bench import record
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.workload import Load, Workload

PLAIN = {"gemm": [4.0, 400.0], "fused_norm": [4.0, 20.0], "copy": [1.0, 2.0]}
STEERED = {"gemm": [4.0, 400.0], "fused_norm_index": [4.0, 24.0], "copy": [2.0, 4.0], "a|b": [0.5, 1.0]}


@pytest.fixture
def kernels(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("kernels")


def test_differences_are_by_name_the_largest_first(kernels: ModuleType) -> None:
    assert kernels.differences(PLAIN, STEERED) == [
        ("fused_norm_index", 4.0, 24.0),
        ("fused_norm", -4.0, -20.0),
        ("copy", 1.0, 2.0),
        ("a|b", 0.5, 1.0),
    ]
    assert kernels.total(PLAIN) == (9.0, 422.0)


def test_section(kernels: ModuleType) -> None:
    work = Workload(SHAPES["tiny"], (Load(2, 32, 18),))
    facts = {**asdict(work), "parameters": work.shape.parameters}
    begun = record.begin("kernels", kernels.FORMAT, facts, "cpu")
    text = kernels.markdown({**begun, "modes": {"plain": PLAIN, "idle": STEERED}})
    assert "| plain | 9 |  | 422 |  |" in text
    assert "| idle | 10 | 0.75 | 429 | 3.5 |" in text  # of two layers
    assert "| +0.5 | +1.0 | `a\\|b` |" in text
    assert "The operators of a decode step at batch 2" in text
    assert "gemm" not in text, "what is alike is no difference"
