"""Random interventions of the kinds that the modes ask for.

Their size is chosen so that they change what the model says; they mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..fingerprint import Fingerprint
from ..intervention import Intervention
from ..methods import Direction, LoFiT, LoReFT
from ..positions import Positions

RANK = 8
SHARE = 0.1
"""Heads that a LoFiT edits, of all heads of the model."""
_AT_ONCE = 8
"""Threads that make artifacts."""


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
    rotate = _orthonormal(base, random)
    tensors = {
        "rotate": rotate,
        "weight": rotate + 0.1 * torch.randn(rotate.shape, generator=random) / base.hidden_size**0.5,
        "bias": 0.1 * torch.randn(rotate.shape[:3], generator=random),
    }
    return Intervention(LoReFT(tuple(range(base.num_layers)), RANK), tensors, base, Positions.parse("f7+l7"))


def _orthonormal(base: Fingerprint, random: torch.Generator) -> torch.Tensor:
    """[1, layers, RANK, hidden], other orthonormal rows for every layer, at less cost than by a decomposition.

    They are those of a Hadamard matrix side by side, each column with a random sign; where the hidden size is no
    multiple of the rank, columns at the end are zero.
    """
    columns = base.hidden_size // RANK * RANK
    signs = torch.randint(2, (base.num_layers, 1, columns), generator=random).float().mul(2 * columns**-0.5)
    rows = (signs - columns**-0.5) * _HADAMARD.repeat(1, columns // RANK)
    return torch.nn.functional.pad(rows, (0, base.hidden_size - columns))[None]


_HADAMARD = torch.tensor([[(-1.0) ** (row & column).bit_count() for column in range(RANK)] for row in range(RANK)])
"""Sylvester's, of order `RANK`."""

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


def make_all(wanted: Iterable[tuple[str, int]], base: Fingerprint, seed: int, folder: Path) -> list[Path]:
    """`make` of each (kind, number), several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(lambda one: make(one[0], one[1], base, seed, folder), wanted))
