"""LoFiT: learned offsets of a few attention heads (Yin, Ye, Durrett, NeurIPS 2024, arXiv 2406.01563)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..edit import Edit, Edits, Place, Site
from ..errors import ArtifactInvalid
from ..fingerprint import Fingerprint
from ..positions import Positions
from .method import Method, Project


@dataclass(frozen=True)
class LoFiT(Method):
    """z(l, h) <- z(l, h) + v(l, h) for each selected head (section 3.2), z the head's output before `o_proj`.

    heads: (layer, head) pairs, ascending. Tensor `offsets`: [len(heads), head_dim], row i for heads[i].
    The scaling A of step one selects heads and is never served: (1 + A) z is not a low-rank affine edit.
    """

    heads: tuple[tuple[int, int], ...]

    name: ClassVar[str] = "lofit"
    positions: ClassVar[Positions] = Positions("all")

    def __post_init__(self) -> None:
        pairs = self.heads
        if not pairs or any(len(pair) != 2 or any(type(n) is not int or n < 0 for n in pair) for pair in pairs):
            raise ValueError(f"heads must be [layer, head] pairs, got {pairs!r}")
        if list(pairs) != sorted(set(pairs)):
            raise ValueError("heads must be ascending and distinct")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.heads}))

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site.ATTENTION_OUTPUT,)

    def shapes(self, base: Fingerprint) -> dict[str, tuple[int, ...]]:
        return {"offsets": (len(self.heads), base.head_dim)}

    def check(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, where: str) -> None:
        outside = [list(pair) for pair in self.heads if pair[1] >= base.num_heads]
        if outside:
            raise ArtifactInvalid(f"{where}: heads {outside} are not in 0..{base.num_heads - 1}")
        super().check(tensors, base, where)

    def compile(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, project: Project) -> tuple[Edits, ...]:
        """u = W_o v: o_proj is linear, so o_proj(z + v) = o_proj(z) + W_o v; the heads of a layer are one vector."""
        offsets = tensors["offsets"]
        edits: dict[Place, Edit] = {}
        for layer in self.layers:
            rows = [row for row, (at, _) in enumerate(self.heads) if at == layer]
            heads = torch.tensor([self.heads[row][1] for row in rows], device=offsets.device)
            z = offsets.new_zeros(base.num_heads, base.head_dim).index_copy(0, heads, offsets[rows])
            edits[Place(layer, Site.ATTENTION_OUTPUT)] = Edit(offset=project(layer, z.flatten()))
        return (edits,)
