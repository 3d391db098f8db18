"""Writes RESULTS.md from the JSON files in results/: a section each, by the renderer of its benchmark.

Usage: python benchmarks/report.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import step

from steer_vllm.bench import record, result
from steer_vllm.errors import BenchmarkInvalid

HERE = Path(__file__).resolve().parent

RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "decode": result.markdown,
    "step": step.markdown,
}
"""By the key `benchmark` of a result: its section in Markdown, without the heading."""

HEAD = """\
# Results

Written by `python benchmarks/report.py` from the JSON files in `results/`, which hold every sample.

How `steer-vllm bench` measures: engines with and without the plugin run at the same time in processes of their own, and
one works at a time. A round runs every mode once, in random order; a turn begins when the other engines use no CPU. All
requests of the batch start together; timed are the decode steps in which all of them take part, by the engine core's
clock. A ratio is taken within each round; shown are its median over the rounds, the 95% bootstrap interval of that
median, and the quartiles. `first ms` is the time until every request has its first token. `control` is a second process
of plain vLLM: it says what two processes differ by without a cause.
"""


def markdown(results: Mapping[str, dict[str, Any]]) -> str:
    """RESULTS.md from results by file name. Errors: `BenchmarkInvalid` for a benchmark without a renderer."""
    parts = [HEAD]
    for name, one in results.items():
        if one["benchmark"] not in RENDERERS:
            raise BenchmarkInvalid(f"{name}: no renderer for {one['benchmark']!r}, only for {', '.join(RENDERERS)}")
        parts.append(f"## {name}\n\n{RENDERERS[one['benchmark']](one)}")
    return "\n".join(parts)


def main() -> None:
    results = {path.stem: record.read(path) for path in sorted((HERE / "results").glob("*.json"))}
    (HERE / "RESULTS.md").write_text(markdown(results))
    print(f"RESULTS.md: {len(results)} results")


if __name__ == "__main__":
    main()
