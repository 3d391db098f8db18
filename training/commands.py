"""`steer-vllm train ...` and `steer-vllm evaluate`: what a user types, and what is printed.

`app` holds the training commands, `evaluate` is a command of its own. Light to import: torch and transformers come with
the first run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from ..errors import UserError
from .flags import plain, with_settings
from .settings import DirectionSettings, LoFiTSettings, LoReFTSettings, Settings

if TYPE_CHECKING:
    from ..intervention import Intervention
    from .run import Job

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train interventions; heads-compare and head-study look into LoFiT's.",
)

Model = Annotated[str, typer.Option("--model", help="folder or Hub id of the base model")]
Data = Annotated[Path, typer.Option("--data", help="examples: .jsonl, TruthfulQA .csv, MQuAKE .jsonl, CLUTRR .json")]
Output = Annotated[Path, typer.Option("--output-dir", help="folder of the new artifact")]
Task = Annotated[
    str | None,
    typer.Option("--task", help="format of the data: jsonl, truthfulqa, mquake, clutrr; default: by the file"),
]
EvalData = Annotated[
    Path | None,
    typer.Option("--eval-data", help="held-out examples, measured with and without the intervention"),
]
HeadSource = Annotated[
    str | None,
    typer.Option("--head-set", help="take the heads from this artifact or head_set.json, or `random`; skips step 1"),
]


@app.command()
@with_settings(LoFiTSettings)
def lofit(
    model: Model,
    data: Data,
    output_dir: Output,
    settings: LoFiTSettings,
    task: Task = None,
    eval_data: EvalData = None,
    head_set: HeadSource = None,
) -> None:
    """LoFiT: select attention heads, then learn an offset for each.

    Example: steer-vllm train lofit --model ./llama --data truth.train.jsonl --output-dir out/honest --num-heads 32
    """
    from .run import train_lofit

    _report(output_dir, train_lofit(_job(model, data, output_dir, task, eval_data), settings, head_set))


@app.command()
@with_settings(LoReFTSettings)
def loreft(
    model: Model,
    data: Data,
    output_dir: Output,
    settings: LoReFTSettings,
    task: Task = None,
    eval_data: EvalData = None,
) -> None:
    """LoReFT: learn a low-rank edit of the residual stream at the prompt's first and last tokens.

    Example: steer-vllm train loreft --model ./llama --data edits.train.jsonl --output-dir out/edits --rank 4
    """
    from .run import train_loreft

    _report(output_dir, train_loreft(_job(model, data, output_dir, task, eval_data), settings))


@app.command()
@with_settings(DirectionSettings)
def direction(
    model: Model,
    data: Data,
    output_dir: Output,
    settings: DirectionSettings,
    task: Task = None,
    eval_data: EvalData = None,
) -> None:
    """Mean difference (CAA): add what separates `positive` from `negative` texts.

    Example: steer-vllm train direction --model ./llama --data style.train.jsonl --output-dir out/cheerful --layers 8
    """
    from .run import train_direction

    _report(output_dir, train_direction(_job(model, data, output_dir, task, eval_data), settings))


@app.command("heads-compare")
@plain
def heads_compare(
    first: Annotated[Path, typer.Argument(help="an artifact's folder or a head_set.json")],
    second: Annotated[Path, typer.Argument(help="another one, of the same base model")],
    num_heads: Annotated[int | None, typer.Option(min=1, help="heads of each; default 10%")] = None,
) -> None:
    """Share of their best heads that two head sets have in common.

    Example: steer-vllm train heads-compare out/honest out/edits --num-heads 32
    """
    from ..head_set import HeadSet

    one, other = HeadSet.load(first), HeadSet.load(second)
    total = one.base.num_layers * one.base.num_heads
    count = num_heads or max(1, total // 10)
    if count > total:
        raise UserError(f"--num-heads: {count}, the model has {total}")
    shared = one.overlap(other, count)
    common = sorted(set(one.top(count)) & set(other.top(count)))
    names = ", ".join(f"{layer}.{head}" for layer, head in common) or "none"
    typer.echo(f"{one.task} and {other.task}: {shared:.0%} of the best {count} heads in common (layer.head: {names})")
    typer.echo(f"by chance: {count / total:.0%}")


@app.command("head-study")
@with_settings(LoFiTSettings)
def head_study(
    model: Model,
    data: Data,
    eval_data: Annotated[Path, typer.Option("--eval-data", help="held-out examples of the same task")],
    other_data: Annotated[Path, typer.Option("--other-data", help="another task, whose heads are tried on this one")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="folder for head_study.md and .json")],
    settings: LoFiTSettings,
    task: Task = None,
    seeds: Annotated[str, typer.Option(help="one run of everything for each")] = "1,2,3",
    counts: Annotated[
        str | None,
        typer.Option(help="numbers of heads to try, such as 1,4; default --num-heads"),
    ] = None,
) -> None:
    """Selected heads against random ones and another task's: held-out accuracy with its spread over seeds.

    Example: steer-vllm train head-study --model ./llama --data truth.train.jsonl --eval-data truth.test.jsonl
    --other-data edits.train.jsonl --output-dir out/study
    """
    from .head_study import study

    _logging()
    found = study(
        _job(model, data, output_dir, task, eval_data),
        other_data,
        settings,
        seeds=_numbers(seeds, "--seeds"),
        counts=_numbers(counts, "--counts") if counts else None,
    )
    found.save(output_dir)
    typer.echo(found.markdown())


@plain
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="examples to ask, as for training")],
    artifact: Annotated[
        list[Path] | None,
        typer.Option("--artifact", help="artifact folder; several act together"),
    ] = None,
    task: Task = None,
    scale: Annotated[float | None, typer.Option(help="default: the artifact's")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts of one forward pass")] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="in exact match, as LoFiT's code does")] = False,
    output: Annotated[Path | None, typer.Option(help="write the scores to this JSON file")] = None,
) -> None:
    """Exact match, MC1 and MC2 of a model on held-out examples, without and with artifacts.

    Example: steer-vllm evaluate --model ./llama --artifact out/honest --data truth.test.jsonl
    """
    from ..intervention import Intervention
    from .base import load_base
    from .data import read
    from .evaluate import Evaluator

    _logging()
    settings = _checked(dtype)
    examples = read(data, task)
    loaded = [Intervention.load(folder) for folder in artifact or ()]
    base = load_base(model, settings.dtype)
    for folder, item in zip(artifact or (), loaded, strict=True):
        difference = base.fingerprint.difference(item.base)
        if difference:
            raise UserError(f"{folder}: made for another base model: {difference}")
    evaluator = Evaluator(base, base.encoder(settings), batch_size, ignore_case=ignore_case)
    results = {"base": evaluator.scores(examples).to_dict()}
    if loaded:
        asked = [(item, item.default_scale if scale is None else scale, item.positions) for item in loaded]
        results["steered"] = evaluator.scores(examples, *asked).to_dict()
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"data": data.name, **results}, indent=2) + "\n")
    Console().print(_table(results))


def _checked(dtype: str) -> Settings:
    from .settings import read_settings

    return read_settings(Settings, flags={"dtype": dtype})


def _job(model: str, data: Path, output_dir: Path, task: str | None, eval_data: Path | None) -> Job:
    from .run import Job

    _logging()
    return Job(model, data, output_dir, task, eval_data)


def _report(folder: Path, trained: Intervention) -> None:
    from .card import describe

    typer.echo(f"{folder}: {describe(trained)}")
    metrics = trained.card.metrics
    if "steered" in metrics:
        Console().print(_table({name: metrics[name] for name in ("base", "steered")}))


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("", *results)
    for name in next(iter(results.values())):
        table.add_row(name, *(f"{scores[name]:.4g}" for scores in results.values()))
    return table


def _numbers(text: str, flag: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag}: {text!r} is not a list of whole numbers such as 1,2,3") from error
    if min(numbers) < 1:
        raise UserError(f"{flag}: {text!r}: numbers from 1 up are needed")
    return numbers


def _logging() -> None:
    """Our own notes and warnings on stderr, as plain lines."""
    log = logging.getLogger("steer_vllm")
    if not log.handlers:
        log.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_level=False, show_path=False))
    log.setLevel(logging.INFO)
