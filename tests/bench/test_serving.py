"""Which modes a serving benchmark runs, and what its table says; no server."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from steer_vllm.errors import BenchmarkInvalid

Script = Callable[[str], ModuleType]


def test_modes(script: Script) -> None:
    serving = script("serving")
    modes = {mode.name: mode for mode in serving.choose("loreft", (1, 3), (2,), None)}
    assert list(modes) == ["plain", "eager", "idle", "shared", "distinct-1", "distinct-3", "lora-2"]
    assert modes["distinct-3"].models == ("base:loreft-0", "base:loreft-1", "base:loreft-2")
    assert modes["lora-2"].models == ("lora-0", "lora-1")
    assert {modes[name].server for name in ("idle", "shared", "distinct-1")} == {"steered"}
    assert [mode.name for mode in serving.choose("direction", (8,), (), "distinct-8")] == ["plain", "distinct-8"]
    with pytest.raises(BenchmarkInvalid, match="distinct-9"):
        serving.choose("direction", (8,), (), "distinct-9")


def sample(number: int, mode: str, rate: float) -> dict[str, Any]:
    times = {f"{metric}_ms": 1000 / rate for metric in ("ttft", "tpot", "itl", "e2el")}
    return {"round": number, "mode": mode, "tokens_per_second": rate, **times}


def test_a_mode_is_compared_within_its_round(script: Script) -> None:
    serving = script("serving")
    from harness import turns  # type: ignore[import-not-found]

    modes = serving.choose("direction", (), (), "idle")
    samples = [sample(0, "idle", 90), sample(0, "plain", 100), sample(1, "plain", 200), sample(1, "idle", 180)]
    rows = turns.table(modes, samples)
    assert [(row["mode"], row["of_plain"]["median"]) for row in rows] == [("plain", 1.0), ("idle", 0.9)]
    assert rows[1]["ttft_ms"]["median"] == pytest.approx((1000 / 90 + 1000 / 180) / 2)
    assert "| plugin on, nothing asked for | 135 | 90.0% | 2 rounds |" in "\n".join(turns.lines(rows, samples))
    enough = [sample(number, mode.name, 90.0) for number in range(5) for mode in modes]
    assert "| 90 | 100.0% | 100.0 to 100.0% |" in "\n".join(turns.lines(turns.table(modes, enough), enough))
