"""Head outputs pushed through the attention output projection of a vLLM layer, each rank its own heads.

Knows linear layers of vLLM, nothing of interventions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import ArtifactInvalid, StartupRefused


class OutputProjection:
    """W_o of one layer, this rank's columns."""

    def __init__(self, module: nn.Module, layer: int) -> None:
        self.base: Any = getattr(module, "base_layer", module)
        self._module: Any = module
        if self.base.tp_size > 1 and not self.base.reduce_results:
            raise StartupRefused(
                f"layer {layer}: the attention output projection leaves partial sums under tensor parallelism"
            )

    @property
    def plain(self) -> bool:
        """Whether the weight is an ordinary matrix, which any thread can read."""
        return _is_plain(
            getattr(self.base, "weight", None), (self.base.output_size, self.base.input_size_per_partition)
        )

    def adapted(self, slot: int) -> bool:
        """Whether the LoRA in that slot of vLLM's tables changes W_o."""
        if self._module is self.base:
            return False
        return any(bool(stack[slot].any()) for stack in self._module.lora_b_stacked)

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """This rank's part of W_o z, without bias: [num_heads * head_dim] -> [hidden]; ranks add up to the whole.

        In float32 where the weight is a plain matrix, else in whatever precision the layer's own method has.
        """
        width = self.base.input_size_per_partition
        if heads.numel() != width * self.base.tp_size:
            taken = width * self.base.tp_size
            raise ArtifactInvalid(f"head offsets of {heads.numel()} values, the output projection takes {taken}")
        rank = self.base.tp_rank if self.base.tp_size > 1 else 0
        mine = heads[rank * width : (rank + 1) * width]
        weight: Any = getattr(self.base, "weight", None)
        if self.plain:
            return functional.linear(mine.to(weight.device).float(), weight.float())
        dtype = self.base.params_dtype
        device = next(self.base.parameters()).device
        whole: torch.Tensor = self.base.quant_method.apply(self.base, mine.to(device, dtype)[None], None)
        return whole[0].float()


def _is_plain(weight: object, shape: tuple[int, int]) -> bool:
    """A matrix of ordinary floating-point numbers: not quantised, not packed for a kernel."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and tuple(weight.shape) == shape
        and weight.is_contiguous()
    )
