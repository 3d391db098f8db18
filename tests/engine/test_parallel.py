"""Several ranks and several engines: exact answers, and content that is on all of them or on none.

One engine per mode. Each serves a mixed batch twice (the second time from the prefix cache), goes through faults while
requests run, and every answer is checked against the oracle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer_vllm import Intervention
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, oracle

BLOCK = 32
NOTICED_WITHIN = 120
"""Seconds: without a look at the processes, vLLM would wait 300 for a reply."""
CACHED = {"block_size": BLOCK, "enable_prefix_caching": True, "max_num_seqs": 16}


def made() -> dict[str, Intervention]:
    """One of every kind; heads of the LoFiT artifacts lie in every layer and on both halves."""
    base = Fingerprint.of(MODEL_PATH)
    return {
        **{f"lofit-{seed}": artifacts.lofit(base, seed) for seed in range(3)},
        "direction-all": artifacts.direction(base, 20, "all"),
        "direction-response": artifacts.direction(base, 23),
        "loreft-tied": artifacts.loreft(base, 40, "f2+l2"),
        "loreft-untied": artifacts.loreft(base, 42, "f3+l2/untied"),
        "late": artifacts.lofit(base, 90),
        "later": artifacts.loreft(base, 91, "all"),
    }


def batch(ranks: tuple[int | None, ...] = (None,)) -> list[dict[str, Any]]:
    """The base and every intervention, alone and composed, with prompts longer and shorter than a block."""
    asks: list[list[dict[str, Any]]] = [
        [],
        [{"name": "lofit-0"}],
        [{"name": "lofit-1", "scale": -0.5}],
        [{"name": "direction-all"}],
        [{"name": "direction-response", "scale": 1.5}],
        [{"name": "loreft-tied"}],
        [{"name": "loreft-untied"}],
        [{"name": "lofit-2"}, {"name": "loreft-tied"}, {"name": "direction-response"}],
    ]
    return [
        {
            "tokens": [20 + (11 * i + 7 * at) % 60 for i in range(5 if at % 3 == 2 else 40)],
            "interventions": ask,
            "params": {"max_tokens": 8},
            "rank": rank,
        }
        for rank in ranks
        for at, ask in enumerate(asks)
    ]


def one(name: str, rank: int | None = None, tokens: int = 8) -> dict[str, Any]:
    """A request whose prompt no other has."""
    prompt = [20 + (len(name) * 5 + 3 * i * i) % 60 for i in range(12)]
    return {"tokens": prompt, "interventions": [{"name": name}], "params": {"max_tokens": tokens}, "rank": rank}


def during(requests: list[dict[str, Any]], *steps: dict[str, Any]) -> dict[str, Any]:
    """Steps that begin when every request has its second token."""
    return {"do": "during", "requests": requests, "steps": list(steps)}


def together(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"do": "together", "steps": list(steps)}


class Job:
    """Steps with titles, and the folders of artifacts that go wrong on the way in."""

    def __init__(self, folder: Path, interventions: dict[str, Intervention]) -> None:
        self.folder = folder
        self.interventions = interventions
        self.steps: list[dict[str, Any]] = []
        self.titles: list[str] = []

    def add(self, title: str, step: dict[str, Any]) -> None:
        self.titles.append(title)
        self.steps.append(step)

    def load(self, name: str, fault: str = "fine") -> dict[str, Any]:
        folder = self.folder / name / fault
        if not folder.exists():
            self.interventions[name].save(folder)
        return {"do": "load", "name": name, "folder": str(folder)}

    def run(self, engine: engines.Engine, **llm: Any) -> dict[str, Any]:
        answers = engines.run(engine, self.folder / "run", MODEL_PATH, self.steps, **llm)
        return dict(zip(self.titles, answers, strict=True))


def told(found: dict[str, Any], title: str) -> Any:
    """What the one step said that ran while requests did."""
    (answer,) = found[title]["steps"]
    return answer


def check_batches(job: Job, found: dict[str, Any]) -> None:
    """Every request of every step, also while others ran beside it."""
    model = oracle.load(str(MODEL_PATH))
    for title, step in zip(job.titles, job.steps, strict=True):
        if "requests" not in step:
            continue
        answers = found[title] if step["do"] == "generate" else found[title]["requests"]
        for request, result in zip(step["requests"], answers, strict=True):
            assert "tokens" in result, (title, result)
            oracle.check(model, request, result, job.interventions)


def check_cache(found: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Nothing is shared at first, as no two prompts begin alike; all whole blocks the second time."""
    assert [answer["cached"] for answer in found["first"]] == [0] * len(requests)
    again = [answer["cached"] for answer in found["again"]]
    assert again == [BLOCK if len(request["tokens"]) > BLOCK else 0 for request in requests]


def check_facts(found: dict[str, Any], title: str, names: set[str], job: Job, *, engines: int, ranks: int) -> None:
    """The same content everywhere, nothing on its way, nothing held."""
    wanted = sorted(job.interventions[name].digest for name in names)
    assert len(found[title]) == engines
    for engine in found[title]:
        held = engine["admission"]
        assert held["loaded"] == wanted
        assert held["pinned"] == held["additive_rows"] == held["low_rank_rows"] == 0
        assert [rank["loaded"] for rank in engine["ranks"]] == [wanted] * ranks
        assert not any(rank["pending"] for rank in engine["ranks"])


FIRST = {name for name in made() if not name.startswith("late")}


def test_tensor_parallel(tmp_path: Path) -> None:
    """Each rank its own heads. A rank that cannot read or commit rolls the other back; replies stay in step."""
    job = Job(tmp_path, made())
    for name in sorted(FIRST):
        job.add(f"load {name}", job.load(name))
    requests = batch()
    job.add("first", {"do": "generate", "requests": requests})
    job.add("again", {"do": "generate", "requests": requests})
    running = [one(name, tokens=40) for name in ("lofit-0", "loreft-tied", "lofit-2")]
    for fault in ("fail-read@VllmWorker-1", "fail-read@VllmWorker-0", "fail-commit@VllmWorker-1"):
        job.add(fault, during(running, job.load("late", fault)))
    job.add("cancelled", during(running, {**job.load("late", "slow@*"), "do": "cancelled_load", "after": 0.3}))
    job.add("before", {"do": "facts"})
    job.add("late", during(running, together(job.load("late"), job.load("later", "slow@VllmWorker-1"))))
    job.add("unload", during(running, {"do": "unload", "name": "lofit-0"}))
    job.add("after", {"do": "generate", "requests": [one("late"), one("later"), one("lofit-1")]})
    job.add("facts", {"do": "facts"})
    job.add("died", job.load("lofit-0", "die@VllmWorker-1"))
    found = job.run(engines.TENSOR_PARALLEL, **CACHED)

    assert told(found, "fail-read@VllmWorker-1")["error"] == "artifact_invalid"
    assert told(found, "fail-read@VllmWorker-0")["error"] == "artifact_invalid"
    assert told(found, "fail-commit@VllmWorker-1")["error"] == "engine_unavailable"
    assert "on purpose" in told(found, "fail-commit@VllmWorker-1")["message"]
    assert told(found, "cancelled") == {"ended": "CancelledError"}
    check_facts(found, "before", FIRST, job, engines=1, ranks=2)
    assert told(found, "unload") == {"freed": True}
    check_facts(found, "facts", {*job.interventions} - {"lofit-0"}, job, engines=1, ranks=2)
    check_batches(job, found)
    check_cache(found, requests)
    assert found["died"]["error"] == "engine_unavailable", found["died"]
    assert found["died"]["seconds"] < NOTICED_WITHIN


def test_data_parallel(tmp_path: Path) -> None:
    """Each engine has its own book and store. What one cannot have, none has; what one uses, none frees."""
    job = Job(tmp_path, made())
    for name in sorted(FIRST):
        job.add(f"load {name}", job.load(name))
    requests = batch((0, 1))
    job.add("first", {"do": "generate", "requests": requests})
    job.add("again", {"do": "generate", "requests": requests})
    running = [one("lofit-0", 1, tokens=60), one("loreft-tied", 1, tokens=40)]
    for fault in ("fail-read@EngineCore_DP1", "fail-commit@EngineCore_DP1", "fail-commit@EngineCore_DP0"):
        job.add(fault, during(running, job.load("late", fault)))
    job.add("cancelled", {**job.load("late", "slow@EngineCore_DP1"), "do": "cancelled_load", "after": 0.3})
    job.add("before", {"do": "facts"})
    job.add("late", during(running, job.load("late", "slow@EngineCore_DP0")))
    user = one("lofit-0", 1, tokens=160)  # too many to end before it is asked for
    job.add("used elsewhere", during([user], {"do": "unload", "name": "lofit-0", "wait": False}))
    job.add("both", {"do": "generate", "requests": [one("late", 0), one("late", 1)]})
    job.add("back", job.load("lofit-0"))
    job.add("both again", {"do": "generate", "requests": [one("lofit-0", 0), one("lofit-0", 1)]})
    job.add("unload", {"do": "unload", "name": "late"})
    job.add("facts", {"do": "facts"})
    job.add("died", together(job.load("late", "slow@*"), {"do": "kill", "engine": 1, "start": 0.4}))
    found = job.run(engines.DATA_PARALLEL, **CACHED)

    assert told(found, "fail-read@EngineCore_DP1")["error"] == "artifact_invalid"
    assert "engine 1 of 2" in told(found, "fail-read@EngineCore_DP1")["message"]
    for fault in ("fail-commit@EngineCore_DP1", "fail-commit@EngineCore_DP0"):
        assert told(found, fault)["error"] == "engine_unavailable"
    assert found["cancelled"] == {"ended": "CancelledError"}
    check_facts(found, "before", FIRST, job, engines=2, ranks=1)
    assert told(found, "used elsewhere") == {"freed": False}
    assert found["unload"] == {"freed": True}
    check_facts(found, "facts", FIRST, job, engines=2, ranks=1)
    check_batches(job, found)
    check_cache(found, requests)
    assert found["died"][0]["error"] == "engine_unavailable", found["died"]
    assert found["died"][0]["seconds"] < NOTICED_WITHIN


def test_pipeline_parallel(tmp_path: Path) -> None:
    """Each rank its own layers."""
    job = Job(tmp_path, made())
    for name in sorted(FIRST):
        job.add(f"load {name}", job.load(name))
    requests = batch()
    job.add("first", {"do": "generate", "requests": requests})
    job.add("again", {"do": "generate", "requests": requests})
    running = [one("lofit-0", tokens=24), one("loreft-tied", tokens=16)]
    job.add("late", during(running, job.load("late")))
    job.add("unload", during(running, {"do": "unload", "name": "lofit-0"}))
    job.add("after", {"do": "generate", "requests": [one("late"), one("lofit-1")]})
    job.add("facts", {"do": "facts"})
    found = job.run(engines.PIPELINE_PARALLEL, **CACHED)
    check_batches(job, found)
    check_cache(found, requests)
    assert told(found, "unload") == {"freed": True}
    assert [rank["runner"] for rank in found["facts"][0]["ranks"]] == ["v2", "v2"]
    check_facts(found, "facts", {*FIRST, "late"} - {"lofit-0"}, job, engines=1, ranks=2)


def test_heads_are_on_both_halves_and_in_every_stage() -> None:
    """So that a rank that took all heads, or another's, or layers of another stage, would be seen."""
    base = Fingerprint.of(MODEL_PATH)
    heads = [head for seed in range(3) for head in artifacts.lofit(base, seed).method.heads]  # type: ignore[attr-defined]
    assert {head < base.num_heads // 2 for _, head in heads} == {True, False}
    assert {layer < base.num_layers // 2 for layer, _ in heads} == {True, False}
