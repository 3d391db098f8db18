"""The script for a GPU machine: what it is asked for is understood before anything runs, and what it runs is valid."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from steer_vllm.bench import command
from steer_vllm.bench.modes import LORA, MODES, Case
from steer_vllm.bench.targets import GPU, GPU_CACHED, Targets
from steer_vllm.bench.workload import Workload
from steer_vllm.cli import app

LONGEST = 510
"""Seconds: a call of ten minutes, less what starts and ends it."""


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / "benchmarks" / "gpu.sh", *arguments], capture_output=True, text=True, check=False)


def wanted(root: Path) -> dict[str, int]:
    """Seconds by stage."""
    text = (root / "benchmarks" / "gpu.sh").read_text()
    (found,) = re.findall(r"^declare -A WANTS=\((.*?)\)", text, re.MULTILINE | re.DOTALL)
    return {name: int(seconds) for name, seconds in re.findall(r"\[([a-z-]+)\]=(\d+)", found)}


def calls(root: Path) -> list[list[str]]:
    """The stages of each call, as the help lists them."""
    shown = run(root, "--help").stdout.partition("Stages, in calls of at most ten minutes:\n")[2]
    return [line.split() for line in shown.splitlines()]


def commands(root: Path, *arguments: str) -> list[tuple[str, list[str]]]:
    """Stage and command of everything that would be run, of all stages."""
    stages = [stage for call in calls(root) for stage in call]
    done = run(root, *arguments, "--print", "nowhere", *stages)
    assert done.returncode == 0, done.stderr
    return [(stage, words) for stage, _, *words in map(shlex.split, done.stdout.splitlines())]


def test_bash_can_read_it(root: Path) -> None:
    assert subprocess.run(["bash", "-n", root / "benchmarks" / "gpu.sh"], check=False).returncode == 0


def test_the_calls_are_all_stages_and_short_enough(root: Path) -> None:
    seconds = wanted(root)
    assert sorted(stage for call in calls(root) for stage in call) == sorted(seconds)
    assert all(sum(seconds[stage] for stage in call) <= LONGEST for call in calls(root))
    assert run(root, "--help").returncode == 0


def test_mistakes_are_said(root: Path, tmp_path: Path) -> None:
    for arguments in ((), ("--no-such", str(tmp_path)), (str(tmp_path), "no-such-stage")):
        done = run(root, *arguments)
        assert done.returncode == 2
        assert "  smoke tests exact kernels\n" in done.stderr
    assert not list(tmp_path.iterdir())


class Parsed(Exception):
    """Raised where a benchmark would begin."""


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["gpu", "dry"])
def test_every_command_can_be_given(
    options: Sequence[str],
    root: Path,
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modules, scripts, their options and tests are there; nothing is run."""
    actual = argparse.ArgumentParser.parse_args

    def parse(self: Any, *given: Any) -> Any:
        raise Parsed(actual(self, *given))

    given = commands(root, *options)
    assert {stage for stage, _ in given} == set(wanted(root))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for stage, words in given:
        if words[:2] == ["-m", "pytest"]:
            path, _, test = words[-1].partition("::")
            name, _, case = test.partition("[")
            assert name in Path(path).read_text()
            assert not case or case in {f"{level}-{how}]" for level in (1, 2) for how in ("eager", "graphs")}
        elif words[:2] == ["-m", "steer_vllm.cli"]:
            assert plan(words[2:], monkeypatch)[1], stage
        else:
            path = Path(words[0])
            assert path.parent == root / "benchmarks"
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(Parsed) as parsed:
                script(path.stem).main()
            assert parsed.value.args[0].output == Path(f"{stage}.json"), "no folder's name is recorded"


def plan(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Workload, tuple[Case, ...]]:
    """What `steer-vllm` would measure."""

    def measure(workload: Workload, cases: tuple[Case, ...], *_: Any) -> None:
        raise Parsed(workload, cases)

    monkeypatch.setattr(command, "measure", measure)
    with pytest.raises(Parsed) as planned:
        typer.main.get_command(app)(list(words), standalone_mode=False)
    workload, cases = planned.value.args
    return workload, cases


def plans(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Workload, tuple[Case, ...]]]:
    found = {stage: words[2:] for stage, words in commands(root) if words[:2] == ["-m", "steer_vllm.cli"]}
    return {stage: plan(words, monkeypatch) for stage, words in found.items()}


@pytest.mark.parametrize("targets", [GPU, GPU_CACHED], ids=["prefix cache off", "on"])
def test_the_stages_fill_the_table(targets: Targets, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, and without prefix cache LoRA beside them; every cell by default, in one call."""
    filled: dict[str, set[tuple[str, str]]] = {}
    for stage, (workload, cases) in plans(root, monkeypatch).items():
        result = {"workload": {**vars(workload), "shape": vars(workload.shape)}, "hardware": {"device": "NVIDIA H200"}}
        if targets.covers(result):
            whole = [case for case in cases if not case.mode.distinct or case.distinct == case.load.requests]
            sizes = {(one.requests, one.prompt_tokens, one.output_tokens) for one in targets.loads}
            filled[stage] = {
                (case.load.name, case.mode.name)
                for case in whole
                if (case.load.requests, case.load.prompt_tokens, case.load.output_tokens) in sizes
            }
    modes = {*targets.least, *([LORA] if targets.lora else [])}
    everything = {(load.name, mode) for load in targets.loads for mode in modes}
    assert everything <= set().union(*filled.values())
    if targets is GPU:
        (default,) = run(root, "--print", "nowhere").stdout.splitlines()
        assert filled[default.split()[0]] >= {cell for cell in everything if cell[1] != LORA}
        thorough = [stage for call in calls(root)[2:5] for stage in call]
        assert everything <= set().union(*(filled[stage] for stage in thorough))


def test_the_engines_of_a_stage_fit_on_the_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, KV cache, adapters, and 3 GB for activations and graphs, of the H200's 141 GB."""
    for stage, (workload, cases) in plans(root, monkeypatch).items():
        engines = {case.mode.engine for case in cases}
        each = 2 * workload.shape.parameters + workload.kv_bytes(16) + 3e9
        adapters = 256 * 42e6 if LORA in engines else 0
        assert len(engines) * each + adapters < 141e9, stage
    assert MODES["lora"].engine == LORA


def test_a_failed_smoke_stops_the_rest(root: Path, tmp_path: Path) -> None:
    """With another tree's commands in the place of Python's: each stage would fail, the second is not begun."""
    tree = tmp_path / "tree"
    (tree / "benchmarks").mkdir(parents=True)
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / "benchmarks" / "gpu.sh").write_text((root / "benchmarks" / "gpu.sh").read_text())
    python = tree / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *steer_vllm.training*) echo {tree}/x;; *) echo no GPU; exit 3;; esac\n')
    python.chmod(0o755)
    given = ["bash", tree / "benchmarks" / "gpu.sh", tmp_path / "out", "smoke", "decode"]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU" in done.stdout, "the end of its log"
    assert re.search(r"^smoke +\d+ s  ended with 3$", done.stdout, re.MULTILINE)
    assert "decode" not in (tmp_path / "out" / "summary.txt").read_text()
