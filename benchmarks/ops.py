"""What the operations of a step cost by themselves: the reference and what a step calls, in microseconds and bytes.

Usage: python benchmarks/ops.py [--tokens 1,32,256 --hidden 4096 --rank 8,64 --distinct 0,1,256] [--output FILE]

On a GPU each is timed as a replayed CUDA graph, without what its launch costs the host. The two take turns, and a call
is followed by one on another layer's inputs and tables, as in a model. The reference is left out where it would take
long: it gathers a row for every token.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import script

from steer_vllm.bench import record
from steer_vllm.bench.options import DTYPES
from steer_vllm.bench.spread import Spread
from steer_vllm.ops import custom, reference

FORMAT = 2
PLACES, SEGMENTS = 8, 4
"""Layers whose tables are read in turn; segments of a request."""
_AHEAD = 1_000_000
"""Cycles for which a GPU is kept busy while the host launches what is timed."""
GATHERED = 1 << 28
"""Numbers that the reference gathers from a table in a call, at most."""
BEYOND_CACHE = 2
"""How many times the last cache a set must be for its bytes to come from memory."""


@dataclass(frozen=True)
class Case:
    """A batch: its tokens belong to so many distinct rows, in runs of equal length; none is edited where that is 0."""

    tokens: int
    hidden: int
    rank: int
    distinct: int

    def rows(self, device: str) -> torch.Tensor:
        run = torch.arange(self.tokens, device=device) * self.distinct // self.tokens
        return (run + 1 if self.distinct else run).int()

    def bytes(self, dtype: torch.dtype) -> int:
        """What a low-rank edit must move at least: each edited token and each row in use once, every result."""
        read = 2 * self.tokens * self.hidden if self.distinct else 0
        table = self.distinct * self.rank * (2 * self.hidden + 1)
        return (read + table + self.tokens * self.hidden) * dtype.itemsize + 4 * self.tokens

    @property
    def gathered(self) -> int:
        """Numbers that the reference gathers from A; it does so for tokens that are not edited too."""
        return self.tokens * self.rank * self.hidden


Calls = dict[str, Callable[[], Any]]
"""By what is called: all places once."""


def low_rank(case: Case, dtype: torch.dtype, device: str) -> Calls:
    x, residual = (torch.randn(PLACES, case.tokens, case.hidden, device=device).to(dtype) for _ in range(2))
    rows, scales = case.rows(device), torch.ones(case.tokens, device=device)
    sizes = (case.distinct + 1, PLACES, case.rank)
    A, B = (torch.randn(*sizes, case.hidden, device=device).mul(case.hidden**-0.5).to(dtype) for _ in range(2))
    c = torch.randn(*sizes, device=device).to(dtype)

    def call(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def everywhere() -> None:
            for place in range(PLACES):
                function(x[place], residual[place], rows, scales, A[:, place], B[:, place], c[:, place])

        return everywhere

    step = {"step": call(custom.low_rank)}
    return step if case.gathered > GATHERED else {"reference": call(reference.low_rank), **step}


def route(case: Case, device: str) -> Calls:
    requests = max(case.distinct, 1)
    positions = torch.arange(case.tokens, device=device)
    starts = (torch.arange(requests + 1, device=device) * case.tokens // requests).int()
    owners = torch.arange(1, requests + 1, device=device, dtype=torch.int32)
    spans = torch.zeros(requests + 1, SEGMENTS, 4, dtype=torch.int32, device=device)
    spans[:, 0, 1] = 2**31 - 1
    scales = torch.ones(requests + 1, SEGMENTS, device=device)
    slots = [torch.zeros(case.tokens, dtype=kind, device=device) for kind in (torch.int32, torch.int32, torch.float32)]

    def call(function: Callable[..., None]) -> Callable[[], None]:
        def as_often() -> None:
            for _ in range(PLACES):
                function(positions, starts, owners, spans, scales, *slots)

        return as_often

    return {"reference": call(reference.route), "step": call(custom.route)}


def ready(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """What is timed: the call once it is compiled, on a GPU as a graph."""
    call()
    if device != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return graph.replay


def timed(call: Callable[[], Any], device: str) -> float:
    """Microseconds of one operation."""
    if device == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD)  # or the time until the host has launched the graph would be in it
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1000 / PLACES
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1000 / PLACES


def alternate(calls: Calls, device: str, repeats: int, order: random.Random) -> dict[str, list[float]]:
    """Microseconds of every repeat; in each every call has its turn, in random order."""
    graphs = {name: ready(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name in order.sample(list(graphs), len(graphs)):
            samples[name].append(timed(graphs[name], device))
    return samples


def measure(cases: list[Case], dtype: torch.dtype, device: str, repeats: int, seed: int) -> Iterator[dict[str, Any]]:
    """Each operation on each case. set_bytes: what a turn moves, all places together; 0 where it is the same again."""
    order = random.Random(seed)
    for case in cases:
        torch.manual_seed(seed)
        moved = case.bytes(dtype)
        made = {"low_rank": (low_rank(case, dtype, device), moved, PLACES * moved)}
        if case.rank == cases[0].rank and case.hidden == cases[0].hidden:
            made["route"] = route(case, device), 12 * case.tokens, 0
        for name, (calls, once, together) in made.items():
            spent = alternate(calls, device, repeats, order)
            yield {"op": name, **asdict(case), "bytes": once, "set_bytes": together, "microseconds": spent}


def cache_bytes(device: str) -> int | None:
    """Of the last cache before memory; None where the machine does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [size.read_text() for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) << 10 for size in sizes), default=None)


def markdown(result: dict[str, Any]) -> str:
    """Its section of RESULTS.md."""
    lines = [
        f"Microseconds of one operation ({result['workload']['dtype']}, seed {result['workload']['seed']}): median, "
        "and quartiles of what a step calls. GB/s: of the bytes that must be moved, where a turn moves more than a "
        f"cache holds. {record.origin(result)}",
        "",
        record.how(result),
        "",
        "| operation | tokens | hidden | rank | distinct | reference | in a step | quartiles | GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        spent = {called: Spread.of(samples) for called, samples in row["microseconds"].items()}
        step, before = spent["step"], f"{spent['reference'].median:.1f}" if "reference" in spent else ""
        cache = result["workload"]["cache_bytes"]
        uncached = cache is not None and row["set_bytes"] > BEYOND_CACHE * cache
        rate = f"{row['bytes'] / step.median / 1000:.0f}" if uncached else ""
        sizes = f"{row['hidden']} | {row['rank']}" if row["op"] == "low_rank" else " | "
        lines.append(
            f"| {row['op']} | {row['tokens']} | {sizes} | {row['distinct']} | {before} | {step.median:.1f} | "
            f"{step.q1:.1f} to {step.q3:.1f} | {rate} |"
        )
    return "\n".join([*lines, ""])


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=numbers, default=[1, 32, 256, 2048, 8192] if large else [1, 16, 64, 512])
    parser.add_argument("--hidden", type=numbers, default=[4096 if large else 768])
    parser.add_argument("--rank", type=numbers, default=[8, 64] if large else [8])
    parser.add_argument("--distinct", type=numbers, default=[0, 1, 256], help="at most the tokens (default: 0,1,256)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16" if large else "float32", help="bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--repeats", type=int, default=50, help="of each measurement (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of inputs, tables and order (default: 0)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    script.add_output(parser, "ops.json")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.hidden, options.rank, options.repeats = [1, 8], [64], [2], 3
    cases = {
        Case(tokens, hidden, rank, min(distinct, tokens)): None
        for hidden in options.hidden
        for rank in options.rank
        for tokens in options.tokens
        for distinct in options.distinct
    }
    name = torch.cuda.get_device_name() if large else None
    facts = {
        "dtype": options.dtype,
        "places": PLACES,
        "repeats": options.repeats,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
    }
    found: list[dict[str, Any]] = []
    result = record.begin("ops", FORMAT, facts, name) | {"cases": found}
    with torch.inference_mode():
        for one in measure(list(cases), getattr(torch, options.dtype), device, options.repeats, options.seed):
            found.append(one)
            options.output.write_text(json.dumps(result) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    script.run(main)
