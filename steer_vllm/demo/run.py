"""The main job from end to end on the built-in model: train three interventions, serve them, ask in one mixed batch.

What a user would do with the command line and the openai client, in one command. It draws no conclusions: it prints the
answers side by side and the accuracy on held-out questions.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..fingerprint import Fingerprint
from ..intervention import Intervention
from ..training.base import Base, load_base
from ..training.run import Job, train_direction, train_lofit, train_loreft
from ..training.settings import DirectionSettings, LoFiTSettings, LoReFTSettings, read_settings
from . import MODEL_PATH
from .ask import Question, ask
from .serving import serving
from .tasks import write_tasks

BASE = "demo"
"""The name under which the model is served."""

_FLAGS = [f"--served-model-name={BASE}", "--dtype=float32", "--max-model-len=256", "--enforce-eager"]
_CPU_FLAGS = ["--gpu-memory-utilization=0.1"]  # on a CPU: the share of its memory
_CPU_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
_QUIET = {"logging_steps": 120}


@dataclass(frozen=True)
class Behaviour:
    """One intervention of the demo: its name, the task it learns, and what it is called in the table."""

    name: str
    task: str
    title: str
    train: Callable[[Job], Intervention]
    matters: Callable[[str], str] = str.casefold


BEHAVIOURS = (
    Behaviour(
        "honest", "truthfulness", "LoFiT", lambda job: train_lofit(job, read_settings(LoFiTSettings, flags=_QUIET))
    ),
    Behaviour("edited", "edits", "LoReFT", lambda job: train_loreft(job, read_settings(LoReFTSettings, flags=_QUIET))),
    Behaviour(
        "loud", "style", "direction", lambda job: train_direction(job, read_settings(DirectionSettings)), matters=str
    ),
)
"""The style is in the letters' case, which elsewhere does not matter."""

COMPOSED = ({"name": "honest", "scale": 0.9}, {"name": "loud", "scale": 1.1})


@dataclass(frozen=True)
class Item:
    """A held-out question and what counts as right, from the task's file."""

    prompt: str
    answers: frozenset[str]

    def is_met_by(self, text: str, matters: Callable[[str], str]) -> bool:
        return matters(text.split("\n")[0].strip()) in {matters(answer) for answer in self.answers}


def main(folder: Path | None = None, model: Path = MODEL_PATH) -> None:
    """Run it all. folder: where data and artifacts are kept; a temporary one by default."""
    console = Console()
    began = time.monotonic()
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steer-vllm-demo-")))
        data = folder / "data"
        write_tasks(data)
        console.rule("train")
        artifacts = _train(model, folder, data, console)
        console.rule("serve")
        if not torch.cuda.is_available():
            os.environ.update({name: os.environ.get(name, value) for name, value in _CPU_VARIABLES.items()})
        flags = _FLAGS if torch.cuda.is_available() else [*_FLAGS, *_CPU_FLAGS]
        with console.status("vLLM starts"):
            url = stack.enter_context(serving(model, artifacts, flags, folder / "server.log"))
        console.print(f"{url} serves {BASE} and {', '.join(f'{BASE}:{name}' for name in artifacts)}")
        console.rule("ask")
        _ask(url, data, console)
        console.rule("stop")
    console.print(f"done in {time.monotonic() - began:.0f} s")


def _train(model: Path, folder: Path, data: Path, console: Console) -> dict[str, Path]:
    """Train, then read back what was written, as a server would."""
    torch.set_num_threads(1)  # a model this small is faster on one thread
    base: Base = load_base(str(model), "float32")
    served = Fingerprint.of(model)
    artifacts = {}
    for behaviour in BEHAVIOURS:
        began = time.monotonic()
        output = folder / behaviour.name
        behaviour.train(Job(str(model), data / f"{behaviour.task}.train.jsonl", output, base=base))
        intervention = Intervention.load(output)
        intervention.check_base(served, str(output))
        count = sum(tensor.numel() for tensor in intervention.tensors.values())
        console.print(
            f"{behaviour.name}: {behaviour.title}, {count} numbers learnt from {behaviour.task} in "
            f"{time.monotonic() - began:.0f} s, valid, sha256 {intervention.digest[:12]}"
        )
        artifacts[behaviour.name] = output
    return artifacts


def _ask(url: str, data: Path, console: Console) -> None:
    """One batch of everything: a few questions to everyone, and every held-out question before and after."""
    items = {behaviour.task: _read(data / f"{behaviour.task}.test.jsonl") for behaviour in BEHAVIOURS}
    shown = [items[behaviour.task][i].prompt for behaviour in BEHAVIOURS for i in range(2)]
    columns = _columns()
    questions = [_to(voice, prompt) for prompt in shown for voice in columns.values()]
    for behaviour in BEHAVIOURS:
        for model in (BASE, f"{BASE}:{behaviour.name}"):
            questions += [Question(item.prompt, model) for item in items[behaviour.task]]
    began = time.monotonic()
    with console.status(f"{len(questions)} requests"):
        answers = iter(ask(url, questions))
    seconds = time.monotonic() - began
    console.print(_side_by_side(shown, columns, [next(answers) for _ in shown for _ in columns]))
    table = Table("held-out questions", "count", f"right: {BASE}", "right: with it", title="before and after")
    for behaviour in BEHAVIOURS:
        asked = items[behaviour.task]
        before, after = (
            sum(item.is_met_by(next(answers), behaviour.matters) for item in asked) / len(asked) for _ in range(2)
        )
        table.add_row(f"{behaviour.task} ({BASE}:{behaviour.name})", str(len(asked)), f"{before:.0%}", f"{after:.0%}")
    console.print(table)
    console.print(f"{len(questions)} requests, mixed in one batch, answered in {seconds:.1f} s")


def _columns() -> dict[str, Question]:
    """Column titles, and whom the questions of each go to."""
    composed = " + ".join(f"{part['scale']} {part['name']}" for part in COMPOSED)
    return {
        BASE: Question("", BASE),
        **{f"{BASE}:{behaviour.name}": Question("", f"{BASE}:{behaviour.name}") for behaviour in BEHAVIOURS},
        f"{composed} (streamed)": Question("", BASE, COMPOSED, stream=True),
    }


def _to(voice: Question, prompt: str) -> Question:
    return Question(prompt, voice.model, voice.interventions, voice.stream)


def _side_by_side(prompts: Sequence[str], columns: Mapping[str, Question], answers: Sequence[str]) -> Table:
    table = Table("question", *columns, title="the same questions, in one batch", show_lines=True)
    for row, prompt in enumerate(prompts):
        table.add_row(prompt, *answers[row * len(columns) : (row + 1) * len(columns)])
    return table


def _read(file: Path) -> list[Item]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Item(row["prompt"], frozenset(row.get("correct") or [row["completion"]])) for row in rows]
