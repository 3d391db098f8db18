"""A direction as the mean difference of two kinds of text (CAA, Rimsky et al. 2023, section 3). Nothing is optimised.

Knows activations and their means; neither where texts come from nor where results go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UserError
from ..hooks import find_layers
from ..intervention import Card, Intervention
from ..methods import Direction
from ..positions import Positions
from .base import Base, edited_layers
from .data import Pair
from .settings import DirectionSettings


def mean_difference(base: Base, pairs: Sequence[Pair], settings: DirectionSettings) -> tuple[Direction, torch.Tensor]:
    """The method and its directions [layers, hidden]: mean over pairs of x(positive) - x(negative), x the block's
    output at the last token.

    Errors: `UserError` for layers that are not there or texts that do not fit.
    """
    positive = last_activations(base, [pair.positive for pair in pairs], settings)
    negative = last_activations(base, [pair.negative for pair in pairs], settings)
    if settings.layers == "best":
        layers: tuple[int, ...] = (int(separation(positive, negative).argmax()),)
    else:
        layers = edited_layers(settings.layers, base.fingerprint)
    directions = (positive - negative).mean(0)[list(layers)]
    return Direction(layers, settings.coefficient), directions


def make_direction(base: Base, pairs: Sequence[Pair], settings: DirectionSettings, card: Card) -> Intervention:
    """The artifact's content. Errors: those of `mean_difference`."""
    method, directions = mean_difference(base, pairs, settings)
    return Intervention(
        method, {"directions": directions}, base.fingerprint, Positions.parse(settings.positions), card=card
    )


def separation(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """How well each layer tells the two apart: the distance of the means over the spread along it (Cohen's d).

    positive, negative: [pairs, layers, hidden]; returns [layers].
    """
    difference = (positive - negative).mean(0)
    unit = difference / difference.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(difference.dtype).tiny)
    along = torch.stack([(positive * unit).sum(-1), (negative * unit).sum(-1)])  # [2, pairs, layers]
    spread = along.var(dim=1, correction=0).mean(0).sqrt()
    return difference.norm(dim=-1) / spread.clamp(min=1e-6)


@torch.no_grad()
def last_activations(base: Base, texts: Sequence[str], settings: DirectionSettings) -> torch.Tensor:
    """Block outputs at each text's last token: float32 [texts, layers, hidden]. Errors: `UserError` for long texts."""
    encoder = base.encoder(settings)
    tokens = [encoder.prompt(text) for text in texts]
    long = [len(ids) for ids in tokens if len(ids) > encoder.longest]
    if long:
        raise UserError(f"{len(long)} texts are longer than {encoder.longest} tokens (max_length), up to {max(long)}")
    layers = find_layers(base.model)
    seen: list[torch.Tensor] = []

    def keep(module: object, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[0, -1].float().cpu())

    handles = [layer.block.register_forward_hook(keep) for layer in layers]
    rows = []
    try:
        for ids in tokens:
            seen.clear()
            base.model(input_ids=torch.tensor([ids], device=base.model.device), use_cache=False)
            rows.append(torch.stack(seen))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(rows)
