"""Plans: which rows segments need, and the limits that are checked before any row is taken."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm.config import SteerConfig
from steer_vllm.errors import ScaleOutOfRange, TooManyInterventions
from steer_vllm.plan import NOMINAL_PROMPT, Need, PartSummary, Summary, contents, merge, needs
from steer_vllm.positions import OPEN, Positions
from steer_vllm.segments import Component, Segment, Term, resolve

CONFIG = SteerConfig(max_rank=8, per_request=2)
HELD = {
    "add": Summary("add", (PartSummary(True, 0, 2.0),)),
    "low": Summary("low", (PartSummary(False, 5, 1.0), PartSummary(False, 4, 1.0))),
    "both": Summary("both", (PartSummary(True, 3, 1.0),)),
    "zero": Summary("zero", (PartSummary(False, 0, 0.0),)),
}


def need(*terms: Term, largest: float = 1e4) -> Need:
    (found,) = needs([Segment(0, OPEN, terms)], HELD, CONFIG, largest)
    return found


def test_one_term_is_stored_unscaled() -> None:
    """So every strength of an intervention shares its row; the scale is applied in the step."""
    for scale in (-2.0, 0.5, 1.0):
        assert need(Term("add", 0, scale)) == Need((Term("add", 0, 1.0),), None, scale)
        assert need(Term("low", 1, scale)) == Need(None, (Term("low", 1, 1.0),), scale)
        alone = (Term("both", 0, 1.0),)
        assert need(Term("both", 0, scale)) == Need(alone, alone, scale)


def test_several_terms_are_baked() -> None:
    add, low, both = Term("add", 0, 2.0), Term("low", 0, 0.5), Term("both", 0, -1.0)
    assert need(add, low) == Need((add,), (low,), 1.0)
    assert need(add, both) == Need((add, both), (both,), 1.0)


def test_content_without_an_edit_needs_no_row() -> None:
    assert need(Term("zero", 0, 1.0)) == Need(None, None, 1.0)


def test_rank_limit() -> None:
    assert need(Term("both", 0, 1.0), Term("low", 0, 1.0)).low_rank is not None  # 3 + 5 = max_rank
    with pytest.raises(TooManyInterventions, match="rank 9 together, at most 8"):
        need(Term("low", 0, 1.0), Term("low", 1, 1.0))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e308, 5001.0])
def test_a_single_edit_that_overflows(scale: float) -> None:
    with pytest.raises(ScaleOutOfRange):
        need(Term("add", 0, scale))


def test_a_sum_that_overflows() -> None:
    need(Term("add", 0, 2500.0), Term("both", 0, -5000.0))
    with pytest.raises(ScaleOutOfRange, match="reaches 1e"):
        need(Term("add", 0, 2500.0), Term("both", 0, -5000.1))


def test_segment_limit() -> None:
    terms = (Term("add", 0, 1.0),)
    segments = [Segment(2 * i, 2 * i + 1, terms) for i in range(CONFIG.max_segments + 1)]
    assert len(needs(segments[:-1], HELD, CONFIG, 1e4)) == CONFIG.max_segments
    with pytest.raises(TooManyInterventions, match="9 segments on one request, at most 8"):
        needs(segments, HELD, CONFIG, 1e4)


def test_contents_are_distinct() -> None:
    found = needs(
        [Segment(0, 1, (Term("add", 0, 1.0),)), Segment(2, 3, (Term("add", 0, 2.0),)),
         Segment(4, 5, (Term("low", 0, 1.0),))], HELD, CONFIG, 1e4,
    )  # fmt: skip
    assert contents(found) == ({(Term("add", 0, 1.0),)}, {(Term("low", 0, 1.0),)})


KINDS = ["all", "prompt", "generated", "response", "f1+l1", "f7+l7", "f7+l7/untied", "f3+l0/untied", "f0+l9"]
components = st.lists(
    st.builds(
        Component, st.sampled_from("abcd"), st.sampled_from([1.0, 2.0]), st.sampled_from(KINDS).map(Positions.parse)
    ),
    min_size=1,
    max_size=4,
)
WHATEVER = {name: Summary(name, (PartSummary(True, 1, 1.0),) * 2) for name in "abcd"}


@given(components, st.integers(1, 40))
def test_the_components_allowed_always_fit_the_segments(asked: list[Component], n: int) -> None:
    """`per_request` components never need more than `max_segments`: the limit cannot surprise a request."""
    config = SteerConfig(per_request=len(asked), max_rank=64)
    needs(resolve(asked, n), WHATEVER, config, 1e4)


@given(components, st.integers(1, 40))
def test_the_nominal_prompt_needs_the_most(asked: list[Component], n: int) -> None:
    """A front that reserves rows for the nominal prompt has reserved enough for the real one."""
    config = SteerConfig(per_request=4, max_rank=64)
    real, nominal = (contents(needs(resolve(asked, m), WHATEVER, config, 1e4)) for m in (n, NOMINAL_PROMPT))
    assert all(len(mine) <= len(most) for mine, most in zip(real, nominal, strict=True))


def test_merge_of_pipeline_ranks() -> None:
    """Ranks hold different layers: what any has, the whole has."""
    ranks = [
        [PartSummary(True, 0, 1.0), PartSummary(False, 2, 5.0)],
        [PartSummary(False, 3, 2.0), PartSummary(False, 0, 0.0)],
    ]
    assert merge("d", ranks) == Summary("d", (PartSummary(True, 3, 2.0), PartSummary(False, 2, 5.0)))
    with pytest.raises(ValueError, match="zip"):
        merge("d", [ranks[0], ranks[1][:1]])
