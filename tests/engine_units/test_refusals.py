"""Settings under which an edit would not be exact: each is refused alone, by name, and a plain setting is not.

The settings are vLLM's own: its arguments where a machine without a GPU takes them, else the field they set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from steer_vllm.demo import MODEL_PATH
from steer_vllm.engine import connectors
from steer_vllm.engine.refusals import REFUSALS, check
from steer_vllm.errors import StartupRefused

RUST = "VLLM_USE_RUST_FRONTEND"


class Case(NamedTuple):
    """How a setting is turned on: arguments of vLLM, then fields of its config that this platform would not take."""

    arguments: dict[str, Any] = {}  # noqa: RUF012
    fields: Callable[[Any], object] = lambda config: None


def config_of(arguments: dict[str, Any]) -> VllmConfig:
    plain = {"model": str(MODEL_PATH), "dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    return EngineArgs(**{**plain, **arguments}).create_engine_config()


def parallel(**fields: Any) -> Case:
    def turn_on(config: VllmConfig) -> None:
        for name, value in fields.items():
            assert hasattr(config.parallel_config, name), f"vLLM has renamed {name}"
            setattr(config.parallel_config, name, value)

    return Case(fields=turn_on)


def experts_in_two_engines(config: VllmConfig) -> None:
    assert not config.model_config.is_moe
    config.model_config.model_arch_config.num_experts = 4
    assert config.model_config.is_moe
    config.parallel_config.data_parallel_size = 2


def overrides(**fields: Any) -> Case:
    """What a model's own config.json would say."""
    dtype = {"dtype": fields.pop("dtype")} if "dtype" in fields else {}
    return Case({"hf_overrides": fields, **dtype})


def connector(name: str, **fields: Any) -> Case:
    return Case({"kv_transfer_config": KVTransferConfig(kv_connector=name, kv_role="kv_both", **fields)})


def speculation(**fields: Any) -> Case:
    """N-gram speculation with other fields."""

    def turn_on(config: VllmConfig) -> None:
        for name, value in fields.items():
            assert hasattr(config.speculative_config, name), f"vLLM has renamed {name}"
            setattr(config.speculative_config, name, value)

    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    return Case({"speculative_config": ngram}, turn_on)


ON: dict[str, Case] = {
    "data_parallel_external_lb / data_parallel_hybrid_lb": parallel(data_parallel_hybrid_lb=True),
    "data parallelism of a mixture of experts": Case(fields=experts_in_two_engines),
    "enable_dbo / ubatch_size (ubatching)": parallel(enable_dbo=True),
    "prefill_context_parallel_size > 1": parallel(prefill_context_parallel_size=2),
    "decode_context_parallel_size > 1": parallel(decode_context_parallel_size=2),
    "sequence-parallel MoE": parallel(enable_expert_parallel=True, tensor_parallel_size=2, data_parallel_size=2),
    "pass_config.enable_sp (sequence parallelism)": Case(
        fields=lambda c: setattr(c.compilation_config.pass_config, "enable_sp", True)
    ),
    "enable_hc_sp (sequence-parallel hyper-connections)": Case({"enable_hc_sp": True}),
    "enable_elastic_ep": parallel(enable_elastic_ep=True),
    "enable_fault_tolerance": parallel(enable_fault_tolerance=True),
    "distributed_executor_backend external_launcher": Case({"distributed_executor_backend": "external_launcher"}),
    "scheduler_cls": Case({"scheduler_cls": "mine.Scheduler"}),
    "kv_sharing_fast_prefill": Case({"kv_sharing_fast_prefill": True}),
    "KV connectors that hash token ids themselves (LMCache, FlexKV, HF3FS, ExampleConnector)": connector(
        "LMCacheConnectorV1"
    ),
    "KV connectors between engines (NIXL, Mooncake, MoRI-IO)": connector("NixlConnector"),
    "other KV connectors, and OffloadingConnector with a spec of another kind": connector("MultiConnector"),
    "speculative_config: drafts that read hidden states (EAGLE, MTP, Medusa, ...), custom classes": speculation(
        method="eagle"
    ),
    "speculative_config: suffix, ngram_gpu": speculation(method="suffix"),
    "speculative_config: rejection_sample_method block": speculation(rejection_sample_method="block"),
    "speculative_config: rejection_sample_method synthetic, fly": speculation(rejection_sample_method="synthetic"),
    "cpu_offload_gb / offload_group_size (weights in host memory)": Case({"offload_group_size": 2}),
    "monokernel": Case(fields=lambda c: setattr(c.kernel_config, "monokernel", True)),
    "enable_sleep_mode": Case(fields=lambda c: setattr(c.model_config, "enable_sleep_mode", True)),
    "weight_transfer_config": Case({"weight_transfer_config": {"backend": "nccl"}}),
    "encoder-decoder models": overrides(is_encoder_decoder=True),
    "pooling models": Case({"runner": "pooling", "convert": "embed"}),
    "models that attend to an image in both directions (is_mm_prefix_lm)": overrides(is_mm_prefix_lm=True),
    "mm_encoder_only": Case(fields=lambda c: setattr(c.model_config, "multimodal_config", EncoderOnly)),
    "diffusion language models": Case(fields=lambda c: c.model_config.__dict__.update(is_diffusion=True)),
    "bidirectional models (is_causal false, use_non_causal)": overrides(is_causal=False),
    "models that replay a prompt's last window (DeepSeek-V4.1)": Case(
        # As an override vLLM would tell transformers, for good, that this model's type means DeepSeek's config.
        fields=lambda c: setattr(c.model_config.hf_config, "model_type", "deepseek_v41")
    ),
    "fp16 DeepSeek": overrides(dtype="float16", routed_scaling_factor=2.5),
}


class EncoderOnly:
    """Of a `MultiModalConfig`, which only a multi-modal checkpoint has."""

    mm_encoder_only = True


def test_every_row_is_tested() -> None:
    assert {refusal.setting for refusal in REFUSALS} == {*ON, RUST}


def test_a_plain_setting_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUST, raising=False)
    check(config_of({}))


@pytest.mark.parametrize("setting", ON)
def test_each_alone(setting: str) -> None:
    config = config_of(ON[setting].arguments)
    ON[setting].fields(config)
    names = {refusal.setting: refusal for refusal in REFUSALS if refusal.applies(config)}
    assert set(names) == {setting}
    with pytest.raises(StartupRefused) as caught:
        check(config)
    assert f"{setting}: {names[setting].reason}" in caught.value.message


def test_other_ways_to_the_same() -> None:
    """A refused setting has more than one name in vLLM."""
    for arguments, field, setting in (
        ({"cpu_offload_gb": 1.0}, None, "cpu_offload_gb / offload_group_size (weights in host memory)"),
        (
            {"attention_config": {"use_non_causal": True}},
            None,
            "bidirectional models (is_causal false, use_non_causal)",
        ),
        ({}, "ubatch_size", "enable_dbo / ubatch_size (ubatching)"),
    ):
        config = config_of(arguments)
        if field:
            setattr(config.parallel_config, field, 2)
        assert [refusal.setting for refusal in REFUSALS if refusal.applies(config)] == [setting]


def test_all_are_said_at_once() -> None:
    config = config_of({"kv_sharing_fast_prefill": True, "weight_transfer_config": {"backend": "nccl"}})
    with pytest.raises(StartupRefused) as caught:
        check(config)
    assert all(name in caught.value.message for name in ("kv_sharing_fast_prefill", "weight_transfer_config"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deepseek_in_other_dtypes_is_served(dtype: str) -> None:
    check(config_of(overrides(dtype=dtype, routed_scaling_factor=2.5).arguments))


def test_external_load_balancing_is_refused_too() -> None:
    config = config_of({})
    parallel(data_parallel_external_lb=True).fields(config)
    with pytest.raises(StartupRefused, match="data_parallel_external_lb"):
        check(config)


def test_data_parallelism_is_served() -> None:
    check(config_of({"data_parallel_size": 2}))


def test_a_scheduler_of_vllm_is_served() -> None:
    check(config_of({"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"}))


@pytest.mark.parametrize(
    ("value", "refused"), [("1", True), ("true", True), ("0", False), ("", False), ("False", False)]
)
def test_the_rust_front_end(value: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of({})
    monkeypatch.setenv(RUST, value)
    if refused:
        with pytest.raises(StartupRefused, match=RUST):
            check(config)
    else:
        check(config)


OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector"
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "none"),
    "kv_offloading_size": ({"kv_offloading_size": 1.0}, "exact"),
    "OffloadingConnector": (connector("OffloadingConnector").arguments, "exact"),
    "its tiers": (
        connector("OffloadingConnector", kv_connector_extra_config={"spec_name": "TieringOffloadingSpec"}).arguments,
        "other",
    ),
    "somebody's of that name": (
        connector(
            "OffloadingConnector",
            kv_connector_module_path=OFFLOADING,
        ).arguments,
        "other",
    ),
    "ExampleConnector": (connector("ExampleConnector").arguments, "hashing"),
    "HF3FSKVConnector": (connector("HF3FSKVConnector").arguments, "hashing"),
    "FlexKVConnectorV1": (connector("FlexKVConnectorV1").arguments, "hashing"),
    "MooncakeConnector": (connector("MooncakeConnector").arguments, "transferring"),
    "MooncakeStoreConnector": (connector("MooncakeStoreConnector").arguments, "other"),
    "SimpleCPUOffloadConnector": (connector("SimpleCPUOffloadConnector").arguments, "other"),
    "DecodeBenchConnector": (connector("DecodeBenchConnector").arguments, "other"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_connectors(name: str) -> None:
    arguments, expected = KINDS[name]
    assert connectors.kind(config_of(arguments)) == expected


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_plain_speculation_is_served(method: str) -> None:
    config = config_of(speculation().arguments)
    speculation(method=method).fields(config)
    check(config)


def test_speculation_on_the_gpu_is_refused_too() -> None:
    config = config_of(speculation().arguments)
    speculation(method="ngram_gpu").fields(config)
    with pytest.raises(StartupRefused, match="suffix, ngram_gpu: they have not been tried"):
        check(config)
