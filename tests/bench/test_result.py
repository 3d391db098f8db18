"""Tables, sections of RESULTS.md and pictures from a result's samples."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from steer_vllm.bench import record
from steer_vllm.bench.modes import cases, choose
from steer_vllm.bench.result import assemble, begin, check, rows
from steer_vllm.bench.run import Outcome, Sample
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.tables import COLUMNS, cells, conditions, console, markdown
from steer_vllm.bench.workload import Load, Workload
from steer_vllm.errors import BenchmarkInvalid

WORKLOAD = Workload(SHAPES["100m"], (Load(1, 32, 64), Load(16, 32, 64), Load(2, 256, 1, 4)), rounds=5)
CASES = cases(choose("idle,distinct-offsets,distinct-low-rank", quick=False), WORKLOAD.loads, (4, 16))
SHARE = {"plain": 1.0, "idle": 0.98, "distinct-offsets": 0.96, "distinct-low-rank": 0.8}


@pytest.fixture
def result() -> dict[str, Any]:
    samples = [
        Sample(
            round=number,
            turn=turn,
            load=case.load.name,
            mode=case.mode.name,
            distinct=case.distinct,
            tokens_per_second=SHARE[case.mode.name] * 1000 * (number + 1) - case.distinct,
            step_ms=32 / SHARE[case.mode.name],
            steps=63,
            first_tokens_ms=470.0,
            others_cpu=0.01,
        )
        for number in range(5)
        for turn, case in enumerate(CASES)
    ]
    plain = {"vllm": "0.32.0", "device": "cpu", "compiled": True, "dtype": "float32", "model_runner": 2}
    facts = {"plain": plain, "steered": plain}
    return assemble(begin(WORKLOAD), CASES, Outcome(samples, None, {case.key: 1.0 for case in CASES}, facts))


def shown(result: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, str]]:
    return {(row.load, row.mode, row.distinct): cells(result, row) for row in rows(result)}


def test_result_survives_json(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    again = record.read(path)
    assert shown(again) == shown(result)
    assert markdown(again) == markdown(result)
    assert [entry["mode"] for entry in again["table"]] == [row.mode for row in rows(result)]


def test_a_row_for_every_case_in_order(result: dict[str, Any]) -> None:
    assert list(shown(result)) == [case.key for case in CASES]


def test_rows_are_computed_from_the_samples(result: dict[str, Any]) -> None:
    result["table"] = None  # what a hand may have changed is not what is shown
    at = shown(result)
    assert at["decode 16", "plain", 0]["tokens/s"] == "3000"
    assert at["decode 16", "plain", 0]["of plain"] == ""
    assert at["decode 16", "idle", 0]["of plain"] == "98.0%"
    assert at["decode 16", "idle", 0]["step ms"] == "32.65"
    assert at["decode 16", "distinct-low-rank", 4]["tokens/s"] == "2396"
    assert at["decode 16", "distinct-low-rank", 16]["tokens/s"] == "2384"
    assert tuple(at["decode 16", "idle", 0]) == COLUMNS


def test_ratios_are_taken_under_the_same_load(result: dict[str, Any]) -> None:
    for sample in result["samples"]:
        if sample["load"] == "decode 1":
            sample["tokens_per_second"] /= 7
            sample["step_ms"] *= 7
    at = shown(result)
    for column in ("of plain", "with outliers"):
        assert at["decode 1", "idle", 0][column] == at["decode 16", "idle", 0][column] == "98.0%"


@pytest.mark.parametrize(("share", "ratio"), [(8, "98.0%"), (None, "49.0%")])
def test_in_alternation_the_ratio_is_that_of_the_typical_step(
    result: dict[str, Any], share: int | None, ratio: str
) -> None:
    """What a shared machine does to some steps is in the tokens per second, and shown beside."""
    result["share"] = share
    for sample in result["samples"]:
        if sample["mode"] == "idle":
            sample["tokens_per_second"] /= 2
    at = shown(result)["decode 16", "idle", 0]
    assert (at["of plain"], at["with outliers"]) == (ratio, "49.0%")
    assert (", 8 steps each at a time, seed 0" in conditions(result)) == (share is not None)


def test_a_round_without_plain_vllm_is_refused(result: dict[str, Any]) -> None:
    result["samples"] = [one for one in result["samples"] if one["mode"] != "plain" or one["round"] != 2]
    with pytest.raises(BenchmarkInvalid, match=r"^round 2, decode 1: plain vLLM was not measured"):
        list(rows(result))


def test_the_order_of_samples_does_not_matter(result: dict[str, Any]) -> None:
    before = shown(result)
    result["samples"].reverse()
    assert shown(result) == before


def test_targets_stand_beside_what_they_are_for(result: dict[str, Any]) -> None:
    at = shown(result)
    assert at["decode 16", "idle", 0]["target"] == "97.0%: met"
    assert at["decode 16", "distinct-offsets", 16]["target"] == "97.0%: not met"
    assert at["decode 16", "distinct-offsets", 4]["target"] == "", "only where each request has its own"
    assert at["decode 16", "distinct-low-rank", 16]["target"] == ""
    assert at["prefill 2x256", "idle", 0]["target"] == ""
    assert at["decode 16", "idle", 0]["95% interval"] == "98.0 to 98.0%"


def test_targets_are_for_loads_of_their_size(result: dict[str, Any]) -> None:
    for load in result["workload"]["loads"]:
        load["output_tokens"] //= 2
    assert not any(cells["target"] for cells in shown(result).values())


def test_console_tables_fit_a_terminal(result: dict[str, Any]) -> None:
    screen = Console(file=io.StringIO(), width=80)
    screen.print(*console(result))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert all(load.name in text for load in WORKLOAD.loads)
    assert "distinct-low-rank" in text
    assert "98.0 to 98.0%" in text
    assert "97.0%: not met" in text


def test_conditions_name_the_work(result: dict[str, Any]) -> None:
    assert conditions(result).startswith(
        "Llama of 104M random weights, float32, compiled, prefix cache off; decode at batch 1, 16, 32 tokens in, 64 "
        "out; prefill of 2x256 tokens; 5 rounds, seed 0."
    )


def test_engines_that_run_otherwise_are_named(result: dict[str, Any]) -> None:
    assert "seed 0. Model runner V2, compiled. " in conditions(result)
    result["engines"]["lora"] = {**result["engines"]["plain"], "compiled": False, "model_runner": 1}
    assert "seed 0. Model runner V2, compiled; lora: model runner V1, eager. " in conditions(result)


def test_rounds_are_those_that_were_run(result: dict[str, Any]) -> None:
    result["samples"] = [sample for sample in result["samples"] if sample["round"] < 3]
    assert "; 3 rounds, seed 0." in conditions(result)
    result["samples"] = [one for one in result["samples"] if one["round"] < 2 or one["load"] == "decode 1"]
    assert "; 2 to 3 rounds, seed 0." in conditions(result)
    assert {key[0]: cells["95% interval"] for key, cells in shown(result).items() if key[1] == "idle"} == {
        "decode 1": "3 rounds",
        "decode 16": "2 rounds",
        "prefill 2x256": "2 rounds",
    }
    assert shown(result)["decode 16", "idle", 0]["target"] == "97.0%: open"


def test_a_run_that_was_stopped_shows_the_loads_it_has(result: dict[str, Any]) -> None:
    result["samples"] = [s for s in result["samples"] if s["round"] == 0 and s["load"] == "decode 16"]
    assert {load for load, _, _ in shown(result)} == {"decode 16"}
    assert "; 1 round, seed 0." in conditions(result)


def test_other_formats_are_refused(result: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkInvalid, match="expected offline 3, got offline 99"):
        check({**result, "format_version": 99})
    with pytest.raises(BenchmarkInvalid, match="got decode 3"):
        markdown({**result, "benchmark": "decode"})


def test_a_picture_where_numbers_vary(
    result: dict[str, Any], tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    drawing = script("curves")
    panels = drawing.curves(result)
    assert {load: sorted(modes) for load, modes in panels.items()} == {
        "decode 16": ["distinct-low-rank", "distinct-offsets"]
    }
    assert [row.distinct for row in panels["decode 16"]["distinct-offsets"]] == [4, 16]
    assert drawing.draw(result, tmp_path / "a.svg")
    assert drawing.draw(result, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text(), "no date, no random names"
    result["samples"] = [sample for sample in result["samples"] if sample["distinct"] != 4]
    assert not drawing.draw(result, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_report_shows_the_picture(result: dict[str, Any], script: Callable[[str], ModuleType]) -> None:
    report = script("report")
    assert "(cpu.svg)" in report.markdown({"cpu": result}, ["cpu"])
    assert "(cpu.svg)" not in report.markdown({"cpu": result})


def test_what_worked_in_alternation_is_compared_within_its_turn(result: dict[str, Any]) -> None:
    """The machine was half as fast while one mode had its turn: plain vLLM beside it was so too."""
    samples = [one for one in result["samples"] if one["load"] == "decode 16"]
    plain = [one for one in samples if one["mode"] == "plain"]
    others = [one for one in samples if one["mode"] == "idle" or one["distinct"] == 16]
    for turn in {one["turn"] for one in others}:
        others += [{**one, "turn": turn} for one in plain]
    (slow,) = {one["turn"] for one in others if one["mode"] == "idle"}
    for one in others:
        if one["turn"] == slow:
            one["tokens_per_second"] /= 2
            one["step_ms"] *= 2
    result |= {"samples": others, "share": 8}
    at = shown(result)
    for mode, distinct, ratio in (("idle", 0, "98.0%"), ("distinct-offsets", 16, "96.0%")):
        assert at["decode 16", mode, distinct]["of plain"] == ratio
    assert at["decode 16", "idle", 0]["with outliers"] == "98.0%"
