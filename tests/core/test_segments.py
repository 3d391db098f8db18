"""Segments against a position-by-position oracle, and the invariant of the exact causal cache keys:
two blocks have one key exactly when their tokens get the same edits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from steer_vllm.errors import InvalidIntervention, ScaleOutOfRange
from steer_vllm.positions import OPEN, Positions
from steer_vllm.segments import Component, Segment, Term, block_key, check_scale, resolve

HORIZON = 24
KINDS = ["all", "prompt", "generated", "response", "f1+l1", "f2+l3", "f7+l7", "f3+l0", "f2+l2/untied", "f7+l7/untied"]
TENTHS = [float(np.float32(n / 10)) for n in range(-40, 41)]

components = st.lists(
    st.builds(
        Component,
        digest=st.sampled_from(["a" * 64, "b" * 64, "c" * 64]),
        scale=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]),
        positions=st.sampled_from(KINDS).map(Positions.parse),
    ),
    max_size=4,
)
prompt_lens = st.integers(1, 12)

Oracle = list[dict[tuple[str, int], float]]
"""At each position: (digest, part) -> total scale, without zeros."""


def edits(asked: Sequence[Component], prompt_len: int, total: int = HORIZON) -> Oracle:
    """What each position gets, one by one; written from what the kinds mean, without spans."""
    n = prompt_len

    def part_at(positions: Positions, p: int) -> int | None:
        if positions.kind == "first_last":
            if p < min(positions.first, n // 2):
                return 0
            if n - min(positions.last, (n + 1) // 2) <= p < n:
                return 0 if positions.tied else 1
            return None
        inside = {"all": True, "prompt": p < n, "generated": p >= n, "response": p >= n - 1}[positions.kind]
        return 0 if inside else None

    table: Oracle = []
    for p in range(total):
        sums: dict[tuple[str, int], Fraction] = {}
        for c in asked:
            part = part_at(c.positions, p)
            if part is not None:
                key = c.digest, part
                sums[key] = sums.get(key, Fraction(0)) + Fraction(c.scale)
        table.append({key: float(np.float32(float(total))) for key, total in sums.items() if total})
    return table


def spread(segments: Sequence[Segment], total: int = HORIZON) -> Oracle:
    """What segments say of each position."""
    table: Oracle = [{} for _ in range(total)]
    for segment in segments:
        for p in range(segment.start, min(segment.stop, total)):
            assert not table[p], "segments overlap"
            table[p] = {(term.digest, term.part): term.scale for term in segment.terms}
    return table


@given(components, prompt_lens)
def test_resolve_equals_the_oracle(asked: list[Component], n: int) -> None:
    assert spread(resolve(asked, n)) == edits(asked, n)


@given(components, prompt_lens)
def test_segments_are_canonical(asked: list[Component], n: int) -> None:
    """In order, without overlap, never empty, terms sorted and not zero, no two neighbours that could be one."""
    segments = resolve(asked, n)
    for segment in segments:
        assert segment.start < segment.stop
        assert segment.terms
        assert list(segment.terms) == sorted(segment.terms)
        assert all(term.scale for term in segment.terms)
        assert len({term[:2] for term in segment.terms}) == len(segment.terms)
    for one, two in itertools.pairwise(segments):
        assert one.stop <= two.start
        assert one.stop < two.start or one.terms != two.terms


@given(components, prompt_lens)
def test_nothing_changes_behind_the_prompt(asked: list[Component], n: int) -> None:
    """So that the slots of a batch that decodes stay as they are."""
    for segment in resolve(asked, n):
        assert segment.start <= n
        assert segment.stop <= n or segment.stop == OPEN


@given(components, prompt_lens, st.randoms(use_true_random=False))
def test_order_of_components_does_not_matter(asked: list[Component], n: int, random: object) -> None:
    shuffled = list(asked)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert resolve(shuffled, n) == resolve(asked, n)


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=4), st.sampled_from(KINDS), prompt_lens)
def test_sums_do_not_depend_on_the_order(scales: list[float], kind: str, n: int) -> None:
    """Also where float addition is not associative: 8 + 1e-10 - 8."""
    asked = [Component("a", scale, Positions.parse(kind)) for scale in scales]
    assert len({resolve(order, n) for order in itertools.permutations(asked)}) == 1


def test_a_lost_addend_would_show() -> None:
    tiny = float(np.float32(1e-10))
    orders = itertools.permutations([8.0, tiny, -8.0])
    assert {resolve([Component("a", s, Positions("all")) for s in order], 3)[0].terms[0].scale for order in orders} == {
        tiny
    }


@given(components, prompt_lens, st.integers(0, 3), st.sampled_from([0.25, 0.5, -1.0]))
def test_splitting_a_scale_changes_nothing(asked: list[Component], n: int, which: int, share: float) -> None:
    assume(which < len(asked))
    one = asked[which]
    halves = [Component(one.digest, s, one.positions) for s in (share, one.scale - share)]
    assert resolve([*asked[:which], *asked[which + 1 :], *halves], n) == resolve(asked, n)


@given(st.sampled_from(TENTHS), st.sampled_from(TENTHS), prompt_lens)
def test_a_sum_is_what_the_tables_hold(one: float, two: float, n: int) -> None:
    """Two scales are the one that the float32 tables would hold for their sum: same edit, same cache key."""
    both = resolve([Component("a", s, Positions("all")) for s in (one, two)], n)
    total = float(np.float32(one + two))
    assert both == (resolve([Component("a", total, Positions("all"))], n) if total else ())


def test_opposites_vanish() -> None:
    plus, minus = (Component("a", s, Positions("all")) for s in (1.5, -1.5))
    assert resolve([plus, minus], 5) == ()
    part = resolve([plus, Component("a", -1.5, Positions("prompt"))], 5)
    assert part == (Segment(5, OPEN, (Term("a", 0, 1.5),)),)


@given(components, prompt_lens, components, prompt_lens, st.integers(0, 5), st.sampled_from([1, 2, 4, 5]))
def test_keys_are_equal_exactly_when_the_edits_are(
    one: list[Component], n: int, two: list[Component], m: int, block: int, size: int
) -> None:
    """Safety and sharing at once, by brute force over the block's positions."""
    start, stop = block * size, (block + 1) * size
    mine, theirs = edits(one, n, stop)[start:], edits(two, m, stop)[start:]
    keys = block_key(resolve(one, n), start, stop), block_key(resolve(two, m), start, stop)
    assert (keys[0] == keys[1]) == (mine == theirs)
    assert (keys[0] is None) == (not any(mine))


@pytest.mark.parametrize("kind", ["response", "generated"])
@given(n=st.integers(1, 200), size=st.sampled_from([1, 16, 32]))
def test_response_only_shares_every_block_before_the_answer(kind: str, n: int, size: int) -> None:
    """Invariant: a "response" or "generated" intervention shares its prompt's KV with the base model, all blocks before
    the one that holds position prompt_len - 1 (generated: prompt_len)."""
    segments = resolve([Component("a", 1.0, Positions(kind))], n)
    edge = n - 1 if kind == "response" else n
    for start in range(0, n + 2 * size, size):
        touched = edge < start + size
        assert (block_key(segments, start, start + size) is not None) == touched


def test_all_never_shares() -> None:
    segments = resolve([Component("a", 1.0, Positions("all"))], 5)
    keys = {block_key(segments, start, start + 4) for start in range(0, 64, 4)}
    assert None not in keys
    assert len(keys) == 16


def test_a_longer_prompt_under_all_reuses_the_first_turns_keys() -> None:
    turns = [resolve([Component("a", 1.0, Positions("all"))], n) for n in (5, 37)]
    assert block_key(turns[0], 0, 16) == block_key(turns[1], 0, 16)


@pytest.mark.parametrize(
    "other",
    [Term("b" * 64, 0, 1.0), Term("a" * 64, 1, 1.0), Term("a" * 64, 0, 1.0000001), Term("a" * 64, 0, -1.0)],
    ids=["digest", "part", "scale", "sign"],
)
def test_each_fact_of_a_term_is_in_the_key(other: Term) -> None:
    term = Term("a" * 64, 0, 1.0)
    assert block_key([Segment(0, OPEN, (term,))], 0, 16) != block_key([Segment(0, OPEN, (other,))], 0, 16)
    pair = [Segment(0, OPEN, tuple(sorted((term, other))))]
    assert block_key(pair, 0, 16) not in {block_key([Segment(0, OPEN, (t,))], 0, 16) for t in (term, other)}


def test_the_positions_within_a_block_are_in_the_key() -> None:
    terms = (Term("a", 0, 1.0),)
    keys = {block_key([Segment(s, e, terms)], 0, 8) for s in range(8) for e in range(s + 1, 9)}
    assert len(keys) == 36


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308, -1e308, 8.000001, 10**400, -(10**400)])
def test_scales_out_of_range(bad: float) -> None:
    with pytest.raises(ScaleOutOfRange) as caught:
        check_scale(bad, 8.0, "interventions[0].scale")
    assert caught.value.param == "interventions[0].scale"


@pytest.mark.parametrize("bad", [True, False, "1.0", None, [1.0], 1j, b"1"])
def test_scales_of_other_types(bad: object) -> None:
    with pytest.raises(InvalidIntervention, match="expected a number"):
        check_scale(bad, 8.0)


def test_huge_whole_numbers_are_refused_without_printing_them() -> None:
    with pytest.raises(ScaleOutOfRange) as caught:
        check_scale(10**5000, 8.0)
    assert len(caught.value.message) < 200


@given(st.floats(-8, 8))
def test_a_scale_is_the_float32_that_the_tables_hold(scale: float) -> None:
    kept = check_scale(scale, 8.0)
    assert kept == float(np.float32(scale))
    assert check_scale(kept, 8.0) == kept


def test_the_limit_itself_is_allowed() -> None:
    assert [check_scale(s, 8.0) for s in (8, -8, 8.0, 0)] == [8.0, -8.0, 8.0, 0.0]
