"""The base model of a run: frozen weights, tokenizer, fingerprint.

Reads a folder in Hugging Face layout or a model of the Hub. It does not know what is trained on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import UserError
from ..fingerprint import Fingerprint
from .collate import Encoder
from .settings import Settings

_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What is fetched from the Hub: configuration, weights and tokenizer, never code or pickles."""


@dataclass(frozen=True)
class Base:
    """name: as artifacts quote it, a Hub id or a folder's name."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: Fingerprint

    def encoder(self, settings: Settings) -> Encoder:
        """Tokenises as the settings say, within the model's context."""
        context = getattr(self.model.config, "max_position_embeddings", None) or settings.max_length
        return Encoder(self.tokenizer, min(settings.max_length, context), settings.separator)


def load_base(model: str, dtype: str = "auto") -> Base:
    """Load a folder or Hub id, every weight frozen, on the GPU if there is one.

    dtype: see `Settings.dtype`. Errors: `UserError` when there is no such model or it cannot be loaded.
    """
    folder = _folder(model)
    fingerprint = Fingerprint.of(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(config, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model}: transformers cannot load it: {error}") from error
    loaded.requires_grad_(False).eval()
    if torch.cuda.is_available():
        loaded.to("cuda")
    name = folder.resolve().name if Path(model).is_dir() else model
    return Base(name, loaded, tokenizer, fingerprint)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=_NEEDED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model: {model!r} is neither a folder nor a model of the Hub within reach: {first}"
        ) from error


def _dtype(config: Any, wanted: str) -> torch.dtype:
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    # float16 has too little range for gradients; bfloat16 has the range of float32
    return torch.bfloat16 if config.dtype in (torch.bfloat16, torch.float16) else torch.float32


def edited_layers(layers: str | tuple[int, ...], base: Fingerprint) -> tuple[int, ...]:
    """`all` or a list, ascending. Errors: `UserError` for a layer that is not there."""
    if layers == "all":
        return tuple(range(base.num_layers))
    chosen = tuple(int(layer) for layer in layers)
    outside = [layer for layer in chosen if layer >= base.num_layers]
    if outside:
        raise UserError(f"--layers: {outside} are not in 0..{base.num_layers - 1}")
    return chosen
