"""A head set: the score of every attention head for a task, and the ranking that follows.

An artifact of its own (`head_set.json`): step two of LoFiT takes its heads from any head set, whoever made it. It does
not know how scores are made.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from .artifact import read_json, write_whole
from .errors import ArtifactInvalid
from .fingerprint import Fingerprint

FILE = "head_set.json"
_FIELDS = {"format_version", "method", "task", "fingerprint", "scores", "ranking"}
_MAX_BYTES = 16 << 20

Head = tuple[int, int]
"""(layer, head), both 0-based."""


@dataclass(frozen=True)
class HeadSet:
    """scores[layer][head]: finite, higher is more important. method: how they were made; task: on what."""

    base: Fingerprint
    task: str
    method: str
    scores: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        shape = (len(self.scores), {len(row) for row in self.scores})
        if shape != (self.base.num_layers, {self.base.num_heads}):
            raise ArtifactInvalid(
                f"head set: scores must be {self.base.num_layers} layers of {self.base.num_heads} heads"
            )
        if not all(isinstance(score, (int, float)) and math.isfinite(score) for row in self.scores for score in row):
            raise ArtifactInvalid("head set: every score must be a finite number")

    @classmethod
    def random(cls, base: Fingerprint, seed: int) -> HeadSet:
        """A ranking by chance: the control that selected heads are compared with."""
        draw = random.Random(seed)
        scores = tuple(tuple(draw.random() for _ in range(base.num_heads)) for _ in range(base.num_layers))
        return cls(base, f"random, seed {seed}", "random", scores)

    @property
    def ranking(self) -> list[Head]:
        """All heads, best first; equal scores in model order."""
        heads = [(layer, head) for layer, row in enumerate(self.scores) for head in range(len(row))]
        return sorted(heads, key=lambda at: (-self.scores[at[0]][at[1]], at))

    def top(self, count: int) -> tuple[Head, ...]:
        """The best `count` heads in model order. Errors: `ValueError` for a count the model does not have."""
        total = self.base.num_layers * self.base.num_heads
        if not 1 <= count <= total:
            raise ValueError(f"the model has {total} heads, {count} were asked for")
        return tuple(sorted(self.ranking[:count]))

    def overlap(self, other: HeadSet, count: int) -> float:
        """Share of the top `count` heads that both have, 0 to 1. Errors: `ArtifactInvalid` for another base."""
        difference = self.base.difference(other.base)
        if difference:
            raise ArtifactInvalid(f"head sets of different base models: {difference}")
        return len(set(self.top(count)) & set(other.top(count))) / count

    def save(self, folder: str | Path) -> None:
        """Write `head_set.json` into the folder."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        content = {
            "format_version": 1,
            "method": self.method,
            "task": self.task,
            "fingerprint": self.base.to_config(),
            "scores": self.scores,
            "ranking": self.ranking,
        }
        write_whole(root / FILE, json.dumps(content).encode())

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read `head_set.json`, or the one in a folder. Errors: `ArtifactInvalid`."""
        file = Path(path)
        file = file / FILE if file.is_dir() else file
        content = read_json(file, _MAX_BYTES)
        if set(content) != _FIELDS or content["format_version"] != 1:
            raise ArtifactInvalid(f"{file}: expected format_version 1 and the fields {sorted(_FIELDS)}")
        try:
            head_set = cls(
                base=Fingerprint.from_config(content["fingerprint"], f"{file}: fingerprint"),
                task=str(content["task"]),
                method=str(content["method"]),
                scores=tuple(tuple(row) for row in content["scores"]),
            )
        except (TypeError, OverflowError) as error:
            raise ArtifactInvalid(f"{file}: scores must be rows of numbers") from error
        if [list(head) for head in head_set.ranking] != content["ranking"]:
            raise ArtifactInvalid(f"{file}: the ranking does not follow from the scores")
        return head_set
