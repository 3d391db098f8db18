"""The `steer-vllm` command: the outermost layer, which joins training, server and engine.

Everything but typer is imported by the command that needs it, so `--help` is quick and training needs no vLLM. What the
commands do is done elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import StartupRefused, SteerError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One base model in vLLM, many tuned behaviours: train them, serve them, let each request pick its own.",
)
artifact_app = typer.Typer(no_args_is_help=True, help="Look into artifact folders.")
app.add_typer(artifact_app, name="artifact")

_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def main() -> None:
    """The console command. Errors of ours become one message and exit status 1."""
    try:
        app()
    except SteerError as error:
        typer.echo(f"error: {error.message}", err=True)
        sys.exit(1)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="folder or Hub id of the base model; or `model` in --config")
    ] = None,
    vllm_flags: Annotated[list[str] | None, typer.Argument(help="after --: any flag of vLLM's serve")] = None,
    artifact: Annotated[
        list[str] | None, typer.Option("--artifact", help="NAME=PATH of an artifact to load; may be repeated")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file: model, store, limits, artifacts")] = None,
    store: Annotated[Path | None, typer.Option(help="folder below which /v1/load_intervention finds artifacts")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="guards every path but /health; better: STEER_VLLM_API_KEY")
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            help="file with the key for loading, unloading and what else is the operator's; or STEER_VLLM_ADMIN_KEY"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
    additive_rows: Annotated[
        int | None, typer.Option(help="offset edits that requests in flight can use at once")
    ] = None,
    low_rank_rows: Annotated[int | None, typer.Option(help="low-rank edits likewise")] = None,
    max_rank: Annotated[int | None, typer.Option(help="largest rank, of a composition too")] = None,
    per_request: Annotated[int | None, typer.Option(help="interventions of one request")] = None,
    max_scale: Annotated[float | None, typer.Option(help="largest |scale|")] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="GiB of host memory for loaded interventions, on each rank; default: 8")
    ] = None,
) -> None:
    """Serve a base model with interventions over vLLM's OpenAI API.

    Example: steer-vllm serve Qwen/Qwen3-8B --artifact honest=out/honest --port 8000 -- --max-model-len 8192
    """
    if model is not None and model.startswith("-"):  # no model before the --
        vllm_flags = [model, *(vllm_flags or [])]
        model = None
    _need("fastapi", "serve")
    _need("vllm", "cuda", "cpu")
    from .engine.serve import serve as run
    from .intervention import Intervention
    from .server.settings import Settings, Source

    settings = Settings.read(
        config,
        model=model,
        store=store,
        api_key=api_key,
        admin_key=_read_key(admin_key_file),
        artifacts=[Source.parse(text) for text in artifact or ()],
        limits={
            "additive_rows": additive_rows,
            "low_rank_rows": low_rank_rows,
            "max_rank": max_rank,
            "per_request": per_request,
            "max_scale": max_scale,
            "memory_gib": memory_gib,
        },
    )
    limits = settings.limits.engine
    for given in settings.artifacts:
        Intervention.load(given.source)  # what is damaged is said now and not when the engine is up
    run(settings.model, limits, settings, host=host, port=port, flags=vllm_flags or [])


@app.command(context_settings=_PASSED_ON)
def train(context: typer.Context) -> None:
    """Train an intervention; `steer-vllm train --help` lists the methods.

    Example: steer-vllm train lofit --model ./llama --data truth.train.jsonl --output-dir out/honest
    """
    _need("transformers", "train")
    from .training.commands import app as commands

    commands(args=context.args, prog_name="steer-vllm train")


@app.command(context_settings=_PASSED_ON)
def evaluate(context: typer.Context) -> None:
    """Measure a model on held-out examples, without and with artifacts.

    Example: steer-vllm evaluate --model ./llama --artifact out/honest --data truth.test.jsonl
    """
    _need("transformers", "train")
    from .training.commands import evaluate as command

    _alone(command, context)


@app.command()
def demo(
    output_dir: Annotated[Path | None, typer.Option(help="keep data, artifacts and the server's log here")] = None,
) -> None:
    """Train three interventions on the built-in model, serve them, ask in one mixed batch; a few minutes.

    Example: steer-vllm demo --output-dir out/demo
    """
    _need("transformers", "train")
    _need("openai", "serve")
    _need("vllm", "cuda", "cpu")
    from .demo.run import main as run

    run(output_dir)


@app.command(context_settings=_PASSED_ON)
def bench(context: typer.Context) -> None:
    """Measure what this build costs on this machine, against plain vLLM in the same run.

    Example: steer-vllm bench --quick --output bench.json
    """
    _need("vllm", "cuda", "cpu")
    from .bench.command import bench as command

    _alone(command, context)


Folder = Annotated[Path, typer.Argument(help="an artifact's folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@artifact_app.command()
def inspect(path: Folder, as_json: AsJson = False) -> None:
    """Show what an artifact is: method, sites, layers, positions, tensors, training, metrics.

    Example: steer-vllm artifact inspect out/honest
    """
    from .intervention import Intervention

    facts = _facts(Intervention.load(path))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("field", title=str(path))
    table.add_column("value", overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    Console().print(table)


@artifact_app.command()
def validate(
    path: Folder,
    model: Annotated[Path | None, typer.Option(help="folder of a base model that it must fit")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that an artifact can be served; exit status 1 and the field at fault where it cannot.

    Example: steer-vllm artifact validate out/honest --model ./llama
    """
    from .errors import ArtifactInvalid
    from .fingerprint import Fingerprint
    from .intervention import Intervention

    try:
        intervention = Intervention.load(path)
        if model is not None:
            intervention.check_base(Fingerprint.of(model), str(path))
    except ArtifactInvalid as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"valid": False, "code": error.code, "message": error.message}))
        raise typer.Exit(1) from None
    digest = intervention.digest
    typer.echo(json.dumps({"valid": True, "sha256": digest}) if as_json else f"{path}: valid, sha256 {digest}")


@app.command()
def doctor() -> None:
    """Say what is installed, whether it fits together, and how features of vLLM stand; exit status 1 for a problem.

    Example: steer-vllm doctor
    """
    from rich.console import Console
    from rich.table import Table

    from .engine import doctor as found

    console = Console()
    versions, states = Table("package", "version"), Table("feature of vLLM", "with interventions")
    for name, text in found.installed().items():
        versions.add_row(name, text)
    for feature, state in found.states():
        states.add_row(feature, state)
    console.print(versions, states)
    problems = found.problems(os.environ)
    for problem in problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    if problems:
        raise typer.Exit(1)
    console.print("no problem found")


def _alone(command: Callable[..., None], context: typer.Context) -> None:
    """A command whose options are declared where it is, given what was not read here."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(command)
    app(args=context.args, prog_name=context.command_path)


def _read_key(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        key = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise StartupRefused(f"--admin-key-file {file}: {error}") from error
    if not key:
        raise StartupRefused(f"--admin-key-file {file}: is empty")
    return key


def _need(module: str, *extras: str) -> None:
    if find_spec(module) is None:
        choices = " or ".join(f"'steer-vllm[{extra}]'" for extra in extras)
        raise StartupRefused(f"{module} is not installed: pip install {choices}")


def _facts(intervention: Any) -> dict[str, Any]:
    method, card = intervention.method, intervention.card
    return {
        "sha256": intervention.digest,
        "method": method.name,
        "settings": method.to_config(),
        "sites": [site.value for site in method.sites],
        "layers": list(method.layers),
        "positions": str(intervention.positions),
        "default_scale": intervention.default_scale,
        "base_model": card.base_model,
        "fingerprint": intervention.base.to_config(),
        "tensors": {name: f"{list(t.shape)} {str(t.dtype)[6:]}" for name, t in sorted(intervention.tensors.items())},
        "description": card.description,
        "prompt_format": card.prompt_format,
        "training": dict(card.training),
        "metrics": dict(card.metrics),
    }


if __name__ == "__main__":
    main()
