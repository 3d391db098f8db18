"""What the middleware adds to a request: alone around an app that answers at once, and in a server against vLLM's own.

Usage: python benchmarks/http_path.py [--streams 1,32,256] [--quick] [--no-servers] [--output FILE]

The first part is the time of the server's one thread per streamed request, with and without the middleware. The second
asks two servers in turn with vLLM's own client: plain vLLM, and `steer-vllm serve`, where the plugin is in the engine
too. Their model is as small as can be, so that the HTTP path weighs most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import isolated, model, script, servers, turns
from harness.client import Client
from harness.target import Interval, Target
from harness.turns import PLAIN, Mode

from steer_vllm.bench import record
from steer_vllm.bench.options import numbers
from steer_vllm.bench.spread import Spread

FORMAT = 1
MODES = (
    PLAIN,
    Mode("idle", "with the middleware, the base model", "steered"),
    Mode("alias", "with the middleware, an intervention by alias", "steered", ("base:direction-0",)),
)


def differences(samples: Sequence[Mapping[str, Any]], streams: int, form: str) -> list[float]:
    """Microseconds per request that a form takes beyond the app alone, in the same round."""

    def values(form: str) -> list[float]:
        return [one["us"] for one in samples if one["streams"] == streams and one["form"] == form]

    return [a - b for a, b in zip(values(form), values(isolated.WITHOUT), strict=True)]


def added(samples: Sequence[Mapping[str, Any]], streams: Sequence[int]) -> list[dict[str, Any]]:
    """The spread of `differences`, by form and number of streams."""
    return [
        {"streams": at_once, "form": form, "us": asdict(Spread.of(differences(samples, at_once, form)))}
        for at_once in streams
        for form in isolated.FORMS
    ]


def _slowest(streams: int) -> Callable[[Mapping[str, Any]], Interval | None]:
    """Milliseconds of the form that takes longest."""

    def of(result: Mapping[str, Any]) -> Interval | None:
        samples = result["isolated_samples"]
        if streams not in {one["streams"] for one in samples}:
            return None
        found = max(Interval.of(differences(samples, streams, form)) for form in isolated.FORMS)
        return Interval(*(microseconds / 1000 for microseconds in found))

    return of


TARGETS = tuple(
    Target(f"what the middleware adds to a request, {streams} at once, ms", 0.3, "{:.3f}", _slowest(streams))
    for streams in (1, 32, 256)
)


def serve(options: argparse.Namespace, streams: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Both servers, asked at each number of streams: a table and its samples each, when there are such."""
    context = 256
    model.write_model(folder / "model", options, context)
    with ExitStack() as stack:
        started = servers.start(options, MODES, context, max(streams), folder, stack)
        client = stack.enter_context(Client(folder / "client.log"))
        for at_once in streams:
            print(f"{at_once} streams", flush=True)
            arguments = [
                *("--random-input-len=32", f"--random-output-len={options.tokens}"),
                f"--max-concurrency={at_once}",
            ]
            count = max(options.requests, 2 * at_once)
            samples = turns.run(MODES, started, client, folder / "model", arguments, count, options.rounds)
            yield {"streams": at_once, "modes": turns.table(MODES, samples), "samples": samples}


def markdown(result: dict[str, Any]) -> str:
    """Its section of RESULTS.md."""
    load = result["workload"]
    lines = [
        f"What the middleware adds to a streamed request of {load['tokens']} chunks and {load['characters']} "
        f"characters. {record.origin(result)}",
        "",
        record.how(result),
        "",
        f"Alone, around an app that answers at once: time of the server's thread per request, {load['rounds']} rounds.",
        "",
        "| streams at once | request for | added, ms | quartiles |",
        "|---|---|---|---|",
    ]
    for row in result["isolated"]:
        spread = {name: value / 1000 for name, value in row["us"].items()}
        lines.append(
            f"| {row['streams']} | {row['form']} | {spread['median']:.3f} | {spread['q1']:.3f} to {spread['q3']:.3f} |"
        )
    for part in result["servers"]:
        lines += [
            "",
            f"Servers that take turns, {part['streams']} streams at once (`vllm bench serve`; Llama {load['shape']}, "
            f"{load['model']['num_hidden_layers']} layers, {load['dtype']}); milliseconds:",
            "",
            *turns.lines(part["modes"], part["samples"]),
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model.add_options(parser, "tiny")
    parser.add_argument("--streams", default="1,32,256", help="requests at once (default: 1,32,256)")
    parser.add_argument("--tokens", type=int, default=32, help="chunks of an answer (default: 32)")
    parser.add_argument("--characters", type=int, default=2000, help="of a prompt, in the first part (default: 2000)")
    parser.add_argument("--requests", type=int, default=128, help="of a run, at least (default: 128)")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--no-servers", dest="servers", action="store_false", help="only the first part")
    parser.add_argument("--memory", type=float, help="share of the device's memory for each server")
    parser.add_argument("--quick", action="store_true", help="1 and 32 streams, 3 rounds")
    script.add_output(parser, "http_path.json")
    options = parser.parse_args()
    options.kind, options.prefix_cache = "direction", False
    if options.quick:
        options.streams, options.rounds, options.requests = "1,32", min(options.rounds, 3), min(options.requests, 32)
    streams = numbers("--streams", options.streams)
    result = record.begin("http", FORMAT, model.workload(options), model.device())
    alone = asyncio.run(isolated.measure(streams, options.tokens, options.characters, options.rounds))
    result |= {"isolated": added(alone, streams), "isolated_samples": alone, "servers": []}
    keep(result, options.output)
    if options.servers:
        with tempfile.TemporaryDirectory(prefix="steer-vllm-bench-") as folder:
            for part in serve(options, streams, Path(folder).resolve()):
                result["servers"].append(part)
                keep(result, options.output)
    print(markdown(result))


def keep(result: Mapping[str, Any], output: Path) -> None:
    """Write what there is."""
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    script.run(main)
