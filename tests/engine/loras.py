"""Random LoRA adapters in PEFT's format, and the same merged into a transformers model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel

RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Lora:
    """W + (ALPHA / RANK) B A for each module. modules: names in the model to (A [rank, in], B [out, rank])."""

    name: str
    number: int
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def save(self, folder: Path) -> dict[str, Any]:
        """Write it, and return what the driver takes."""
        folder.mkdir(parents=True)
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in self.modules}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {
            f"base_model.model.{name}.lora_{letter}.weight": tensor.contiguous()
            for name, pair in self.modules.items()
            for letter, tensor in zip("AB", pair, strict=True)
        }
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        return {"lora_name": self.name, "lora_int_id": self.number, "lora_path": str(folder)}

    def merged(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the model with the adapter in its weights."""
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, (A, B) in self.modules.items():
                changed.get_submodule(name).weight += ALPHA / RANK * (B @ A)
        return changed


def random_lora(model: PreTrainedModel, name: str, number: int, endings: Iterable[str], strength: float = 1.0) -> Lora:
    """On every linear layer whose name ends so, as strong as the weights themselves, about."""
    draw = torch.Generator().manual_seed(number)
    modules = {}
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module_name.endswith(tuple(endings)):
            A = torch.randn(RANK, module.in_features, generator=draw) / module.in_features**0.5
            B = torch.randn(module.out_features, RANK, generator=draw) / RANK**0.5
            modules[module_name] = (A, strength * B * module.weight.detach().norm() / (B @ A).norm() * RANK / ALPHA)
    assert modules, endings
    return Lora(name, number, modules)
