"""What the rest of the project asks of a method, and the checks all methods share.

Knows neither a method's equation nor where tensors come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from ..edit import Edits, Site
from ..errors import ArtifactInvalid
from ..fingerprint import Fingerprint
from ..positions import Positions

Project = Callable[[int, torch.Tensor], torch.Tensor]
"""Pushes concatenated head outputs of one layer through its output projection, without bias:
(layer, [num_heads * head_dim]) -> [hidden]."""


_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What tensors are stored in. Smaller formats cannot be added up or checked everywhere."""


@dataclass(frozen=True)
class Method(ABC):
    """A frozen config. Subclasses are frozen dataclasses whose fields are the method's settings."""

    name: ClassVar[str]
    positions: ClassVar[Positions]
    """Where the method edits when neither the artifact nor the request says otherwise."""

    @property
    def parts(self) -> int:
        """How many separate edits it compiles to (two for an untied ReFT)."""
        return 1

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """The layers it edits, ascending, 0-based."""

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """The sites it edits."""

    @abstractmethod
    def shapes(self, base: Fingerprint) -> dict[str, tuple[int, ...]]:
        """Name and shape of each of its tensors on that base model."""

    @abstractmethod
    def compile(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, project: Project) -> tuple[Edits, ...]:
        """One set of edits per part. Pure and differentiable in `tensors`."""

    def check(self, tensors: Mapping[str, torch.Tensor], base: Fingerprint, where: str) -> None:
        """Refuse what cannot be served. Errors: `ArtifactInvalid` naming tensor, value and expectation."""
        outside = [layer for layer in self.layers if not 0 <= layer < base.num_layers]
        if outside:
            raise ArtifactInvalid(f"{where}: layers {outside} are not in 0..{base.num_layers - 1}")
        expected = self.shapes(base)
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        if missing or extra:
            raise ArtifactInvalid(f"{where}: tensors missing: {missing or 'none'}, unexpected: {extra or 'none'}")
        for name, shape in expected.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise ArtifactInvalid(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.dtype not in _STORED:
                raise ArtifactInvalid(f"{where}: {name} has dtype {tensor.dtype}, expected one of {_STORED}")
            ends = torch.stack(tensor.aminmax()) if tensor.numel() else tensor  # a third of the time of all entries
            if not bool(torch.isfinite(ends).all()):
                raise ArtifactInvalid(f"{where}: {name} holds NaN or infinite values")

    def to_config(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """Read the settings back. Errors: `ArtifactInvalid` on unknown, missing or ill-typed settings."""
        known = {field.name for field in fields(cls)}
        if set(config) != known:
            raise ArtifactInvalid(f"{where}: {cls.name} takes the settings {sorted(known)}, got {sorted(config)}")
        try:
            return cls(**{name: _frozen(value) for name, value in config.items()})
        except (TypeError, ValueError, OverflowError) as error:
            raise ArtifactInvalid(f"{where}: {error}") from error


def check_layers(layers: tuple[int, ...]) -> None:
    """Layers are distinct whole numbers in ascending order. Errors: `ValueError`."""
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise ValueError(f"layers must be whole numbers from 0 up, got {layers!r}")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers must be ascending and distinct, got {layers!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
