"""`hf.steered` on unusual structures, against hooks written down for each: head offsets before the projection itself.

The oracle of the other tests must not share the engine's mistakes: parallel residuals, post-norms, an MLP without a
module of its own, and one that returns a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from steer_vllm import Intervention
from steer_vllm.edit import Site
from steer_vllm.errors import Unsupported
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.hf import steered

from .models import VOCABULARY, family
from .observe import ADDITIVE, HEADS, LOW_RANK, edit, prompt

Modules = Callable[[Any], tuple[nn.Module, nn.Module]]
STRUCTURES: dict[str, Modules] = {
    "Gemma 2": lambda layer: (layer.self_attn.o_proj, layer.mlp.down_proj),
    "OLMo 2": lambda layer: (layer.self_attn.o_proj, layer.mlp.down_proj),
    "Falcon 7B": lambda layer: (layer.self_attention.dense, layer.mlp.dense_4h_to_h),
    "GPT-NeoX": lambda layer: (layer.attention.dense, layer.mlp.dense_4h_to_h),
    "OPT": lambda layer: (layer.self_attn.out_proj, layer.fc2),
    "GPT-OSS": lambda layer: (layer.self_attn.o_proj, layer.mlp),
}
"""Family: its output projection, and what puts out its MLP's result."""
LAYERS = (0, 2)
TOKENS = torch.tensor([prompt(9, 7)])


def blocks(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)


def added(item: Intervention, site: Site, i: int, x: torch.Tensor) -> torch.Tensor:
    """What the definition adds to x in the i-th edited layer."""
    tensors = item.tensors
    if "directions" in tensors:
        return item.method.coefficient * tensors["directions"][i]  # type: ignore[attr-defined,no-any-return]
    return (x @ tensors["A"][i].T + tensors["c"][i]) @ tensors["B"][i]


@contextmanager
def by_hand(model: Any, name: str, item: Intervention, site: Site, kind: str, base: Fingerprint) -> Iterator[None]:
    """The edit as hooks on this family's own modules."""

    def after(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return output[0] + added(item, site, i, output[0]), *output[1:]
            return output + added(item, site, i, output)

        return hook

    with ExitStack() as hooks:
        for i, layer in enumerate(LAYERS):
            block = blocks(model)[layer]
            projection, mlp = STRUCTURES[name](block)
            if kind == HEADS:
                z = torch.zeros(base.num_heads, base.head_dim)
                for (at, head), offset in zip(item.method.heads, item.tensors["offsets"], strict=True):  # type: ignore[attr-defined]
                    z[head] += offset if at == layer else 0
                handle = projection.register_forward_pre_hook(lambda m, a, z=z: (a[0] + z.flatten(),))
            else:
                modules = {Site.ATTENTION_OUTPUT: projection, Site.MLP_OUTPUT: mlp, Site.BLOCK_OUTPUT: block}
                handle = modules[site].register_forward_hook(after(i))
            hooks.callback(handle.remove)
        yield


@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_steered_is_the_definition(name: str) -> None:
    model = family(name).build()
    config = model.config
    base = Fingerprint(
        config.hidden_size,
        3,
        config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        VOCABULARY,
        None,
    )
    plain = model(TOKENS).logits
    for site in Site:
        for kind in (HEADS, ADDITIVE, LOW_RANK) if site is Site.ATTENTION_OUTPUT else (ADDITIVE, LOW_RANK):
            item = edit(base, LAYERS, site, kind, 3, "all")
            with by_hand(model, name, item, site, kind, base):
                wanted = model(TOKENS).logits
            with steered(model, item):
                found = model(TOKENS).logits
            assert (wanted - plain).abs().max() > 0.05, (site, kind)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=f"{name}, {site.value} {kind}")


def test_a_mamba_layer_has_no_heads() -> None:
    """Layers keep their number; what they do not have is refused by name."""
    model = family("Granite hybrid").build()
    base = Fingerprint(64, 3, 2, 32, VOCABULARY, None)
    refused = r"layer 0 \(GraniteMoeHybridDecoderLayer\) has no attention_output: it has no attention with heads"
    for kind in (HEADS, ADDITIVE):
        with (
            pytest.raises(Unsupported, match=refused),
            steered(model, edit(base, LAYERS, Site.ATTENTION_OUTPUT, kind, 3, "all")),
        ):
            model(TOKENS)
