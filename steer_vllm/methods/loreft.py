"""LoReFT: low-rank linear subspace edits (Wu et al. 2024, "ReFT", arXiv 2404.03592, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..edit import Edit, Edits, LowRank, Place, Site
from ..errors import ArtifactInvalid
from ..fingerprint import Fingerprint
from ..positions import Positions
from .method import Method, Project, check_layers

_ORTHONORMAL = 1e-3
"""Largest |R R^T - I| accepted; training in float32 leaves about 1e-6."""


@dataclass(frozen=True)
class LoReFT(Method):
    """h <- h + R^T (W h + b - R h) at the block output, R with orthonormal rows.

    tied: one intervention for prefix and suffix; untied: part 0 for the prefix, part 1 for the suffix.
    Tensors, with P parts, L layers: `rotate` R: [P, L, rank, hidden]; `weight` W: the same; `bias` b: [P, L, rank].
    """

    edited_layers: tuple[int, ...]
    rank: int
    tied: bool = True

    name: ClassVar[str] = "loreft"
    positions: ClassVar[Positions] = Positions("first_last", 7, 7)

    def __post_init__(self) -> None:
        check_layers(self.edited_layers)
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number from 1 up, got {self.rank!r}")
        if type(self.tied) is not bool:
            raise ValueError(f"tied must be true or false, got {self.tied!r}")

    @property
    def parts(self) -> int:
        return 1 if self.tied else 2

    @property
    def layers(self) -> tuple[int, ...]:
        return self.edited_layers

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site.BLOCK_OUTPUT,)

    def shapes(self, base: Fingerprint) -> dict[str, tuple[int, ...]]:
        wide = (self.parts, len(self.layers), self.rank, base.hidden_size)
        return {"rotate": wide, "weight": wide, "bias": wide[:3]}

    def check(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, where: str) -> None:
        super().check(tensors, base, where)
        R = tensors["rotate"].float()
        off = (R @ R.mT - torch.eye(self.rank, device=R.device)).abs().max().item()
        if off > _ORTHONORMAL:
            raise ArtifactInvalid(f"{where}: the rows of rotate are not orthonormal (|R R^T - I| reaches {off:.2g})")

    def compile(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, project: Project) -> tuple[Edits, ...]:
        """R^T (W h + b - R h) = B^T (A h + c) with A = W - R, B = R, c = b."""
        R, W, b = tensors["rotate"], tensors["weight"], tensors["bias"]
        return tuple(
            {
                Place(layer, Site.BLOCK_OUTPUT): Edit(low_rank=LowRank(A=W[p, i] - R[p, i], B=R[p, i], c=b[p, i]))
                for i, layer in enumerate(self.layers)
            }
            for p in range(self.parts)
        )
