"""The isolation canary: every artifact forces a token of its own, so a token of another's is a leak.

The forcing directions begin in the first layer, so a leaked key or value also moves log-probabilities, which are
compared with the oracle as in every case.
"""

from __future__ import annotations

import random
from typing import Any

from .case import Artifact, Ask, Case, Change, Configuration, Prompt, Request
from .checker import Mismatch

ARTIFACTS = 64
FIRST = 100
"""The token that the first artifact forces."""
TOKENS = 12
"""That a request beside changing neighbours is served."""


def case(configuration: Configuration, seed: int, requests: int = 96) -> Case:
    """A request of every artifact, others of any or none, in a rush; cancellations, replacements, evictions."""
    roll = random.Random(f"canary {seed}")
    more = [roll.choice([None, roll.randrange(ARTIFACTS)]) for _ in range(requests - ARTIFACTS)]
    order = [*range(ARTIFACTS), *more]
    roll.shuffle(order)
    changes = [
        Change(at=roll.randrange(60), do="load", name=_name(roll), artifact=roll.randrange(ARTIFACTS))
        for _ in range(12)
    ]
    changes += [Change(at=roll.randrange(60), do="unload", name=_name(roll)) for _ in range(3)]
    changes += [Change(at=roll.randrange(60), do="reset_cache")]
    return Case(
        configuration=configuration,
        artifacts=tuple(Artifact(method="force", seed=FIRST + i, positions="all") for i in range(ARTIFACTS)),
        changes=tuple(changes),
        requests=tuple(_request(roll, number) for number in order),
    )


def _name(roll: random.Random) -> str:
    return f"a{roll.randrange(ARTIFACTS)}"


def _request(roll: random.Random, artifact: int | None) -> Request:
    return Request(
        at=roll.randrange(60),
        prompt=Prompt(
            family=roll.randrange(2),
            shared=roll.choice([0, 32, 33, 64]),
            own=roll.choice([1, 2, 9]),
            seed=roll.randrange(3),
        ),
        asks=() if artifact is None else (Ask(name=f"a{artifact}"),),
        params={"temperature": roll.choice([0.0, 1.0]), "max_tokens": roll.choice([1, 4, 40])},
        abort_after=roll.randrange(12) if roll.random() < 0.2 else None,
    )


def check(case: Case, answer: dict[str, Any]) -> int:
    """Every token of a steered request is its own artifact's; how many there were. Errors: `Mismatch`."""
    seen = 0
    for request, bound, result in zip(case.requests, case.bound(), answer["results"], strict=True):
        for ask in request.asks:
            if ask.name in bound:
                own = case.artifacts[bound[ask.name]].seed
                tokens = [token for choice in result["choices"] for token in choice["tokens"]]
                if any(token != own for token in tokens):
                    raise Mismatch(f"{ask.name} forces {own}, served were {tokens}: {request}")
                seen += len(tokens)
    return seen


def neighbours(configuration: Configuration, seed: int) -> tuple[Case, Case]:
    """The same batch twice: behind every second request's intervention is other content of the same kind and size."""
    roll = random.Random(f"neighbours {seed}")
    methods: list[dict[str, Any]] = [
        {"method": "lofit", "positions": "all"},
        {"method": "direction", "positions": "response"},
        {"method": "loreft", "positions": "f3+l2"},
        {"method": "direction", "positions": "all", "site": "mlp_output"},
    ]
    kinds = [roll.choice(methods) for _ in range(12)]
    requests = tuple(
        Request(
            at=roll.randrange(6),
            prompt=Prompt(shared=roll.choice([0, 33]), own=1 + roll.randrange(20), seed=i),
            asks=(Ask(name=f"a{i}"),),
            params={"temperature": 0.0, "max_tokens": TOKENS},
        )
        for i in range(len(kinds))
    )

    def made(others: int) -> Case:
        artifacts = (Artifact(**kind, seed=i if i % 2 == 0 else others + i) for i, kind in enumerate(kinds))
        return Case(configuration=configuration, artifacts=tuple(artifacts), requests=requests)

    return made(100), made(200)


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> int:
    """The requests whose own content did not change were served the same bits; how many of the others changed.

    Errors: `Mismatch`.
    """
    changed = 0
    for number, (mine, theirs) in enumerate(zip(one["results"], other["results"], strict=True)):
        for result in (mine, theirs):
            if [len(choice["tokens"]) for choice in result["choices"]] != [TOKENS]:
                raise Mismatch(f"request {number} was not served: {result}")
        if number % 2 == 0 and mine["choices"] != theirs["choices"]:
            raise Mismatch(f"request {number} changed with its neighbours: {mine['choices']}, {theirs['choices']}")
        changed += mine["choices"] != theirs["choices"]
    return changed
