"""One run: start the engines, see that every case does what it says, then let the cases take turns.

All engines live at once and one works at a time; a turn begins when the others use no CPU. In a turn one case runs, or
plain vLLM and another in alternation. Each round runs every case once, plain vLLM as often as there are others in
alternation: load by load as they were asked for, the turns of a load in an order of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import BenchmarkInvalid
from .fleet import Fleet
from .modes import EAGER, PLAIN, Case
from .rest import rest
from .workload import Load, Workload

_REHEARSED = (64, 16)
"""Tokens of a decode load's prompts, and tokens generated, in the rehearsal: enough to see whether answers differ."""


@dataclass(frozen=True)
class Sample:
    """One case in one turn. tokens_per_second: of the whole batch, of `steps` steps; step_ms: their median.

    Of a decode load the steps are those in which every request decodes, without the first after each wait; of a prefill
    load a step is one repeat, from the call to the last first token. first_tokens_ms: from the call until every request
    has its first token. others_cpu: CPU time of the engines that had to rest, as a share of the turn's length.
    """

    round: int
    turn: int
    load: str
    mode: str
    distinct: int
    tokens_per_second: float
    step_ms: float
    steps: int
    first_tokens_ms: float
    others_cpu: float


@dataclass(frozen=True)
class Outcome:
    """same_as_plain: by case, the share of requests that generated what plain vLLM did. facts: by engine.

    share: steps that engines in alternation make at a time; None where each decodes alone.
    """

    samples: list[Sample]
    share: int | None
    same_as_plain: dict[tuple[str, str, int], float]
    facts: dict[str, dict[str, Any]]


def measure(
    workload: Workload,
    cases: Sequence[Case],
    folder: Path,
    say: Callable[[str], None],
    keep: Callable[[Outcome], None],
    until: float = float("inf"),
) -> None:
    """Run everything. folder: for the model, the artifacts and the engines' logs. say: takes one line of progress.

    keep: takes what there is whenever a load's cases have all had their turn. until: on the monotonic clock; what a
    round does with a load is not begun where it would end later, except in the first. Errors: `BenchmarkInvalid` when
    an engine fails or does not rest, or a case does not do what it says.
    """
    with ExitStack() as stack:
        fleet = Fleet(cases, workload, folder, stack, say)
        same = _rehearse(fleet, cases, workload, say)
        order, samples = random.Random(workload.seed), list[Sample]()
        longest = {case.load: 0.0 for case in cases}
        for number in range(workload.rounds):
            for load in longest:  # what is compared is run within a minute
                began = time.monotonic()
                if number and began + longest[load] > until:
                    continue  # another may be short enough
                turns = fleet.together([case for case in cases if case.load == load])
                for turn, of in enumerate(order.sample(turns, len(turns))):
                    modes = " and ".join(case.mode.name for case in of)
                    say(f"round {number + 1} of {workload.rounds}: {load.name}, {modes}")
                    samples += _turn(number, turn, fleet, order.sample(of, len(of)))
                keep(Outcome(samples, fleet.share, same, fleet.facts))
                longest[load] = max(longest[load], time.monotonic() - began)


def _rehearse(
    fleet: Fleet, cases: Sequence[Case], workload: Workload, say: Callable[[str], None]
) -> dict[tuple[str, str, int], float]:
    """Run every case once, untimed, and compare what it generates with plain's.

    Errors: `BenchmarkInvalid` when a case that steers answers like plain vLLM, or one that does not answers otherwise
    (in float32: coarser types round differently in another graph).
    """
    plain: dict[str, list[list[int]]] = {}
    same = {}
    for case in sorted(cases, key=lambda one: one.mode.name != PLAIN):
        say(f"rehearsing {case.mode.name}, {case.load.name}")
        short = replace(case, load=_shortened(case.load))
        tokens = fleet.ask(short, "run", tokens=short.load.output_tokens)["tokens"]
        alike = sum(a == b for a, b in zip(tokens, plain.setdefault(case.load.name, tokens), strict=True))
        same[case.key] = share = alike / case.load.requests
        where = f"{case.mode.name}, {case.load.name}"
        if case.mode.kinds or case.mode.adapters:
            if share > 0.1:
                raise BenchmarkInvalid(f"{where}: {share:.0%} of the requests answer as without intervention")
        elif share < 0.9 and workload.dtype == "float32" and case.mode.engine != EAGER:
            raise BenchmarkInvalid(f"{where}: only {share:.0%} of the requests answer as plain vLLM does")
    return same


def _shortened(load: Load) -> Load:
    prompt, output = _REHEARSED
    if not load.decodes:
        return load
    return replace(load, prompt_tokens=min(load.prompt_tokens, prompt), output_tokens=min(load.output_tokens, output))


def _turn(number: int, turn: int, fleet: Fleet, cases: Sequence[Case]) -> list[Sample]:
    working = {case.mode.engine for case in cases}
    others = [engine for name, engine in fleet.engines.items() if name not in working]
    rest(others)
    before, began = sum(engine.cpu_seconds() for engine in others), time.monotonic()
    answers = fleet.run(cases)
    took = time.monotonic() - began
    used = (sum(engine.cpu_seconds() for engine in others) - before) / took
    return [_sample(number, turn, case, answer, used) for case, answer in zip(cases, answers, strict=True)]


def _sample(number: int, turn: int, case: Case, answer: dict[str, Any], others: float) -> Sample:
    load, name = case.load, f"{case.mode.name}, {case.load.name}"
    if any(len(tokens) != load.output_tokens for tokens in answer["tokens"]):
        raise BenchmarkInvalid(f"{name}: a request did not generate {load.output_tokens} tokens")
    first = [run["first_tokens"] for run in answer["runs"]]
    if load.decodes:
        steps = [b - a for run in answer["runs"] for stretch in run["decode"] for a, b in pairwise(stretch)]
        if len(steps) < load.repeats * (load.output_tokens // 2 - 1):
            raise BenchmarkInvalid(f"{name}: only {len(steps)} steps decoded the whole batch")
        rate = load.requests * len(steps) / sum(steps)
    else:
        steps = first
        rate = load.requests * load.prompt_tokens / median(steps)
    return Sample(
        round=number,
        turn=turn,
        load=load.name,
        mode=case.mode.name,
        distinct=case.distinct,
        tokens_per_second=rate,
        step_ms=1000 * median(steps),
        steps=len(steps),
        first_tokens_ms=1000 * median(first),
        others_cpu=others,
    )
