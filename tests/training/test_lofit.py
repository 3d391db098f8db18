"""LoFiT against its paper: head-level edits by hooks of the test's own, head selection, choice of heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_vllm.errors import ArtifactInvalid, UserError
from steer_vllm.head_set import HeadSet
from steer_vllm.hf import steered
from steer_vllm.hooks import Steering
from steer_vllm.intervention import Card
from steer_vllm.training.base import Base
from steer_vllm.training.data import read
from steer_vllm.training.lofit import (
    Offsets,
    Scaling,
    find_heads,
    head_count,
    head_output,
    offset_rate,
    select_heads,
    tune_offsets,
)
from steer_vllm.training.settings import LoFiTSettings

from .conftest import HEAD_DIM, HEADS, LAYERS

IDS = torch.tensor([[1, 5, 9, 12, 30, 7]])


def logits_by_heads(base: Base, edit: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The model with z(l, h) replaced by edit(l, h, z) before the output projection: section 3 of the paper."""
    handles = []
    for layer, block in enumerate(base.model.model.layers):

        def hook(module: Any, args: Any, layer: int = layer) -> Any:
            z = args[0].unflatten(-1, (HEADS, HEAD_DIM))
            return (torch.stack([edit(layer, head, z[..., head, :]) for head in range(HEADS)], -2).flatten(-2),)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(hook))
    with torch.no_grad():
        logits: torch.Tensor = base.model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def test_scaling_is_one_plus_a_times_z(base: Base) -> None:
    scaling = Scaling(base.fingerprint, 0.0, 3)
    with torch.no_grad():
        scaling.scaling.normal_(generator=torch.Generator().manual_seed(0))
        with scaling.applied(Steering(base.model), torch.ones_like(IDS), [3]):
            mine = base.model(IDS).logits
        A = scaling.scaling
        torch.testing.assert_close(mine, logits_by_heads(base, lambda l, h, z: (1 + A[l, h]) * z), rtol=0, atol=1e-5)  # noqa: E741
        assert (mine - base.model(IDS).logits).abs().max() > 0.1


def test_the_artifact_equals_head_level_offsets(base: Base) -> None:
    heads = ((0, 1), (2, 0), (2, 3))
    offsets = Offsets(heads, base.fingerprint, 3)
    with torch.no_grad():
        offsets.offsets.normal_(generator=torch.Generator().manual_seed(0))
        v = {head: offsets.offsets[row].clone() for row, head in enumerate(heads)}
        expected = logits_by_heads(base, lambda l, h, z: z + v[l, h] if (l, h) in v else z)  # noqa: E741
        with steered(base.model, offsets.intervention(Card())):
            served = base.model(IDS).logits
        with offsets.applied(Steering(base.model), torch.ones_like(IDS), [3]):
            trained = base.model(IDS).logits
        assert (expected - base.model(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)


def test_start_values(base: Base) -> None:
    A, again, other = (Scaling(base.fingerprint, 0.0, seed).scaling for seed in (1, 1, 2))
    assert torch.equal(A, again)
    assert not torch.equal(A, other)
    assert A.std().item() == pytest.approx(1e-3, rel=0.2)


def test_score_is_the_norm_of_a(base: Base) -> None:
    scaling = Scaling(base.fingerprint, 0.0, 0)
    with torch.no_grad():
        scaling.scaling[1, 2] = 0.5
    scores = scaling.head_set(base.fingerprint, "t").scores
    assert (len(scores), len(scores[0])) == (LAYERS, HEADS)
    assert scores[1][2] == pytest.approx(0.5 * HEAD_DIM**0.5)
    assert scaling.head_set(base.fingerprint, "t").top(1) == ((1, 2),)


def test_the_default_rate_follows_the_heads_output(base: Base, task: Path) -> None:
    heads = ((0, 1), (2, 0), (2, 3))
    data = base.encoder(LoFiTSettings()).examples(read(task))[:4]
    seen: dict[tuple[int, int], list[torch.Tensor]] = {head: [] for head in heads}

    def look(layer: int, head: int, z: torch.Tensor) -> torch.Tensor:
        if (layer, head) in seen:
            seen[layer, head].append(z.flatten())
        return z

    for item in data:
        logits_by_heads(base, look, torch.tensor([item.ids]))
    by_layer = [torch.cat(seen[0, 1]), torch.cat([*seen[2, 0], *seen[2, 3]])]
    expected = (sum(float(z.pow(2).mean()) for z in by_layer) / 2) ** 0.5
    assert head_output(base, data, heads) == pytest.approx(expected, rel=1e-4)
    assert offset_rate(base, data, LoFiTSettings(), heads) == pytest.approx(0.05 * expected, rel=1e-4)
    assert offset_rate(base, data, LoFiTSettings(offset_lr=0.01), heads) == 0.01


def test_both_steps(base: Base, task: Path) -> None:
    settings = LoFiTSettings(max_steps=30, num_heads=3)
    data = base.encoder(settings).examples(read(task))
    head_set, log = select_heads(base, data, settings, "parity")
    assert (head_set.method, head_set.task, log[0]["step"]) == ("lofit", "parity", 1)
    offsets, _ = tune_offsets(base, data, settings, head_set.top(head_count(base.fingerprint, settings)))
    assert offsets.tensors()["offsets"].shape == (3, HEAD_DIM)


def test_head_sets_from_elsewhere(base: Base, tmp_path: Path) -> None:
    mine = HeadSet.random(base.fingerprint, 5)
    mine.save(tmp_path / "mine")
    assert find_heads(str(tmp_path / "mine"), base.fingerprint, 0) == mine
    assert find_heads("random", base.fingerprint, 5) == mine
    stranger = dataclasses.replace(base.fingerprint, weights="0" * 64)
    with pytest.raises(ArtifactInvalid, match="head set of another base model: weights"):
        find_heads(str(tmp_path / "mine"), stranger, 0)
    with pytest.raises(UserError, match="--num-heads: 13, the model has 12"):
        head_count(base.fingerprint, LoFiTSettings(num_heads=13))
