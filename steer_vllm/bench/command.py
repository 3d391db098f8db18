"""`steer-vllm bench`: what its options mean; choose the work, measure, print, keep."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import BenchmarkInvalid
from . import options, tables
from .machine import busy
from .modes import MODES, cases, choose
from .options import DTYPES
from .record import check_output
from .result import assemble, begin
from .run import Outcome, measure
from .shapes import SHAPES, shape
from .workload import Workload


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="5 rounds of 32 tokens at batch 16 where nothing else is said; fewer modes")
    ] = False,
    output: Annotated[Path, typer.Option(help="JSON file for every sample")] = Path("bench.json"),
    model: Annotated[str, typer.Option("--shape", help=f"of a random-weight Llama: {', '.join(SHAPES)}")] = "100m",
    dtype: Annotated[str, typer.Option(help=f"of the model: {', '.join(DTYPES)}")] = "float32",
    batch: Annotated[
        str | None, typer.Option(help="requests that decode together; several with commas; default: 1,16,64")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of each request of a decode batch")] = 32,
    output_tokens: Annotated[
        int | None, typer.Option(min=8, help="of each request of a decode batch; default: 64")
    ] = None,
    prefill: Annotated[
        str, typer.Option(help="prefills to time, REQUESTSxTOKENS, with commas: 1x2048,4x2048,1x8192")
    ] = "",
    distinct: Annotated[
        str | None, typer.Option(help="numbers of distinct interventions in a batch, with commas; default: one each")
    ] = None,
    modes: Annotated[
        str | None, typer.Option(help=f"some of {', '.join(MODES)}, with commas; default: the plugin's")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="measurements of each mode; default: 15")] = None,
    within: Annotated[
        float | None, typer.Option(help="seconds from now after which no load's round may end, except its first")
    ] = None,
    prefix_cache: Annotated[bool, typer.Option(help="prefix caching, emptied before every batch")] = False,
    compiled: Annotated[bool, typer.Option(help="compile the model, as a server does")] = True,
    seed: Annotated[int, typer.Option(min=0, help="of weights, prompts and artifacts")] = 0,
) -> None:
    """Measure what this build costs on this machine, against plain vLLM in the same run.

    Example: steer-vllm bench --quick --output bench.json
    """
    began = time.monotonic()
    if dtype not in DTYPES:
        raise BenchmarkInvalid(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    batch = batch if batch is not None else "16" if quick else "1,16,64"
    output_tokens = output_tokens if output_tokens is not None else 32 if quick else 64
    workload = Workload(
        shape=shape(model),
        loads=options.loads(batch, prompt_tokens, output_tokens, prefill),
        dtype=dtype,
        compiled=compiled,
        prefix_cache=prefix_cache,
        rounds=rounds if rounds is not None else 5 if quick else 15,
        seed=seed,
    )
    counts = None if distinct is None else options.numbers("--distinct", distinct)
    chosen = cases(choose(modes, quick), workload.loads, counts)
    check_output(output)
    begun = begin(workload)
    if busy():
        typer.echo(
            "this machine has been busy for the last minute: what is measured beside other programs is blurred",
            err=True,
        )
    result = {}

    def keep(outcome: Outcome) -> None:
        nonlocal result
        result = {**assemble(begun, chosen, outcome), "within_s": within}
        output.write_text(json.dumps(result, indent=1) + "\n")

    console = Console()
    with tempfile.TemporaryDirectory(prefix="steer-vllm-bench-") as folder, console.status("") as status:

        def say(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                typer.echo(f"{time.monotonic() - began:6.0f} s  {text}", err=True)

        until = began + within if within is not None else float("inf")
        measure(workload, chosen, Path(folder), say, keep, until)
    console.print(*tables.console(result), sep="\n\n")
    console.print(tables.conditions(result), highlight=False)
    console.print(f"every sample is in {output}", highlight=False)
