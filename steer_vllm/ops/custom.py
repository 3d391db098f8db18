"""The low-rank edit as a torch operator, so that a compiled graph calls it as it stands.

On a CPU it touches only the tokens that have a row; elsewhere it is static, which a CUDA graph needs. Both compute
`reference.low_rank` and are tested against it.

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
    x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """The edit of the tokens that have a row, zero elsewhere."""
    tokens = rows.nonzero()
    out = torch.zeros_like(x)
    if not tokens.numel():  # most steps: every call above counts
        return out
    tokens = tokens.flatten()
    used = rows[tokens].unique().tolist()
    if len(tokens) < _GROUP * len(used):
        out[tokens] = reference.low_rank(x[tokens], rows[tokens], scales[tokens], A, B, c)
        return out
    for row in used:
        group = (rows == row).nonzero().flatten()
        edit = reference.affine(x[group].float(), A[row].float(), B[row].float(), c[row].float())
        out[group] = (edit * scales[group, None]).to(x.dtype)
    return out


def _every_row(
    x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """Two products with the whole table, between which every token keeps the ranks of its own row.

    Static, so that a CUDA graph can capture it, and without a copy of A and B per token: [tokens, rows * rank] is the
    largest thing made. Products are in the model's dtype, what is between them in float32.
    """
    count, rank, hidden = A.shape
    inner = (x @ A.reshape(count * rank, hidden).mT).view(-1, count, rank).float() + c.float()
    mine = rows[:, None] == torch.arange(count, device=rows.device, dtype=rows.dtype)
    kept = torch.where(mine[:, :, None], inner * scales[:, None, None], 0.0)  # other rows may overflow: no product
    return kept.view(-1, count * rank).to(x.dtype) @ B.reshape(count * rank, hidden)


def _shape(
    x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x)


_LIBRARY.define(
    "low_rank(Tensor x, Tensor rows, Tensor scales, Tensor A, Tensor B, Tensor c) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("low_rank", _every_row, "CompositeExplicitAutograd")
_LIBRARY.impl("low_rank", _touched, "CPU")
torch.library.register_fake("steer_vllm::low_rank", _shape, lib=_LIBRARY)

low_rank = torch.ops.steer_vllm.low_rank.default
"""`reference.low_rank` with the same arguments; not differentiable."""
