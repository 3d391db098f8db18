"""The oracle: transformers with `hf.steered`, fed the tokens that the engine produced."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from steer_vllm import Intervention, Positions
from steer_vllm.hf import steered

TOLERANCE = 1e-4
"""Of log-probabilities in float32: sums in another order, over a few layers."""


def load(model: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def items(
    asks: list[dict[str, Any]], interventions: dict[str, Intervention]
) -> list[tuple[Intervention, float, Positions]]:
    """What `hf.steered` takes for a request's interventions."""
    return [
        (
            interventions[ask["name"]],
            ask.get("scale", interventions[ask["name"]].default_scale),
            Positions.parse(ask["positions"]) if "positions" in ask else interventions[ask["name"]].positions,
        )
        for ask in asks
    ]


def logprobs(
    model: PreTrainedModel,
    tokens: list[int],
    asks: list[dict[str, Any]],
    interventions: dict[str, Intervention],
    prompt_len: int,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """[len(tokens), vocabulary]: row i predicts token i + 1, with the request's interventions. inputs: pictures."""
    with torch.no_grad(), steered(model, *items(asks, interventions), prompt_lengths=[prompt_len]):
        return model(torch.tensor([tokens]), **inputs).logits[0].log_softmax(-1)


def check_sampled(
    model: PreTrainedModel,
    request: dict[str, Any],
    result: dict[str, Any],
    interventions: dict[str, Intervention],
) -> None:
    """The log-probabilities of whatever was sampled, in every choice, and of the prompt where it was scored.

    They are the model's own: before biases, penalties, masks and temperature, as vLLM reports them by default.
    """
    prompt, start = request["tokens"], request.get("response_start")
    assert ("prompt_logprobs" in request["params"]) == (result["prompt_logprobs"] is not None)
    asks = request.get("interventions") or []
    for choice in result["choices"]:
        made = choice["tokens"]
        predicted = logprobs(model, prompt + made, asks, interventions, start or len(prompt))
        following = torch.tensor((prompt + made)[1:])
        expected = predicted[torch.arange(len(following)), following]
        if result["prompt_logprobs"] is None:
            expected = expected[len(prompt) - 1 :]
        found = torch.tensor((result["prompt_logprobs"] or []) + choice["logprobs"])
        difference = (expected - found).abs().max().item()
        assert difference < TOLERANCE, (difference, request)


def check(
    model: PreTrainedModel,
    request: dict[str, Any],
    result: dict[str, Any],
    interventions: dict[str, Intervention],
    **inputs: torch.Tensor,
) -> None:
    """As many greedy tokens as were asked for, the same ones, with the same log-probabilities."""
    prompt, made = result["prompt"], result["tokens"]
    assert made, request
    assert len(made) == request.get("params", {}).get("max_tokens", len(made)), request
    asks = request.get("interventions") or []
    predicted = logprobs(model, prompt + made, asks, interventions, len(prompt), **inputs)
    predicted = predicted[len(prompt) - 1 : -1]
    assert predicted.argmax(-1).tolist() == made, request
    expected = predicted[torch.arange(len(made)), torch.tensor(made)]
    difference = (expected - torch.tensor(result["logprobs"])).abs().max().item()
    assert difference < TOLERANCE, (difference, request)
