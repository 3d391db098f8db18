"""Speculative decoding: several tokens in one decode, and each gets the edit of its own position.

What is accepted is what the steered model would have said; the draft itself is not steered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from steer_vllm import Intervention
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, letters, oracle

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
RUNS = {
    "ngram, V1": (engines.V1_EAGER, NGRAM),
    "draft model, V1": (engines.V1_EAGER, {"method": "draft_model", "num_speculative_tokens": 3}),
    "draft model, V2": (engines.V2, {"method": "draft_model", "num_speculative_tokens": 3}),
}
"""Triton's interpreter cannot run vLLM's kernel for n-grams on the second runner."""
ASKS: list[list[dict[str, Any]]] = [
    [],
    [{"name": "lofit"}],
    [{"name": "direction"}],
    [{"name": "reft"}],
    [{"name": "direction", "positions": "generated"}, {"name": "lofit", "scale": 0.5}],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters.save(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def interventions(model: Path) -> dict[str, Intervention]:
    base = Fingerprint.of(model)
    return {
        "lofit": artifacts.lofit(base, 1, strength=1.0),
        "direction": artifacts.direction(base, 2),
        "reft": artifacts.loreft(base, 3, "f2+l2"),
    }


class Counts(NamedTuple):
    """Tokens since the start."""

    drafted: float
    accepted: float


def batch(asks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Prompts that repeat themselves, so that something can be looked up in them."""
    return [
        {"tokens": [5 + i, 9, 30 + i, 41] * (3 + i), "interventions": ask, "params": {"max_tokens": 24}}
        for i, ask in enumerate(asks)
    ]


@pytest.mark.parametrize("name", RUNS)
def test_every_token_of_a_decode(
    name: str, model: Path, interventions: dict[str, Intervention], tmp_path: Path
) -> None:
    engine, speculation = RUNS[name]
    if speculation["method"] == "draft_model":
        speculation = {**speculation, "model": str(model)}
    batches = [batch([[]] * 4), batch(ASKS), batch([ASKS[1]] * 4)]
    job = artifacts.save_all(interventions, tmp_path / "artifacts")
    for requests in batches:
        job += [{"do": "generate", "steered": True, "requests": requests}, {"do": "speculation"}]
    job.append({"do": "facts"})
    *answers, facts = engines.run(
        engine, tmp_path / "run", model, job, speculative_config=speculation, disable_log_stats=False
    )
    answers = answers[len(interventions) :]
    loaded = oracle.load(str(model))
    assert all(isinstance(answer, list) for answer in answers), answers
    for requests, results in zip(batches, answers[::2], strict=True):
        for request, result in zip(requests, results, strict=True):
            oracle.check(loaded, request, result, interventions)
    base, mixed, steered = (Counts(*after) for after in answers[1::2])
    assert base.accepted > 0
    assert steered.accepted > mixed.accepted > base.accepted
    if speculation["method"] == "draft_model":  # the same weights: unsteered, both say the same
        assert base.accepted == base.drafted
        assert steered.accepted - mixed.accepted < steered.drafted - mixed.drafted
    assert facts["admission"]["pinned"] == 0
