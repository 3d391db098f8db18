"""The decoder layers of a vLLM model and the modules that carry their sites, found by structure.

There is no list of architectures. What is not there, or not there once, is named with its reason; whether that refuses
anything is decided elsewhere (`binding`). It does not know edits or tables.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..edit import Site
from ..errors import StartupRefused
from ..layer import LayerModules, modules


def find_layers(model: nn.Module) -> dict[int, LayerModules]:
    """The decoder layers of this rank by their number in the whole model (others are placeholders under pipelining).

    In a multi-modal model, those of its language model. Errors: `StartupRefused` when there are none.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    language_model = getattr(model, "get_language_model", None)
    decoder_model = model if language_model is None else language_model()
    lists = [module for module in decoder_model.modules() if isinstance(module, nn.ModuleList)]
    decoder = max(lists, key=lambda layers: sum(map(_mixes, layers)), default=nn.ModuleList())
    layers = {i: layer for i, layer in enumerate(decoder) if not isinstance(layer, PPMissingLayer)}
    if not any(map(_mixes, layers.values())):
        raise StartupRefused(f"no decoder layers with attention were found in {type(model).__name__}")
    return _own({index: _modules(layer) for index, layer in layers.items()})


def is_whole(model: nn.Module) -> bool:
    """Whether no part of the model is on other pipeline ranks."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return not any(isinstance(module, PPMissingLayer) for module in model.modules())


def base_layer(module: nn.Module) -> Any:
    """The linear layer itself, where LoRA has wrapped it."""
    return getattr(module, "base_layer", module)


def _modules(layer: nn.Module) -> LayerModules:
    children = dict(layer.named_children())
    attentions = {name: child for name, child in children.items() if _attends(child)}
    others = {name: child for name, child in children.items() if not _mixes(child) and _computes(child)}
    return modules(layer, _projection(children, attentions), _mlp(others))


def _projection(children: dict[str, nn.Module], attentions: dict[str, nn.Module]) -> nn.Module | str:
    """The one output projection of the one attention, or why it is not there."""
    if not attentions:
        mixers = [f"{name} ({type(child).__name__})" for name, child in children.items() if _mixes(child)]
        return f"{' and '.join(mixers) or 'the layer'} is no attention with heads"
    if len(attentions) > 1:
        return f"more than one attention module: {', '.join(attentions)}"
    ((name, attention),) = attentions.items()
    projections = [module for module in attention.modules() if _is_row_parallel(module)]
    outer = [p for p in projections if not any(p is not q and p in list(q.modules()) for q in projections)]
    return outer[0] if len(outer) == 1 else f"{name} has {len(outer)} row-parallel output projections, expected one"


def _mlp(candidates: dict[str, nn.Module]) -> nn.Module | str:
    """The one module beside the attention that ends in a projection, or why there is none."""
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    return f"more than one module adds to it: {', '.join(candidates)}" if candidates else "the layer has no MLP"


def _own(layers: dict[int, LayerModules]) -> dict[int, LayerModules]:
    """A module that several layers run (shared blocks of Zamba2) would mix up their edits: no site of any of them."""
    uses = Counter(id(module) for layer in layers.values() for module in layer.sites.values())
    shared = "its module is shared with other layers"
    return {
        index: LayerModules(
            block=layer.block,
            sites={site: module for site, module in layer.sites.items() if uses[id(module)] == 1},
            missing={**layer.missing, **{site: shared for site, m in layer.sites.items() if uses[id(m)] > 1}},
        )
        for index, layer in layers.items()
    }


def _mixes(module: nn.Module) -> bool:
    """Mixes tokens: attention, or a recurrence (Mamba, short convolutions, linear attention)."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return any(isinstance(child, AttentionLayerBase) for child in module.modules())


def _attends(module: nn.Module) -> bool:
    """Mixes tokens by heads whose outputs a projection adds up, and by nothing else."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    mixers = [child for child in module.modules() if isinstance(child, AttentionLayerBase)]
    return bool(mixers) and not any(isinstance(mixer, MambaBase) for mixer in mixers)


def _computes(module: nn.Module) -> bool:
    return any(_is_row_parallel(child) or is_experts(child) for child in module.modules())


def _is_row_parallel(module: nn.Module) -> bool:
    """RowParallelLinear or a LoRA wrapper of one."""
    base = base_layer(module)
    return hasattr(base, "input_size_per_partition") and hasattr(base, "reduce_results")


def is_experts(module: nn.Module) -> bool:
    """The part of a mixture of experts that computes; the block around it may have no linear layer of its own."""
    return "MoERunnerInterface" in {kind.__name__ for kind in type(module).__mro__}


def share_of(layer: LayerModules, site: Site) -> int | None:
    """This rank's number where each tensor-parallel rank holds a share of the site's output; None where it is whole.

    The shares of parallel blocks (Falcon, Command-R) are summed further on: one reduction serves attention and MLP. A
    mixture of experts reduces in its own block, or leaves it to the layer as the attention beside it does.
    """
    projection, mlp = layer.projection, layer.mlp
    if site is Site.MLP_OUTPUT and mlp is not None and not any(map(is_experts, mlp.modules())):
        ends = [base_layer(module) for module in mlp.modules() if _is_row_parallel(module)]
    else:
        ends = [base_layer(projection)] if projection is not None else []
    return None if site is Site.BLOCK_OUTPUT else next((int(end.tp_rank) for end in ends if _keeps_share(end)), None)


def _keeps_share(base: Any) -> bool:
    return base.tp_size > 1 and not base.reduce_results
