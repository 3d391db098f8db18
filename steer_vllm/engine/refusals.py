"""The settings of vLLM under which an intervention would not be exact: refused at start-up, by name.

One row per setting: how it is recognised and why it is refused. A row goes when a test shows the combination to work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import StartupRefused
from . import connectors, variables


class Refusal(NamedTuple):
    """A setting that is refused. applies: takes vLLM's VllmConfig."""

    setting: str
    reason: str
    applies: Callable[[Any], bool]


SEVERAL_FRONTS = "each front reaches some of the engines and would have interventions of its own"

_PARTIAL_ROWS = "a rank holds only some of the token rows between layers"
_UNTRIED_DRAFTS = ("suffix", "ngram_gpu")
_NOT_CAUSAL = "attention is not causal, and the cache keys rest on it"

REFUSALS = (
    Refusal(
        "data_parallel_external_lb / data_parallel_hybrid_lb",
        SEVERAL_FRONTS,
        lambda config: (
            config.parallel_config.data_parallel_external_lb or config.parallel_config.data_parallel_hybrid_lb
        ),
    ),
    Refusal(
        "data parallelism of a mixture of experts",
        "its engines step together, and one that turns a request away would leave the others waiting",
        lambda config: config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe,
    ),
    Refusal(
        "enable_dbo / ubatch_size (ubatching)",
        "half of a split batch would read the other half's token slots",
        lambda config: config.parallel_config.use_ubatching,
    ),
    Refusal(
        "prefill_context_parallel_size > 1",
        "a rank sees only some of the positions of a prompt",
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
    ),
    Refusal(
        "decode_context_parallel_size > 1",
        "heads and keys are spread over ranks in another way, which has not been tested",
        lambda config: config.parallel_config.decode_context_parallel_size > 1,
    ),
    Refusal(
        "sequence-parallel MoE",
        _PARTIAL_ROWS,
        lambda config: config.parallel_config.use_sequence_parallel_moe,
    ),
    Refusal(
        "pass_config.enable_sp (sequence parallelism)",
        _PARTIAL_ROWS,
        lambda config: getattr(config.compilation_config.pass_config, "enable_sp", False),  # gone in 0.32
    ),
    Refusal(
        "enable_hc_sp (sequence-parallel hyper-connections)",
        _PARTIAL_ROWS,
        lambda config: getattr(config.parallel_config, "enable_hc_sp", False),  # since 0.32
    ),
    Refusal(
        "enable_elastic_ep",
        "engines that join later hold no interventions",
        lambda config: config.parallel_config.enable_elastic_ep,
    ),
    Refusal(
        "enable_fault_tolerance",
        "what a rank holds after a recovery has not been tested",
        lambda config: getattr(config.parallel_config, "enable_fault_tolerance", False),  # since 0.32
    ),
    Refusal(
        "distributed_executor_backend external_launcher",
        "every process loads for itself: one that fails would leave the others waiting",
        lambda config: config.parallel_config.distributed_executor_backend == "external_launcher",
    ),
    Refusal(
        "scheduler_cls",
        "a scheduler that vLLM does not bring may free requests where nobody releases their rows",
        lambda config: not _is_vllm_class(config.scheduler_config.scheduler_cls),
    ),
    Refusal(
        "kv_sharing_fast_prefill",
        "layers skip prompt tokens",
        lambda config: config.cache_config.kv_sharing_fast_prefill,
    ),
    Refusal(
        "KV connectors that hash token ids themselves (LMCache, FlexKV, HF3FS, ExampleConnector)",
        "they would serve one request's edited keys and values to another",
        lambda config: connectors.kind(config) == "hashing",
    ),
    Refusal(
        "KV connectors between engines (NIXL, Mooncake, MoRI-IO)",
        "the engine that decodes does not know what the one that prefilled has edited",
        lambda config: connectors.kind(config) == "transferring",
    ),
    Refusal(
        "other KV connectors, and OffloadingConnector with a spec of another kind",
        "they have not been seen to carry the edits' keys",
        lambda config: connectors.kind(config) == "other",
    ),
    Refusal(
        "speculative_config: drafts that read hidden states (EAGLE, MTP, Medusa, ...), custom classes",
        "they read what is edited, and that has not been tried; ngram and draft models are served",
        lambda config: _drafts(config) not in (None, "ngram", "draft_model", *_UNTRIED_DRAFTS),
    ),
    Refusal(
        "speculative_config: suffix, ngram_gpu",
        "they have not been tried; ngram and draft models are served",
        lambda config: _drafts(config) in _UNTRIED_DRAFTS,
    ),
    Refusal(
        "speculative_config: rejection_sample_method block",
        "it has not been tried; standard is served",
        lambda config: _rejects(config) == "block",
    ),
    Refusal(
        "speculative_config: rejection_sample_method synthetic, fly",
        "tokens are accepted that the edited model would not have said",
        lambda config: _rejects(config) not in ("standard", "block"),
    ),
    Refusal(
        "cpu_offload_gb / offload_group_size (weights in host memory)",
        "the offloader puts a layer's own forward back after its first call, without the edit",
        lambda config: (
            config.offload_config.uva.cpu_offload_gb > 0 or config.offload_config.prefetch.offload_group_size > 0
        ),
    ),
    Refusal(
        "monokernel",
        "one kernel computes several layers, past their outputs",
        lambda config: getattr(config.kernel_config, "monokernel", False),  # since 0.33
    ),
    Refusal(
        "enable_sleep_mode",
        "waking up has not been seen on a GPU yet (tests/gpu/test_sleep.py)",
        lambda config: config.model_config.enable_sleep_mode,
    ),
    Refusal(
        "weight_transfer_config",
        "weights come in pieces, and between these head offsets fit neither the former nor the new ones",
        lambda config: config.weight_transfer_config is not None,
    ),
    Refusal(
        "encoder-decoder models",
        "the decoder's prompt is not the request's prompt",
        lambda config: config.model_config.is_encoder_decoder,
    ),
    Refusal(
        "pooling models",
        "there is no generation to edit",
        lambda config: config.model_config.runner_type == "pooling",
    ),
    Refusal(
        "models that attend to an image in both directions (is_mm_prefix_lm)",
        _NOT_CAUSAL,
        lambda config: config.model_config.is_mm_prefix_lm,
    ),
    Refusal(
        "mm_encoder_only",
        "there is no decoder to edit",
        lambda config: bool(getattr(config.model_config.multimodal_config, "mm_encoder_only", False)),
    ),
    Refusal(
        "diffusion language models",
        _NOT_CAUSAL,
        lambda config: config.model_config.is_diffusion,
    ),
    Refusal(
        "bidirectional models (is_causal false, use_non_causal)",
        _NOT_CAUSAL,
        lambda config: (
            config.attention_config.use_non_causal
            or getattr(config.model_config.hf_text_config, "is_causal", True) is False
        ),
    ),
    Refusal(
        "models that replay a prompt's last window (DeepSeek-V4.1)",
        "late layers run on part of the token rows",
        lambda config: "deepseek_v41" in _model_types(config.model_config),
    ),
    Refusal(
        "fp16 DeepSeek",
        "the model rescales its residual stream",
        lambda config: str(config.model_config.dtype) == "torch.float16" and _scales_experts(config.model_config),
    ),
    Refusal(
        variables.RUST,
        variables.REFUSED[variables.RUST],
        lambda config: variables.is_on(variables.RUST, os.environ),
    ),
)


def _is_vllm_class(scheduler: str | type | None) -> bool:
    """None is vLLM's choice; vLLM itself also sets names of its own."""
    name = scheduler if isinstance(scheduler, str) else getattr(scheduler, "__module__", "vllm.")
    return name.startswith("vllm.")


def _drafts(config: Any) -> str | None:
    """The method of speculation; None without."""
    return None if config.speculative_config is None else config.speculative_config.method


def _rejects(config: Any) -> str:
    """How drafted tokens are accepted."""
    return getattr(config.speculative_config, "rejection_sample_method", "standard")


def _scales_experts(model: Any) -> bool:
    """DeepSeek and models built of its layers (Kimi K2 among them)."""
    return "deepseek" in _model_types(model) or getattr(model.hf_text_config, "routed_scaling_factor", None) is not None


def _model_types(model: Any) -> str:
    """Of the whole and of its text part, which differ in multi-modal models."""
    return f"{model.hf_config.model_type} {model.hf_text_config.model_type}"


def check(vllm_config: Any) -> None:
    """Errors: `StartupRefused` listing every refused setting that is on."""
    hits = [f"{refusal.setting}: {refusal.reason}" for refusal in REFUSALS if refusal.applies(vllm_config)]
    if hits:
        raise StartupRefused("steer-vllm does not serve with\n  " + "\n  ".join(hits))
