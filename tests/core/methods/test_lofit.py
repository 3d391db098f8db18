"""LoFiT against its paper: z(l, h) + v(l, h) before `o_proj` is W_o v after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from core.make import BASE, lofit, randn

from steer_vllm import Intervention
from steer_vllm.edit import Place, Site
from steer_vllm.errors import ArtifactInvalid
from steer_vllm.hf import steered


@contextmanager
def edited_heads(model: Any, item: Intervention) -> Iterator[None]:
    """Adds v to the input of every o_proj, head by head: the method's definition (section 3.2)."""
    handles = []
    for layer, block in enumerate(model.model.layers):

        def add(module: Any, args: tuple[torch.Tensor], layer: int = layer) -> tuple[torch.Tensor]:
            z = args[0].unflatten(-1, (BASE.num_heads, BASE.head_dim)).clone()
            for row, (at, head) in enumerate(item.method.heads):  # type: ignore[attr-defined]
                if at == layer:
                    z[..., head, :] += item.tensors["offsets"][row]
            return (z.flatten(-2),)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(add))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_equals_editing_the_heads(model: Any) -> None:
    """Invariant: the compiled form is exact, with a bias and hidden size other than heads x size."""
    item = lofit(((0, 0), (0, 3), (1, 2), (2, 1)))
    ids = torch.randint(1, BASE.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    base = model(ids).logits
    with edited_heads(model, item):
        wanted = model(ids).logits
    with steered(model, item):
        found = model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - base).abs().max() > 0.1


def test_compile() -> None:
    """u of each layer is the sum over its heads of W_o[:, head] v, computed here column block by column block."""
    item = lofit(((0, 1), (2, 0), (2, 3)))
    W = randn(3, BASE.hidden_size, BASE.num_heads * BASE.head_dim, seed=9)
    (edits,) = item.compile(lambda layer, heads: W[layer] @ heads)
    assert set(edits) == {Place(0, Site.ATTENTION_OUTPUT), Place(2, Site.ATTENTION_OUTPUT)}
    for place, edit in edits.items():
        u = torch.zeros(BASE.hidden_size)
        for row, (layer, head) in enumerate(item.method.heads):  # type: ignore[attr-defined]
            if layer == place.layer:
                columns = slice(head * BASE.head_dim, (head + 1) * BASE.head_dim)
                u += W[layer][:, columns] @ item.tensors["offsets"][row]
        assert edit.offset is not None
        torch.testing.assert_close(edit.offset, u, rtol=1e-5, atol=1e-5)
        assert edit.low_rank is None


def test_gradients_reach_the_offsets() -> None:
    item = lofit()
    W = randn(3, BASE.hidden_size, BASE.num_heads * BASE.head_dim, seed=9).double()

    def compiled(offsets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (edits,) = item.method.compile({"offsets": offsets}, BASE, lambda layer, heads: W[layer] @ heads)
        return tuple(edit.offset for edit in edits.values() if edit.offset is not None)

    assert torch.autograd.gradcheck(compiled, item.tensors["offsets"].double().requires_grad_())


def test_head_beyond_the_model() -> None:
    with pytest.raises(ArtifactInvalid, match=r"heads \[\[1, 4\]\] are not in 0\.\.3"):
        lofit(((0, 1), (1, 4))).check("here")
    lofit(((0, 1), (1, 3))).check()


def test_key_value_heads_do_not_bound_the_heads() -> None:
    """Heads are query heads; grouped-query attention has fewer key-value heads."""
    lofit(((0, BASE.num_heads - 1),), base=dataclasses.replace(BASE, num_heads=4)).check()
