"""Modes that take turns: in each round every mode runs once, in random order, while the other servers rest."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.client import METRICS, Client
from harness.server import SERVED, Server
from steer_vllm.bench.rest import rest
from steer_vllm.bench.spread import Ratio, Spread

COLUMNS = ("tokens/s", "of plain", "95% interval", "TTFT", "TPOT", "ITL", "end to end")


@dataclass(frozen=True)
class Mode:
    """A row: which server, and which models its requests ask for in turn (none: the base model)."""

    name: str
    title: str
    server: str
    models: tuple[str, ...] = ()


PLAIN = Mode("plain", "vLLM without the plugin", "plain")


def run(
    modes: Sequence[Mode],
    servers: Mapping[str, Server],
    client: Client,
    model: Path,
    arguments: Sequence[str],
    requests: int,
    rounds: int,
    keep: Callable[[list[dict[str, Any]]], object] = lambda samples: None,
) -> list[dict[str, Any]]:
    """A sample per round and mode; a first round is not counted. Every turn has prompts of its own.

    Milliseconds are the client's medians over the requests of a run. keep: takes what there is after each round.
    """
    samples = []
    for number in range(-1, rounds):
        for turn, mode in enumerate(random.Random(number).sample(list(modes), len(modes))):
            rest(list(servers.values()))
            seed = f"--seed={1000 * (number + 1) + turn}"
            found = client.run(servers[mode.server].url, model, SERVED, mode.models, [*arguments, seed], requests)
            if number < 0:
                continue
            print(f"round {number + 1} of {rounds}: {mode.name}, {found['output_throughput']:.0f} tokens/s", flush=True)
            samples.append(
                {
                    "round": number,
                    "turn": turn,
                    "mode": mode.name,
                    "tokens_per_second": found["output_throughput"],
                    **{f"{metric}_ms": found[f"median_{metric}_ms"] for metric in METRICS},
                    **{f"{metric}_p99_ms": found[f"p99_{metric}_ms"] for metric in METRICS},
                }
            )
        if samples:
            keep(samples)
    return samples


def table(modes: Sequence[Mode], samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per mode: its spread over rounds, and its ratio to plain in tokens per second, taken within each round."""
    keys = ("tokens_per_second", *(f"{metric}_ms" for metric in METRICS))
    return [
        {
            "mode": mode.name,
            "title": mode.title,
            **{key: asdict(Spread.of(_values(samples, key, mode.name))) for key in keys},
            "of_plain": asdict(_of_plain(samples, mode.name)),
        }
        for mode in modes
    ]


def _of_plain(samples: Sequence[Mapping[str, Any]], mode: str) -> Ratio:
    of, plain = (_values(samples, "tokens_per_second", name) for name in (mode, PLAIN.name))
    return Ratio.paired(of, plain)


def _values(samples: Sequence[Mapping[str, Any]], key: str, mode: str) -> list[float]:
    return [one[key] for one in samples if one["mode"] == mode]  # in the order of rounds


def lines(rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of these samples as Markdown. Milliseconds: the median over rounds, and the quartiles."""
    found = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        ratio = _of_plain(samples, row["mode"])
        times = [row[f"{metric}_ms"] for metric in METRICS]
        cells = [
            row["title"],
            f"{row['tokens_per_second']['median']:.0f}",
            f"{ratio.median:.1%}",
            ratio.interval,
            *(f"{one['median']:.2f} ({one['q1']:.2f} to {one['q3']:.2f})" for one in times),
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found
