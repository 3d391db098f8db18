"""Settings under which an edit would not be exact: each is refused alone, by name, and a plain setting is not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steer_vllm.engine.refusals import REFUSALS, check
from steer_vllm.errors import StartupRefused


def plain() -> Any:
    """What these settings are in an ordinary VllmConfig."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=1, use_ubatching=False, prefill_context_parallel_size=1, use_sequence_parallel_moe=False
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        kv_transfer_config=None,
        weight_transfer_config=None,
        model_config=SimpleNamespace(
            is_diffusion=False,
            enable_sleep_mode=False,
            is_encoder_decoder=False,
            runner_type="generate",
            is_multimodal_model=False,
            hf_config=SimpleNamespace(model_type="llama"),
            dtype=torch.float16,
        ),
    )


def deepseek(config: Any) -> None:
    config.model_config.hf_config.model_type = "deepseek_v3"


ON: dict[str, Callable[[Any], object]] = {
    "data_parallel_size > 1": lambda c: setattr(c.parallel_config, "data_parallel_size", 2),
    "enable_dbo / ubatch_size (ubatching)": lambda c: setattr(c.parallel_config, "use_ubatching", True),
    "prefill_context_parallel_size > 1": lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2),
    "sequence-parallel MoE": lambda c: setattr(c.parallel_config, "use_sequence_parallel_moe", True),
    "pass_config.enable_sp (sequence parallelism)": lambda c: setattr(
        c.compilation_config.pass_config, "enable_sp", True
    ),
    "kv_sharing_fast_prefill": lambda c: setattr(c.cache_config, "kv_sharing_fast_prefill", True),
    "kv_transfer_config (KV connectors)": lambda c: setattr(c, "kv_transfer_config", object()),
    "encoder-decoder models": lambda c: setattr(c.model_config, "is_encoder_decoder", True),
    "pooling models": lambda c: setattr(c.model_config, "runner_type", "pooling"),
    "multi-modal models": lambda c: setattr(c.model_config, "is_multimodal_model", True),
    "diffusion language models": lambda c: setattr(c.model_config, "is_diffusion", True),
    "enable_sleep_mode": lambda c: setattr(c.model_config, "enable_sleep_mode", True),
    "weight_transfer_config": lambda c: setattr(c, "weight_transfer_config", object()),
    "fp16 DeepSeek": deepseek,
}
RUST = "VLLM_USE_RUST_FRONTEND"


def test_every_row_is_tested() -> None:
    assert {refusal.setting for refusal in REFUSALS} == {*ON, RUST}


def test_a_plain_setting_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUST, raising=False)
    check(plain())


@pytest.mark.parametrize("setting", ON)
def test_each_alone(setting: str) -> None:
    config = plain()
    ON[setting](config)
    hits = [refusal for refusal in REFUSALS if refusal.applies(config)]
    assert [refusal.setting for refusal in hits] == [setting]
    with pytest.raises(StartupRefused) as caught:
        check(config)
    assert setting in caught.value.message
    assert hits[0].reason in caught.value.message


def test_all_are_said_at_once() -> None:
    config = plain()
    for turn_on in ON.values():
        turn_on(config)
    with pytest.raises(StartupRefused) as caught:
        check(config)
    assert all(setting in caught.value.message for setting in ON)


def test_deepseek_in_bfloat16_is_served() -> None:
    config = plain()
    deepseek(config)
    config.model_config.dtype = torch.bfloat16
    check(config)


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_rust_front_end(value: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUST, value)
    if refused:
        with pytest.raises(StartupRefused, match=RUST):
            check(plain())
    else:
        check(plain())


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("ParallelConfig", ["data_parallel_size", "use_ubatching", "prefill_context_parallel_size",
                            "use_sequence_parallel_moe"]),
        ("CacheConfig", ["kv_sharing_fast_prefill"]),
        ("ModelConfig", ["is_encoder_decoder", "runner_type", "is_multimodal_model", "hf_config", "dtype"]),
        ("CompilationConfig", ["pass_config"]),
        ("VllmConfig", ["kv_transfer_config", "parallel_config", "compilation_config", "cache_config"]),
    ],
)  # fmt: skip
def test_the_installed_vllm_has_these_settings(part: str, names: list[str]) -> None:
    """A setting that was renamed would be refused no longer: that fails here. (`enable_sp` is gone in 0.32.)"""
    from vllm import config

    kind = getattr(config, part)
    source = inspect.getsource(kind)
    missing = [
        name for name in names if not hasattr(kind, name) and not re.search(rf"\b(self\.)?{name}\b *[:=]", source)
    ]
    assert not missing
