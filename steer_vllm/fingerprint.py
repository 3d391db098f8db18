"""Which base model an artifact was made for.

A fingerprint is the model's shapes and a digest over a fixed sample of its weights, read from the checkpoint's files,
so that training and serving compute the same one whatever they do to the weights in memory. It does not know how to
download a model and does not load one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ArtifactInvalid

_SHAPES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
}
_HEAD_DIM = ("v_head_dim", "head_dim", "attention_head_dim")
"""A head puts out as many values as its value vectors have: in latent attention (DeepSeek) fewer than its queries."""
_SAMPLE = 64
"""Values read from the middle of each weight matrix: a few hundred KB of an 8B model, different after any training."""


@dataclass(frozen=True)
class Fingerprint:
    """Shapes and weight digest of a base model. head_dim: values that a head puts out, before the output projection.
    `weights` is None where there are no weight files (random weights).
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    weights: str | None

    @classmethod
    def of(cls, folder: str | Path, *, weights: bool = True) -> Fingerprint:
        """The fingerprint of a checkpoint folder in Hugging Face layout.

        weights=False leaves the weight digest out, for an engine that was started on random weights.
        Errors: `ArtifactInvalid` when config.json is missing or names no shapes, or a weight file is damaged.
        """
        root = Path(folder)
        try:
            config = json.loads((root / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ArtifactInvalid(f"{root / 'config.json'}: cannot be read as a model config: {error}") from error
        if not isinstance(config, dict):
            raise ArtifactInvalid(f"{root / 'config.json'}: expected a JSON object, got {type(config).__name__}")
        config = {**config, **(config.get("text_config") or {})}
        shapes = {name: _first(config, keys, root) for name, keys in _SHAPES.items()}
        head_dim = next((config[key] for key in _HEAD_DIM if config.get(key)), None)
        head_dim = head_dim or shapes["hidden_size"] // shapes["num_heads"]
        return cls(**shapes, head_dim=int(head_dim), weights=_weights_digest(root) if weights else None)

    @classmethod
    def from_config(cls, values: Any, where: str) -> Fingerprint:
        """Read the JSON form back. Errors: `ArtifactInvalid` on missing, unknown or mistyped fields."""
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ArtifactInvalid(f"{where}: expected the fields {', '.join(f.name for f in fields(cls))}")
        for name, value in values.items():
            kinds: tuple[type, ...] = (str, type(None)) if name == "weights" else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ArtifactInvalid(f"{where}.{name}: {value!r} is not of type {kinds[0].__name__}")
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def difference(self, other: Fingerprint) -> str | None:
        """What differs, in words, or None when both are the same model."""
        mine, theirs = asdict(self), asdict(other)
        parts = [f"{name} {mine[name]} against {theirs[name]}" for name in mine if mine[name] != theirs[name]]
        return ", ".join(parts) or None


def _first(config: dict[str, Any], keys: tuple[str, ...], root: Path) -> int:
    for key in keys:
        if isinstance(config.get(key), int):
            return int(config[key])
    raise ArtifactInvalid(f"{root / 'config.json'}: none of the fields {', '.join(keys)} is there")


def _weights_digest(root: Path) -> str | None:
    """SHA-256 over the names, shapes and middle values of every matrix, in the order of names, whatever the shards."""
    where: dict[str, Path] = {}
    for file in sorted(root.glob("*.safetensors")):
        where.update(dict.fromkeys(_names(file), file))
    if not where:
        return _pickled_digest(root)
    digest = hashlib.sha256()
    opened = {file: safe_open(file, framework="pt") for file in set(where.values())}
    for name in sorted(where):
        part = opened[where[name]].get_slice(name)
        shape = part.get_shape()
        if len(shape) != 2:
            continue
        row = part[shape[0] // 2 : shape[0] // 2 + 1, :_SAMPLE].flatten()
        digest.update(f"{name}{shape}{row.dtype}".encode())
        digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ArtifactInvalid(f"{file}: damaged safetensors file: {error}") from error


def _pickled_digest(root: Path) -> str | None:
    """Old checkpoints (.bin) cannot be sampled by tensor: their sizes and the middle of each file stand for them."""
    files = sorted(root.glob("*.bin"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}{size}".encode())
        with file.open("rb") as stream:
            stream.seek(size // 2)
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()
