"""Positions: which absolute tokens each kind means, for every small prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm.errors import InvalidIntervention
from steer_vllm.positions import OPEN, Positions, Span

PROMPTS = range(1, 12)


def tokens(positions: Positions, prompt_len: int, total: int) -> dict[int, int]:
    """Position -> part, of a request of `total` tokens."""
    found: dict[int, int] = {}
    for span in positions.spans(prompt_len):
        for p in range(span.start, min(span.stop, total)):
            assert p not in found, "spans overlap"
            found[p] = span.part
    return found


@pytest.mark.parametrize("n", PROMPTS)
def test_open_kinds(n: int) -> None:
    assert Positions("all").spans(n) == [Span(0, OPEN, 0)]
    assert Positions("prompt").spans(n) == [Span(0, n, 0)]
    assert Positions("generated").spans(n) == [Span(n, OPEN, 0)]
    assert Positions("response").spans(n) == [Span(n - 1, OPEN, 0)]


@pytest.mark.parametrize("n", PROMPTS)
@pytest.mark.parametrize(("f", "l"), [(1, 1), (7, 7), (0, 3), (3, 0), (2, 5), (100, 100)])
@pytest.mark.parametrize("tied", [True, False])
def test_first_last_is_clamped_to_the_halves(n: int, f: int, l: int, tied: bool) -> None:  # noqa: E741
    """f' = min(f, floor(n/2)), l' = min(l, ceil(n/2)): prefix and suffix never overlap."""
    first = range(min(f, n // 2))
    last = range(n - min(l, -(-n // 2)), n)
    wanted = dict.fromkeys(first, 0) | dict.fromkeys(last, 0 if tied else 1)
    assert tokens(Positions("first_last", f, l, tied), n, n + 5) == wanted


def test_a_one_token_prompt_has_its_last_token() -> None:
    assert Positions.parse("f7+l7").spans(1) == [Span(0, 1, 0)]
    assert Positions.parse("f7+l7/untied").spans(1) == [Span(0, 1, 1)]
    assert Positions.parse("f7+l0").spans(1) == []


@pytest.mark.parametrize("text", ["all", "prompt", "generated", "response", "f7+l7", "f0+l1", "f5+l0/untied"])
def test_text_round_trip(text: str) -> None:
    positions = Positions.parse(text)
    assert str(positions) == text
    assert Positions.parse(str(positions)) == positions
    assert positions.parts == (2 if text.endswith("untied") else 1)


def test_only_all_does_not_need_the_prompts_end() -> None:
    needs = {
        text: Positions.parse(text).needs_prompt_end for text in ("all", "prompt", "generated", "response", "f1+l1")
    }
    assert needs == {"all": False, "prompt": True, "generated": True, "response": True, "f1+l1": True}


@pytest.mark.parametrize(
    "text",
    [
        "", "ALL", "all ", "none", "first_last", "f7", "l7", "f7+l", "f-1+l1", "f1.5+l1", "f7+l7/tied", "f0+l0",
        "f0+l0/untied", "f7+l7\n",
        "all\n", "f\uff17+l7", "f\u0667+l7", "f123456+l1", " f7+l7", "f7 + l7", "f7+l7/untied\n",
    ],
)  # fmt: skip
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidIntervention, match="positions"):
        Positions.parse(text)


@pytest.mark.parametrize("value", [None, 7, 1.5, True, ["all"], {"kind": "all"}, b"all"])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(InvalidIntervention, match="expected text"):
        Positions.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [("all", 1), ("prompt", 0, 2), ("response", 0, 0, False), ("first_last",), ("first_last", -1, 3),
     ("first_last", 100_000, 1), ("first_last", 1, 100_000)],
)  # fmt: skip
def test_contradictions_are_refused(fields: tuple[object, ...]) -> None:
    with pytest.raises(InvalidIntervention):
        Positions(*fields)  # type: ignore[arg-type]


@given(st.integers(0, 99_999), st.integers(0, 99_999), st.booleans())
def test_whatever_can_be_made_can_be_read(f: int, l: int, tied: bool) -> None:  # noqa: E741
    if f + l:
        positions = Positions("first_last", f, l, tied)
        assert Positions.parse(str(positions)) == positions
