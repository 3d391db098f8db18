"""The servers that the modes of a run need, over one model: plain, eager, with the plugin, with LoRA adapters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from harness import model, server
from harness.turns import Mode
from steer_vllm.bench.artifacts import RANK, make_all
from steer_vllm.bench.lora import make_adapter, projections
from steer_vllm.errors import BenchmarkInvalid
from steer_vllm.fingerprint import Fingerprint


def start(
    options: argparse.Namespace, modes: Sequence[Mode], context: int, streams: int, folder: Path, stack: ExitStack
) -> dict[str, server.Server]:
    """By name. `stack` ends them; they start one after the other, since each looks at what memory is free.

    context: the longest request, in tokens. streams: the most requests at once. folder: has the model, gets the rest.
    """
    path = folder / "model"
    names = list(dict.fromkeys(mode.server for mode in modes))
    counts = {name: max(1, *(len(mode.models) for mode in modes if mode.server == name)) for name in names}
    kept = share(options, counts["lora"]) if "lora" in names else 0.0
    memory = model.memory(options, len(names), kept)
    usual = [
        *("--load-format=dummy", f"--dtype={options.dtype}", f"--served-model-name={server.SERVED}"),
        *(f"--max-model-len={context}", f"--max-num-seqs={streams}"),
        f"--gpu-memory-utilization={memory}",
        "--enable-prefix-caching" if options.prefix_cache else "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if options.eager else []),
    ]
    found = stack.enter_context(server.Servers())
    for name in names:
        print(f"starting the {name} server", flush=True)
        log, environment = folder / f"{name}.log", model.environment()
        if name == "steered":
            limits = artifacts(options.kind, counts[name], folder)
            one = server.steered(path, limits, folder / "store", usual, environment, log)
        elif name == "lora":
            room = f"--gpu-memory-utilization={memory + kept:.3f}"  # of two vLLM takes the last
            more = [room, *adapters(options, counts[name], folder)]
            one = server.plain(name, path, [*usual, *more], environment, log)
        else:
            more = ["--enforce-eager"] if name == "eager" else []
            one = server.plain(name, path, [*usual, *more], environment, log)
        found[name] = one
        one.wait()
    for mode in modes:
        check(mode, found[mode.server])
    return found


def check(mode: Mode, one: server.Server) -> None:
    """Errors: `BenchmarkInvalid` when the server does something else than the mode says."""
    for name in (*mode.models, server.SERVED):
        applied = one.applied(name) or ""
        _, _, artifact = name.partition(":")
        if applied.partition("@")[0] != artifact:
            raise BenchmarkInvalid(
                f"{mode.name}: a request for {name} was answered with {applied or 'no intervention'}"
            )


def artifacts(kind: str, count: int, folder: Path) -> list[str]:
    """Make them below folder/store; the limits with which all of them can be used at once."""
    base = Fingerprint.of(folder / "model", weights=False)
    make_all([(kind, number) for number in range(count)], base, 0, folder / "store")
    low_rank = count if kind == "loreft" else 0
    return [
        f"--additive-rows={max(count, 16)}",
        f"--low-rank-rows={low_rank and max(low_rank, 16)}",
        f"--max-rank={RANK}",
    ]


def adapters(options: argparse.Namespace, count: int, folder: Path) -> list[str]:
    """One random adapter under as many names: vLLM keeps a copy of each. The flags with which all fit at once."""
    made = make_adapter(model.chosen(options), options.dtype, 0, folder / "adapter")
    room = ["--enable-lora", f"--max-loras={count}", f"--max-cpu-loras={count}", f"--max-lora-rank={RANK}"]
    return [*room, "--lora-modules", *(f"lora-{number}={made}" for number in range(count))]


def share(options: argparse.Namespace, count: int) -> float:
    """Of a GPU's memory, what so many adapters take in it; none of a CPU's."""
    if not torch.cuda.is_available():
        return 0.0
    shape, dtype = model.chosen(options), getattr(torch, options.dtype)
    numbers = sum(RANK * (inputs + outputs) for inputs, outputs in projections(shape).values())
    taken = count * shape.num_hidden_layers * numbers * dtype.itemsize
    return float(taken / torch.cuda.get_device_properties(0).total_memory)
