"""What edits cost in a compiled model, counted in the code that Inductor writes: no kernel for additive edits, one call
for a low-rank edit. The code is for a CPU and is neither compiled nor run; what is fused is decided the same way.
"""

from __future__ import annotations

import re
from collections import Counter
from unittest import mock

import pytest
import torch
from core.make import BASE, places
from engine_units.toy import Decoder, Layer
from torch import nn
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering

from steer_vllm.config import SteerConfig
from steer_vllm.edit import Site
from steer_vllm.engine.binding import Binding
from steer_vllm.engine.wrapping import wrap
from steer_vllm.packed import Layout
from steer_vllm.slots import SlotTables, TokenSlots

LAYERS = 2


class Written(Exception):
    """The code is there."""


def norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of the sum, and the sum: as vLLM's layers have it where Inductor fuses it."""
    whole = x.float() if residual is None else x.float() + residual.float()
    normed = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype) * weight, whole.to(x.dtype)


class Normed(Layer):
    """A layer that starts with the sum of what it is given, as Llama's do."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__(hidden, width)
        self.before_attention, self.before_mlp = (nn.Parameter(torch.ones(hidden)) for _ in range(2))

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = norm(hidden, residual, self.before_attention)
        hidden, residual = norm(self.self_attn(hidden), residual, self.before_mlp)
        return self.mlp(hidden), residual


def calls(additive: tuple[Site, ...], low_rank: tuple[Site, ...]) -> Counter[str]:
    """How often the compiled model calls what; generated kernels count as one name."""
    model = Decoder(Normed).bfloat16()
    model.layers = model.layers[:LAYERS]
    rows = 2 if low_rank else 0
    config = SteerConfig(
        additive_rows=2, additive_sites=additive, low_rank_rows=rows, max_rank=3, low_rank_sites=low_rank
    )
    layout = Layout.of(places(range(LAYERS)), BASE.hidden_size, config)
    tables, slots = SlotTables(layout, config, torch.bfloat16, "cpu"), TokenSlots(16, "cpu")
    wrap(Binding(model, config), tables, slots)
    written = []

    def keep(code: str) -> None:
        written.append(code)
        raise Written

    torch._dynamo.reset()
    with mock.patch.object(GraphLowering, "save_output_code", keep), torch.no_grad(), pytest.raises(InductorError):
        torch.compile(model, fullgraph=True, dynamic=True)(torch.arange(6))
    torch._dynamo.reset()
    (code,) = written
    body = code[code.index("def call(") :]
    called = re.findall(r"^\s+(?:\w+ = )?(cpp_fused|extern_kernels\.\w+|torch\.ops\.[\w.]+)\w*\(", body, re.MULTILINE)
    return Counter(called)


@pytest.fixture(scope="module")
def plain() -> Counter[str]:
    found = calls((), ())
    assert found["cpp_fused"] >= 2 * LAYERS, found
    assert found["extern_kernels.addmm"] == 4 * LAYERS, found
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's tracer
def test_additive_edits_launch_nothing(plain: Counter[str]) -> None:
    """At every site of every layer: they are part of the kernel that adds and norms."""
    assert calls(tuple(Site), ()) == plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_low_rank_edit_is_one_call(plain: Counter[str]) -> None:
    """Where a default configuration has them, beside additive edits, with a block's two parts summed inside.

    Additive edits at the MLP too would take a kernel for each layer: the operator needs their sum.
    """
    sites = SteerConfig()
    operator = Counter({"torch.ops.steer_vllm.low_rank.default": LAYERS})
    assert calls(sites.additive_sites, sites.low_rank_sites) == plain + operator
