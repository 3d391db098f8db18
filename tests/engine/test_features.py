"""Sampling features, scored prompts and cancellation beside interventions, all in one batch, on both runners.

Whatever a feature does to the choice of tokens, the model's own log-probabilities of those tokens must be the oracle's.
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steer_vllm import Intervention
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, letters, oracle

ENGINES = [engines.V1_PROCESSES, engines.V2_PROCESSES]
STRUCTURED = ("json", "regex", "choice")
NOT_INTERPRETED = ("top_k, top_p", *STRUCTURED)
"""What Triton's interpreter cannot run of vLLM's second runner: kernels for these, not ours."""
BLOCK, CHUNK = 32, 90
ANY = list(range(4, 4 + len(letters.LETTERS)))
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


LONG = 300
"""Tokens of an answer that is not over when its reader goes away, however late that is noticed."""


def id_of(letter: str) -> int:
    return ANY[letters.LETTERS.index(letter)]


def features() -> dict[str, dict[str, Any]]:
    """What each request asks of the sampler, or of the engine."""
    structured = {"max_tokens": 30, "ignore_eos": False}
    return {
        "greedy": {"params": {"temperature": 0, "max_tokens": 12}},
        "one token": {"params": {"temperature": 0, "max_tokens": 1}},
        "n": {"params": {"n": 3, "seed": 3, "max_tokens": 8}},
        "seed": {"params": {"seed": 5, "max_tokens": 10}},
        "same seed": {"params": {"seed": 5, "max_tokens": 10}},
        "stop string": {"params": {"seed": 6, "max_tokens": 60, "stop": list("aeiou0123456789")}},
        "stop string over two tokens": {
            "params": {"seed": 6, "max_tokens": 20, "stop": ["zz"], "allowed_token_ids": [id_of("z")]}
        },
        "min_tokens": {"params": {"seed": 7, "min_tokens": 6, "max_tokens": 20, "stop_token_ids": ANY[:-1]}},
        "logit_bias": {"params": {"seed": 8, "max_tokens": 8, "logit_bias": {str(id_of("q")): 60.0}}},
        "penalties": {
            "params": {
                "temperature": 0.8,
                "seed": 9,
                "max_tokens": 12,
                "repetition_penalty": 1.4,
                "frequency_penalty": 0.9,
                "presence_penalty": 0.7,
            }
        },
        "top_k, top_p": {"params": {"seed": 10, "max_tokens": 10, "top_k": 20, "top_p": 0.8}},
        "min_p": {"params": {"seed": 10, "max_tokens": 10, "min_p": 0.05}},
        "bad words": {"params": {"seed": 11, "max_tokens": 20, "bad_words": list(letters.LETTERS[:80])}},
        "allowed tokens": {"params": {"seed": 12, "max_tokens": 10, "allowed_token_ids": [id_of(c) for c in "xyz"]}},
        "json": {"params": {**structured, "structured_outputs": {"json": SCHEMA}}},
        "regex": {
            "params": {**structured, "structured_outputs": {"regex": "[a-f]{4}-[0-9]{2}"}},
            "allowed": [*["abcdef"] * 4, "-", *[string.digits] * 2],
        },
        "choice": {"params": {**structured, "structured_outputs": {"choice": ["myth", "truth"]}}},
        "prompt_logprobs": {"params": {"temperature": 0, "max_tokens": 4, "prompt_logprobs": 0}, "response_start": 21},
        "prompt_logprobs from the first token": {
            "params": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0},
            "response_start": 1,
        },
        "prompt_logprobs to the last": {
            "params": {"temperature": 0, "max_tokens": 4, "prompt_logprobs": 0},
            "response_start": "end",
        },
        "priority": {"params": {"temperature": 0, "max_tokens": 8}, "priority": -5},
        "low priority": {"params": {"temperature": 0, "max_tokens": 8}, "priority": 9},
        "cancelled before its first token": {"params": {"max_tokens": 40}, "cancel_after": 0},
        "cancelled after one token": {"params": {"max_tokens": LONG}, "cancel_after": 1},
        "cancelled later": {"params": {"max_tokens": 40, "n": 2}, "cancel_after": 6},
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters.save(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def interventions(model: Path) -> dict[str, Intervention]:
    base = Fingerprint.of(model)
    return {
        "lofit": artifacts.lofit(base, 1, strength=1.0),
        "direction": artifacts.direction(base, 2),
        "reft": artifacts.loreft(base, 3, "f3+l2"),
        "prompt": artifacts.direction(base, 4, "prompt"),
    }


@pytest.fixture(scope="module")
def requests() -> dict[str, dict[str, Any]]:
    """Each feature with other interventions; some prompts share their start, some are prefilled in several steps.

    Not those with a seed: vLLM's first runner cannot do that on a CPU (it rewinds the generator: "CPU Generator does
    not use offset").
    """
    draw = random.Random(1)
    shared = [draw.choice(ANY) for _ in range(2 * BLOCK)]
    asks: list[list[dict[str, Any]]] = [
        [{"name": "direction"}],
        [{"name": "lofit"}, {"name": "direction", "scale": -0.5}],
        [{"name": "reft"}],
        [{"name": "prompt"}, {"name": "lofit", "scale": 1.5, "positions": "generated"}],
    ]
    made = {}
    for i, (title, feature) in enumerate(features().items()):
        tokens = shared * (i % 2) + [draw.choice(ANY) for _ in range(22 + i % 4)]
        if "seed" not in feature["params"]:
            tokens += [draw.choice(ANY) for _ in range(7 * (i % 9) + 100 * (i % 3))]
        assert len(tokens) < CHUNK or "seed" not in feature["params"]
        start = len(tokens) if feature.get("response_start") == "end" else feature.get("response_start")
        mine = asks[i % len(asks)] if title != "same seed" else made["seed"]["interventions"]
        made[title] = {**feature, "tokens": tokens, "interventions": mine, "response_start": start}
    made["same seed"]["tokens"] = made["seed"]["tokens"]
    made["base"] = {**made["greedy"], "interventions": []}
    return made


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.name)
def run(
    request: pytest.FixtureRequest,
    model: Path,
    interventions: dict[str, Intervention],
    requests: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("features")
    one = requests["greedy"]
    refused = [
        {**one, "stream": True},
        {**one, "response_start": 999},
    ]
    requests = {
        title: one for title, one in requests.items() if request.param.runner == "v1" or title not in NOT_INTERPRETED
    }
    steps = [
        {"do": "generate", "requests": list(requests.values())},
        {"do": "generate", "requests": refused},
        {"do": "generate", "requests": [requests["prompt_logprobs"], requests["greedy"]]},
        {"do": "facts"},
    ]
    *_, batch, refusals, again, facts = engines.run(
        replace(request.param, driver="sampling_driver"),
        folder,
        model,
        [*artifacts.save_all(interventions, folder / "artifacts"), *steps],
        block_size=BLOCK,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        max_num_batched_tokens=4096,
        long_prefill_token_threshold=CHUNK,
        max_num_seqs=32,
        max_model_len=512,
        scheduling_policy="priority",
    )
    return {
        "runner": request.param.runner,
        "batch": dict(zip(requests, batch, strict=True)),
        "refused": refusals,
        "again": again,
        "facts": facts,
    }


@pytest.mark.parametrize("title", [*(title for title in features() if title not in STRUCTURED), "base"])
def test_log_probabilities_are_the_oracles(
    run: dict[str, Any],
    title: str,
    model: Path,
    interventions: dict[str, Intervention],
    requests: dict[str, dict[str, Any]],
) -> None:
    if run["runner"] == "v2" and title in NOT_INTERPRETED:
        pytest.skip("not in Triton's interpreter")
    result = run["batch"][title]
    if title.startswith("cancelled before"):
        assert result == {"cancelled": True}
        return
    assert all(choice["tokens"] for choice in result["choices"])
    oracle.check_sampled(oracle.load(str(model)), requests[title], result, interventions)


def test_structured_outputs_are_steered(
    run: dict[str, Any],
    model: Path,
    interventions: dict[str, Intervention],
    requests: dict[str, dict[str, Any]],
) -> None:
    """vLLM reports log-probabilities among the tokens that a grammar allows; here they are known."""
    if run["runner"] == "v2":
        pytest.skip("not in Triton's interpreter")
    batch = run["batch"]
    said = "".join(batch["json"]["choices"][0]["text"].split())  # blanks are allowed, and may use up the tokens
    assert said
    assert any(whole.startswith(said) for whole in ('{"on":true}', '{"on":false}')), said
    assert batch["choice"]["choices"][0]["text"] in ("myth", "truth")
    (choice,) = batch["regex"]["choices"]
    assert re.fullmatch("[a-f]{4}-[0-9]{2}", choice["text"])
    request = requests["regex"]
    prompt, made = request["tokens"], choice["tokens"]
    predicted = oracle.logprobs(
        oracle.load(str(model)), prompt + made, request["interventions"], interventions, len(prompt)
    )
    for i, allowed in enumerate(request["allowed"]):
        ids = [id_of(letter) for letter in allowed]
        among = predicted[len(prompt) - 1 + i, ids].log_softmax(-1)
        assert abs(among[ids.index(made[i])].item() - choice["logprobs"][i]) < oracle.TOLERANCE, i


def test_features_did_what_they_say(run: dict[str, Any]) -> None:
    """Else the test above would say nothing about them."""
    choices = {title: result.get("choices") for title, result in run["batch"].items()}
    one = {title: found[0] for title, found in choices.items() if found}
    assert len({tuple(choice["tokens"]) for choice in choices["n"]}) == 3
    assert one["seed"]["tokens"] == one["same seed"]["tokens"]
    assert one["stop string"]["finish"] == "stop"
    assert not set(one["stop string"]["text"]) & set("aeiou0123456789")
    over_two = one["stop string over two tokens"]
    assert (over_two["finish"], len(over_two["tokens"])) == ("stop", 2)
    assert len(one["min_tokens"]["tokens"]) > 6
    assert one["min_tokens"]["finish"] == "stop"
    assert set(one["logit_bias"]["text"]) == {"q"}
    assert not set(one["bad words"]["text"]) & set(letters.LETTERS[:80])
    assert set(one["allowed tokens"]["text"]) <= set("xyz")
    assert len(one["one token"]["tokens"]) == 1
    assert 1 <= len(one["cancelled after one token"]["tokens"]) < LONG
    assert one["greedy"]["tokens"] != one["base"]["tokens"]


def test_scored_prompts_use_no_cache_and_are_exact_again(
    run: dict[str, Any],
    model: Path,
    interventions: dict[str, Intervention],
    requests: dict[str, dict[str, Any]],
) -> None:
    for title, result in zip(("prompt_logprobs", "greedy"), run["again"], strict=True):
        oracle.check_sampled(oracle.load(str(model)), requests[title], result, interventions)
    scored, greedy = run["again"]
    assert scored["cached"] == 0
    assert greedy["choices"] == run["batch"]["greedy"]["choices"]


def test_what_does_not_fit_is_refused_with_a_text(run: dict[str, Any]) -> None:
    streaming, behind = run["refused"]
    assert streaming["error"] == "unsupported_with_intervention"
    assert "streaming-input" in streaming["message"]
    assert "response_start 999 is beyond the prompt's" in behind["message"]


def test_nothing_is_left_behind(run: dict[str, Any]) -> None:
    (facts,) = run["facts"]
    held = facts["admission"]
    assert held["pinned"] == held["additive_rows"] == held["low_rank_rows"] == 0
    assert [rank["runner"] for rank in facts["ranks"]] == [run["runner"]]
