"""`steer-vllm serve -- --data-parallel-size 2`: two API servers over two engines answer as one, whichever is asked.

Each test talks to both servers over connections of its own; texts are compared with transformers.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from steer_vllm.hf import steered
from steer_vllm.intervention import Intervention

from .test_serve import ENGINE_FLAGS, PROMPT, STARTS_WITHIN, STOPS_WITHIN, Server, model, start, store, wait_for

__all__ = ["model", "store"]  # fixtures

ROWS, PER_REQUEST = 8, 1  # a request may need 4 rows, which is each server's half
ADMIN = {"Authorization": "Bearer the-admin-key"}
TWO_OF_EACH = ["--data-parallel-size=2", "--max-model-len=8192"]  # vLLM starts as many API servers as engines
FREED_WITHIN = 30  # seconds
SHORT, LONG, ENDLESS = 10, 480, 8000
"""Tokens: an answer, one that lasts for some calls, and one that nobody waits for."""


class Stream:
    """An answer on its way; `text` is what has been read of it."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._parts = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {"))
        self.text = ""

    def next(self) -> str:
        return str(next(self._parts)["choices"][0]["text"])

    def whole(self) -> str:
        """To its end."""
        self.text += "".join(str(part["choices"][0]["text"]) for part in self._parts)
        return self.text.strip()


def _asked(model: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0}


class Door:
    """One connection, so always the same server: `pid`."""

    def __init__(self, server: Server) -> None:
        one = httpx.Limits(max_connections=1, keepalive_expiry=None)  # a new one may lead to the other server
        self.client = httpx.Client(base_url=server.url, headers=ADMIN, timeout=60, limits=one)
        self.client.get("/v1/models")
        (connection,) = self.client._transport._pool.connections  # type: ignore[attr-defined]
        port = connection._connection._network_stream.get_extra_info("socket").getsockname()[1]
        (self.pid,) = (
            process.pid
            for process in server.family()
            for one in process.net_connections("tcp")
            if one.raddr and one.raddr.port == port
        )

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def load(self, name: str, source: str, **more: Any) -> None:
        answer = self.post("/v1/load_intervention", name=name, source=source, **more)
        assert answer.status_code == 200, answer.text

    def unload(self, name: str) -> None:
        assert self.post("/v1/unload_intervention", name=name).status_code == 200

    def complete(self, model: str) -> httpx.Response:
        return self.post("/v1/completions", **_asked(model, SHORT))

    @contextmanager
    def stream(self, model: str, tokens: int) -> Iterator[Stream]:
        """A long answer whose first token has arrived."""
        with self.client.stream("POST", "/v1/completions", json={**_asked(model, tokens), "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            found = Stream(answer.iter_lines())
            found.text = found.next()
            yield found

    def ask(self, model: str) -> str:
        answer = self.complete(model)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"]).strip()

    def is_gone(self, model: str) -> bool:
        answer = self.complete(model)
        return answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.fixture(scope="module")
def server(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("servers")
    (folder / "admin.key").write_text("the-admin-key\n")
    options = [f"--artifact=honest={store / 'honest'}", f"--store={store}", f"--admin-key-file={folder / 'admin.key'}"]
    options += [f"--additive-rows={ROWS}", f"--low-rank-rows={ROWS}", f"--per-request={PER_REQUEST}"]
    config = folder / "steer.yaml"
    config.write_text("limits: {row_wait: 0.2}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        patch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # the model was trained on less
        patch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "600")  # seconds: a new connection may lead to the other server
        process, url = start(model, folder / "log", *options, f"--config={config}", flags=[*ENGINE_FLAGS, *TWO_OF_EACH])
    try:
        wait_for(url, process, folder / "log", within=2 * STARTS_WITHIN)
        yield Server(process, url, folder / "log", store)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def crowd(server: Server) -> Iterator[tuple[list[Door], list[Door]]]:
    """Enough to each server: vLLM 0.32 gives a connection to the server that has fewer, older ones to either."""
    found: defaultdict[int, list[Door]] = defaultdict(list)
    while len(found) < 2 or min(map(len, found.values())) < ROWS // 2 + 1:
        assert sum(map(len, found.values())) < 200, f"the connections lead to {list(found)}"
        door = Door(server)
        found[door.pid].append(door)
    one, two = found.values()
    yield one, two
    for door in one + two:
        door.client.close()


@pytest.fixture(scope="module")
def doors(crowd: tuple[list[Door], list[Door]]) -> tuple[Door, Door]:
    """One to each server."""
    return crowd[0][0], crowd[1][0]


@pytest.fixture(scope="module")
def expected(model: Path, store: Path) -> dict[str, dict[int, str]]:
    """The texts of the base and of two artifacts from transformers, by their number of tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def texts() -> dict[int, str]:
        with torch.no_grad():
            output = network.generate(ids, max_new_tokens=LONG, min_new_tokens=LONG, do_sample=False)[0, ids.shape[1] :]
        return {n: tokenizer.decode(output[:n], skip_special_tokens=True).strip() for n in (SHORT, LONG)}

    found = {"base": texts()}
    for name in ("honest", "other"):
        with steered(network, Intervention.load(store / name)):
            found[name] = texts()
    assert len({text[SHORT] for text in found.values()}) == 3
    return found


def test_what_was_given_at_the_start(doors: tuple[Door, Door], expected: dict[str, dict[int, str]]) -> None:
    for door in doors:
        assert [card["id"] for card in door.client.get("/v1/models").json()["data"]] == ["base", "base:honest"]
        assert door.ask("base") == expected["base"][SHORT]
        assert door.ask("base:honest") == expected["honest"][SHORT]


def test_a_change_is_seen_by_the_next_request_to_the_other(
    doors: tuple[Door, Door], expected: dict[str, dict[int, str]]
) -> None:
    for one, two in [doors, doors[::-1]] * 5:
        one.load("late", "honest")
        assert two.ask("base:late") == expected["honest"][SHORT]
        taken = two.post("/v1/load_intervention", name="late", source="other")
        assert (taken.status_code, taken.json()["error"]["code"]) == (409, "artifact_exists")
        two.load("late", "other", load_inplace=True)
        assert one.ask("base:late") == expected["other"][SHORT]
        assert one.client.get("/v1/interventions").json() == two.client.get("/v1/interventions").json()
        one.unload("late")
        assert two.is_gone("base:late")
        assert one.is_gone("base:late")
        assert two.post("/v1/unload_intervention", name="late").status_code == 404


def test_loads_and_unloads_through_both_at_once(doors: tuple[Door, Door], expected: dict[str, dict[int, str]]) -> None:
    """The same content under names of its own on either server, loaded and freed over and over."""

    def churn(name: str) -> None:
        one, two = doors if name in "ab" else doors[::-1]
        for _ in range(10):
            one.load(name, "other")
            assert two.ask(f"base:{name}") == expected["other"][SHORT]
            one.unload(name)
            assert two.is_gone(f"base:{name}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, "abcd"))


def test_a_stream_ends_with_what_it_began_with(
    crowd: tuple[list[Door], list[Door]], expected: dict[str, dict[int, str]]
) -> None:
    """Replaced and withdrawn through one server while streams of both are between their first token and their last."""
    (one, *ones), (two, *twos) = crowd
    one.load("late", "honest")
    one.load("here", "other")  # so that the replacement takes no longer than its names
    with ExitStack() as stack:
        streams = [stack.enter_context(door.stream("base:late", LONG)) for door in ones[:4] + twos[:4]]
        two.load("late", "other", load_inplace=True)
        assert _running(one), "too fast to show anything"
        assert one.ask("base:late") == expected["other"][SHORT]
        two.unload("late")
        assert one.is_gone("base:late")
        for stream in streams:
            assert stream.whole() == expected["honest"][LONG]
    one.unload("here")


def _running(door: Door) -> float:
    """Requests in both engines."""
    lines = door.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_withdrawn_content_is_freed_once(server: Server, doors: tuple[Door, Door]) -> None:
    """By one server, though both learn that it may be freed."""

    def freed(name: str) -> int:
        return server.log.read_text().count(f"sha256 {Intervention.load(server.store / name).digest[:12]} is freed")

    once, *others = (_variant(server.store, f"x{ROWS + n}") for n in range(3))  # no other test's
    for name in (once, *others):  # the others are freed after every server has seen that the first is withdrawn
        doors[0].load("late", name)
        doors[1].unload("late")
        deadline = time.monotonic() + FREED_WITHIN
        while not freed(name):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert [freed(name) for name in (once, *others, "honest")] == [1, 1, 1, 0]


def test_each_server_hands_out_its_share_of_the_rows(server: Server, crowd: tuple[list[Door], list[Door]]) -> None:
    """Streams with contents of their own hold a server's rows: it turns the next content away, the other does not."""
    names = [f"x{i}" for i in range(ROWS)]
    for name in names:
        crowd[0][0].load(name, _variant(server.store, name))
    half = ROWS // 2
    for (free, *doors), (other, *_), mine, others in (
        (*crowd, names[:half], names[half:]),
        (*crowd[::-1], names[half:], names[:half]),
    ):
        with ExitStack() as stack:
            for door, name in zip(doors, mine, strict=False):
                stack.enter_context(door.stream(f"base:{name}", ENDLESS))
            assert free.complete(f"base:{mine[0]}").status_code == 200, "what is held already needs no other row"
            assert other.complete(f"base:{others[0]}").status_code == 200
            full = free.complete(f"base:{others[0]}")
            assert (full.status_code, full.json()["error"]["code"]) == (503, "no_rows")
        assert free.complete(f"base:{others[0]}").status_code == 200, "the rows of who left come back"


def _variant(store: Path, name: str) -> str:
    """The same edit at another strength: content of its own."""
    other = Intervention.load(store / "other")
    strength = 1 + int(name[1:]) / 100
    changed = replace(other, tensors={key: tensor * strength for key, tensor in other.tensors.items()})
    changed.save(store / name)
    return name


def test_interrupt_leaves_nothing(server: Server, doors: tuple[Door, Door]) -> None:
    family = server.family()
    assert {door.pid for door in doors} < {process.pid for process in family}
    os.killpg(server.process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=STOPS_WITHIN)
    assert not alive, f"still running: {alive}\n{server.log.read_text()[-4000:]}"


@pytest.mark.slow
def test_a_foreign_artifact_stops_every_server(model: Path, store: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, _ = start(
        model, log, f"--artifact=foreign={store / 'foreign'}", flags=[*ENGINE_FLAGS, "--api-server-count=2"]
    )
    family: set[psutil.Process] = set()
    try:
        while process.poll() is None:
            family.update(psutil.Process(process.pid).children(recursive=True))
            psutil.wait_procs(family, timeout=0.5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    (said,) = (line for line in log.read_text().splitlines() if line.startswith("error: "))
    assert said.startswith("error: artifact foreign=")
    assert "another base model" in said
    assert not psutil.wait_procs(family, timeout=STOPS_WITHIN)[1]
