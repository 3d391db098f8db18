"""What is run: a random-weight Llama, a batch of prompts, how long and how often.

Knows no mode and no engine; what follows from these numbers is the same for every engine of a run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

_ALIGN = 128
"""KV block size of vLLM on a CPU: contexts are given as a multiple of it."""


@dataclass(frozen=True)
class LlamaShape:
    """A Llama's shape; the default has 51 million parameters."""

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    vocab_size: int = 12288

    @property
    def parameters(self) -> int:
        """Weights of the whole model, embeddings and head counted apart."""
        head_dim = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * head_dim * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_hidden_layers * layer + (2 * self.vocab_size + 1) * self.hidden_size


@dataclass(frozen=True)
class Workload:
    """Decode at a fixed batch: all requests start together, and only steps in which all of them decode are timed."""

    shape: LlamaShape = field(default_factory=LlamaShape)
    dtype: str = "float32"
    compiled: bool = True
    batch: int = 32
    prompt_tokens: int = 32
    output_tokens: int = 64
    rounds: int = 15
    seed: int = 0

    def quick(self) -> Workload:
        """A third of the rounds, half of the length."""
        return replace(self, rounds=5, output_tokens=32)

    def prompts(self) -> list[list[int]]:
        """Random token ids, one list per request."""
        ids = np.random.default_rng(self.seed).integers(10, self.shape.vocab_size, (self.batch, self.prompt_tokens))
        return [list(map(int, row)) for row in ids]

    def write_model(self, folder: Path) -> None:
        """The config from which vLLM makes the model with random weights (`load_format="dummy"`)."""
        context = self.context
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "max_position_embeddings": context,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": self.dtype,
            **asdict(self.shape),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))

    @property
    def context(self) -> int:
        """The longest request, up to a multiple of the KV block size."""
        return -(-(self.prompt_tokens + self.output_tokens) // _ALIGN) * _ALIGN

    def engine_arguments(self, model: Path) -> dict[str, Any]:
        """vLLM's arguments, alike for every engine. The whole batch is prefilled in one step."""
        return {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": self.dtype,
            "enforce_eager": not self.compiled,
            "max_model_len": self.context,
            "max_num_seqs": self.batch,
            "max_num_batched_tokens": max(2048, self.batch * self.prompt_tokens),
            "enable_prefix_caching": False,
            "gpu_memory_utilization": 0.1,
            "seed": self.seed,
        }

    def limits(self) -> dict[str, int]:
        """Steering limits: the defaults, or as many rows as there can be distinct interventions."""
        return {"additive_rows": max(256, self.batch), "low_rank_rows": max(64, self.batch)}
