"""The ledger as a state machine that tries to break it: a row never has two contents with users, nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steer_vllm.errors import NoRows
from steer_vllm.rows import Content, RowLedger
from steer_vllm.segments import Term

ROWS = 3
CONTENTS: list[Content] = [
    (Term("a", 0, 1.0),),
    (Term("a", 1, 1.0),),
    (Term("b", 0, 1.0),),
    (Term("c", 0, 1.0),),
    (Term("a", 0, 0.5), Term("b", 0, 1.0)),
    (Term("b", 0, 2.0), Term("c", 0, 1.0)),
]


class Ledger(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = RowLedger(ROWS, "additive")
        self.users: dict[Content, int] = {}
        self.row: dict[Content, int] = {}
        """Of contents with users."""
        self.last: dict[int, Content] = {}
        """What a worker's table holds: it copies when a row is handed out for other content."""

    @rule(content=st.sampled_from(CONTENTS))
    def acquire(self, content: Content) -> None:
        full = len(self.users) == ROWS and content not in self.users
        if full:
            with pytest.raises(NoRows, match="3 additive rows"):
                self.ledger.acquire(content)
            return
        row = self.ledger.acquire(content)
        assert 1 <= row <= ROWS
        if content in self.row:
            assert row == self.row[content]
        else:
            assert row not in self.row.values(), "the row has other users"
        self.row[content] = row
        self.users[content] = self.users.get(content, 0) + 1
        self.last[row] = content

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        content = data.draw(st.sampled_from(sorted(self.users)))
        self.ledger.release(content)
        self.users[content] -= 1
        if not self.users[content]:
            del self.users[content], self.row[content]

    @rule(content=st.sampled_from(CONTENTS))
    def release_without_users(self, content: Content) -> None:
        if content not in self.users:
            with pytest.raises(KeyError):
                self.ledger.release(content)

    @rule(digest=st.sampled_from("abc"))
    def forget(self, digest: str) -> None:
        self.ledger.forget(digest)

    @invariant()
    def used_counts_contents_with_users(self) -> None:
        assert self.ledger.used == len(self.users)

    @invariant()
    def rows_with_users_hold_their_content(self) -> None:
        assert {row: self.last[row] for row in self.row.values()} == {row: c for c, row in self.row.items()}

    def teardown(self) -> None:
        for content, count in list(self.users.items()):
            for _ in range(count):
                self.ledger.release(content)
        assert self.ledger.used == 0
        fresh = [(Term(str(n), 0, 1.0),) for n in range(ROWS)]
        assert sorted(self.ledger.acquire(content) for content in fresh) == [1, 2, 3], "a row leaked"


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_idle_content_keeps_its_row() -> None:
    ledger = RowLedger(2, "additive")
    row = ledger.acquire(CONTENTS[0])
    ledger.release(CONTENTS[0])
    other = ledger.acquire(CONTENTS[1])
    assert ledger.acquire(CONTENTS[0]) == row != other


def test_the_longest_idle_row_goes_first() -> None:
    ledger = RowLedger(2, "additive")
    one, two, three = CONTENTS[:3]
    rows = [ledger.acquire(content) for content in (one, two)]
    for content in (one, two):
        ledger.release(content)
    assert ledger.acquire(three) == rows[0]
    assert ledger.acquire(two) == rows[1]


def test_forget_frees_what_is_made_of_it() -> None:
    """Invariant: content that is gone leaves no row behind, alone or in a composition, and takes no one else's."""
    ledger = RowLedger(3, "additive")
    alone, other, both = CONTENTS[0], CONTENTS[2], CONTENTS[4]
    rows = {content: ledger.acquire(content) for content in (alone, other, both)}
    for content in rows:
        ledger.release(content)
    ledger.forget("a")
    fresh: list[Content] = [(Term("x", 0, 1.0),), (Term("y", 0, 1.0),)]
    assert {ledger.acquire(content) for content in fresh} == {rows[alone], rows[both]}
    assert ledger.acquire(other) == rows[other]


def test_no_rows_at_all() -> None:
    with pytest.raises(NoRows, match="all 0 low-rank rows"):
        RowLedger(0, "low-rank").acquire(CONTENTS[0])
