"""Which targets there are, what fills them, whether they were met, and tables that stay empty until it is measured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from steer_vllm.bench.command import bench
from steer_vllm.bench.modes import MODES
from steer_vllm.bench.options import loads
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.spread import Ratio
from steer_vllm.bench.targets import CPU, GPU, GPU_CACHED, overview, verdict
from steer_vllm.bench.workload import Load

ROUNDS = 5


def measured(ratios: Mapping[tuple[str, str], float | Sequence[float]], **changed: Any) -> dict[str, Any]:
    """A result with these ratios by load and mode, one or one a round, on a GPU where nothing else is said."""
    loads = list(dict.fromkeys(load for load, _ in ratios))
    every = {**{(load, "plain"): 1.0 for load in loads}, **ratios}

    def distinct(load: str, mode: str) -> int:
        return int(load.split()[1].split("x")[0]) if MODES[mode].distinct else int(bool(MODES[mode].kinds))

    samples = [
        {
            "round": number,
            "turn": turn,
            "load": load,
            "mode": mode,
            "distinct": distinct(load, mode),
            "tokens_per_second": one,
            "step_ms": 1 / one,
            "first_tokens_ms": 1.0,
        }
        for turn, ((load, mode), ratio) in enumerate(every.items())
        for number, one in enumerate(
            [ratio] * changed.get("rounds", ROUNDS) if isinstance(ratio, (int, float)) else ratio
        )
    ]
    out = changed.pop("out", 256)
    sizes = [load_of(name, out) for name in loads]
    work = {"shape": asdict(SHAPES["8b"]), "dtype": "bfloat16", "compiled": True, "loads": sizes, "prefix_cache": False}
    hardware = {"device": changed.pop("device", "NVIDIA H200")}
    return {
        "time": changed.pop("time", "2026-01-01"),
        "hardware": hardware,
        "workload": {**work, **changed},
        "modes": {name: {} for name in MODES},
        "samples": samples,
        "share": None,
    }


def load_of(name: str, out: int) -> dict[str, int]:
    phase, sizes = name.split()
    if phase == "decode":
        return {"requests": int(sizes), "prompt_tokens": 512, "output_tokens": out}
    requests, tokens = map(int, sizes.split("x"))
    return {"requests": requests, "prompt_tokens": tokens, "output_tokens": 1, "repeats": 4}


def row(text: str, mode: str, cache: str = "off") -> list[str]:
    """The cells of a GPU table, by load."""
    table = text[text.index(f"prefix cache {cache}") :]
    line = next(line for line in table.splitlines() if line.startswith(f"| {mode} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_cells_are_empty_until_measured() -> None:
    text = overview([])
    assert text.count("## Targets: ") == 3
    columns = "decode 1 | decode 32 | decode 256 | prefill 1x2048 | prefill 1x8192 | prefill 4x2048"
    assert text.count(f"| mode | at least | {columns} |") == 2, "prefix cache off and on"
    assert "| mode | at least | decode 1 | decode 16 | decode 64 |" in text
    assert "%: " not in text
    assert row(text, "distinct-offsets") == [""] * 6


def test_a_result_fills_them() -> None:
    ratios = {("decode 32", "idle"): 0.985, ("decode 256", "idle"): 0.984, ("prefill 1x8192", "idle"): 0.99}
    text = overview([measured({**ratios, ("decode 1", "idle"): 0.98})])
    assert row(text, "idle") == [
        "98.0% (98.0 to 98.0%, 5 rounds): met",
        "98.5% (98.5 to 98.5%, 5 rounds): met",
        "98.4% (98.4 to 98.4%, 5 rounds): not met",
        "",
        "99.0% (99.0 to 99.0%, 5 rounds): met",
        "",
    ]
    assert row(text, "shared-offsets") == [""] * 6
    assert row(text, "idle", "on") == [""] * 6


def test_the_prefix_cache_has_a_table_of_its_own() -> None:
    text = overview([measured({("decode 32", "idle"): 1.0}, prefix_cache=True)])
    assert row(text, "idle") == [""] * 6
    assert row(text, "idle", "on")[1].endswith(": met")


def test_an_interval_about_the_target_leaves_it_open() -> None:
    assert verdict(Ratio.paired([0.97, 0.98, 0.99] * 3, [1.0] * 9), 0.98) == "open"
    assert verdict(Ratio.paired([0.98, 0.99] * 5, [1.0] * 10), 0.98) == "met"
    assert verdict(Ratio.paired([0.96, 0.97] * 5, [1.0] * 10), 0.98) == "not met"


def test_too_few_rounds_leave_it_open() -> None:
    cells = row(overview([measured({("decode 32", "idle"): 1.0}, rounds=4)]), "idle")
    assert cells[1] == "100.0% (4 rounds): open"
    cells = row(overview([measured({("decode 32", "idle"): 0.5}, rounds=1)]), "idle")
    assert cells[1] == "50.0% (1 round): open"


def test_the_rounds_of_all_results_count() -> None:
    slow, fast = (measured({("decode 32", "idle"): ratio}, rounds=rounds) for ratio, rounds in ((0.9, 4), (1.0, 3)))
    assert row(overview([fast]), "idle")[1] == "100.0% (3 rounds): open"
    assert row(overview([slow, fast]), "idle")[1] == "90.0% (90.0 to 100.0%, 7 rounds): open"
    assert row(overview([fast, slow, slow]), "idle")[1].startswith("90.0% (90.0 to ")


def test_one_intervention_per_request_where_they_are_distinct() -> None:
    result = measured({("decode 32", "distinct-offsets"): 1.0})
    for sample in result["samples"]:
        sample["distinct"] = min(sample["distinct"], 8)
    assert row(overview([result]), "distinct-offsets") == [""] * 6


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "float16"},
        {"compiled": False},
        {"shape": asdict(SHAPES["1b"])},
        {"device": "cpu"},
        {"device": "NVIDIA H100 80GB HBM3"},
        {"out": 64},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_conditions_fill_nothing(changed: dict[str, Any]) -> None:
    assert row(overview([measured({("decode 32", "idle"): 1.0}, **changed)]), "idle") == [""] * 6


def test_defaults_of_the_command_fill_the_table_of_the_cpu() -> None:
    """What `--quick` measures does not."""
    given = {name: parameter.default for name, parameter in inspect.signature(bench).parameters.items()}
    assert (given["model"], given["dtype"], given["prefix_cache"]) == (CPU.shape, CPU.dtype, CPU.prefix_cache)
    whole = loads("1,16,64", given["prompt_tokens"], 64, given["prefill"])
    assert whole == CPU.loads
    quick = loads("16", given["prompt_tokens"], 32, given["prefill"])
    assert [CPU.of(load, "idle") for load in (*whole, *quick)] == [0.97] * 3 + [None]


@pytest.mark.parametrize(
    ("low_rank", "lora", "said"),
    [(0.97, 0.9, "met"), (0.9, 0.9, "not met"), ([0.96, 0.97, 0.98] * 3, 0.9, "open"), ([0.99] * 4, 0.9, "open")],
)
def test_low_rank_edits_lose_a_third_of_what_lora_loses(low_rank: Any, lora: float, said: str) -> None:
    """LoRA is measured in a run of its own: each is compared with plain vLLM there."""
    rounds = len(low_rank) if isinstance(low_rank, list) else ROUNDS
    ours = measured({("decode 256", "distinct-low-rank"): low_rank}, rounds=rounds)
    theirs = measured({("decode 256", "lora"): lora})
    cells = row(overview([ours, theirs]), "loss of distinct-low-rank, of LoRA's")
    assert cells[:2] == ["", ""]
    assert cells[2].endswith(f" of 10.0%, {min(rounds, ROUNDS)} rounds: {said}")
    assert cells[3:] == ["", "", ""]


def test_targets_name_modes_that_are_measured() -> None:
    for targets in (CPU, GPU, GPU_CACHED):
        assert set(targets.least) <= set(MODES)
        assert all(0.9 < least < 1 for least in targets.least.values())
    assert GPU.of(Load(1, 512, 256), "distinct-low-rank") == 0.98
    assert GPU.of(Load(1, 2048, 1, 4), "distinct-low-rank") == GPU.of(Load(256, 512, 256), "distinct-low-rank") == 0.95
    assert GPU.of(Load(256, 512, 64), "idle") is None
    assert CPU.of(Load(1, 32, 64), "distinct-loreft") == 0.95
    assert CPU.of(Load(2, 32, 64), "idle") is None
