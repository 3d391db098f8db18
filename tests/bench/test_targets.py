"""Targets: which results they are for, when they are met, and tables that stay empty until something is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from steer_vllm.bench.modes import MODES
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.targets import CPU, GPU, overview


def measured(ratios: Mapping[tuple[str, str], float], **changed: Any) -> dict[str, Any]:
    """A result with these ratios by load and mode, on a GPU where nothing else is said."""
    loads = list(dict.fromkeys(load for load, _ in ratios))
    every = {**{(load, "plain"): 1.0 for load in loads}, **ratios}

    def distinct(load: str, mode: str) -> int:
        return int(load.split()[1].split("x")[0]) if MODES[mode].distinct else int(bool(MODES[mode].kinds))

    rates = ("tokens_per_second", "step_ms", "first_tokens_ms")
    samples = [
        {"round": 0, "load": load, "mode": mode, "distinct": distinct(load, mode), **dict.fromkeys(rates, ratio)}
        for (load, mode), ratio in every.items()
    ]
    work = {"shape": asdict(SHAPES["8b"]), "dtype": "bfloat16", "compiled": True, "loads": [load_of(n) for n in loads]}
    hardware = {"device": changed.pop("device", "NVIDIA H200")}
    return {
        "time": changed.pop("time", "2026-01-01"),
        "hardware": hardware,
        "workload": {**work, **changed},
        "modes": {name: {} for name in MODES},
        "samples": samples,
    }


def load_of(name: str) -> dict[str, int]:
    phase, sizes = name.split()
    if phase == "decode":
        return {"requests": int(sizes), "prompt_tokens": 512, "output_tokens": 256}
    requests, tokens = map(int, sizes.split("x"))
    return {"requests": requests, "prompt_tokens": tokens, "output_tokens": 1}


def row(text: str, mode: str) -> list[str]:
    """The cells of the GPU table, by load."""
    table = text[text.index("H200") :]
    line = next(line for line in table.splitlines() if line.startswith(f"| {mode} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_cells_are_empty_until_measured() -> None:
    text = overview([])
    assert text.count("## Targets: ") == 2
    assert "| mode | at least | decode 1 | decode 32 | decode 256 | prefill 1x2048 | prefill 1x8192 |" in text
    assert "| mode | at least | decode 1 | decode 16 | decode 64 |" in text
    assert "%, " not in text
    assert row(text, "distinct-offsets") == [""] * 5


def test_a_result_fills_them() -> None:
    text = overview(
        [measured({("decode 32", "idle"): 0.985, ("decode 256", "idle"): 0.9849, ("decode 1", "idle"): 0.98})]
    )
    assert row(text, "idle") == ["98.0%, met", "98.5%, met", "98.5%, not met", "", ""]
    assert row(text, "shared-offsets") == [""] * 5


def test_the_newest_result_counts() -> None:
    old, new = (
        measured({("decode 32", "idle"): ratio}, time=time) for ratio, time in ((0.5, "2026-01"), (1.0, "2026-02"))
    )
    assert row(overview([new, old]), "idle")[1] == "100.0%, met"


def test_one_intervention_per_request_where_they_are_distinct() -> None:
    result = measured({("decode 32", "distinct-offsets"): 1.0})
    for sample in result["samples"]:
        sample["distinct"] = min(sample["distinct"], 8)
    assert row(overview([result]), "distinct-offsets") == [""] * 5


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "float16"}, {"compiled": False}, {"shape": asdict(SHAPES["1b"])}, {"device": "cpu"}],
    ids=lambda changed: next(iter(changed)),
)
def test_other_conditions_fill_nothing(changed: dict[str, Any]) -> None:
    assert row(overview([measured({("decode 32", "idle"): 1.0}, **changed)]), "idle") == [""] * 5


@pytest.mark.parametrize(("low_rank", "verdict"), [(0.97, "met"), (0.9, "not met")])
def test_low_rank_edits_lose_a_third_of_what_lora_loses(low_rank: float, verdict: str) -> None:
    """LoRA is measured in a run of its own: each is compared with plain vLLM there."""
    ours = measured({("decode 256", "distinct-low-rank"): low_rank})
    lora = measured({("decode 256", "lora"): 0.9})
    cells = row(overview([ours, lora]), "loss of distinct-low-rank, of LoRA's")
    assert cells == ["", "", f"{1 - low_rank:.1%} of 10.0%, {verdict}", "", ""]


def test_targets_name_modes_that_are_measured() -> None:
    for targets in (CPU, GPU):
        assert set(targets.least) <= set(MODES)
        assert all(0.9 < least < 1 for least in targets.least.values())
    assert GPU.of("decode 1", "distinct-low-rank") == 0.98
    assert GPU.of("decode 256", "distinct-low-rank") == 0.95
    assert CPU.of("decode 1", "distinct-loreft") == 0.95
    assert CPU.of("decode 2", "idle") is None
