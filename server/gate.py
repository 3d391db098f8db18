"""The front's count of table rows: a request goes on to the engine only when the rows it needs are free.

First come, first served: a request waits until everyone before it has its rows, so that none starves. Counts contents,
not tensors; the engine places them. For one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from ..config import SteerConfig
from ..errors import NoRows, TooManyInterventions
from ..rows import Content, RowLedger


@dataclass(frozen=True)
class Rows:
    """The distinct row contents a request needs."""

    additive: frozenset[Content] = frozenset()
    low_rank: frozenset[Content] = frozenset()


@dataclass(eq=False)
class Ticket:
    """A place in the queue, and then the rows. `granted` is done as soon as the request may go on."""

    rows: Rows
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Gate:
    """Counts the rows that requests in flight hold."""

    def __init__(self, config: SteerConfig) -> None:
        self._additive = RowLedger(config.additive_rows, "additive")
        self._low_rank = RowLedger(config.low_rank_rows, "low-rank")
        self._waiting: deque[Ticket] = deque()
        self._held: set[Ticket] = set()

    def request(self, rows: Rows) -> Ticket:
        """Queue up; the ticket must be released whatever happens.

        Errors: `TooManyInterventions` when the tables could not hold the rows even with nobody else there.
        """
        for ledger, contents in ((self._additive, rows.additive), (self._low_rank, rows.low_rank)):
            if len(contents) > ledger.count:
                raise TooManyInterventions(
                    f"the request needs {len(contents)} {ledger.table} rows, the server has {ledger.count}",
                    param="interventions",
                )
        ticket = Ticket(rows)
        self._waiting.append(ticket)
        self._grant()
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Give the rows back, or leave the queue. Errors: `KeyError` when the ticket was released before."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        else:
            self._held.remove(ticket)
            self._additive.release_all(ticket.rows.additive)
            self._low_rank.release_all(ticket.rows.low_rank)
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._take(self._waiting[0].rows):
            ticket = self._waiting.popleft()
            self._held.add(ticket)
            ticket.granted.set_result(None)

    def _take(self, rows: Rows) -> bool:
        try:
            self._additive.acquire_all(rows.additive)
        except NoRows:
            return False
        try:
            self._low_rank.acquire_all(rows.low_rank)
        except NoRows:
            self._additive.release_all(rows.additive)
            return False
        return True
