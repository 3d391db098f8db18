"""The Triton kernels, compiled, against the reference in float64: also in a CUDA graph, and without waiting for it."""

from __future__ import annotations

import pytest
import torch
from core.make import randn

from steer_vllm.ops import custom, reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""One rounding to the dtype, and for the sums in float32 a little more."""
SHAPES = [(10, 1), (577, 8), (4096, 8), (1024, 64)]
"""hidden, rank"""
BATCHES = {
    "one": [3],
    "decode": list(range(9)) * 28,
    "prefill": [2] * 150 + [0] * 100 + [7] * 190,
    "both": [1, 0, 4, 6, 8] * 20 + [5] * 200,
}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("hidden", "rank"), SHAPES)
def test_low_rank(hidden: int, rank: int, dtype: torch.dtype, batch: str) -> None:
    """Eager, and as a graph that is replayed on other rows than it was captured with."""
    rows = torch.tensor(BATCHES[batch], dtype=torch.int32)
    n = len(rows)
    x, residual = ((randn(n, hidden, seed=seed) / hidden**0.5).to(dtype) for seed in (1, 2))
    wide = [(randn(*shape, seed=3) / rank**0.5).to(dtype) for shape in [(9, 3, rank, hidden)] * 2 + [(9, 3, rank)]]
    for table in wide:
        table[0] = 0
    A, B, c = (table[:, 1] for table in wide)
    scales = randn(n, seed=4)
    exact = (part.double() for part in (scales, A, B, c))
    wanted = reference.low_rank((x + residual).double(), None, rows, *exact)

    at = torch.zeros_like(rows, device="cuda")
    args = [x.cuda(), residual.cuda(), at, scales.cuda(), *(table.cuda()[:, 1] for table in wide)]
    custom.low_rank(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = custom.low_rank(*args)
    at.copy_(rows)
    graph.replay()
    for found in (custom.low_rank(*args), captured):
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert not found.cpu()[rows == 0].any(), "padding and unsteered tokens get exactly nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("requests", [1, 7, 256])
def test_route(requests: int, kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(requests)
    lengths = torch.randint(0, 9, (requests,), generator=draw)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    positions = torch.randint(0, 40, (int(starts[-1]),), generator=draw).to(kind)
    cuts = torch.randint(0, 40, (requests + 1, 6), generator=draw).sort(1).values
    named = torch.randint(0, 300, (requests + 1, 3, 2), generator=draw)
    spans = torch.cat([cuts.view(-1, 3, 2), named], 2).int()
    scales = torch.randn(requests + 1, 3, generator=draw)
    spans[0] = scales[0] = 0
    owners = torch.randint(0, requests + 1, (requests,), generator=draw).int()
    args = positions, starts, owners, spans, scales
    outs = [
        [torch.full((len(positions) + 5,), 7, dtype=kind) for kind in (torch.int32, torch.int32, torch.float32)]
        for _ in range(2)
    ]
    found = [out.cuda() for out in outs[0]]
    custom.route(*(part.cuda() for part in args), *found)
    reference.route(*args, *outs[1])
    for mine, theirs in zip(found, outs[1], strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    """Nor is anything compiled again for another number of tokens or requests."""
    from steer_vllm.ops import triton as kernels

    def step(tokens: int) -> None:
        positions = torch.arange(tokens, device="cuda")
        starts = torch.arange(tokens + 1, device="cuda", dtype=torch.int32)
        slots = [torch.zeros(tokens, dtype=kind, device="cuda") for kind in (torch.int32, torch.int32, torch.float32)]
        custom.route(positions, starts, starts[:tokens], spans, scales, *slots)
        custom.low_rank(x[:tokens], None, *slots[1:], A, A, c)

    spans, scales = torch.zeros(400, 2, 4, dtype=torch.int32, device="cuda"), torch.zeros(400, 2, device="cuda")
    x = torch.ones(400, 64, device="cuda").bfloat16()
    A, c = torch.zeros(3, 8, 64, device="cuda").bfloat16(), torch.zeros(3, 8, device="cuda").bfloat16()
    step(16)
    compiled = [len(kernel.device_caches[0][0]) for kernel in (kernels._route, kernels._low_rank)]
    assert compiled[0] >= 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens in (1, 2, 17, 64, 400):
            step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(kernel.device_caches[0][0]) for kernel in (kernels._route, kernels._low_rank)] == compiled
