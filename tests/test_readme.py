"""The README's code is run as it stands: train, evaluate, serve, ask; and the files it names exist."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVE = "steer-vllm serve"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[Path, str]:
    """Every shell line but the server's has run; where, and what it printed."""
    folder = tmp_path_factory.mktemp("readme")
    script = "".join(line for line in blocks("bash")[0].splitlines(keepends=True) if not line.startswith(SERVE))
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def port(trained: tuple[Path, str], environment: dict[str, str]) -> Iterator[int]:
    """The README's server runs on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = blocks("bash")[0].splitlines()
    model = next(line for line in lines if line.startswith("MODEL="))
    serve = next(line for line in lines if line.startswith(SERVE)).replace("8000", str(port))
    (trained[0] / "admin.key").write_text("the-key\n")
    small = "--store out --admin-key-file admin.key -- --enforce-eager --gpu-memory-utilization 0.1"
    log = (trained[0] / "server.log").open("w")
    server = subprocess.Popen(
        ["bash", "-euc", f"{model}\nexec {serve} {small}"],
        cwd=trained[0],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, trained[0] / "server.log")
        yield port
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
        log.close()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])


def test_training_and_evaluation_run(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert (folder / "out/honest/intervention_config.json").exists()
    assert (folder / "out/honest/plots/heads.png").exists()
    assert "honest" in printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's line needs curl")
def test_an_intervention_is_loaded(port: int, trained: tuple[Path, str], environment: dict[str, str]) -> None:
    (script,) = blocks("bash")[1:]
    line = script.replace("8000", str(port))
    done = subprocess.run(
        ["bash", "-euc", line], cwd=trained[0], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert '"id":"careful"' in done.stdout, done.stdout


def test_client_gets_other_answers(port: int, trained: tuple[Path, str], environment: dict[str, str]) -> None:
    code = blocks("python")[0].replace("8000", str(port))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=trained[0], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    base, honest, mixed = done.stdout.strip().splitlines()
    assert base
    assert honest != base
    assert mixed


def test_files_that_are_named_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        text = (ROOT / document).read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / document).parent.joinpath(link).exists(), (document, link)
        for name in re.findall(r"\b(?:steer_vllm|training|server|engine|tests|scripts|docs)/[\w./*]+\w", text):
            found = [*ROOT.glob(name), *ROOT.glob(f"{name}.py"), *(ROOT / "steer_vllm").glob(name)]
            if "yours" not in name:
                assert found, (document, name)
