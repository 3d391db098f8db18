"""`steer-vllm serve` with LoRA adapters, and what only the tokenised prompt tells: over HTTP, held to transformers.

The adapter's oracle is the adapter merged into the transformers model.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from engine import artifacts, loras, oracle

from steer_vllm import Intervention
from steer_vllm.config import SPARE_ROWS
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from .test_serve import ENGINE_FLAGS, Server, start, wait_for

ROWS = 2
TOKENS = [20 + (7 * i) % 300 for i in range(12)]


def contents() -> dict[str, Intervention]:
    base = Fingerprint.of(MODEL_PATH)
    return {"heads": artifacts.lofit(base, 1), "direction": artifacts.direction(base, 2)}


def adapters() -> dict[str, loras.Lora]:
    model = oracle.load(str(MODEL_PATH))
    return {
        "inner": loras.random_lora(model, "inner", 1, ("q_proj", "down_proj")),
        "output": loras.random_lora(model, "output", 2, ("o_proj",)),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("features")
    for name, intervention in contents().items():
        intervention.save(folder / "store" / name)
    modules = []
    for name, lora in adapters().items():
        lora.save(folder / name)
        modules.append(f"{name}={folder / name}")
    given = [f"--artifact={name}={folder / 'store' / name}" for name in contents()]
    given.append(f"--additive-rows={ROWS}")
    # vLLM on a CPU takes the last slot for requests without an adapter: it must stay empty
    flags = [*ENGINE_FLAGS, "--enable-lora", "--max-loras=3", "--max-lora-rank=8", "--lora-modules", *modules]
    process, url = start(MODEL_PATH, folder / "log", *given, flags=flags)
    try:
        wait_for(url, process, folder / "log")
        running = Server(process, url, folder / "log", folder / "store")
        with running.client:
            yield running
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(server: Server, **more: Any) -> Any:
    body = {"model": "base", "prompt": TOKENS, "max_tokens": 6, "temperature": 0, "logprobs": 0, **more}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(server: Server, status: int, code: str, **more: Any) -> str:
    answer = server.post("/v1/completions", {"model": "base", "prompt": TOKENS, "max_tokens": 2, **more})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize(
    ("adapter", "asks"),
    [
        (None, [{"name": "heads"}]),
        ("inner", []),
        ("inner", [{"name": "heads"}]),
        ("inner", [{"name": "direction", "scale": -0.5}]),
        ("output", [{"name": "direction"}]),
    ],
)
def test_adapter_and_interventions(server: Server, adapter: str | None, asks: list[dict[str, Any]]) -> None:
    answer = ask(server, model=adapter or "base", interventions=asks, return_token_ids=True)
    assert answer["model"] == (adapter or "base")
    made = answer["choices"][0]["token_ids"]
    result = {"prompt": TOKENS, "tokens": made, "logprobs": answer["choices"][0]["logprobs"]["token_logprobs"]}
    model = oracle.load(str(MODEL_PATH))
    if adapter:
        model = adapters()[adapter].merged(model)
    oracle.check(model, {"tokens": TOKENS, "interventions": asks}, result, contents())


def test_adapters_that_do_not_go_together_or_are_not_there(server: Server) -> None:
    message = refused(server, 400, "unsupported_with_intervention", model="output", interventions=[{"name": "heads"}])
    assert "'output' changes the attention output projection" in message
    refused(server, 404, "model_not_found", model="nobody", interventions=[{"name": "heads"}])


@pytest.mark.parametrize("stream", [False, True])
def test_response_start_behind_the_prompt(server: Server, stream: bool) -> None:
    """Text: how many tokens it has is known only once vLLM has read it."""
    asked = {"interventions": [{"name": "direction"}], "response_start": 40, "stream": stream}
    message = refused(server, 400, "invalid_intervention", prompt="what do cows eat ?", **asked)
    assert message == "response_start 40 is beyond the prompt's 6 tokens"
    assert ask(server)["model"] == "base"


def test_echo(server: Server) -> None:
    """The prompt's own log-probabilities, with the answer inside it."""
    asks = [{"name": "direction"}, {"name": "heads", "scale": 0.5}]
    answer = ask(server, interventions=asks, response_start=7, echo=True, max_tokens=1)
    found = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(TOKENS)])
    predicted = oracle.logprobs(oracle.load(str(MODEL_PATH)), TOKENS, asks, contents(), 7)
    expected = predicted[torch.arange(len(TOKENS) - 1), torch.tensor(TOKENS[1:])]
    assert (found - expected).abs().max() < oracle.TOLERANCE


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/score", "/classify", "/rerank", "/v1/score"])
def test_pooling_routes(server: Server, path: str) -> None:
    answer = server.post(path, {"model": "base", "input": "x", "interventions": [{"name": "heads"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_with_intervention"


def test_beam_search(server: Server) -> None:
    message = refused(
        server, 400, "unsupported_with_intervention", use_beam_search=True, n=2, interventions=[{"name": "heads"}]
    )
    assert "beam search" in message


def test_a_stream_is_cancelled(server: Server) -> None:
    """Its row comes back: there are fewer, even with the spare ones, than streams with contents of their own."""
    for number in range(ROWS + SPARE_ROWS + 1):
        asks = [{"name": "heads"}, {"name": "direction", "scale": 0.5 + number / 100}]  # one alone has the same row
        more = {"interventions": asks, "ignore_eos": True}
        stream = server.client.completions.create(
            model="inner", prompt="what do", max_tokens=200, stream=True, extra_body=more
        )
        assert isinstance(next(stream), openai.types.Completion)
        stream.close()
    assert ask(server, model="inner", interventions=[{"name": "heads"}])["model"] == "inner"
