"""The facts on vLLM's source, read without importing it: the installed vLLM, and sources in which one is missing."""

from __future__ import annotations

import importlib.util
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from steer_vllm.engine.fields import FIELDS
from steer_vllm.engine.requirements import ELSEWHERE, SEAMS


@pytest.fixture(scope="module")
def check(root: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("check_vllm", root / "scripts" / "check_vllm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_vllm"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_vllm"]


@pytest.fixture(scope="module")
def installed() -> Path:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parents[1]


def modules() -> set[str]:
    return {fact.module for fact in (*SEAMS, *FIELDS)}


def test_the_installed_vllm(check: ModuleType, installed: Path) -> None:
    assert check.problems(check.Source(installed)) == []


def wheel_without(check: ModuleType, installed: Path, path: Path, name: str) -> Path:
    """A wheel of everything the facts need, in which a name is another one."""
    source = check.Source(installed)
    check.problems(source)  # reads what it needs
    with zipfile.ZipFile(path, "w") as archive:
        for module, tree in source._trees.items():
            if tree is not None:
                file = module.replace(".", "/")
                file = f"{file}.py" if (installed / f"{file}.py").is_file() else f"{file}/__init__.py"
                archive.writestr(file, re.sub(rf"\b{name}\b", "renamed", (installed / file).read_text()))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "_update_states",
        "init_model_state",
        "call_utility",
        "query_start_loc",
        "resumable",
        "model_name",
        "client_index",
    ],
)
def test_what_is_gone_names_the_file(name: str, check: ModuleType, installed: Path, tmp_path: Path) -> None:
    lines = check.problems(check.Source(wheel_without(check, installed, tmp_path / "vllm.whl", name)))
    seams = [seam for seam in (*SEAMS, *ELSEWHERE) if name in (seam.name.split(".")[-1], *seam.parameters)]
    wanted = {seam.used_by for seam in seams}
    wanted |= {fact.used_by for fact in FIELDS if name in fact.names}
    assert {line.split("steer_vllm/engine/")[1] for line in lines} == wanted
    assert all(name in line for line in lines)


def test_a_parameter_that_is_another_names_the_file(check: ModuleType, installed: Path, tmp_path: Path) -> None:
    lines = check.problems(check.Source(wheel_without(check, installed, tmp_path / "vllm.whl", "num_scheduled_tokens")))
    assert any(
        "_prepare_inputs takes" in line and line.endswith("mend steer_vllm/engine/runner_v1.py") for line in lines
    )


def test_what_a_later_release_brought(check: ModuleType, installed: Path, tmp_path: Path) -> None:
    """Whoever says to be that release must have it; the installed one says what it is."""
    path = wheel_without(check, installed, tmp_path / "vllm.whl", "_reject_add_while_paused")
    source = check.Source(path)
    said = any("_reject_add_while_paused is gone" in line for line in check.problems(source))
    assert said == (source.release >= (0, 33))
    source._trees["vllm._version"] = None
    assert source.release == (0, 33)
    assert any("_reject_add_while_paused is gone" in line for line in check.problems(source))


def test_a_folder_that_is_no_vllm(check: ModuleType, tmp_path: Path) -> None:
    assert check.problems(check.Source(tmp_path)) == [f"{tmp_path} holds no package vllm"]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.module}.{field.kind}")
def test_the_named_file_reads_it(field: object, root: Path) -> None:
    """The list is not longer than what is read."""
    source = (root / "steer_vllm" / "engine" / field.used_by).read_text()  # type: ignore[attr-defined]
    names = field.names or (field.kind,)  # type: ignore[attr-defined]  # a class that is only recognised has none
    assert any(name in source for name in names)
