"""Requests: what is asked for is decided at the front, written on the wire, and read back exactly or refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from core.make import direction, lofit, loreft
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm import Intervention, Positions
from steer_vllm.catalog import Entry
from steer_vllm.config import SteerConfig
from steer_vllm.errors import InvalidIntervention, ModelNotFound, ScaleOutOfRange, TooManyInterventions, Unsupported
from steer_vllm.plan import PartSummary, Summary
from steer_vllm.request import Ask, Steering, bind, check_response_start, parse
from steer_vllm.segments import Component

CONFIG = SteerConfig(per_request=2, max_scale=4.0)


def entry(name: str, item: Intervention) -> Entry:
    summary = Summary(item.digest, (PartSummary(True, 0, 1.0),) * item.method.parts)
    return Entry.of(name, "here", item, summary)


ENTRIES = {
    "honest": entry("honest", lofit(default_scale=1.5)),
    "untied": entry("untied", loreft(positions="f2+l2/untied")),
    "calm": entry("calm", direction()),
    "strong": entry("strong", lofit(default_scale=5.0)),
}


def lookup(name: str) -> Entry:
    if name not in ENTRIES:
        raise ModelNotFound(name)
    return ENTRIES[name]


def decide(value: Any, **more: Any) -> Steering | None:
    return bind(parse(value), lookup, CONFIG, **more)


def test_parse() -> None:
    assert parse([{"name": "a"}, {"name": "b", "scale": 2, "positions": "f1+l1"}]) == (
        Ask("a"),
        Ask("b", 2, Positions.parse("f1+l1")),
    )
    assert parse([{"name": "a", "scale": None, "positions": None}]) == (Ask("a"),)
    assert parse([]) == ()


@pytest.mark.parametrize(
    "value",
    [None, "honest", {"name": "honest"}, 3, [3], ["honest"], [None], [[]], [{}], [{"name": None}], [{"name": 1}],
     [{"name": ["a"]}], [{"scale": 1}], [{"name": "a", "Scale": 1}], [{"name": "a", "strength": 1}],
     [{"name": "a", 1: 2}], [{"name": "a", "positions": "some"}], [{"name": "a", "positions": ["all"]}],
     [{"name": "a", "positions": 0}], [{"name": "a"}, {"name": "b", "x": 1}]],
)  # fmt: skip
def test_parse_refuses(value: object) -> None:
    with pytest.raises(InvalidIntervention) as caught:
        parse(value)
    assert caught.value.param


def test_the_message_says_which() -> None:
    with pytest.raises(InvalidIntervention, match=r"interventions\[1\]: unknown keys \['x'\]"):
        parse([{"name": "a"}, {"name": "b", "x": 1}])


def test_bind_takes_what_the_artifact_says() -> None:
    steering = decide([{"name": "honest"}, {"name": "calm", "scale": -2, "positions": "generated"}])
    assert steering == Steering(
        (
            Component(ENTRIES["honest"].digest, 1.5, Positions("all")),
            Component(ENTRIES["calm"].digest, -2.0, Positions("generated")),
        )
    )


def test_nothing_asked_is_nothing() -> None:
    assert decide([]) is None


def test_too_many() -> None:
    with pytest.raises(TooManyInterventions, match="3 interventions on one request, at most 2"):
        decide([{"name": "honest"}] * 3)


def test_unknown_name() -> None:
    """Invariant: never the base model in silence."""
    with pytest.raises(ModelNotFound):
        decide([{"name": "nobody"}])


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e308, 4.1, -4.1, 10**400])
def test_scale_out_of_range(scale: float) -> None:
    with pytest.raises(ScaleOutOfRange) as caught:
        decide([{"name": "calm"}, {"name": "honest", "scale": scale}])
    assert caught.value.param == "interventions[1].scale"


@pytest.mark.parametrize("scale", ["1", True, [1], {}])
def test_scale_of_another_type(scale: object) -> None:
    with pytest.raises(InvalidIntervention, match="expected a number"):
        decide([{"name": "honest", "scale": scale}])


def test_a_default_scale_obeys_the_limit() -> None:
    with pytest.raises(ScaleOutOfRange):
        decide([{"name": "strong"}])


@pytest.mark.parametrize(
    ("name", "positions"),
    [("untied", "all"), ("untied", "f2+l2"), ("honest", "f1+l1/untied"), ("calm", "f1+l1/untied")],
)
def test_positions_the_artifact_cannot_take(name: str, positions: str) -> None:
    with pytest.raises(InvalidIntervention, match="edits") as caught:
        decide([{"name": name, "positions": positions}])
    assert caught.value.param == "positions"


def test_other_untied_positions_are_fine() -> None:
    steering = decide([{"name": "untied", "positions": "f1+l9/untied"}])
    assert steering is not None
    assert steering.components[0].positions == Positions.parse("f1+l9/untied")


@pytest.mark.parametrize("kind", ["prompt", "generated", "response", "f1+l1"])
def test_scored_text_needs_the_answers_start(kind: str) -> None:
    """Invariant: refused, never guessed, where positions depend on the prompt's end."""
    asked = [{"name": "honest", "positions": kind}]
    with pytest.raises(Unsupported, match="response_start") as caught:
        decide(asked, scored=True)
    assert caught.value.param == "response_start"
    steering = decide(asked, scored=True, response_start=7)
    assert steering is not None
    assert steering.response_start == 7
    assert decide(asked) is not None


def test_scored_text_under_all_is_clear() -> None:
    assert decide([{"name": "honest"}], scored=True) is not None
    assert decide([], scored=True) is None


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", [3], math.nan])
def test_bad_response_start(value: object) -> None:
    with pytest.raises(InvalidIntervention, match="response_start"):
        check_response_start(value)
    with pytest.raises(InvalidIntervention, match="response_start"):
        decide([], response_start=value)


components = st.builds(
    Component,
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    scale=st.floats(-8, 8, width=32),
    positions=st.sampled_from(["all", "prompt", "generated", "response", "f7+l7", "f1+l0/untied"]).map(Positions.parse),
)


@given(st.lists(components, max_size=4), st.none() | st.integers(1, 1 << 20))
def test_wire_round_trip(parts: list[Component], start: int | None) -> None:
    steering = Steering(tuple(parts), start)
    wire = steering.to_wire()
    assert Steering.from_wire(wire) == steering
    assert "\n" not in wire


def wire(*components: Any, start: Any = None, **more: Any) -> str:
    return json.dumps({"components": list(components), "response_start": start, **more})


DIGEST = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        None, 3, b"\xff", "", "{", "[]", "null", "{}", '"x"', '{"components": []}', '{"response_start": null}',
        wire(start=0), wire(start="1"), wire(start=True), wire(3), wire([]), wire([DIGEST, 1.0]),
        wire([DIGEST, 1.0, "all", 1]), wire([DIGEST, "1.0", "all"]), wire([DIGEST, True, "all"]),
        wire([DIGEST, None, "all"]), wire([DIGEST, math.nan, "all"]), wire([DIGEST, math.inf, "all"]),
        wire([DIGEST, 1e308, "all"]), wire([DIGEST, 10**400, "all"]), wire([DIGEST, 1.0, "some"]),
        wire([DIGEST, 1.0, None]), wire([3, 1.0, "all"]), wire([None, 1.0, "all"]), wire(more=1),
        '{"components":3,"response_start":null}', "[" * 100_000, '{"components":' * 50_000,
    ],
    ids=lambda text: str(text)[:60],
)  # fmt: skip
def test_the_wire_refuses_what_the_front_does_not_write(text: object) -> None:
    """Invariant: validated once more where the engine takes the request in; nothing there may raise anything else."""
    with pytest.raises((InvalidIntervention, ScaleOutOfRange)):
        Steering.from_wire(text)


def test_repeating_a_name_does_not_go_beyond_the_scale_limit() -> None:
    config = SteerConfig(max_scale=8.0)
    twice = parse([{"name": "honest", "scale": 5.0}, {"name": "honest", "scale": 5.0}])
    with pytest.raises(ScaleOutOfRange, match="together"):
        bind(twice, lookup, config)
    opposite = parse([{"name": "honest", "scale": 5.0}, {"name": "honest", "scale": -5.0}])
    assert bind(opposite, lookup, config) is not None
