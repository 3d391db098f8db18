"""What lies inside the time that the probe measures: the engine's work and nothing else. No engine is started."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steer_vllm.engine import probe
from steer_vllm.engine.probe import Probe


def test_only_the_engine_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix cache is emptied and prompts are made before the clock is read."""
    seen: list[str] = []

    class Engine:
        def reset_prefix_cache(self) -> bool:
            seen.append("cache emptied")
            return True

        def generate(self, asked: Any, params: Any, **_: Any) -> list[Any]:
            assert asked == [{"prompt_token_ids": [1, 2]}]
            seen.append("generate")
            probed._stretches[-1].append((7.0, ["a"]))
            return []

    def clock() -> float:
        seen.append("clock")
        return 5.0

    probed = Probe.__new__(Probe)
    vars(probed).update(_llm=Engine(), _caches=True)
    monkeypatch.setattr(time, "monotonic", clock)
    answer = probed.run([[1, 2]], tokens=1, repeats=2)
    assert seen == ["cache emptied", "clock", "generate"] * 2
    assert [run["first_tokens"] for run in answer["runs"]] == [2.0, 2.0]


class Stepping:
    """An engine whose first step takes one of two prompts only; a step takes 60 ms, and to get its output 5."""

    now = 1000.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.waits = 0
        self.probe = Probe.__new__(Probe)
        vars(self.probe).update(_llm=self, _caches=False, _wait=self.wait, _share=None)
        self.output = self.probe._noting(self.step)

    def wait(self) -> None:
        self.waits += 1
        self.now += 3600.0

    def step(self) -> Any:
        self.now += 0.06
        ended = self.now
        self.now += 0.005
        return SimpleNamespace(
            timestamp=ended, outputs=[SimpleNamespace(request_id=one, new_token_ids=[1]) for one in self.requests]
        )

    def generate(self, *_: Any, **__: Any) -> list[Any]:
        for self.requests in ("a", "ab", "ab", "ab", "ab", "ab", "b"):
            self.output()
        return []


def test_what_an_engine_waits_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each share it stands still for an hour; the step that begins then is left out."""
    engine = Stepping(monkeypatch)
    for _ in range(2):  # the second begins anew
        engine.waits = 0
        (run,) = engine.probe.run([[1, 2], [3]], tokens=6, share=2)["runs"]
        assert [len(ends) for ends in run["decode"]] == [2, 2, 1]
        assert [np.diff(ends).tolist() for ends in run["decode"]] == [[pytest.approx(0.065)]] * 2 + [[]]
        assert run["first_tokens"] == pytest.approx(0.065 + 0.06)
        assert engine.waits == 2
    engine.output()
    engine.output()
    assert engine.waits == 2, "between two runs it does not wait"


def test_alone_an_engine_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Stepping(monkeypatch)
    (run,) = engine.probe.run([[1, 2], [3]], tokens=6)["runs"]
    assert [len(ends) for ends in run["decode"]] == [5]
    assert not engine.waits


@pytest.mark.parametrize(
    ("said", "then"), [(['{"call": "go on"}'], ["ran"]), (['{"call": "run"}'], ["error"]), ([], [])]
)
def test_the_conversation_while_it_waits(monkeypatch: pytest.MonkeyPatch, said: list[str], then: list[str]) -> None:
    """It goes on when it is told so, refuses anything else, and ends with who asks."""

    class Waiting:
        def __init__(self, wait: Any, **_: Any) -> None:
            self.facts: dict[str, Any] = {}
            self.run = lambda: wait() or {"ran": True}

    answers = []
    ours, theirs = socket.socketpair()

    def ask() -> None:
        with ours, ours.makefile("rw") as lines:
            for line in ("{}", '{"call": "run"}', *said):
                lines.write(line + "\n")
                lines.flush()
                answers.append(json.loads(lines.readline()))

    monkeypatch.setattr(sys, "argv", ["probe", str(theirs.detach())])
    monkeypatch.setattr(probe, "Probe", Waiting)
    asking = threading.Thread(target=ask)
    asking.start()
    with nullcontext() if said else pytest.raises(SystemExit):
        probe.main()
    asking.join()
    assert answers[:2] == [{}, {"waits": True}]
    assert [next(iter(answer)) for answer in answers[2:]] == then
