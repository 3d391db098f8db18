"""Drawing cases for one configuration until one fails, and making that one small."""

from __future__ import annotations

import math
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from . import canary, configurations, strategies
from .case import Case, Shape
from .checker import Count, Mismatch
from .engine import EngineDied
from .session import Session, keep

SHRINK_SECONDS = 90.0


class Failure(AssertionError):
    """A case that fails; the message has the mismatch and the command that repeats it."""


def hunt(number: int, examples: int, folder: Path) -> Count:
    """Play `examples` cases drawn from the seed `number`, in the configuration of that seed.

    Errors: `Failure` for the smallest failing case that was found.
    """
    configuration = configurations.draw(number)
    total = Count()
    failing: list[tuple[Case, Exception]] = []  # the last one is what the shrinker ends with
    give_up = math.inf

    with Session(configuration, folder) as session:

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(strategies.cases(configuration))
        def play(case: Case) -> None:
            nonlocal give_up
            if time.monotonic() > give_up:
                return
            try:
                total.add(session.run(case))
            except Exception as error:
                if not failing:
                    give_up = time.monotonic() + (0 if isinstance(error, EngineDied) else SHRINK_SECONDS)
                failing.append((case, error))
                raise

        try:
            play()
        except Exception:
            if not failing:
                raise
        if failing:
            case, error = failing[-1]
            raise Failure(f"configuration {number}: {error}\n{keep(case, folder)}") from error
    return total


def watch(number: int, rounds: int, folder: Path) -> Count:
    """The isolation canary in the configuration of that seed, on a model whose tokens can be forced.

    Errors: `Failure`.
    """
    shape = Shape(layers=3, hidden=64, heads=4, kv_heads=2)
    configuration = configurations.draw(number).model_copy(update={"shape": shape})
    total = Count()
    with Session(configuration, folder) as session:
        for played in range(rounds):
            case = canary.case(configuration, 1000 * number + played)
            try:
                answer = session.play(case)
                canary.check(case, answer)
                total.add(session.checker.check(case, answer))
            except (Mismatch, EngineDied) as error:
                raise Failure(f"canary in configuration {number}: {error}\n{keep(case, folder)}") from error
    return total
