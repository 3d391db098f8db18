"""The result of a run: as JSON, as a table on the console, as a section of RESULTS.md.

Every number shown is computed from the samples that the JSON keeps. It runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from ..errors import BenchmarkInvalid
from . import record
from .modes import PLAIN, Mode
from .run import Outcome
from .spread import Ratio, Spread
from .workload import Workload

FORMAT = 1
COLUMNS = ("mode", "tokens/s", "step ms", "of plain", "95% interval", "quartiles", "first ms")


def assemble(workload: Workload, modes: Sequence[Mode], outcome: Outcome) -> dict[str, Any]:
    """Everything there is to know of a run, as JSON values."""
    samples = [asdict(sample) for sample in outcome.samples]
    return {
        **record.begin(
            "decode",
            FORMAT,
            {**asdict(workload), "parameters": workload.shape.parameters},
            outcome.facts[PLAIN]["device"],
        ),
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
    """A result of `steer-vllm bench` from its file. Errors: `BenchmarkInvalid` for anything else."""
    result = record.read(path)
    if result["format_version"] != FORMAT:
        raise BenchmarkInvalid(f"{path}: expected format {FORMAT}, got {result['format_version']!r}")
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
    load = result["workload"]
    return (
        f"Llama of {load['parameters'] / 1e6:.0f}M random weights, {load['dtype']}, "
        f"{'compiled' if load['compiled'] else 'eager'}; decode at batch {load['batch']}, {load['prompt_tokens']} "
        f"tokens in, {load['output_tokens']} out; {load['rounds']} rounds, seed {load['seed']}. {record.origin(result)}"
    )


def table(result: dict[str, Any]) -> Table:
    """For the console: without the quartiles, which are in the JSON."""
    kept = [i for i, column in enumerate(COLUMNS) if column != "quartiles"]
    columns = (Column(COLUMNS[i], no_wrap=True) for i in kept)
    shown = Table(*columns, title="decode throughput against plain vLLM", box=box.SIMPLE, pad_edge=False)
    for row in rows(result):
        shown.add_row(*(row[i] for i in kept))
    return shown


def markdown(result: dict[str, Any]) -> str:
    """The section of RESULTS.md, without its heading."""
    lines = [conditions(result), "", record.how(result), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(result)]
    lines += ["", *(f"- `{mode['name']}`: {mode['title']}" for mode in result["modes"]), ""]
    return "\n".join(lines)
