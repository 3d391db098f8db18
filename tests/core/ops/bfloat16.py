"""bfloat16 in Triton's interpreter, which keeps it as 16-bit integers: products take those for numbers, and rounding
cuts off. A GPU does neither, so both are put right before kernels are run here. Can go when the interpreter does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend(monkeypatch: Any) -> None:
    """Conversions round to nearest, even; products of bfloat16 are those of its values."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        values = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return values.view(torch.int16).numpy().view(np.uint16)

    def product(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(
            self, *(self.cast_impl(one, tl.float32) if one.dtype == tl.bfloat16 else one for one in (a, b)), *more
        )

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
