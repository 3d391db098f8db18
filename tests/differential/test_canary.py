"""Nobody gets a token, or a bit, of another's intervention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import canary
from .case import Configuration, Shape
from .session import Session

CONFIGURATION = Configuration(
    shape=Shape(layers=3, heads=2, hidden=64),
    llm={
        "block_size": 32,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
    },
    steer={"additive_sites": ["attention_output", "mlp_output", "block_output"]},
)
ROWS = {64: 200, 2: 40}
"""Rows of the additive table, and how many forced tokens are served at least: with few rows most are turned away."""


@pytest.fixture(scope="module", params=ROWS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Many rows in a crowd, or few that go from hand to hand.

    A row that is handed on too early shows where nobody waits for blocks and no step is scheduled ahead.
    """
    steer = {**CONFIGURATION.steer, "additive_rows": request.param}
    many = request.param > 2
    llm = {**CONFIGURATION.llm, "async_scheduling": many, "num_gpu_blocks_override": 10 if many else 80}
    configuration = CONFIGURATION.model_copy(update={"steer": steer, "llm": llm})
    with Session(configuration, tmp_path_factory.mktemp("canary")) as made:
        yield made


@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_ones_own(session: Session, seed: int) -> None:
    configuration = session.engine.configuration
    case = canary.case(configuration, seed)
    answer = session.play(case)
    assert canary.check(case, answer) > ROWS[configuration.steer["additive_rows"]]
    count = session.checker.check(case, answer)
    assert count.cancelled > 2
    assert answer["preemptions"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_do_not_change_a_bit(session: Session, seed: int) -> None:
    cases = canary.neighbours(session.engine.configuration, seed)
    one, other = map(session.play, cases)
    assert canary.same_bits(one, other) == 6
