"""The scripts of benchmarks/, imported as they run: with their folder on the path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    folder = root / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module

    return load
