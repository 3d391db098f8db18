"""Prefix caching is exact and causal: what was edited is never served to others, what was not is shared.

DESIGN: a block's key is the list of segments that intersect it. One engine, one prompt of three full blocks and a rest;
every answer is checked against the oracle and every count of cached tokens against what the keys promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from steer_vllm import Intervention
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, cached, engines, oracle

BLOCK = 32
LONG = [20 + (13 * i) % 60 for i in range(100)]
FULL = LONG[: 3 * BLOCK]
"""Ends on a block's edge: its last token is computed again, so two blocks can be reused."""
TURN = 62
"""Tokens of a first answer: with the prompt it fills five blocks (the last token is never computed)."""
NEXT = [90 + i for i in range(7)]
"""What the user says in the second turn."""


@dataclass(frozen=True)
class Step:
    """A request, which content its names stand for, and how many cached tokens it must find."""

    title: str
    tokens: list[int]
    asks: list[dict[str, Any]]
    cached: int
    content: str = "first"
    answer: int = 6


@cache
def contents() -> dict[str, dict[str, Intervention]]:
    base = Fingerprint.of(MODEL_PATH)
    first = {
        "lofit": artifacts.lofit(base, 1),
        "other": artifacts.lofit(base, 2),
        "reft": artifacts.loreft(base, 3, "f2+l2"),
        "mild": artifacts.lofit(base, 5, strength=0.5),
    }
    return {"first": first, "second": {**first, "lofit": artifacts.lofit(base, 4)}}


@cache
def second_turn(positions: str) -> list[int]:
    """The prompt, the answer that an intervention gives to it at these positions, and what the user says then."""
    model, tokens = oracle.load(str(MODEL_PATH)), list(LONG)
    for _ in range(TURN):
        ask = {"name": "mild", "positions": positions}
        tokens.append(int(oracle.logprobs(model, tokens, [ask], contents()["first"], len(LONG))[-1].argmax()))
    return tokens + NEXT


@cache
def steps() -> list[Step]:
    lofit, other = [{"name": "lofit"}], [{"name": "other"}]
    prompt, all_, response = ([{"name": "mild", "positions": kind}] for kind in ("prompt", "all", "response"))
    return [
        Step("base, cold", LONG, [], 0),
        Step("all, after base: nothing shared", LONG, lofit, 0),
        Step("base, after all", LONG, [], 96),
        Step("all, again", LONG, lofit, 96),
        Step("another artifact on the same prompt", LONG, other, 0),
        Step("another scale", LONG, [{"name": "lofit", "scale": 0.5}], 0),
        Step("that scale, again", LONG, [{"name": "lofit", "scale": 0.5}], 96),
        Step("response reuses the base's blocks", LONG, [{"name": "lofit", "positions": "response"}], 96),
        Step("generated, too", LONG, [{"name": "other", "positions": "generated"}], 96),
        Step("first-last touches the first block", LONG, [{"name": "reft"}], 0),
        Step("first-last, again", LONG, [{"name": "reft"}], 96),
        Step("composition is a key of its own", LONG, [*lofit, *other], 0),
        Step("in any order", LONG, [*other, *lofit], 96),
        Step("prompt that ends on an edge, base", FULL, [], 64),
        Step("prompt that ends on an edge, response", FULL, [{"name": "lofit", "positions": "response"}], 64),
        Step("prompt that ends on an edge, generated", FULL, [{"name": "lofit", "positions": "generated"}], 64),
        Step("scale zero is the base", LONG, [{"name": "lofit", "scale": 0.0}], 96),
        Step("prompt positions", LONG, prompt, 0),
        Step("prompt positions of a prompt that goes on otherwise", [*LONG[:70], *NEXT], prompt, 64),
        Step("first turn, all", LONG, all_, 96, answer=TURN),  # "prompt" edits the same in these blocks
        Step("second turn, all: the answer's blocks too", second_turn("all"), all_, 160),
        Step("first turn, response", LONG, response, 96, answer=TURN),
        Step("second turn, response: not the edited answer's", second_turn("response"), response, 96),
        Step("that turn, base: all that is not edited", second_turn("response"), [], 160),
        Step("same name, other content: nothing shared", LONG, lofit, 0, content="second"),
        Step("base, at the end", LONG, [], 96),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("prefix")
    replacement = artifacts.save_all({"lofit": contents()["second"]["lofit"]}, folder / "second")[0]
    job = artifacts.save_all(contents()["first"], folder / "first")
    current = "first"
    for step in steps():
        if step.content != current:
            job.append({**replacement, "replace": True})
            current = step.content
        request = {"tokens": step.tokens, "interventions": step.asks, "params": {"max_tokens": step.answer}}
        job.append({"do": "generate", "steered": True, "requests": [request]})
    answers = engines.run(
        engines.V1_PROCESSES, folder / "run", MODEL_PATH, job, block_size=BLOCK, enable_prefix_caching=True
    )
    return [answer[0] for answer in answers if isinstance(answer, list)]


def test_counts_are_what_the_keys_promise(results: list[dict[str, Any]]) -> None:
    cached.check_counts(steps(), results)


def test_answers_are_exact(results: list[dict[str, Any]]) -> None:
    model = oracle.load(str(MODEL_PATH))
    for step, result in zip(steps(), results, strict=True):
        request = {"tokens": step.tokens, "interventions": step.asks}
        oracle.check(model, request, result, contents()[step.content])
