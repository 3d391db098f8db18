"""A LoRA adapter and interventions on one request: exact, or refused by name.

The oracle is the adapter merged into the transformers model, with `hf.steered` on top.
"""

from __future__ import annotations

from typing import Any

import pytest

from steer_vllm import Intervention
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.methods import LoFiT
from steer_vllm.request import Steering
from steer_vllm.segments import Component

from . import artifacts, engines, loras, oracle

BLOCK = 32
PROMPT = [20 + (7 * i) % 300 for i in range(3 * BLOCK + 5)]
ENGINES = [engines.V1_PROCESSES, engines.V2]


def contents() -> dict[str, Intervention]:
    base = Fingerprint.of(MODEL_PATH)
    heads = artifacts.lofit(base, 1)
    upper = tuple((layer or 1, head) for layer, head in heads.method.heads)
    return {
        "heads": heads,
        "low-heads": Intervention(LoFiT(((0, 1), (0, 2), (0, 5))), heads.tensors, base, heads.positions),
        "upper-heads": Intervention(LoFiT(upper), heads.tensors, base, heads.positions),
        "direction": artifacts.direction(base, 2),
        "reft": artifacts.loreft(base, 3, "f2+l2"),
    }


def adapters(model: Any) -> dict[str, loras.Lora]:
    """One that leaves W_o alone, one that changes it in layer 0."""
    return {
        "inner": loras.random_lora(model, "inner", 1, ("q_proj", "v_proj", "down_proj")),
        "output": loras.random_lora(model, "output", 2, ("layers.0.self_attn.o_proj", "up_proj")),
    }


def mixed() -> list[tuple[str | None, list[dict[str, Any]]]]:
    """(adapter, interventions) of a batch."""
    direction, reft = {"name": "direction"}, {"name": "reft"}
    return [
        (None, []),
        ("inner", []),
        ("output", []),
        (None, [{"name": "low-heads"}]),
        ("inner", [{"name": "low-heads"}]),
        ("inner", [{"name": "heads", "scale": -0.5}]),
        ("inner", [direction]),
        ("inner", [reft]),
        ("inner", [{"name": "low-heads"}, direction, {**reft, "scale": 0.5}]),
        ("output", [direction]),
        ("output", [{"name": "upper-heads"}, reft]),
    ]


def cached() -> list[tuple[str, str | None, list[dict[str, Any]], int]]:
    """Requests on one prompt, one after another, and the tokens that come from the prefix cache."""
    heads, response = [{"name": "low-heads"}], [{"name": "low-heads", "positions": "response"}]
    return [
        ("base", None, [], 0),
        ("adapter", "inner", [], 0),
        ("edit", None, heads, 0),
        ("adapter and edit", "inner", heads, 0),
        ("adapter and edit, again", "inner", heads, 96),
        ("another adapter", "output", [{"name": "direction", "positions": "all"}], 0),
        ("adapter and response: the adapter's blocks", "inner", response, 96),
        ("adapter, again", "inner", [], 96),
    ]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.name)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    engine: engines.Engine = request.param
    folder = tmp_path_factory.mktemp("lora")
    model = oracle.load(str(MODEL_PATH))
    saved = {name: lora.save(folder / "loras" / name) for name, lora in adapters(model).items()}
    interventions = contents()

    def ask(adapter: str | None, asks: list[dict[str, Any]], tokens: list[int], **more: Any) -> dict[str, Any]:
        lora = {"lora": {**saved[adapter], **more}} if adapter else {}
        return {"tokens": tokens, "interventions": asks, "params": {"max_tokens": 8}, **lora}

    def generate(*requests: dict[str, Any]) -> dict[str, Any]:
        return {"do": "generate", "steered": True, "requests": list(requests)}

    batch = [ask(adapter, asks, PROMPT[i : 12 + 3 * i]) for i, (adapter, asks) in enumerate(mixed())]
    steps = {
        "batch": generate(*batch),
        **{title: generate(ask(adapter, asks, PROMPT)) for title, adapter, asks, _ in cached()},
        "refused": generate(*batch, ask("output", [{"name": "low-heads"}], PROMPT)),
        "in place": generate(ask("inner", [{"name": "direction"}], PROMPT, load_inplace=True)),
        "absent": generate(ask("inner", [{"name": "direction"}], PROMPT, lora_int_id=3, lora_path=str(folder / "no"))),
        "after": generate(*batch),
    }
    if engine is engines.V1_PROCESSES:  # what never passed the front
        steering = Steering((Component(interventions["low-heads"].digest, 1.0, interventions["low-heads"].positions),))
        steps["forged"] = {
            "do": "forged",
            "prompts": [PROMPT],
            "extra_args": [steering.to_wire()],
            "lora": saved["output"],
        }
    steps["facts"] = {"do": "facts"}
    job = [*artifacts.save_all(interventions, folder / "artifacts"), *steps.values()]
    answers = engines.run(
        engine,
        folder / "run",
        MODEL_PATH,
        job,
        enable_lora=True,
        max_loras=4,  # vLLM on a CPU takes the last slot for requests without an adapter: it must stay empty
        max_lora_rank=8,
        block_size=BLOCK,
        enable_prefix_caching=True,
    )
    return {**dict(zip(steps, answers[len(interventions) :], strict=True)), "requests": batch}


def check(model: Any, adapter: str | None, asks: list[dict[str, Any]], tokens: list[int], result: Any) -> None:
    merged = adapters(model)[adapter].merged(model) if adapter else model
    oracle.check(merged, {"tokens": tokens, "interventions": asks}, result, contents())


def test_each_gets_its_adapter_and_its_interventions(run: dict[str, Any]) -> None:
    model = oracle.load(str(MODEL_PATH))
    for batch in (run["batch"], run["after"]):
        for (adapter, asks), request, result in zip(mixed(), run["requests"], batch, strict=True):
            check(model, adapter, asks, request["tokens"], result)


def test_cache_keys_hold_both(run: dict[str, Any]) -> None:
    assert {title: run[title][0]["cached"] for title, *_ in cached()} == {title: n for title, _, _, n in cached()}
    model = oracle.load(str(MODEL_PATH))
    for title, adapter, asks, _ in cached():
        check(model, adapter, asks, PROMPT, run[title][0])


def test_head_offsets_through_an_adapted_projection_are_refused(run: dict[str, Any]) -> None:
    refused = run["refused"]
    assert refused["error"] == "unsupported_with_intervention", refused
    assert "'output' changes the attention output projection of layers [0]" in refused["message"]


def test_adapters_that_change_or_are_not_there_are_refused(run: dict[str, Any]) -> None:
    assert run["in place"]["error"] == run["absent"]["error"] == "unsupported_with_intervention"
    assert "loaded in place" in run["in place"]["message"]
    assert "cannot be loaded" in run["absent"]["message"]


def test_the_core_refuses_an_unchecked_pair(run: dict[str, Any]) -> None:
    if "forged" not in run:
        pytest.skip("an engine in the test's process raises instead of answering")
    assert [result["finish"] for result in run["forged"]] == ["error"]


def test_nothing_is_left_behind(run: dict[str, Any]) -> None:
    held = run["facts"]["admission"]
    assert held["pinned"] == held["additive_rows"] == held["low_rank_rows"] == 0
