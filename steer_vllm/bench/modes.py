"""The modes that are compared: which engine, and what each request of the batch asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InvalidIntervention

PLAIN = "plain"
CONTROL = "control"
STEERED = "steered"


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    engine: which one runs it. kinds: what a request composes. distinct: every request has artifacts of its own.
    """

    name: str
    title: str
    engine: str = STEERED
    kinds: tuple[str, ...] = ()
    distinct: bool = False

    def artifacts(self, batch: int) -> list[tuple[str, int]]:
        """(kind, number) of everything it needs."""
        return [(kind, number) for number in range(batch if self.distinct else 1) for kind in self.kinds]

    def asked(self, batch: int) -> list[list[dict[str, Any]]] | None:
        """The interventions of each request; None where the engine's `generate` is called as a user of vLLM would."""
        if not self.kinds:
            return None
        return [[{"name": f"{kind}-{i if self.distinct else 0}"} for kind in self.kinds] for i in range(batch)]


_ALL = (
    Mode("plain", "plain vLLM, the plugin kept out", PLAIN),
    Mode("control", "plain vLLM in a second process: what two processes differ by without a cause", CONTROL),
    Mode("idle", "plugin on, nothing asked for"),
    Mode(
        "shared-offsets",
        "one LoFiT (10% of heads) with a direction on every layer, for all",
        kinds=("lofit", "direction"),
    ),
    Mode(
        "distinct-offsets",
        "another one for every request: head offsets and a direction on every layer",
        kinds=("head-per-layer", "direction"),
        distinct=True,
    ),
    Mode(
        "distinct-loreft", "another LoReFT r=8 for every request, every layer, f7+l7", kinds=("loreft",), distinct=True
    ),
    Mode(
        "distinct-low-rank",
        "another low-rank r=8 edit for every request, every layer, all positions",
        kinds=("low-rank",),
        distinct=True,
    ),
)
MODES = {mode.name: mode for mode in _ALL}


def choose(names: str | None, quick: bool) -> tuple[Mode, ...]:
    """The modes of a run, plain always among them. names: separated by commas; None: all, less the control when quick.

    Errors: `InvalidIntervention` for an unknown mode.
    """
    if names is None:
        return tuple(mode for mode in _ALL if not (quick and mode.engine == CONTROL))
    asked = {name.strip() for name in names.split(",")}
    unknown = sorted(asked - set(MODES))
    if unknown:
        raise InvalidIntervention(f"--modes: {', '.join(unknown)}: expected some of {', '.join(MODES)}")
    return tuple(mode for mode in _ALL if mode.name in asked | {PLAIN})
