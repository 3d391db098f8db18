"""A real server against vLLM's own client: plain vLLM, the plugin idle, one intervention for all, K distinct ones.

Usage: python benchmarks/serving.py [--shape 8b --dtype bfloat16 --concurrency 256] [--quick] [--output FILE]

Servers live side by side and take turns; the client is `vllm bench serve`, closed loop, with random prompts. A request
asks for an intervention by model alias, requests in turn for each of K; likewise for vLLM's own LoRA adapters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import model, script, servers, turns
from harness.client import Client
from harness.turns import PLAIN, Mode

from steer_vllm.bench import record
from steer_vllm.bench.artifacts import KINDS, RANK
from steer_vllm.bench.options import numbers
from steer_vllm.errors import BenchmarkInvalid

FORMAT = 1


def choose(kind: str, distinct: Sequence[int], adapters: Sequence[int], names: str | None) -> list[Mode]:
    """The modes of a run, plain always among them. Errors: `BenchmarkInvalid` for an unknown name."""

    def aliases(prefix: str, count: int) -> tuple[str, ...]:
        return tuple(f"{prefix}{number}" for number in range(count))

    modes = [
        PLAIN,
        Mode("eager", "vLLM without the plugin, eager", "eager"),
        Mode("idle", "plugin on, nothing asked for", "steered"),
        Mode("shared", f"one {kind} for all", "steered", aliases(f"base:{kind}-", 1)),
        *(
            Mode(f"distinct-{count}", f"{count} distinct {kind}", "steered", aliases(f"base:{kind}-", count))
            for count in distinct
        ),
        *(
            Mode(f"lora-{count}", f"vLLM's LoRA r={RANK}, {count} adapters", "lora", aliases("lora-", count))
            for count in adapters
        ),
    ]
    if names is None:
        return modes
    wanted = {PLAIN.name, *names.split(",")}
    unknown = wanted - {mode.name for mode in modes}
    if unknown:
        raise BenchmarkInvalid(f"--modes: {', '.join(sorted(unknown))}: expected some of {[m.name for m in modes]}")
    return [mode for mode in modes if mode.name in wanted]


Samples = list[dict[str, Any]]


def measure(
    options: argparse.Namespace, modes: Sequence[Mode], folder: Path, keep: Callable[[Samples], object]
) -> Samples:
    """Start everything, let the modes take turns. keep: takes what there is after each round."""
    context = -(-(options.input_tokens + options.output_tokens + 8) // 128) * 128
    model.write_model(folder / "model", options, context)
    with ExitStack() as stack:
        started = servers.start(options, modes, context, options.concurrency, folder, stack)
        client = stack.enter_context(Client(folder / "client.log"))
        arguments = [
            *(f"--random-input-len={options.input_tokens}", f"--random-output-len={options.output_tokens}"),
            f"--max-concurrency={options.concurrency}",
        ]
        requests = options.concurrency * options.waves
        return turns.run(modes, started, client, folder / "model", arguments, requests, options.rounds, keep)


def markdown(result: dict[str, Any]) -> str:
    """Its section of RESULTS.md."""
    load = result["workload"]
    of_plain = [one for one in result["samples"] if one["mode"] == PLAIN.name]
    head = (
        f"`vllm bench serve` against servers that take turns: {load['concurrency']} streams at once, "
        f"{load['concurrency'] * load['waves']} requests a run, {load['input_tokens']} tokens in and "
        f"{load['output_tokens']} out, {len(of_plain)} rounds; random-weight Llama ({load['shape']}, "
        f"{load['model']['num_hidden_layers']} layers, {load['dtype']}, {'eager' if load['eager'] else 'compiled'}). "
        "Milliseconds are medians over rounds of each run's median, with their quartiles. " + record.origin(result)
    )
    return "\n".join([head, "", record.how(result), "", *turns.lines(result["modes"], result["samples"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model.add_options(parser, "100m")
    parser.add_argument(
        "--kind", choices=list(KINDS), default="direction", help="of interventions (default: direction)"
    )
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once (default: 32)")
    parser.add_argument("--waves", type=int, default=4, help="requests of a run, in multiples of that (default: 4)")
    parser.add_argument("--input-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--output-tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--distinct", default="1,8,32", help="numbers of distinct interventions (default: 1,8,32)")
    parser.add_argument("--lora", default="32", help="numbers of LoRA adapters; empty: none (default: 32)")
    parser.add_argument("--modes", help="names, with commas: eager, idle, shared, distinct-K, lora-K (default: all)")
    parser.add_argument("--prefix-cache", action="store_true", help="with prefix caching; prompts still differ")
    parser.add_argument("--memory", type=float, help="share of the device's memory for each server")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--quick", action="store_true", help="plain, idle and 8 distinct; 8 streams, 3 rounds")
    script.add_output(parser, "serving.json")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.concurrency, options.waves = min(options.rounds, 3), 8, 2
        options.distinct, options.modes = "8", options.modes or "idle,distinct-8"
    counts, adapters = numbers("--distinct", options.distinct), numbers("--lora", options.lora)
    modes = choose(options.kind, counts, adapters, options.modes)

    def keep(samples: Samples) -> dict[str, Any]:
        result = record.begin("serving", FORMAT, model.workload(options), model.device())
        result |= {"modes": turns.table(modes, samples), "samples": samples}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        return result

    with tempfile.TemporaryDirectory(prefix="steer-vllm-bench-") as folder:
        samples = measure(options, modes, Path(folder).resolve(), keep)
    print(markdown(keep(samples)))


if __name__ == "__main__":
    script.run(main)
