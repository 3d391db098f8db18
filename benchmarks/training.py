"""Seconds of a training step of LoFiT and LoReFT, against forward and backward of the same model with nothing learnt.

Usage: python benchmarks/training.py [--shape 100m] [--batch 8] [--tokens 128] [--output FILE]

Random weights, random tokens, half of each text a prompt. A step is forward, backward and update. Rounds run every case
once, in random order; a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import script
from torch.nn import functional
from transformers import AutoConfig, LlamaForCausalLM

from steer_vllm.bench import record
from steer_vllm.bench.options import DTYPES
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.spread import Ratio, Spread
from steer_vllm.bench.workload import Load, Workload
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.head_set import HeadSet
from steer_vllm.training.collate import IGNORED
from steer_vllm.training.learned import Learned
from steer_vllm.training.lofit import Offsets, Scaling
from steer_vllm.training.loreft import make_subspaces
from steer_vllm.training.module import SteeredModel
from steer_vllm.training.settings import LoFiTSettings, LoReFTSettings

FORMAT = 1
PLAIN = "forward and backward, weights frozen"
TITLES = {
    PLAIN: "down to the embeddings, as an edit of the first layer needs it",
    "forward and backward, all weights": "what tuning the whole model would need, without its update",
    "LoFiT, step 1": "scaling of every head",
    "LoFiT, step 2": "offsets of 10% of the heads",
    "LoReFT": "rank 4, every layer, f7+l7",
}

Step = Callable[[], Any]


def cases(model: Any, base: Fingerprint, batch: Mapping[str, torch.Tensor], seed: int) -> Iterator[tuple[str, Step]]:
    """Name and step of each."""
    names = iter(TITLES)
    yield next(names), lambda: frozen(model, batch)
    yield next(names), lambda: whole(model, batch)
    settings = LoFiTSettings.model_validate({"seed": seed})
    heads = HeadSet.random(base, seed).top(settings.count(base.num_layers * base.num_heads))
    yield next(names), learning(model, Scaling(base, settings.l1, seed), batch)
    yield next(names), learning(model, Offsets(heads, base, seed), batch)
    yield next(names), learning(model, make_subspaces(base, LoReFTSettings.model_validate({"seed": seed})), batch)


def loss(model: Any, batch: Mapping[str, torch.Tensor], **given: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, as in training."""
    logits = model(**given, attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    return functional.cross_entropy(logits[:, :-1][kept].float(), targets[kept])


def frozen(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    loss(model, batch, inputs_embeds=embedded).backward()


def whole(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
    model.requires_grad_(True)
    loss(model, batch, input_ids=batch["input_ids"]).backward()
    model.zero_grad()


def learning(model: Any, learned: Learned, batch: Mapping[str, torch.Tensor]) -> Step:
    learned.to(model.device)
    module = SteeredModel(model, learned).train()
    optimizer = torch.optim.AdamW(learned.parameters(), lr=1e-4)

    def step() -> None:
        model.requires_grad_(False)
        module(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_batch(shape: Any, requests: int, tokens: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """What a collator makes of texts of one length, the first half a prompt."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, shape.vocab_size, (requests, tokens), generator=draw)
    labels = ids.clone()
    labels[:, : tokens // 2] = IGNORED
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found["prompt_lengths"] = torch.full((requests,), tokens // 2)
    return {name: tensor.to(device) for name, tensor in found.items()}


def timed(step: Step) -> float:
    """Seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def markdown(result: Mapping[str, Any]) -> str:
    """Its section of RESULTS.md."""
    work = result["workload"]
    lines = [
        f"Seconds of a training step (forward, backward, update): Llama of {work['parameters'] / 1e6:.0f}M random "
        f"weights, {work['dtype']}, {work['batch']} texts of {work['tokens']} tokens; {work['rounds']} rounds, seed "
        f"{work['seed']}. {record.origin(result)}",
        "",
        record.how(result),
        "",
        "| step | seconds | of the first | 95% interval | |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in result["seconds"].items():
        ratio = Ratio.paired(seconds, result["seconds"][PLAIN])
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio.sure else ratio.interval
        compared = f"{ratio.median:.2f} | {interval}" if name != PLAIN else " | "
        lines.append(f"| {name} | {Spread.of(seconds).median:.3f} | {compared} | {TITLES[name]} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="100m", help="of the random-weight Llama (default: 100m)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the frozen model (default: float32)")
    parser.add_argument("--batch", type=int, default=8, help="texts of a step (default: 8)")
    parser.add_argument("--tokens", type=int, default=128, help="of each text (default: 128)")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each case (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and order (default: 0)")
    script.add_output(parser, "training.json")
    options = parser.parse_args()

    shape, cuda = SHAPES[options.shape], torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        Workload(shape, (Load(options.batch, options.tokens, 1),), options.dtype).write_model(Path(folder))
        base = Fingerprint.of(Path(folder), weights=False)
        config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(options.seed)
    with torch.device("cuda" if cuda else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    batch = random_batch(shape, options.batch, options.tokens, options.seed, model.device)
    steps = dict(cases(model, base, batch, options.seed))
    for step in steps.values():
        step()
    order, seconds = random.Random(options.seed), {name: list[float]() for name in steps}
    for _ in range(options.rounds):
        for name in order.sample(list(steps), len(steps)):
            seconds[name].append(timed(steps[name]))
    facts = {**vars(options), "shape": asdict(shape), "parameters": shape.parameters}
    del facts["output"]
    result = record.begin("training", FORMAT, facts, torch.cuda.get_device_name() if cuda else None)
    result |= {"seconds": seconds}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    script.run(main)
