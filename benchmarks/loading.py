"""What loading costs: disk to servable, the pause of those who decode meanwhile, a row, and thousands of artifacts.

Usage: python benchmarks/loading.py [--shape 8b --dtype bfloat16] [--quick] [--output FILE]

One engine in a process of its own, asked as a server asks it (registry and front are the server's), without HTTP.
Loads and calm windows of the same length take turns while a batch decodes. A pause is the longest gap between two
tokens of any stream in the window, less the median gap. Requests to the engine with thousands loaded take turns with
those to one that has few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import model, resident, script
from harness.batch import decoding, pauses, prompt
from harness.target import Interval, Target, on_gpu

from steer_vllm.bench import record
from steer_vllm.bench.artifacts import KINDS, make
from steer_vllm.bench.spread import Spread
from steer_vllm.config import SteerConfig
from steer_vllm.fingerprint import Fingerprint

FORMAT = 2
CONTEXT = 1024
_REST = 1.5
"""Seconds after which an engine without requests uses no core: vLLM's workers poll for one after their last step."""
BUSY = "load while others decode, ms"
PAUSE = "pause while loading, ms"
CALM = "pause in calm windows of that length, ms"
RATE = "requests per second, {} loaded"
FRONT = "front, {} loaded, us"
ADMISSION = "admission, {} loaded, us"


def load_ms(result: Mapping[str, Any]) -> Interval | None:
    """From disk to servable while others decode."""
    return Interval.of(result["samples"][BUSY]) if _is_meant(result) else None


def added_ms(result: Mapping[str, Any]) -> Interval | None:
    """What a load adds to the longest gap of the others: its window less the calm one that followed."""
    samples = result["samples"]
    added = [a - b for a, b in zip(samples[PAUSE], samples[CALM], strict=True)]
    return Interval.of(added) if _is_meant(result) else None


def _is_meant(result: Mapping[str, Any]) -> bool:
    """A GPU's targets are for the 8B shape."""
    return not on_gpu(result) or bool(result["workload"]["shape"] == "8b")


def slowdown(result: Mapping[str, Any]) -> Interval | None:
    """Of requests, by ten thousand artifacts beside the few."""
    samples, few = result["samples"], result["memory"]["artifacts"]
    many = RATE.format(few + 10_000)
    if many not in samples:
        return None
    return Interval.of([1 - a / b for a, b in zip(samples[many], samples[RATE.format(few)], strict=True)])


TARGETS = (
    Target("load while others decode, ms (on a GPU: 8B shape)", 50.0, "{:.3g}", load_ms),
    Target("what a load adds to the others' longest gap, ms (on a GPU: 8B shape)", 5.0, "{:.3g}", added_ms),
    Target("requests per second lost with 10,000 loaded", 0.01, "{:.1%}", slowdown),
)


async def loads(live: Any, names: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Loads with nothing else to do, loads while a batch decodes, and the gaps of those who decode."""
    half = len(names) // 2
    idle = [await live.load(name) for name in names[:half]]
    busy: list[float] = []
    loading: list[tuple[float, float]] = []
    calm: list[tuple[float, float]] = []
    async with decoding(live, options.requests, CONTEXT // 2) as batch:
        for name in names[half:]:
            began = time.perf_counter()
            busy.append(await live.load(name))
            loading.append((began, time.perf_counter()))
            await asyncio.sleep(0.2)
            calm.append((time.perf_counter(), time.perf_counter() + busy[-1]))
            await asyncio.sleep(busy[-1] + 0.2)
    return {
        "load, engine idle, ms": [1000 * seconds for seconds in idle],
        BUSY: [1000 * seconds for seconds in busy],
        PAUSE: pauses(batch.gaps, loading),
        CALM: pauses(batch.gaps, calm),
        "gap between tokens, ms": [1000 * seconds for _, seconds in batch.gaps[:: 1 + len(batch.gaps) // 1000]],
    }


async def requests_per_second(live: Any, name: str, streams: int) -> float:
    """Short requests: what each costs beside the model weighs most."""

    async def ask(number: int) -> None:
        async for _ in live.stream(prompt(number), 4, name):
            pass

    began = time.perf_counter()
    for _ in range(4):
        await asyncio.gather(*map(ask, range(streams)))
    return 4 * streams / (time.perf_counter() - began)


async def front(live: Any, name: str, rounds: int) -> list[float]:
    """Microseconds that the front takes for a request with an intervention, from its body to its end: medians."""

    async def once() -> float:
        began = time.perf_counter_ns()
        lease = await live.front.admit({"model": "base", "interventions": [{"name": name}]}, "/v1/completions")
        lease.end(answered=True)
        return (time.perf_counter_ns() - began) / 1000

    return [median([await once() for _ in range(100)]) for _ in range(rounds)]


async def thousands(live: Any, other: Any, few: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """The same requests to the engine that has thousands loaded, and to one that has few: they take turns."""
    rates: dict[Any, list[float]] = {live: [], other: []}
    fronts: dict[Any, list[float]] = {live: [], other: []}
    for number in range(options.rounds + 1):
        for one in random.Random(number).sample([live, other], 2):
            await asyncio.sleep(_REST)
            rates[one].append(await requests_per_second(one, few[0], options.requests))
            fronts[one] += await front(one, few[0], 1)
    many = len(few) + options.many
    admission = [[median(resident.admission(count, 200)) for count in (len(few), many)] for _ in range(options.rounds)]
    return {  # of the first round, which is not counted, neither engine has seen such requests
        RATE.format(len(few)): rates[other][1:],
        RATE.format(many): rates[live][1:],
        FRONT.format(len(few)): fronts[other][1:],
        FRONT.format(many): fronts[live][1:],
        ADMISSION.format(len(few)): [one for one, _ in admission],
        ADMISSION.format(many): [one for _, one in admission],
    }


async def measure(options: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """samples: by name, each a list of numbers; memory: what the engine says of itself. keep: takes what there is."""
    from harness.live import Live

    base = Fingerprint.of(folder / "model", weights=False)
    store = folder / "store"
    names = [make(options.kind, number, base, 0, store).name for number in range(2 * options.loads)]
    config = SteerConfig(additive_rows=256, low_rank_rows=8, max_rank=8, memory_gib=options.memory_gib)

    async def start() -> Any:
        return await Live.start(
            config,
            store,
            model=str(folder / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=options.dtype,
            enforce_eager=options.eager,
            max_model_len=CONTEXT,
            max_num_seqs=options.requests,
            enable_prefix_caching=False,
            gpu_memory_utilization=model.memory(options, engines=2 if options.many else 1),
        )

    live = await start()
    started = [live]
    try:
        await live.load(names[0])  # what is imported at the first load is not counted
        samples = await loads(live, names[1:], options)
        (rank, *_) = (await live.facts())["ranks"]
        rows = resident.rows(base, getattr(torch, options.dtype), 20 * options.rounds)
        for row in rows:
            samples[f"fill a row ({row['kind']}), until the host goes on, us"] = row.pop("handed_over_us")
            samples[f"fill a row ({row['kind']}), until the device has it, us"] = row.pop("copied_us")
        memory = {"tables": rank["table_bytes"], "loaded": rank["memory_bytes"], "artifacts": len(names), "rows": rows}
        outcome = {"samples": samples, "memory": memory}
        keep(outcome)
        if options.many:
            more = [make("direction", number, base, 1, store).name for number in range(options.many)]
            took = [1000 * await live.load(name) for name in more]
            samples[f"load, the last of {len(names) + len(more)}, ms"] = took[-20:]
            started.append(await start())
            for name in names:
                await started[-1].load(name)
            samples |= await thousands(live, started[-1], names, options)
            keep(outcome)
    finally:
        for one in started:
            await one.close()
    return outcome


def markdown(result: dict[str, Any]) -> str:
    """Its section of RESULTS.md."""
    load, memory, samples = result["workload"], result["memory"], result["samples"]
    shape = f"{load['shape']} with {load['model']['num_hidden_layers']} layers"
    lines = [
        f"{load['kind']} artifacts on a random-weight Llama ({shape}, {load['dtype']}), {load['requests']} streams "
        "decoding where it says so. A pause is the longest gap between two tokens of any stream while an artifact is "
        "loaded, less the median gap; calm windows say what it is without. Requests take turns with those to an engine "
        f"that has few artifacts. {record.origin(result)}",
        "",
        record.how(result),
        "",
        "| | median | quartiles | largest |",
        "|---|---|---|---|",
    ]
    for name, values in samples.items():
        spread = Spread.of(values)
        lines.append(f"| {name} | {spread.median:.3g} | {spread.q1:.3g} to {spread.q3:.3g} | {max(values):.3g} |")
    lines += [
        "",
        f"Memory: tables of {memory['tables'] / 1e6:.1f} MB on the device; on the host {memory['loaded'] / 1e6:.2f} MB "
        f"for {memory['artifacts']} artifacts. "
        + "; ".join(
            f"a {row['kind']} on every layer takes {row['artifact_bytes'] / 1e3:.0f} kB on the host and a row of "
            f"{row['row_bytes'] / 1e3:.0f} kB"
            for row in memory["rows"]
        )
        + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model.add_options(parser, "100m")
    parser.add_argument("--kind", choices=list(KINDS), default="lofit", help="of the artifacts (default: lofit)")
    parser.add_argument("--loads", type=int, default=20, help="with the engine idle, and as many while it decodes")
    parser.add_argument("--requests", type=int, default=16, help="streams that decode (default: 16)")
    parser.add_argument("--many", type=int, default=10_000, help="artifacts beside the few; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=10, help="repeats of what is timed with many (default: 10)")
    parser.add_argument("--memory-gib", type=float, default=SteerConfig.memory_gib, help="for what is loaded")
    parser.add_argument("--quick", action="store_true", help="few loads, 200 artifacts, 3 rounds")
    script.add_output(parser, "loading.json")
    options = parser.parse_args()
    if options.quick:
        options.loads, options.many, options.rounds = min(options.loads, 5), min(options.many, 200), 3
    os.environ.update({**model.environment(), "VLLM_PLUGINS": "steer_vllm"})
    begun = record.begin("loading", FORMAT, model.workload(options), model.device())

    def keep(outcome: dict[str, Any]) -> None:
        options.output.write_text(json.dumps(begun | outcome, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="steer-vllm-bench-") as folder:
        model.write_model(Path(folder) / "model", options, CONTEXT)
        outcome = asyncio.run(measure(options, Path(folder).resolve(), keep))
    print(markdown(begun | outcome))


if __name__ == "__main__":
    script.run(main)
