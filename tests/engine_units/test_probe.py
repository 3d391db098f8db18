"""What lies inside the time that the probe measures: the engine's work and nothing else. No engine is started."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

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
            probe._steps.append((7.0, ["a"]))
            return []

    def clock() -> float:
        seen.append("clock")
        return 5.0

    probe = Probe.__new__(Probe)
    vars(probe).update(_llm=Engine(), _caches=True, _steps=[], _share=None)
    monkeypatch.setattr(time, "monotonic", clock)
    answer = probe.run([[1, 2]], tokens=1, repeats=2)
    assert seen == ["cache emptied", "clock", "generate"] * 2
    assert [run["first_tokens"] for run in answer["runs"]] == [2.0, 2.0]


def test_what_an_engine_waits_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 60 ms and a share of 100: it lets others work after every second one, and stands still for an hour."""
    now = 1000.0
    waits: list[float] = []

    def wait() -> None:
        nonlocal now
        waits.append(now)
        now += 3600.0

    class Engine:
        def generate(self, *_: Any, **__: Any) -> list[Any]:
            for _ in range(7):
                step()
            return []

    def output() -> Any:
        nonlocal now
        now += 0.06
        return SimpleNamespace(timestamp=now, outputs=[SimpleNamespace(request_id="a", new_token_ids=[1])])

    probe = Probe.__new__(Probe)
    vars(probe).update(_llm=Engine(), _caches=False, _steps=[], _wait=wait, _share=None, _went_on=0.0, _waited=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    step = probe._noting(output)
    for _ in range(2):  # the second begins anew
        waits.clear()
        (run,) = probe.run([[1, 2]], tokens=7, share=0.1)["runs"]
        assert np.diff(run["decode"]).tolist() == pytest.approx([0.06] * 6)
        assert run["first_tokens"] == pytest.approx(0.06)
        assert len(waits) == 3
    step()
    step()
    assert len(waits) == 3, "between two runs it does not wait"
