"""LoReFT (Wu et al. 2024): R, W and b of every edited layer, R kept orthonormal while it is learnt.

Knows parameters and start values; the equation is the core's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from ..errors import UserError
from ..fingerprint import Fingerprint
from ..methods import LoReFT
from ..positions import Positions
from .base import Base, edited_layers
from .collate import Encoded
from .learned import Compiled
from .settings import LoReFTSettings
from .trainer import Log, fit


class Subspaces(Compiled):
    """R, W: [parts, layers, rank, hidden]; b: [parts, layers, rank]. Parts: one if tied, else prefix and suffix."""

    def __init__(self, method: LoReFT, base: Fingerprint, positions: Positions, seed: int) -> None:
        super().__init__(method, base, positions)
        shape = method.shapes(base)
        bound = 1 / math.sqrt(base.hidden_size)  # nn.Linear's start values, as in pyreft
        rotate, weight, bias = (torch.empty(shape[name]) for name in ("rotate", "weight", "bias"))
        with torch.random.fork_rng(devices=[]):  # `orthogonal` draws numbers of its own
            torch.manual_seed(seed)
            for R in rotate.flatten(0, 1):
                nn.init.orthogonal_(R)
            self.rotate = nn.Parameter(rotate)
            self.weight = nn.Parameter(weight.uniform_(-bound, bound))
            self.bias = nn.Parameter(bias.uniform_(-bound, bound))
            orthogonal(self, "rotate")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"rotate": self.rotate, "weight": self.weight, "bias": self.bias}


def tune_subspaces(base: Base, data: Sequence[Encoded], settings: LoReFTSettings) -> tuple[Subspaces, Log]:
    """Train the edits. Errors: `UserError` for layers or a rank that the model does not have."""
    subspaces = make_subspaces(base.fingerprint, settings)
    return subspaces, fit(subspaces, base, data, settings, settings.lr)


def make_subspaces(base: Fingerprint, settings: LoReFTSettings) -> Subspaces:
    """Fresh parameters. Errors: see `tune_subspaces`."""
    layers = edited_layers(settings.layers, base)
    if settings.rank > base.hidden_size:
        raise UserError(f"--rank: {settings.rank}, the hidden size is {base.hidden_size}")
    positions = Positions.parse(settings.positions)
    method = LoReFT(layers, settings.rank, tied=positions.tied)
    return Subspaces(method, base, positions, settings.seed)
