"""Fixtures of the engine tests: base models, and artifacts for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steer_vllm.demo import MODEL_PATH


@pytest.fixture(scope="module", params=["demo", "stories"])
def base_model(request: pytest.FixtureRequest, beside: Callable[[str], Path]) -> Path:
    """The demo model, and a public one where it is at hand."""
    return MODEL_PATH if request.param == "demo" else beside("models/stories260K-h32-fp32")
