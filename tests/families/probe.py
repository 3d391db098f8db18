"""A method of the tests' own: any edit at any site. It shows what the engine can do beyond the methods that are served.

Registered as a user would add one, by a row of `METHODS`; importing this module is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from steer_vllm import Intervention, Positions
from steer_vllm.edit import Edit, Edits, LowRank, Place, Site
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.methods import METHODS, Method, Project


@dataclass(frozen=True)
class Probe(Method):
    """y <- y + B^T (A x + c) at one site. Tensors A, B: [layers, rank, hidden]; c: [layers, rank]."""

    edited_layers: tuple[int, ...]
    site: Site
    rank: int = 2

    name: ClassVar[str] = "probe"
    positions: ClassVar[Positions] = Positions("all")

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site(self.site))

    @property
    def layers(self) -> tuple[int, ...]:
        return self.edited_layers

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def shapes(self, base: Fingerprint) -> dict[str, tuple[int, ...]]:
        wide = (len(self.layers), self.rank, base.hidden_size)
        return {"A": wide, "B": wide, "c": wide[:2]}

    def compile(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, project: Project) -> tuple[Edits, ...]:
        triples = zip(tensors["A"], tensors["B"], tensors["c"], strict=True)
        edits = [Edit(low_rank=LowRank(*triple)) for triple in triples]
        return ({Place(layer, self.site): edit for layer, edit in zip(self.layers, edits, strict=True)},)


METHODS[Probe.name] = Probe


def probe(base: Fingerprint, layers: tuple[int, ...], site: Site, seed: int, positions: str = "all") -> Intervention:
    """Random, of a strength that matters and stays finite."""
    draw = torch.Generator().manual_seed(seed)
    method = Probe(layers, site)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in method.shapes(base).items()}
    tensors["A"] *= 0.1
    tensors["B"] *= 0.3
    return Intervention(method, tensors, base, Positions.parse(positions))
