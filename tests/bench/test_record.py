"""What every result begins with, and that RESULTS.md has a section for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from steer_vllm.bench import machine, record
from steer_vllm.errors import BenchmarkInvalid


def test_a_result_begins_with_its_conditions(tmp_path: Path) -> None:
    begun = record.begin("some", 3, {"batch": 2}, None)
    path = tmp_path / "some.json"
    path.write_text(json.dumps(begun))
    assert record.read(path) == begun
    assert (begun["benchmark"], begun["format_version"], begun["workload"]) == ("some", 3, {"batch": 2})
    assert "device CPU; steer-vllm " in record.origin(begun)
    assert f"`{begun['command']}`" in record.how(begun)


def test_commands_can_be_given_again(root: Path) -> None:
    assert root == machine.FOLDER
    script = str(root / "benchmarks" / "ops.py")
    assert record.command([script, "--output", "a b.json"], None) == "python benchmarks/ops.py --output 'a b.json'"
    assert record.command(["/somewhere/bin/steer-vllm", "bench"], None) == "steer-vllm bench"
    given = ["/somewhere/bin/steer-vllm", "bench", "--within", "300", "--quick", "--within=3"]
    assert record.command(given, None) == "steer-vllm bench --quick", "not how much time there was"
    module = ModuleSpec("steer_vllm.cli", None)
    assert record.command(["/somewhere/cli.py", "bench"], module) == "python -m steer_vllm.cli bench"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmark": "decode"}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(BenchmarkInvalid, match=r"bench\.json"):
        record.read(path)


def test_every_committed_result_has_its_section(root: Path, script: Callable[[str], ModuleType]) -> None:
    report = script("report")
    results = {path.stem: record.read(path) for path in sorted((root / "benchmarks" / "results").glob("*.json"))}
    drawn = [name for name, one in report.offline(results).items() if report.curves.curves(one)]
    assert all((root / "benchmarks" / f"{name}.svg").is_file() for name in drawn)
    text = report.markdown(results, drawn)
    assert text == (root / "benchmarks" / "RESULTS.md").read_text(), "python benchmarks/report.py writes it"
    assert all(f"\n## {name}\n" in text for name in results)


def test_a_benchmark_without_a_renderer_is_refused(script: Callable[[str], ModuleType]) -> None:
    with pytest.raises(BenchmarkInvalid, match=r"first: no renderer for 'other'"):
        script("report").markdown({"first": {"benchmark": "other", "format_version": 1, "time": "2026-01-01"}})


def test_where_nothing_can_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    record.check_output(tmp_path / "new.json")
    with pytest.raises(BenchmarkInvalid, match=r"is a folder, expected a file"):
        record.check_output(tmp_path)
    with pytest.raises(BenchmarkInvalid, match=r"absent does not exist, expected a folder"):
        record.check_output(tmp_path / "absent" / "new.json")


def test_a_busy_machine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for load, busy in ((0.1, False), (1.7, True)):
        monkeypatch.setattr(machine.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert machine.busy() is busy
