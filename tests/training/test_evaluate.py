"""Metrics against formulas of the test's own, one text at a time."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from steer_vllm import Intervention
from steer_vllm.intervention import Card
from steer_vllm.training.base import Base
from steer_vllm.training.data import Example
from steer_vllm.training.evaluate import Evaluator, matches_exactly
from steer_vllm.training.lofit import Offsets
from steer_vllm.training.settings import Settings

PROMPTS = ["w1", "w2 w3 w4 w5", "w6 w7", "w8 w9 w10 w11 w12 w13"]


@pytest.fixture
def evaluator(base: Base) -> Evaluator:
    return Evaluator(base, base.encoder(Settings()), batch_size=3, tokens=5, progress=False)


@pytest.fixture
def offsets(base: Base) -> Intervention:
    learned = Offsets(((0, 1), (2, 2)), base.fingerprint, 0)
    with torch.no_grad():
        learned.offsets.normal_(generator=torch.Generator().manual_seed(0))
    return learned.intervention(Card())


def log_probability(base: Base, prompt: str, answer: str) -> float:
    ids = base.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    start = len(base.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        rows = base.model(ids).logits[0].log_softmax(-1)
    return sum(rows[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))


def test_log_probabilities(base: Base, evaluator: Evaluator) -> None:
    texts = [(prompt, answer) for prompt in PROMPTS for answer in ("w20", "w21 w22 w23")]
    for text, value in zip(texts, evaluator.log_probabilities(texts), strict=True):
        assert value == pytest.approx(log_probability(base, *text), abs=1e-4)


def test_multiple_choice(base: Base, evaluator: Evaluator) -> None:
    examples = [Example(prompt, "w20", ("w20", "w21 w22"), ("w23", "w24 w25", "w26")) for prompt in PROMPTS]
    for example, (mc1, mc2) in zip(examples, evaluator.choices(examples), strict=True):
        right = [log_probability(base, example.prompt, answer) for answer in example.correct]
        wrong = [log_probability(base, example.prompt, answer) for answer in example.incorrect]
        assert mc1 == float(right[0] > max(wrong))
        mass = [sum(map(math.exp, values)) for values in (right, wrong)]
        assert mc2 == pytest.approx(mass[0] / sum(mass), abs=1e-5)
    scores = evaluator.scores(examples)
    assert scores.items == 4
    assert 0 <= (scores.mc1 or 0) <= 1


def test_batches_generate_what_single_prompts_do(evaluator: Evaluator, offsets: Intervention) -> None:
    together = evaluator.generate(PROMPTS, offsets)
    alone = [evaluator.generate([prompt], offsets)[0] for prompt in PROMPTS]
    assert together == alone
    assert together != evaluator.generate(PROMPTS)
    assert all(len(text.split()) <= 5 for text in together)


def test_exact_match_counts(base: Base, evaluator: Evaluator, caplog: pytest.LogCaptureFixture) -> None:
    said = evaluator.generate(PROMPTS)
    examples = [Example(PROMPTS[0], said[0]), Example(PROMPTS[1], "w0 w0", (said[1],)), Example(PROMPTS[2], "w0 w0 w0")]
    with caplog.at_level(logging.WARNING):
        scores = evaluator.scores([*examples, Example("w1 " * 62, "w2")])
    assert scores.to_dict() == {"items": 3, "exact_match": pytest.approx(2 / 3), "left_out": 1}
    assert "1 of 4 items are too long" in caplog.text


@pytest.mark.parametrize(
    ("text", "right", "right_in_any_case"),
    [
        ("Paris", True, True),
        (" Paris \nQ: next", True, True),
        ("PARIS", False, True),
        ("Paris is", False, False),
        ("", False, False),
        ("\n\nParis", True, True),
    ],
)
def test_matching(text: str, right: bool, right_in_any_case: bool) -> None:
    assert matches_exactly(text, ["Paris", "City of Light"]) is right
    assert matches_exactly(text, ["Paris", "City of Light"], ignore_case=True) is right_in_any_case
