"""KV that left the cache for host memory comes back to requests with the same edits, and to no others.

vLLM's offloading names blocks by its block hashes, which carry the edits' keys. The cache is so small that every
request drives out the one before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from steer_vllm import Intervention
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, cached, engines, oracle

BLOCK = 32
LONG = [20 + (7 * i) % 300 for i in range(3 * BLOCK + 5)]
BLOCKS = 6  # on the device: one request's


class Step(NamedTuple):
    """cached: tokens that are not computed again, all of them from the host."""

    title: str
    asks: list[dict[str, Any]]
    cached: int


def steps() -> list[Step]:
    lofit = [{"name": "lofit"}]
    return [
        Step("base", [], 0),
        Step("base, from the host", [], 96),
        Step("all: nothing of the base's", lofit, 0),
        Step("all, from the host", lofit, 96),
        Step("base, after all", [], 96),
        Step("another scale: nothing", [{"name": "lofit", "scale": -0.5}], 0),
        Step("another artifact: nothing", [{"name": "other"}], 0),
        Step("response: the base's blocks", [{"name": "other", "positions": "response"}], 96),
        Step("another artifact, from the host", [{"name": "other"}], 96),
    ]


@pytest.fixture(scope="module")
def interventions() -> dict[str, Intervention]:
    base = Fingerprint.of(MODEL_PATH)
    return {"lofit": artifacts.lofit(base, 1), "other": artifacts.lofit(base, 2)}


@pytest.fixture(scope="module")
def results(interventions: dict[str, Intervention], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("offload")
    job = artifacts.save_all(interventions, folder / "artifacts")
    for i, step in enumerate(steps()):
        request = {"tokens": LONG, "interventions": step.asks, "params": {"max_tokens": 6}}
        other = {"tokens": [700 - i - j for j in range(5 * BLOCK)], "params": {"max_tokens": 2}}
        job += [{"do": "generate", "steered": True, "requests": [one]} for one in (request, other)]
    answers = engines.run(
        engines.OFFLOADING,
        folder / "run",
        MODEL_PATH,
        job,
        block_size=BLOCK,
        enable_prefix_caching=True,
        num_gpu_blocks_override=BLOCKS + 1,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 26},
        },
    )
    found = [answer for answer in answers if "digest" not in answer]
    assert all(isinstance(answer, list) for answer in found), found
    return [answer[0] for answer in found[::2]]


def test_counts_are_what_the_keys_promise(results: list[dict[str, Any]]) -> None:
    cached.check_counts(steps(), results)


def test_answers_are_exact(results: list[dict[str, Any]], interventions: dict[str, Intervention]) -> None:
    model = oracle.load(str(MODEL_PATH))
    for step, result in zip(steps(), results, strict=True):
        oracle.check(model, {"tokens": LONG, "interventions": step.asks}, result, interventions)
