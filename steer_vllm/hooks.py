"""The decoder layers of a transformers model, hooked so that a table of edits acts on its tokens.

Training sets rows that carry gradients, `hf.steered` those of finished artifacts. transformers itself is not imported:
a model is a torch module with the usual structure. Which edits, and which tokens, is said from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .edit import Edits, LowRank, Place, Site
from .errors import Unsupported
from .layer import LayerModules, modules
from .ops import reference
from .plan import Placement
from .slots import TokenSlots

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj")
_ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
_MLPS = ("mlp", "block_sparse_moe", "shared_mlp", "feed_forward", "moe", "fc2")
"""OPT has no module around its MLP: `fc2` gives its output."""


def find_layers(model: nn.Module) -> list[LayerModules]:
    """The decoder layers, found by structure; a layer may lack a site.

    Errors: `Unsupported` when there are none.
    """
    text = getattr(model, "get_decoder", None)  # the language model of a multi-modal one
    lists = [module for module in (model if text is None else text()).modules() if isinstance(module, nn.ModuleList)]
    decoder = max(lists, key=lambda layers: sum(bool(_children(layer, _ATTENTIONS)) for layer in layers), default=())
    if not any(_children(layer, _ATTENTIONS) for layer in decoder):
        raise Unsupported(f"no decoder layers were found in {type(model).__name__}")
    return [modules(layer, _projection(layer), _mlp(layer)) for layer in decoder]


def _projection(layer: nn.Module) -> nn.Module | str:
    attentions = _children(layer, _ATTENTIONS)
    if not attentions:
        return "it has no attention with heads"
    projections = [found for attention in attentions.values() for found in _children(attention, _PROJECTIONS).values()]
    return projections[0] if len(projections) == 1 else f"{len(projections)} output projections under a known name"


def _mlp(layer: nn.Module) -> nn.Module | str:
    mlps = _children(layer, _MLPS)
    if len(mlps) == 1:
        return next(iter(mlps.values()))
    return f"more than one module adds to it: {', '.join(mlps)}" if mlps else "it has no MLP under a known name"


def _children(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if name in names}


class Steering:
    """The hooks of one model, the rows they add and the route of the coming tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = find_layers(model)
        attention = next((i for i, layer in enumerate(self.layers) if layer.projection is not None), 0)
        self.weight = self._projection(attention)
        """An output projection's weight, [hidden, ...]: tells the model's dtype and device."""
        self._additive: dict[Place, torch.Tensor] = {}
        self._low_rank: dict[Place, LowRank] = {}
        self._tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def module(self, place: Place) -> nn.Module:
        """The module of a place. Errors: `Unsupported` when the layer has none."""
        layer = self.layers[place.layer]
        if place.site in layer.missing:
            raise Unsupported(
                f"layer {place.layer} ({type(layer.block).__name__}) has no {place.site.value}: "
                f"{layer.missing[place.site]}"
            )
        return layer.sites[place.site]

    def project(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """W_o z without bias, in float32 at least: [num_heads * head_dim] -> [hidden].

        Errors: `Unsupported` when the layer has heads of another number or size.
        """
        weight = self._projection(layer)
        if heads.numel() != weight.shape[1]:
            raise Unsupported(
                f"layer {layer}: {heads.numel()} head values, its output projection takes {weight.shape[1]}"
            )
        exact = torch.promote_types(weight.dtype, torch.float32)
        return functional.linear(heads.to(weight.device, exact), weight.to(exact))

    def _projection(self, layer: int) -> torch.Tensor:
        """W_o of a layer: [hidden, num_heads * head_dim]. Errors: `Unsupported` when it is quantised or packed."""
        module = self.module(Place(layer, Site.ATTENTION_OUTPUT))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dtype not in _PLAIN or weight.dim() != 2:
            raise Unsupported(f"layer {layer}: the weight of {type(module).__name__} is no plain matrix")
        return weight.T if type(module).__name__ == "Conv1D" else weight  # transformers' Conv1D keeps [in, out]

    def set_rows(self, rows: Sequence[Edits]) -> None:
        """Let row i + 1 of the tables be `rows[i]`, row 0 the identity. Gradients flow into the edits."""
        places = sorted({place for edits in rows for place in edits})
        for place in places:
            self.module(place)
        self._additive = {
            place: _stack([edits[place].offset if place in edits else None for edits in rows], self.weight)
            for place in places
            if any(place in edits and edits[place].offset is not None for edits in rows)
        }
        self._low_rank = {
            place: _stack_low_rank([edits[place].low_rank if place in edits else None for edits in rows], self.weight)
            for place in places
            if any(place in edits and edits[place].low_rank is not None for edits in rows)
        }

    def route(self, attention_mask: torch.Tensor, width: int, placements: Sequence[Sequence[Placement]]) -> None:
        """Say what each token of the next forward gets.

        attention_mask: [batch, past + width], 0 at padding on either side; width: tokens of this forward; placements:
        one list per sequence, over its positions without padding.
        """
        spans = torch.zeros(len(placements) + 1, max(1, *map(len, placements)), 4, dtype=torch.int32)
        scales = torch.zeros(spans.shape[:2])
        for sequence, placed in enumerate(placements, start=1):
            for i, place in enumerate(placed):
                spans[sequence, i] = torch.tensor(place[:4], dtype=torch.int32)
                scales[sequence, i] = place.scale
        mask = attention_mask.long()
        positions = torch.where(mask == 1, mask.cumsum(1) - 1, -1)[:, -width:].flatten()  # no segment holds -1
        sequences = torch.arange(len(placements) + 1, device=mask.device)
        slots = TokenSlots(len(positions), mask.device)
        self._tokens = slots.additive, slots.low_rank, slots.scales
        tables = spans.to(mask.device), scales.to(mask.device)
        reference.route(positions, width * sequences, sequences[1:], *tables, *self._tokens)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Edits are applied inside, the model is untouched after."""
        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                for site, module in layer.sites.items():
                    handle = module.register_forward_hook(self._hook(Place(index, site)))
                    hooks.callback(handle.remove)
            try:
                yield
            finally:
                self._tokens = None

    def _hook(self, place: Place) -> Any:
        def edit(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited = self._edit(place, hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    def _edit(self, place: Place, hidden: torch.Tensor) -> torch.Tensor:
        if self._tokens is None or (place not in self._additive and place not in self._low_rank):
            return hidden
        additive, low_rank, scales = self._tokens
        x = y = hidden.reshape(-1, hidden.shape[-1])
        if place in self._additive:
            y = reference.additive(y, additive, scales, self._additive[place])
        if place in self._low_rank:
            table = self._low_rank[place]
            y = y + reference.low_rank(x, None, low_rank, scales, table.A, table.B, table.c)
        return y.view_as(hidden)


def _stack(offsets: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """[1 + rows, hidden] in the model's dtype, row 0 and absent ones zero."""
    blank = torch.zeros_like(next(offset for offset in offsets if offset is not None))
    return torch.stack([blank, *(blank if offset is None else offset for offset in offsets)]).to(like)


def _stack_low_rank(parts: Sequence[LowRank | None], like: torch.Tensor) -> LowRank:
    """Tables [1 + rows, largest rank, ...]; row 0, absent ones and missing ranks are zero."""
    rank = max(part.rank for part in parts if part is not None)
    hidden = next(part.A.shape[1] for part in parts if part is not None)
    none = LowRank(like.new_zeros(0, hidden), like.new_zeros(0, hidden), like.new_zeros(0))
    padded = [part or none for part in (None, *parts)]
    return LowRank(
        A=torch.stack([functional.pad(part.A, (0, 0, 0, rank - part.rank)) for part in padded]).to(like),
        B=torch.stack([functional.pad(part.B, (0, 0, 0, rank - part.rank)) for part in padded]).to(like),
        c=torch.stack([functional.pad(part.c, (0, rank - part.rank)) for part in padded]).to(like),
    )
