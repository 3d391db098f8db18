"""Public data and a public model, where they are at hand: train, load what was written, serve it.

The accuracy of a model this small means nothing; every format, split and prompt does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from steer_vllm import Intervention
from steer_vllm.training.run import Job, train_lofit, train_loreft
from steer_vllm.training.settings import LoFiTSettings, LoReFTSettings

from . import artifacts, engines, oracle

STEPS = {"max_steps": 6, "max_length": 192}
PROMPTS = ("Q: Can pigs fly? A:", "Once upon a time")


@pytest.fixture(scope="module")
def stories(beside: Callable[[str], Path]) -> Path:
    return beside("models/stories260K-h32-fp32")


@pytest.fixture(scope="module")
def trained(
    stories: Path, beside: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Intervention]:
    folder = tmp_path_factory.mktemp("real")
    files = {
        "truthfulqa": beside("data/truthfulqa/fold_0_train_seed_42.csv"),
        "mquake": beside("data/mquake/train.jsonl"),
    }
    made = {}
    for task, file in files.items():
        made[f"lofit-{task}"] = train_lofit(Job(str(stories), file, folder / "lofit" / task), LoFiTSettings(**STEPS))
        made[f"loreft-{task}"] = train_loreft(Job(str(stories), file, folder / "reft" / task), LoReFTSettings(**STEPS))
    return made


def test_what_was_trained_is_served(trained: dict[str, Intervention], stories: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    requests: list[dict[str, Any]] = [
        {"tokens": tokenizer(prompt)["input_ids"], "interventions": [{"name": name}], "params": {"max_tokens": 8}}
        for prompt in PROMPTS
        for name in trained
    ]
    steps = artifacts.save_all(trained, tmp_path)
    answers = engines.run(
        engines.V1_EAGER, tmp_path / "run", stories, [*steps, {"do": "generate", "steered": True, "requests": requests}]
    )
    assert all("digest" in answer for answer in answers[:-1]), answers
    model = oracle.load(str(stories))
    for request, result in zip(requests, answers[-1], strict=True):
        oracle.check(model, request, result, trained)
