"""Tiny random-weight models of drawn shapes, with the demo model's tokenizer. Knows transformers, no engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from steer_vllm.demo import MODEL_PATH

from .case import MODEL_LEN, VOCABULARY, Shape


def make(shape: Shape, folder: Path) -> Path:
    """Write the model unless it is there, and return its folder."""
    path = folder / "-".join(str(value) for value in shape.model_dump().values())
    if not (path / "config.json").exists():
        torch.manual_seed(shape.seed)
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=torch.float32)
        _spread(model)
        model.save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(MODEL_PATH / name, path / name)
    return path


def _config(shape: Shape) -> PretrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 2 * MODEL_LEN,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if shape.family == "qwen2":  # derives its head size
        return Qwen2Config(**common | {"hidden_size": shape.heads * shape.head_dim})
    common["head_dim"] = shape.head_dim
    if shape.family == "qwen3":
        return Qwen3Config(**common)
    if shape.family == "gemma3":  # every other layer sees a short window
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(shape.layers)]
        return Gemma3TextConfig(**common, sliding_window=24, layer_types=kinds, query_pre_attn_scalar=shape.head_dim)
    return LlamaConfig(**common)


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that attention and MLP move the residual stream, so that a wrong key or value shows."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[1] ** 0.5)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
