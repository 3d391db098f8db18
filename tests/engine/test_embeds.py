"""Prompts given as embeddings: positions count their rows, and cache keys hold vLLM's hash of them and the edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from steer_vllm import Intervention
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.hf import steered

from . import artifacts, cached, engines, oracle

BLOCK = 32
LONG = 3 * BLOCK + 5


class Step(NamedTuple):
    """prompt: which of the two. cached: tokens from the prefix cache."""

    title: str
    prompt: str
    asks: list[dict[str, Any]]
    cached: int


def steps() -> list[Step]:
    lofit, reft = [{"name": "lofit"}], [{"name": "reft"}]
    return [
        Step("base", "first", [], 0),
        Step("all", "first", lofit, 0),
        Step("all, again", "first", lofit, 96),
        Step("response: the base's blocks", "first", [{"name": "lofit", "positions": "response"}], 96),
        Step("first and last rows", "first", reft, 0),
        Step("other embeddings, same edit", "second", lofit, 0),
        Step("other embeddings, first and last rows", "second", reft, 0),
        Step("base, again", "first", [], 96),
    ]


@pytest.fixture(scope="module")
def interventions() -> dict[str, Intervention]:
    base = Fingerprint.of(MODEL_PATH)
    return {"lofit": artifacts.lofit(base, 1), "reft": artifacts.loreft(base, 3, "f2+l2")}


@pytest.fixture(scope="module")
def prompts() -> dict[str, torch.Tensor]:
    """[tokens, hidden], near real embeddings but of no token."""
    embed = oracle.load(str(MODEL_PATH)).get_input_embeddings().weight.detach()
    made = {}
    for seed, name in enumerate(("first", "second")):
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(20, 300, (LONG,), generator=draw)
        made[name] = embed[tokens] + 0.3 * embed.std() * torch.randn(LONG, embed.shape[1], generator=draw)
    return made


@pytest.fixture(scope="module")
def results(
    interventions: dict[str, Intervention],
    prompts: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("embeds")
    files: dict[str, Path] = {}
    for name, embeds in prompts.items():
        files[name] = folder / f"{name}.safetensors"
        safetensors.torch.save_file({"embeds": embeds.contiguous()}, files[name])
    job = artifacts.save_all(interventions, folder / "artifacts")
    for step in steps():
        request = {"embeds": str(files[step.prompt]), "interventions": step.asks, "params": {"max_tokens": 6}}
        job.append({"do": "generate", "steered": True, "requests": [request]})
    answers = engines.run(
        engines.V1_PROCESSES,
        folder / "run",
        MODEL_PATH,
        job,
        block_size=BLOCK,
        enable_prefix_caching=True,
        enable_prompt_embeds=True,
    )[len(interventions) :]
    assert all(isinstance(answer, list) for answer in answers), answers
    return [answer[0] for answer in answers]


def test_counts_are_what_the_keys_promise(results: list[dict[str, Any]]) -> None:
    cached.check_counts(steps(), results)


def test_answers_are_exact(
    results: list[dict[str, Any]], interventions: dict[str, Intervention], prompts: dict[str, torch.Tensor]
) -> None:
    model = oracle.load(str(MODEL_PATH))
    for step, result in zip(steps(), results, strict=True):
        made = torch.tensor(result["tokens"])
        inputs = torch.cat([prompts[step.prompt], model.get_input_embeddings()(made)])
        items = oracle.items(step.asks, interventions)
        with torch.no_grad(), steered(model, *items, prompt_lengths=[LONG]):
            predicted = model(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)[LONG - 1 : -1]
        assert predicted.argmax(-1).tolist() == made.tolist(), step.title
        found = torch.tensor(result["logprobs"])
        assert (predicted[torch.arange(len(made)), made] - found).abs().max() < oracle.TOLERANCE, step.title
