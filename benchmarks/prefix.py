"""Time to first token of many tenants over one system prompt: their caches shared, as the keys allow, or salted.

Usage: python benchmarks/prefix.py [--shape 8b --dtype bfloat16] [--tenants 64] [--quick] [--output FILE]

Offline (`steer_vllm.LLM`), one request at a time, one token each; a time is that of the call. In each round a system
prompt is new, so the first tenant finds nothing cached; then tenants of the base model and tenants with interventions
of their own at `response` positions take turns, and at the end as many with a cache salt each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import model, script
from harness.target import Interval, Target

from steer_vllm.bench import record
from steer_vllm.bench.artifacts import make
from steer_vllm.bench.spread import Ratio, Spread
from steer_vllm.errors import BenchmarkInvalid
from steer_vllm.fingerprint import Fingerprint

FORMAT = 1
QUESTION = 24
"""Tokens of a tenant's own behind the system prompt."""
FIRST, BASE, STEERED, SALTED = "first", "base", "steered", "salted"
TITLES = {
    FIRST: "the first, nothing cached",
    BASE: "base model, system prompt cached",
    STEERED: "an intervention of its own at response positions",
    SALTED: "the base model with a cache salt of its own",
}


def of_base(result: Mapping[str, Any]) -> Interval:
    """The time of tenants with interventions, of that of the base model with its prompt cached."""
    (found,) = (row["of_base"] for row in result["modes"] if row["mode"] == STEERED)
    return Interval(found["median"], found["low"], found["high"])


TARGETS = (
    Target("first token of a later tenant, of the base model's with its prompt cached", 1.10, "{:.1%}", of_base),
)


@dataclass(frozen=True)
class Sample:
    """One request. cached: tokens of its prompt that the cache had; blocks: those that it had to fill."""

    round: int
    mode: str
    tenant: int
    milliseconds: float
    cached: int
    blocks: int


class Tenants:
    """An engine, asked one request at a time."""

    def __init__(self, llm: Any, tokens: int, vocabulary: int) -> None:
        self._llm = llm
        self._tokens = tokens
        self._random = random.Random(0)
        self._vocabulary = vocabulary
        self._block: int = llm.llm_engine.vllm_config.cache_config.block_size
        self.samples: list[Sample] = []

    def words(self, count: int) -> list[int]:
        """Random token ids."""
        return [self._random.randrange(10, self._vocabulary) for _ in range(count)]

    def ask(self, number: int, mode: str, tenant: int, system: list[int]) -> None:
        """A question of its own behind the system prompt."""
        from vllm import SamplingParams

        prompt: dict[str, Any] = {"prompt_token_ids": system + self.words(QUESTION)}
        if mode == SALTED:
            prompt["cache_salt"] = f"round {number}, tenant {tenant}"
        asked = [{"name": f"direction-{tenant}", "positions": "response"}] if mode == STEERED else None
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        began = time.perf_counter()
        (output,) = self._llm.generate([prompt], params, use_tqdm=False, interventions=asked)
        took = time.perf_counter() - began
        cached = output.num_cached_tokens or 0
        total = -(-len(prompt["prompt_token_ids"]) // self._block)
        self.samples.append(Sample(number, mode, tenant, 1000 * took, cached, total - cached // self._block))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from steer_vllm.engine.llm import LLM

    base = Fingerprint.of(folder / "model", weights=False)
    longest = options.system_tokens + QUESTION + 1
    llm = LLM(
        str(folder / "model"),
        steer={"additive_rows": options.tenants, "low_rank_rows": 0},
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=options.dtype,
        enforce_eager=options.eager,
        max_model_len=-(-longest // 128) * 128,
        max_num_seqs=8,
        max_num_batched_tokens=max(2048, longest),
        enable_prefix_caching=True,
        gpu_memory_utilization=model.memory(options),
        **({"block_size": options.block_size} if options.block_size else {}),
    )
    for tenant in range(options.tenants):
        llm.load_intervention(f"direction-{tenant}", make("direction", tenant, base, 0, folder / "store"))
    tenants = Tenants(llm, options.system_tokens, model.chosen(options).vocab_size)
    for number in range(-1, options.rounds):  # the first of them is not counted
        system = tenants.words(options.system_tokens)
        tenants.ask(number, FIRST, 0, system)
        for tenant in range(1, options.tenants):
            for mode in random.Random(tenant).sample([BASE, STEERED], 2):
                tenants.ask(number, mode, tenant, system)
        for tenant in range(1, options.tenants):
            tenants.ask(number, SALTED, tenant, system)
    samples = [sample for sample in tenants.samples if sample.round >= 0]
    check(samples)
    return {"block_size": tenants._block, "modes": summary(samples), "samples": [asdict(one) for one in samples]}


def check(samples: list[Sample]) -> None:
    """Errors: `BenchmarkInvalid` when tenants with interventions find less in the cache than those without."""
    cached = {mode: {one.cached for one in samples if one.mode == mode} for mode in TITLES}
    if cached[STEERED] != cached[BASE] or len(cached[BASE]) != 1 or cached[SALTED] != {0} or cached[FIRST] != {0}:
        raise BenchmarkInvalid(f"tokens found in the cache: {cached}")


def summary(samples: list[Sample]) -> list[dict[str, Any]]:
    """Per mode: the time's spread, its ratio to the base model's with the same tenant, what was cached."""
    of = {mode: [one for one in samples if one.mode == mode] for mode in TITLES}
    rounds = len(of[FIRST])
    base = [one.milliseconds for one in of[BASE]]
    return [
        {
            "mode": mode,
            "milliseconds": asdict(Spread.of([one.milliseconds for one in of[mode]])),
            "of_base": asdict(Ratio.paired([one.milliseconds for one in of[mode]], base)) if mode != FIRST else None,
            "cached_tokens": of[mode][0].cached,
            "blocks_filled": sum(one.blocks for one in of[mode]) / rounds,
        }
        for mode in TITLES
    ]


def markdown(result: dict[str, Any]) -> str:
    """Its section of RESULTS.md."""
    load = result["workload"]
    lines = [
        f"Time to first token of {load['tenants']} tenants, one after the other, over one system prompt of "
        f"{load['system_tokens']:,} tokens and {QUESTION} of their own, offline; random-weight Llama ({load['shape']}, "
        f"{load['model']['num_hidden_layers']} layers, {load['dtype']}), KV blocks of {result['block_size']} tokens, "
        f"{load['rounds']} round{'s' * (load['rounds'] != 1)}. Blocks are those that all tenants of a round had to "
        f"fill. {record.origin(result)}",
        "",
        record.how(result),
        "",
        "| tenant | first token, ms | quartiles | of base | 95% interval | cached tokens | blocks filled |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["modes"]:
        time_, ratio = row["milliseconds"], row["of_base"]
        of_base = f"{ratio['median']:.1%} | {ratio['low']:.1%} to {ratio['high']:.1%}" if ratio else " | "
        lines.append(
            f"| {TITLES[row['mode']]} | {time_['median']:.2f} | {time_['q1']:.2f} to {time_['q3']:.2f} | {of_base} | "
            f"{row['cached_tokens']} | {row['blocks_filled']:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model.add_options(parser, "100m")
    parser.add_argument("--tenants", type=int, default=64, help="default: 64")
    parser.add_argument("--system-tokens", type=int, default=2000, help="of the system prompt (default: 2000)")
    parser.add_argument("--block-size", type=int, help="tokens of a KV block (default: vLLM's)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--quick", action="store_true", help="8 tenants, 2 rounds")
    script.add_output(parser, "prefix.json")
    options = parser.parse_args()
    if options.quick:
        options.tenants, options.rounds = min(options.tenants, 8), min(options.rounds, 2)
    os.environ.update({**model.environment(), "VLLM_PLUGINS": "steer_vllm"})
    with tempfile.TemporaryDirectory(prefix="steer-vllm-bench-") as folder:
        path = Path(folder).resolve()
        model.write_model(path / "model", options, -(-(options.system_tokens + QUESTION + 1) // 128) * 128)
        outcome = measure(options, path)
    result = record.begin("prefix", FORMAT, model.workload(options), model.device()) | outcome
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    script.run(main)
