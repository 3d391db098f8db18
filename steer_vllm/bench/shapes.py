"""Shapes of Llamas by name. Weights are random: speed does not depend on their values."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BenchmarkInvalid


@dataclass(frozen=True)
class LlamaShape:
    """As in a Llama's config; input and output embeddings are two matrices."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """Weights of the whole model, embeddings and head counted apart."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_hidden_layers * layer + (2 * self.vocab_size + 1) * self.hidden_size

    @property
    def kv_numbers(self) -> int:
        """Numbers that a token leaves in the KV cache."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


SHAPES = {
    "tiny": LlamaShape(64, 128, 2, 2, 2, 256),
    "100m": LlamaShape(768, 2048, 12, 12, 12, 12288),
    "1b": LlamaShape(2048, 8192, 16, 32, 8, 128256),
    "8b": LlamaShape(4096, 14336, 32, 32, 8, 128256),
}
"""tiny: to try things. 1b, 8b: the numbers of Llama 3.2 1B (its embeddings untied: 1.5 billion) and Llama 3 8B."""


def shape(name: str) -> LlamaShape:
    """By name. Errors: `BenchmarkInvalid` for an unknown one."""
    if name not in SHAPES:
        raise BenchmarkInvalid(f"--shape {name}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
