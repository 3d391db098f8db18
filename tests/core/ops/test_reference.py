"""The maths against loops over tokens, in float64, with no matrix product in them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from core.make import randn
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm.ops import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# One rounding to the dtype (half a unit in the last place), and for the sums in float32 a little more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SHAPES = [(0, 7, 3), (1, 1, 1), (5, 7, 3), (13, 33, 2), (64, 17, 9)]
"""tokens, hidden, rows"""


def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def slots(tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (row 0 among them) and scales (zero and negative among them) of every token."""
    draw = torch.Generator().manual_seed(tokens)
    scales = torch.randn(tokens, generator=draw)
    scales[::5] = 0
    return torch.randint(0, rows, (tokens,), generator=draw, dtype=torch.int32), scales


def low_rank_tables(rows: int, rank: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    A, B = (randn(rows, rank, hidden, seed=seed) / max(hidden, 1) ** 0.5 for seed in (3, 4))
    c = randn(rows, rank, seed=5)
    for table in (A, B, c):
        table[0] = 0
    return A.to(dtype), B.to(dtype), c.to(dtype)


def low_rank_loop(
    x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    x, A, B, c, scales = (tensor.double() for tensor in (x, A, B, c, scales))
    out = torch.zeros_like(x)
    for t, row in enumerate(rows.tolist()):
        for r in range(A.shape[1]):
            strength = sum(A[row, r, i] * x[t, i] for i in range(x.shape[1])) + c[row, r]
            out[t] += scales[t] * strength * B[row, r]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "rows"), SHAPES)
def test_additive(tokens: int, hidden: int, rows: int, dtype: torch.dtype) -> None:
    y, table = randn(tokens, hidden, seed=1).to(dtype), randn(rows, hidden, seed=2).to(dtype)
    at, scales = slots(tokens, rows)
    wanted = y.double().clone()
    for t, row in enumerate(at.tolist()):
        wanted[t] += scales[t].double() * table[row].double()
    assert_close(reference.additive(y, at, scales, table), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 5, 16])
@pytest.mark.parametrize(("tokens", "hidden", "rows"), [(0, 7, 3), (1, 1, 1), (5, 7, 3), (9, 17, 4)])
def test_low_rank(tokens: int, hidden: int, rows: int, rank: int, dtype: torch.dtype) -> None:
    x = randn(tokens, hidden, seed=1).to(dtype)
    tables = low_rank_tables(rows, rank, hidden, dtype)
    at, scales = slots(tokens, rows)
    wanted = low_rank_loop(x, at, scales, *tables)
    assert_close(reference.low_rank(x, None, at, scales, *tables), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_of_two_parts(dtype: torch.dtype) -> None:
    """hidden and residual, added as the model adds them: rounded to its dtype."""
    x, residual, tables = randn(5, 7).to(dtype), randn(5, 7, seed=1).to(dtype), low_rank_tables(3, 2, 7, dtype)
    at, scales = slots(5, 3)
    wanted = low_rank_loop(x + residual, at, scales, *tables)
    assert_close(reference.low_rank(x, residual, at, scales, *tables), wanted, dtype)


def test_low_rank_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds its memory changes nothing."""
    x, tables = randn(11, 6), low_rank_tables(4, 3, 6, torch.float32)
    at, scales = slots(11, 4)
    whole = reference.low_rank(x, None, at, scales, *tables)
    monkeypatch.setattr(reference, "_GATHER", 40)  # two tokens at a time
    torch.testing.assert_close(reference.low_rank(x, None, at, scales, *tables), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_on_the_way(dtype: torch.dtype) -> None:
    """256 + 1 + ... in bfloat16 would stay at 256: sums are taken in float32."""
    hidden = 512
    x = torch.ones(1, hidden, dtype=dtype)
    A, B, c = torch.ones(1, 1, hidden, dtype=dtype), torch.ones(1, 1, hidden, dtype=dtype), torch.zeros(1, 1).to(dtype)
    out = reference.low_rank(x, None, torch.zeros(1, dtype=torch.int32), torch.ones(1), A, B, c)
    assert out[0, 0] == hidden


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_zero_is_the_identity(dtype: torch.dtype) -> None:
    """Invariant: row 0 changes no bit, at any scale; so padding and unsteered requests need no branch."""
    y = randn(6, 9).to(dtype)
    table = randn(3, 9, seed=2).to(dtype)
    table[0] = 0
    tables = low_rank_tables(3, 4, 9, dtype)
    zero = torch.zeros(6, dtype=torch.int32)
    for scale in (0.0, 1.0, -8.0):
        scales = torch.full((6,), scale)
        assert torch.equal(reference.additive(y, zero, scales, table), y)
        assert not reference.low_rank(y, None, zero, scales, *tables).any()


def test_a_token_sees_its_own_row_only() -> None:
    """Invariant: other requests' contents in the same batch change no bit of a token."""
    y, at, scales = randn(8, 5), torch.tensor([0, 1, 2, 3] * 2), torch.ones(8)
    table, tables = randn(4, 5, seed=1), low_rank_tables(4, 2, 5, torch.float32)
    additive, low_rank = reference.additive(y, at, scales, table), reference.low_rank(y, None, at, scales, *tables)
    table[2] = 1e6
    for part in tables:
        part[2] = 1e6
    mine = at != 2
    assert torch.equal(reference.additive(y, at, scales, table)[mine], additive[mine])
    assert torch.equal(reference.low_rank(y, None, at, scales, *tables)[mine], low_rank[mine])
    assert not torch.equal(reference.additive(y, at, scales, table), additive)


def test_gradients() -> None:
    at = torch.tensor([0, 1, 2, 1, 0])
    scales = randn(5, seed=1, dtype=torch.float64).requires_grad_()
    y = randn(5, 4, seed=2, dtype=torch.float64).requires_grad_()
    table = randn(3, 4, seed=3, dtype=torch.float64).requires_grad_()
    tables = [t.requires_grad_() for t in low_rank_tables(3, 2, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda y, s, t: reference.additive(y, at, s, t), (y, scales, table))
    assert torch.autograd.gradcheck(lambda y, s, *t: reference.low_rank(y, None, at, s, *t), (y, scales, *tables))


def route_loop(
    positions: list[int], requests: list[int], spans: torch.Tensor, scales: torch.Tensor
) -> list[tuple[int, int, float]]:
    found = []
    for p, request in zip(positions, requests, strict=True):
        slot = (0, 0, 0.0)
        for (start, stop, additive, low_rank), scale in zip(
            spans[request].tolist(), scales[request].tolist(), strict=True
        ):
            if start <= p < stop:
                slot = (additive, low_rank, scale)
        found.append(slot)
    return found


@given(st.data())
def test_route(data: st.DataObject) -> None:
    """Any segments that do not overlap, any tokens; row 0 of the requests has no segments."""
    requests, segments = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    spans = torch.zeros(requests + 1, segments, 4, dtype=torch.int32)
    scales = torch.zeros(requests + 1, segments)
    for request in range(1, requests + 1):
        cuts = sorted(data.draw(st.lists(st.integers(0, 30), min_size=2 * segments, max_size=2 * segments)))
        for s in range(segments):
            rows = data.draw(st.tuples(st.integers(0, 300), st.integers(0, 300)))
            stop = 2**31 - 1 if s == segments - 1 and data.draw(st.booleans()) else cuts[2 * s + 1]
            spans[request, s] = torch.tensor([cuts[2 * s], stop, *rows], dtype=torch.int32)
            scales[request, s] = data.draw(st.sampled_from([-8.0, -0.5, 0.0, 1.0, 3.25]))
    positions = data.draw(st.lists(st.integers(0, 2**31 - 2), max_size=12)) + [*range(0, 32, 5)] * (requests + 1)
    cuts = data.draw(st.lists(st.integers(0, len(positions)), max_size=9))
    starts = [0, *sorted(cuts), len(positions)]  # batch rows of any length, none among them
    batch = [data.draw(st.integers(0, requests)) for _ in starts[1:]]
    owners = [row for row, (a, b) in zip(batch, pairwise(starts), strict=True) for _ in range(a, b)]
    padding = data.draw(st.integers(0, 3))
    found = routed(positions, [*starts, starts[-1]], batch, spans, scales, len(positions) + padding)
    assert found == [*route_loop(positions, owners, spans, scales), *[(0, 0, 0.0)] * padding]


def routed(
    positions: list[int],
    starts: list[int],
    batch: list[int],
    spans: torch.Tensor,
    scales: torch.Tensor,
    count: int,
) -> list[tuple[int, int, float]]:
    into = (torch.ones(count, dtype=torch.int32), torch.ones(count, dtype=torch.int32), torch.ones(count))
    numbers = (torch.tensor(values, dtype=torch.int32) for values in (starts, batch))
    reference.route(torch.tensor(positions, dtype=torch.int64), *numbers, spans, scales, *into)
    return list(zip(*(values.tolist() for values in into), strict=True))


def test_route_of_an_empty_batch() -> None:
    """What is left of the step before is cleared."""
    spans, scales = torch.ones(2, 3, 4, dtype=torch.int32), torch.ones(2, 3)
    assert routed([], [0], [], spans, scales, 2) == [(0, 0, 0.0)] * 2
    assert routed([], [0, 0], [1], spans, scales, 0) == []
