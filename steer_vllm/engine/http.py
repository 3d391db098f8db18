"""The one patch of vLLM's HTTP side: the name that an answer carries.

Knows nothing of interventions; what was asked for is told by a function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..errors import StartupRefused
from . import requirements


def answer_with(asked: Callable[[], str | None]) -> None:
    """Have vLLM's answers carry the model name that `asked` gives, where it gives one. A second call does nothing.

    Errors: `StartupRefused` when vLLM's method is not as expected.

    Ledger. What: `OpenAIServingModels.model_name`, the only source of `model` in the JSON and SSE answers of
    completions and chat completions. Why: a request for `base:honest` reaches vLLM as one for the base, and clients
    check that the answer names what they asked for; rewriting streams would cost more. Since: 0.26, the same in 0.33.
    Can go when: vLLM echoes the requested name, or has a hook for it.
    """
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    original: Any = OpenAIServingModels.model_name
    if hasattr(original, "steer_vllm"):
        return
    unmet = requirements.problem(requirements.MODEL_NAME)
    if unmet:
        raise StartupRefused(unmet)

    @functools.wraps(original)
    def model_name(self: Any, lora_request: Any = None) -> str:
        return asked() or original(self, lora_request)

    model_name.steer_vllm = True  # type: ignore[attr-defined]
    OpenAIServingModels.model_name = model_name
