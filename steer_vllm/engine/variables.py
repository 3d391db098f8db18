"""Environment variables of vLLM with which nothing is served, each with the reason.

Read before vLLM is imported, since it reads them then. Its settings are `refusals`'.
"""

from __future__ import annotations

from collections.abc import Mapping

RUST = "VLLM_USE_RUST_FRONTEND"
"""The one that an engine can see too, however it was started."""

REFUSED = {
    RUST: "the Rust front end loads no Python middleware, so the interventions field would be dropped",
    "VLLM_SKIP_MODEL_NAME_VALIDATION": "an unknown alias would get the base model's answer",
    "VLLM_API_KEY": "vLLM guards only some paths with it; use STEER_VLLM_API_KEY or --api-key, which guard every path",
}

_OFF = ("", "0", "false")


def is_on(name: str, environment: Mapping[str, str]) -> bool:
    """Whether it is set to anything that does not mean no."""
    return environment.get(name, "").lower() not in _OFF


def refused(environment: Mapping[str, str]) -> list[str]:
    """Those that are on, a line each with the reason."""
    return [f"{name} is set: {reason}" for name, reason in REFUSED.items() if is_on(name, environment)]
