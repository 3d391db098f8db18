"""Holds what an engine served against transformers, request by request.

The served tokens are fed to the oracle with the interventions that the request was bound to, and the log-probability
of each is compared, sampled or greedy alike; where the choice was greedy it must also be the oracle's, unless two
tokens are too close to call. Errors must be those that the request earned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
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


_LEFT = ("loaded", "pinned", "additive_rows", "low_rank_rows", "pending")
"""Of the core's and of each rank's facts: empty when nothing is loaded and no request is in flight."""

UNNAMED = "error of the core"
"""What a request is told that a core in another process refuses: vLLM passes no reason on."""


class Mismatch(AssertionError):
    """A request did not get exactly what it asked for."""


@dataclass
class Count:
    """What was seen, summed over cases.

    answered: requests of which tokens were compared; steered: those with interventions; turns: those that follow the
    answer of another. tokens: compared; drafted: that speculation got right; cached: that came from the prefix cache.
    """

    requests: int = 0
    answered: int = 0
    steered: int = 0
    tokens: int = 0
    turns: int = 0
    drafted: int = 0
    cached: int = 0
    cancelled: int = 0
    refused: int = 0
    preempted: int = 0
    worst: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    def add(self, other: Count) -> None:
        """Sum up."""
        for item in fields(self):
            if item.type == "int":
                setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
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


def _failed(result: dict[str, Any]) -> str | None:
    return UNNAMED if any(choice["finish"] == "error" for choice in result["choices"]) else None


def _check_whole(request: Request, result: dict[str, Any], where: str) -> None:
    """A request that nobody cancelled has all its choices, each as long as it was asked to be. Errors: `Mismatch`."""
    if not result.get("finished"):
        raise Mismatch(f"{where}\n  did not finish: {result}")
    params, choices = request.params, result["choices"]
    if len(choices) != params.get("n", 1):
        raise Mismatch(f"{where}\n  {len(choices)} choices")
    if ("prompt_logprobs" in params) != bool(result.get("prompt_logprobs")) and len(result["prompt"]) > 1:
        raise Mismatch(f"{where}\n  prompt log-probabilities: {result.get('prompt_logprobs')}")
    for choice in choices:
        length = len(choice["tokens"])
        whole = choice["finish"] == "length" and length == params["max_tokens"]
        stopped = (
            choice["finish"] == "stop"
            and 1 <= length <= params["max_tokens"]
            and ("stop" in params or "regex" in params or params.get("ignore_eos") is False)
        )
        if not (whole or stopped):
            raise Mismatch(f"{where}\n  {length} tokens, finished by {choice['finish']}")


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
        for left in answer["left"]:
            if any(left.get(name) for name in _LEFT):
                raise Mismatch(f"left behind: {left}")
        return count

    def _check(
        self, case: Case, request: Request, bound: dict[str, int], result: dict[str, Any], count: Count, where: str
    ) -> None:
        earned = _errors(case, request, bound, result)
        error = result.get("error") or _failed(result)
        if error is not None:
            count.refused += 1
            count.errors[error] = count.errors.get(error, 0) + 1
            if error not in earned.codes and not (error == UNNAMED and earned.codes):
                raise Mismatch(f"{where}\n  refused with {error}: {result.get('message')}; {earned}")
            return
        if earned.certain:
            raise Mismatch(f"{where}\n  answered; {earned}")
        if result.get("aborted"):
            count.cancelled += 1
        else:
            _check_whole(request, result, where)
        compared = count.tokens
        try:
            for choice in result["choices"]:
                self._compare(case, request, bound, result, choice, count)
        except Mismatch as mismatch:
            raise Mismatch(f"{where}\n  {mismatch}") from None
        if count.tokens > compared:
            count.answered += 1
            count.steered += bool(request.asks)
            count.turns += result.get("turn") == 2
            count.drafted += result["drafted"]
            count.cached += result.get("cached") or 0

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
        if not made and not result.get("prompt_logprobs"):
            return  # cancelled before anything was served
        interventions = {name: self.shelf.get(case.artifacts[number]) for name, number in bound.items()}
        asks = [ask.to_json() for ask in request.asks]
        start = request.response_start or len(prompt)
        predicted = oracle.logprobs(self.model, prompt + made, asks, interventions, start)[:-1]
        rows = predicted[len(prompt) - 1 :]
        if "regex" in request.params:
            count.tokens += _same_ratios(rows, choice["others"], made)
        else:
            _same("log-probabilities", rows, made, choice["logprobs"], count)
            count.tokens += len(made)
        if result.get("prompt_logprobs"):
            _same(
                "prompt log-probabilities", predicted[: len(prompt) - 1], prompt[1:], result["prompt_logprobs"], count
            )
        if made and request.params["temperature"] == 0 and not _SHAPED & set(request.params):
            lost = rows.max(-1).values - rows[torch.arange(len(made)), torch.tensor(made)]
            if lost.max() > 2 * TOLERANCE:
                raise Mismatch(f"greedy tokens {made}: {lost.tolist()} below the oracle's choice")


def _same(what: str, predicted: torch.Tensor, tokens: list[int], served: list[float], count: Count) -> None:
    expected = predicted[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.long)]
    difference = (expected - torch.tensor(served)).abs()
    count.worst = max(count.worst, difference.max().item() if len(tokens) else 0.0)
    if len(tokens) and not difference.max() <= TOLERANCE:
        raise Mismatch(f"{what} off by {[round(value, 5) for value in difference.tolist()]} for tokens {tokens}")


def _same_ratios(predicted: torch.Tensor, offered: list[dict[str, float]], tokens: list[int]) -> int:
    """Under a grammar vLLM renormalises over what it allows: only differences between offered tokens are comparable.

    The number of tokens that there was another for.
    """
    compared = 0
    for row, offer, token in zip(predicted, offered, tokens, strict=True):
        allowed = {other: value for other, value in offer.items() if value != -math.inf}
        compared += len(allowed) > 1
        for other, value in allowed.items():
            if other != str(token):
                served, expected = value - offer[str(token)], (row[int(other)] - row[token]).item()
                if not abs(served - expected) <= 2 * TOLERANCE:
                    raise Mismatch(f"under a grammar, {other} against {token}: {served}, expected {expected}")
    return compared
