"""Holds what an engine served against transformers, request by request.

The served tokens are fed to the oracle with the interventions that the request was bound to, and the log-probability
of each is compared, sampled or greedy alike; where the choice was greedy it must also be the oracle's, unless two
tokens are too close to call. Errors must be those that the request earned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine import oracle

from steer_vllm import Positions
from steer_vllm.config import SteerConfig
from steer_vllm.fingerprint import Fingerprint

from .artifacts import Shelf
from .case import Case, Request

TOLERANCE = 3e-4
"""Of log-probabilities in float32: sums in another order, over layers with large weights."""

_SHAPED = {"logit_bias", "min_tokens", "regex", "presence_penalty"}
"""Parameters under which the greedy choice is not the largest log-probability."""


class Mismatch(AssertionError):
    """A request did not get exactly what it asked for."""


@dataclass
class Count:
    """What was seen, summed over cases."""

    requests: int = 0
    tokens: int = 0
    steered: int = 0
    cached: int = 0
    cancelled: int = 0
    refused: int = 0
    preempted: int = 0
    worst: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    def add(self, other: Count) -> None:
        """Sum up."""
        for name in ("requests", "tokens", "steered", "cached", "cancelled", "refused", "preempted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)
        for code, count in other.errors.items():
            self.errors[code] = self.errors.get(code, 0) + count


class Earned(NamedTuple):
    """The errors that a request may get, and whether it must get one."""

    codes: set[str]
    certain: bool


def _errors(case: Case, request: Request, bound: dict[str, int], result: dict[str, Any]) -> Earned:
    """What the request earned by what it asks for and by what else was in flight."""
    if any(ask.name not in bound for ask in request.asks):
        return Earned({"model_not_found"}, certain=True)
    made = [case.artifacts[bound[ask.name]] for ask in request.asks]
    for ask, artifact in zip(request.asks, made, strict=True):
        if ask.positions and Positions.parse(ask.positions).parts != Positions.parse(artifact.positions).parts:
            return Earned({"invalid_intervention"}, certain=True)
    config = SteerConfig.from_dict(case.configuration.steer)
    codes = set()
    if sum(artifact.rank for artifact in made if artifact.method == "loreft") > config.max_rank:
        codes.add("too_many_interventions")  # unless they do not meet
    additive, low_rank = result.get("rows", (0, 0))  # none were counted where it was refused before
    if additive > config.additive_rows or low_rank > config.low_rank_rows:
        codes.add("no_rows")  # unless a spare row was free
    return Earned(codes, certain=False)


class Checker:
    """The oracle of one base model."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = oracle.load(str(model))
        output = self.model.get_output_embeddings().weight.detach()
        self.shelf = Shelf(Fingerprint.of(model), output, folder)

    def check(self, case: Case, answer: dict[str, Any]) -> Count:
        """Check every request and that nothing is left behind. Errors: `Mismatch`."""
        count = Count(requests=len(case.requests), preempted=answer["preemptions"])
        for number, (request, bound) in enumerate(zip(case.requests, case.bound(), strict=True)):
            self._check(case, request, bound, answer["results"][number], count, f"request {number}: {request}, {bound}")
        left = answer["left"]
        if left["loaded"] or left["pinned"] or left["additive_rows"] or left["low_rank_rows"]:
            raise Mismatch(f"left behind: {left}")
        return count

    def _check(
        self, case: Case, request: Request, bound: dict[str, int], result: dict[str, Any], count: Count, where: str
    ) -> None:
        earned = _errors(case, request, bound, result)
        error = result.get("error")
        if error is not None:
            count.refused += 1
            count.errors[error] = count.errors.get(error, 0) + 1
            if error not in earned.codes:
                raise Mismatch(f"{where}\n  refused with {error}: {result['message']}; {earned}")
            return
        if earned.certain:
            raise Mismatch(f"{where}\n  answered; {earned}")
        if result.get("aborted"):
            count.cancelled += 1
        elif not result.get("finished"):
            raise Mismatch(f"{where}\n  did not finish: {result}")
        count.cached += result.get("cached") or 0
        count.steered += bool(request.asks)
        for choice in result["choices"]:
            if choice["finish"] == "error":
                raise Mismatch(f"{where}\n  the engine answered with an error")
            try:
                self._compare(case, request, bound, result, choice, count)
            except Mismatch as mismatch:
                raise Mismatch(f"{where}\n  {mismatch}") from None

    def _compare(
        self,
        case: Case,
        request: Request,
        bound: dict[str, int],
        result: dict[str, Any],
        choice: dict[str, Any],
        count: Count,
    ) -> None:
        prompt, made = result["prompt"], choice["tokens"]
        if not made:
            return
        interventions = {name: self.shelf.get(case.artifacts[number]) for name, number in bound.items()}
        asks = [ask.to_json() for ask in request.asks]
        start = request.response_start or len(prompt)
        predicted = oracle.logprobs(self.model, prompt + made, asks, interventions, start)[:-1]
        served = choice["logprobs"]
        rows = predicted[len(prompt) - 1 :]
        if "regex" in request.params:
            _same_ratios(rows, choice["others"], made)
        else:
            _same("log-probabilities", rows, made, served, count)
        if result.get("prompt_logprobs"):
            _same(
                "prompt log-probabilities", predicted[: len(prompt) - 1], prompt[1:], result["prompt_logprobs"], count
            )
        if request.params["temperature"] == 0 and not _SHAPED & set(request.params):
            lost = rows.max(-1).values - rows[torch.arange(len(made)), torch.tensor(made)]
            if lost.max() > 2 * TOLERANCE:
                raise Mismatch(f"greedy tokens {made}: {lost.tolist()} below the oracle's choice")
        count.tokens += len(made)


def _same(what: str, predicted: torch.Tensor, tokens: list[int], served: list[float], count: Count) -> None:
    expected = predicted[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.long)]
    difference = (expected - torch.tensor(served)).abs()
    count.worst = max(count.worst, difference.max().item() if len(tokens) else 0.0)
    if len(tokens) and not difference.max() <= TOLERANCE:
        raise Mismatch(f"{what} off by {[round(value, 5) for value in difference.tolist()]} for tokens {tokens}")


def _same_ratios(predicted: torch.Tensor, offered: list[dict[str, float]], tokens: list[int]) -> None:
    """Under a grammar vLLM renormalises over what it allows: only differences between offered tokens are comparable."""
    for row, offer, token in zip(predicted, offered, tokens, strict=True):
        for other, value in offer.items():
            if math.isfinite(value):
                served, expected = value - offer[str(token)], (row[int(other)] - row[token]).item()
                if not abs(served - expected) <= 2 * TOLERANCE:
                    raise Mismatch(f"under a grammar, {other} against {token}: {served}, expected {expected}")
