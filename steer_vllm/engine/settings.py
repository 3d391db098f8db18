"""What a vLLM configuration says about steering: is it on, with which limits, on which base model.

`additional_config["steer_vllm"]` holds the limits; vLLM hashes that field into its compile-cache key, so a graph is
never reused with tables of another shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import SteerConfig
from ..errors import StartupRefused
from ..fingerprint import Fingerprint

KEY = "steer_vllm"
VERSION = 2
"""Raised when the same settings trace to another graph: part of the compile-cache key through `entry`."""


def entry(config: SteerConfig) -> dict[str, Any]:
    """The value of `additional_config[KEY]` that turns steering on."""
    return {"version": VERSION, **config.to_dict()}


def steer_config(vllm_config: Any) -> SteerConfig | None:
    """The limits, or None where steering is off. Errors: `StartupRefused` for settings that are not understood."""
    values = (vllm_config.additional_config or {}).get(KEY)
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise StartupRefused(f"steer_vllm settings: expected an object, got {values!r}")
    return SteerConfig.from_dict({name: value for name, value in values.items() if name != "version"})


def base_source(configs: Any) -> tuple[str, str | None]:
    """Where the files of the model being served come from; `base_fingerprint` says what is in them."""
    return configs.model_config.model, configs.model_config.revision


def base_fingerprint(configs: Any) -> Fingerprint:
    """The fingerprint of the model being served, from the files that vLLM loaded.

    configs: has vLLM's `model_config` and `load_config`, which a reload from other files changes on the runner.
    Errors: `ArtifactInvalid` for files that cannot be read, `StartupRefused` where the served model has other shapes
    than its files say (`hf_overrides`): an artifact would name layers that are not there.
    """
    model = configs.model_config
    folder = Path(model.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    base = Fingerprint.of(folder, weights=str(configs.load_config.load_format) != "dummy")
    served = {"num_layers": model.hf_text_config.num_hidden_layers, "hidden_size": model.hf_text_config.hidden_size}
    differ = [
        f"{name} {getattr(base, name)}, served {value}"
        for name, value in served.items()
        if getattr(base, name) != value
    ]
    if differ:
        raise StartupRefused(f"{folder} and the served model differ ({', '.join(differ)}): are there hf_overrides?")
    return base
