"""Whole runs: read the data, train, measure, write the artifact folder with its plots, log and card.

What `steer-vllm train` calls, and what a program calls to do the same. Knows no flags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import artifact
from ..errors import UserError
from ..head_set import HeadSet
from ..intervention import Card, Intervention
from ..methods import Direction
from . import data as examples_of
from .base import Base, load_base
from .card import model_card
from .data import read, read_pairs
from .direction import make_direction
from .evaluate import Evaluator
from .lofit import find_heads, head_count, offset_rate, select_heads, tune_offsets
from .loreft import tune_subspaces
from .plots import plot_heads, plot_norms, row_norms
from .settings import DirectionSettings, LoFiTSettings, LoReFTSettings, Settings
from .trainer import Log

LOG = "training_log.json"


@dataclass(frozen=True)
class Job:
    """What a run is about.

    model: folder or Hub id. task: the data's format, None to detect it. eval_data: held-out examples of the same task,
    measured before and after. base: the model, where it is loaded already.
    """

    model: str
    data: Path
    output_dir: Path
    task: str | None = None
    eval_data: Path | None = None
    base: Base | None = None

    @property
    def title(self) -> str:
        """What to call the task."""
        return examples_of.title(self.data, self.task)

    def prepare(self, settings: Settings) -> Base:
        """The base model. Errors: `UserError` for an output folder that holds something else."""
        folder = self.output_dir
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output-dir: {folder} is not a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / artifact.CONFIG).exists():
            raise UserError(f"--output-dir: {folder} holds something other than an artifact; give a new folder")
        if self.eval_data is not None:
            read(self.eval_data, self.task)  # its mistakes are better known before training than after
        return self.base or load_base(self.model, settings.dtype)


def train_lofit(job: Job, settings: LoFiTSettings, head_set: str | None = None) -> Intervention:
    """Both steps of LoFiT. head_set: a path or `random` takes the place of step 1.

    Errors: `UserError` and its kin for data, settings or a head set that do not fit.
    """
    examples = read(job.data, job.task)
    base = job.prepare(settings)
    count = head_count(base.fingerprint, settings)
    encoded = base.encoder(settings).examples(examples)
    logs: dict[str, Log] = {}
    if head_set is None:
        scores, logs["scaling"] = select_heads(base, encoded, settings, job.title)
    else:
        scores = find_heads(head_set, base.fingerprint, settings.seed)
    heads = scores.top(count)
    settings = settings.model_copy(update={"offset_lr": offset_rate(base, encoded, settings, heads)})
    offsets, logs["offsets"] = tune_offsets(base, encoded, settings, heads)
    trained = offsets.intervention(_card(job, base, settings, "LoFiT", head_set=head_set or "step 1"))
    names = [f"{layer}.{head}" for layer, head in heads]
    norms = row_norms(trained.tensors["offsets"])
    pictures = _Pictures(job.output_dir)
    finished = _finish(job, base, settings, trained, logs, pictures, scores)
    plot_heads(scores, heads, pictures.add("Head scores, chosen heads framed", "heads"))
    plot_norms(names, norms, "offset norms, layer.head", pictures.add("Offset norms", "offsets"))
    _write_card(job, finished, pictures)
    return finished


def train_loreft(job: Job, settings: LoReFTSettings) -> Intervention:
    """LoReFT. Errors: `UserError` and its kin for data or settings that do not fit."""
    examples = read(job.data, job.task)
    base = job.prepare(settings)
    encoded = base.encoder(settings).examples(examples)
    subspaces, log = tune_subspaces(base, encoded, settings)
    trained = subspaces.intervention(_card(job, base, settings, "LoReFT"))
    pictures = _Pictures(job.output_dir)
    finished = _finish(job, base, settings, trained, {"edits": log}, pictures)
    change = (trained.tensors["weight"] - trained.tensors["rotate"]).transpose(0, 1)  # [layers, parts, rank, hidden]
    layers = [str(layer) for layer in trained.method.layers]
    plot_norms(layers, row_norms(change), "|W - R| by layer", pictures.add("Edit norms", "edits"))
    _write_card(job, finished, pictures)
    return finished


def train_direction(job: Job, settings: DirectionSettings) -> Intervention:
    """A mean difference. Errors: `UserError` and its kin for data or settings that do not fit."""
    pairs = read_pairs(job.data, job.task, settings.separator)
    base = job.prepare(settings)
    trained = make_direction(base, pairs, settings, _card(job, base, settings, "Mean difference", pairs=len(pairs)))
    trained.check("direction")
    pictures = _Pictures(job.output_dir)
    finished = _finish(job, base, settings, trained, {}, pictures)
    assert isinstance(trained.method, Direction)
    layers = [str(layer) for layer in trained.method.layers]
    norms = row_norms(trained.tensors["directions"])
    plot_norms(layers, norms, "direction norms by layer", pictures.add("Direction norms", "directions"))
    _write_card(job, finished, pictures)
    return finished


class _Pictures:
    """Titles and files of the artifact's plots."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}

    def add(self, title: str, name: str) -> Path:
        self.files[title] = f"plots/{name}.png"
        return self.folder / self.files[title]


def _card(job: Job, base: Base, settings: Settings, method: str, **more: Any) -> Card:
    return Card(
        base_model=base.name,
        description=f"{method} for {base.name}, learnt from {job.data.name}.",
        prompt_format=examples_of.prompt_format(job.data, job.task) if method != "Mean difference" else None,
        training={"data": job.data.name, **settings.model_dump(mode="json"), **more},
    )


def _finish(
    job: Job,
    base: Base,
    settings: Settings,
    trained: Intervention,
    logs: Mapping[str, Log],
    pictures: _Pictures,
    head_set: HeadSet | None = None,
) -> Intervention:
    """Measure and save: log and head set first, the artifact's config last, so that what is there is complete."""
    metrics: dict[str, Any] = {f"loss_{name}_{when}": loss for name, log in logs.items() for when, loss in _losses(log)}
    if job.eval_data is not None:
        metrics |= measure(base, settings, read(job.eval_data, job.task), job.eval_data.name, trained)
    finished = replace(trained, card=replace(trained.card, metrics=metrics))
    pictures.folder.mkdir(parents=True, exist_ok=True)
    if head_set is not None:
        head_set.save(job.output_dir)
    artifact.write_whole(job.output_dir / LOG, json.dumps(logs, indent=1).encode())
    finished.save(job.output_dir)
    return finished


def measure(
    base: Base, settings: Settings, examples: Sequence[examples_of.Example], name: str, trained: Intervention
) -> dict[str, Any]:
    """Scores of the base and of the steered model."""
    evaluator = Evaluator(base, base.encoder(settings))
    return {
        "eval_data": name,
        "base": evaluator.scores(examples).to_dict(),
        "steered": evaluator.scores(examples, trained).to_dict(),
    }


def _losses(log: Log) -> list[tuple[str, float]]:
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return [("first", losses[0]), ("last", losses[-1])]


def _write_card(job: Job, finished: Intervention, pictures: _Pictures) -> None:
    text = model_card(job.output_dir.resolve().name, finished, pictures.files)
    artifact.write_whole(job.output_dir / "README.md", text.encode())
