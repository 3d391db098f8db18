"""Directions: x + coefficient * d at the chosen site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.make import BASE, direction

from steer_vllm.edit import Place, Site
from steer_vllm.hf import steered


@pytest.mark.parametrize("site", list(Site))
def test_compile(site: Site) -> None:
    item = direction((0, 2), -1.5, site=site)
    (edits,) = item.compile(lambda layer, heads: heads)
    assert set(edits) == {Place(0, site), Place(2, site)}
    for row, layer in enumerate((0, 2)):
        edit = edits[Place(layer, site)]
        assert edit.low_rank is None
        assert edit.offset is not None
        assert torch.equal(edit.offset, -1.5 * item.tensors["directions"][row])


@pytest.mark.parametrize("site", list(Site))
@torch.no_grad()
def test_each_site_in_a_model(model: Any, site: Site) -> None:
    """The site is where the docstring says: own hooks on o_proj, MLP or block add the same vector."""
    item = direction((0, 2), 1.5, site=site, positions="all")
    ids = torch.randint(1, BASE.vocab_size, (1, 7), generator=torch.Generator().manual_seed(0))
    handles = []
    for row, layer in enumerate(item.method.layers):
        block = model.model.layers[layer]
        module = {
            Site.ATTENTION_OUTPUT: block.self_attn.o_proj,
            Site.MLP_OUTPUT: block.mlp,
            Site.BLOCK_OUTPUT: block,
        }[site]
        vector = 1.5 * item.tensors["directions"][row]
        handles.append(module.register_forward_hook(lambda m, a, out, vector=vector: out + vector))
    wanted = model(ids).logits
    for handle in handles:
        handle.remove()
    with steered(model, item):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_equal_settings_are_equal() -> None:
    """1 and 1.0, "block_output" and Site.BLOCK_OUTPUT are the same setting, so the same digest."""
    one, two = direction(coefficient=1), direction(coefficient=1.0, site="block_output")  # type: ignore[arg-type]
    assert one.method == two.method
    assert one.digest == two.digest
    assert one.digest != direction(coefficient=1.5).digest
