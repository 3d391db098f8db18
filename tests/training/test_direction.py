"""Mean differences against activations read through transformers itself."""

from __future__ import annotations

import pytest
import torch

from steer_vllm.errors import UserError
from steer_vllm.hf import steered
from steer_vllm.intervention import Card
from steer_vllm.training.base import Base
from steer_vllm.training.data import Pair
from steer_vllm.training.direction import make_direction, separation
from steer_vllm.training.settings import DirectionSettings

PAIRS = [Pair("w1 w2 w3", "w4 w3"), Pair("w1 w5 w6 w7", "w4 w7"), Pair("w1 w9", "w4 w8 w9")]


def hidden(base: Base, text: str) -> torch.Tensor:
    """The blocks' outputs at the last token, but for the last block, which transformers gives normalised."""
    with torch.no_grad():
        states = base.model(**base.tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
    return torch.stack([state[0, -1] for state in states[1:-1]])


def block_output(base: Base, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """By a hook of the test's own, which runs after those that are there already."""
    seen = []
    block = base.model.model.layers[layer]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        base.model(ids)
    handle.remove()
    (output,) = seen
    return output[0] if isinstance(output, tuple) else output


def test_mean_of_differences_at_the_last_token(base: Base) -> None:
    made = make_direction(base, PAIRS, DirectionSettings(layers="0,1", coefficient=2.5), Card())
    expected = torch.stack([hidden(base, pair.positive) - hidden(base, pair.negative) for pair in PAIRS]).mean(0)
    torch.testing.assert_close(made.tensors["directions"], expected, rtol=0, atol=1e-5)
    assert made.method.to_config() == {"edited_layers": [0, 1], "coefficient": 2.5, "site": "block_output"}
    assert str(made.positions) == "response"
    made.check()


def test_it_is_added_from_the_prompts_last_token_on(base: Base) -> None:
    made = make_direction(base, PAIRS, DirectionSettings(layers="1", coefficient=2.0), Card())
    ids = torch.tensor([[1, 5, 9, 12, 30]])
    plain = block_output(base, 1, ids)
    with steered(base.model, made, prompt_lengths=[3]):
        moved = block_output(base, 1, ids)
    expected = torch.zeros_like(plain)
    expected[0, 2:] = 2.0 * made.tensors["directions"][0]
    torch.testing.assert_close(moved - plain, expected, rtol=0, atol=1e-5)


def test_best_is_the_layer_that_separates(base: Base) -> None:
    draw = torch.Generator().manual_seed(0)
    negative = torch.randn(50, 3, 8, generator=draw)
    positive = torch.randn(50, 3, 8, generator=draw)
    positive[:, 1, 2] += 5.0
    scores = separation(positive, negative)
    assert scores.argmax() == 1
    assert scores[1].item() == pytest.approx(5.0, rel=0.3)
    (layer,) = make_direction(base, PAIRS, DirectionSettings(), Card()).method.layers
    assert 0 <= layer < 3


def test_long_texts_are_refused(base: Base) -> None:
    with pytest.raises(UserError, match="1 texts are longer than 64 tokens"):
        make_direction(base, [Pair("w1 " * 70, "w2")], DirectionSettings(), Card())
