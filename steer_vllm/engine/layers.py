"""The decoder layers of a vLLM model: found by structure, wrapped so that they apply the edit.

Wrapping replaces `forward` on the module, after the weights are loaded and before the first forward, so that
torch.compile traces the edit and CUDA graphs capture it. There is no list of architectures: what cannot be bound
refuses to start. It does not know where rows and tables come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..edit import Place, Site
from ..errors import StartupRefused
from ..ops import custom, reference
from ..slots import SlotTables, TokenSlots


@dataclass(frozen=True)
class LayerModules:
    """The modules of one decoder layer that carry the three sites; no MLP where none was found."""

    projection: nn.Module
    mlp: nn.Module | None
    block: nn.Module


def find_layers(model: nn.Module) -> dict[int, LayerModules]:
    """The decoder layers of this rank by their number in the whole model (others are placeholders under pipelining).

    In a multi-modal model, those of its language model. Errors: `StartupRefused` naming the layer that could not be
    bound.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    language_model = getattr(model, "get_language_model", None)
    decoder_model = model if language_model is None else language_model()
    lists = [module for module in decoder_model.modules() if isinstance(module, nn.ModuleList)]
    decoder = max(lists, key=lambda layers: sum(map(_has_attention, layers)), default=nn.ModuleList())
    layers = {i: layer for i, layer in enumerate(decoder) if not isinstance(layer, PPMissingLayer)}
    if not any(map(_has_attention, layers.values())):
        raise StartupRefused(f"no decoder layers with attention were found in {type(model).__name__}")
    return {index: _modules(index, layer) for index, layer in layers.items()}


def _modules(index: int, layer: nn.Module) -> LayerModules:
    where = f"layer {index} ({type(layer).__name__})"
    attentions = [child for child in layer.children() if _has_attention(child)]
    if len(attentions) != 1:
        raise StartupRefused(f"{where}: expected one attention module, found {len(attentions)}")
    projections = [module for module in attentions[0].modules() if _is_row_parallel(module)]
    outer = [p for p in projections if not any(p is not q and p in list(q.modules()) for q in projections)]
    if len(outer) != 1:
        raise StartupRefused(f"{where}: expected one attention output projection, found {len(outer)}")
    mlps = [
        child
        for child in layer.children()
        if child is not attentions[0] and any(_is_row_parallel(m) or _is_experts(m) for m in child.modules())
    ]
    return LayerModules(outer[0], mlps[0] if len(mlps) == 1 else None, layer)


def _has_attention(module: nn.Module) -> bool:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return any(isinstance(child, AttentionLayerBase) for child in module.modules())


def _is_row_parallel(module: nn.Module) -> bool:
    """RowParallelLinear or a LoRA wrapper of one."""
    return hasattr(getattr(module, "base_layer", module), "input_size_per_partition") and hasattr(
        getattr(module, "base_layer", module), "reduce_results"
    )


def _is_experts(module: nn.Module) -> bool:
    """The part of a mixture of experts that computes; the block around it may have no linear layer of its own."""
    return "MoERunnerInterface" in {kind.__name__ for kind in type(module).__mro__}


def _bind(module: nn.Module, place: Place, tables: SlotTables, slots: TokenSlots) -> None:
    """Hang what the edit reads on the module as buffers, which torch.compile takes as inputs of its graph."""
    additive = tables.additive_at(place) if place in tables.layout.additive else None
    low_rank = tables.low_rank_at(place) if place in tables.layout.low_rank else None
    buffers = {
        "steer_additive": additive,
        "steer_A": low_rank.A if low_rank else None,
        "steer_B": low_rank.B if low_rank else None,
        "steer_c": low_rank.c if low_rank else None,
        "steer_additive_rows": slots.additive,
        "steer_low_rank_rows": slots.low_rank,
        "steer_scales": slots.scales,
    }
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor, persistent=False)
    module.steer_hidden_size = tables.layout.hidden_size  # type: ignore[assignment]


def _apply(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y plus the edit of x. Both [tokens, hidden], or [1, tokens, hidden] in the transformers backend.

    Errors, while vLLM profiles or traces the model at start-up: `StartupRefused` for any other shape.
    """
    if y.dim() not in (2, 3) or (y.dim() == 3 and y.shape[0] != 1) or y.shape[-1] != module.steer_hidden_size:
        raise StartupRefused(f"{type(module).__name__} returns {list(y.shape)}, expected one row per token")
    tokens = y.shape[-2]
    scales = module.steer_scales[:tokens]
    edited = y
    if module.steer_additive is not None:
        edited = reference.additive(edited, module.steer_additive_rows[:tokens], scales, module.steer_additive)
    if module.steer_A is not None:
        flat, rows = x.reshape(tokens, x.shape[-1]), module.steer_low_rank_rows[:tokens]
        delta = custom.low_rank(flat, rows, scales, module.steer_A, module.steer_B, module.steer_c)
        edited = edited + delta.view_as(y)
    return edited


def wrap(layers: dict[int, LayerModules], tables: SlotTables, slots: TokenSlots) -> None:
    """Make every configured site of these layers apply its table.

    Errors: `StartupRefused` when a configured site has no module.
    """
    for index, layer in layers.items():
        sites: dict[Site, tuple[nn.Module | None, Callable[[nn.Module, Any], Any]]] = {
            Site.ATTENTION_OUTPUT: (layer.projection, _edit_output),
            Site.MLP_OUTPUT: (layer.mlp, _edit_output),
            Site.BLOCK_OUTPUT: (layer.block, _edit_block),
        }
        for site, (module, edit) in sites.items():
            place = Place(index, site)
            if place not in tables.layout.additive and place not in tables.layout.low_rank:
                continue
            if module is None:
                raise StartupRefused(f"layer {index} ({type(layer.block).__name__}): {site.value} could not be bound")
            _bind(module, place, tables, slots)
            _replace_forward(module, edit)


def _replace_forward(module: nn.Module, edit: Callable[[nn.Module, Any], Any]) -> None:
    """Ledger: replaces `forward` of one module instance.

    Why: hooks are skipped when a module's forward is called directly, and torch.compile guards on them unreliably.
    Since 0.26. Can go when vLLM offers an edit point per layer.
    """
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return edit(module, inner(*args, **kwargs))

    module.forward = forward


def _edit_output(module: nn.Module, output: Any) -> Any:
    """A linear layer's or MLP's output: the tensor, or a tuple that starts with it."""
    if isinstance(output, tuple):
        return (_apply(module, output[0], output[0]), *output[1:])
    return _apply(module, output, output)


def _edit_block(module: Any, output: Any) -> Any:
    """A decoder layer's output: hidden, or (hidden, residual) whose sum is the residual stream (fused norms).

    The edit joins the residual, which the next fused norm adds to hidden.
    """
    if isinstance(output, torch.Tensor):
        return _apply(module, output, output)
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, torch.Tensor) for part in output):
        hidden, residual = output
        x = residual if module.steer_A is None else hidden + residual
        return hidden, _apply(module, x, residual)
    raise StartupRefused(f"a decoder layer returned {type(output).__name__}, expected hidden or (hidden, residual)")
