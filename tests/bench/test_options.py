"""Lists on the command line."""

from __future__ import annotations

import pytest

from steer_vllm.bench.options import PREFILL_REPEATS, loads, numbers
from steer_vllm.bench.shapes import SHAPES, shape
from steer_vllm.bench.workload import Load
from steer_vllm.errors import BenchmarkInvalid


def test_numbers() -> None:
    assert numbers("--batch", "1, 16,64,16") == (1, 16, 64)
    assert numbers("--batch", "") == ()
    for bad in ("0", "1,,2", "a", "-1", "1.5"):
        with pytest.raises(BenchmarkInvalid, match="--batch"):
            numbers("--batch", bad)


def test_loads() -> None:
    decode, prefill = loads("2", 32, 64, "4x2048")
    assert decode == Load(2, 32, 64)
    assert prefill == Load(4, 2048, 1, PREFILL_REPEATS)
    assert (decode.decodes, prefill.decodes) == (True, False)
    assert loads("", 32, 64, "1x8") == (Load(1, 8, 1, PREFILL_REPEATS),)
    for batch, prefill_text, said in (
        ("", "", "nothing to run"),
        ("1", "2048", "--prefill"),
        ("1", "0x8", "--prefill"),
    ):
        with pytest.raises(BenchmarkInvalid, match=said):
            loads(batch, 32, 64, prefill_text)


def test_shape_by_name() -> None:
    assert shape("8b") is SHAPES["8b"]
    with pytest.raises(BenchmarkInvalid, match="--shape 9b: expected one of tiny, 100m"):
        shape("9b")
