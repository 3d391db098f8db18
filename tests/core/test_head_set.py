"""Head sets: rankings follow from scores, and files that say otherwise are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from core.make import BASE
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm.errors import ArtifactInvalid
from steer_vllm.head_set import FILE, HeadSet

SCORES = ((0.1, 0.9, 0.3, 0.3), (0.0, -1.0, 0.9, 0.2), (0.5, 0.5, 0.5, 0.6))


def head_set(scores: Any = SCORES) -> HeadSet:
    return HeadSet(BASE, "a task", "lofit", scores)


def test_ranking() -> None:
    """Best first, equal scores in model order."""
    assert head_set().ranking[:6] == [(0, 1), (1, 2), (2, 3), (2, 0), (2, 1), (2, 2)]
    assert head_set().ranking[-1] == (1, 1)


def test_top_is_in_model_order() -> None:
    """As LoFiT's config needs its heads."""
    assert head_set().top(3) == ((0, 1), (1, 2), (2, 3))
    assert head_set().top(4) == ((0, 1), (1, 2), (2, 0), (2, 3))
    assert len(head_set().top(12)) == 12


@pytest.mark.parametrize("count", [0, -1, 13])
def test_top_of_what_is_not_there(count: int) -> None:
    with pytest.raises(ValueError, match="12 heads"):
        head_set().top(count)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=3, max_size=3), st.integers(1, 12))
def test_top_are_the_best(scores: list[list[float]], count: int) -> None:
    found = head_set(tuple(map(tuple, scores)))
    top = found.top(count)
    rest = [scores[layer][head] for layer, head in found.ranking if (layer, head) not in top]
    assert min(scores[layer][head] for layer, head in top) >= max(rest, default=-9)


def test_overlap() -> None:
    one = head_set()
    two = head_set(tuple(tuple(-s for s in row) for row in SCORES))
    assert one.overlap(one, 5) == 1.0
    assert one.overlap(two, 12) == 1.0
    assert one.overlap(two, 1) == 0.0
    other = HeadSet(dataclasses.replace(BASE, weights="cd" * 32), "t", "m", SCORES)
    with pytest.raises(ArtifactInvalid, match="different base models: weights"):
        one.overlap(other, 3)


def test_random_is_a_control() -> None:
    assert HeadSet.random(BASE, 1) == HeadSet.random(BASE, 1)
    assert HeadSet.random(BASE, 1).scores != HeadSet.random(BASE, 2).scores


@pytest.mark.parametrize("where", ["folder", "file"])
def test_round_trip(where: str, tmp_path: Path) -> None:
    head_set().save(tmp_path / "made")
    back = HeadSet.load(tmp_path / "made" / ("" if where == "folder" else FILE))
    assert back == head_set()


@pytest.mark.parametrize(
    "scores",
    [(), SCORES[:2], (*SCORES, SCORES[0]), (SCORES[0], SCORES[1], SCORES[2][:3]), ((), (), ()),
     (SCORES[0], SCORES[1], (0.0, 1.0, float("nan"), 2.0)), (SCORES[0], SCORES[1], (0.0, 1.0, float("inf"), 2.0))],
)  # fmt: skip
def test_bad_scores(scores: Any) -> None:
    with pytest.raises(ArtifactInvalid, match="head set"):
        head_set(scores)


def swapped(ranking: list[list[int]]) -> list[list[int]]:
    return [ranking[1], ranking[0], *ranking[2:]]


@pytest.mark.parametrize(
    "change",
    [
        {"ranking": []}, {"ranking": None}, {"ranking": swapped([list(h) for h in head_set().ranking])},
        {"ranking": [list(h) for h in head_set().ranking[:-1]]}, {"scores": None}, {"scores": 3}, {"scores": [1, 2, 3]},
        {"scores": "abc"}, {"scores": [["a"] * 4] * 3}, {"scores": [[None] * 4] * 3}, {"scores": [[[1]] * 4] * 3},
        {"scores": [[10**400] * 4] * 3}, {"scores": [list(SCORES[0])] * 3}, {"fingerprint": {}},
        {"fingerprint": {**BASE.to_config(), "num_heads": 5}}, {"format_version": 2}, {"format_version": "1"},
        {"more": 1},
    ],
    ids=lambda change: json.dumps(change)[:50],
)  # fmt: skip
def test_tampered(change: dict[str, Any], tmp_path: Path) -> None:
    head_set().save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, **change}))
    with pytest.raises(ArtifactInvalid):
        HeadSet.load(tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match="No such file"):
        HeadSet.load(tmp_path)
    with pytest.raises(ArtifactInvalid, match="No such file"):
        HeadSet.load(tmp_path / "nowhere.json")
