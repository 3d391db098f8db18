"""The settings of vLLM under which an intervention would not be exact: refused at start-up, by name.

One row per setting: how it is recognised and why it is refused. A row goes when a test shows the combination to work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import StartupRefused


class Refusal(NamedTuple):
    """A setting that is refused. applies: takes vLLM's VllmConfig."""

    setting: str
    reason: str
    applies: Callable[[Any], bool]


REFUSALS = (
    Refusal(
        "data_parallel_size > 1",
        "loading does not yet reach every engine",
        lambda config: config.parallel_config.data_parallel_size > 1,
    ),
    Refusal(
        "enable_dbo / ubatch_size (ubatching)",
        "half of a split batch would read the other half's token slots",
        lambda config: bool(getattr(config.parallel_config, "use_ubatching", False)),
    ),
    Refusal(
        "prefill_context_parallel_size > 1",
        "a rank sees only some of the positions of a prompt",
        lambda config: getattr(config.parallel_config, "prefill_context_parallel_size", 1) > 1,
    ),
    Refusal(
        "sequence-parallel MoE",
        "a rank holds only some of the token rows between layers",
        lambda config: bool(getattr(config.parallel_config, "use_sequence_parallel_moe", False)),
    ),
    Refusal(
        "pass_config.enable_sp (sequence parallelism)",
        "a rank holds only some of the token rows between layers",
        lambda config: bool(getattr(config.compilation_config.pass_config, "enable_sp", False)),
    ),
    Refusal(
        "kv_sharing_fast_prefill",
        "layers skip prompt tokens",
        lambda config: bool(config.cache_config.kv_sharing_fast_prefill),
    ),
    Refusal(
        "kv_transfer_config (KV connectors)",
        "a connector that hashes token ids itself would serve one request's edited keys and values to another",
        lambda config: config.kv_transfer_config is not None,
    ),
    Refusal(
        "encoder-decoder models",
        "the decoder's prompt is not the request's prompt",
        lambda config: bool(config.model_config.is_encoder_decoder),
    ),
    Refusal(
        "pooling models",
        "there is no generation to edit",
        lambda config: config.model_config.runner_type == "pooling",
    ),
    Refusal(
        "multi-modal models",
        "images may be attended to in both directions, which the cache keys do not cover",
        lambda config: bool(config.model_config.is_multimodal_model),
    ),
    Refusal(
        "diffusion language models",
        "attention is not causal, and the cache keys rest on it",
        lambda config: bool(getattr(config.model_config, "is_diffusion", False)),
    ),
    Refusal(
        "enable_sleep_mode",
        "waking up does not yet restore the tables of requests",
        lambda config: bool(getattr(config.model_config, "enable_sleep_mode", False)),
    ),
    Refusal(
        "weight_transfer_config",
        "compiled head offsets belong to the weights they were loaded with",
        lambda config: getattr(config, "weight_transfer_config", None) is not None,
    ),
    Refusal(
        "fp16 DeepSeek",
        "the model rescales its residual stream",
        lambda config: (
            "deepseek" in str(getattr(config.model_config.hf_config, "model_type", ""))
            and str(config.model_config.dtype) == "torch.float16"
        ),
    ),
    Refusal(
        "VLLM_USE_RUST_FRONTEND",
        "the Rust front end loads no Python middleware, so the interventions field would be dropped",
        lambda config: os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
    ),
)


def check(vllm_config: Any) -> None:
    """Errors: `StartupRefused` listing every refused setting that is on."""
    hits = [f"{refusal.setting}: {refusal.reason}" for refusal in REFUSALS if refusal.applies(vllm_config)]
    if hits:
        raise StartupRefused("steer-vllm does not serve with\n  " + "\n  ".join(hits))
