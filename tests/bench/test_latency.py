"""The targets of latency and of the host: what counts as met, and that each finds its value in a result."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]


@pytest.fixture
def report(script: Script) -> ModuleType:
    return script("report")


def result(benchmark: str, device: str | None = None, **more: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "time": "2026-01-01", "hardware": {"device": device}, **more}


def cells(report: ModuleType, *results: dict[str, Any]) -> dict[str, list[str]]:
    """By what the target is for: those of CPUs and of GPUs."""
    table = report.target.overview(report.TARGETS, results)
    lines = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {line[0].strip(): [cell.strip() for cell in [*line[2:], "", ""][:2]] for line in lines[1:]}


def test_unmeasured_is_empty(report: ModuleType) -> None:
    table = cells(report)
    assert len(table) == sum(map(len, report.TARGETS.values()))
    assert set(map(tuple, table.values())) == {("", "")}


@pytest.mark.parametrize(
    ("samples", "word"), [([2.0] * 9, "met"), ([40.0] * 9, "not met"), ([20.0] * 4 + [50.0] * 5, "open")]
)
def test_a_step(report: ModuleType, samples: list[float], word: str) -> None:
    cases = [
        {"runner": runner, "case": "decoding, nothing changed", "samples": samples if runner == "V2" else [1.0]}
        for runner in ("V1", "V2")
    ]
    table = cells(report, result("step", cases=cases))
    found = {name: cell for name, cell in table.items() if any(cell)}
    assert [cell[0].rpartition(", ")[2] for cell in found.values()] == ["met", word]
    assert not any(cell[1] for cell in found.values()), "it was measured on a CPU"


def test_loading_counts_on_a_gpu_with_the_shape_that_is_meant(report: ModuleType) -> None:
    script = report.loading
    samples = {script.BUSY: [60.0] * 5, script.PAUSE: [8.0, 38.0] * 5, script.CALM: [7.0, 37.0] * 5}
    samples |= {script.RATE.format(5): [100.0] * 9, script.RATE.format(10_005): [95.0] * 9}

    def loading(shape: str) -> dict[str, Any]:
        return result("loading", "NVIDIA H200", workload={"shape": shape}, memory={"artifacts": 5}, samples=samples)

    small, large = (cells(report, loading(shape)) for shape in ("1b", "8b"))
    assert [cell[1] for cell in small.values() if any(cell)] == ["5.0% (5.0% to 5.0%), not met"]
    assert [cell[1] for cell in large.values() if any(cell)] == [
        "60 (60 to 60), not met",
        "1 (1 to 1), met",
        "5.0% (5.0% to 5.0%), not met",
    ]


def test_prefix_and_http(report: ModuleType) -> None:
    prefix = result("prefix", modes=[{"mode": "steered", "of_base": {"median": 1.0, "low": 0.9, "high": 1.2}}])
    isolated = report.http_path.isolated
    forms = [isolated.WITHOUT, *isolated.FORMS]
    http = [
        {"streams": 32, "form": form, "us": 100.0 + 50 * i, "round": number}
        for number in range(3)
        for i, form in enumerate(forms)
    ]
    table = cells(report, prefix, result("http", isolated_samples=http))
    slowest = 0.05 * len(isolated.FORMS)
    assert [cell[0] for cell in table.values() if any(cell)] == [
        "100.0% (90.0% to 120.0%), open",
        f"{slowest:.3f} ({slowest:.3f} to {slowest:.3f}), met",
    ]
