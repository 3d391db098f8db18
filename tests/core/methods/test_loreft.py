"""LoReFT against equation 2 of its paper: h + R^T (W h + b - R h)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from core.make import BASE, loreft, orthonormal

from steer_vllm import Intervention
from steer_vllm.edit import Edit, Place, Site
from steer_vllm.errors import ArtifactInvalid
from steer_vllm.hf import steered


def equation(item: Intervention, part: int, row: int, h: torch.Tensor) -> torch.Tensor:
    """Equation 2 on rows of h: [..., hidden]."""
    R, W, b = (item.tensors[name][part, row] for name in ("rotate", "weight", "bias"))
    return h + (h @ W.T + b - h @ R.T) @ R


@pytest.mark.parametrize("positions", ["f2+l2", "f2+l2/untied"])
@pytest.mark.parametrize("rank", [1, 3])
def test_compile(positions: str, rank: int) -> None:
    item = loreft((0, 2), rank, positions=positions)
    parts = item.compile(lambda layer, heads: heads)
    assert len(parts) == item.positions.parts
    h = torch.randn(5, BASE.hidden_size, generator=torch.Generator().manual_seed(5))
    for p, edits in enumerate(parts):
        assert set(edits) == {Place(0, Site.BLOCK_OUTPUT), Place(2, Site.BLOCK_OUTPUT)}
        for i, layer in enumerate((0, 2)):
            edit: Edit = edits[Place(layer, Site.BLOCK_OUTPUT)]
            assert edit.offset is None
            assert edit.low_rank is not None
            A, B, c = edit.low_rank.A, edit.low_rank.B, edit.low_rank.c
            torch.testing.assert_close(h + (h @ A.T + c) @ B, equation(item, p, i, h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["f2+l3", "f2+l3/untied", "f7+l7/untied"])
@torch.no_grad()
def test_equals_the_equation_in_a_model(model: Any, positions: str) -> None:
    """Invariant: exactly the first f' and last l' prompt tokens are edited, prefix and suffix each by its own part."""
    item = loreft((0, 2), positions=positions)
    n, total = 6, 9
    first, last = min(item.positions.first, n // 2), min(item.positions.last, (n + 1) // 2)
    handles = []
    for row, layer in enumerate(item.method.layers):

        def edit(module: Any, args: Any, h: torch.Tensor, row: int = row) -> torch.Tensor:
            out = h.clone()
            out[:, :first] = equation(item, 0, row, h[:, :first])
            out[:, n - last : n] = equation(item, item.positions.parts - 1, row, h[:, n - last : n])
            return out

        handles.append(model.model.layers[layer].register_forward_hook(edit))
    ids = torch.randint(1, BASE.vocab_size, (2, total), generator=torch.Generator().manual_seed(0))
    wanted = model(ids).logits
    for handle in handles:
        handle.remove()
    with steered(model, item, prompt_lengths=[n, n]):
        found = model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - model(ids).logits).abs().max() > 0.1


def test_edit_stays_in_the_subspace() -> None:
    """At scale 1 the edit moves R h to W h + b and nothing orthogonal to R: the paper's reading of the equation."""
    item = loreft((0,), 3, positions="f1+l1")
    h = torch.randn(4, BASE.hidden_size, generator=torch.Generator().manual_seed(1))
    ((edits),) = item.compile(lambda layer, heads: heads)
    part = edits[Place(0, Site.BLOCK_OUTPUT)].low_rank
    assert part is not None
    out = h + (h @ part.A.T + part.c) @ part.B
    R, W, b = (item.tensors[name][0, 0] for name in ("rotate", "weight", "bias"))
    torch.testing.assert_close(out @ R.T, h @ W.T + b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out - out @ R.T @ R, h - h @ R.T @ R, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", ["scaled", "parallel", "nearly", "zero"])
def test_rows_of_r_must_be_orthonormal(error: str) -> None:
    item = loreft()
    R = item.tensors["rotate"].clone()
    if error == "scaled":
        R[0, 1] *= 1.1
    elif error == "parallel":
        R[0, 0, 1] = R[0, 0, 0]
    elif error == "nearly":
        R[0, 0, 0, 0] += 0.01
    else:
        R.zero_()
    with pytest.raises(ArtifactInvalid, match="not orthonormal"):
        dataclasses.replace(item, tensors={**item.tensors, "rotate": R}).check()


def test_rank_above_hidden_size_cannot_be_orthonormal() -> None:
    wide = BASE.hidden_size + 1
    item = loreft((0,), 3)
    tall = orthonormal(1, 1, BASE.hidden_size, BASE.hidden_size)
    tensors = {
        "rotate": torch.cat([tall, tall[:, :, :1]], 2),
        "weight": torch.zeros(1, 1, wide, BASE.hidden_size),
        "bias": torch.zeros(1, 1, wide),
    }
    with pytest.raises(ArtifactInvalid, match="not orthonormal"):
        dataclasses.replace(item, method=dataclasses.replace(item.method, rank=wide), tensors=tensors).check()  # type: ignore[call-arg]


def test_gradients_reach_every_tensor() -> None:
    item = loreft((0,), 2, positions="f1+l1/untied")
    names = sorted(item.tensors)

    def compiled(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = item.method.compile(dict(zip(names, tensors, strict=True)), BASE, lambda layer, heads: heads)
        found = [edit.low_rank for edits in parts for edit in edits.values() if edit.low_rank]
        return tuple(tensor for part in found for tensor in (part.A, part.B, part.c))

    assert torch.autograd.gradcheck(compiled, tuple(item.tensors[n].double().requires_grad_() for n in names))
