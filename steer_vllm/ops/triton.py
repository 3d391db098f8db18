"""The operations of `reference` as Triton kernels, one launch each, and static: what a batch holds changes no shape.

Nothing here waits for the device or allocates beyond a result, so CUDA graphs capture it. Which rows a batch uses is
looked at by the programs themselves. Sizes that change between steps are kept out of what Triton compiles for, so
nothing is compiled after the first step. It knows no layer, no request and no table but those it is given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROUTED = 128
"""Tokens per program of `route`."""

_TILE = 16
"""Tokens per program of `low_rank`: the least that tensor cores take, so that a batch of distinct rows wastes least."""

_BYTES = 8192
"""Of A or B per step of a program's loops."""

_PROGRAMS, _SHARING = 1024, 64
"""Programs of `low_rank`, and those that work when every tile is of one row: from some until a GPU is busy."""


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
    """`reference.route`, with the same arguments. All contiguous."""
    tokens, batch = len(additive), len(requests)
    if tokens:
        _route[(triton.cdiv(tokens, _ROUTED),)](
            positions,
            starts,
            requests,
            spans,
            scales,
            additive,
            low_rank,
            token_scales,
            tokens,
            batch,
            batch.bit_length(),
            SEGMENTS=spans.shape[1],
            TILE=_ROUTED,
        )


@triton.jit(do_not_specialize=["tokens", "batch", "halvings"])  # type: ignore[untyped-decorator]
def _route(  # type: ignore[no-untyped-def]
    positions,
    starts,
    requests,
    spans,
    scales,
    additive,
    low_rank,
    token_scales,
    tokens,
    batch,
    halvings,
    SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = token < tl.minimum(tokens, tl.load(starts + batch))
    low, high = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32) + batch
    for _ in range(halvings):  # the first row that ends behind the token: rows without tokens are passed over
        middle = (low + high) // 2
        open_ = here & (low < high)
        behind = tl.load(starts + middle + 1, mask=open_, other=0) > token
        high = tl.where(open_ & behind, middle, high)
        low = tl.where(open_ & ~behind, middle + 1, low)
    position = tl.load(positions + token, mask=here, other=0)
    request = tl.load(requests + low, mask=here, other=0).to(tl.int64)
    steered = request > 0
    additive_row, low_rank_row = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    by = tl.zeros([TILE], tl.float32)
    for segment in range(SEGMENTS):
        at = request * SEGMENTS + segment
        start = tl.load(spans + at * 4, mask=steered, other=0)
        stop = tl.load(spans + at * 4 + 1, mask=steered, other=0)
        inside = (start <= position) & (position < stop)  # an absent one is [0, 0)
        additive_row += tl.load(spans + at * 4 + 2, mask=inside, other=0)
        low_rank_row += tl.load(spans + at * 4 + 3, mask=inside, other=0)
        by += tl.load(scales + at, mask=inside, other=0.0)
    asked = token < tokens
    tl.store(additive + token, additive_row, mask=asked)
    tl.store(low_rank + token, low_rank_row, mask=asked)
    tl.store(token_scales + token, by, mask=asked)


def low_rank(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    scales: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    c: torch.Tensor,
) -> torch.Tensor:
    """`reference.low_rank`, with the same arguments; not differentiable, and not in float64.

    A, B and c may be strided views in which hidden vectors are contiguous; rows and scales are contiguous. Sums are
    taken in float32. Tokens of row 0 get exact zeros.

    Sixteen consecutive tokens make a tile, and a tile makes one pass for each distinct row among them. A pass reads the
    row's A and B and those tokens only: tokens with the same row that follow each other, as those of a prompt do, share
    a pass, and a decode step of distinct requests reads each row once. The programs of a tile share its passes out;
    where they outnumber the passes, several make the same pass, and each writes its part of hidden.
    """
    kind = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    tokens, hidden = x.shape
    out = x.new_empty(tokens, hidden, dtype=kind)
    if not tokens:
        return out
    rank, tiles = A.shape[1], triton.cdiv(tokens, _TILE)
    ranks = max(16, triton.next_power_of_2(rank))
    lanes = min(max(_PROGRAMS // tiles, 2), _TILE)  # at most one for each pass that a tile can need
    share = min(max(_SHARING // tiles, 1), 8)  # each program of a shared pass reads all of A again
    read = x if residual is None else residual
    _low_rank[(tiles, lanes)](
        x,
        read,
        rows,
        scales,
        A,
        B,
        c,
        out,
        tokens,
        share,
        *x.stride(),
        *read.stride(),
        *A.stride()[:2],
        *B.stride()[:2],
        *c.stride(),
        HAS_RESIDUAL=residual is not None,
        HIDDEN=hidden,
        RANK=rank,
        RANKS=ranks,
        TILE=_TILE,
        BLOCK=max(16, min(_BYTES // (ranks * kind.itemsize), triton.next_power_of_2(hidden))),
        num_warps=4,
        num_stages=4,
    )
    return out


@triton.jit(do_not_specialize=["tokens", "share"])  # type: ignore[untyped-decorator]
def _low_rank(  # type: ignore[no-untyped-def]
    x,
    residual,
    rows,
    scales,
    A,
    B,
    c,
    out,
    tokens,
    share,
    x_token,
    x_entry,
    residual_token,
    residual_entry,
    A_row,
    A_rank,
    B_row,
    B_rank,
    c_row,
    c_rank,
    HAS_RESIDUAL: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (tiles, lanes). Offsets are 64 bits wide: tables may hold more than 2^31 entries."""
    kind = out.dtype.element_ty
    lane, lanes = tl.program_id(1), tl.num_programs(1)
    place = tl.arange(0, TILE)
    token = tl.program_id(0).to(tl.int64) * TILE + place
    here = token < tokens
    row = tl.load(rows + token, mask=here, other=0)
    entry = tl.arange(0, BLOCK)
    outs = out + token[:, None] * HIDDEN
    for start in range(lane * BLOCK, HIDDEN, lanes * BLOCK):
        at = (start + entry)[None, :]
        tl.store(outs + at, tl.zeros([TILE, BLOCK], kind), mask=(here & (row == 0))[:, None] & (at < HIDDEN))
    if tl.max(row, 0) > 0:
        scale = tl.load(scales + token, mask=here, other=0.0)
        before = (row[:, None] == row[None, :]) & (place[None, :] < place[:, None])
        first = (row > 0) & (tl.sum(before.to(tl.int32), 1) == 0)
        number = tl.cumsum(first.to(tl.int32), 0)  # of the distinct row that a token is the first of, from 1
        distinct = tl.sum(first.to(tl.int32), 0)
        groups = tl.minimum(distinct, lanes)
        parts = tl.minimum(share, lanes // groups)
        part = lane // groups
        ranks = tl.arange(0, RANKS)
        if part < parts:
            for nth in range(lane % groups, distinct, lanes):
                mine_row = tl.sum(tl.where(first & (number == nth + 1), row, 0), 0).to(tl.int64)
                mine = (row == mine_row)[:, None]
                inner = tl.zeros([TILE, RANKS], tl.float32)
                As = A + mine_row * A_row + ranks[None, :] * A_rank
                for start in range(0, HIDDEN, BLOCK):
                    at = start + entry
                    read = mine & (at < HIDDEN)[None, :]
                    xs = tl.load(x + token[:, None] * x_token + at[None, :] * x_entry, mask=read, other=0.0).to(kind)
                    if HAS_RESIDUAL:
                        more = residual + token[:, None] * residual_token + at[None, :] * residual_entry
                        xs = (xs.to(tl.float32) + tl.load(more, mask=read, other=0.0).to(tl.float32)).to(kind)
                    both = (at < HIDDEN)[:, None] & (ranks < RANK)[None, :]
                    inner = tl.dot(
                        xs,
                        tl.load(As + at[:, None], mask=both, other=0.0).to(kind),
                        acc=inner,
                        input_precision="ieee",
                    )
                constant = tl.load(c + mine_row * c_row + ranks * c_rank, mask=ranks < RANK, other=0.0)
                inner = (inner + constant.to(tl.float32)[None, :]) * scale[:, None]
                Bs = B + mine_row * B_row + ranks[:, None] * B_rank
                for start in range(part * BLOCK, HIDDEN, parts * BLOCK):
                    at = (start + entry)[None, :]
                    tile = tl.load(Bs + at, mask=(ranks < RANK)[:, None] & (at < HIDDEN), other=0.0)
                    if kind == tl.bfloat16:  # two products keep 16 bits of inner, at the speed of tensor cores
                        coarse = inner.to(kind)
                        fine = (inner - coarse.to(tl.float32)).to(kind)
                        delta = tl.dot(fine, tile.to(kind))
                        delta = tl.dot(coarse, tile.to(kind), acc=delta)
                    else:  # float16 could not hold inner
                        delta = tl.dot(inner, tile.to(tl.float32), input_precision="ieee")
                    tl.store(outs + at, delta.to(kind), mask=mine & (at < HIDDEN))
