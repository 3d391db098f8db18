"""The batches that the operations are timed on, the bytes they are compared with, and the section in RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from steer_vllm.bench import record


@pytest.fixture
def ops(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("ops")


@pytest.mark.parametrize(
    ("tokens", "distinct", "rows"), [(5, 0, [0] * 5), (4, 1, [1] * 4), (4, 2, [1, 1, 2, 2]), (3, 3, [1, 2, 3])]
)
def test_rows(ops: ModuleType, tokens: int, distinct: int, rows: list[int]) -> None:
    assert ops.Case(tokens, 8, 2, distinct).rows("cpu").tolist() == rows


def test_bytes(ops: ModuleType) -> None:
    """Two parts of x, the result, A, B and c of three rows, a row per token."""
    assert ops.Case(4, 10, 2, 3).bytes(torch.bfloat16) == 2 * (2 * 40 + 40 + 3 * (20 + 20 + 2)) + 16
    assert ops.Case(4, 10, 2, 0).bytes(torch.float32) == 4 * 40 + 16


def test_section(ops: ModuleType) -> None:
    """Measured on next to nothing."""
    cases = list(ops.measure([ops.Case(2, 8, 1, 2)], torch.float32, "cpu", 1))
    assert [case["op"] for case in cases] == ["low_rank", "route"]
    text = ops.markdown(record.begin("ops", ops.FORMAT, {"dtype": "float32"}, None) | {"cases": cases})
    assert "| low_rank | 2 | 8 | 1 | 2 |" in text
    assert "| route | 2 |  |  | 2 |" in text
