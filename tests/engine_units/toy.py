"""A small decoder of vLLM's shape: token rows, (hidden, residual) between layers, projections that return tuples."""

from __future__ import annotations

from typing import Any

import torch
from core.make import BASE
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.mamba.abstract import MambaBase


class RowParallel(nn.Module):
    """What `RowParallelLinear` has that the plugin looks at; returns (output, bias or None)."""

    def __init__(self, width: int, hidden: int, *, tp_size: int = 1, tp_rank: int = 0, reduce: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, width // tp_size) * 0.3)
        self.bias = nn.Parameter(torch.randn(hidden))
        self.input_size_per_partition = width // tp_size
        self.output_size = hidden
        self.tp_size, self.tp_rank, self.reduce_results = tp_size, tp_rank, reduce
        self.params_dtype = torch.float32
        self.quant_method: Any = UnquantizedLinearMethod()
        self.skips_bias = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None if self.skips_bias else self.bias
        return nn.functional.linear(x, self.weight, bias), self.bias if self.skips_bias else None


class Attention(nn.Module, AttentionLayerBase):
    """No attention at all: it mixes nothing, and is found as one."""

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, width)
        self.attn = Attention()
        self.o_proj = RowParallel(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.attn(self.qkv(x)))[0]  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down_proj = RowParallel(2 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up(x).relu())[0]  # type: ignore[no-any-return]


class Mixer(nn.Module, MambaBase):
    """A recurrence that forgets everything, found as one of Mamba's kind. Ends in a projection, as theirs do."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.out_proj = RowParallel(hidden, hidden)

    def get_state_shape(self) -> Any:
        raise NotImplementedError

    def get_state_dtype(self) -> Any:
        raise NotImplementedError

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    @property
    def mamba_type(self) -> Any:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(x)[0]  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A layer with fused norms: hands on what it adds and the residual stream separately."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(hidden, width)
        self.mlp = MLP(hidden)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else hidden + residual
        residual = residual + self.self_attn(residual)
        return self.mlp(residual), residual


class Summed(Layer):
    """A layer that returns its output as one tensor."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        added, residual = super().forward(hidden, residual)
        return added + residual


class Overwriting(Layer):
    """A layer that returns a pair, and starts from hidden whatever residual it is given."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden_states
        hidden_states = residual + self.self_attn(residual)
        return hidden_states + self.mlp(hidden_states), residual


class Recurrent(nn.Module):
    """A layer of a hybrid model without attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mixer = Mixer(hidden)
        self.mlp = MLP(hidden)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        hidden_states = hidden_states + self.mixer(hidden_states)
        return hidden_states + self.mlp(hidden_states)


class Decoder(nn.Module):
    """tokens -> the residual stream after all layers. Shapes of `BASE`."""

    def __init__(self, kind: type[Layer] = Layer, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(BASE.vocab_size, BASE.hidden_size)
        width = BASE.num_heads * BASE.head_dim
        self.layers = nn.ModuleList([kind(BASE.hidden_size, width) for _ in range(BASE.num_layers)])

    def forward(self, tokens: torch.Tensor, batch_dimension: bool = False) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(tokens)
        hidden = hidden[None] if batch_dimension else hidden
        residual: torch.Tensor | None = None
        for layer in self.layers:
            out = layer(hidden, residual)
            hidden, residual = out if isinstance(out, tuple) else (out, None)
        return hidden if residual is None or isinstance(layer, Overwriting) else hidden + residual
