"""What lies inside the time that the probe measures: the engine's work and nothing else. No engine is started."""

from __future__ import annotations

import time
from typing import Any

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
    vars(probe).update(_llm=Engine(), _caches=True, _steps=[])
    monkeypatch.setattr(time, "monotonic", clock)
    answer = probe.run([[1, 2]], tokens=1, repeats=2)
    assert seen == ["cache emptied", "clock", "generate"] * 2
    assert [run["first_tokens"] for run in answer["runs"]] == [2.0, 2.0]
