"""Head outputs pushed through the attention output projection of a vLLM layer, each rank its own heads.

Knows linear layers of vLLM, nothing of interventions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import ArtifactInvalid
from .layers import base_layer

_AT_ONCE = 256
"""Inputs in one call of a quantised layer."""


class OutputProjection:
    """W_o of one layer, this rank's columns."""

    def __init__(self, module: nn.Module, layer: int) -> None:
        self._module: Any = module
        self.base: Any = base_layer(module)
        self.layer = layer

    @property
    def plain(self) -> bool:
        """Whether the weight is an ordinary matrix, which any thread can read."""
        return _is_plain(
            getattr(self.base, "weight", None), (self.base.output_size, self.base.input_size_per_partition)
        )

    @property
    def quantised(self) -> bool:
        """Whether vLLM computes it from rounded weights or inputs."""
        return "Unquantized" not in type(self.base.quant_method).__name__

    def adapted(self, slot: int) -> bool:
        """Whether the LoRA in that slot of vLLM's tables changes W_o."""
        if self._module is self.base:
            return False
        return any(bool(stack[slot].any()) for stack in self._module.lora_b_stacked)

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """This rank's part of W_o z, without bias: [num_heads * head_dim] -> [hidden]; ranks add up to the whole.

        In float32 where the weight is a plain matrix, of which only the columns of edited heads are read: the weights
        are most of what loading reads. Any other is read through the layer's own method: a packed one (all of vLLM's on
        a CPU) with inputs that add up to z, so that what is left is the rounding of an output to the layer's dtype; a
        quantised one with one column at a time, so that an input that the method quantises loses next to nothing: what
        is left is its rounding of each column, and its arithmetic.
        Errors: `ArtifactInvalid` when the layer has heads of another number or size.
        """
        width = self.base.input_size_per_partition
        if heads.numel() != width * self.base.tp_size:
            raise ArtifactInvalid(
                f"layer {self.layer}: head offsets of {heads.numel()} values in all, its output projection takes "
                f"{width * self.base.tp_size}: its heads are not those of the model's config"
            )
        rank = self.base.tp_rank if self.base.tp_size > 1 else 0
        mine = heads[rank * width : (rank + 1) * width]
        used = mine.nonzero().flatten()  # a tenth of the heads is common: no other column need be read
        if self.plain:
            weight: torch.Tensor = self.base.weight
            z = mine[used].to(weight.device, torch.float32)
            columns = torch.cat([weight[:, run] for run in _runs(used)], 1) if len(used) else weight[:, :0]
            return functional.linear(z, columns.float())
        device = next(self.base.parameters()).device
        if not self.quantised:
            return self._apply(_terms(mine.to(device, torch.float32), self.base.params_dtype))
        z, used = mine.to(device, torch.float32), used.to(device)
        whole = torch.zeros(self.base.output_size, device=device)
        for some in used.split(_AT_ONCE):
            single = torch.zeros(len(some), width, device=device, dtype=self.base.params_dtype)
            single[torch.arange(len(some), device=device), some] = z[some].to(single.dtype)
            whole += self._apply(single)
        return whole

    def _apply(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's own product without bias, added up: [count, width] in its dtype -> [hidden] in float32."""
        outputs: torch.Tensor = self.base.quant_method.apply(self.base, inputs, None)
        return outputs.float().sum(0)


def _terms(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows in `dtype` that add up to float32 values: one, or three of a half precision."""
    rows = []
    for _ in range(1 if dtype == torch.float32 else 3):
        rows.append(values.to(dtype))
        values = values - rows[-1].float()
    return torch.stack(rows)


def _runs(numbers: torch.Tensor) -> Iterator[slice]:
    """Ascending numbers as slices, one for each head or row of heads: a gather by number is several times slower."""
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    for run in torch.tensor_split(numbers, breaks.tolist()):
        yield slice(int(run[0]), int(run[-1]) + 1)


def _is_plain(weight: object, shape: tuple[int, int]) -> bool:
    """A matrix of ordinary floating-point numbers: not quantised, not packed for a kernel."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and tuple(weight.shape) == shape
        and weight.is_contiguous()
    )
