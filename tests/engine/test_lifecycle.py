"""Pause, resume, a prefix cache that is reset under running requests, aborts and a shutdown: steered requests go on
exactly or end, and nothing of them stays behind.

Invariant: a request gets exactly its intervention or an error; pins and rows are freed with the request, whatever ends
it. One asynchronous engine, as the server has it; every finished answer is checked against transformers.
"""

from __future__ import annotations

from typing import Any

import pytest

from steer_vllm import Intervention
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, oracle

LONG = 60
"""Tokens of a request that is still running when something happens."""


def requests(tokens: int, start: int = 0) -> list[dict[str, Any]]:
    """Prompts of other lengths, head offsets, directions and low-rank edits, and the base model."""
    asks: list[list[dict[str, Any]]] = [
        [{"name": "lofit"}],
        [{"name": "direction"}, {"name": "lofit", "scale": -0.5}],
        [{"name": "reft"}],
        [],
    ]
    return [
        {"tokens": [20 + (7 * j + i + start) % 50 for j in range(30 + i)], "interventions": ask}
        | {"params": {"max_tokens": tokens}}
        for i, ask in enumerate(asks)
    ]


def during(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"do": "during", "requests": requests(LONG), "steps": list(steps)}


FACTS = {"do": "facts"}
SEND = {"do": "send", "requests": requests(5, start=9)}
SCENES: dict[str, dict[str, Any]] = {
    "keep": during({"do": "pause", "mode": "keep", "clear": False}, SEND, FACTS, {"do": "resume"}),
    "keep, cache cleared": during({"do": "pause", "mode": "keep"}, SEND, FACTS, {"do": "resume"}),
    "wait": during({"do": "pause", "mode": "wait"}, SEND, FACTS, {"do": "resume"}),
    "abort": during({"do": "pause", "mode": "abort"}, FACTS, SEND, {"do": "resume"}),
    "prefix cache reset": during({"do": "reset", "running": True}),
    "everybody leaves": during({"do": "cancel"}),
}


@pytest.fixture(scope="module")
def interventions() -> dict[str, Intervention]:
    base = Fingerprint.of(MODEL_PATH)
    return {
        "lofit": artifacts.lofit(base, 1),
        "direction": artifacts.direction(base, 2, "generated"),
        "reft": artifacts.loreft(base, 3, "all"),
    }


@pytest.fixture(scope="module")
def scenes(
    interventions: dict[str, Intervention], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[Any], list[Any], dict[str, Any]]]:
    """What the steps said, what the requests got, and the engine's book after each scene."""
    folder = tmp_path_factory.mktemp("lifecycle")
    steps = artifacts.save_all(interventions, folder / "artifacts")
    played = [step for scene in SCENES.values() for step in (scene, FACTS)]
    answers = engines.run(
        engines.V1_ASYNC, folder / "run", MODEL_PATH, [*steps, *played, during({"do": "shutdown"})], block_size=32
    )
    ended = answers[len(steps) :]
    pairs = zip(SCENES, ended[::2], ended[1::2], strict=False)
    told = {name: (scene["steps"], scene["requests"], facts[0]["admission"]) for name, scene, facts in pairs}
    return told | {"shutdown": (ended[-1]["steps"], ended[-1]["requests"], {})}


def exact(asked: list[dict[str, Any]], got: list[Any], interventions: dict[str, Intervention]) -> None:
    model = oracle.load(str(MODEL_PATH))
    for request, result in zip(asked, got, strict=True):
        oracle.check(model, request, result, interventions)


Scenes = dict[str, tuple[list[Any], list[Any], dict[str, Any]]]


@pytest.mark.parametrize("name", ["keep", "keep, cache cleared", "wait"])
def test_requests_go_on_after_a_pause(name: str, scenes: Scenes, interventions: dict[str, Intervention]) -> None:
    """Those that ran, and those that came meanwhile."""
    (paused, _, facts, resumed), got, _ = scenes[name]
    assert (paused, resumed) == ({"paused": True}, {"paused": False})
    running = 0 if name == "wait" else 3
    assert facts[0]["admission"]["pinned"] == running + 3, "who waits is pinned"
    exact([*requests(LONG), *SEND["requests"]], got, interventions)


def test_a_pause_that_aborts(scenes: Scenes, interventions: dict[str, Intervention]) -> None:
    (_, facts, _, _), got, _ = scenes["abort"]
    assert [result["finish"] for result in got[:4]] == ["abort"] * 4
    assert all(0 < len(result["tokens"]) < LONG for result in got[:4])
    assert facts[0]["admission"]["pinned"] == 0
    exact(SEND["requests"], got[4:], interventions)


def test_a_prefix_cache_that_is_reset_under_running_requests(
    scenes: Scenes, interventions: dict[str, Intervention]
) -> None:
    """vLLM preempts them and computes their tokens again."""
    (reset,), got, _ = scenes["prefix cache reset"]
    assert reset is True
    exact(requests(LONG), got, interventions)


def test_everybody_leaves(scenes: Scenes) -> None:
    _, got, _ = scenes["everybody leaves"]
    assert got == [{"raised": "CancelledError"}] * 4


def test_a_shutdown_ends_requests(scenes: Scenes) -> None:
    """The engine's process ends, and none gets an answer that looks whole: vLLM leaves them waiting, the driver cancels
    what still waits a second later.
    """
    (left,), got, _ = scenes["shutdown"]
    assert left["ended"] > 0
    assert left["alive"] == 0
    assert [list(one) for one in got] == [["raised"]] * 4


@pytest.mark.parametrize("name", SCENES)
def test_nothing_stays_behind(name: str, scenes: Scenes) -> None:
    _, _, book = scenes[name]
    assert (book["pinned"], book["additive_rows"], book["low_rank_rows"]) == (0, 0, 0)
