"""Engine processes that fail or go on working: said with their log, and none is left behind. No engine is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from steer_vllm.bench.engine import Engine
from steer_vllm.bench.rest import rest
from steer_vllm.errors import BenchmarkInvalid

PYTHON = sys.executable
ANSWER = "import socket, sys; end = socket.socket(fileno=int(sys.argv[3])); end.recv(99); end.send({!r})"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what runs in place of `python -m steer_vllm.engine.probe FD`."""

    def write(text: str) -> None:
        path = tmp_path / "probe"
        path.write_text(f"#!{PYTHON}\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


def test_an_engine_that_ends_is_said_with_its_log(program: Callable[[str], None], tmp_path: Path) -> None:
    program("print('no memory left')")
    said = pytest.raises(BenchmarkInvalid, match=r"(?s)engine plain: the process ended.*no memory left")
    with said, Engine("plain", {}, tmp_path / "log") as engine:
        engine.ask(call="run")


def test_an_engine_that_refuses_is_said_and_ends_at_once(program: Callable[[str], None], tmp_path: Path) -> None:
    program(ANSWER.format(b'{"error": "bad"}\n') + "; import time; time.sleep(60)")
    with pytest.raises(BenchmarkInvalid, match="engine plain: bad"), Engine("plain", {}, tmp_path / "log") as engine:
        engine.ask(call="run")
    with pytest.raises(ProcessLookupError):
        os.killpg(engine._process.pid, 0)


def test_engines_that_do_not_rest_are_named(program: Callable[[str], None], tmp_path: Path) -> None:
    program("while True: pass")
    said = pytest.raises(BenchmarkInvalid, match="busy: still uses CPU")
    with said, Engine("busy", {}, tmp_path / "log") as engine:
        rest([engine], within=1.0)


def test_resting_engines_are_not_waited_for(program: Callable[[str], None], tmp_path: Path) -> None:
    program(ANSWER.format(b"{}\n"))
    with Engine("idle", {}, tmp_path / "log") as engine:
        assert engine.ask(call="run") == {}
        rest([engine])
