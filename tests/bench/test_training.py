"""A round of training steps on a model of nothing, and what is said of the seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from steer_vllm.bench import record


def test_every_step_is_timed(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    training, path = script("training"), tmp_path / "training.json"
    sizes = ["--shape", "tiny", "--batch", "2", "--tokens", "16", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["training.py", *sizes, "--output", str(path)])
    training.main()
    result = record.read(path)
    assert list(result["seconds"]) == list(training.TITLES)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["seconds"].values())
    result["seconds"] = {name: [2.0, 4.0] if name == training.PLAIN else [3.0, 6.0] for name in result["seconds"]}
    path.write_text(json.dumps(result))
    text = training.markdown(record.read(path))
    assert f"| {training.PLAIN} | 3.000 |  |  |" in text
    assert "| LoReFT | 4.500 | 1.50 | 2 rounds |" in text
    assert "2 texts of 16 tokens; 2 rounds, seed 0." in text
