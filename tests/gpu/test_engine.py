"""Served on a GPU, in CUDA graphs: each request of a mixed batch gets its own interventions, at every token.

Against transformers with `hf.steered` on the CPU. Needs vLLM's CUDA build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

TOLERANCE = {"float32": 0.03, "bfloat16": 0.5}
"""Of log-probabilities: attention multiplies float32 in TF32, and bfloat16 rounds after every operation."""


@pytest.mark.gpu
@pytest.mark.parametrize(("runner", "dtype"), [("v2", "float32"), ("v2", "bfloat16"), ("v1", "float32")])
def test_mixed_batch(runner: str, dtype: str, tmp_path: Path) -> None:
    import torch
    from engine import artifacts, engines, oracle, test_exactness

    env = {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
    llm = {"enforce_eager": False, "async_scheduling": True, "dtype": dtype}
    interventions = artifacts.family(Fingerprint.of(MODEL_PATH))
    requests = test_exactness.batch(Fingerprint.of(MODEL_PATH).vocab_size)
    steps: list[dict[str, Any]] = [
        *artifacts.save_all(interventions, tmp_path / "artifacts"),
        {"do": "generate", "steered": True, "requests": requests},
        {"do": "facts"},
    ]
    engine = engines.Engine(f"{runner}-{dtype}", env, llm, runner=runner)
    *loaded, results, facts = engines.run(engine, tmp_path / "run", MODEL_PATH, steps)
    assert all("digest" in answer for answer in loaded), loaded
    assert [rank["runner"] for rank in facts["ranks"]] == [runner]

    model = oracle.load(str(MODEL_PATH))
    noticed = 0
    for request, result in zip(requests, results, strict=True):
        prompt, made = result["prompt"], result["tokens"]
        at = torch.arange(len(made)), torch.tensor(made)
        steered, plain = (
            oracle.logprobs(model, prompt + made, asks, interventions, len(prompt))[len(prompt) - 1 : -1]
            for asks in (request["interventions"] or [], [])
        )
        found = torch.tensor(result["logprobs"])
        assert (steered[at] - found).abs().max() < TOLERANCE[dtype], request
        assert (steered.max(-1).values - steered[at]).max() < TOLERANCE[dtype], "greedy, but for what rounding decides"
        apart = (steered[at] - plain[at]).abs()
        noticed += bool((apart[1:] > 2 * TOLERANCE[dtype]).any())
    if dtype == "float32":  # rounding to bfloat16 is as large as many an edit
        assert noticed > len(requests) // 3, "edits of decode steps are large enough to be missed if they were not made"
