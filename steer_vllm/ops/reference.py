"""The maths, once, in PyTorch: differentiable, exact, and free of data-dependent shapes.

Training runs it under autograd, CPU serving runs it, transformers runs it, and faster kernels are checked against it. A
token carries one row of each table and one scale; row 0 of every table is zero. Knows no model and no request.
"""

from __future__ import annotations

import torch

_GATHER = 1 << 22
"""Table entries gathered at once by `low_rank`: bounds its memory to tens of MB for any number of tokens."""


def additive(y: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """y[t] + scales[t] * table[rows[t]].

    y: [tokens, hidden]; rows: int [tokens]; scales: float32 [tokens]; table: [rows, hidden]. Accumulates in float32 or
    wider and rounds once to y's dtype.
    """
    return torch.addcmul(y, table[rows], scales[:, None]).to(y.dtype)


def affine(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """B^T (A x + c) for each row of x. x: [..., n, hidden]; A, B: [..., rank, hidden]; c: [..., rank]."""
    return (x @ A.mT + c.unsqueeze(-2)) @ B


def low_rank(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    scales: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    c: torch.Tensor,
) -> torch.Tensor:
    """scales[t] * B[rows[t]]^T (A[rows[t]] x[t] + c[rows[t]]), in x's dtype.

    x: [tokens, hidden]; residual: None, or as x and added to it, rounded to its dtype, where the two carry the vector
    between them; rows: int [tokens]; scales: float32 [tokens]; A, B: [rows, rank, hidden]; c: [rows, rank].
    """
    x = x if residual is None else x + residual
    exact = torch.promote_types(x.dtype, torch.float32)
    step = max(1, _GATHER // max(1, A[0].numel()))
    parts = [
        affine(xs[:, None, :].to(exact), A[at].to(exact), B[at].to(exact), c[at].to(exact))[:, 0] * by[:, None]
        for xs, at, by in zip(x.split(step), rows.split(step), scales.split(step), strict=True)
    ]
    return torch.cat(parts).to(x.dtype)


def route(
    positions: torch.Tensor,
    starts: torch.Tensor,
    requests: torch.Tensor,
    spans: torch.Tensor,
    scales: torch.Tensor,
    additive: torch.Tensor,
    low_rank: torch.Tensor,
    token_scales: torch.Tensor,
) -> None:
    """Write what each token gets: its additive row, its low-rank row and its scale; zeros where no segment holds it.

    positions: int [tokens or more], absolute; starts: int [batch + 1 or more], where each batch row's tokens start and
    the last one's end; requests: int [batch], the row of its request in the segment tables (row 0 has none); spans:
    int32 [requests, segments, 4] of start, stop, additive row, low-rank row; scales: float32 [requests, segments].
    Segments of a request do not overlap, so a sum over them selects one.
    additive, low_rank: int32 [n]; token_scales: float32 [n]: written whole, with zeros behind the last token.
    """
    ends = starts[1 : len(requests) + 1]
    at = positions[: len(additive)]
    count = len(at)
    tokens = torch.arange(count, dtype=ends.dtype, device=ends.device)
    mine = torch.cat([requests, requests.new_zeros(1)])[torch.searchsorted(ends.contiguous(), tokens, right=True)]
    held = spans[mine]
    inside = (held[..., 0] <= at[:, None]) & (at[:, None] < held[..., 1])
    rows = (held[..., 2:] * inside[..., None]).sum(1, dtype=spans.dtype)
    for into, values in (
        (additive, rows[:, 0]),
        (low_rank, rows[:, 1]),
        (token_scales, (scales[mine] * inside).sum(1)),
    ):
        into[:count].copy_(values)
        into[count:].zero_()
