"""What a request says about interventions: read, checked, and written down for the engine.

Shared by the HTTP server and the offline `LLM`, so both refuse the same things with the same words. It knows names and
digests, not who may use them, and no protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .catalog import Entry
from .config import MAX_SCALE, SteerConfig
from .errors import InvalidIntervention, TooManyInterventions, Unsupported
from .positions import Positions
from .segments import Component, check_scale

EXTRA_ARG = "steer_vllm"
"""The key of `SamplingParams.extra_args` under which the engine finds a request's interventions. Reserved: a request
that sets it itself is refused at the front."""

_KEYS = {"name", "scale", "positions"}


@dataclass(frozen=True)
class Ask:
    """One entry of a request's `interventions`. None: as the artifact says."""

    name: str
    scale: float | None = None
    positions: Positions | None = None


@dataclass(frozen=True)
class Steering:
    """A request's interventions, decided. response_start: where the answer begins when text is scored, or None."""

    components: tuple[Component, ...]
    response_start: int | None = None

    def to_wire(self) -> str:
        """One line of JSON, the only form in which it leaves the front."""
        rows = [[c.digest, c.scale, str(c.positions)] for c in self.components]
        return json.dumps({"components": rows, "response_start": self.response_start}, separators=(",", ":"))

    def check_limits(self, config: SteerConfig) -> None:
        """Errors: `TooManyInterventions`; `ScaleOutOfRange`, also for one intervention's scales together."""
        _check_count(len(self.components), config)
        totals: dict[str, float] = {}
        for component in self.components:
            check_scale(component.scale, config.max_scale)
            totals[component.digest] = totals.get(component.digest, 0.0) + component.scale
        for total in totals.values():
            check_scale(total, config.max_scale, "interventions: the scales of one intervention together")

    def check_prompt(self, prompt_len: int) -> None:
        """Errors: `InvalidIntervention` when the answer would begin behind a prompt of that many tokens."""
        if self.response_start is not None and self.response_start > prompt_len:
            raise InvalidIntervention(
                f"response_start {self.response_start} is beyond the prompt's {prompt_len} tokens",
                param="response_start",
            )

    @classmethod
    def from_wire(cls, text: object) -> Steering:
        """Read it back in the engine.

        Errors: `InvalidIntervention` or `ScaleOutOfRange` for anything `to_wire` does not write.
        """
        try:
            content = json.loads(text)  # type: ignore[arg-type]
            if set(content) != {"components", "response_start"}:
                raise ValueError("other fields")
            components = tuple(
                Component(_digest(digest), check_scale(scale, MAX_SCALE), Positions.parse(positions))
                for digest, scale, positions in content["components"]
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidIntervention(f"{EXTRA_ARG}: not written by steer-vllm: {error}", param=EXTRA_ARG) from error
        return cls(components, check_response_start(content["response_start"]))


def _digest(value: object) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{value!r} is no digest")


def parse(value: Any, param: str = "interventions") -> tuple[Ask, ...]:
    """Read the `interventions` field: a list of {"name", "scale", "positions"}.

    Errors: `InvalidIntervention` for any other type, key or value. Scales are checked by `bind`.
    """
    if not isinstance(value, (list, tuple)):
        raise InvalidIntervention(f"{param}: expected a list of objects, got {type(value).__name__}", param=param)
    return tuple(_ask(item, f"{param}[{i}]") for i, item in enumerate(value))


def _ask(item: Any, where: str) -> Ask:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise InvalidIntervention(f'{where}: expected an object with a "name"', param=where)
    unknown = sorted(str(key) for key in set(item) - _KEYS)
    if unknown:
        raise InvalidIntervention(f"{where}: unknown keys {unknown}, known are {sorted(_KEYS)}", param=where)
    positions = item.get("positions")
    return Ask(item["name"], item.get("scale"), None if positions is None else Positions.parse(positions))


def check_response_start(value: Any) -> int | None:
    """A token index of at least 1, or None. Errors: `InvalidIntervention`."""
    if value is None or (type(value) is int and value >= 1):
        return value
    raise InvalidIntervention(
        f"response_start: expected a token index from 1 up, got {value!r}", param="response_start"
    )


def bind(
    asks: Sequence[Ask],
    lookup: Callable[[str], Entry],
    config: SteerConfig,
    *,
    response_start: int | None = None,
    scored: bool = False,
) -> Steering | None:
    """Decide everything the request left open; None when it asks for nothing.

    scored: the prompt's log-probabilities are asked for (echo, prompt_logprobs), so the answer is part of the prompt.
    Errors: what `lookup` raises for an unknown name; `ScaleOutOfRange`; `TooManyInterventions`; `InvalidIntervention`
    for positions that the artifact cannot take; `Unsupported` for scored text whose answer's start is not given.
    """
    check_response_start(response_start)
    _check_count(len(asks), config)  # before names are looked up
    components = tuple(_component(ask, lookup(ask.name), config, f"interventions[{i}]") for i, ask in enumerate(asks))
    steering = Steering(components, response_start)
    steering.check_limits(config)
    if scored and response_start is None:
        unclear = [ask.name for ask, part in zip(asks, components, strict=True) if part.positions.needs_prompt_end]
        if unclear:
            raise Unsupported(
                f"{', '.join(unclear)}: the positions depend on where the answer starts, and scored text (echo, "
                "prompt_logprobs) does not tell: give response_start, the token index of the answer",
                param="response_start",
            )
    return steering if components else None


def _check_count(count: int, config: SteerConfig) -> None:
    if count > config.per_request:
        raise TooManyInterventions(
            f"{count} interventions on one request, at most {config.per_request} are served", param="interventions"
        )


def _component(ask: Ask, entry: Entry, config: SteerConfig, where: str) -> Component:
    positions = entry.positions if ask.positions is None else ask.positions
    if positions.parts != len(entry.summary.parts):
        raise InvalidIntervention(
            f"{where}: {ask.name} has {len(entry.summary.parts)} edits (trained at {entry.positions}), "
            f"positions {positions} need {positions.parts}",
            param="positions",
        )
    scale = entry.default_scale if ask.scale is None else ask.scale
    return Component(entry.digest, check_scale(scale, config.max_scale, f"{where}.scale"), positions)
