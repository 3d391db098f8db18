"""The artifact folder: `intervention_config.json` beside `intervention.safetensors`.

Each file is read once, into memory, through a handle that follows no symlink, so what was checked is what is used.
The module does not know where folders come from and never runs code from them.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from .errors import ArtifactInvalid, InvalidIntervention
from .fingerprint import Fingerprint
from .intervention import Card, Intervention
from .methods import method_from_config
from .positions import Positions

CONFIG = "intervention_config.json"
TENSORS = "intervention.safetensors"
FORMAT_VERSION = 1

_MAX_CONFIG = 1 << 20
_MAX_HEADER = 1 << 20
_MAX_TENSORS = 1 << 30
_FIELDS = {
    "format_version", "method", "settings", "positions", "default_scale", "base_model", "fingerprint", "description",
    "prompt_format", "training", "metrics", "sha256",
}  # fmt: skip


def save(intervention: Intervention, folder: str | Path) -> None:
    """Validate and write. Each file appears whole and the config, which names the content, goes last: a reader sees an
    old artifact, a new one, or files that do not belong together, which `load` refuses.

    Errors: `ArtifactInvalid` for content that could not be served, `TypeError` for a card that is not JSON; nothing is
    written then.
    """
    root = Path(folder)
    intervention.check(str(root))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in intervention.tensors.items()}
    card = intervention.card
    config = {
        "format_version": FORMAT_VERSION,
        "method": intervention.method.name,
        "settings": intervention.method.to_config(),
        "positions": str(intervention.positions),
        "default_scale": intervention.default_scale,
        "base_model": card.base_model,
        "fingerprint": intervention.base.to_config(),
        "description": card.description,
        "prompt_format": card.prompt_format,
        "training": dict(card.training),
        "metrics": dict(card.metrics),
        "sha256": intervention.digest,
    }
    contents = {TENSORS: safetensors.torch.save(tensors), CONFIG: json.dumps(config, indent=2).encode()}
    root.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(root / name, content)


def load(folder: str | Path) -> Intervention:
    """Read and validate. Errors: `ArtifactInvalid` naming the file, the field and what was expected."""
    root = Path(folder)
    where = str(root / CONFIG)
    config = read_json(root / CONFIG, _MAX_CONFIG)
    if set(config) != _FIELDS:
        missing, extra = sorted(_FIELDS - set(config)), sorted(set(config) - _FIELDS)
        raise ArtifactInvalid(f"{where}: fields missing: {missing or 'none'}, unknown: {extra or 'none'}")
    if type(config["format_version"]) is not int or config["format_version"] != FORMAT_VERSION:
        raise ArtifactInvalid(
            f"{where}: format_version {config['format_version']!r}, this build reads {FORMAT_VERSION}"
        )
    for name, kind in {"base_model": str, "description": str, "training": dict, "metrics": dict, "sha256": str}.items():
        if not isinstance(config[name], kind):
            raise ArtifactInvalid(f"{where}: {name} must be of type {kind.__name__}")
    if not isinstance(config["prompt_format"], (str, type(None))):
        raise ArtifactInvalid(f"{where}: prompt_format must be of type str or null")
    if type(config["default_scale"]) not in (int, float) or abs(config["default_scale"]) > sys.float_info.max:
        raise ArtifactInvalid(f"{where}: default_scale {config['default_scale']!r} is not a finite number")
    try:
        positions = Positions.parse(config["positions"])
    except InvalidIntervention as error:
        raise ArtifactInvalid(f"{where}: {error.message}") from error
    intervention = Intervention(
        method=method_from_config(config["method"], config["settings"], where),
        tensors=_read_tensors(root / TENSORS),
        base=Fingerprint.from_config(config["fingerprint"], f"{where}: fingerprint"),
        positions=positions,
        default_scale=float(config["default_scale"]),
        card=Card(**{n: config[n] for n in ("base_model", "description", "prompt_format", "training", "metrics")}),
    )
    intervention.check(str(root))
    if intervention.digest != config["sha256"]:
        raise ArtifactInvalid(f"{where}: sha256 is {config['sha256']}, the content has {intervention.digest}")
    return intervention


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Errors: `ArtifactInvalid`."""
    try:
        value = json.loads(_read(path, limit))
    except (ValueError, RecursionError) as error:
        raise ArtifactInvalid(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactInvalid(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no reader, and no crash, ever leaves half of it under its name."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path, limit: int) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ArtifactInvalid(f"{path}: {reason} (a regular file is needed, no symlink)") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ArtifactInvalid(f"{path}: not a regular file")
    with os.fdopen(handle, "rb") as stream:
        if status.st_size > limit:
            raise ArtifactInvalid(f"{path}: {status.st_size} bytes, at most {limit} are read")
        return stream.read(limit)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    content = _read(path, _MAX_TENSORS)
    header = int.from_bytes(content[:8], "little")
    if len(content) < 8 or header > min(_MAX_HEADER, len(content) - 8):
        raise ArtifactInvalid(f"{path}: not a safetensors file, or a truncated one (header of {header} bytes)")
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactInvalid(f"{path}: damaged safetensors file: {error}") from error
