"""`steer-vllm serve`, as a user starts it: vLLM on a CPU, the openai client, one server for the module.

The last test interrupts the server; what every test before it did must not keep a process alive.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
import yaml
from openai import OpenAI

from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.intervention import Card, Intervention
from steer_vllm.methods import Direction, LoFiT, LoReFT, Method
from steer_vllm.positions import Positions

PROMPT = "Once upon a time there was a"
ROWS = 4
STARTS_WITHIN, STOPS_WITHIN = 240, 30  # seconds
ENGINE_FLAGS = [
    "--enforce-eager",
    "--dtype=float32",
    "--gpu-memory-utilization=0.1",
    "--served-model-name=base",
    "--max-model-len=256",
    "--max-num-seqs=16",
    "--disable-access-log-for-endpoints=/health",
    "--chat-template={% for m in messages %}{{ m['content'] }}{% endfor %}",
]


@pytest.fixture(scope="module")
def model(beside: Callable[[str], Path]) -> Path:
    return MODEL_PATH if (MODEL_PATH / "config.json").exists() else beside("models/stories260K-h32-fp32")


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random artifacts of every method, strong enough to change the text."""
    folder = tmp_path_factory.mktemp("store")
    base = Fingerprint.of(model)
    layers = tuple(range(base.num_layers))
    heads = tuple((layer, head) for layer in layers for head in (0, 1))
    draw = torch.Generator().manual_seed(0)

    def save(name: str, method: Method, positions: str, base: Fingerprint = base, **tensors: torch.Tensor) -> None:
        Intervention(method, tensors, base, Positions.parse(positions), card=Card("base")).save(folder / name)

    def offsets() -> torch.Tensor:
        return 10 * torch.randn(len(heads), base.head_dim, generator=draw)

    def directions() -> torch.Tensor:
        return 3 * torch.randn(len(layers), base.hidden_size, generator=draw)

    wide = (1, len(layers), base.hidden_size, 4)
    save("honest", LoFiT(heads), "all", offsets=offsets())
    save("other", LoFiT(heads), "all", offsets=offsets())
    save("polite", Direction(layers, 2.0), "response", directions=directions())
    save(
        "edit",
        LoReFT(layers, 4),
        "f2+l2",
        rotate=torch.linalg.qr(torch.randn(wide, generator=draw))[0].mT.contiguous(),
        weight=torch.randn(wide, generator=draw).mT.contiguous(),
        bias=torch.randn(1, len(layers), 4, generator=draw),
    )
    save("foreign", LoFiT(heads), "all", base=replace(base, weights="0" * 64), offsets=offsets())
    return folder


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    store: Path
    api_key: str = "the-api-key"
    admin_key: str = "the-admin-key"

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.api_key}"}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def load(self, name: str, source: str, **more: Any) -> httpx.Response:
        return self.post("/v1/load_intervention", {"name": name, "source": source, **more}, self.admin_key)

    def unload(self, name: str) -> httpx.Response:
        return self.post("/v1/unload_intervention", {"name": name}, self.admin_key)

    def ask(self, model: str = "base", tokens: int = 12, **more: Any) -> str:
        answer = self.client.completions.create(
            model=model, prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body=more
        )
        assert answer.model == model
        return answer.choices[0].text

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


def start(
    model: Path, log: Path, *options: str, flags: list[str] = ENGINE_FLAGS
) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "steer_vllm.cli", "serve", str(model), f"--port={port}", *options, "--", *flags]
    environment = os.environ | {"STEER_VLLM_API_KEY": "the-api-key", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def server(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "admin.key").write_text("the-admin-key\n")
    (folder / "steer.yaml").write_text(
        yaml.safe_dump(
            {
                "store": str(store),
                "limits": {"additive_rows": ROWS, "low_rank_rows": ROWS, "row_wait": 0.1, "body_mb": 0.1},
                "artifacts": [{"name": "polite", "source": str(store / "polite")}],
            }
        )
    )
    options = [f"--artifact={name}={store / name}" for name in ("honest", "edit")]
    options += [f"--config={folder / 'steer.yaml'}", f"--admin-key-file={folder / 'admin.key'}"]
    log = folder / "log"
    process, url = start(model, log, *options)
    try:
        wait_for(url, process, log)
        running = Server(process, url, log, store)
        with running.client:
            yield running
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, within: float = STARTS_WITHIN) -> None:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-8000:]}")


def test_models(server: Server) -> None:
    cards = {card.id: card for card in server.client.models.list()}
    assert list(cards) == ["base", "base:edit", "base:honest", "base:polite"]
    honest: Any = cards["base:honest"]
    assert (honest.parent, honest.root) == ("base", str(server.store / "honest"))
    assert cards["base"].max_model_len == 256  # type: ignore[attr-defined]


def test_every_alias_answers_in_its_way(server: Server) -> None:
    texts = {model: server.ask(model) for model in ("base", "base:honest", "base:polite", "base:edit")}
    assert len(set(texts.values())) == 4


def test_chat(server: Server) -> None:
    for model in ("base", "base:honest"):
        raw = server.client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=12, temperature=0
        )
        answer = raw.parse()
        assert answer.model == model
        assert ("x-steer-applied" in raw.headers) == (model != "base")
    digest = httpx.get(
        f"{server.url}/v1/interventions/honest", headers={"Authorization": f"Bearer {server.api_key}"}
    ).json()["digest"]
    assert raw.headers["x-steer-applied"] == f"honest@sha256:{digest[:12]}*1"


def test_field(server: Server) -> None:
    assert server.ask(interventions=[{"name": "honest"}]) == server.ask("base:honest")
    assert server.ask(interventions=[]) == server.ask()
    assert server.ask(interventions=[{"name": "honest", "scale": 0}]) == server.ask()
    assert server.ask(interventions=[{"name": "honest", "scale": -1.5}]) != server.ask("base:honest")
    both = [{"name": "honest", "scale": 1.5}, {"name": "edit", "positions": "f1+l3"}]
    assert server.ask(interventions=both) not in (server.ask(), server.ask("base:honest"), server.ask("base:edit"))


def test_the_same_as_in_transformers(server: Server, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steer_vllm.hf import steered

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for name in ("honest", "polite", "edit"):
        with steered(network, Intervention.load(server.store / name)), torch.no_grad():
            output = network.generate(ids, max_new_tokens=12, do_sample=False)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert server.ask(f"base:{name}").strip() == expected.strip()  # vLLM keeps the space before the first word


def test_streaming(server: Server) -> None:
    chunks = list(
        server.client.completions.create(model="base:honest", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    )
    assert len(chunks) > 3
    assert {chunk.model for chunk in chunks} == {"base:honest"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == server.ask("base:honest")


def test_several_answers(server: Server) -> None:
    nearly_greedy = 0.001  # vLLM takes n > 1 only where something is drawn
    answer = server.client.completions.create(
        model="base:honest", prompt=PROMPT, max_tokens=12, temperature=nearly_greedy, n=2
    )
    assert [choice.text for choice in answer.choices] == [server.ask("base:honest")] * 2


def test_logprobs_of_scored_text(server: Server) -> None:
    def score(**more: Any) -> list[float]:
        answer = server.client.completions.create(
            model="base", prompt=PROMPT, max_tokens=1, temperature=0, echo=True, logprobs=1, extra_body=more
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        return logprobs.token_logprobs[1:-1]

    base, early, late = (
        score(),
        score(interventions=[{"name": "polite"}], response_start=2),
        score(interventions=[{"name": "polite"}], response_start=4),
    )
    assert early[0] == pytest.approx(base[0], abs=1e-4)  # the answer's first token is predicted by position 1
    assert early[1] != pytest.approx(base[1], abs=1e-2)
    assert late[:3] == pytest.approx(base[:3], abs=1e-4)
    assert late[3] != pytest.approx(base[3], abs=1e-2)
    with pytest.raises(openai.BadRequestError, match="response_start"):
        score(interventions=[{"name": "polite"}])


def test_mixed_batch(server: Server) -> None:
    """Sixteen requests at once, each as if it were alone; also when they have to wait for rows."""
    models = ["base", "base:honest", "base:polite", "base:edit"] * 4
    alone = {model: server.ask(model) for model in set(models)}
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(server.ask, models)) == [alone[model] for model in models]


BAD: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"model": "base:nobody"}, openai.NotFoundError, "model_not_found"),
    ({"model": "base", "interventions": [{"name": "nobody"}]}, openai.NotFoundError, "model_not_found"),
    ({"model": "base:honest", "interventions": []}, openai.BadRequestError, "invalid_intervention"),
    (
        {"model": "base", "interventions": [{"name": "honest", "scale": 1e308}]},
        openai.BadRequestError,
        "scale_out_of_range",
    ),
    (
        {"model": "base", "interventions": [{"name": "honest", "scale": "1"}]},
        openai.BadRequestError,
        "invalid_intervention",
    ),
    ({"model": "base", "vllm_xargs": {"steer_vllm": "{}"}}, openai.BadRequestError, "invalid_intervention"),
    ({"model": "base:honest", "use_beam_search": True}, openai.BadRequestError, "unsupported_with_intervention"),
    ({"model": "base:honest", "n": 17}, openai.BadRequestError, "unsupported_with_intervention"),
    ({"model": "base:honest", "prompt": "x" * 200_000}, openai.APIStatusError, "body_too_large"),
]


@pytest.mark.parametrize(("body", "kind", "code"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests(server: Server, body: dict[str, Any], kind: type[openai.APIStatusError], code: str) -> None:
    with pytest.raises(kind) as refused:
        server.client.completions.create(prompt=PROMPT, max_tokens=1, model="base", extra_body=body)
    assert refused.value.code == code


def test_bad_requests_leave_their_batch_alone(server: Server) -> None:
    alone = server.ask("base:honest", 40)
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(server.ask, "base:honest", 40) for _ in range(4)]
        for _ in range(20):
            server.post("/v1/completions", {"model": "base:nobody", "prompt": PROMPT})
            server.post("/v1/completions", {"model": "base", "prompt": PROMPT, "vllm_xargs": {"steer_vllm": "{}"}})
        assert [one.result() for one in good] == [alone] * 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"model": "base:honest", "input": PROMPT}),
        ("/v1/responses", {"model": "base", "input": PROMPT, "interventions": [{"name": "honest"}]}),
        ("/invocations", {"model": "base", "prompt": PROMPT, "interventions": [{"name": "honest"}]}),
        ("/invocations", {"model": "base:honest", "prompt": PROMPT}),
        ("/v1/chat/completions/batch", {"model": "base", "messages": [], "interventions": [{"name": "honest"}]}),
        ("/generative_scoring", {"model": "base", "interventions": [{"name": "honest"}]}),
        ("/v1/messages", {"model": "base:honest", "messages": [], "max_tokens": 1}),
        (
            "/inference/v1/generate",
            {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1, "extra_args": {"steer_vllm": "{}"}}},
        ),
    ],
)
def test_other_paths(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("unsupported_with_intervention", "invalid_intervention")


def test_keys(server: Server) -> None:
    for path in ("/v1/models", "/metrics", "/v1/interventions", "/docs", "/version"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()
    refused = server.post("/v1/load_intervention", {"name": "other", "source": "other"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_required")


def test_load_and_unload_while_a_stream_runs(server: Server) -> None:
    assert server.load("late", "other").status_code == 200
    text = server.ask("base:late", 100)
    stream = server.client.completions.create(
        model="base:late", prompt=PROMPT, max_tokens=100, temperature=0, stream=True
    )
    parts = [next(stream).choices[0].text]
    assert server.unload("late").status_code == 200
    with pytest.raises(openai.NotFoundError):
        server.ask("base:late")
    parts += [chunk.choices[0].text for chunk in stream]
    assert "".join(parts) == text
    assert server.load("late", "other").status_code == 200
    assert server.ask("base:late", 100) == text
    assert server.unload("late").status_code == 200


def test_replace(server: Server) -> None:
    """The same name with other content: no key or value of the old content is used again."""
    assert server.load("late", "honest").status_code == 200
    assert server.ask("base:late") == server.ask("base:honest")
    taken = server.load("late", "other")
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "artifact_exists")
    assert server.load("late", "other", load_inplace=True).status_code == 200
    replaced = server.ask("base:late")
    assert replaced != server.ask("base:honest")
    assert server.unload("late").status_code == 200
    assert server.load("fresh", "other").status_code == 200
    assert server.ask("base:fresh") == replaced
    assert server.unload("fresh").status_code == 200


def test_bad_artifacts(server: Server) -> None:
    def refused(source: str, status: int = 422) -> str:
        answer = server.load("bad", source)
        assert answer.status_code == status, answer.text
        return str(answer.json()["error"]["message"])

    assert "another base model" in refused("foreign")
    assert "intervention_config.json" in refused("nowhere")
    assert ".." in refused("../store/honest", 400)
    broken = server.store / "broken"
    broken.mkdir()
    for file in (server.store / "honest").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:-10])
    assert "not JSON" in refused("broken")
    (broken / "intervention_config.json").write_bytes((server.store / "honest/intervention_config.json").read_bytes())
    assert "intervention.safetensors" in refused("broken")
    assert server.ask("base:honest")


def test_rows_run_out_and_come_back(server: Server) -> None:
    """Clients that hold every row and then just leave: others get 503 meanwhile, and are served after."""

    def asks(scale: float) -> list[dict[str, Any]]:
        """honest on the prompt, which all share, and a composition of its own on the answer."""
        return [{"name": "honest"}, {"name": "polite", "scale": scale}]

    def hold(scale: float) -> openai.Stream[Any]:
        more = {"interventions": asks(scale)}
        return server.client.completions.create(model="base", prompt=PROMPT, stream=True, extra_body=more)

    engine = server.family()[1:]
    for process in engine:
        process.suspend()
    try:
        streams = [hold(1 + i) for i in range(ROWS - 1)]
        with pytest.raises(openai.InternalServerError) as full:
            server.ask(interventions=asks(-1))
        for stream in streams:
            stream.close()
        time.sleep(0.3)  # they have left; the engine, which is stopped, does not know
        with pytest.raises(openai.InternalServerError) as still_full:
            server.ask(interventions=asks(-1))
    finally:
        for process in engine:
            process.resume()
    assert still_full.value.code == "no_rows"
    assert full.value.code == "no_rows"
    assert full.value.response.headers["retry-after"] == "1"
    deadline = time.monotonic() + STOPS_WITHIN
    while (answer := server.post("/v1/completions", {"prompt": PROMPT, "interventions": asks(-1)})).is_error:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)


def test_interrupt_stops_everything(server: Server) -> None:
    """As Ctrl-C does: the signal goes to the whole group, and nothing of it is left."""
    family = server.family()
    assert len(family) >= 2
    os.killpg(server.process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=STOPS_WITHIN)
    assert not alive, f"still running: {alive}\n{server.log.read_text()[-4000:]}"
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_foreign_artifact_stops_the_start(model: Path, store: Path, tmp_path: Path) -> None:
    process, _ = start(model, tmp_path / "log", f"--artifact=foreign={store / 'foreign'}")
    family = []
    try:
        while process.poll() is None:
            time.sleep(0.5)
            family = (
                [*psutil.Process(process.pid).children(recursive=True), *family] if process.poll() is None else family
            )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 1
    assert "error: artifact foreign=" in text
    assert "another base model" in text
    assert not psutil.wait_procs(set(family), timeout=STOPS_WITHIN)[1]
