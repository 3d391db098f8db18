"""steer-vllm: one base model in vLLM, many tuned behaviours, each request picks its own.

`LLM` and `SamplingParams` need vLLM and are imported when first used; the rest needs torch and safetensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .intervention import Intervention
from .positions import Positions

if TYPE_CHECKING:
    from .engine.llm import LLM, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Intervention", "Positions", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingParams"):
        from .engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
