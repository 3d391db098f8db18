"""The layers: who may import whom, read from the source; and that the core is light to import."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"steer_vllm": "steer_vllm", "steer_vllm.training": "training", "steer_vllm.server": "server"}
OUTER = (
    "steer_vllm.training",
    "steer_vllm.server",
    "steer_vllm.engine",
    "steer_vllm.demo",
    "steer_vllm.bench",
    "steer_vllm.cli",
)
CORE_NEEDS = {"torch", "safetensors", "numpy", "typing_extensions", "steer_vllm"} | set(sys.stdlib_module_names)
MAX_LINES = 300
LONGER: dict[str, str] = {}  # path: why it may be longer than MAX_LINES


@dataclass(frozen=True)
class Import:
    """One imported name: the dotted target, its line, and whether importing the module runs it."""

    target: str
    line: int
    at_import: bool


def read_imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """The imports of a module. `from a import b` names `a.b` where that is a known module, else `a`."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parent = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in known else base, node.lineno, at_import)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not deferred)

    yield from visit(ast.parse(source), True)


def module_files() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *inner]).removesuffix(".__init__")] = path
    return found


FILES = module_files()
IMPORTS = {
    name: list(read_imports(path.read_text(), name, path.name == "__init__.py", set(FILES)))
    for name, path in FILES.items()
}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(importers: Iterator[str] | list[str], *forbidden: str, at_import_only: bool = False) -> list[str]:
    return [
        f"{FILES[name].relative_to(ROOT)}:{entry.line} imports {entry.target}"
        for name in importers
        for entry in IMPORTS[name]
        if within(entry.target, *forbidden) and (entry.at_import or not at_import_only)
    ]


def modules(*packages: str) -> list[str]:
    return [name for name in FILES if within(name, *packages)]


CORE = [name for name in FILES if not within(name, *OUTER)]


def test_only_the_engine_knows_vllm() -> None:
    assert not offences([name for name in FILES if not within(name, "steer_vllm.engine")], "vllm")


def test_core_needs_torch_and_safetensors_only() -> None:
    extra = {"steer_vllm.ops.triton": {"triton"}}  # the kernels; who wants them imports that module
    assert not [
        f"{FILES[name].relative_to(ROOT)}:{entry.line} imports {entry.target}"
        for name in CORE
        for entry in IMPORTS[name]
        if entry.at_import and entry.target.split(".")[0] not in CORE_NEEDS | extra.get(name, set())
    ]


def test_core_does_not_reach_outwards() -> None:
    assert not offences(CORE, *OUTER, at_import_only=True)


def test_training_knows_neither_server_nor_engine() -> None:
    assert not offences(modules("steer_vllm.training"), "steer_vllm.server", "steer_vllm.engine", "steer_vllm.cli")


def test_server_does_not_know_training() -> None:
    assert not offences(modules("steer_vllm.server"), "steer_vllm.training", "steer_vllm.cli")


def test_only_the_endpoint_joins_engine_and_server() -> None:
    engine = [name for name in modules("steer_vllm.engine") if name != "steer_vllm.engine.endpoint"]
    assert not offences(engine, "steer_vllm.server", "steer_vllm.training", "steer_vllm.cli")


def test_workers_load_no_web_framework() -> None:
    """`plugin` is what vLLM imports in every process; what it pulls in must not know HTTP."""
    reached, queue = set[str](), ["steer_vllm.engine.plugin"]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += [entry.target for entry in IMPORTS[name] if entry.at_import and entry.target in FILES]
    assert not offences(sorted(reached), "fastapi", "starlette", "typer", "steer_vllm.server", at_import_only=True)


def test_installed_names_only() -> None:
    """`training` and `server` are folders of the repository, not names of the wheel."""
    assert not offences(list(FILES), "training", "server")


def test_no_import_cycles() -> None:
    graph = {
        name: {entry.target for entry in entries if entry.at_import and entry.target in FILES and entry.target != name}
        for name, entries in IMPORTS.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_LINES and path not in LONGER}
    assert not [path for path in LONGER if lengths.get(path, 0) <= MAX_LINES], "no longer needed in LONGER"


def test_import_is_light() -> None:
    heavy = ["vllm", "transformers", "fastapi", "starlette", "datasets", "sklearn", "matplotlib"]
    code = f"import sys, steer_vllm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import vllm.config", Import("vllm.config", 1, True)),
        ("def f():\n    import vllm", Import("vllm", 2, False)),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm", Import("vllm", 3, False)),
        ("try:\n    import vllm\nexcept ImportError: ...", Import("vllm", 2, True)),
        ("class A:\n    import vllm", Import("vllm", 2, True)),
        ("from . import sister", Import("steer_vllm.sister", 1, True)),
        ("from .sister import name", Import("steer_vllm.sister", 1, True)),
        ("from steer_vllm import name", Import("steer_vllm", 1, True)),
    ],
)
def test_reading_imports(source: str, expected: Import) -> None:
    assert expected in read_imports(source, "steer_vllm.module", False, {"steer_vllm.sister"})


def test_reading_imports_of_a_package() -> None:
    found = list(read_imports("from .inner import x\nfrom ..other import y", "steer_vllm.ops", True, set()))
    assert [entry.target for entry in found] == ["steer_vllm.ops.inner", "steer_vllm.other"]
