"""Packed parts: exact both ways, padded with nothing, and composed to the sum of their separate edits."""

from __future__ import annotations

import math

import pytest
import torch
from core.make import BASE, direction, lofit, loreft, places, randn
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm.config import SteerConfig
from steer_vllm.edit import Edit, Edits, LowRank, Place, Site
from steer_vllm.errors import ArtifactInvalid
from steer_vllm.ops import reference
from steer_vllm.packed import Layout, Packed, check_tables, compose, pack, packed_bytes, unpack

HIDDEN = BASE.hidden_size
CONFIG = SteerConfig(additive_sites=tuple(Site), low_rank_sites=tuple(Site))
LAYOUT = Layout.of(places(range(3)), HIDDEN, CONFIG)


def head_projection(layer: int, heads: torch.Tensor) -> torch.Tensor:
    return randn(HIDDEN, len(heads), seed=layer + 50) @ heads


def low_rank(rank: int, seed: int) -> LowRank:
    return LowRank(randn(rank, HIDDEN, seed=seed), randn(rank, HIDDEN, seed=seed + 1), randn(rank, seed=seed + 2))


def random_edits(seed: int, offsets: bool = True, rank: int = 2) -> Edits:
    """Offsets here, low rank there, of different ranks, both at one place."""
    edits: dict[Place, Edit] = {}
    if offsets:
        edits[Place(0, Site.ATTENTION_OUTPUT)] = Edit(offset=randn(HIDDEN, seed=seed))
    if rank:
        edits[Place(1, Site.BLOCK_OUTPUT)] = Edit(low_rank=low_rank(rank, seed + 10))
    if offsets and rank:
        edits[Place(2, Site.BLOCK_OUTPUT)] = Edit(randn(HIDDEN, seed=seed + 20), low_rank(1, seed + 30))
    return edits


def apply(packed: Packed, place: Place, x: torch.Tensor) -> torch.Tensor:
    """What an edit adds to x at a place, in float64."""
    edit = unpack(packed, LAYOUT).get(place, Edit())
    out = torch.zeros_like(x)
    if edit.offset is not None:
        out = out + edit.offset.double()
    if edit.low_rank is not None:
        part = edit.low_rank
        out = out + reference.affine(x, part.A.double(), part.B.double(), part.c.double())
    return out


def test_layout_follows_the_config() -> None:
    config = SteerConfig(additive_sites=(Site.MLP_OUTPUT,), low_rank_sites=(Site.BLOCK_OUTPUT,))
    layout = Layout.of(places((4, 5)), 8, config)
    assert layout.additive == (Place(4, Site.MLP_OUTPUT), Place(5, Site.MLP_OUTPUT))
    assert layout.low_rank == (Place(4, Site.BLOCK_OUTPUT), Place(5, Site.BLOCK_OUTPUT))


def test_a_layer_may_lack_a_site() -> None:
    """Mamba layers of a hybrid have no attention output."""
    layout = Layout.of([Place(1, Site.BLOCK_OUTPUT), *places((0,))], 8, SteerConfig())
    assert layout.additive == (
        Place(0, Site.ATTENTION_OUTPUT),
        Place(0, Site.BLOCK_OUTPUT),
        Place(1, Site.BLOCK_OUTPUT),
    )


@pytest.mark.parametrize("edits", [random_edits(0), random_edits(1, rank=0), random_edits(2, offsets=False), {}])
def test_round_trip(edits: Edits) -> None:
    """Every place has exactly its edit, and all others none."""
    back = unpack(pack(edits, LAYOUT, torch.float32, "here"), LAYOUT)
    x = randn(3, HIDDEN, dtype=torch.float64)
    for place in LAYOUT.additive:
        wanted, found = edits.get(place, Edit()), back.get(place, Edit())
        if wanted.offset is not None:
            assert found.offset is not None
            assert torch.equal(found.offset, wanted.offset)
        else:
            assert found.offset is None or not found.offset.any()
        if wanted.low_rank is not None:
            assert found.low_rank is not None
            one, two = (
                reference.affine(x, p.A.double(), p.B.double(), p.c.double()) for p in (wanted.low_rank, found.low_rank)
            )
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        elif found.low_rank is not None:
            assert not found.low_rank.B.any()


def test_summary() -> None:
    summary = pack(random_edits(0, rank=3), LAYOUT, torch.float32, "here").summary()
    assert summary.additive
    assert summary.rank == 3
    tensors = [t for e in random_edits(0, rank=3).values() for t in (e.offset, *vars(e.low_rank or Edit()).values())]
    assert summary.largest == max(t.abs().max().item() for t in tensors if t is not None)
    nothing = pack({}, LAYOUT, torch.float32, "here")
    assert nothing.summary() == (False, 0, 0.0)
    assert nothing.nbytes == 0


@pytest.mark.parametrize(("rank", "layout"), [(0, LAYOUT), (3, LAYOUT), (3, Layout(HIDDEN, (), LAYOUT.low_rank))])
def test_bytes_are_known_beforehand(rank: int, layout: Layout) -> None:
    edits = random_edits(0, rank=rank)
    packed = pack(edits, layout, torch.bfloat16, "here")
    assert packed_bytes(edits, layout, torch.bfloat16, pinned=False) == packed.nbytes > 0
    rounded = sum(2 ** math.ceil(math.log2(tensor.nbytes)) for tensor in packed._tensors())
    assert packed_bytes(edits, layout, torch.bfloat16, pinned=True) == rounded


def test_places_of_other_ranks_are_left_to_them() -> None:
    """A pipeline rank holds its own layers; the content is there all the same, with nothing in it."""
    mine = Layout.of(places((1,)), HIDDEN, CONFIG)
    packed = pack(random_edits(0, rank=2), mine, torch.float32, "here")
    assert packed.offset is not None
    assert not packed.offset.any()
    assert packed.low_rank is not None
    assert packed.low_rank.A.shape == (3, 2, HIDDEN)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 70000.0), (torch.bfloat16, 3.4e38)])
@pytest.mark.parametrize("where", ["offset", "A", "B", "c"])
def test_finite_also_after_the_cast(dtype: torch.dtype, value: float, where: str) -> None:
    """Invariant: nothing that is infinite in the model's dtype is loaded."""
    part = LowRank(torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN), torch.zeros(1))
    offset = torch.zeros(HIDDEN)
    tensor = offset if where == "offset" else getattr(part, where)
    tensor.view(-1)[0] = value
    with pytest.raises(ArtifactInvalid, match="not finite in the model's dtype"):
        pack({Place(0, Site.BLOCK_OUTPUT): Edit(offset, part)}, LAYOUT, dtype, "here")


def test_rank_above_the_tables_is_refused() -> None:
    config = SteerConfig(max_rank=1)
    with pytest.raises(ArtifactInvalid, match="max_rank is 1"):
        check_tables([{Place(0, Site.BLOCK_OUTPUT): Edit(low_rank=low_rank(2, 1))}], config, "here")


def test_check_tables_names_the_setting() -> None:
    config = SteerConfig(additive_sites=(Site.BLOCK_OUTPUT,), low_rank_sites=(Site.BLOCK_OUTPUT,))
    check_tables(loreft().compile(head_projection), config, "here")
    check_tables(direction().compile(head_projection), config, "here")
    with pytest.raises(ArtifactInvalid, match="with attention_output in additive_sites"):
        check_tables(lofit().compile(head_projection), config, "here")
    without = SteerConfig(low_rank_rows=0)
    with pytest.raises(ArtifactInvalid, match="with block_output in low_rank_sites"):
        check_tables(loreft().compile(head_projection), without, "here")


terms = st.lists(
    st.tuples(
        st.integers(0, 5), st.booleans(), st.sampled_from([0, 1, 3]), st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0])
    ),
    min_size=1,
    max_size=4,
)


@given(terms)
def test_composition_is_the_sum(drawn: list[tuple[int, bool, int, float]]) -> None:
    """Invariant: several interventions read the same x and add up: sum_i s_i (B_i^T (A_i x + c_i) + u_i)."""
    parts = [
        (pack(random_edits(seed, offsets, rank), LAYOUT, torch.float32, "x"), s) for seed, offsets, rank, s in drawn
    ]
    whole = compose(parts)
    x = randn(3, HIDDEN, dtype=torch.float64)
    for place in LAYOUT.additive:
        wanted = torch.zeros_like(x)
        for packed, scale in parts:
            wanted += scale * apply(packed, place, x)
        torch.testing.assert_close(apply(whole, place, x), wanted, rtol=1e-5, atol=1e-4)
    summaries = [packed.summary() for packed, _ in parts]
    assert whole.summary().rank == sum(summary.rank for summary in summaries)
    assert whole.summary().additive == any(summary.additive for summary in summaries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_composition_rounds_once(dtype: torch.dtype) -> None:
    """Summed in float32: 256 + 1 - 256 in bfloat16 is 1, not 0."""
    offsets = [torch.full((1, HIDDEN), value, dtype=dtype) for value in (2048.0, 1.0, 2048.0)]
    whole = compose(zip([Packed(offset, None) for offset in offsets], (1.0, 1.0, -1.0), strict=True))
    assert whole.offset is not None
    assert whole.offset.dtype == dtype
    assert (whole.offset == 1).all()
