"""Which cases work in alternation, and how: on engines that say when they wait. None is started."""

from __future__ import annotations

from typing import Any

import pytest

from steer_vllm.bench.fleet import Fleet
from steer_vllm.bench.modes import cases, choose
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.workload import Load, Workload

DECODE, PREFILL = Load(2, 16, 8), Load(2, 16, 1, 4)
WORK = Workload(SHAPES["tiny"], (DECODE, PREFILL))
CASES = cases(choose("idle,distinct-offsets", quick=False), WORK.loads, None)
DECODING = [case for case in CASES if case.load == DECODE]


class Engine:
    """Waits so many times before it answers; `said` is what all of them were asked, in order."""

    def __init__(self, name: str, waits: int, said: list[tuple[str, str]]) -> None:
        self.name = name
        self._waits = waits
        self._said = said

    def ask(self, call: str, **more: Any) -> dict[str, Any]:
        self._said.append((self.name, call))
        if call == "run":
            self.share, self.left = more["share"], self._waits
            self.asked = more["tokens"], more["repeats"]
        if self.share is None or not self.left:
            return {"tokens": self.name}
        self.left -= 1
        return {"waits": True}


@pytest.fixture
def said() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def fleet(said: list[tuple[str, str]]) -> Fleet:
    fleet = Fleet.__new__(Fleet)
    engines = {name: Engine(name, waits, said) for name, waits in (("plain", 1), ("steered", 3))}
    vars(fleet).update(engines=engines, _workload=WORK, share=8)
    return fleet


def test_two_engines_alternate_until_both_are_done(fleet: Fleet, said: list[tuple[str, str]]) -> None:
    plain, idle, _ = DECODING
    assert fleet.run([idle, plain]) == [{"tokens": "steered"}, {"tokens": "plain"}]
    assert said == [
        ("steered", "run"),
        ("plain", "run"),
        ("steered", "go on"),
        ("plain", "go on"),
        ("steered", "go on"),
        ("steered", "go on"),
    ]


def test_one_alone_does_not_wait(fleet: Fleet, said: list[tuple[str, str]]) -> None:
    assert fleet.run(DECODING[1:2]) == [{"tokens": "steered"}]
    assert said == [("steered", "run")]


def test_a_prefill_is_repeated(fleet: Fleet) -> None:
    (plain,) = (case for case in CASES if case.load == PREFILL and case.mode.name == "plain")
    fleet.run([plain])
    assert fleet.engines["plain"].asked == (1, 4)


def test_plain_vllm_decodes_beside_each_of_the_others(fleet: Fleet) -> None:
    plain, idle, offsets = DECODING
    prefills = [case for case in CASES if case.load == PREFILL]
    assert fleet.together(DECODING) == [[plain, idle], [plain, offsets]]
    assert fleet.together([plain]) == [[plain]]
    assert fleet.together(prefills) == [[case] for case in prefills]
    fleet.share = None
    assert fleet.together(DECODING) == [[plain], [idle], [offsets]]
