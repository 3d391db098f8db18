"""Each request of a mixed batch gets exactly its own interventions, on every runner, eager and compiled.

DESIGN: one edit, slots and segments; row 0 is the identity.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, oracle

MODEL_ENGINES = [engines.V1_EAGER, engines.V1_COMPILED, engines.V2, engines.V2_TRACED]


def batch(vocabulary: int) -> list[dict[str, Any]]:
    """32 requests: base, every artifact alone, scales, other positions, compositions; prompts of 1 to 40 tokens."""
    asks: list[list[dict[str, Any]] | None] = [None, [], None, None]
    asks += [[{"name": f"lofit-{i}"}] for i in range(8)]
    asks += [[{"name": f"direction-{kind}"}] for kind in ("all", "prompt", "generated", "response")]
    asks += [[{"name": f"loreft-{i}"}] for i in range(4)]
    asks += [
        [{"name": "lofit-0", "scale": -0.5}],
        [{"name": "lofit-1", "scale": 2.0, "positions": "response"}],
        [{"name": "loreft-0", "scale": 0.6}],
        [{"name": "loreft-3", "positions": "f2+l3"}],
        [{"name": "loreft-2", "scale": 0.5}],
        [{"name": "direction-all", "scale": 0.0}],
        [{"name": "lofit-0"}, {"name": "lofit-1", "scale": 0.5}],
        [{"name": "lofit-2"}, {"name": "direction-response", "scale": 1.5}],
        [{"name": "loreft-0"}, {"name": "loreft-2", "scale": 0.7}],
        [{"name": "lofit-3", "positions": "generated"}, {"name": "loreft-1"}, {"name": "direction-prompt"}],
        [{"name": f"lofit-{i}", "scale": 0.5} for i in range(4)],
        [{"name": "lofit-0", "scale": 0.5}, {"name": "lofit-0", "scale": 0.5}],
    ]
    draw = random.Random(7)
    return [
        {
            "tokens": [draw.randrange(10, vocabulary) for _ in range(1 + (7 * i) % 40)],
            "interventions": ask,
            "params": {"max_tokens": 12},
        }
        for i, ask in enumerate(asks)
    ]


@pytest.mark.parametrize("engine", MODEL_ENGINES, ids=lambda engine: engine.name)
def test_mixed_batch(engine: engines.Engine, base_model: Path, tmp_path: Path) -> None:
    base = Fingerprint.of(base_model)
    interventions = artifacts.family(base)
    requests = batch(base.vocab_size)
    steps = [
        *artifacts.save_all(interventions, tmp_path / "artifacts"),
        {"do": "generate", "steered": True, "requests": requests},
        {"do": "facts"},
    ]
    *loaded, results, facts = engines.run(engine, tmp_path / "steered", base_model, steps)
    assert all("digest" in answer for answer in loaded), loaded
    assert [rank["runner"] for rank in facts["ranks"]] == [engine.runner]
    assert facts["admission"]["pinned"] == 0
    model = oracle.load(str(base_model))
    for request, result in zip(requests, results, strict=True):
        oracle.check(model, request, result, interventions)

    unsteered = [{**request, "interventions": None} for request in requests]
    plain = engines.run(
        engine, tmp_path / "plain", base_model, [{"do": "generate", "requests": unsteered}], plain=True
    )[0]
    for request, mine, theirs in zip(requests, results, plain, strict=True):
        if any(ask.get("scale") != 0.0 for ask in request["interventions"] or []):
            assert moved(mine["logprobs"], theirs["logprobs"]) > 100 * oracle.TOLERANCE, request
        else:
            assert mine["tokens"] == theirs["tokens"]
            assert mine["logprobs"] == theirs["logprobs"], "the identity row must not change a bit"


def moved(mine: list[float], theirs: list[float]) -> float:
    """By how much the log-probabilities of the chosen tokens differ at most."""
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
