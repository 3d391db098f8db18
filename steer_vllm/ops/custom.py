"""The low-rank edit as a torch operator, so that a compiled graph calls it as it stands.

On a CPU it touches only the tokens that have a row; elsewhere it is the static reference, which a CUDA graph can
capture. The formula is the reference's; this module only chooses which tokens it sees.
"""

from __future__ import annotations

import torch

from . import reference

_GROUP = 4
"""Tokens per distinct row from which one matrix product per row beats a gathered product per token."""


@torch.library.custom_op("steer_vllm::low_rank", mutates_args=())
def low_rank(
    x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """`reference.low_rank` with the same arguments."""
    return reference.low_rank(x, rows, scales, A, B, c)


@low_rank.register_kernel("cpu")
def _(
    x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    tokens = rows.nonzero().flatten()
    if not len(tokens):
        return out
    used = rows[tokens].unique().tolist()
    if len(tokens) < _GROUP * len(used):
        out[tokens] = reference.low_rank(x[tokens], rows[tokens], scales[tokens], A, B, c)
        return out
    for row in used:
        group = (rows == row).nonzero().flatten()
        edit = reference.affine(x[group].float(), A[row].float(), B[row].float(), c[row].float())
        out[group] = (edit * scales[group, None]).to(x.dtype)
    return out


@low_rank.register_fake
def _(
    x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x)
