"""What the demo promises: a few heads, or a rank of four, raise held-out accuracy by at least 30 points.

The training package with its defaults, on the shipped model and the demo's tasks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from steer_vllm.demo import MODEL_PATH
from steer_vllm.demo.tasks import write_tasks
from steer_vllm.training.base import Base, load_base
from steer_vllm.training.run import Job, train_lofit, train_loreft
from steer_vllm.training.settings import LoFiTSettings, LoReFTSettings

GAIN = 0.30


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(str(MODEL_PATH), "float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def job(task: str, base: Base, data: Path, out: Path) -> Job:
    return Job(str(MODEL_PATH), data / f"{task}.train.jsonl", out, eval_data=data / f"{task}.test.jsonl", base=base)


def test_lofit_on_a_tenth_of_the_heads(base: Base, data: Path, tmp_path: Path) -> None:
    selected = train_lofit(job("truthfulness", base, data, tmp_path / "selected"), LoFiTSettings())
    total = base.fingerprint.num_layers * base.fingerprint.num_heads
    assert len(selected.method.heads) <= total / 10
    before, after = (selected.card.metrics[when]["exact_match"] for when in ("base", "steered"))
    assert after - before >= GAIN
    assert selected.card.metrics["steered"]["mc1"] - selected.card.metrics["base"]["mc1"] >= GAIN
    assert selected.card.metrics["steered"]["mc2"] > selected.card.metrics["base"]["mc2"]
    other = train_lofit(job("truthfulness", base, data, tmp_path / "random"), LoFiTSettings(), "random")
    assert other.card.metrics["steered"]["exact_match"] < after


def test_loreft_of_rank_four(base: Base, data: Path, tmp_path: Path) -> None:
    trained = train_loreft(job("edits", base, data, tmp_path / "edits"), LoReFTSettings(rank=4))
    before, after = (trained.card.metrics[when]["exact_match"] for when in ("base", "steered"))
    assert after - before >= GAIN
