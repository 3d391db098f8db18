"""Decides what happens to a request before vLLM sees it, and holds what it uses until it has ended.

Everything a request needs is decided here once: contents, scales, positions, rows. Knows the engine's limits and no
protocol below JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .. import request
from ..catalog import Entry
from ..config import SteerConfig
from ..errors import ModelNotFound
from ..plan import nominal_contents
from ..request import Ask, Steering
from . import body as bodies
from .departures import Departures
from .gate import Gate, Rows, Ticket
from .keys import Keys
from .registry import Registry
from .settings import Limits


class Adapters(Protocol):
    """The LoRA adapters that are served under names of their own."""

    def __contains__(self, name: object) -> bool: ...

    async def check(self, name: str, digests: Iterable[str]) -> None:
        """Errors: `Unsupported` where adapter and interventions are not exact together, `ModelNotFound`."""


@dataclass(frozen=True)
class Decision:
    """A request that may go on. model: the name its answer carries, None for vLLM's choice.

    adapter: the name of the LoRA adapter it uses beside its interventions.
    stops: it has stop strings, which vLLM looks for outside the engine.
    """

    model: str | None = None
    adapter: str | None = None
    applied: str = ""
    stops: bool = False
    digests: frozenset[str] = frozenset()
    rows: Rows = field(default_factory=Rows)


@dataclass(eq=False)
class Lease:
    """Contents and rows of one request. Released once; the ticket is None for a request without interventions."""

    front: Front
    decision: Decision
    ticket: Ticket | None

    def end(self, answered: bool) -> None:
        """The request has ended: give everything back, as soon as the engine is done with it."""
        if self.ticket is not None and self.ticket.granted.done() and (self.decision.stops or not answered):
            self.front.departures.add(self)
        else:
            self.release()

    def release(self) -> None:
        """Give everything back. Errors: `KeyError` the second time."""
        if self.ticket is not None:
            self.front.gate.release(self.ticket)
        self.front.registry.leave(set(self.decision.digests))


class Front:
    """What the middleware and the routes share; one per server, of which there may be several over the same tables."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        config: SteerConfig,
        largest: float,
        limits: Limits,
        adapters: Adapters | None = None,
        servers: int = 1,
    ) -> None:
        self.registry = registry
        self.keys = keys
        self.limits = limits
        self.gate = Gate(config.share(servers))
        self.departures = Departures(registry.settle, registry.names.in_background)
        self._config = config
        self._largest = largest
        self._adapters = adapters

    @property
    def base_names(self) -> tuple[str, ...]:
        return self.registry.base_names

    async def admit(self, body: dict[str, Any], path: str) -> Lease:
        """Decide on a request and hold what it uses. The lease must be ended whatever happens.

        Errors: those of `decide` and `enter`; `EngineUnavailable` when names have changed and cannot be fetched.
        """
        wanted = bodies.consume(body, path, self.base_names)
        if not wanted.steers:  # the base model waits for nobody's names
            return self.enter(Decision(wanted.model if wanted.base else None))
        await self.registry.refresh()
        return self.enter(self.decide(body, wanted))  # nothing is awaited here, or the contents might be gone

    def decide(self, body: dict[str, Any], wanted: bodies.Wanted) -> Decision:
        """Rewrite the body of a request that asks for something. Errors: every `UserError` that it can earn."""
        asks = (Ask(wanted.alias),) if wanted.alias is not None else wanted.asks or ()
        adapter = wanted.model if wanted.base is None else None
        if adapter is not None and (self._adapters is None or adapter not in self._adapters):
            raise ModelNotFound(
                f"interventions edit the base model {self.base_names[0]!r} or a LoRA adapter of it, not {adapter!r}",
                param="model",
            )
        bodies.check_features(body, self.limits.n)
        entries: dict[str, Entry] = {}

        def lookup(name: str) -> Entry:
            entry = entries[name] = self._entry(name, wanted)
            return entry

        steering = request.bind(asks, lookup, self._config, response_start=wanted.response_start, scored=wanted.scored)
        assert steering is not None  # there are asks
        base = adapter or wanted.base or self.base_names[0]
        bodies.write(body, base, steering.to_wire())
        return Decision(
            model=wanted.model or base,
            adapter=adapter,
            applied=", ".join(
                f"{ask.name}@sha256:{part.digest[:12]}*{_short(part.scale)}"
                for ask, part in zip(asks, steering.components, strict=True)
            ),
            digests=frozenset(part.digest for part in steering.components),
            stops=body.get("stop") not in (None, "", []),
            rows=self._rows(steering, entries),
        )

    def enter(self, decision: Decision) -> Lease:
        """Hold the contents and queue for the rows. The lease must be ended whatever happens.

        Errors: `TooManyInterventions` when the rows could never be had.
        """
        ticket = self.gate.request(decision.rows) if decision.digests else None
        self.registry.enter(set(decision.digests))
        return Lease(self, decision, ticket)

    async def check_adapter(self, decision: Decision) -> None:
        """Errors: those of `Adapters.check`, for a decision that has an adapter."""
        if decision.adapter is not None and self._adapters is not None:
            await self._adapters.check(decision.adapter, decision.digests)

    def _entry(self, name: str, wanted: bodies.Wanted) -> Entry:
        try:
            return self.registry.catalog.get(name)
        except ModelNotFound:
            if wanted.alias is None:
                raise
            raise ModelNotFound(f"no model {wanted.model!r}: no such intervention is loaded", param="model") from None

    def _rows(self, steering: Steering, entries: dict[str, Entry]) -> Rows:
        summaries = {entry.digest: entry.summary for entry in entries.values()}
        additive, low_rank = nominal_contents(steering.components, summaries, self._config, self._largest)
        return Rows(frozenset(additive), frozenset(low_rank))


def _short(scale: float) -> str:
    """The shortest text that gives the same float32: 1.2, not 1.2000000476837158."""
    return str(np.format_float_positional(np.float32(scale), trim="-"))
