"""Which request uses which content and which rows: the engine core's book.

Requests are admitted in the input thread and released in the main loop, so every entry takes the lock. What fails here
fails one request. It knows no vLLM object.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

from ..config import SteerConfig
from ..errors import ArtifactInvalid, InvalidIntervention, NoRows
from ..plan import Fill, PartSummary, Placement, Plan, Summary, contents, needs
from ..request import Steering
from ..rows import Content, RowLedger
from ..segments import resolve

_Pin = tuple[frozenset[str], tuple[Content, ...], tuple[Content, ...]]
"""What a request holds: digests, additive contents, low-rank contents."""


class Admission:
    """Plans for requests, users of digests and rows."""

    def __init__(self, config: SteerConfig, largest: float) -> None:
        self.config = config
        self._largest = largest
        self._lock = threading.Lock()
        self._loaded: dict[str, Summary] = {}
        self._closing: set[str] = set()
        self._users: Counter[str] = Counter()
        self._pins: dict[str, deque[_Pin]] = {}
        self._additive = RowLedger(config.additive_table_rows - 1, "additive")
        self._low_rank = RowLedger(config.low_rank_table_rows - 1, "low-rank")

    def admit(self, request_id: str, steering: Steering, prompt_len: int) -> Plan:
        """Pin what the request needs and say where it is.

        Errors: `ArtifactInvalid` for content that is not loaded, `NoRows`, `InvalidIntervention` for a response_start
        beyond the prompt or positions that need other edits, and those of `plan.needs`. Nothing is pinned then.
        """
        start = steering.response_start
        if start is not None and start > prompt_len:
            raise InvalidIntervention(f"response_start {start} is beyond the prompt's {prompt_len} tokens")
        with self._lock:
            digests = frozenset(component.digest for component in steering.components)
            for digest in sorted(digests):
                if digest not in self._loaded or digest in self._closing:
                    raise ArtifactInvalid(f"the engine does not hold the intervention {digest[:12]}")
            for component in steering.components:
                parts, at = len(self._loaded[component.digest].parts), component.positions
                if at.parts != parts:
                    raise InvalidIntervention(f"{component.digest[:12]} has {parts} edits, positions {at} {at.parts}")
            segments = resolve(steering.components, prompt_len if start is None else start)
            needed = needs(segments, self._loaded, self.config, self._largest)
            additive, low_rank = contents(needed)
            rows = self._additive.acquire_all(additive)
            try:
                low_rank_rows = self._low_rank.acquire_all(low_rank)
            except NoRows:
                self._additive.release_all(additive)
                raise
            self._users.update(digests)
            self._pins.setdefault(request_id, deque()).append((digests, tuple(additive), tuple(low_rank)))
        return Plan(
            segments=segments,
            placements=tuple(
                Placement(
                    segment.start,
                    segment.stop,
                    rows[need.additive] if need.additive else 0,
                    low_rank_rows[need.low_rank] if need.low_rank else 0,
                    need.scale,
                )
                for segment, need in zip(segments, needed, strict=True)
            ),
            additive=tuple(Fill(row, content) for content, row in sorted(rows.items())),
            low_rank=tuple(Fill(row, content) for content, row in sorted(low_rank_rows.items())),
        )

    def release(self, request_id: str) -> None:
        """Let go of what the oldest request of that id holds; ids that hold nothing are no error."""
        with self._lock:
            pins = self._pins.get(request_id)
            if not pins:
                return
            digests, additive, low_rank = pins.popleft()
            if not pins:
                del self._pins[request_id]
            self._users.subtract(digests)
            self._additive.release_all(additive)
            self._low_rank.release_all(low_rank)

    def publish(self, summary: Summary) -> None:
        """The workers hold this content: requests may name it."""
        with self._lock:
            self._loaded[summary.digest] = summary
            self._closing.discard(summary.digest)

    def reopen(self, digest: str) -> Summary | None:
        """The summary of content that is held, which a pending `close` no longer takes away; None when it is not."""
        with self._lock:
            self._closing.discard(digest)
            return self._loaded.get(digest)

    def close(self, digest: str) -> bool:
        """Admit no more requests for it. True when nothing uses it and it is forgotten here."""
        with self._lock:
            if digest not in self._loaded:
                return True
            self._closing.add(digest)
            if self._users[digest]:
                return False
            del self._loaded[digest]
            del self._users[digest]
            self._closing.discard(digest)
            self._additive.forget(digest)
            self._low_rank.forget(digest)
            return True

    def facts(self) -> dict[str, Any]:
        """Counts for logs and tests."""
        with self._lock:
            return {
                "loaded": sorted(self._loaded),
                "pinned": sum(map(len, self._pins.values())),
                "additive_rows": self._additive.used,
                "low_rank_rows": self._low_rank.used,
            }


def merge(digest: str, ranks: list[list[dict[str, Any]]]) -> Summary:
    """One summary from those of all ranks: pipeline ranks hold different layers."""
    return Summary(
        digest,
        tuple(
            PartSummary(
                additive=any(part["additive"] for part in parts),
                rank=max(part["rank"] for part in parts),
                largest=max(part["largest"] for part in parts),
            )
            for parts in zip(*ranks, strict=True)
        ),
    )
