"""A random LoRA adapter in PEFT's format, for vLLM's own LoRA beside which the edits are measured.

It is strong, for the model's own random weights are small and the answers shall differ. The adapters of a batch are one
folder under several names: vLLM keeps a copy of each, and speed does not depend on values.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .artifacts import RANK
from .shapes import LlamaShape


def projections(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear map of a layer, by its name in the layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = shape.num_key_value_heads * shape.head_dim
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def make_adapter(shape: LlamaShape, dtype: str, seed: int, folder: Path) -> Path:
    """Write an adapter of every projection of every layer, of rank `RANK`, in the model's dtype."""
    random, kept = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        for name, (inputs, outputs) in projections(shape).items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            down, up = torch.randn(RANK, inputs, generator=random), torch.randn(outputs, RANK, generator=random)
            tensors[f"{at}.lora_A.weight"] = (down / inputs**0.5).to(kept)
            tensors[f"{at}.lora_B.weight"] = (up / RANK**0.5).to(kept)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 100 * RANK,
        "bias": "none",
        "target_modules": sorted(name.split(".")[1] for name in projections(shape)),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
