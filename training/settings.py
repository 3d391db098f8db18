"""What can be set of each training run, with defaults that work, and how settings are read from YAML and flags.

Light to import: help and errors need no torch. It does not know how a setting is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ..errors import InvalidIntervention, UserError
from ..positions import Positions

LEAST_STEPS = 240
"""Updates below which an intervention of a few hundred numbers has learnt little, however small its data."""


def _layers(value: Any) -> Any:
    """A word, or layers as `[0, 3, 7]`, `0,3,7` or `0;3;7`."""
    if isinstance(value, str) and value.isalpha():
        return value
    parts = value.replace(";", ",").split(",") if isinstance(value, str) else value
    try:
        layers = tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        layers = ()
    if not layers or layers[0] < 0:
        raise ValueError("expected a word or layers such as 0,3,7")
    return layers


class Settings(BaseModel):
    """What every way of learning has. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(42, ge=0, description="seed of the start values and of the order of the data")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the frozen model: auto is bfloat16 for 16-bit checkpoints, else float32"
    )
    batch_size: int = Field(8, ge=1, description="examples of one forward pass")
    max_length: int = Field(512, ge=8, description="tokens; longer examples are left out and counted")
    separator: str = Field(
        " ",
        description="joins prompt and completion where neither the prompt ends nor the completion begins with space",
    )


class GradientSettings(Settings):
    """AdamW with linear decay, whatever the method."""

    epochs: float | None = Field(
        None, gt=0, description=f"passes over the data; default 5, and more until {LEAST_STEPS} steps on small data"
    )
    max_steps: int | None = Field(None, ge=1, description="updates; takes the place of epochs")
    accumulation: int = Field(1, ge=1, description="batches whose gradients make one update")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the updates in which the learning rate rises")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    logging_steps: int = Field(10, ge=1, description="updates between two logged losses")

    def steps(self, examples: int) -> int:
        """Updates for that many examples."""
        if self.max_steps is not None:
            return self.max_steps
        per_epoch = -(-examples // (self.batch_size * self.accumulation))
        if self.epochs is not None:
            return max(1, round(self.epochs * per_epoch))
        return max(5 * per_epoch, LEAST_STEPS)


class LoFiTSettings(GradientSettings):
    """Yin, Ye, Durrett 2024, appendix: rates of the 7B models, 3% to 10% of the heads.

    Their rates of step 2, 5e-3 to 2e-2, are for heads whose outputs are of the order of 0.2. A is relative to a head's
    output and v is not, so the default is relative too.
    """

    scaling_lr: float = Field(5e-3, gt=0, description="step 1: learning rate of the scaling A")
    l1: float = Field(5e-4, ge=0, description="step 1: lambda, the weight of sum |A|")
    offset_lr: float | None = Field(
        None, gt=0, description="step 2: learning rate of the offsets v; default 5% of the heads' mean output"
    )
    num_heads: int | None = Field(None, ge=1, description="heads to tune; default 10% of the model's")

    def count(self, heads: int) -> int:
        """How many of the model's `heads` are tuned."""
        return self.num_heads if self.num_heads is not None else max(1, heads // 10)


class LoReFTSettings(GradientSettings):
    """Wu et al. 2024, with the rank and rate of pyreft's example for small data; their large runs take 9e-4."""

    rank: int = Field(4, ge=1, description="dimensions of the edited subspace")
    layers: Annotated[Literal["all"] | tuple[int, ...], BeforeValidator(_layers)] = Field(
        "all", description="all, or layers such as 3,9,18"
    )
    positions: str = Field("f7+l7", description="tokens to edit, such as f7+l7 (tied) or f7+l7/untied")
    lr: float = Field(4e-3, gt=0, description="learning rate")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")

    @field_validator("positions")
    @classmethod
    def _known(cls, value: str) -> str:
        return _positions(value)


class DirectionSettings(Settings):
    """A mean difference has nothing to tune but where and how strongly it is added."""

    layers: Annotated[Literal["best", "all"] | tuple[int, ...], BeforeValidator(_layers)] = Field(
        "best", description="best (the one layer that separates the pairs best), all, or layers such as 8,9,10"
    )
    coefficient: float = Field(1.0, description="multiplies the mean difference", allow_inf_nan=False)
    positions: str = Field("response", description="tokens to edit: response, generated, all, prompt")

    @field_validator("positions")
    @classmethod
    def _known(cls, value: str) -> str:
        return _positions(value)


def _positions(value: str) -> str:
    try:
        return str(Positions.parse(value))
    except InvalidIntervention as error:
        raise ValueError(error.message.removeprefix("positions: ")) from error


S = TypeVar("S", bound=Settings)


def read_settings(kind: type[S], config: Path | None = None, flags: Mapping[str, Any] | None = None) -> S:
    """Defaults, then a YAML file, then flags. Errors: `UserError` naming the file or flag, the field, what is wrong."""
    flags = flags or {}
    from_file = _read_yaml(config) if config is not None else {}
    try:
        return kind.model_validate({**from_file, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        where = f"--{name.replace('_', '-')}" if name in flags else f"{config or 'settings'}: {name}"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: no such setting; there are {', '.join(sorted(kind.model_fields))}") from error
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {what}, got {first['input']!r}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: expected settings by name, such as `seed: 1`")
    return content
