"""The model name that the request being served asked for, so that its answer carries it.

Set by the middleware, read by what vLLM asks for a name; a context variable, so it follows the request through tasks.
"""

from __future__ import annotations

from contextvars import ContextVar

asked_model: ContextVar[str | None] = ContextVar("steer_vllm_asked_model", default=None)
"""None: nothing was decided, vLLM names the model."""
