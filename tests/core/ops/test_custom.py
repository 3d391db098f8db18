"""The torch operator is the reference, whichever branch it takes, alone and in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core.make import randn

from steer_vllm.ops import custom, reference

ROWS, RANK, HIDDEN = 6, 3, 10
GROUPED, GATHERED, MIXED = [2] * 9 + [5] * 8, [1, 2, 3, 4, 5], [0, 1, 0, 2, 0]
BATCHES = {"grouped": GROUPED, "gathered": GATHERED, "mixed": MIXED, "padding": [0, 0, 0], "none": [], "one": [3]}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # one rounding to the dtype


def arguments(
    rows: list[int], dtype: torch.dtype = torch.float32, seed: int = 0, residual: bool = False
) -> tuple[torch.Tensor | None, ...]:
    A, B, c = randn(ROWS, RANK, HIDDEN, seed=1), randn(ROWS, RANK, HIDDEN, seed=2), randn(ROWS, RANK, seed=3)
    for table in (A, B, c):
        table[0] = 0
    n = len(rows)
    x, scales = randn(n, HIDDEN, seed=seed + 4) * 0.3, randn(n, seed=seed + 5)
    more = randn(n, HIDDEN, seed=seed + 6).to(dtype) * 0.3 if residual else None
    return x.to(dtype), more, torch.tensor(rows, dtype=torch.int32), scales, A.to(dtype), B.to(dtype), c.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_reference(batch: str, residual: bool, dtype: torch.dtype) -> None:
    x, *others = args = arguments(BATCHES[batch], dtype, residual=residual)
    found, wanted = custom.low_rank(*args), reference.low_rank(*args)
    assert found.dtype == dtype
    assert found.shape == x.shape
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not found[others[1] == 0].any(), "padding and unsteered tokens get exactly nothing"


@pytest.mark.parametrize(("batch", "gathers"), [("grouped", False), ("gathered", True), ("padding", False)])
def test_both_branches_are_taken(batch: str, gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparison above is one of both."""
    calls = []
    whole = reference.low_rank
    monkeypatch.setattr(reference, "low_rank", lambda *args: calls.append(1) or whole(*args))
    custom.low_rank(*arguments(BATCHES[batch]))
    assert bool(calls) == gathers


def test_tables_may_be_views() -> None:
    """A place's tables are strided views of all layers' tables."""
    *batch, A, B, c = arguments(GROUPED)
    wide = [torch.stack([randn(*table.shape, seed=8), table], 1)[:, 1] for table in (A, B, c)]
    assert not wide[0].is_contiguous()
    assert torch.equal(custom.low_rank(*batch, *wide), custom.low_rank(*batch, A, B, c))


@pytest.mark.parametrize("batch", ["grouped", "mixed", "none"])
def test_opcheck(batch: str) -> None:
    for residual in (False, True):
        found = torch.library.opcheck(custom.low_rank, arguments(BATCHES[batch], residual=residual))
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's tracer
def test_in_a_compiled_graph(backend: str) -> None:
    """One graph, no break, for any number of tokens and any rows: what is traced does not look at the batch."""
    graphs = 0

    def step(x: torch.Tensor, *slots: torch.Tensor | None) -> torch.Tensor:
        return x * 2 + custom.low_rank(x, *slots)

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counted, dynamic=True)
    with torch.no_grad():
        for batch in ("grouped", "gathered", "mixed", "padding"):
            args = arguments(BATCHES[batch])
            torch.testing.assert_close(compiled(*args), step(*args), rtol=0, atol=0)
    assert graphs == 1
    torch._dynamo.reset()
