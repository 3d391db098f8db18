"""Unload, replace and abort race with requests that wait, run, are preempted or end: each answer is its own content's.

One engine with too little room for keys and values, so that requests are preempted. Afterwards nothing is held.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from steer_vllm import Intervention
from steer_vllm.config import SPARE_ROWS
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, oracle

ROWS = 2
TIGHT = {"block_size": 32, "num_gpu_blocks_override": 8, "max_num_seqs": 5, "enable_prefix_caching": True}
CHURN = 6
LEFT = {"raised": "CancelledError"}
"""What is told to one who went away."""
STAYS = 9
"""The one of those who stay that uses other content than those who leave."""


def contents() -> dict[str, Intervention]:
    base = Fingerprint.of(MODEL_PATH)
    return {
        "offsets": artifacts.lofit(base, 0),
        "low": artifacts.loreft(base, 40, "all"),
        "low, replaced": artifacts.loreft(base, 41, "all"),
        "way": artifacts.direction(base, 20, "all", strength=0.8),
        "other way": artifacts.direction(base, 21, "all", strength=0.8),
        **{f"churn {n}": artifacts.lofit(base, 60 + n) for n in range(CHURN)},
    }


def request(seed: int, *names: str, tokens: int = 8, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    asks = [{"name": name, "scale": scale if at else 1.0} for at, name in enumerate(names)]
    prompt = [20 + (seed * 7 + at * at) % 60 for at in range(40)]
    return {"tokens": prompt, "interventions": asks, "params": {"max_tokens": tokens}, **more}


def many_rows(first: int, **more: Any) -> list[dict[str, Any]]:
    """As many as the tables have rows, spare ones included: each composition has a row of its own."""
    return [
        request(first + n, "way", "other way", scale=0.1 * (first + n), **more) for n in range(1, ROWS + SPARE_ROWS + 1)
    ]


def steps(folder: Path) -> dict[str, dict[str, Any]]:
    def load(name: str, content: str, do: str = "load") -> dict[str, Any]:
        contents()[content].save(folder / content)
        return {"do": do, "name": name, "folder": str(folder / content)}

    long = [request(n, name, tokens=70) for n, name in enumerate(("offsets", "low", "way") * 2)]
    leaving = [request(20 + n, "way" if n == STAYS else "low", tokens=80) for n in range(10)]
    found = {f"load {name}": load(name, name) for name in ("offsets", "low", "way", "other way")}
    changes = together({"do": "unload", "name": "offsets"}, load("low", "low, replaced", "replace"))
    found["preempted"] = during(long, changes)
    found["preemptions"] = {"do": "preemptions"}
    found["after preempted"] = {"do": "facts"}
    found["replaced"] = {"do": "generate", "requests": [request(1, "low"), request(3, "low")]}
    found["left"] = during(leaving, {"do": "cancel", "every": 2})
    found["after left"] = {"do": "facts"}
    found["rows"] = during(many_rows(40, tokens=100), {"do": "cancel"})
    found["after rows"] = {"do": "facts"}
    found["rows again"] = {"do": "generate", "requests": many_rows(60)}
    for n in range(CHURN):
        found[f"load churn {n}"] = load(f"churn {n}", f"churn {n}")
        ending = [request(n, f"churn {n}", tokens=tokens) for tokens in (1, 2, 3, 4)]
        found[f"churn {n}"] = together(
            {"do": "generate", "requests": ending}, {"do": "unload", "name": f"churn {n}", "start": 0.01 * (n + 1)}
        )
    found["end"] = {"do": "facts"}
    return found


def during(requests: list[dict[str, Any]], *parts: dict[str, Any]) -> dict[str, Any]:
    """As soon as the engine has the requests: there is room for some of them to run."""
    return {"do": "during", "sent": True, "requests": requests, "steps": list(parts)}


def together(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"do": "together", "steps": list(parts)}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return steps(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def answers(job: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lifetimes")
    steer = {"additive_rows": ROWS, "low_rank_rows": 2}
    found = engines.run(engines.V1_ASYNC, folder, MODEL_PATH, list(job.values()), steer=steer, **TIGHT)
    return dict(zip(job, found, strict=True))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return oracle.load(str(MODEL_PATH))


def check(model: PreTrainedModel, step: dict[str, Any], found: Any, **named: str) -> None:
    """named: which content a name stands for, where it is not its own."""
    interventions = contents() | {name: contents()[content] for name, content in named.items()}
    assert isinstance(found, list), found
    for asked, answer in zip(step["requests"], found, strict=True):
        if answer != LEFT:
            oracle.check(model, asked, answer, interventions)


def held(facts: list[dict[str, Any]], *names: str) -> None:
    """Nothing is pinned, and these contents are there, in the book and in the store."""
    (engine,) = facts
    book = engine["admission"]
    assert book["pinned"] == book["additive_rows"] == book["low_rank_rows"] == 0
    wanted = sorted(contents()[name].digest for name in names)
    assert book["loaded"] == engine["ranks"][0]["loaded"] == wanted


def test_preempted_while_unloaded_or_replaced(
    job: dict[str, dict[str, Any]], answers: dict[str, Any], model: PreTrainedModel
) -> None:
    """Invariant: requests in flight finish with the content they started with."""
    assert answers["preemptions"] > 0
    assert answers["preempted"]["steps"] == [[{"freed": True}, {}]]
    generated = answers["preempted"]["requests"]
    assert LEFT not in generated
    check(model, job["preempted"], generated)
    held(answers["after preempted"], "low, replaced", "way", "other way")
    check(model, job["replaced"], answers["replaced"], low="low, replaced")


def test_aborted_while_waiting_or_running(
    job: dict[str, dict[str, Any]], answers: dict[str, Any], model: PreTrainedModel
) -> None:
    """Every other one, when at most five run."""
    found = answers["left"]["requests"]
    assert [answer == LEFT for answer in found] == [True, False] * 5
    check(model, job["left"], found, low="low, replaced")
    held(answers["after left"], "low, replaced", "way", "other way")


def test_all_rows_leave_at_once(
    job: dict[str, dict[str, Any]], answers: dict[str, Any], model: PreTrainedModel
) -> None:
    """Invariant: once the engine has settled, rows of requests that left are free, however many there were."""
    assert answers["rows"]["requests"] == [LEFT] * (ROWS + SPARE_ROWS)
    held(answers["after rows"], "low, replaced", "way", "other way")
    check(model, job["rows again"], answers["rows again"])


def test_unloaded_while_requests_end(
    job: dict[str, dict[str, Any]], answers: dict[str, Any], model: PreTrainedModel
) -> None:
    for n in range(CHURN):
        generated, unloaded = answers[f"churn {n}"]
        assert unloaded == {"freed": True}
        check(model, job[f"churn {n}"]["steps"][0], generated)
    held(answers["end"], "low, replaced", "way", "other way")
