"""How vLLM's features stand with interventions, and the test by which that is known.

`docs/features.md` and `steer-vllm doctor` print these rows and those of `refusals`. It knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .refusals import REFUSALS


class Feature(NamedTuple):
    """known: a test file of this repository."""

    name: str
    state: str
    known: str


SUPPORTED = "supported"
REFUSED_PER_REQUEST = "refused per request"
REFUSED_AT_START = "refused at start"

_ROWS = (
    Feature("model runner V1 and V2", SUPPORTED, "tests/engine/test_exactness.py"),
    Feature("torch.compile", SUPPORTED, "tests/engine/test_exactness.py"),
    Feature(
        "mixed batches, compositions, scales and positions of one's own", SUPPORTED, "tests/engine/test_exactness.py"
    ),
    Feature("tensor parallelism", SUPPORTED, "tests/engine/test_parallel.py"),
    Feature("pipeline parallelism", SUPPORTED, "tests/engine/test_parallel.py"),
    Feature(
        "data parallelism of dense models, with internal load balancing", SUPPORTED, "tests/engine/test_parallel.py"
    ),
    Feature("preemption and resume", SUPPORTED, "tests/engine/test_lifetimes.py"),
    Feature(
        "unload, replace and abort while requests wait, run or are preempted",
        SUPPORTED,
        "tests/engine/test_lifetimes.py",
    ),
    Feature("prefix caching", SUPPORTED, "tests/engine/test_prefix_cache.py"),
    Feature("async scheduling", SUPPORTED, "tests/engine/test_prefix_cache.py"),
    Feature("multi-modal models with causal attention, with pictures", SUPPORTED, "tests/engine/test_multimodal.py"),
    Feature("multi-modal models as text models (language_model_only)", SUPPORTED, "tests/engine/test_multimodal.py"),
    Feature("LoRA and interventions on one request", SUPPORTED, "tests/engine/test_lora.py"),
    Feature(
        "LoRA of the attention output projection beside head offsets of the same layer",
        f"{REFUSED_PER_REQUEST}: the offsets were compiled with the base model's projection",
        "tests/engine/test_lora.py",
    ),
    Feature(
        "LoRA loaded in place, beside interventions",
        f"{REFUSED_PER_REQUEST}: its weights may change while the request runs",
        "tests/engine/test_lora.py",
    ),
    Feature(
        "n, stop strings, min_tokens, logit_bias, penalties, seeds, top_k, top_p, min_p, bad words, allowed tokens",
        SUPPORTED,
        "tests/engine/test_features.py",
    ),
    Feature("structured outputs (JSON, regex, choice)", SUPPORTED, "tests/engine/test_features.py"),
    Feature("priority scheduling", SUPPORTED, "tests/engine/test_features.py"),
    Feature("chunked prefill", SUPPORTED, "tests/engine/test_features.py"),
    Feature("cancellation before the first token, and later", SUPPORTED, "tests/engine/test_features.py"),
    Feature("prompt_logprobs and echo, with response_start", SUPPORTED, "tests/engine/test_features.py"),
    Feature(
        "prompt_logprobs and echo without response_start, where positions depend on the prompt's end",
        f"{REFUSED_PER_REQUEST}: the answer is part of the prompt, and nobody says where it starts",
        "tests/engine/test_bad_input.py",
    ),
    Feature(
        "streaming input",
        f"{REFUSED_PER_REQUEST}: the prompt grows, and positions are resolved once",
        "tests/engine/test_features.py",
    ),
    Feature("reload_weights, and weights that a worker extension brings", SUPPORTED, "tests/engine/test_reload.py"),
    Feature("speculative decoding: ngram, draft models", SUPPORTED, "tests/engine/test_speculation.py"),
    Feature("KV offload to host memory (OffloadingConnector)", SUPPORTED, "tests/engine/test_kv_offload.py"),
    Feature("prompt embeddings", SUPPORTED, "tests/engine/test_embeds.py"),
    Feature("several API servers (api_server_count)", SUPPORTED, "tests/server/test_api_servers.py"),
    Feature("LoRA adapters by their model names, over HTTP", SUPPORTED, "tests/server/test_serve_features.py"),
    Feature(
        "pooling requests (embeddings, scores, classification)",
        f"{REFUSED_PER_REQUEST}: there is no generation to edit",
        "tests/server/test_serve_features.py",
    ),
    Feature(
        "batch, Responses, Messages, /invocations and token-in-token-out routes",
        f"{REFUSED_PER_REQUEST}: they serve the base model",
        "tests/server/test_serve.py",
    ),
    Feature("pause (keep, wait, abort) and resume, over running requests", SUPPORTED, "tests/engine/test_lifecycle.py"),
    Feature("reset_prefix_cache, over running requests", SUPPORTED, "tests/engine/test_lifecycle.py"),
    Feature("abort of every request, shutdown with requests in flight", SUPPORTED, "tests/engine/test_lifecycle.py"),
    Feature("beam search", f"{REFUSED_PER_REQUEST}: it drops interventions", "tests/engine/test_bad_input.py"),
)


FOUND_IN_THE_MODEL = (
    Feature(
        "layers whose output is not one row per token",
        f"{REFUSED_AT_START}: an edit could not be placed",
        "tests/engine_units/test_layers.py",
    ),
    Feature(
        "a configured site that no layer has",
        f"{REFUSED_AT_START}: an edit there could not be placed; where some layers have it, artifacts that name others "
        "are refused",
        "tests/engine_units/test_layers.py",
    ),
    Feature(
        "layers that return a pair of tensors, where it is not seen which carries the residual stream",
        f"{REFUSED_AT_START}: an edit of the other would be lost",
        "tests/engine_units/test_residual.py",
    ),
    Feature(
        "hf_overrides that change the model's shapes",
        f"{REFUSED_AT_START}: an artifact would name layers that are not there",
        "tests/engine_units/test_settings.py",
    ),
)
"""What only the loaded model shows: refused by `binding`, `wrapping` and `settings`."""


def features() -> Iterator[Feature]:
    """Every row: what is supported or refused per request, then what refuses to start."""
    yield from _ROWS
    for refusal in REFUSALS:
        yield Feature(refusal.setting, f"{REFUSED_AT_START}: {refusal.reason}", "tests/engine_units/test_refusals.py")
    yield from FOUND_IN_THE_MODEL


def markdown() -> str:
    """The table of docs/features.md."""
    lines = [f"| {row.name} | {row.state} | [{row.known}](../{row.known}) |" for row in features()]
    return "\n".join(["| feature | state | how it is known |", "|---|---|---|", *lines]) + "\n"
