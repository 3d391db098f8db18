"""One thread, a hypothesis profile for a busy machine, and a small random Llama that the core's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.make import llama
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None, print_blob=True)
settings.load_profile("shared_machine")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Any:
    """A float32 Llama: 3 layers, 4 heads of 8, hidden 24 (not heads times head size)."""
    return llama()


@pytest.fixture(scope="session")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder
