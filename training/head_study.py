"""Do selected heads matter? Step 2 of LoFiT on selected, random and another task's heads, over several seeds.

The experiment of Yin et al. 2024, section 5, on any model and task. Knows runs and tables; no method's details.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..artifact import write_whole
from ..errors import UserError
from ..head_set import HeadSet
from ..intervention import Card
from .data import read, title
from .evaluate import Evaluator
from .lofit import head_count, select_heads, tune_offsets
from .run import Job
from .settings import LoFiTSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One training of offsets. heads: where they are from; mc1: None where the task has no multiple choice."""

    heads: str
    count: int
    seed: int
    exact_match: float
    mc1: float | None


@dataclass(frozen=True)
class Study:
    """All trials. overlap: shared with the selected heads, by source and count, mean over seeds."""

    model: str
    task: str
    total_heads: int
    base: Trial
    trials: tuple[Trial, ...]
    overlap: dict[str, float]

    def markdown(self) -> str:
        """Mean and standard deviation of every source of heads."""
        lines = [
            f"Held-out accuracy on {self.task}, {self.model} ({self.total_heads} heads); mean and standard deviation "
            f"over {len({trial.seed for trial in self.trials})} seeds, in percent.",
            "",
            "| heads | number | exact match | MC1 | shared with selected |",
            "|---|---|---|---|---|",
            f"| none (base) | 0 | {_percent([self.base.exact_match])} | {_percent([self.base.mc1])} | |",
        ]
        for heads, count in dict.fromkeys((trial.heads, trial.count) for trial in self.trials):
            mine = [trial for trial in self.trials if (trial.heads, trial.count) == (heads, count)]
            shared = self.overlap.get(f"{heads} {count}")
            lines.append(
                f"| {heads} | {count} | {_percent([trial.exact_match for trial in mine])} "
                f"| {_percent([trial.mc1 for trial in mine])} | {'' if shared is None else f'{shared:.0%}'} |"
            )
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """head_study.md and head_study.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "head_study.md", (self.markdown() + "\n").encode())
        write_whole(folder / "head_study.json", json.dumps(asdict(self), indent=1).encode())


def study(
    job: Job, other_data: Path, settings: LoFiTSettings, seeds: Sequence[int], counts: Sequence[int] | None = None
) -> Study:
    """Select heads on the task and on the other one, draw random ones; tune and test each, for every seed and count.

    Errors: `UserError` as in training, and without held-out data.
    """
    if job.eval_data is None or not seeds:
        raise UserError("--eval-data and --seeds: held-out examples and at least one seed are needed")
    examples, others, held_out = read(job.data, job.task), read(other_data, None), read(job.eval_data, job.task)
    base = job.prepare(settings)
    encoder = base.encoder(settings)
    evaluator = Evaluator(base, encoder)
    data, other = encoder.examples(examples), encoder.examples(others)
    total = base.fingerprint.num_layers * base.fingerprint.num_heads
    asked = [settings.model_copy(update={"num_heads": count}) for count in counts] if counts else [settings]
    counts = [head_count(base.fingerprint, one) for one in asked]
    unsteered = evaluator.scores(held_out)
    trials: list[Trial] = []
    shared: dict[str, list[float]] = {}
    for seed in seeds:
        seeded = settings.model_copy(update={"seed": seed, "logging_steps": settings.steps(len(data))})
        selected = select_heads(base, data, seeded, job.title)[0]
        sources = {
            "selected": selected,
            "other task's": select_heads(base, other, seeded, title(other_data))[0],
            "random": HeadSet.random(base.fingerprint, seed),
        }
        for count in counts:
            for name, head_set in sources.items():
                offsets, _ = tune_offsets(base, data, seeded, head_set.top(count))
                scores = evaluator.scores(held_out, offsets.intervention(Card()))
                trials.append(Trial(name, count, seed, scores.exact_match, scores.mc1))
                _log.info("seed %d, %d %s heads: exact match %.1f%%", seed, count, name, 100 * scores.exact_match)
                if name != "selected":
                    shared.setdefault(f"{name} {count}", []).append(selected.overlap(head_set, count))
    return Study(
        model=base.name,
        task=job.title,
        total_heads=total,
        base=Trial("none", 0, 0, unsteered.exact_match, unsteered.mc1),
        trials=tuple(sorted(trials, key=lambda trial: (trial.count, list(sources).index(trial.heads), trial.seed))),
        overlap={name: statistics.mean(values) for name, values in shared.items()},
    )


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"
