"""The batches that the operations are timed on, the bytes they are compared with, and the section in RESULTS.md."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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


def test_every_sample_is_kept_after_every_case(
    ops: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on next to nothing; the third case fails."""
    path, done = tmp_path / "ops.json", []

    def low_rank(case: Any, *given: Any) -> Any:
        done.append(case)
        if len(done) == 3:
            raise KeyboardInterrupt
        return actual(case, *given)

    actual = ops.low_rank
    monkeypatch.setattr(ops, "low_rank", low_rank)
    sizes = ["--tokens", "2,3,4", "--hidden", "8", "--rank", "1", "--distinct", "2", "--repeats", "4", "--seed", "7"]
    monkeypatch.setattr(sys, "argv", ["ops.py", *sizes, "--output", str(path)])
    with pytest.raises(KeyboardInterrupt):
        ops.main()
    result = record.read(path)
    assert result["workload"]["seed"] == 7
    cases = result["cases"]
    assert [(case["op"], case["tokens"]) for case in cases] == [(op, n) for n in (2, 3) for op in ("low_rank", "route")]
    assert all(len(samples) == 4 for case in cases for samples in case["microseconds"].values())
    text = ops.markdown(result)
    assert "| low_rank | 2 | 8 | 1 | 2 |" in text
    assert "| route | 2 |  |  | 2 |" in text


def test_the_two_take_turns(ops: ModuleType) -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in ("reference", "step")}
    ops.alternate(calls, "cpu", 20, random.Random(0))
    turns = [tuple(called[at : at + 2]) for at in range(0, len(called), 2)]
    assert set(turns) == {("reference", "step"), ("step", "reference")}


def test_the_reference_is_left_out_where_it_takes_long(ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ops.Case(4, 8, 2, 2)
    assert set(ops.low_rank(large, torch.float32, "cpu")) == {"reference", "step"}
    monkeypatch.setattr(ops, "GATHERED", 4 * 8 * 2 - 1)
    assert set(ops.low_rank(large, torch.float32, "cpu")) == {"step"}


def test_a_rate_is_said_of_what_no_cache_holds(ops: ModuleType) -> None:
    (case, _) = ops.measure([ops.Case(2, 8, 1, 2)], torch.float32, "cpu", 1, 0)
    case |= {"bytes": 10**6, "set_bytes": 8 * 10**6, "microseconds": {"step": [100.0]}}

    def last_cell(cache: int) -> str:
        facts = {"dtype": "float32", "seed": 0, "cache_bytes": cache}
        text = ops.markdown(record.begin("ops", ops.FORMAT, facts, None) | {"cases": [case]})
        return text.strip().splitlines()[-1].split("|")[-2].strip()

    assert (last_cell(10**6), last_cell(5 * 10**6)) == ("10", "")
