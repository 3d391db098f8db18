"""Pictures of an intervention: head scores, norms by layer. Knows numbers, no model and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..head_set import Head, HeadSet

matplotlib.use("Agg")


def plot_heads(head_set: HeadSet, chosen: Sequence[Head], path: Path) -> None:
    """A heat map of every head's score, the chosen heads framed."""
    layers, heads = head_set.base.num_layers, head_set.base.num_heads
    figure = Figure(figsize=(2.5 + 0.35 * heads, 2.0 + 0.35 * layers), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(head_set.scores, aspect="auto", cmap="viridis", origin="lower")
    for layer, head in chosen:
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axes.set(xlabel="head", ylabel="layer", title=f"{head_set.method}: {head_set.task} ({len(chosen)} heads chosen)")
    figure.colorbar(image, label="score")
    _save(figure, path)


def plot_norms(names: Sequence[str], norms: Sequence[float], title: str, path: Path) -> None:
    """A bar for each name."""
    figure = Figure(figsize=(2.0 + 0.4 * len(names), 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(names)), norms)
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 8 else 0)
    axes.set(ylabel="norm", title=title)
    _save(figure, path)


def row_norms(tensor: torch.Tensor) -> list[float]:
    """The norm of each row of [rows, ...]."""
    norms: list[float] = tensor.detach().float().flatten(1).norm(dim=1).tolist()
    return norms


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
