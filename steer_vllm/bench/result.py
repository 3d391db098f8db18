"""The result of a run: as JSON, as a table on the console, and, several of them, as RESULTS.md.

Every number shown is computed from the samples that the JSON keeps. It runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from ..errors import BenchmarkInvalid
from . import machine
from .modes import PLAIN, Mode
from .run import Outcome
from .spread import Ratio, Spread
from .workload import Workload

FORMAT = 1
COLUMNS = ("mode", "tokens/s", "step ms", "of plain", "95% interval", "quartiles", "first ms")


def assemble(workload: Workload, modes: Sequence[Mode], outcome: Outcome, command: str) -> dict[str, Any]:
    """Everything there is to know of a run, as JSON values."""
    samples = [asdict(sample) for sample in outcome.samples]
    return {
        "benchmark": "decode",
        "format_version": FORMAT,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": machine.commit(),
        "hardware": {**machine.hardware(), "device": outcome.facts[PLAIN]["device"]},
        "versions": machine.versions(),
        "workload": {**asdict(workload), "parameters": workload.shape.parameters},
        "engines": outcome.facts,
        "modes": [
            {**asdict(mode), "same_as_plain": outcome.same_as_plain[mode.name], **summary(samples, mode.name)}
            for mode in modes
        ],
        "samples": samples,
    }


def summary(samples: Sequence[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Medians and quartiles of a mode, and its ratio to plain in tokens per second."""

    def values(name: str, of: str) -> list[float]:
        return [sample[name] for sample in sorted(samples, key=lambda s: s["round"]) if sample["mode"] == of]

    measured = {
        name: asdict(Spread.of(values(name, mode))) for name in ("tokens_per_second", "step_ms", "first_tokens_ms")
    }
    rate = "tokens_per_second"
    return {**measured, "ratio": asdict(Ratio.paired(values(rate, mode), values(rate, PLAIN)))}


def read(path: Path) -> dict[str, Any]:
    """A result from its file. Errors: `BenchmarkInvalid` for anything else."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchmarkInvalid(f"{path}: {error}") from error
    if not isinstance(result, dict) or result.get("format_version") != FORMAT:
        raise BenchmarkInvalid(f"{path}: expected the result of a benchmark, format {FORMAT}")
    return result


def rows(result: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """One row per mode, as `COLUMNS`."""
    for mode in result["modes"]:
        again = summary(result["samples"], mode["name"])
        ratio = again["ratio"]
        compared = (f"{ratio['median']:.1%}", _between(ratio["low"], ratio["high"]), _between(ratio["q1"], ratio["q3"]))
        yield (
            mode["name"],
            f"{again['tokens_per_second']['median']:.0f}",
            f"{again['step_ms']['median']:.2f}",
            *(("", "", "") if mode["name"] == PLAIN else compared),
            f"{again['first_tokens_ms']['median']:.0f}",
        )


def _between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {high:.1%}"


def conditions(result: dict[str, Any]) -> str:
    """What was run on what, in a sentence."""
    load, hardware, versions = result["workload"], result["hardware"], result["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "python")
    return (
        f"Llama of {load['parameters'] / 1e6:.0f}M random weights, {load['dtype']}, "
        f"{'compiled' if load['compiled'] else 'eager'}; decode at batch {load['batch']}, {load['prompt_tokens']} "
        f"tokens in, {load['output_tokens']} out; {load['rounds']} rounds, seed {load['seed']}. {hardware['cpu']}, "
        f"{hardware['cores']} cores, {hardware['memory_gib']} GiB, device {hardware['device'] or 'CPU'}; {packages}, "
        f"Python {versions['python']}."
    )


def table(result: dict[str, Any]) -> Table:
    """For the console: without the quartiles, which are in the JSON."""
    kept = [i for i, column in enumerate(COLUMNS) if column != "quartiles"]
    columns = (Column(COLUMNS[i], no_wrap=True) for i in kept)
    shown = Table(*columns, title="decode throughput against plain vLLM", box=box.SIMPLE, pad_edge=False)
    for row in rows(result):
        shown.add_row(*(row[i] for i in kept))
    return shown


_HEAD = """\
# Results

Written by `python benchmarks/report.py` from the JSON files in `results/`, which hold every sample.

How it is measured: engines with and without the plugin run at the same time in processes of their own, and one works
at a time. A round runs every mode once, in random order; a turn begins when the other engines use no CPU. All requests
of the batch start together; timed are the decode steps in which all of them take part, by the engine core's clock. A
ratio is taken within each round; shown are its median over the rounds, the 95% bootstrap interval of that median, and
the quartiles. `first ms` is the time until every request has its first token. `control` is a second process of plain
vLLM: it says what two processes differ by without a cause.
"""


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """RESULTS.md from results by file name."""
    parts = [_HEAD]
    for name, result in results.items():
        lines = [f"## {name}", "", conditions(result), ""]
        lines += [f"{result['time'][:10]}, commit {result['commit'] or 'unknown'}: `{result['command']}`", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(result)]
        lines += ["", *(f"- `{mode['name']}`: {mode['title']}" for mode in result["modes"]), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)
