"""A few configurations of the differential tester, always the same cases; `make fuzz` draws more."""

from __future__ import annotations

import pytest

from . import configurations
from .hunt import hunt

SEEDS = {
    6: "V1, pieces of 17 tokens, preemption, scheduled ahead",
    9: "V2, preemption",
    10: "sliding windows beside full attention",
}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_is_exact(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    count = hunt(seed, 12, tmp_path_factory.mktemp("differential"))
    assert count.steered > 10
    assert count.tokens > 50


def test_drawing_is_repeatable() -> None:
    assert configurations.draw(5) == configurations.draw(5)
    assert len({configurations.draw(seed).model_dump_json() for seed in range(60)}) == 60
