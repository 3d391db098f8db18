"""What every benchmark's JSON has in common: which benchmark, when, from which commit and command, on what machine.

Knows no benchmark's numbers.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from ..errors import BenchmarkInvalid
from . import machine

WITHIN = "--within"
"""The option that limits the time of a run."""


def begin(benchmark: str, version: int, workload: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """The keys with which a result begins. version: of this benchmark's own keys, which follow.

    device: the accelerator's name; "cpu" or None without one.
    """
    return {
        "benchmark": benchmark,
        "format_version": version,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(sys.argv, getattr(sys.modules["__main__"], "__spec__", None)),
        "commit": machine.commit(),
        "hardware": {**machine.hardware(), "device": device},
        "versions": machine.versions(),
        "workload": dict(workload),
    }


def check_output(path: Path) -> None:
    """Errors: `BenchmarkInvalid` for a file that could not be written when all is measured."""
    if path.is_dir():
        raise BenchmarkInvalid(f"{path} is a folder, expected a file for the results")
    if not path.absolute().parent.is_dir():
        raise BenchmarkInvalid(f"{path.absolute().parent} does not exist, expected a folder for the results")


def command(arguments: list[str], run_as: ModuleSpec | None) -> str:
    """A command line that can be given again: a module or script by its name here, an installed command by its own.

    `WITHIN` is left out: how much time there was is no part of what was asked for. run_as: the module that `python -m`
    runs, which `__main__` knows.
    """
    program = Path(arguments[0]).absolute()
    if run_as is not None:
        start = ["python", "-m", run_as.name]
    elif program.parent.name == "benchmarks":
        start = ["python", f"benchmarks/{program.name}"]
    else:
        start = [program.name]
    return shlex.join([*start, *_without_limit(arguments[1:])])


def _without_limit(arguments: list[str]) -> list[str]:
    at = {number for number, one in enumerate(arguments) if one == WITHIN}
    return [
        one
        for number, one in enumerate(arguments)
        if number not in at and number - 1 not in at and not one.startswith(f"{WITHIN}=")
    ]


def read(path: Path) -> dict[str, Any]:
    """A result from its file. Errors: `BenchmarkInvalid` for anything else."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchmarkInvalid(f"{path}: {error}") from error
    if not isinstance(result, dict) or not {"benchmark", "format_version"} <= set(result):
        raise BenchmarkInvalid(f"{path}: expected the result of a benchmark")
    return result


def origin(result: Mapping[str, Any]) -> str:
    """On what machine and with what packages, in a sentence."""
    hardware, versions = result["hardware"], result["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "python")
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB, "
        f"device {hardware['device'] or 'CPU'}; {packages}, Python {versions['python']}."
    )


def how(result: Mapping[str, Any]) -> str:
    """When, from which commit, by which command: a line of Markdown."""
    return f"{result['time'][:10]}, commit {result['commit'] or 'unknown'}: `{result['command']}`"
