"""What a request's body says about interventions, on every path: read, consumed, or refused.

vLLM ignores body fields it does not know, so what is not consumed here would get the base model's answer in silence.
Knows JSON and vLLM's field names; which names are loaded is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidIntervention, Unsupported, UserError
from ..request import EXTRA_ARG, Ask, check_response_start, parse

STEERABLE = frozenset({"/v1/chat/completions", "/v1/completions"})
"""The paths on which a request may ask for interventions."""

_ANY_BASE = "base:"
_FIELDS = ("interventions", "response_start")
_FORM_FIELDS = (*_FIELDS, "vllm_xargs")
"""Refused in a form whatever they hold: vLLM reads `vllm_xargs` there as JSON text of its own."""

_OFF: tuple[object, ...] = (None, False)
"""What leaves a flag off. Anything else counts as on, since vLLM reads some text and numbers as true."""


@dataclass(frozen=True)
class Wanted:
    """What a steerable request asks for. model: as the request has it, base: the served name behind it, if any.

    asks: None when it says nothing; an empty tuple asks for the base explicitly. alias: the name behind the colon.
    """

    model: str | None
    base: str | None
    alias: str | None
    asks: tuple[Ask, ...] | None
    response_start: int | None
    scored: bool

    @property
    def steers(self) -> bool:
        """Whether it asks for any intervention."""
        return self.alias is not None or bool(self.asks)


def read(content: bytes) -> dict[str, Any]:
    """A JSON object. Errors: `UserError` (400)."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request body is not JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise UserError(f"the request body must be a JSON object, got {type(body).__name__}")
    return body


def split_alias(model: object, base_names: Sequence[str]) -> tuple[str, str] | None:
    """(base, name) of `base:name`, where base is a served name, or the word `base` for the first of them.

    None for anything else, so also for a served name that has a colon itself.
    """
    if not isinstance(model, str) or model in base_names:
        return None
    for base in sorted(base_names, key=len, reverse=True):
        if model.startswith(f"{base}:"):
            return base, model[len(base) + 1 :]
    return (base_names[0], model[len(_ANY_BASE) :]) if model.startswith(_ANY_BASE) else None


def consume(body: dict[str, Any], path: str, base_names: Sequence[str]) -> Wanted:
    """Take our fields out of the body of a steerable request.

    Errors: `InvalidIntervention` for malformed or contradicting fields and for forged engine arguments.
    """
    refuse_forged(body)
    given = body.pop("interventions", None)
    asks = None if given is None else parse(given)
    response_start = check_response_start(body.pop("response_start", None))
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise UserError(f"model: expected text, got {type(model).__name__}", param="model")
    split = split_alias(model, base_names)
    if split and asks is not None:
        raise InvalidIntervention(
            f"model {model!r} names an intervention and so does the field `interventions`: give one of them",
            param="interventions",
        )
    base, alias = split or (model if model in base_names else None, None)
    scored = body.get("prompt_logprobs") is not None or (path == "/v1/completions" and body.get("echo") not in _OFF)
    return Wanted(model, base, alias, asks, response_start, scored)


def check_features(body: dict[str, Any], limit: int) -> None:
    """What cannot be had with an intervention. Errors: `Unsupported`, `InvalidIntervention`."""
    if body.get("use_beam_search") not in _OFF:
        raise Unsupported("use_beam_search: beam search drops interventions", param="use_beam_search")
    n = body.get("n")
    if n is not None and (type(n) is not int or not 1 <= n <= limit):
        raise Unsupported(f"n: expected 1 to {limit} answers with an intervention, got {n!r}", param="n")


def write(body: dict[str, Any], base: str, wire: str) -> None:
    """Put decided interventions where the engine finds them. Errors: `InvalidIntervention` for odd `vllm_xargs`."""
    others = body.get("vllm_xargs")
    if others is not None and not isinstance(others, dict):
        raise InvalidIntervention(f"vllm_xargs: expected an object, got {type(others).__name__}", param="vllm_xargs")
    body["vllm_xargs"] = {**(others or {}), EXTRA_ARG: wire}
    body["model"] = base


def refuse_forged(value: Any) -> None:
    """Errors: `InvalidIntervention` when any key anywhere is one that only the server writes."""
    for key in _keys(value):
        if key.startswith(EXTRA_ARG):
            raise InvalidIntervention(f"{key}: reserved for the server, ask with `interventions`", param=key[:100])


def refuse_form(fields: Mapping[str, Any], path: str, base_names: Sequence[str]) -> None:
    """For forms, which cannot ask for interventions. Errors: `Unsupported`, `InvalidIntervention` when one does."""
    refuse_forged(dict(fields))
    for field in _FORM_FIELDS:
        if field in fields:
            raise _unsupported(path, field)
    if split_alias(fields.get("model"), base_names):
        raise _unsupported(path, "model")


def refuse_steering(content: bytes, path: str, base_names: Sequence[str]) -> None:
    """For paths that cannot honour interventions. Errors: `Unsupported`, `InvalidIntervention` when the body asks."""
    try:
        body = json.loads(content)
    except RecursionError as error:
        raise UserError("the request body is nested too deeply") from error
    except ValueError:  # a form, or nothing that vLLM could read either
        return
    refuse_forged(body)
    for item in body if isinstance(body, list) else [body]:
        if not isinstance(item, dict):
            continue
        for field in _FIELDS:
            if item.get(field) not in (None, []):  # [] is the base, which is what every other path serves
                raise _unsupported(path, field)
        if split_alias(item.get("model"), base_names):
            raise _unsupported(path, "model")


def _unsupported(path: str, param: str) -> Unsupported:
    return Unsupported(f"{path} cannot serve interventions; these can: {', '.join(sorted(STEERABLE))}", param=param)


def _keys(value: Any) -> Iterator[str]:
    """Every key of every object inside, without recursion."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
