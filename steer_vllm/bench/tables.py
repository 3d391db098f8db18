"""A result as a table on the console and as a section of RESULTS.md. Knows no way to measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table

from . import record, targets
from .modes import PLAIN
from .result import Row, check, rows
from .spread import between
from .workload import Load

COLUMNS = (
    "load",
    "mode",
    "distinct",
    "tokens/s",
    "step ms",
    "of plain",
    "95% interval",
    "quartiles",
    "target",
    "with outliers",
    "first ms",
)
_CONSOLE = ("mode", "distinct", "tokens/s", "of plain", "95% interval", "target")


def cells(result: Mapping[str, Any], row: Row) -> dict[str, str]:
    """By column."""
    ratio, least = row.ratio, targets.target(result, row)
    shown = {
        "load": row.load,
        "mode": row.mode,
        "distinct": str(row.distinct or ""),
        "tokens/s": f"{row.tokens_per_second.median:.0f}",
        "step ms": f"{row.step_ms.median:.2f}",
        "of plain": f"{ratio.median:.1%}",
        "95% interval": ratio.interval,
        "quartiles": between(ratio.q1, ratio.q3),
        "target": "" if least is None else f"{least:.1%}: {targets.verdict(ratio, least)}",
        "with outliers": f"{row.with_outliers.median:.1%}",
        "first ms": f"{row.first_tokens_ms.median:.0f}",
    }
    if row.mode == PLAIN:
        return {**shown, "of plain": "", "95% interval": "", "quartiles": "", "with outliers": ""}
    return shown


def conditions(result: Mapping[str, Any]) -> str:
    """What was run on what, in sentences."""
    work = result["workload"]
    return (
        f"Llama of {work['parameters'] / 1e6:.3g}M random weights, {work['dtype']}, "
        f"{'compiled' if work['compiled'] else 'eager'}, prefix cache {'on' if work['prefix_cache'] else 'off'}; "
        f"{_loads([Load(**load) for load in work['loads']])}; {_rounds(result)}{_share(result['share'])}, seed "
        f"{work['seed']}. {_engines(result['engines'])}{record.origin(result)}"
    )


def _share(steps: int | None) -> str:
    return "" if steps is None else f" in alternation with plain vLLM, {steps} steps each at a time"


def _rounds(result: Mapping[str, Any]) -> str:
    """How many; where time was short, loads differ in it."""
    done: dict[str, set[int]] = {}
    for sample in result["samples"]:
        done.setdefault(sample["load"], set()).add(sample["round"])
    least, most = min(map(len, done.values())), max(map(len, done.values()))
    return f"{least} to {most} rounds" if least != most else f"{most} round{'s' * (most != 1)}"


def _engines(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Which of vLLM's model runners, and which engines run otherwise than plain vLLM's."""

    def how(engine: Mapping[str, Any]) -> str:
        return f"model runner V{engine['model_runner']}, {'compiled' if engine['compiled'] else 'eager'}"

    others = {name: how(engine) for name, engine in facts.items() if how(engine) != how(facts[PLAIN])}
    but = "".join(f"; {name}: {text}" for name, text in others.items())
    return f"M{how(facts[PLAIN])[1:]}{but}. "


def _loads(loads: list[Load]) -> str:
    parts = []
    if decodes := [load for load in loads if load.decodes]:
        batches = ", ".join(str(load.requests) for load in decodes)
        parts.append(f"decode at batch {batches}, {decodes[0].prompt_tokens} tokens in, {decodes[0].output_tokens} out")
    if prefills := [load for load in loads if not load.decodes]:
        parts.append(f"prefill of {', '.join(f'{load.requests}x{load.prompt_tokens}' for load in prefills)} tokens")
    return "; ".join(parts)


def console(result: Mapping[str, Any]) -> list[Table]:
    """For the console, one for each load: what fits 80 columns; the rest is in the JSON."""
    shown: dict[str, Table] = {}
    for row in rows(result):
        if row.load not in shown:
            columns = (Column(name, no_wrap=True) for name in _CONSOLE)
            shown[row.load] = Table(*columns, title=f"{row.load}, against plain vLLM", box=None, padding=(0, 1, 0, 0))
        of = cells(result, row)
        shown[row.load].add_row(*(of[name] for name in _CONSOLE))
    return list(shown.values())


def markdown(result: Mapping[str, Any]) -> str:
    """The section of RESULTS.md, without its heading. Errors: `BenchmarkInvalid` for another format."""
    check(result)
    lines = [conditions(result), "", record.how(result), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells(result, row).values()) + " |" for row in rows(result)]
    lines += ["", *(f"- `{name}`: {mode['title']}" for name, mode in result["modes"].items()), ""]
    return "\n".join(lines)
