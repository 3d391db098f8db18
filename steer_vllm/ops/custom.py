"""The operations as a step runs them: on a GPU the kernels of `triton`, on a CPU the maths of `reference`.

The low-rank edit is a torch operator, so that a compiled graph calls it as it stands. On a CPU it touches only the
tokens that have a row. Everything here is tested against `reference`.

The operator returns what is to be added, and adds nothing in place: programs of the kernel that share a token read all
of it while they write parts, and on a CPU a step without low-rank edits would save about a microsecond per layer.

Registered by dispatch key and not with `torch.library.custom_op`, whose wrapper would double what a layer pays in a
step without low-rank edits.
"""

from __future__ import annotations

import torch

from . import reference

_GROUP = 4
"""Tokens per distinct row from which one matrix product per row beats a gathered product per token."""

_LIBRARY = torch.library.Library("steer_vllm", "DEF")  # the operator lives as long as this object


def _touched(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    scales: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    c: torch.Tensor,
) -> torch.Tensor:
    """The edit of the tokens that have a row, zero elsewhere."""
    tokens = rows.nonzero()
    out = _zeros(x, residual)
    if not tokens.numel():  # most steps: every call above counts
        return out
    tokens = tokens.flatten()
    used = rows[tokens].unique().tolist()
    if len(tokens) < _GROUP * len(used):
        more = None if residual is None else residual[tokens]
        out[tokens] = reference.low_rank(x[tokens], more, rows[tokens], scales[tokens], A, B, c)
        return out
    for row in used:
        group = (rows == row).nonzero().flatten()
        whole = x[group] if residual is None else x[group] + residual[group]
        edit = reference.affine(whole.float(), A[row].float(), B[row].float(), c[row].float())
        out[group] = (edit * scales[group, None]).to(out.dtype)
    return out


def _zeros(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    if residual is None or residual.dtype == x.dtype:  # one call, in half the time
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return _shape(x, residual).zero_()


def _kernel(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    scales: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    c: torch.Tensor,
) -> torch.Tensor:
    from . import triton  # not part of every installation for CPUs

    return triton.low_rank(x, residual, rows, scales, A, B, c)


def _shape(x: torch.Tensor, residual: torch.Tensor | None, *edit: torch.Tensor) -> torch.Tensor:
    if residual is None:
        return x.new_empty(x.shape)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def route(positions: torch.Tensor, *batch: torch.Tensor) -> None:
    """`reference.route` with the same arguments. It runs before the model, outside of any compiled graph."""
    if positions.is_cuda:
        from . import triton

        triton.route(positions, *batch)
    else:
        reference.route(positions, *batch)


_LIBRARY.define(
    "low_rank(Tensor x, Tensor? residual, Tensor rows, Tensor scales, Tensor A, Tensor B, Tensor c) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("low_rank", _touched, "CPU")
_LIBRARY.impl("low_rank", _kernel, "CUDA")
torch.library.register_fake("steer_vllm::low_rank", _shape, lib=_LIBRARY)

low_rank = torch.ops.steer_vllm.low_rank.default
"""`reference.low_rank` with the same arguments; not differentiable."""
