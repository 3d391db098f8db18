"""Engine processes that fail or go on working: said with their log, and none is left behind. No engine is started."""

from __future__ import annotations

import os
import sys
import time
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


class Working:
    """Uses a processor all the time, or none."""

    def __init__(self, name: str, share: float) -> None:
        self.name = name
        self._share = share

    def cpu_seconds(self) -> float:
        return self._share * time.monotonic()


def test_what_does_not_rest_is_named() -> None:
    started = [Working("busy", 1.0), Working("still", 0.0), Working("half", 0.5)]
    with pytest.raises(BenchmarkInvalid, match=r"^busy, half: still uses CPU"):
        rest(started, within=0.4)
    rest(started[1:2])


def test_an_engine_answers_and_ends_with_its_questions(program: Callable[[str], None], tmp_path: Path) -> None:
    program(ANSWER.format(b"{}\n"))
    with Engine("plain", {}, tmp_path / "log") as engine:
        assert engine.ask(call="run") == {}
        assert engine.cpu_seconds() >= 0
    assert engine._process.returncode == 0
