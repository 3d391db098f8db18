"""LoFiT (Yin, Ye, Durrett, NeurIPS 2024): step 1 selects heads, step 2 learns their offsets.

Knows the two steps and their start values; neither where data come from nor where results go.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..edit import Place, Site
from ..errors import ArtifactInvalid, UserError
from ..fingerprint import Fingerprint
from ..head_set import Head, HeadSet
from ..hooks import Steering, find_layers
from ..methods import LoFiT
from .base import Base
from .collate import Encoded
from .learned import Compiled, Learned
from .settings import LoFiTSettings
from .trainer import Log, fit

_log = logging.getLogger(__name__)

_START = 1e-3
"""Standard deviation of the start values of A and v (section 3.2)."""

_RATE = 0.05
"""Default learning rate of v, as a share of the chosen heads' output."""

_SAMPLE = 32
"""Examples over which that output is measured."""


class Scaling(Learned):
    """Step 1: z(l, h) <- (1 + A(l, h)) * z(l, h) for every head; the loss has l1 * sum |A| added.

    scaling A: [num_layers, num_heads, head_dim]; z: the heads' outputs before the output projection.
    """

    def __init__(self, base: Fingerprint, l1: float, seed: int) -> None:
        super().__init__()
        self.l1 = l1
        self.scaling = nn.Parameter(_normal((base.num_layers, base.num_heads, base.head_dim), seed))

    @contextmanager
    def applied(
        self, steering: Steering, attention_mask: torch.Tensor, prompt_lengths: Sequence[int]
    ) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer, A in enumerate(self.scaling):
                projection = steering.module(Place(layer, Site.ATTENTION_OUTPUT))
                handle = projection.register_forward_pre_hook(_scale(A.flatten()))
                hooks.callback(handle.remove)
            yield

    def penalty(self) -> torch.Tensor:
        """The sum, not the mean (section 3.2)."""
        return self.l1 * self.scaling.abs().sum()

    def head_set(self, base: Fingerprint, task: str) -> HeadSet:
        """The score of a head is the norm of its A."""
        norms = self.scaling.detach().float().norm(dim=-1).cpu()
        return HeadSet(base, task, "lofit", tuple(tuple(row) for row in norms.tolist()))


class Offsets(Compiled):
    """Step 2: z(l, h) <- z(l, h) + v(l, h) for the chosen heads. offsets v: [heads, head_dim]."""

    def __init__(self, heads: tuple[Head, ...], base: Fingerprint, seed: int) -> None:
        super().__init__(LoFiT(heads), base, LoFiT.positions)
        self.offsets = nn.Parameter(_normal((len(heads), base.head_dim), seed))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"offsets": self.offsets}


def select_heads(base: Base, data: Sequence[Encoded], settings: LoFiTSettings, task: str) -> tuple[HeadSet, Log]:
    """Step 1: the score of every head for a task."""
    _log.info("LoFiT, step 1: scores of all heads")
    scaling = Scaling(base.fingerprint, settings.l1, settings.seed)
    log = fit(scaling, base, data, settings, settings.scaling_lr)
    return scaling.head_set(base.fingerprint, task), log


def tune_offsets(
    base: Base, data: Sequence[Encoded], settings: LoFiTSettings, heads: tuple[Head, ...]
) -> tuple[Offsets, Log]:
    """Step 2: fresh offsets of the chosen heads, plain cross-entropy. See `offset_rate` for the learning rate."""
    _log.info("LoFiT, step 2: offsets of %d heads", len(heads))
    offsets = Offsets(heads, base.fingerprint, settings.seed)
    return offsets, fit(offsets, base, data, settings, offset_rate(base, data, settings, heads))


def offset_rate(base: Base, data: Sequence[Encoded], settings: LoFiTSettings, heads: tuple[Head, ...]) -> float:
    """The learning rate of step 2: as set, or a share of the root mean square of what the chosen heads put out."""
    return settings.offset_lr or _RATE * head_output(base, data[:_SAMPLE], heads)


@torch.no_grad()
def head_output(base: Base, data: Sequence[Encoded], heads: tuple[Head, ...]) -> float:
    """The root mean square of the heads' outputs before the output projection; layers and examples count alike."""
    squares: list[torch.Tensor] = []

    def keep(layer: int) -> Any:
        chosen = [head for at, head in heads if at == layer]
        shape = (base.fingerprint.num_heads, base.fingerprint.head_dim)
        return lambda module, args: squares.append(args[0].unflatten(-1, shape)[..., chosen, :].float().pow(2).mean())

    with ExitStack() as hooks:
        for index, layer in enumerate(find_layers(base.model)):
            if layer.projection is not None and any(at == index for at, _ in heads):
                hooks.callback(layer.projection.register_forward_pre_hook(keep(index)).remove)
        for item in data:
            base.model(input_ids=torch.tensor([item.ids], device=base.model.device), use_cache=False)
    return torch.stack(squares).mean().sqrt().item()


def find_heads(source: str, base: Fingerprint, seed: int) -> HeadSet:
    """A head set from elsewhere: a path, or `random`. Errors: `ArtifactInvalid` if it belongs to another model."""
    if source == "random":
        return HeadSet.random(base, seed)
    found = HeadSet.load(source)
    difference = base.difference(found.base)
    if difference:
        raise ArtifactInvalid(f"{source}: the head set of another base model: {difference}")
    return found


def head_count(base: Fingerprint, settings: LoFiTSettings) -> int:
    """How many heads are tuned. Errors: `UserError` for more than the model has."""
    total = base.num_layers * base.num_heads
    count = settings.count(total)
    if count > total:
        raise UserError(f"--num-heads: {count}, the model has {total}")
    return count


def _scale(A: torch.Tensor) -> Any:
    def edit(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0]
        return (torch.addcmul(z, z, A).to(z.dtype), *args[1:])  # 1 + A itself would round to 1 in bfloat16

    return edit


def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, _START, generator=torch.Generator().manual_seed(seed))
