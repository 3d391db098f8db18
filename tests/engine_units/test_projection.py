"""Head outputs through a layer's output projection: without bias, each rank its slice, in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.make import randn
from engine_units.toy import RowParallel
from torch import nn

from steer_vllm.engine.projection import OutputProjection
from steer_vllm.errors import ArtifactInvalid

WIDTH, HIDDEN = 32, 24


@torch.no_grad()
def test_without_bias() -> None:
    layer, z = RowParallel(WIDTH, HIDDEN), randn(WIDTH)
    found = OutputProjection(layer, 0)(z)
    torch.testing.assert_close(found, layer(z)[0] - layer(torch.zeros(WIDTH))[0], rtol=1e-5, atol=1e-5)
    assert not OutputProjection(layer, 0)(torch.zeros(WIDTH)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_pushed_through_in_float32(dtype: torch.dtype) -> None:
    """Exact in the layer's weights as they are: no rounding but theirs."""
    layer, z = RowParallel(WIDTH, HIDDEN).to(dtype), randn(WIDTH)
    found = OutputProjection(layer, 0)(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), layer.weight.double() @ z.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@torch.no_grad()
def test_ranks_add_up_to_the_whole(ranks: int) -> None:
    whole, z = RowParallel(WIDTH, HIDDEN), randn(WIDTH)
    total = torch.zeros(HIDDEN)
    for rank in range(ranks):
        part = RowParallel(WIDTH, HIDDEN, tp_size=ranks, tp_rank=rank)
        size = WIDTH // ranks
        part.weight.copy_(whole.weight[:, rank * size : (rank + 1) * size])
        total += OutputProjection(part, 0)(z)
    torch.testing.assert_close(total, whole.weight @ z, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_lora_wrapper_is_looked_through() -> None:
    base = RowParallel(WIDTH, HIDDEN)
    wrapper: Any = nn.Module()
    wrapper.base_layer = base
    z = randn(WIDTH)
    assert torch.equal(OutputProjection(wrapper, 0)(z), OutputProjection(base, 0)(z))


def test_other_heads_than_the_configs_are_refused() -> None:
    """Gemma 4 and others have heads of another size in some layers."""
    with pytest.raises(ArtifactInvalid, match=r"layer 3: head offsets of 48 values in all, .* takes 32"):
        OutputProjection(RowParallel(WIDTH, HIDDEN), 3)(torch.ones(48))


@pytest.mark.parametrize("packing", ["int8", "transposed"])
@torch.no_grad()
def test_packed_weights_go_through_the_layers_own_method(packing: str) -> None:
    layer, calls = RowParallel(WIDTH, HIDDEN), []
    plain, z = layer.weight.detach().clone(), randn(WIDTH)
    packed = plain.to(torch.int8) if packing == "int8" else plain.T.contiguous()
    layer.weight = nn.Parameter(packed, requires_grad=False)

    def apply(base: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append((base, x.dtype, tuple(x.shape), bias))
        return x @ plain.T

    layer.quant_method = SimpleNamespace(apply=apply)  # type: ignore[assignment]
    torch.testing.assert_close(OutputProjection(layer, 0)(z), plain @ z, rtol=1e-5, atol=1e-5)
    assert calls == [(layer, torch.float32, (WIDTH, WIDTH), None)]


class UnquantizedCpuMethod:
    """As vLLM's on a CPU: the layer's weight is gone, a kernel has it in an order of its own."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.rows = 0

    def apply(self, base: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is None
        self.rows += len(x)
        return (x.double() @ self.weight.double().T).to(self.weight.dtype)  # it adds up in more than its dtype


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 3)])
@torch.no_grad()
def test_a_packed_weight_is_read_once(dtype: torch.dtype, rows: int) -> None:
    """Steps wait meanwhile. The inputs keep their digits; an output is rounded to the layer's dtype."""
    layer = RowParallel(WIDTH, HIDDEN).to(dtype)
    layer.params_dtype = dtype  # type: ignore[assignment]
    plain, z = layer.weight.detach().clone(), randn(WIDTH) * torch.logspace(-4, 0, WIDTH)
    layer.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    method = layer.quant_method = UnquantizedCpuMethod(plain)  # type: ignore[assignment]
    found = OutputProjection(layer, 0)(z)
    assert method.rows == rows
    assert found.dtype == torch.float32
    exact = plain.double() @ z.double()
    assert (found - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


@torch.no_grad()
def test_a_layer_that_quantises_its_input() -> None:
    """One input at a time: such a layer loses what lies below the largest input's last step, but nothing of one alone.
    Invariant: offsets of heads that differ a thousandfold keep their digits."""
    layer = RowParallel(WIDTH, HIDDEN)
    plain, z = layer.weight.detach().clone(), randn(WIDTH) * torch.logspace(-4, 0, WIDTH)
    layer.weight = nn.Parameter(plain.to(torch.int8), requires_grad=False)

    def apply(base: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step @ plain.T

    layer.quant_method = SimpleNamespace(apply=apply)  # type: ignore[assignment]
    torch.testing.assert_close(OutputProjection(layer, 0)(z), plain @ z, rtol=1e-5, atol=1e-6)
