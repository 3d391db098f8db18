"""Throughput relative to plain vLLM against the number of distinct interventions, drawn from results.

Knows results of `steer-vllm bench`; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from steer_vllm.bench.result import Row, rows

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "steer-vllm"  # the same result, the same file


def curves(result: Mapping[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """By load and mode, the rows by number of distinct interventions, where there are at least two numbers."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows(result):
        if row.distinct:
            found.setdefault(row.load, {}).setdefault(row.mode, []).append(row)
    several = {load: {mode: of for mode, of in modes.items() if len(of) > 1} for load, modes in found.items()}
    return {load: modes for load, modes in several.items() if modes}


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """A panel for each load; False, and no file, where no mode was run with several numbers."""
    panels = curves(result)
    if not panels:
        return False
    figure = Figure(figsize=(1.5 + 3.5 * len(panels), 3.6), layout="constrained")
    for axes, (load, modes) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for mode, of in modes.items():
            counts = [row.distinct for row in of]
            axes.plot(counts, [100 * row.ratio.median for row in of], marker="o", markersize=4, label=mode)
            if all(row.ratio.sure for row in of):
                low, high = [100 * row.ratio.low for row in of], [100 * row.ratio.high for row in of]
                axes.fill_between(counts, low, high, alpha=0.2)
        numbers = sorted({row.distinct for of in modes.values() for row in of})
        axes.axhline(100, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set(title=load, xlabel="distinct in the batch")
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("% of plain vLLM's throughput")
    figure.savefig(path, metadata={"Date": None})
    return True
