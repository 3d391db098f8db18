"""LoReFT against equation 2 of its paper, by hooks of the test's own; R stays orthonormal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steer_vllm.errors import UserError
from steer_vllm.hf import steered
from steer_vllm.hooks import Steering
from steer_vllm.intervention import Card
from steer_vllm.training.base import Base
from steer_vllm.training.data import read
from steer_vllm.training.loreft import make_subspaces, tune_subspaces
from steer_vllm.training.settings import LoReFTSettings

from .conftest import HIDDEN

IDS = torch.tensor([[1, 5, 9, 12, 30, 7, 8]])
PROMPT = 5


def logits_by_formula(
    base: Base, tensors: dict[str, torch.Tensor], layers: list[int], spans: list[list[int]]
) -> torch.Tensor:
    """h + R^T (W h + b - R h) at the positions of each part: `spans[part]`."""
    handles = []
    for row, layer in enumerate(layers):

        def hook(module: Any, args: Any, output: Any, row: int = row) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for part, places in enumerate(spans):
                R, W, b = (tensors[name][part, row] for name in ("rotate", "weight", "bias"))
                for at in places:
                    h = hidden[0, at].clone()
                    hidden[0, at] = h + R.T @ (W @ h + b - R @ h)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(base.model.model.layers[layer].register_forward_hook(hook))
    with torch.no_grad():
        logits: torch.Tensor = base.model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize(
    ("positions", "spans"),
    [
        ("f1+l2", [[0, 3, 4]]),
        ("f1+l2/untied", [[0], [3, 4]]),
        ("f7+l7", [[0, 1, 2, 3, 4]]),  # 5 tokens: the first 2 and the last 3
        ("f7+l7/untied", [[0, 1], [2, 3, 4]]),
    ],
)
def test_equation_2(base: Base, positions: str, spans: list[list[int]]) -> None:
    subspaces = make_subspaces(base.fingerprint, LoReFTSettings(rank=3, layers="0,2", positions=positions))
    with torch.no_grad():
        subspaces.bias.add_(1.0)
        tensors = subspaces.tensors()
        expected = logits_by_formula(base, tensors, [0, 2], spans)
        with subspaces.applied(Steering(base.model), torch.ones_like(IDS), [PROMPT]):
            trained = base.model(IDS).logits
        with steered(base.model, subspaces.intervention(Card()), prompt_lengths=[PROMPT]):
            served = base.model(IDS).logits
        assert (expected - base.model(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-4)


def test_r_is_orthonormal_before_and_after(base: Base, task: Path) -> None:
    settings = LoReFTSettings(rank=4, max_steps=20, lr=0.05)
    start = make_subspaces(base.fingerprint, settings).tensors()["rotate"]
    subspaces, _ = tune_subspaces(base, base.encoder(settings).examples(read(task)), settings)
    R = subspaces.tensors()["rotate"]
    assert R.shape == (1, base.fingerprint.num_layers, 4, HIDDEN)
    assert (R - start).abs().max() > 0.01
    for rows in (start, R):
        torch.testing.assert_close(rows @ rows.mT, torch.eye(4).expand(1, 3, 4, 4), rtol=0, atol=1e-5)
    assert subspaces.intervention(Card()).method.to_config() == {"edited_layers": [0, 1, 2], "rank": 4, "tied": True}


def test_start_values_are_those_of_linear_layers(base: Base) -> None:
    subspaces = make_subspaces(base.fingerprint, LoReFTSettings(rank=8))
    bound = HIDDEN**-0.5
    for values in (subspaces.weight, subspaces.bias):
        assert 0.8 * bound < values.abs().max() <= bound


def test_what_the_model_does_not_have(base: Base) -> None:
    with pytest.raises(UserError, match=r"--layers: \[3\] are not in 0\.\.2"):
        make_subspaces(base.fingerprint, LoReFTSettings(layers="1,3"))
    with pytest.raises(UserError, match="--rank: 33, the hidden size is 32"):
        make_subspaces(base.fingerprint, LoReFTSettings(rank=33))
