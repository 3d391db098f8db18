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
        "num_gpu_blocks_override": 10,
        "async_scheduling": True,
    },
    steer={"additive_rows": 64, "additive_sites": ["attention_output", "mlp_output", "block_output"]},
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with Session(CONFIGURATION, tmp_path_factory.mktemp("canary")) as made:
        yield made


@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_ones_own(session: Session, seed: int) -> None:
    case = canary.case(CONFIGURATION, seed)
    answer = session.play(case)
    assert canary.check(case, answer) > 200
    count = session.checker.check(case, answer)
    assert count.steered > 50
    assert count.cancelled > 5
    assert answer["preemptions"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_do_not_change_a_bit(session: Session, seed: int) -> None:
    one, other = (session.play(case) for case in canary.neighbours(CONFIGURATION, seed))
    assert canary.same_bits(one, other) == 6
