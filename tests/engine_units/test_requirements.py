"""The seam: the installed vLLM is as needed, and a vLLM that is not says which file to mend."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from steer_vllm.engine import requirements
from steer_vllm.engine.requirements import ELSEWHERE, Seam, problem, problems, release_of, require, seams, vllm_version
from steer_vllm.errors import StartupRefused


def test_the_installed_vllm_is_as_needed() -> None:
    assert problems() == []
    require()


SEAMS = seams(release_of(vllm_version() or "0.0"))


def owner_of(seam: Seam) -> tuple[Any, str]:
    *path, name = seam.name.split(".")
    owner: Any = importlib.import_module(seam.module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_changed_signature_names_the_file(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(something: int, other: str) -> None: ...

    monkeypatch.setattr(*owner_of(seam), changed)
    (line,) = problems()
    assert f"{seam.module}.{seam.name}" in line
    assert f"steer_vllm/engine/{seam.used_by}" in line
    assert "something" in line
    with pytest.raises(StartupRefused, match=seam.used_by):
        require()


ABSTRACT = ("AsyncLLM.generate", "Scheduler.finish_requests")
"""Their abstract parents have them: no engine could start without."""


@pytest.mark.parametrize(
    "seam",
    [seam for seam in SEAMS if seam.name not in ABSTRACT],
    ids=lambda seam: seam.name,
)
def test_a_function_that_is_gone_names_the_file(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*owner_of(seam))
    lines = problems()
    said = "takes" if seam.name.endswith("__init__") else "is gone"  # every class inherits a constructor
    assert any(seam.name in line and said in line and seam.used_by in line for line in lines)


def test_new_parameters_behind_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(self: Any, request: Any, block_ids: Any = None) -> None: ...

    monkeypatch.setattr(*owner_of(next(s for s in SEAMS if s.name == "Scheduler._free_request")), longer)
    assert problems() == []


def test_a_module_that_is_gone() -> None:
    gone = Seam("vllm.nowhere", "f", (), "core.py")
    line = requirements.problem(gone)
    assert line is not None
    assert "vllm.nowhere.f is gone" in line


@pytest.mark.parametrize("seam", [*requirements.SEAMS, *ELSEWHERE], ids=lambda seam: seam.name)
def test_the_named_file_uses_it(seam: Seam) -> None:
    """The list is not longer than the patches: what a file no longer touches goes from it."""
    source = (Path(requirements.__file__).parent / seam.used_by).read_text()
    assert seam.name.split(".")[-1] in source


@pytest.mark.parametrize("found", ["0.25.9", "0.34.0", "1.0.0", "0.9.2", "0.34.0rc1+cpu"])
def test_versions_outside(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "SEAMS", SEAMS)
    monkeypatch.setattr(requirements, "vllm_version", lambda: found)
    (line,) = problems()
    assert found in line
    assert "0.26 to 0.33" in line


@pytest.mark.parametrize("found", ["0.26.0", "0.33.2", "0.30.1.dev3+g12ab", "0.32.0+cpu", "0.33.0rc1"])
def test_versions_inside(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "SEAMS", SEAMS)  # the functions are those of the release that is installed
    monkeypatch.setattr(requirements, "vllm_version", lambda: found)
    assert problems() == []


def test_a_function_is_needed_from_its_release_on() -> None:
    assert {seam.name for seam in set(seams((0, 33))) - set(seams((0, 32)))} == {
        "EngineCoreProc._reject_add_while_paused"
    }


@pytest.mark.parametrize("seam", ELSEWHERE, ids=lambda seam: seam.name)
def test_what_one_process_needs(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that not every process can import are not looked at where they are not used."""
    assert problem(seam) is None
    monkeypatch.setattr(*owner_of(seam), lambda other: None)
    assert "takes ('other',)" in str(problem(seam))
    assert problems() == []


def test_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "vllm_version", lambda: None)
    assert problems() == ["vLLM is not installed"]
