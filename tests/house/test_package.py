"""The wheel: everything that is needed is in it, and it works without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"steer_vllm": "steer_vllm", "training": "steer_vllm/training", "server": "steer_vllm/server"}
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", ".cache", ".*_cache", "build", "dist", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_installed(installed: Path, *arguments: str | Path) -> str:
    """Runs Python on the installed wheel. `-S` keeps out the development install, which would fill its gaps."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    return run(sys.executable, "-S", *arguments, cwd=installed, environment=os.environ | {"PYTHONPATH": path})


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    base = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, base / "source", ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", base / "out", base / "source", cwd=base)
    return base / "out"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "-q", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_twine_accepts_both(dist: Path) -> None:
    files = sorted(dist.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist)


def test_wheel_has_every_file(wheel: Path) -> None:
    """Code and data of the three folders (the demo model's weights among it), and no other top-level name."""
    wanted = {
        f"{inside}/{path.relative_to(ROOT / folder)}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == wanted
    assert {"steer_vllm/py.typed", "steer_vllm/demo/model/config.json"} <= names
    assert any(name.startswith("steer_vllm/demo/model/") and name.endswith(".safetensors") for name in names)


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    needed = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert not [text for text in needed if text.startswith(("vllm", "transformers", "fastapi"))]
    assert {"cpu", "cuda", "train", "serve", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_entry_points_resolve(installed: Path) -> None:
    (folder,) = installed.glob("steer_vllm-*.dist-info")
    points = {(point.group, point.name): point.value for point in PathDistribution(folder).entry_points}
    assert points == {
        ("console_scripts", "steer-vllm"): "steer_vllm.cli:main",
        ("vllm.general_plugins", "steer_vllm"): "steer_vllm.engine.plugin:register",
        ("vllm.endpoint_plugins", "steer_vllm"): "steer_vllm.engine.endpoint:SteerEndpoint",
    }
    code = "from importlib.metadata import EntryPoint\n"
    code += "\n".join(f"EntryPoint('x', {value!r}, 'x').load()" for value in points.values())
    run_installed(installed, "-c", code)


def test_imports_come_from_the_wheel(installed: Path) -> None:
    code = (
        "import steer_vllm, steer_vllm.training, steer_vllm.server\n"
        "for module in (steer_vllm, steer_vllm.training, steer_vllm.server): print(module.__file__)"
    )
    files = run_installed(installed, "-c", code).split()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_command_runs(installed: Path) -> None:
    text = run_installed(installed, installed / "bin" / "steer-vllm", "--help")
    assert all(command in text for command in ("train", "serve", "demo", "bench"))


def test_core_passes_its_tests_from_the_wheel(installed: Path) -> None:
    """The core's tests, run once more on what a user installs."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", "-c", ROOT / "pyproject.toml"]
    run_installed(installed, "-m", "pytest", *options, ROOT / "tests" / "core")
