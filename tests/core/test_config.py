"""The engine's limits: checked all at once, exact as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from steer_vllm.config import SPARE_ROWS, SteerConfig
from steer_vllm.edit import Site
from steer_vllm.errors import StartupRefused


@pytest.mark.parametrize(
    "config",
    [
        SteerConfig(),
        SteerConfig(additive_rows=3, low_rank_rows=0),
        SteerConfig(max_rank=4, additive_sites=tuple(Site), low_rank_sites=(Site.MLP_OUTPUT,), max_scale=2.5),
    ],
)
def test_json_round_trip(config: SteerConfig) -> None:
    assert SteerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_order_of_sites_is_no_difference() -> None:
    """The JSON goes into vLLM's compile-cache key: one configuration has one form."""
    one = SteerConfig(additive_sites=("block_output", "attention_output"))  # type: ignore[arg-type]
    two = SteerConfig(additive_sites=(Site.ATTENTION_OUTPUT, Site.BLOCK_OUTPUT, Site.BLOCK_OUTPUT))
    assert one == two
    assert one.to_dict() == two.to_dict()


def test_table_rows_have_the_identity_and_spare_ones() -> None:
    config = SteerConfig(additive_rows=10, low_rank_rows=3)
    assert config.additive_table_rows == 1 + 10 + SPARE_ROWS
    assert config.low_rank_table_rows == 1 + 3 + SPARE_ROWS


def test_no_low_rank_rows_means_no_low_rank_sites() -> None:
    config = SteerConfig(low_rank_rows=0)
    assert config.low_rank_sites == ()
    assert config.low_rank_table_rows == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("additive_rows", 0), ("additive_rows", -1), ("additive_rows", 2.0), ("additive_rows", True),
        ("additive_rows", "8"), ("low_rank_rows", -1), ("low_rank_rows", None), ("max_rank", 0), ("per_request", 0),
        ("max_scale", 0), ("max_scale", -1.0), ("max_scale", float("nan")), ("max_scale", float("inf")),
        ("memory_gib", 0), ("memory_gib", float("nan")), ("memory_gib", float("inf")), ("memory_gib", True),
        ("max_scale", 1e5), ("max_scale", "8"), ("max_scale", True), ("additive_sites", "block_output"),
        ("additive_sites", ["nowhere"]), ("additive_sites", [["block_output"]]), ("additive_sites", [None]),
        ("low_rank_sites", 3), ("low_rank_sites", None), ("low_rank_sites", {"block_output": 1}),
    ],
)  # fmt: skip
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(StartupRefused, match=name):
        SteerConfig.from_dict({name: value})


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(StartupRefused) as caught:
        SteerConfig.from_dict({"additive_rows": 0, "max_rank": 0, "max_scale": -1})
    assert all(name in caught.value.message for name in ("additive_rows", "max_rank", "max_scale"))


def test_unknown_settings() -> None:
    with pytest.raises(StartupRefused, match="unknown: colour, rows"):
        SteerConfig.from_dict({"rows": 3, "colour": 1})
