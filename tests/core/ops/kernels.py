"""The Triton kernels against the reference in float64, run by Triton's interpreter.

`test_triton.py` runs this file in a process of its own, whose Triton is the interpreter. Shapes are odd on purpose:
nothing here is a power of two or full where it need not be.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import triton
from core.make import randn
from core.ops import bfloat16
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_vllm.ops import reference
from steer_vllm.ops import triton as kernels

ROWS = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""One rounding to the dtype, and for the sums in float32 a little more."""
SHAPES = [(10, 1), (96, 3), (577, 8), (24, 16), (96, 33), (130, 64)]
"""hidden, rank"""
BATCHES = {
    "one": [3],
    "none steered": [0] * 20,
    "one row": [2] * 19,
    "all rows": [0, 1, 2, 3, 4] * 4,
    "grouped": [1] * 7 + [0] * 3 + [4] * 21 + [2] * 2,
    "some": [0, 0, 4, 0],
}


@pytest.fixture(autouse=True)
def mended() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bfloat16.mend(patch)
        yield


def tables(rank: int, hidden: int, dtype: torch.dtype, rows: int = ROWS) -> tuple[torch.Tensor, ...]:
    """One place's A, B, c, as views of the tables of three places; row 0 is zero."""
    shapes = [(rows, 3, rank, hidden), (rows, 3, rank, hidden), (rows, 3, rank)]
    wide = [randn(*shape, seed=i).to(dtype) / rank**0.5 for i, shape in enumerate(shapes)]
    for table in wide:
        table[0] = 0
    return tuple(table[:, 1] for table in wide)


def check(rows: list[int], hidden: int, rank: int, dtype: torch.dtype, residual: bool) -> torch.Tensor:
    n = len(rows)
    x = (randn(n, hidden, seed=7) / hidden**0.5).to(dtype)
    more = (randn(n, hidden, seed=8) / hidden**0.5).to(dtype) if residual else None
    at, scales = torch.tensor(rows, dtype=torch.int32), randn(n, seed=9)
    parts = tables(rank, hidden, dtype)
    found = kernels.low_rank(x, more, at, scales, *parts)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    whole = x if more is None else x + more  # rounded to the dtype, as the model rounds it
    wanted = reference.low_rank(whole.double(), None, at, scales.double(), *(part.double() for part in parts))
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not found[at == 0].any(), "padding and unsteered tokens get exactly nothing"
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("hidden", "rank"), SHAPES)
def test_shapes(hidden: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)  # the interpreter runs them one after another
    check(BATCHES["all rows"], hidden, rank, dtype, residual=True)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str) -> None:
    check(BATCHES[batch], 30, 3, torch.float32, residual=True)


@pytest.mark.parametrize("tokens", [1, 16, 18])
def test_more_rows_than_programs_and_fewer(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share a tile's passes, and a pass its tokens."""
    whole = check([(1 + t) % ROWS for t in range(tokens)], 40, 2, torch.float32, residual=False)
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    monkeypatch.setattr(kernels, "_SHARING", 1)
    assert torch.equal(check([(1 + t) % ROWS for t in range(tokens)], 40, 2, torch.float32, residual=False), whole)


def test_an_empty_batch() -> None:
    found = kernels.low_rank(
        torch.zeros(0, 10), None, torch.zeros(0, dtype=torch.int32), torch.zeros(0), *tables(2, 10, torch.float32)
    )
    assert found.shape == (0, 10)


def test_sums_are_not_rounded_on_the_way() -> None:
    """bfloat16 has 8 bits and 257 needs 9: the inner products keep them all, and so do their products with B."""
    x, A, B = torch.ones(1, 257), torch.ones(2, 2, 257), torch.ones(2, 2, 257)
    A[:, 1, 0], B[:, 1] = 0, -1  # 257 - 256
    args = torch.ones(1, dtype=torch.int32), torch.ones(1), A.bfloat16(), B.bfloat16(), torch.zeros(2, 2).bfloat16()
    assert (kernels.low_rank(x.bfloat16(), None, *args) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inner_products_may_be_larger_than_the_dtype(dtype: torch.dtype) -> None:
    """100,000 is no number of float16; what comes out of it is."""
    x, A = torch.full((1, 100), 100.0).to(dtype), torch.full((2, 1, 100), 10.0).to(dtype)
    B, c = torch.full((2, 1, 100), 2.0**-12).to(dtype), torch.zeros(2, 1).to(dtype)
    found = kernels.low_rank(x, None, torch.ones(1, dtype=torch.int32), torch.ones(1), A, B, c)
    torch.testing.assert_close(found.double(), torch.full((1, 100), 1e5 / 2**12).double(), rtol=2**-8, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_another_rows_overflow_is_not_a_tokens() -> None:
    x, at, parts = randn(4, 20), torch.tensor([1, 2, 1, 0], dtype=torch.int32), tables(3, 20, torch.float32)
    alone = kernels.low_rank(x, None, at, torch.ones(4), *parts)
    parts[0][2] = float("inf")
    kept = [0, 2, 3]
    assert torch.equal(kernels.low_rank(x, None, at, torch.ones(4), *parts)[kept], alone[kept])


def test_far_rows() -> None:
    """Offsets pass 2^31 entries where the table of all layers is large. Memory that is not touched is not taken."""
    hidden, stride = 8, 2**30 + 8
    A = torch.empty(2 * stride + hidden, dtype=torch.float16).as_strided((3, 1, hidden), (stride, hidden, 1))
    A[2] = 1
    B, c = torch.ones(3, 1, hidden).half(), torch.zeros(3, 1).half()
    row = torch.full((1,), 2, dtype=torch.int32)
    found = kernels.low_rank(torch.ones(1, hidden).half(), None, row, torch.ones(1), A, B, c)
    assert (found == hidden).all()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_route(data: st.DataObject) -> None:
    """Any batch: rows without tokens, tokens behind the last one, positions that end there, either width of them."""
    requests, segments = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    spans = torch.zeros(requests + 1, segments, 4, dtype=torch.int32)
    scales = torch.zeros(requests + 1, segments)
    for request in range(1, requests + 1):
        cuts = sorted(data.draw(st.lists(st.integers(0, 12), min_size=2 * segments, max_size=2 * segments)))
        for s in range(segments):
            stop = 2**31 - 1 if s == segments - 1 and data.draw(st.booleans()) else cuts[2 * s + 1]
            rows = data.draw(st.tuples(st.integers(0, 300), st.integers(0, 300)))
            spans[request, s] = torch.tensor([cuts[2 * s], stop, *rows], dtype=torch.int32)
            scales[request, s] = data.draw(st.sampled_from([-8.0, -0.5, 0.0, 1.0, 3.25]))
    batch = data.draw(st.lists(st.tuples(st.integers(0, requests), st.integers(0, 5)), max_size=9))
    owners = torch.tensor([request for request, _ in batch], dtype=torch.int32)
    lengths = torch.tensor([0, *(tokens for _, tokens in batch)], dtype=torch.int32)
    starts = torch.cat([lengths.cumsum(0).int(), torch.full((2,), 10**6, dtype=torch.int32)])
    used = int(lengths.sum())
    firsts = data.draw(st.lists(st.integers(0, 14), min_size=len(batch), max_size=len(batch)))
    positions = [first + i for first, (_, tokens) in zip(firsts, batch, strict=True) for i in range(tokens)]
    at = torch.tensor(positions, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    n = used + data.draw(st.integers(0, 9))
    found, wanted = (
        (torch.full((n,), 7, dtype=torch.int32), torch.full((n,), 7, dtype=torch.int32), torch.full((n,), 7.0))
        for _ in range(2)
    )
    kernels.route(at, starts, owners, spans, scales, *found)
    reference.route(at, starts, owners, spans, scales, *wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_one_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch holds."""
    launched: list[str] = []
    for name in ("_route", "_low_rank"):
        hook = partial(lambda kernel, *args, **kwargs: launched.append(kernel), name)
        monkeypatch.setattr(getattr(kernels, name), "pre_run_hooks", [hook])
    check(BATCHES["grouped"], 40, 2, torch.float32, residual=True)
    slots = [torch.zeros(300, dtype=torch.int32), torch.zeros(300, dtype=torch.int32), torch.zeros(300)]
    starts, spans = torch.tensor([0, 200], dtype=torch.int32), torch.zeros(2, 1, 4, dtype=torch.int32)
    kernels.route(torch.arange(200), starts, torch.ones(1, dtype=torch.int32), spans, torch.zeros(2, 1), *slots)
    assert launched == ["_low_rank", "_route"]


def test_it_is_the_interpreter() -> None:
    assert triton.knobs.runtime.interpret
