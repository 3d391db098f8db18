"""What an operator configures: a YAML file, overridden by the command line; the keys come from the environment too.

Unknown settings are refused. Paths are relative to the working directory. Knows no request and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..config import SteerConfig
from ..edit import Site
from ..errors import StartupRefused
from .keys import Keys


class Limits(BaseModel):
    """How much of everything: the engine's limits (see `SteerConfig`) and those of requests.

    body_mb: largest request body, MB. n: largest number of answers of a request with interventions.
    row_wait: seconds that a request waits for table rows before it is turned away.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    additive_rows: int = SteerConfig.additive_rows
    low_rank_rows: int = SteerConfig.low_rank_rows
    max_rank: int = SteerConfig.max_rank
    additive_sites: tuple[Site, ...] = SteerConfig.additive_sites
    low_rank_sites: tuple[Site, ...] = SteerConfig.low_rank_sites
    per_request: int = SteerConfig.per_request
    max_scale: float = SteerConfig.max_scale
    memory_gib: float = SteerConfig.memory_gib
    body_mb: float = Field(default=4.0, gt=0, le=1024)
    n: int = Field(default=16, ge=1)
    row_wait: float = Field(default=10.0, ge=0, le=3600)

    @property
    def engine(self) -> SteerConfig:
        """The part that the engine needs. Errors: `StartupRefused`."""
        return SteerConfig(**self.model_dump(exclude={"body_mb", "n", "row_wait"}))

    @property
    def body_bytes(self) -> int:
        return int(self.body_mb * (1 << 20))


class Source(BaseModel):
    """An artifact to load at the start: the name it gets and the folder it is in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read NAME=PATH. Errors: `StartupRefused`."""
        name, given, path = text.partition("=")
        if not given or not name or not path:
            raise StartupRefused(f"--artifact {text!r}: expected NAME=PATH, for example honest=out/honest")
        return cls(name=name, source=path)


class Settings(BaseModel):
    """Everything about a server that vLLM's own flags do not say.

    store: folder below which /v1/load_intervention may find artifacts; without one it loads only what was given here.
    api_key guards every path but /health; admin_key those of the operator (`keys.ADMIN_PATHS`). Neither belongs in a
    file that others can read: STEER_VLLM_API_KEY and STEER_VLLM_ADMIN_KEY are read from the environment.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1)
    store: Path | None = None
    limits: Limits = Limits()
    artifacts: tuple[Source, ...] = ()
    api_key: SecretStr | None = None
    admin_key: SecretStr | None = None

    @field_validator("store")
    @classmethod
    def _store_is_there(cls, store: Path | None) -> Path | None:
        if store is not None and not store.is_dir():
            raise ValueError(f"{store} is not a folder")
        return store

    @field_validator("artifacts")
    @classmethod
    def _names_are_distinct(cls, artifacts: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [artifact.name for artifact in artifacts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"given twice: {', '.join(twice)}")
        return artifacts

    def keys(self) -> Keys:
        api, admin = (key.get_secret_value() if key else None for key in (self.api_key, self.admin_key))
        return Keys(api, admin)

    @classmethod
    def read(
        cls,
        file: Path | None = None,
        *,
        artifacts: Sequence[Source] = (),
        limits: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> Settings:
        """The settings of a YAML file (or none), overridden by those given that are not None; artifacts add up.

        Errors: `StartupRefused` naming the file and the setting.
        """
        where = str(file) if file else "settings"
        content = _read_yaml(file) if file else {}
        from_file = content.get("limits") or {}
        overrides = {name: value for name, value in (limits or {}).items() if value is not None}
        if overrides and isinstance(from_file, dict):
            content["limits"] = {**from_file, **overrides}
        if artifacts:
            content["artifacts"] = [*(content.get("artifacts") or ()), *artifacts]
        keys = _Keys().model_dump(exclude_none=True)
        try:
            return cls(**{**content, **keys, **{name: value for name, value in given.items() if value is not None}})
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise StartupRefused(f"{where}: {faults}") from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StartupRefused(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise StartupRefused(f"{file}: expected settings such as `model: ...`")
    return content


class _Keys(BaseSettings):
    """The two secrets, from the environment."""

    model_config = SettingsConfigDict(env_prefix="STEER_VLLM_")

    api_key: SecretStr | None = None
    admin_key: SecretStr | None = None
