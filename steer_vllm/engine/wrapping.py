"""The modules of bound sites, wrapped so that they apply the edit.

Wrapping replaces `forward` on the module, after the weights are loaded and before the first forward, so that
torch.compile traces the edit and CUDA graphs capture it. It does not know where rows and tables come from, nor how the
modules were found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..edit import Place, Site
from ..errors import StartupRefused
from ..ops import custom, reference
from ..slots import SlotTables, TokenSlots
from .binding import Binding
from .residual import Stream, stream_of


def wrap(binding: Binding, tables: SlotTables, slots: TokenSlots) -> None:
    """Make every place that has a table apply it."""
    for place in binding.places:
        if place in tables.layout.additive or place in tables.layout.low_rank:
            module = binding.layers[place.layer].sites[place.site]
            _bind(module, place, tables, slots)
            if place.site is Site.BLOCK_OUTPUT:
                module.steer_stream = stream_of(module)  # type: ignore[assignment]
                _replace_forward(module, _edit_block)
            else:
                module.steer_reads_bias = not binding.shares.get(place)  # type: ignore[assignment]
                _replace_forward(module, _edit_output)


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


def _replace_forward(module: nn.Module, edit: Callable[[nn.Module, Any], Any]) -> None:
    """Ledger: replaces `forward` of one module instance.

    Why: hooks are skipped when a module's forward is called directly, and torch.compile guards on them unreliably.
    Since 0.26. Can go when vLLM offers an edit point per layer.
    """
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return edit(module, inner(*args, **kwargs))

    module.forward = forward


def _apply(module: Any, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """y plus the edit of x, or of x + residual.

    All [tokens, hidden], or [1, tokens, hidden] in the transformers backend.

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
        flat, more = (part if part is None else part.reshape(tokens, part.shape[-1]) for part in (x, residual))
        rows = module.steer_low_rank_rows[:tokens]
        delta = custom.low_rank(flat, more, rows, scales, module.steer_A, module.steer_B, module.steer_c)
        edited = edited + delta.view_as(y)
    return edited


def _edit_output(module: Any, output: Any) -> Any:
    """A linear layer's or MLP's output: the tensor, or a tuple that starts with it.

    A bias that is handed on to be added later (Falcon) belongs to what a low-rank edit reads.
    """
    if not isinstance(output, tuple):
        return _apply(module, output, output)
    y, *rest = output
    bias = rest[0] if rest and module.steer_reads_bias and module.steer_A is not None else None
    waits = isinstance(bias, torch.Tensor) and bias.dim() == 1
    return _apply(module, y + bias if waits else y, y), *rest


def _edit_block(module: Any, output: Any) -> Any:
    """A decoder layer's output: hidden, or a pair (`residual`) whose sum or first part is the residual stream.

    Where it is the sum, the edit joins the residual, which the next fused norm adds to hidden.
    """
    if isinstance(output, torch.Tensor):
        return _apply(module, output, output)
    pair = output if isinstance(output, tuple) and len(output) == 2 else (None, None)
    hidden, residual = pair
    if isinstance(hidden, torch.Tensor) and residual is None:
        return _apply(module, hidden, hidden), None
    if isinstance(hidden, torch.Tensor) and isinstance(residual, torch.Tensor):
        if module.steer_stream is Stream.HIDDEN:
            return _apply(module, hidden, hidden), residual
        if module.steer_stream is Stream.SUM:
            return hidden, _apply(module, hidden, residual, residual)
    raise StartupRefused(
        f"{type(module).__name__}: block_output could not be bound: it returns {_described(output)}, expected hidden, "
        "or (hidden, residual) from a layer that takes its residual as a parameter of that name"
    )


def _described(output: Any) -> str:
    parts = output if isinstance(output, tuple) else (output,)
    return (
        f"({', '.join(type(part).__name__ for part in parts)})" if isinstance(output, tuple) else type(output).__name__
    )
