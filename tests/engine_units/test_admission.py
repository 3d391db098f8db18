"""The engine core's book: what is pinned is released, once; what fails pins nothing; no two contents share a row."""

from __future__ import annotations

from typing import Any

import pytest

from steer_vllm.config import SPARE_ROWS, SteerConfig
from steer_vllm.engine.admission import Admission
from steer_vllm.errors import (
    ArtifactInvalid,
    InvalidIntervention,
    NoRows,
    ScaleOutOfRange,
    SteerError,
    TooManyInterventions,
)
from steer_vllm.plan import PartSummary, Plan, Summary
from steer_vllm.positions import OPEN, Positions
from steer_vllm.request import Steering
from steer_vllm.segments import Component, Term

CONFIG = SteerConfig(additive_rows=2, low_rank_rows=1, max_rank=4, per_request=2, max_scale=1e4)
SUMMARIES = [
    Summary("add", (PartSummary(True, 0, 1.0),)),
    Summary("two", (PartSummary(True, 0, 1.0),)),
    Summary("low", (PartSummary(False, 2, 1.0), PartSummary(False, 4, 1.0))),
    Summary("both", (PartSummary(True, 3, 1.0),)),
]
NOTHING = {"pinned": 0, "additive_rows": 0, "low_rank_rows": 0}


@pytest.fixture
def admission() -> Admission:
    return opened()


def opened(config: SteerConfig = CONFIG) -> Admission:
    book = Admission(config, 1e3)
    for summary in SUMMARIES:
        book.publish(summary)
    return book


def asks(*parts: tuple[Any, ...], start: int | None = None) -> Steering:
    """(digest, scale, positions), the last two optional."""
    full = [(*part, *(1.0, "all")[len(part) - 1 :]) for part in parts]
    return Steering(tuple(Component(d, s, Positions.parse(p)) for d, s, p in full), start)


def gone(admission: Admission, digest: str) -> None:
    """Close and forget content that nothing uses."""
    assert admission.close(digest)
    assert admission.forget(digest)


def counts(admission: Admission) -> dict[str, int]:
    facts = admission.facts()
    return {name: facts[name] for name in NOTHING}


def test_a_plan_places_every_segment(admission: Admission) -> None:
    plan = admission.admit(asks(("add", 0.5, "response"), ("low", 2.0, "f2+l2/untied")), 10)
    add = {fill.content: fill.row for fill in plan.additive}
    low = {fill.content: fill.row for fill in plan.low_rank}
    alone, baked = (Term("add", 0, 1.0),), (Term("add", 0, 0.5),)
    first, last, last_baked = (Term("low", 0, 1.0),), (Term("low", 1, 1.0),), (Term("low", 1, 2.0),)
    assert set(add) == {alone, baked}
    assert set(low) == {first, last, last_baked}
    assert plan.placements == (
        (0, 2, 0, low[first], 2.0),
        (8, 9, 0, low[last], 2.0),
        (9, 10, add[baked], low[last_baked], 1.0),
        (10, OPEN, add[alone], 0, 0.5),
    )
    for rows, most in ((add, CONFIG.additive_rows), (low, CONFIG.low_rank_rows)):
        assert len(set(rows.values())) == len(rows)
        assert all(0 < row <= most + SPARE_ROWS for row in rows.values())


def test_equal_edits_share_a_row(admission: Admission) -> None:
    """Whatever their strength and place; rows are keyed by content."""
    one = admission.admit(asks(("add", 1.0, "all")), 5)
    two = admission.admit(asks(("add", -2.0, "generated")), 9)
    assert one.additive == two.additive
    assert counts(admission) == {"pinned": 2, "additive_rows": 1, "low_rank_rows": 0}


def test_response_start_stands_for_the_prompts_length(admission: Admission) -> None:
    plan = admission.admit(asks(("add", 1.0, "response"), start=4), 10)
    assert [p.start for p in plan.placements] == [3]
    assert admission.admit(asks(("add", 1.0, "response"), start=10), 10).placements[0].start == 9
    with pytest.raises(InvalidIntervention, match="response_start 11 is beyond the prompt's 10"):
        admission.admit(asks(("add", 1.0, "response"), start=11), 10)


@pytest.mark.parametrize(
    ("steering", "error"),
    [
        (asks(("unknown",)), ArtifactInvalid),
        (asks(("add",), ("unknown",)), ArtifactInvalid),
        (asks(("both",), ("low", 1.0, "f1+l1/untied")), TooManyInterventions),
        (asks(("add", 1001.0)), ScaleOutOfRange),
        (asks(("add", 600.0), ("two", -600.0)), ScaleOutOfRange),
        (asks(("add", 1.0, "f1+l1/untied")), InvalidIntervention),
        (asks(("low", 1.0, "all")), InvalidIntervention),
        (asks(("add",), start=99), InvalidIntervention),
    ],
)
def test_what_is_refused_pins_nothing(admission: Admission, steering: Steering, error: type[SteerError]) -> None:
    """Invariant: checked once more where the engine takes the request in, and only that request fails."""
    with pytest.raises(error):
        admission.admit(steering, 5)
    assert counts(admission) == NOTHING
    assert admission.close("add"), "nothing uses it"


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([("add", 8.5)], ScaleOutOfRange),
        ([("add", 5.0), ("add", 5.0)], ScaleOutOfRange),
        ([("add",)] * 3, TooManyInterventions),
    ],
)
def test_the_operators_limits_hold_here_too(parts: list[tuple[Any, ...]], error: type[SteerError]) -> None:
    """Invariant: what never passed the front gets no more than the front would have given."""
    admission = opened(SteerConfig(per_request=2, max_scale=8.0))
    with pytest.raises(error):
        admission.admit(asks(*parts), 5)
    assert counts(admission) == NOTHING
    admission.admit(asks(("add", 8.0), ("two", -8.0)), 5)


def test_no_rows_leaves_nothing_pinned() -> None:
    """Of both tables: the low-rank one is full, so the additive rows that were already taken go back."""
    admission, plans = opened(), []
    for n in range(CONFIG.low_rank_rows + SPARE_ROWS):
        admission.publish(Summary(f"low{n}", (PartSummary(False, 1, 1.0),)))
        plans.append(admission.admit(asks((f"low{n}",)), 5))
    before = counts(admission)
    with pytest.raises(NoRows, match="low-rank"):
        admission.admit(asks(("add",), ("both", 1.0, "generated")), 5)
    assert counts(admission) == before
    admission.release(plans[0])
    admission.admit(asks(("add",), ("both", 1.0, "generated")), 5)


def test_half_of_the_rows_is_none() -> None:
    """A request that gets its first row and not its second gives the first back."""
    admission = opened(SteerConfig(additive_rows=1, low_rank_rows=1, max_rank=4))
    for n in range(SPARE_ROWS):
        admission.publish(Summary(f"a{n}", (PartSummary(True, 0, 1.0),)))
        admission.admit(asks((f"a{n}",)), 5)
    with pytest.raises(NoRows, match="additive"):
        admission.admit(asks(("add", 1.0, "prompt"), ("two", 1.0, "generated")), 5)
    assert counts(admission) == {"pinned": SPARE_ROWS, "additive_rows": SPARE_ROWS, "low_rank_rows": 0}
    admission.admit(asks(("add",)), 5)


def test_a_table_without_rows() -> None:
    admission = opened(SteerConfig(low_rank_rows=0))
    with pytest.raises(NoRows, match="all 0 low-rank rows"):
        admission.admit(asks(("both",)), 5)
    assert counts(admission) == NOTHING


def test_release_of_what_holds_nothing(admission: Admission) -> None:
    admission.release(Plan((), (), (), (), ticket=99))
    plan = admission.admit(asks(("add",)), 5)
    admission.release(plan)
    admission.release(plan)
    assert counts(admission) == NOTHING


def test_a_release_is_of_its_own_request(admission: Admission) -> None:
    """Whatever their order, and whatever ids they have: one that is turned away takes nothing from one that runs."""
    first = admission.admit(asks(("add",)), 5)
    second = admission.admit(asks(("low", 1.0, "f1+l1/untied")), 5)
    assert counts(admission) == {"pinned": 2, "additive_rows": 1, "low_rank_rows": 2}
    admission.release(second)
    admission.release(second)
    assert counts(admission) == {"pinned": 1, "additive_rows": 1, "low_rank_rows": 0}
    admission.release(first)
    assert counts(admission) == NOTHING


def test_close_waits_for_the_last_request(admission: Admission) -> None:
    """Invariant: requests in flight finish with the digest they started with; new ones are turned away at once."""
    plan = admission.admit(asks(("add",)), 5)
    assert admission.held("add") == "open"
    assert not admission.close("add")
    assert admission.held("add") == "closing"
    with pytest.raises(ArtifactInvalid, match="does not hold"):
        admission.admit(asks(("add",)), 5)
    assert not admission.close("add")
    assert not admission.forget("add"), "one uses it"
    admission.release(plan)
    assert admission.close("add")
    assert admission.forget("add")
    assert "add" not in admission.facts()["loaded"]
    assert admission.held("add") == "absent"
    assert admission.forget("add"), "again is no error"
    assert admission.close("add"), "nor is this"
    assert admission.reopen("add") is None


def test_open_content_is_not_forgotten(admission: Admission) -> None:
    """Invariant: what was opened again since it was closed stays, whatever is still on its way to free it."""
    assert not admission.forget("add")
    assert admission.close("add")
    admission.reopen("add")
    assert not admission.forget("add")
    admission.admit(asks(("add",)), 5)


def test_reopen_takes_a_close_back(admission: Admission) -> None:
    plan = admission.admit(asks(("add",)), 5)
    assert not admission.close("add")
    assert admission.reopen("add") == SUMMARIES[0]
    admission.admit(asks(("add",)), 5)
    admission.release(plan)
    assert not admission.close("add"), "the other uses it"
    assert admission.reopen("nobody") is None


def test_publish_takes_a_close_back(admission: Admission) -> None:
    admission.admit(asks(("add",)), 5)
    admission.close("add")
    admission.publish(SUMMARIES[0])
    admission.admit(asks(("add",)), 5)


def test_closed_content_leaves_no_row(admission: Admission) -> None:
    """All rows can be had by others, also those of a composition with it."""
    plan = admission.admit(asks(("add",), ("two", 2.0)), 5)
    admission.release(plan)
    gone(admission, "add")
    for n in range(CONFIG.additive_rows + SPARE_ROWS):
        admission.publish(Summary(f"a{n}", (PartSummary(True, 0, 1.0),)))
        admission.admit(asks((f"a{n}",)), 5)


def test_rows_of_closed_content_are_taken_before_idle_ones(admission: Admission) -> None:
    """So that content which is still loaded keeps its row, and needs no copy when it comes back."""
    for n in range(CONFIG.additive_rows + SPARE_ROWS - 2):
        admission.publish(Summary(f"a{n}", (PartSummary(True, 0, 1.0),)))
        admission.admit(asks((f"a{n}",)), 5)
    rows, plans = {}, {}
    for digest in ("two", "add"):  # "two" has been idle for longer
        plans[digest] = admission.admit(asks((digest,)), 5)
        rows[digest] = plans[digest].additive[0].row
    for digest in ("two", "add"):
        admission.release(plans[digest])
    gone(admission, "add")
    assert admission.admit(asks(("both",)), 5).additive[0].row == rows["add"]
    assert admission.admit(asks(("two",)), 5).additive[0].row == rows["two"]


def test_what_vanishes_needs_no_row(admission: Admission) -> None:
    plan = admission.admit(asks(("add", 0.0)), 5)
    assert plan == Plan((), (), (), ())
    assert not admission.close("add"), "the request names it all the same"
    admission.release(plan)
    assert counts(admission) == NOTHING
