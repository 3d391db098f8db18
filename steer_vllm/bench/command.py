"""What `steer-vllm bench` does with its options: choose the work, measure, print, keep."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..errors import BenchmarkInvalid
from .modes import choose
from .result import assemble, conditions, table
from .run import measure
from .workload import Workload


def bench(
    *,
    quick: bool,
    output: Path,
    rounds: int | None,
    batch: int,
    dtype: str,
    compiled: bool,
    seed: int,
    modes: str | None,
) -> None:
    """Measure, print the table, write the JSON. Errors: `BenchmarkInvalid`, `InvalidIntervention` for a bad mode."""
    workload = Workload(dtype=dtype, compiled=compiled, batch=batch, seed=seed)
    workload = workload.quick() if quick else workload
    workload = workload if rounds is None else replace(workload, rounds=rounds)
    chosen = choose(modes, quick)
    if not output.absolute().parent.is_dir():
        raise BenchmarkInvalid(f"--output {output}: there is no such folder")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="steer-vllm-bench-") as folder, console.status("") as status:
        outcome = measure(workload, chosen, Path(folder), status.update)
    result = assemble(workload, chosen, outcome)
    output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result))
    console.print(conditions(result), highlight=False)
    console.print(f"every sample is in {output}", highlight=False)
