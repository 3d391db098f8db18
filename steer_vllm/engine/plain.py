"""vLLM's offline class, whose methods that cannot carry interventions say so by name.

Without it they would answer with Python's complaint about an unknown argument. Knows nothing of what carries them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import vllm

from ..errors import Unsupported

_POOLS = "it takes states out of the model, and only generation is edited"
_LATER = "what a request may use is held for one call: use generate or chat"
REASONS = {
    "beam_search": "beam search drops interventions: use sampling with n > 1",
    "encode": _POOLS,
    "embed": _POOLS,
    "classify": _POOLS,
    "score": _POOLS,
    "enqueue": _LATER,
    "enqueue_chat": _LATER,
}


class PlainLLM(vllm.LLM):
    """vLLM's `LLM`; the methods of `REASONS` raise `Unsupported` when interventions are asked for."""


def _refusing(name: str, reason: str) -> Callable[..., Any]:
    inherited = getattr(vllm.LLM, name)

    @wraps(inherited)
    def method(self: Any, *args: Any, interventions: Any = None, **kwargs: Any) -> Any:
        if interventions:
            raise Unsupported(f"{name} cannot carry interventions: {reason}", param="interventions")
        return inherited(self, *args, **kwargs)

    return method


for _name, _reason in REASONS.items():
    setattr(PlainLLM, _name, _refusing(_name, _reason))
