"""Steering vectors: one direction per layer, added to the residual stream or another site.

Mean differences (CAA: Rimsky et al. 2023, arXiv 2312.06681), control vectors and any other additive vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..edit import Edit, Edits, Place, Site
from ..fingerprint import Fingerprint
from ..positions import Positions
from .method import Method, Project, check_layers


@dataclass(frozen=True)
class Direction(Method):
    """x <- x + coefficient * d(l) at the site of each edited layer (CAA, section 3).

    Tensor `directions`: [len(layers), hidden], row i for layer i of `edited_layers`.
    """

    edited_layers: tuple[int, ...]
    coefficient: float = 1.0
    site: Site = Site.BLOCK_OUTPUT

    name: ClassVar[str] = "direction"
    positions: ClassVar[Positions] = Positions("response")

    def __post_init__(self) -> None:
        check_layers(self.edited_layers)
        number = isinstance(self.coefficient, (int, float)) and not isinstance(self.coefficient, bool)
        if not number or not math.isfinite(self.coefficient):
            raise ValueError(f"coefficient must be a finite number, got {self.coefficient!r}")
        object.__setattr__(self, "site", Site(self.site))
        object.__setattr__(self, "coefficient", float(self.coefficient))

    @property
    def layers(self) -> tuple[int, ...]:
        return self.edited_layers

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def shapes(self, base: Fingerprint) -> dict[str, tuple[int, ...]]:
        return {"directions": (len(self.layers), base.hidden_size)}

    def compile(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, project: Project) -> tuple[Edits, ...]:
        """u = coefficient * d."""
        rows = tensors["directions"]
        return (
            {Place(layer, self.site): Edit(offset=self.coefficient * rows[i]) for i, layer in enumerate(self.layers)},
        )
