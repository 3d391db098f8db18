"""Writes RESULTS.md from the JSON files in results/: a section each, by the renderer of its benchmark.

Usage: python benchmarks/report.py
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import curves
import http_path
import kernels
import loading
import ops
import prefix
import serving
import step
from harness import target

import training
from steer_vllm.bench import record, tables, targets
from steer_vllm.errors import BenchmarkInvalid

HERE = Path(__file__).resolve().parent

RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "kernels": kernels.markdown,
    "offline": tables.markdown,
    "ops": ops.markdown,
    "http": http_path.markdown,
    "loading": loading.markdown,
    "prefix": prefix.markdown,
    "serving": serving.markdown,
    "step": step.markdown,
    "training": training.markdown,
}
"""By the key `benchmark` of a result: its section in Markdown, without the heading."""

TARGETS = {"step": step.TARGETS, "loading": loading.TARGETS, "prefix": prefix.TARGETS, "http": http_path.TARGETS}
"""By the key `benchmark` too; those of `steer-vllm bench` are in `steer_vllm.bench.targets`."""

HEAD = """\
# Results

Written by `python benchmarks/report.py` from the JSON files in `results/`, which hold the samples. In the tables of
targets stand medians and their 95% bootstrap intervals; a target is open while the interval lies on both sides of it,
one of throughput also where there were fewer than five rounds. Of several results, those of throughput count with all
their rounds, since two processes differ by a little without a cause; of others the newest counts.

How `steer-vllm bench` measures: engines with and without the plugin run at the same time in processes of their own, and
one works at a time. A round runs every mode once, in random order; a turn begins when the other engines use no CPU. All
requests of the batch start together; timed are the decode steps in which all of them take part, by the engine core's
clock, or, of a prefill, the time from the call to the last first token. A ratio is taken within each round; shown are
its median over the rounds (not the quotient of the medians beside it, which also have in them what the machine did
between rounds), the 95% bootstrap interval of that median, and the quartiles. `distinct` is the number of different
interventions in the batch, `first ms` the time until every request has its first token. `control` is a second process
of plain vLLM: it says what two processes differ by without a cause.

On CPUs core and worker are in one process, so that an engine which waits uses no core, and nothing that the plugin does
is hidden behind the core's work. There every mode decodes in alternation with plain vLLM: eight steps of the one, eight
of the other, the first of each eight not counted. What else a shared machine does happens to both, but not to the same
steps: a step that is interrupted takes several times as long. So the ratio is there that of the median steps; `with
outliers` is the ratio by all steps.
"""


def markdown(results: Mapping[str, dict[str, Any]], drawn: Collection[str] = ()) -> str:
    """RESULTS.md from results by file name. drawn: those of which there is a picture.

    Errors: `BenchmarkInvalid` for a benchmark without a renderer.
    """
    parts = [HEAD, targets.overview(offline(results).values()), target.overview(TARGETS, results.values())]
    for name, one in results.items():
        if one["benchmark"] not in RENDERERS:
            raise BenchmarkInvalid(f"{name}: no renderer for {one['benchmark']!r}, only for {', '.join(RENDERERS)}")
        picture = f"\n![{name}: throughput by distinct interventions]({name}.svg)\n" if name in drawn else ""
        parts.append(f"## {name}\n\n{RENDERERS[one['benchmark']](one)}{picture}")
    return "\n".join(parts)


def offline(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of `steer-vllm bench`."""
    return {name: one for name, one in results.items() if RENDERERS.get(one["benchmark"]) is tables.markdown}


def main() -> None:
    results = {path.stem: record.read(path) for path in sorted((HERE / "results").glob("*.json"))}
    drawn = [name for name, one in offline(results).items() if curves.draw(one, HERE / f"{name}.svg")]
    (HERE / "RESULTS.md").write_text(markdown(results, drawn))
    print(f"RESULTS.md: {len(results)} results, {len(drawn)} pictures")


if __name__ == "__main__":
    main()
