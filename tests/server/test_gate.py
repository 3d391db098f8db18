"""The gate: never more rows than there are, first come first served, nothing left behind."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm.config import SteerConfig
from steer_vllm.errors import TooManyInterventions
from steer_vllm.rows import Content
from steer_vllm.segments import Term
from steer_vllm.server.gate import Gate, Rows, Ticket

from .conftest import used


def content(name: str) -> Content:
    return (Term(name, 0, 1.0),)


def rows(additive: str = "", low_rank: str = "") -> Rows:
    return Rows(frozenset(map(content, additive)), frozenset(map(content, low_rank)))


def gate(additive: int = 2, low_rank: int = 2) -> Gate:
    return Gate(SteerConfig(additive_rows=additive, low_rank_rows=low_rank))


async def test_equal_contents_share_a_row() -> None:
    door = gate(1)
    first, second = door.request(rows("a")), door.request(rows("a"))
    assert first.granted.done()
    assert second.granted.done()
    assert used(door) == (1, 0)
    door.release(first)
    assert used(door) == (1, 0)
    door.release(second)
    assert used(door) == (0, 0)


async def test_waits_and_is_served_in_order() -> None:
    door = gate(1)
    first, second, third = (door.request(rows(name)) for name in "abc")
    assert [ticket.granted.done() for ticket in (first, second, third)] == [True, False, False]
    door.release(first)
    assert [ticket.granted.done() for ticket in (second, third)] == [True, False]


async def test_nobody_overtakes() -> None:
    """A request whose row is in place waits behind one that waits for a row: else a busy row would starve it."""
    door = gate(1)
    holder, waiter = door.request(rows("a")), door.request(rows("b"))
    late = door.request(rows("a"))
    assert not late.granted.done()
    door.release(holder)
    assert waiter.granted.done()
    assert not late.granted.done()


async def test_leaving_the_queue_lets_the_next_in() -> None:
    door = gate(2, 1)
    holder = door.request(rows("a", "x"))
    blocked = door.request(rows("b", "y"))
    behind = door.request(rows("b"))
    assert not behind.granted.done()
    door.release(blocked)
    assert behind.granted.done()
    assert used(door) == (2, 1)
    door.release(holder)
    door.release(behind)
    assert (used(door), len(door._waiting)) == ((0, 0), 0)


async def test_all_or_nothing() -> None:
    """A request that gets only some of its rows holds none while it waits."""
    door = gate(2, 1)
    door.request(rows("a", "x"))
    door.request(rows("b", "y"))
    assert used(door) == (1, 1)


async def test_what_never_fits_is_refused_at_once() -> None:
    with pytest.raises(TooManyInterventions, match="needs 3 additive rows, the server has 2"):
        gate(2).request(rows("abc"))
    with pytest.raises(TooManyInterventions, match="needs 1 low-rank rows, the server has 0"):
        gate(2, 0).request(rows("a", "x"))


async def test_release_is_once() -> None:
    door = gate()
    ticket = door.request(rows("a"))
    door.release(ticket)
    with pytest.raises(KeyError):
        door.release(ticket)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 3))
def test_any_history(seed: int, additive: int, low_rank: int) -> None:
    async def history() -> None:
        draw = random.Random(seed)
        door = gate(additive, low_rank)
        live: list[Ticket] = []
        for _ in range(60):
            if live and draw.random() < 0.45:
                door.release(live.pop(draw.randrange(len(live))))
            else:
                wanted = rows(
                    "".join(draw.sample("abcdef", draw.randint(0, additive))),
                    "".join(draw.sample("uvwxyz", draw.randint(0, low_rank))),
                )
                live.append(door.request(wanted))
            holding = [ticket.rows for ticket in live if ticket.granted.done()]
            held = (
                frozenset().union(*(one.additive for one in holding)),
                frozenset().union(*(one.low_rank for one in holding)),
            )
            assert used(door) == (len(held[0]), len(held[1]))
            assert len(held[0]) <= additive
            assert len(held[1]) <= low_rank
            waiting = [ticket for ticket in live if not ticket.granted.done()]
            assert len(waiting) == len(door._waiting)
            if waiting:  # the first in the queue really cannot be served
                first = waiting[0].rows
                assert len(held[0] | first.additive) > additive or len(held[1] | first.low_rank) > low_rank
                assert all(ticket.granted.done() for ticket in live[: live.index(waiting[0])])
        for ticket in live:
            door.release(ticket)
        assert (used(door), len(door._waiting)) == ((0, 0), 0)

    asyncio.run(history())
