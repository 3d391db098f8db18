"""What a decode step launches with and without interventions: kernels on a GPU, operators on a CPU.

Usage: python benchmarks/kernels.py [--shape 8b --layers 4 --dtype bfloat16 --batch 32] [--output FILE]

Engines run in their probes' processes under PyTorch's profiler, one after the other. The times are those under the
profiler; `steer-vllm bench` has those that count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness import script

from steer_vllm.bench import record
from steer_vllm.bench.fleet import Fleet
from steer_vllm.bench.modes import MODES, PLAIN, cases, choose
from steer_vllm.bench.options import DTYPES
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.workload import Load, Workload

FORMAT = 1
TOP = 12
"""Differences shown of each mode."""

Launches = Mapping[str, list[float]]
"""By name: launches and microseconds of a step."""


def differences(plain: Launches, steered: Launches) -> list[tuple[str, float, float]]:
    """(name, launches more, microseconds more) of a step, the largest difference in time first."""
    found = []
    for name in {**plain, **steered}:
        (before, was), (after, now) = plain.get(name, [0, 0.0]), steered.get(name, [0, 0.0])
        if (before, was) != (after, now):
            found.append((name, after - before, now - was))
    return sorted(found, key=lambda one: -abs(one[2]))


def total(launches: Launches) -> tuple[float, float]:
    """Launches and microseconds of a step."""
    return sum(one[0] for one in launches.values()), sum(one[1] for one in launches.values())


def markdown(result: Mapping[str, Any]) -> str:
    """Its section of RESULTS.md."""
    work, modes = result["workload"], result["modes"]
    layers = work["shape"]["num_hidden_layers"]
    (load,) = work["loads"]
    what = "kernels and copies" if result["hardware"]["device"] not in (None, "cpu") else "operators"
    lines = [
        f"The {what} of a decode step at batch {load['requests']} (Llama of {work['parameters'] / 1e6:.0f}M random "
        f"weights, {layers} layers, {work['dtype']}, {'compiled' if work['compiled'] else 'eager'}), as PyTorch's "
        f"profiler sees them. {record.origin(result)}",
        "",
        record.how(result),
        "",
        "| mode | launches a step | more than plain, a layer | µs a step | more than plain, a layer |",
        "|---|---|---|---|---|",
    ]
    plain = modes[PLAIN]
    for mode, launches in modes.items():
        (count, spent), (before, was) = total(launches), total(plain)
        more = ("", "") if mode == PLAIN else (f"{(count - before) / layers:.2f}", f"{(spent - was) / layers:.1f}")
        lines.append(f"| {mode} | {count:.0f} | {more[0]} | {spent:.0f} | {more[1]} |")
    for mode, launches in modes.items():
        if mode != PLAIN:
            lines += ["", f"Largest differences, {mode} less plain:", ""]
            lines += ["| launches a step | µs a step | name |", "|---|---|---|"]
            for name, count, spent in differences(plain, launches)[:TOP]:
                short = name.replace("|", "\\|")
                lines.append(
                    f"| {count:+.1f} | {spent:+.1f} | `{short if len(short) <= 100 else short[:97] + '...'}` |"
                )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="100m", help="of the random-weight Llama (default: 100m)")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape has")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    parser.add_argument("--batch", type=int, default=16, help="requests that decode together (default: 16)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each request (default: 32)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps that are profiled (default: 16)")
    parser.add_argument(
        "--modes",
        default="idle,distinct-offsets,distinct-loreft,distinct-low-rank",
        help=f"with commas, some of {', '.join(MODES)}",
    )
    parser.add_argument("--eager", action="store_true", help="no compiled graphs")
    script.add_output(parser, "kernels.json")
    options = parser.parse_args()

    load = Load(options.batch, options.prompt_tokens, 2 + options.steps)
    shape = SHAPES[options.shape]
    shape = replace(shape, num_hidden_layers=options.layers or shape.num_hidden_layers)
    workload = Workload(shape, (load,), options.dtype, compiled=not options.eager)
    chosen = cases(choose(options.modes, quick=True), workload.loads, None)
    with tempfile.TemporaryDirectory(prefix="steer-vllm-kernels-") as folder, ExitStack() as stack:
        here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        fleet = Fleet(chosen, workload, Path(folder), stack, print, here)
        modes = {}
        for case in chosen:
            print(f"profiling {case.mode.name}")
            modes[case.mode.name] = fleet.ask(case, "profile", steps=options.steps)["launches"]
    facts = {**asdict(workload), "parameters": workload.shape.parameters}
    result = record.begin("kernels", FORMAT, facts, fleet.facts[PLAIN]["device"])
    result |= {"engines": fleet.facts, "modes": modes}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    script.run(main)
