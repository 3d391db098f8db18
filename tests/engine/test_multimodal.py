"""Multi-modal models: the text part is steered, with pictures in the prompt or without, and the vision tower is not.

Invariant: positions are token indices within the request, the picture's tokens among them; a block that holds a picture
is shared exactly when picture and edits agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from steer_vllm import Intervention
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, oracle, pictures

BLOCK = 32
WORDS = [pictures.FIRST_WORD + (11 * i) % 80 for i in range(90)]
LATE = [*WORDS[:40], pictures.IMAGE, *WORDS[40:]]
"""A picture in the second block of three full ones."""
TWO = [pictures.IMAGE, *WORDS[:5], pictures.IMAGE, *WORDS[5:9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.build(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def interventions(model: Path) -> dict[str, Intervention]:
    base = Fingerprint.of(model)
    return {
        "lofit": artifacts.lofit(base, 1),
        "direction": artifacts.direction(base, 2, "response"),
        "reft": artifacts.loreft(base, 3, "f3+l3"),
    }


Case = tuple[list[int], list[int], list[dict[str, Any]], int]
"""Prompt, seeds of its pictures, what is asked for, and how many of its tokens are in the cache before it."""
CASES: list[Case] = [
    (LATE, [1], [], 0),
    (LATE, [1], [{"name": "lofit"}], 0),
    (LATE, [1], [{"name": "lofit"}], 96),
    (LATE, [2], [{"name": "lofit"}], 32),  # the block before the picture
    (LATE, [1], [{"name": "direction"}], 96),  # the base model's
    (LATE, [2], [{"name": "direction", "positions": "all"}], 0),
    (LATE, [1], [{"name": "reft"}], 0),
    (TWO, [3, 4], [{"name": "lofit"}, {"name": "reft"}], 0),
    (TWO, [4, 3], [{"name": "direction", "positions": "prompt"}], 0),
    (WORDS[:7], [], [{"name": "lofit", "scale": -0.5}], 0),
]


@pytest.mark.parametrize("engine", [engines.V1_EAGER, engines.V2], ids=lambda engine: engine.name)
def test_pictures(engine: engines.Engine, model: Path, interventions: dict[str, Intervention], tmp_path: Path) -> None:
    drawn = {seed: pictures.draw(tmp_path, seed) for seed in (1, 2, 3, 4)}
    steps = artifacts.save_all(interventions, tmp_path / "artifacts")
    requests = [
        {"tokens": tokens, "interventions": asks, "params": {"max_tokens": 6}}
        | ({"images": [str(drawn[seed]) for seed in seeds]} if seeds else {})
        for tokens, seeds, asks, _ in CASES
    ]
    jobs = [{"do": "generate", "steered": True, "requests": [request]} for request in requests]
    answers = engines.run(engine, tmp_path / "run", model, [*steps, *jobs, {"do": "facts"}], block_size=BLOCK)
    *results, facts = answers[len(steps) :]
    assert facts["admission"]["pinned"] == 0
    assert [result[0]["cached"] for result in results] == [cached for *_, cached in CASES]
    reference = AutoModelForImageTextToText.from_pretrained(model).eval()
    for request, (result,), (_, seeds, _, _) in zip(requests, results, CASES, strict=True):
        seen = pictures.pixels(model, [drawn[seed] for seed in seeds])
        oracle.check(reference, request, result, interventions, **seen)


def test_text_alone(model: Path, interventions: dict[str, Intervention], tmp_path: Path) -> None:
    """With every modality off it is a text model."""
    steps = artifacts.save_all(interventions, tmp_path / "artifacts")
    asks = [[], [{"name": "lofit"}], [{"name": "direction"}, {"name": "reft"}]]
    requests = [
        {"tokens": WORDS[: 5 + i], "interventions": ask, "params": {"max_tokens": 6}} for i, ask in enumerate(asks)
    ]
    steps.append({"do": "generate", "steered": True, "requests": requests})
    results = engines.run(engines.V1_EAGER, tmp_path / "run", model, steps, language_model_only=True)[-1]
    reference = AutoModelForImageTextToText.from_pretrained(model).eval()
    for request, result in zip(requests, results, strict=True):
        oracle.check(reference, request, result, interventions)
