"""Small things to test on: base shapes, interventions with random tensors, random models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from steer_vllm import Intervention, Positions
from steer_vllm.edit import Place, Site
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.methods import Direction, LoFiT, LoReFT

BASE = Fingerprint(hidden_size=24, num_layers=3, num_heads=4, head_dim=8, vocab_size=61, weights="ab" * 32)
"""The shapes of `llama()`. Heads times head size is 32, not the hidden size: a mix-up cannot pass."""


def places(layers: Iterable[int]) -> list[Place]:
    """All sites of these layers."""
    return [Place(layer, site) for layer in layers for site in Site]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(*shape: int, seed: int = 0) -> torch.Tensor:
    """[..., rank, hidden] with orthonormal rows."""
    *outer, rank, hidden = shape
    return torch.linalg.qr(randn(*outer, hidden, rank, seed=seed, dtype=torch.float64))[0].mT.contiguous().float()


def lofit(
    heads: tuple[tuple[int, int], ...] = ((0, 1), (2, 0), (2, 3)),
    *,
    base: Fingerprint = BASE,
    positions: str = "all",
    seed: int = 1,
    **other: Any,
) -> Intervention:
    offsets = randn(len(heads), base.head_dim, seed=seed)
    return Intervention(LoFiT(heads), {"offsets": offsets}, base, Positions.parse(positions), **other)


def loreft(
    layers: tuple[int, ...] = (0, 2),
    rank: int = 3,
    *,
    base: Fingerprint = BASE,
    positions: str = "f2+l2",
    seed: int = 2,
    **other: Any,
) -> Intervention:
    at = Positions.parse(positions)
    tensors = {
        "rotate": orthonormal(at.parts, len(layers), rank, base.hidden_size, seed=seed),
        "weight": randn(at.parts, len(layers), rank, base.hidden_size, seed=seed + 100) * 0.3,
        "bias": randn(at.parts, len(layers), rank, seed=seed + 200),
    }
    return Intervention(LoReFT(layers, rank, at.tied), tensors, base, at, **other)


def direction(
    layers: tuple[int, ...] = (1,),
    coefficient: float = 2.0,
    *,
    base: Fingerprint = BASE,
    site: Site = Site.BLOCK_OUTPUT,
    positions: str = "response",
    seed: int = 3,
    **other: Any,
) -> Intervention:
    method = Direction(layers, coefficient, site)
    tensors = {"directions": randn(len(layers), base.hidden_size, seed=seed)}
    return Intervention(method, tensors, base, Positions.parse(positions), **other)


def llama(seed: int = 0, **other: Any) -> Any:
    """A random Llama of the shapes of `BASE`, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": BASE.vocab_size,
        "hidden_size": BASE.hidden_size,
        "intermediate_size": 40,
        "num_hidden_layers": BASE.num_layers,
        "num_attention_heads": BASE.num_heads,
        "num_key_value_heads": 2,
        "head_dim": BASE.head_dim,
        "max_position_embeddings": 128,
        "attention_bias": True,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **other})).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.self_attn.o_proj.bias is not None:
                layer.self_attn.o_proj.bias.normal_()
    return model
