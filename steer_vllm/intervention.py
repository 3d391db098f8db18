"""An intervention: a method, its tensors, where it edits and the base model it belongs to.

Immutable once made. It does not know files (`artifact`), requests (`segments`) or tables (`slots`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .edit import Edits
from .errors import ArtifactInvalid
from .fingerprint import Fingerprint
from .methods import Method, Project
from .positions import Positions


@dataclass(frozen=True)
class Card:
    """What a person wants to know of an artifact; no part of its identity.

    prompt_format: the template it was trained with, `{q}` for the question, or None.
    """

    base_model: str = ""
    description: str = ""
    prompt_format: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Intervention:
    """A trained behaviour. Two interventions are the same one exactly when their digests are equal."""

    method: Method
    tensors: Mapping[str, torch.Tensor]
    base: Fingerprint
    positions: Positions
    default_scale: float = 1.0
    card: Card = field(default_factory=Card)

    def check(self, where: str = "intervention") -> None:
        """Refuse what can never be served. Errors: `ArtifactInvalid` with the tensor or field at fault."""
        self.method.check(self.tensors, self.base, where)
        if isinstance(self.default_scale, bool) or not math.isfinite(self.default_scale):
            raise ArtifactInvalid(f"{where}: default_scale {self.default_scale!r} is not a finite number")
        if self.positions.parts != self.method.parts:
            raise ArtifactInvalid(
                f"{where}: positions {self.positions} need {self.positions.parts} edits, {self.method.name} has "
                f"{self.method.parts}"
            )

    def check_base(self, served: Fingerprint, where: str = "intervention") -> None:
        """Refuse another base model than the one served. Errors: `ArtifactInvalid` with what differs."""
        difference = self.base.difference(served)
        if difference:
            raise ArtifactInvalid(f"{where}: made for another base model (artifact against server): {difference}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what it does: method, settings, positions and tensors. Never its name, path or card."""
        content = {"method": self.method.name, "settings": self.method.to_config(), "positions": str(self.positions)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def compile(self, project: Project) -> tuple[Edits, ...]:
        """The edits of each part, in the dtype of its tensors. `project` pushes head outputs through `o_proj`."""
        return self.method.compile(self.tensors, self.base, project)

    @classmethod
    def load(cls, folder: str | Path) -> Intervention:
        """Read and validate an artifact folder. Errors: `ArtifactInvalid`."""
        from .artifact import load

        return load(folder)

    def save(self, folder: str | Path) -> None:
        """Validate and write an artifact folder. Errors: `ArtifactInvalid`."""
        from .artifact import save

        save(self, folder)
