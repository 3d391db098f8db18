"""The one edit that every method compiles to, and where in a layer it is applied.

    y' = y + scale * ( B^T (A x + c) + u )

x is the hidden vector at the site and y the tensor that carries it on. It does
not know methods, positions or rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch


class Site(str, Enum):
    """A place in a decoder layer, all of shape [tokens, hidden_size]."""

    ATTENTION_OUTPUT = "attention_output"
    """What the attention's output projection returns."""
    MLP_OUTPUT = "mlp_output"
    """What the MLP returns, before it joins the residual stream."""
    BLOCK_OUTPUT = "block_output"
    """The residual stream after the layer."""


class Place(NamedTuple):
    """One site of one layer (0-based)."""

    layer: int
    site: Site


@dataclass(frozen=True, eq=False)
class LowRank:
    """The low-rank part B^T (A x + c). A, B: [rank, hidden]; c: [rank]."""

    A: torch.Tensor
    B: torch.Tensor
    c: torch.Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, eq=False)
class Edit:
    """One affine low-rank edit of one place; an absent part is zero. offset (u): [hidden]."""

    offset: torch.Tensor | None = None
    low_rank: LowRank | None = None


Edits = Mapping[Place, Edit]
"""What one part of an intervention does to a model."""
