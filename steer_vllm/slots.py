"""The tables on the device, and what tokens read from them.

`SlotTables` hold compiled edits by row, `TokenSlots` the rows and scale of every token of the step, `RequestSlots` the
segments of every request in flight. All are allocated once; row 0 is the identity. They fill what a plan says and
decide nothing: rows are handed out elsewhere.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import torch

from .config import SteerConfig
from .edit import LowRank, Place
from .ops import custom
from .packed import Layout, Packed, compose
from .plan import Fill, Placement, Plan
from .rows import Content

Store = Mapping[tuple[str, int], Packed]
"""Host memory of everything loaded: (digest, part) -> packed part."""


class SlotTables:
    """additive: [rows + 1, places, hidden]; low_rank: A, B [rows + 1, places, max_rank, hidden], c without hidden.

    A row is contiguous, so filling one is a copy per tensor whatever the number of layers.
    """

    def __init__(self, layout: Layout, config: SteerConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.layout = layout
        self.device = device
        hidden, rank = layout.hidden_size, config.max_rank
        sizes = (config.low_rank_table_rows, len(layout.low_rank), rank)
        self.additive = torch.zeros(
            config.additive_table_rows, len(layout.additive), hidden, dtype=dtype, device=device
        )
        self.low_rank = LowRank(
            A=torch.zeros(*sizes, hidden, dtype=dtype, device=device),
            B=torch.zeros(*sizes, hidden, dtype=dtype, device=device),
            c=torch.zeros(*sizes, dtype=dtype, device=device),
        )
        self._additive_held: dict[int, Content] = {}
        self._low_rank_held: dict[int, Content] = {}

    @property
    def nbytes(self) -> int:
        """Device memory of all tables."""
        return sum(tensor.nbytes for tensor in (self.additive, self.low_rank.A, self.low_rank.B, self.low_rank.c))

    def additive_at(self, place: Place) -> torch.Tensor:
        """[rows + 1, hidden] view of one place."""
        return self.additive[:, self.layout.additive.index(place)]

    def low_rank_at(self, place: Place) -> LowRank:
        """[rows + 1, max_rank, hidden] views of one place."""
        at = self.layout.low_rank.index(place)
        return LowRank(self.low_rank.A[:, at], self.low_rank.B[:, at], self.low_rank.c[:, at])

    def fill(self, plan: Plan, store: Store) -> None:
        """Bring the plan's rows up to date. A row keeps its content between requests, so most calls copy nothing."""
        for fill in plan.additive:
            if self._additive_held.get(fill.row) != fill.content:
                self.write_additive(fill.row, gather(fill, store, self.device))
                self._additive_held[fill.row] = fill.content
        for fill in plan.low_rank:
            if self._low_rank_held.get(fill.row) != fill.content:
                self.write_low_rank(fill.row, gather(fill, store, self.device))
                self._low_rank_held[fill.row] = fill.content

    def refill(self, digests: Container[str], store: Store) -> None:
        """Write the rows again that hold content of these digests."""
        for held, write in ((self._additive_held, self.write_additive), (self._low_rank_held, self.write_low_rank)):
            for row, content in held.items():
                if any(term.digest in digests for term in content):
                    write(row, gather(Fill(row, content), store, self.device))

    def forget(self, digest: str) -> None:
        """Its content is freed. Loaded again it may be other values, of other weights: no row counts as holding it."""
        for held in (self._additive_held, self._low_rank_held):
            for row in [row for row, content in held.items() if any(term.digest == digest for term in content)]:
                del held[row]

    def restore(self, store: Store) -> None:
        """Write every row again, on a device that has lost them."""
        for tensor in (self.additive, self.low_rank.A, self.low_rank.B, self.low_rank.c):
            tensor.zero_()
        self.refill({digest for digest, _ in store}, store)

    def write_additive(self, row: int, packed: Packed) -> None:
        """Copy one part's offsets into a row; a part without any makes it the identity."""
        if packed.offset is None:
            self.additive[row].zero_()
        else:
            self.additive[row].copy_(packed.offset, non_blocking=True)

    def write_low_rank(self, row: int, packed: Packed) -> None:
        """Copy one part's low-rank edit into a row; ranks above its own become zero."""
        rank = packed.low_rank.A.shape[1] if packed.low_rank else 0
        for name in ("A", "B", "c"):
            into = getattr(self.low_rank, name)[row]
            if packed.low_rank:
                into[:, :rank].copy_(getattr(packed.low_rank, name), non_blocking=True)
            into[:, rank:].zero_()


def gather(fill: Fill, store: Store, device: torch.device | str) -> Packed:
    """The packed content of a row: the part itself when it stands alone, else the composition, made on the device."""
    terms = fill.content
    if len(terms) == 1 and terms[0].scale == 1.0:
        return store[terms[0].digest, terms[0].part]
    return compose((store[term.digest, term.part].to(device), term.scale) for term in terms)


def staged(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host values in memory from which the device copies on its own: a copy from ordinary memory would wait for it.

    torch keeps page-locked memory alive until the copies that were started from it are done.
    """
    return values.pin_memory() if device.type == "cuda" else values


class TokenSlots:
    """What the layers read in a step: additive row and low-rank row (int32) and scale (float32) of each token."""

    def __init__(self, tokens: int, device: torch.device | str) -> None:
        self.additive = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.low_rank = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.scales = torch.zeros(tokens, dtype=torch.float32, device=device)
        self._used = 0  # everything from here on is zero

    def reach(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a step of so many tokens must write: their slots, and behind them what the step before left."""
        count = max(tokens, self._used)
        self._used = tokens
        return self.additive[:count], self.low_rank[:count], self.scales[:count]

    def restore(self) -> None:
        """No token is edited, on a device that has lost its memory."""
        self._used = len(self.scales)
        self.clear()

    def clear(self) -> None:
        """No token is edited. Free when that is so already."""
        if self._used:
            for into in (self.additive, self.low_rank, self.scales):
                into[: self._used].zero_()
            self._used = 0


class RequestSlots:
    """Segments of the requests in a worker, for `reference.route`. Row 0 belongs to every request without a plan.

    Preempted requests keep their row, so there can be more than run at once: the tables grow when they must.
    """

    def __init__(self, requests: int, config: SteerConfig, device: torch.device | str) -> None:
        self.spans = torch.zeros(requests + 1, config.max_segments, 4, dtype=torch.int32, device=device)
        self.scales = torch.zeros(requests + 1, config.max_segments, dtype=torch.float32, device=device)
        self._free = list(range(requests, 0, -1))
        self._row: dict[str, int] = {}
        self._placements: dict[str, Sequence[Placement]] = {}

    def __len__(self) -> int:
        return len(self._row)

    def add(self, request_id: str, placements: Sequence[Placement]) -> None:
        """Take a request in that is not there yet."""
        if not self._free:
            self._grow()
        self._row[request_id] = self._free.pop()
        self._placements[request_id] = placements
        self._write(self._row[request_id], placements)

    def restore(self) -> None:
        """Write every request's segments again, on a device that has lost them."""
        self.spans.zero_()
        self.scales.zero_()
        for request_id, row in self._row.items():
            self._write(row, self._placements[request_id])

    def _write(self, row: int, placements: Sequence[Placement]) -> None:
        spans = np.zeros(self.spans.shape[1:], dtype=np.int32)
        scales = np.zeros(self.scales.shape[1:], dtype=np.float32)
        for i, place in enumerate(placements):
            spans[i] = place[:4]
            scales[i] = place.scale
        self.spans[row].copy_(staged(torch.from_numpy(spans), self.spans.device), non_blocking=True)
        self.scales[row].copy_(staged(torch.from_numpy(scales), self.scales.device), non_blocking=True)

    def remove(self, request_id: str) -> bool:
        """Let a request go; False for an unknown one, since runners remove before they add."""
        row = self._row.pop(request_id, None)
        if row is not None:
            self._free.append(row)
            del self._placements[request_id]
        return row is not None

    def row(self, request_id: str) -> int:
        """The request's row, 0 for one without a plan."""
        return self._row.get(request_id, 0)

    def route(
        self, positions: torch.Tensor, starts: torch.Tensor, requests: torch.Tensor, tokens: int, into: TokenSlots
    ) -> None:
        """Set the slots of a step's tokens, of which there are at most `tokens`.

        positions, starts, requests: as `reference.route` takes them.
        """
        custom.route(positions, starts, requests, self.spans, self.scales, *into.reach(tokens))

    def _grow(self) -> None:
        count = len(self.spans)
        self._free = list(range(2 * count - 1, count - 1, -1))
        self.spans = torch.cat([self.spans, torch.zeros_like(self.spans)])
        self.scales = torch.cat([self.scales, torch.zeros_like(self.scales)])
