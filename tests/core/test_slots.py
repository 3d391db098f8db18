"""The tables: rows hold exactly their content, whatever they held before, and every token reads its own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from core.make import BASE, places, randn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from steer_vllm.config import SteerConfig
from steer_vllm.edit import LowRank, Site
from steer_vllm.packed import Layout, Packed, compose
from steer_vllm.plan import Fill, Placement, Plan
from steer_vllm.positions import OPEN
from steer_vllm.rows import Content
from steer_vllm.segments import Term
from steer_vllm.slots import RequestSlots, SlotTables, TokenSlots, gather

CONFIG = SteerConfig(additive_rows=4, low_rank_rows=3, max_rank=8, additive_sites=tuple(Site), per_request=1)
LAYOUT = Layout.of(places((0, 2)), BASE.hidden_size, CONFIG)


def packed(rank: int, seed: int, offset: bool = True) -> Packed:
    places, hidden = len(LAYOUT.low_rank), BASE.hidden_size
    return Packed(
        randn(len(LAYOUT.additive), hidden, seed=seed) if offset else None,
        LowRank(
            randn(places, rank, hidden, seed=seed + 1),
            randn(places, rank, hidden, seed=seed + 2),
            randn(places, rank, seed=seed + 3),
        )
        if rank
        else None,
    )


STORE = {("eight", 0): packed(8, 1), ("two", 0): packed(2, 5), ("two", 1): packed(1, 9), ("add", 0): packed(0, 13)}


def alone(digest: str, part: int = 0) -> Content:
    return (Term(digest, part, 1.0),)


def plan(additive: Iterable[tuple[int, Content]] = (), low_rank: Iterable[tuple[int, Content]] = ()) -> Plan:
    return Plan((), (), tuple(Fill(*fill) for fill in additive), tuple(Fill(*fill) for fill in low_rank))


@pytest.fixture
def tables() -> SlotTables:
    return SlotTables(LAYOUT, CONFIG, torch.float32, "cpu")


def holds(tables: SlotTables, row: int, part: LowRank | None) -> bool:
    """The row is that part and zero above its rank."""
    rank = part.A.shape[1] if part else 0
    same = part is None or (
        torch.equal(tables.low_rank.A[row, :, :rank], part.A)
        and torch.equal(tables.low_rank.B[row, :, :rank], part.B)
        and torch.equal(tables.low_rank.c[row, :, :rank], part.c)
    )
    table = tables.low_rank
    return same and not any(t[row, :, rank:].any() for t in (table.A, table.B, table.c))


def test_sizes(tables: SlotTables) -> None:
    assert tables.additive.shape == (13, 6, BASE.hidden_size)
    assert tables.low_rank.A.shape == (12, 2, 8, BASE.hidden_size)
    assert tables.nbytes == 4 * (13 * 6 * 24 + 12 * 2 * 8 * (2 * 24 + 1))


def test_a_row_has_no_remains(tables: SlotTables) -> None:
    """Invariant: a row is exactly its content: rank 8, then 2, then 1, then none leaves nothing of the former."""
    for digest, part in (("eight", 0), ("two", 0), ("two", 1), ("add", 0), ("eight", 0)):
        tables.fill(plan([(2, alone(digest, part))], [(2, alone(digest, part))]), STORE)
        assert torch.equal(tables.additive[2], STORE[digest, part].offset)  # type: ignore[arg-type]
        assert holds(tables, 2, STORE[digest, part].low_rank)
    tables.write_additive(2, Packed(None, None))
    assert not tables.additive[2].any()


def test_row_zero_and_neighbours_are_never_written(tables: SlotTables) -> None:
    tables.fill(plan([(2, alone("eight"))], [(2, alone("eight"))]), STORE)
    others = [row for row in range(len(tables.low_rank.A)) if row != 2]
    assert not tables.additive[others].any()
    assert all(holds(tables, row, None) for row in others)


def test_fill_writes_only_what_changed(tables: SlotTables, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []
    for table in ("additive", "low_rank"):
        write = getattr(tables, f"write_{table}")

        def record(row: int, packed: Packed, write: object = write, table: str = table) -> None:
            written.append((table, row))
            write(row, packed)  # type: ignore[operator]

        monkeypatch.setattr(tables, f"write_{table}", record)
    both = plan([(1, alone("add")), (2, alone("two"))], [(1, alone("eight"))])
    tables.fill(both, STORE)
    assert written == [("additive", 1), ("additive", 2), ("low_rank", 1)]
    tables.fill(both, STORE)
    assert len(written) == 3
    tables.fill(plan([(2, alone("add"))], [(1, alone("eight"))]), STORE)
    assert written[3:] == [("additive", 2)]


def test_a_composed_row(tables: SlotTables) -> None:
    content = (Term("two", 0, -0.5), Term("two", 1, 2.0))
    tables.fill(plan([(3, content)], [(3, content)]), STORE)
    whole = compose([(STORE["two", 0], -0.5), (STORE["two", 1], 2.0)])
    assert torch.equal(tables.additive[3], whole.offset)  # type: ignore[arg-type]
    assert holds(tables, 3, whole.low_rank)


def test_a_single_term_with_its_scale_baked() -> None:
    """Beside a term of the other table a single one is baked, too."""
    found = gather(Fill(1, (Term("add", 0, 0.5),)), STORE, "cpu")
    torch.testing.assert_close(found.offset, 0.5 * STORE["add", 0].offset)  # type: ignore[operator]


def test_views_of_a_place_follow_the_table(tables: SlotTables) -> None:
    place = LAYOUT.additive[4]
    view, low = tables.additive_at(place), tables.low_rank_at(LAYOUT.low_rank[1])
    tables.fill(plan([(1, alone("two"))], [(2, alone("eight"))]), STORE)
    assert torch.equal(view[1], STORE["two", 0].offset[4])  # type: ignore[index]
    assert torch.equal(low.A[2], STORE["eight", 0].low_rank.A[1])  # type: ignore[union-attr]


def test_token_slots_behind_the_tokens_are_the_identity() -> None:
    """Invariant: a shorter step leaves nothing of a longer one: padded rows get row 0 at scale 0."""
    slots = TokenSlots(6, "cpu")
    requests = RequestSlots(2, CONFIG, "cpu")
    requests.add("long", [Placement(0, OPEN, 3, 4, 2.0)])
    requests.add("short", [Placement(0, OPEN, 7, 0, 0.5)])
    rows = [torch.tensor([requests.row(name)], dtype=torch.int32) for name in ("long", "short")]
    requests.route(torch.arange(5), torch.tensor([0, 5]), rows[0], 5, slots)
    assert slots.low_rank.tolist() == [4, 4, 4, 4, 4, 0]
    requests.route(torch.arange(2), torch.tensor([0, 2]), rows[1], 2, slots)
    assert slots.additive.tolist() == [7, 7, 0, 0, 0, 0]
    assert slots.low_rank.tolist() == [0, 0, 0, 0, 0, 0]
    assert slots.scales.tolist() == [0.5, 0.5, 0, 0, 0, 0]
    slots.clear()
    assert not any(into.any() for into in (slots.additive, slots.low_rank, slots.scales))
    slots.clear()


def test_token_slots_stay_where_they_are() -> None:
    """Graphs are captured on the addresses."""
    slots = TokenSlots(6, "cpu")
    before = [t.data_ptr() for t in (slots.additive, slots.low_rank, slots.scales)]
    for into in slots.reach(3):
        into.fill_(1)
    slots.clear()
    assert not slots.scales.any()
    assert [t.data_ptr() for t in (slots.additive, slots.low_rank, slots.scales)] == before


class Requests(RuleBasedStateMachine):
    """Requests come and go; each routes by its own placements, none by another's."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = RequestSlots(2, CONFIG, "cpu")
        self.held: dict[str, tuple[Placement, ...]] = {}

    @rule(name=st.sampled_from("abcdefgh"), start=st.integers(0, 5), row=st.integers(1, 9))
    def add(self, name: str, start: int, row: int) -> None:
        if name not in self.held:
            self.held[name] = (
                Placement(start, start + 2, row, row + 1, 0.5),
                Placement(start + 3, OPEN, row, 0, -float(row)),
            )[: 1 + row % 2]
            self.slots.add(name, self.held[name])

    @rule(name=st.sampled_from("abcdefgh"))
    def remove(self, name: str) -> None:
        assert self.slots.remove(name) == (name in self.held)
        self.held.pop(name, None)

    @invariant()
    def every_request_routes_by_its_own(self) -> None:
        assert len(self.slots) == len(self.held)
        rows = {name: self.slots.row(name) for name in "abcdefgh"}
        assert {name for name, row in rows.items() if row} == set(self.held)
        assert len({row for row in rows.values() if row}) == len(self.held)
        into = TokenSlots(8 * 10, "cpu")
        positions = torch.arange(10).repeat(8)
        requests = torch.tensor(list(rows.values()), dtype=torch.int32)
        self.slots.route(positions, torch.arange(0, 90, 10), requests, 80, into)
        found = list(zip(into.additive.tolist(), into.low_rank.tolist(), into.scales.tolist(), strict=True))
        for i, name in enumerate(rows):
            for p in range(10):
                slot = next(
                    (
                        (s.additive_row, s.low_rank_row, s.scale)
                        for s in self.held.get(name, ())
                        if s.start <= p < s.stop
                    ),
                    (0, 0, 0.0),
                )
                assert found[10 * i + p] == slot


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_the_tables_grow() -> None:
    """Preempted requests keep their row: more can be there than run at once."""
    slots = RequestSlots(2, CONFIG, "cpu")
    for n in range(23):
        slots.add(str(n), (Placement(0, OPEN, n + 1, 0, 1.0),))
    rows = torch.tensor([slots.row(str(n)) for n in range(23)])
    assert rows.unique().tolist() == list(range(1, 24))
    assert slots.spans[rows, 0, 2].tolist() == list(range(1, 24))
    assert not slots.spans[0].any()


def test_fewer_segments_than_before_leave_nothing() -> None:
    slots = RequestSlots(1, CONFIG, "cpu")
    slots.add("a", [Placement(i, i + 1, 5, 5, 1.0) for i in range(4)])
    slots.remove("a")
    slots.add("b", [Placement(0, 1, 7, 0, 2.0)])
    row = slots.row("b")
    assert slots.spans[row].tolist() == [[0, 1, 7, 0], [0] * 4, [0] * 4, [0] * 4]
    assert slots.scales[row].tolist() == [2, 0, 0, 0]
