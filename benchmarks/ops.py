"""What the operations of a step cost by themselves: the reference and what a step calls, in microseconds and bytes.

Usage: python benchmarks/ops.py [--tokens 1,32,256 --hidden 4096 --rank 8,64 --distinct 0,1,256] [--output FILE]

On a GPU each is timed as a replayed CUDA graph, without what its launch costs the host. A call is followed by one on
another layer's tables, and all of them are larger than a cache, as in a model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from steer_vllm.bench import record
from steer_vllm.bench.spread import Spread
from steer_vllm.ops import custom, reference

FORMAT = 1
PLACES, SEGMENTS = 8, 4
"""Layers whose tables are read in turn; segments of a request."""


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


Calls = dict[str, Callable[[], Any]]
"""By what is called: all places once."""


def low_rank(case: Case, dtype: torch.dtype, device: str) -> Calls:
    x, residual = (torch.randn(case.tokens, case.hidden, device=device).to(dtype) for _ in range(2))
    rows, scales = case.rows(device), torch.ones(case.tokens, device=device)
    sizes = (case.distinct + 1, PLACES, case.rank)
    A, B = (torch.randn(*sizes, case.hidden, device=device).mul(case.hidden**-0.5).to(dtype) for _ in range(2))
    c = torch.randn(*sizes, device=device).to(dtype)

    def call(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def everywhere() -> None:
            for place in range(PLACES):
                function(x, residual, rows, scales, A[:, place], B[:, place], c[:, place])

        return everywhere

    return {"reference": call(reference.low_rank), "step": call(custom.low_rank)}


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


def timed(call: Callable[[], Any], device: str, repeats: int) -> Spread:
    """Microseconds of one operation."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    samples = []
    for _ in range(repeats):
        if device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            call()
            ended.record()
            ended.synchronize()
            spent = began.elapsed_time(ended) * 1000
        else:
            start = time.perf_counter_ns()
            call()
            spent = (time.perf_counter_ns() - start) / 1000
        samples.append(spent / PLACES)
    return Spread.of(samples)


def measure(cases: list[Case], dtype: torch.dtype, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Each operation on each case."""
    for case in cases:
        made = {"low_rank": (low_rank(case, dtype, device), case.bytes(dtype))}
        if case.rank == cases[0].rank and case.hidden == cases[0].hidden:
            made["route"] = route(case, device), 12 * case.tokens
        for name, (calls, moved) in made.items():
            spent = {called: asdict(timed(call, device, repeats)) for called, call in calls.items()}
            yield {"op": name, **asdict(case), "bytes": moved, "microseconds": spent}


def markdown(result: dict[str, Any]) -> str:
    """Its section of RESULTS.md."""
    lines = [
        f"Microseconds of one operation ({result['workload']['dtype']}): median, and quartiles of what a step calls. "
        f"GB/s: of the bytes that must be moved. {record.origin(result)}",
        "",
        record.how(result),
        "",
        "| operation | tokens | hidden | rank | distinct | reference | in a step | quartiles | GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        step, median = row["microseconds"]["step"], row["microseconds"]["reference"]["median"]
        sizes = f"{row['hidden']} | {row['rank']}" if row["op"] == "low_rank" else " | "
        lines.append(
            f"| {row['op']} | {row['tokens']} | {sizes} | {row['distinct']} | {median:.1f} | {step['median']:.1f} | "
            f"{step['q1']:.1f} to {step['q3']:.1f} | {row['bytes'] / step['median'] / 1000:.0f} |"
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
    parser.add_argument("--dtype", default="bfloat16" if large else "float32", help="bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=50, help="of each measurement (default: 50)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    parser.add_argument("--output", type=Path, default=Path("ops.json"), help="JSON file (default: ops.json)")
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
    facts = {"dtype": options.dtype, "places": PLACES, "repeats": options.repeats, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        found = list(measure(list(cases), getattr(torch, options.dtype), device, options.repeats))
    result = record.begin("ops", FORMAT, facts, name) | {"cases": found}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
