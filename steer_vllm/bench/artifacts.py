"""Random interventions of the kinds that the modes ask for.

Their size is chosen so that they change what the model says; they mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..fingerprint import Fingerprint
from ..intervention import Intervention
from ..methods import Direction, LoFiT, LoReFT
from ..positions import Positions

RANK = 8
SHARE = 0.1
"""Heads that a LoFiT edits, of all heads of the model."""


def _lofit(base: Fingerprint, random: torch.Generator) -> Intervention:
    """Offsets of 10% of the heads, spread over the layers."""
    total = base.num_layers * base.num_heads
    chosen = torch.randperm(total, generator=random)[: max(1, round(SHARE * total))]
    return _offsets(sorted(divmod(int(head), base.num_heads) for head in chosen), base, random)


def _head_per_layer(base: Fingerprint, random: torch.Generator) -> Intervention:
    """Offsets of one head of every layer."""
    heads = torch.randint(base.num_heads, (base.num_layers,), generator=random)
    return _offsets([(layer, int(head)) for layer, head in enumerate(heads)], base, random)


def _offsets(heads: list[tuple[int, int]], base: Fingerprint, random: torch.Generator) -> Intervention:
    offsets = 0.1 * torch.randn(len(heads), base.head_dim, generator=random)
    return Intervention(LoFiT(tuple(heads)), {"offsets": offsets}, base, Positions("all"))


def _direction(base: Fingerprint, random: torch.Generator) -> Intervention:
    """A direction on every layer's output, at every position."""
    directions = 0.01 * torch.randn(base.num_layers, base.hidden_size, generator=random)
    layers = tuple(range(base.num_layers))
    return Intervention(Direction(layers), {"directions": directions}, base, Positions("all"))


def _loreft(base: Fingerprint, random: torch.Generator) -> Intervention:
    """LoReFT of rank 8 on every layer's output, at the first and last seven tokens of the prompt."""
    wide = (1, base.num_layers, base.hidden_size, RANK)
    rotate = torch.linalg.qr(torch.randn(wide, generator=random))[0].mT.contiguous()
    tensors = {
        "rotate": rotate,
        "weight": rotate + 0.1 * torch.randn(rotate.shape, generator=random) / base.hidden_size**0.5,
        "bias": 0.1 * torch.randn(rotate.shape[:3], generator=random),
    }
    return Intervention(LoReFT(tuple(range(base.num_layers)), RANK), tensors, base, Positions.parse("f7+l7"))


KINDS: dict[str, Callable[[Fingerprint, torch.Generator], Intervention]] = {
    "lofit": _lofit,
    "head-per-layer": _head_per_layer,
    "direction": _direction,
    "loreft": _loreft,
}


def make(kind: str, number: int, base: Fingerprint, seed: int, folder: Path) -> Path:
    """Write the artifact `kind-number` below `folder`: another one for every number and seed."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + number * 101 + list(KINDS).index(kind))
    path = folder / f"{kind}-{number}"
    KINDS[kind](base, random).save(path)
    return path
