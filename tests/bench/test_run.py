"""The order of a run and its limit in time, on engines that only move a clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steer_vllm.bench import run
from steer_vllm.bench.modes import Case, cases, choose
from steer_vllm.bench.run import Outcome, measure
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.workload import Load, Workload

LARGE, SMALL = Load(8, 16, 8), Load(2, 16, 8)
WORK = Workload(SHAPES["tiny"], (LARGE, SMALL), rounds=9)
CASES = cases(choose("idle,distinct-offsets", quick=False), WORK.loads, None)


class Fleet:
    """A turn with the large load takes 100 seconds, one with the small load one second; the rehearsal none."""

    clock = 0.0

    def __init__(self, *_: Any) -> None:
        self.engines: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.share = None

    def ask(self, case: Case, call: str, tokens: int) -> dict[str, Any]:
        steps = {"decode": [[float(step) for step in range(tokens)]], "first_tokens": 1.0}
        generated = [int(bool(case.mode.kinds))] * tokens
        return {"tokens": [generated] * case.load.requests, "runs": [steps]}

    def together(self, cases: Sequence[Case]) -> Sequence[Sequence[Case]]:
        return [[case] for case in cases]

    def run(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        for case in cases:
            Fleet.clock += 100.0 if case.load == LARGE else 1.0
        return [self.ask(case, "run", case.load.output_tokens) for case in cases]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads by round, for a limit on the clock."""
    monkeypatch.setattr(run, "Fleet", Fleet)
    monkeypatch.setattr(run, "rest", lambda others: None)
    monkeypatch.setattr(time, "monotonic", lambda: Fleet.clock)
    monkeypatch.setattr(Fleet, "clock", 0.0)

    def until(limit: float) -> tuple[list[Outcome], list[list[str]]]:
        kept: list[Outcome] = []
        measure(WORK, CASES, Path(), lambda text: None, kept.append, limit)
        rounds: dict[int, list[str]] = {}
        for sample in kept[-1].samples:
            rounds.setdefault(sample.round, []).append(sample.load)
        return kept, list(rounds.values())

    return until


def test_loads_come_in_the_order_they_are_asked_for(measured: Any) -> None:
    kept, rounds = measured(float("inf"))
    assert rounds == [["decode 8"] * 3 + ["decode 2"] * 3] * 9
    assert len(kept) == 2 * 9, "what there is is kept after each load"
    orders = {tuple(one.mode for one in kept[-1].samples[at : at + 3]) for at in range(0, 9 * 6, 3)}
    assert len(orders) > 1, "the modes of a load are in another order each time"


def test_a_load_that_is_too_long_leaves_its_time_to_shorter_ones(measured: Any) -> None:
    """A round takes 300 and 3 seconds; 620 seconds have room for two, and then for four more of the short one."""
    _, rounds = measured(620.0)
    assert rounds == [["decode 8"] * 3 + ["decode 2"] * 3] * 2 + [["decode 2"] * 3] * 4


def test_the_first_round_is_whole(measured: Any) -> None:
    _, rounds = measured(0.0)
    assert rounds == [["decode 8"] * 3 + ["decode 2"] * 3]


def test_plain_runs_beside_every_other_mode(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, *others = (case for case in CASES if case.load == LARGE)
    monkeypatch.setattr(Fleet, "together", lambda self, cases: [[cases[0], other] for other in cases[1:]])
    kept, _ = measured(0.0)
    turns: dict[int, set[str]] = {}
    for sample in kept[-1].samples:
        if sample.load == LARGE.name:
            turns.setdefault(sample.turn, set()).add(sample.mode)
    assert sorted(map(sorted, turns.values())) == sorted(sorted({"plain", case.mode.name}) for case in others)
