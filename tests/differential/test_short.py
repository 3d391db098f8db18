"""A few configurations of the differential tester, always the same cases; `make fuzz` draws more."""

from __future__ import annotations

import pytest

from . import configurations
from .hunt import hunt

SEEDS = {
    3: "V1 compiled, pieces of 5 tokens",
    6: "V1, pieces of 17 tokens, scheduled ahead; prefix cache",
    10: "sliding windows beside full attention; prefix cache",
    18: "n-gram speculation",
    47: "V2, scheduled ahead; prefix cache",
}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_is_exact(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    count = hunt(seed, 12, tmp_path_factory.mktemp("differential"))
    assert count.steered > 20
    assert count.tokens > 200
    assert min(count.turns, count.cancelled, count.preempted) > 0
    assert (count.cached > 0) == ("prefix cache" in SEEDS[seed])
    assert (count.drafted > 0) == ("speculation" in SEEDS[seed])


def test_drawing_is_repeatable() -> None:
    assert configurations.draw(5) == configurations.draw(5)
    assert len({configurations.draw(seed).model_dump_json() for seed in range(60)}) == 60
