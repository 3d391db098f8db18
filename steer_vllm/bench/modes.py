"""The modes that are compared: which engine, and what each request of the batch asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import BenchmarkInvalid
from .workload import Load

PLAIN = "plain"
CONTROL = "control"
STEERED = "steered"
ADDITIVE = "additive"
LORA = "lora"
EAGER = "eager"
ENGINES = (PLAIN, STEERED, ADDITIVE, LORA, EAGER, CONTROL)


@dataclass(frozen=True)
class Mode:
    """A row of the table.

    engine: which one runs it. kinds: what a request composes. positions: where, if not as the artifacts say. adapters:
    a request has a LoRA. distinct: requests differ in what they have.
    """

    name: str
    title: str
    engine: str = STEERED
    kinds: tuple[str, ...] = ()
    positions: str | None = None
    adapters: bool = False
    distinct: bool = False

    def counts(self, load: Load, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        """How many distinct interventions (adapters) the batch may have, one case each; None asked: one per request."""
        if not self.distinct:
            return (1,) if self.kinds else (0,)
        return tuple(sorted({min(count, load.requests) for count in asked or (load.requests,)}))


@dataclass(frozen=True)
class Case:
    """A mode under a load. distinct: interventions or adapters, dealt to the requests in turn."""

    load: Load
    mode: Mode
    distinct: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Names it in samples and results."""
        return self.load.name, self.mode.name, self.distinct

    def artifacts(self) -> list[tuple[str, int]]:
        """(kind, number) of everything it needs."""
        return [(kind, number) for number in range(self.distinct) for kind in self.mode.kinds]

    def interventions(self) -> list[list[dict[str, Any]]] | None:
        """Of each request; None where the engine's `generate` is called as a user of vLLM would."""
        if not self.mode.kinds:
            return None
        where = {} if self.mode.positions is None else {"positions": self.mode.positions}
        return [
            [{"name": f"{kind}-{request % self.distinct}", **where} for kind in self.mode.kinds]
            for request in range(self.load.requests)
        ]

    def adapters(self) -> list[int] | None:
        """The number of each request's LoRA adapter; None without."""
        return [request % self.distinct for request in range(self.load.requests)] if self.mode.adapters else None


_ALL = (
    Mode("plain", "plain vLLM, the plugin kept out", PLAIN),
    Mode("control", "plain vLLM in a second process: what two processes differ by without a cause", CONTROL),
    Mode("idle", "plugin on, nothing asked for"),
    Mode("idle-additive", "plugin on without low-rank rows, nothing asked for", ADDITIVE),
    Mode(
        "shared-offsets",
        "one LoFiT (10% of heads) with a direction on every layer, for all",
        kinds=("lofit", "direction"),
    ),
    Mode(
        "distinct-offsets",
        "distinct head offsets and directions on every layer",
        kinds=("head-per-layer", "direction"),
        distinct=True,
    ),
    Mode("distinct-loreft", "distinct LoReFT r=8, every layer, f7+l7", kinds=("loreft",), distinct=True),
    Mode(
        "distinct-low-rank",
        "distinct low-rank r=8 edits, every layer, all positions",
        kinds=("loreft",),
        positions="all",
        distinct=True,
    ),
    Mode("lora", "vLLM's own LoRA r=8, distinct adapters of all projections", LORA, adapters=True, distinct=True),
    Mode("eager", "plain vLLM without compiled graphs", EAGER),
)
MODES = {mode.name: mode for mode in _ALL}

_LEFT_OUT = {False: (LORA, EAGER), True: (LORA, EAGER, CONTROL, ADDITIVE)}
"""Engines whose modes have to be asked for, in a whole and in a quick run."""


def choose(names: str | None, quick: bool) -> tuple[Mode, ...]:
    """The modes of a run, plain always among them. names: separated by commas; None: those that are the plugin's.

    Errors: `BenchmarkInvalid` for an unknown mode.
    """
    if names is None:
        return tuple(mode for mode in _ALL if mode.engine not in _LEFT_OUT[quick])
    asked = {name.strip() for name in names.split(",")}
    unknown = sorted(asked - set(MODES))
    if unknown:
        raise BenchmarkInvalid(f"--modes: {', '.join(unknown)}: expected some of {', '.join(MODES)}")
    return tuple(mode for mode in _ALL if mode.name in asked | {PLAIN})


def cases(modes: tuple[Mode, ...], loads: tuple[Load, ...], counts: tuple[int, ...] | None) -> tuple[Case, ...]:
    """Every mode under every load. counts: of distinct interventions, as `Mode.counts` takes them."""
    return tuple(Case(load, mode, count) for load in loads for mode in modes for count in mode.counts(load, counts))
