"""Sleep: loads end before it, none begins in it, and waking up writes the device's memory again, whatever was left."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.make import BASE
from engine_units import test_worker as toys

from steer_vllm.engine import sleep, weights, worker_methods
from steer_vllm.engine.worker import WorkerSteering


def scribble(steering: WorkerSteering) -> None:
    """What level 2 leaves of memory that was taken while the model was loaded."""
    tables, tokens, requests = steering.tables, steering.tokens, steering.requests
    for tensor in (
        *(tables.additive, tables.low_rank.A, tables.low_rank.B, tables.low_rank.c),
        *(tokens.additive, tokens.low_rank, tokens.scales, requests.spans, requests.scales),
    ):
        tensor.fill_(7 if not tensor.is_floating_point() else float("nan"))


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> toys.Rank:
    monkeypatch.setattr(toys.module, "base_fingerprint", lambda config: BASE)
    return toys.Rank()


@pytest.fixture
def worker(rank: toys.Rank, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's worker class with a sleep that scribbles."""
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(Worker, "sleep", lambda self, level=1: scribble(rank.steering))
    monkeypatch.setattr(Worker, "wake_up", lambda self, tags=None: None)
    made = Worker.__new__(Worker)
    made.model_runner = SimpleNamespace(steering=rank.steering)
    sleep.install(made)
    return made


def test_requests_go_on_after_waking_up(rank: toys.Rank, worker: Any) -> None:
    """Half of every request before the sleep, half after: each token has its own edits."""
    wanted = toys.alone()
    for name in toys.REQUESTS:
        rank.add(name)
    names = tuple(toys.REQUESTS)
    before = rank.step(*((name, 0, 3) for name in names))
    worker.sleep(2)
    worker.wake_up()
    after = rank.step(*((name, 3, toys.TOTAL) for name in names), padding=5)
    for name, one, two in zip(names, before, after, strict=True):
        torch.testing.assert_close(torch.cat([one, two]), wanted[name], **toys.CLOSE)


def test_requests_that_come_after_it(rank: toys.Rank, worker: Any) -> None:
    """Rows whose content is known to be there are not filled again by `add`, so they must be there."""
    rank.add("a")
    rank.steering.remove("a")
    worker.sleep(2)
    worker.wake_up(["weights"])
    rank.add("a")
    (found,) = rank.step(("a", 0, toys.TOTAL))
    torch.testing.assert_close(found, toys.alone()["a"], **toys.CLOSE)


def test_nothing_reads_weights_in_it(rank: toys.Rank, worker: Any) -> None:
    worker.sleep(1)
    for ask in (
        lambda: worker_methods.steer_begin(worker, "folder", "d"),
        lambda: worker_methods.steer_commit(worker, "d"),
        lambda: worker_methods.steer_adapter(worker, None, "d"),
    ):
        answer = ask()
        assert (answer["state"], answer["code"]) == ("failed", "engine_unavailable")
        assert "sleeps" in answer["message"]
    assert worker_methods.steer_reproject(worker, True) == {"state": "busy"}
    assert worker_methods.steer_repack(worker) == {"state": "busy"}
    worker.wake_up(["kv_cache"])
    assert rank.steering.asleep, "the weights are not there yet"
    worker.wake_up(["weights"])
    assert not rank.steering.asleep


def test_loads_end_before_it(rank: toys.Rank, worker: Any) -> None:
    joined: list[bool] = []
    rank.steering.pending["d"] = SimpleNamespace(thread=SimpleNamespace(join=lambda: joined.append(True)))  # type: ignore[assignment]
    worker.sleep(1)
    assert joined == [True]


def test_a_worker_without_steering(worker: Any) -> None:
    worker.model_runner = SimpleNamespace()
    worker.sleep(1)
    worker.wake_up()


def test_a_call_in_it_is_followed_by_nothing(rank: toys.Rank, worker: Any) -> None:
    """The tables are not there either: what was loaded is served again when they are."""

    class Core:
        steering = rank.admission

        def collective_rpc(self, method: Any, timeout: float | None = None, args: Any = ()) -> list[Any]:
            return [getattr(worker_methods, method)(worker, *args) if method.startswith("steer_") else "its result"]

    def ask(core: Any, method: str, *args: Any) -> Any:
        answers = core.collective_rpc(weights.Own(method), args=args)
        return answers[0], answers

    weights.install(Core, ask)
    worker.sleep(2)
    rank.steering.tables.refill = None  # type: ignore[assignment, method-assign]
    assert Core().collective_rpc("reset") == ["its result"]
    rank.add("a")


@pytest.mark.parametrize("on", [True, False])
def test_it_is_touched_where_it_is_on(on: bool) -> None:
    class Worker:
        def __init__(self, vllm_config: Any) -> None: ...

        def sleep(self, level: int = 1) -> None: ...

        def wake_up(self, tags: list[str] | None = None) -> None: ...

    worker_methods._patch_init(Worker)
    config = toys.vllm_config()
    config.model_config.enable_sleep_mode = on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_methods.refusals, "check", lambda config: None)
        made = Worker(config)
    assert ("sleep" in vars(made), "wake_up" in vars(made)) == (on, on)
