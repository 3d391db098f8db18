"""The Triton kernels in a whole engine, on the second runner, in Triton's interpreter: what a GPU would run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, oracle

KERNELS = replace(engines.V2, name="v2-kernels", driver="kernels_driver")


def test_mixed_batch(tmp_path: Path) -> None:
    """Unsteered, additive, low-rank and composed in one batch, at some positions and at all."""
    base = Fingerprint.of(MODEL_PATH)
    interventions = {
        "lofit": artifacts.lofit(base, 1),
        "reft": artifacts.loreft(base, 2, "f2+l2"),
        "everywhere": artifacts.loreft(base, 3, "all"),
    }
    asks = [
        None,
        [{"name": "lofit", "scale": -0.5}],
        [{"name": "reft"}],
        [{"name": "everywhere", "scale": 0.7}, {"name": "lofit"}],
    ]
    requests = [
        {"tokens": [20 + i, 31, 44, 27, 35, 50][: 3 + i], "interventions": ask, "params": {"max_tokens": 3}}
        for i, ask in enumerate(asks)
    ]
    steps = [
        *artifacts.save_all(interventions, tmp_path / "artifacts"),
        {"do": "generate", "steered": True, "requests": requests},
    ]
    *loaded, results, calls = engines.run(KERNELS, tmp_path, MODEL_PATH, steps)
    assert all("digest" in answer for answer in loaded), loaded
    model = oracle.load(str(MODEL_PATH))
    for request, result in zip(requests, results, strict=True):
        oracle.check(model, request, result, interventions)
    assert calls["route"] >= 1
    assert calls["low_rank"] >= 3 * base.num_layers, "in each layer of each step"
