"""What is asked of every family, and what comes of it: exact, or refused with a reason, per site and kind of edit.

An engine's answers are compared with transformers under `hf.steered`, its unsteered ones also with vLLM alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine import engines, oracle
from engine.engines import Engine

from steer_vllm import Intervention, Positions
from steer_vllm.edit import Site
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.hooks import find_layers
from steer_vllm.methods import Direction, LoFiT

from .models import VOCABULARY, Family
from .probe import probe

DRIVER = Path(__file__).parent / "driver.py"
LIMITS = {
    "additive_rows": 16,
    "low_rank_rows": 16,
    "max_rank": 4,
    "additive_sites": [site.value for site in Site],
    "low_rank_sites": [site.value for site in Site],
}
LLM = {
    "dtype": "float32",
    "gpu_memory_utilization": 0.1,
    "max_model_len": 96,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "seed": 0,
    "async_scheduling": False,
    "skip_tokenizer_init": True,
    "num_gpu_blocks_override": 160,
    "enforce_eager": True,
}
TOKENS = {"max_tokens": 6, "detokenize": False}
LONG = 1200
"""Seconds that a process with all families may take on a busy machine."""
FELT = 0.02
"""An edit moves some log-probability by at least this much: a test of nothing would pass otherwise."""

HEADS, ADDITIVE, LOW_RANK = "heads", "additive", "low-rank"
CASES = (
    (Site.ATTENTION_OUTPUT, HEADS),
    *((site, kind) for site in Site for kind in (ADDITIVE, LOW_RANK)),
)
PLACES = ("all", "response", "f2+l3", "generated", "prompt", "all", "response")
"""Positions of the cases, in order: prompts, decode and both."""


def prompt(length: int, step: int) -> list[int]:
    return [3 + (step * (i + 1) * (i + 2)) % (VOCABULARY - 3) for i in range(length)]


@dataclass
class Observation:
    """One family on one runner. code: whose model it is; exact: cases that agree; refusals: by case; faults: rest."""

    family: str
    code: str = ""
    exact: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def edit(base: Fingerprint, layers: tuple[int, ...], site: Site, kind: str, seed: int, positions: str) -> Intervention:
    """A random edit of these layers."""
    draw = torch.Generator().manual_seed(seed)
    if kind == LOW_RANK:
        return probe(base, layers, site, seed, positions)
    if kind == HEADS:
        pairs = tuple((layer, (layer + n) % base.num_heads) for layer in layers for n in (0, 1))
        heads = tuple(sorted(set(pairs)))
        offsets = torch.randn(len(heads), base.head_dim, generator=draw)
        return Intervention(LoFiT(heads), {"offsets": offsets}, base, Positions.parse(positions))
    vectors = torch.randn(len(layers), base.hidden_size, generator=draw)
    return Intervention(Direction(layers, 0.6, site), {"directions": vectors}, base, Positions.parse(positions))


def title(site: Site, kind: str) -> str:
    return f"{site.value}.{kind}"


class Subject:
    """A family's model on disk, its twin in transformers and the artifacts that are asked of it."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family = family
        self.folder = folder / family.name.replace(" ", "-").lower()
        self.model = family.save(self.folder / "model")
        base = Fingerprint.of(self.folder / "model")
        layers = find_layers(self.model)
        self.edits: dict[str, Intervention] = {}
        self.lacking: dict[str, Intervention] = {}
        for seed, ((site, kind), positions) in enumerate(zip(CASES, PLACES, strict=True)):
            has = tuple(i for i, layer in enumerate(layers) if site in layer.sites)
            lacks = tuple(i for i, layer in enumerate(layers) if site in layer.missing)
            if has:
                self.edits[title(site, kind)] = edit(base, has, site, kind, seed, positions)
            if lacks:
                self.lacking[f"lacking.{title(site, kind)}"] = edit(base, lacks, site, kind, seed, positions)

    def requests(self) -> list[dict[str, Any]]:
        """Two unsteered, one per edit, two composed."""
        names = list(self.edits)
        mixed: list[list[dict[str, Any]]] = [
            [{"name": names[0], "scale": -0.7}, {"name": names[-1], "positions": "response"}],
            [{"name": name, "scale": 0.5} for name in names[1:4]],
        ]
        asks: list[Any] = [[], *([{"name": name}] for name in names), [], *mixed]
        return [
            {"tokens": prompt(14 - n, 5 + 2 * n), "interventions": ask, "params": TOKENS} for n, ask in enumerate(asks)
        ]

    def steps(self) -> list[dict[str, Any]]:
        """Load all, also what must be refused, then one mixed batch."""
        steps = []
        for group, items in (("edits", self.edits), ("lacking", self.lacking)):
            for name, item in items.items():
                item.save(self.folder / group / name)
                steps.append({"do": "load", "name": name, "folder": str(self.folder / group / name)})
        return [*steps, {"do": "ask", "steered": True, "requests": self.requests()}]

    def plain_steps(self) -> list[dict[str, Any]]:
        return [{"do": "ask", "requests": self.requests()}]

    def job(self, *, plain: bool, **llm: Any) -> dict[str, Any]:
        return {
            "name": self.family.name,
            "model": str(self.folder / "model"),
            "llm": {**LLM, **self.family.llm, **llm},
            "steer": LIMITS,
            "steps": self.plain_steps() if plain else self.steps(),
        }

    def judge(self, answer: dict[str, Any], plain: dict[str, Any] | None) -> Observation:
        """Compare with transformers, and unsteered requests with vLLM alone where that ran too."""
        found = Observation(self.family.name)
        if "error" in answer:
            found.faults.append(f"does not start: {answer['message']}")
            return found
        found.code = answer["code"]
        *loads, results = answer["steps"]
        for name, said in zip([*self.edits, *self.lacking], loads, strict=True):
            if "error" in said:
                found.refusals[name] = said["message"]
        if isinstance(results, dict):
            found.faults.append(f"{results['error']}: {results['message']}")
            return found
        alone = [None] * len(results) if plain is None else plain["steps"][0]
        for request, result, unsteered in zip(self.requests(), results, alone, strict=True):
            if result is not None:
                fault = self.fault(request, result, unsteered)
                asked = [ask["name"] for ask in request["interventions"]]
                found.faults += [fault] if fault else []
                found.exact += asked if len(asked) == 1 and not fault else []
        found.faults += [f"{name}: neither refused nor asked" for name in self.lacking if name not in found.refusals]
        return found

    def fault(self, request: dict[str, Any], result: dict[str, Any], alone: dict[str, Any] | None) -> str | None:
        """What is wrong with an answer, or None."""
        asks = request["interventions"]
        text = request["tokens"] + result["tokens"]
        rows = slice(len(request["tokens"]) - 1, -1)
        wanted = oracle.logprobs(self.model, text, asks, self.edits, len(request["tokens"]))[rows]
        made = torch.tensor(result["tokens"])[:, None]
        chosen = wanted.gather(1, made)[:, 0]
        limit = self.family.tolerance
        if (wanted.amax(-1) - chosen).max().item() > (0 if limit == oracle.TOLERANCE else 2 * limit):
            return f"{asks}: tokens {result['tokens']}, transformers {wanted.argmax(-1).tolist()}"
        difference = (chosen - torch.tensor(result["logprobs"])).abs().max().item()
        if difference > limit:
            return f"{asks}: log-probabilities differ from transformers' by {difference:.2g}"
        if not asks:
            same = alone is None or (alone["tokens"], alone["logprobs"]) == (result["tokens"], result["logprobs"])
            return None if same else f"unsteered: {result}, vLLM alone {alone}"
        with torch.no_grad():
            base = self.model(torch.tensor([text])).logits[0].log_softmax(-1)[rows]
        felt = (wanted - base).abs().max().item()
        return None if felt > max(FELT, 5 * limit) else f"{asks}: moves log-probabilities by {felt:.2g} only"


def observe(families: list[Family], folder: Path, engine: Engine = engines.V1_EAGER, **llm: Any) -> list[Observation]:
    """One process for all families with interventions, one without the plugin (V1 on one rank)."""
    subjects = [Subject(family, folder) for family in families]

    def launch(plain: bool) -> list[Any]:
        job = {"plain": plain, "engines": [subject.job(plain=plain, **llm) for subject in subjects]}
        found: list[Any] = engines.launch(engine, folder / str(plain), DRIVER, job, plain=plain, timeout=LONG)
        return found

    with ThreadPoolExecutor() as pool:  # two processes beside each other
        answers = pool.submit(launch, False)
        alone = pool.submit(launch, True).result() if engine is engines.V1_EAGER else [None] * len(subjects)
        return [subject.judge(*both) for subject, *both in zip(subjects, answers.result(), alone, strict=True)]
