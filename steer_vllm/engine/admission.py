"""Which request uses which content and which rows: the engine core's book.

Requests are admitted in the input thread and released in the main loop, so every entry takes the lock. What fails here
fails one request. It knows no vLLM object.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from ..config import SteerConfig
from ..errors import ArtifactInvalid, EngineUnavailable, InvalidIntervention, NoRows, Unsupported
from ..plan import Fill, Placement, Plan, Summary, contents, needs
from ..request import Steering
from ..rows import Content, RowLedger
from ..segments import resolve

Held = Literal["absent", "closing", "open"]

_Pin = tuple[frozenset[str], tuple[Content, ...], tuple[Content, ...]]
"""What a request holds: digests, additive contents, low-rank contents."""


class Adapter(NamedTuple):
    """What tells one LoRA from another: vLLM's cache keys hold its name and path, its tables the number."""

    name: str
    number: int
    path: str


class Admission:
    """Plans for requests, users of digests and rows."""

    def __init__(self, config: SteerConfig, largest: float) -> None:
        self.config = config
        self._largest = largest
        self._lock = threading.Lock()
        self._loaded: dict[str, Summary] = {}
        self._closing: set[str] = set()
        self._unfit: dict[str, str] = {}
        self._unknown: str | None = None
        self._doomed: set[int] = set()
        self._users: Counter[str] = Counter()
        self._pins: dict[int, _Pin] = {}
        self._adapters: dict[str, set[Adapter]] = {}
        self._restless: set[int] = set()
        self._tickets = itertools.count(1)
        self._additive = RowLedger(config.additive_table_rows - 1, "additive")
        self._low_rank = RowLedger(config.low_rank_table_rows - 1, "low-rank")

    def admit(self, steering: Steering, prompt_len: int, adapter: Adapter | None = None) -> Plan:
        """Pin what the request needs and say where it is, until its plan is released. adapter: its LoRA, if any.

        Errors: those of `check_known`, `ArtifactInvalid` for what is not loaded, `NoRows`, `InvalidIntervention`
        for a response_start beyond the prompt or positions that need other edits, `Unsupported` for an adapter that
        `pair` was not called with, and those of `Steering.check_limits` and `plan.needs`. Nothing is pinned then.
        """
        start = steering.response_start
        steering.check_limits(self.config)
        steering.check_prompt(prompt_len)
        with self._lock:
            self._check_known()
            digests = frozenset(component.digest for component in steering.components)
            for digest in sorted(digests):
                if digest not in self._loaded or digest in self._closing:
                    raise ArtifactInvalid(f"the engine does not hold the intervention {digest[:12]}")
                if adapter is not None and adapter not in self._adapters.get(digest, ()):
                    raise Unsupported(f"{adapter} was not checked beside the intervention {digest[:12]}")
                self._check_fit(digest)
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
            ticket = next(self._tickets)
            self._pins[ticket] = (digests, tuple(additive), tuple(low_rank))
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
            ticket=ticket,
        )

    def release(self, plan: Plan) -> None:
        """Let go of what a request holds. Once: a plan that was released before holds nothing, and that is no error.

        By the plan's ticket and not by the request's id: an id can come back while its first request is on its way out.
        """
        with self._lock:
            if plan.ticket not in self._pins:
                return
            digests, additive, low_rank = self._pins.pop(plan.ticket)
            self._doomed.discard(plan.ticket)
            self._users.subtract(digests)
            self._additive.release_all(additive)
            self._low_rank.release_all(low_rank)

    def publish(self, summary: Summary) -> None:
        """The workers hold this content: requests may name it."""
        with self._lock:
            self._loaded[summary.digest] = summary
            self._closing.discard(summary.digest)

    def held(self, digest: str) -> Held:
        """Whether the content is there, and whether requests may name it."""
        with self._lock:
            return "absent" if digest not in self._loaded else "closing" if digest in self._closing else "open"

    def pair(self, adapter: Adapter, digest: str) -> None:
        """The workers say that this adapter beside this content is exact: requests may use both.

        Errors: `Unsupported` when the adapter may change at any time.
        """
        with self._lock:
            if adapter.number in self._restless:
                raise Unsupported(
                    f"the LoRA {adapter.name!r} was loaded in place by a request, so its weights may change at any "
                    "step: load it once more with add_lora"
                )
            if digest in self._loaded:
                self._adapters.setdefault(digest, set()).add(adapter)

    def paired(self, adapter: Adapter, digest: str) -> bool:
        """Whether `pair` was called with them."""
        with self._lock:
            return adapter in self._adapters.get(digest, ())

    def unpair(self, number: int, *, restless: bool = False) -> None:
        """The adapter of this number is another now, or gone: what the workers said of it no longer holds.

        restless: it may change again, since a request loads it in place, at steps that nobody tells, or a load is on
        its way: no pair with it until the engine has loaded or removed it.
        """
        with self._lock:
            (self._restless.add if restless else self._restless.discard)(number)
            for digest, adapters in self._adapters.items():
                self._adapters[digest] = {adapter for adapter in adapters if adapter.number != number}

    def reopen(self, digest: str) -> Summary | None:
        """The summary of content that is held, which requests may name again; None when it is not held.

        Errors: `ArtifactInvalid` for content that does not fit the present weights, those of `check_known`.
        """
        with self._lock:
            self._check_known()
            self._check_fit(digest)
            self._closing.discard(digest)
            return self._loaded.get(digest)

    def close(self, digest: str) -> bool:
        """Admit no more requests for it. True when none uses it."""
        with self._lock:
            if digest in self._loaded:
                self._closing.add(digest)
            return not self._users[digest]

    def forget(self, digest: str) -> bool:
        """Give up closed content. False, and nothing happens, when it is open again or a request uses it."""
        with self._lock:
            if digest not in self._loaded:
                return True
            if digest not in self._closing or self._users[digest]:
                return False
            del self._loaded[digest]
            self._adapters.pop(digest, None)
            del self._users[digest]
            self._unfit.pop(digest, None)
            self._closing.discard(digest)
            self._additive.forget(digest)
            self._low_rank.forget(digest)
            return True

    def follow(self, summaries: Iterable[Summary], unfit: Mapping[str, str]) -> None:
        """The weights may have changed: the new summaries, and why which digests are no longer to be admitted."""
        with self._lock:
            self._loaded |= {summary.digest: summary for summary in summaries}
            self._unfit = dict(unfit)
            self._unknown = None
            self._adapters.clear()  # vLLM reads them again after a reload, and their files may be others by then
            self._doomed |= {ticket for ticket, (digests, *_) in self._pins.items() if not digests.isdisjoint(unfit)}

    def spoil(self, reason: str) -> None:
        """Which weights are served is not known: nothing is admitted, loaded before or after, until `follow` comes."""
        with self._lock:
            self._unknown = reason
            self._doomed |= self._pins.keys()

    def doomed(self, plan: Plan) -> bool:
        """Whether `follow` or `spoil` came to a request in flight whose edits no longer fit: it has to end."""
        with self._lock:
            return plan.ticket in self._doomed

    def check_known(self) -> None:
        """Errors: `EngineUnavailable` while it is not known which weights are served: from `spoil` to `follow`."""
        with self._lock:
            self._check_known()

    def _check_known(self) -> None:
        if self._unknown is not None:
            raise EngineUnavailable(self._unknown)

    def _check_fit(self, digest: str) -> None:
        if digest in self._unfit:
            raise ArtifactInvalid(
                f"the intervention {digest[:12]} does not fit the weights served: {self._unfit[digest]}"
            )

    def facts(self) -> dict[str, Any]:
        """Counts for logs and tests."""
        with self._lock:
            return {
                "loaded": sorted(self._loaded),
                "pinned": len(self._pins),
                "additive_rows": self._additive.used,
                "low_rank_rows": self._low_rank.used,
            }
