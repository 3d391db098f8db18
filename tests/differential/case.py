"""A differential case as data: one engine configuration, artifacts, and what happens at which step.

Plain JSON both ways, so that a failing case is a file that anyone can run again. Knows neither engine nor oracle.
"""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

VOCABULARY = 813
"""Of the tokenizer that every drawn model shares (the demo model's)."""
FIRST_WORD = 10
"""Token ids below are special."""
MODEL_LEN = 256
"""Longest request, in tokens."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shape(_Data):
    """A tiny random-weight model."""

    family: Literal["llama", "qwen2", "qwen3", "gemma3"] = "llama"
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    hidden: int = 64
    tied: bool = False
    seed: int = 0


class Configuration(_Data):
    """How the engine is started.

    compiled: by Inductor on V1; on V2, whose interpreter cannot run generated code, the graph is traced and no more.
    processes: the engine core in a process of its own. llm: arguments of vLLM. steer: limits of steer-vllm.
    """

    shape: Shape = Shape()
    runner: Literal["v1", "v2"] = "v1"
    compiled: bool = False
    processes: bool = False
    llm: dict[str, Any] = {}
    steer: dict[str, Any] = {}


class Artifact(_Data):
    """A random artifact of one method. rank: of LoReFT; site: of directions.

    "force": a direction so strong that every token becomes `seed`, a token id.
    """

    method: Literal["lofit", "direction", "loreft", "force"]
    seed: int
    positions: str
    rank: int = 4
    site: str = "block_output"


class Prompt(_Data):
    """`shared` tokens that every prompt of the same family begins with, then `own` tokens drawn from `seed`.

    follows: a request whose prompt and answer come first, where it has ended by then (a second turn of a chat).
    """

    family: int = 0
    shared: int = 0
    own: int = 1
    seed: int = 0
    follows: int | None = None

    def tokens(self) -> list[int]:
        """The token ids, without what `follows` adds."""
        return [*_tokens(f"family {self.family}", self.shared), *_tokens(f"own {self.seed}", self.own)]


def _tokens(seed: str, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(count)]


class Ask(_Data):
    """One intervention of a request; None: as the artifact says."""

    name: str
    scale: float | None = None
    positions: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a user writes it."""
        return self.model_dump(exclude_none=True)


class Request(_Data):
    """A request that enters at step `at` and is cancelled `abort_after` steps later, unless it has ended."""

    at: int
    prompt: Prompt
    asks: tuple[Ask, ...] = ()
    params: dict[str, Any] = {}
    priority: int = 0
    response_start: int | None = None
    abort_after: int | None = None


class Change(_Data):
    """What an operator does at step `at`, before the requests of that step enter. artifact: its number in the case."""

    at: int
    do: Literal["load", "unload", "reset_cache"]
    name: str = ""
    artifact: int = 0


class Case(_Data):
    """Everything that is needed to run it again. Names a0, a1, ... are loaded at the start, one for each artifact."""

    configuration: Configuration
    artifacts: tuple[Artifact, ...] = ()
    changes: tuple[Change, ...] = ()
    requests: tuple[Request, ...] = ()

    def bound(self) -> list[dict[str, int]]:
        """For each request, the artifact that each name stands for when the request enters."""
        names = {f"a{i}": i for i in range(len(self.artifacts))}
        moments: list[dict[str, int]] = []
        changes = sorted(self.changes, key=lambda change: change.at)
        for request in self.requests:
            now = dict(names)
            for change in changes:
                if change.at > request.at:
                    break
                if change.do == "load":
                    now[change.name] = change.artifact
                elif change.do == "unload":
                    now.pop(change.name, None)
            moments.append(now)
        return moments
