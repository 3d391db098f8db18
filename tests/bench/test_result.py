"""Tables and RESULTS.md from a result's samples."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steer_vllm.bench.modes import MODES
from steer_vllm.bench.result import COLUMNS, assemble, conditions, markdown, read, rows, table
from steer_vllm.bench.run import Outcome, Sample
from steer_vllm.bench.workload import Workload
from steer_vllm.errors import BenchmarkInvalid

CHOSEN = tuple(MODES[name] for name in ("plain", "idle", "distinct-low-rank"))
SHARE = {"plain": 1.0, "idle": 0.98, "distinct-low-rank": 0.8}


@pytest.fixture
def result() -> dict[str, Any]:
    samples = [
        Sample(number, turn, mode.name, SHARE[mode.name] * 1000 * (number + 1), 32 / SHARE[mode.name], 63, 470.0, 0.01)
        for number in range(5)
        for turn, mode in enumerate(CHOSEN)
    ]
    facts = {"plain": {"vllm": "0.32.0", "device": "cpu", "compiled": True, "dtype": "float32"}}
    same = {"plain": 1.0, "idle": 1.0, "distinct-low-rank": 0.0}
    return assemble(replace(Workload(), rounds=5), CHOSEN, Outcome(samples, same, facts))


def test_result_survives_json(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    assert list(rows(read(path))) == list(rows(result))
    assert {"command", "commit", "hardware", "versions", "workload", "samples", "time"} <= set(read(path))
    assert result["workload"]["seed"] == 0


def test_rows_are_computed_from_the_samples(result: dict[str, Any]) -> None:
    for mode in result["modes"]:  # what a hand may have changed is not what is shown
        mode["ratio"] = mode["tokens_per_second"] = None
    shown = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows(result)}
    assert shown["plain"]["tokens/s"] == "3000"
    assert shown["plain"]["of plain"] == ""
    assert shown["idle"]["of plain"] == "98.0%"
    assert shown["distinct-low-rank"]["95% interval"] == "80.0 to 80.0%"
    assert shown["idle"]["step ms"] == "32.65"


def test_the_order_of_samples_does_not_matter(result: dict[str, Any]) -> None:
    before = list(rows(result))
    result["samples"].reverse()
    assert list(rows(result)) == before


def test_console_table_fits_a_terminal(result: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(mode.name in text for mode in CHOSEN)
    assert "98.0 to 98.0%" in text


def test_conditions_name_the_work(result: dict[str, Any]) -> None:
    text = conditions(result)
    assert "float32, compiled; decode at batch 32, 32 tokens in, 64 out; 5 rounds, seed 0" in text


def test_markdown_has_every_row_with_the_command(result: dict[str, Any]) -> None:
    text = markdown(result)
    assert f"`{result['command']}`" in text
    assert "| idle | 2940 | 32.65 | 98.0% | 98.0 to 98.0% | 98.0 to 98.0% | 470 |" in text
    assert MODES["idle"].title in text


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text('{"benchmark": "decode", "format_version": 99}')
    with pytest.raises(BenchmarkInvalid, match=r"bench\.json: expected format 1, got 99"):
        read(path)
