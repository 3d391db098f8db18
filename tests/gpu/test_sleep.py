"""Sleep and wake on a GPU: answers after it are those before it, at both levels, eager and with graphs.

Needs vLLM's CUDA build. Sleep mode is refused until this has passed: the refusal is lifted here alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steer_vllm.demo import MODEL_PATH
from steer_vllm.engine import refusals
from steer_vllm.errors import EngineUnavailable
from steer_vllm.fingerprint import Fingerprint

PROMPT = [20 + (7 * i) % 50 for i in range(40)]
ASKS: list[Any] = [None, [{"name": "lofit"}], [{"name": "reft"}, {"name": "lofit", "scale": -0.5}]]


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("level", [1, 2])
def test_answers_after_waking_up(level: int, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import artifacts

    from steer_vllm import LLM, SamplingParams

    served = tuple(row for row in refusals.REFUSALS if row.setting != "enable_sleep_mode")
    monkeypatch.setattr(refusals, "REFUSALS", served)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    base = Fingerprint.of(MODEL_PATH)
    llm = LLM(
        str(MODEL_PATH), dtype="bfloat16", enforce_eager=eager, enable_sleep_mode=True, gpu_memory_utilization=0.3
    )
    for name, item in {"lofit": artifacts.lofit(base, 1), "reft": artifacts.loreft(base, 2, "f2+l2")}.items():
        item.save(tmp_path / name)
        llm.load_intervention(name, tmp_path / name)

    def answers() -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        prompts = [{"prompt_token_ids": PROMPT} for _ in ASKS]
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, interventions=ASKS)]

    before = answers()
    assert len({tuple(tokens) for tokens in before}) == len(ASKS), "every request has an answer of its own"
    llm.sleep(level)
    artifacts.lofit(base, 3).save(tmp_path / "late")
    with pytest.raises(EngineUnavailable, match="sleeps"):
        llm.load_intervention("late", tmp_path / "late")
    if level == 2:
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    else:
        llm.wake_up()
    assert answers() == before
