"""The last look at a request in the process that took it: its prompt is tokenised, and an error still reaches its user.

Below this point, in the engine core, a refusal is a failed request without a text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import wraps
from typing import Any

from ..errors import Unsupported
from ..request import EXTRA_ARG, Steering


def install() -> None:
    """Ledger: replaces `AsyncLLM.generate` and `LLMEngine.add_request`.

    What: the call raises when the request's interventions do not fit its prompt. Why: how long a text prompt is is
    known only here, and `generate`, an asynchronous generator, would raise when a streaming answer has begun; vLLM's
    routes call it before they answer. Since 0.26. Can go when vLLM validates requests by plugins.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    generate, add_request = AsyncLLM.generate, LLMEngine.add_request

    @wraps(generate)
    def check_and_generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check(prompt, sampling_params)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    @wraps(add_request)
    def check_and_add(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        check(prompt, params)
        return add_request(self, request_id, prompt, params, *args, **kwargs)

    AsyncLLM.generate = check_and_generate
    LLMEngine.add_request = check_and_add


def check(prompt: Any, params: Any) -> None:
    """Errors: `Unsupported` for streaming input, those of `Steering.from_wire` and `Steering.check_prompt`."""
    extra = getattr(params, "extra_args", None)
    if not extra or EXTRA_ARG not in extra:
        return
    if isinstance(prompt, AsyncGenerator):
        raise Unsupported("streaming-input requests cannot carry interventions: their prompt grows")
    steering = Steering.from_wire(extra[EXTRA_ARG])
    length = _length(prompt)
    if length is not None:
        steering.check_prompt(length)


def _length(prompt: Any) -> int | None:
    """Tokens of a prompt, None where vLLM has yet to count them: the core does then."""
    if isinstance(prompt, str):
        return None
    get = prompt.get if isinstance(prompt, dict) else lambda name: getattr(prompt, name, None)
    tokens = get("prompt_token_ids")
    embeds = get("prompt_embeds") if tokens is None else None
    known = tokens if tokens is not None else embeds
    return None if known is None else len(known)
