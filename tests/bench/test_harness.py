"""Servers and clients of benchmarks that fail or hang: said with their log, and none is left behind. No vLLM runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steer_vllm.errors import BenchmarkInvalid


@pytest.fixture
def harness(script: Callable[[str], ModuleType]) -> ModuleType:
    """What serving.py imports."""
    return script("serving")


def test_a_server_that_ended_is_said_with_its_log(harness: ModuleType, tmp_path: Path) -> None:
    server = harness.servers.server
    one = server.Server("plain", ["-c", "print('no memory left')"], {}, 1, tmp_path / "log")
    with (
        pytest.raises(BenchmarkInvalid, match=r"(?s)server plain did not start.*no memory left"),
        server.Servers(a=one),
    ):
        one.wait()


class Fake:
    """Notes what it is told."""

    def __init__(self, name: str, told: list[tuple[str, ...]]) -> None:
        self.name = name
        self._told = told

    def stop(self, at_once: bool = False) -> None:
        self._told.append((self.name, "killed" if at_once else "asked"))

    def close(self) -> None:
        self._told.append((self.name, "waited for"))


@pytest.mark.parametrize("fails", [False, True])
def test_all_servers_are_told_before_one_is_waited_for(harness: ModuleType, fails: bool) -> None:
    told: list[tuple[str, ...]] = []

    def run() -> None:
        with harness.servers.server.Servers({name: Fake(name, told) for name in "ab"}):
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    how = "killed" if fails else "asked"
    assert told == [("a", how), ("b", how), ("a", "waited for"), ("b", "waited for")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import time; time.sleep(60)", r"has not answered in 0\.2 s"),
        ("print('out of files')", "(?s)ended.*out of files"),
    ],
    ids=["hung", "ended"],
)
def test_a_client_that_does_not_answer(
    text: str, said: str, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "client"
    program.write_text(f"#!{sys.executable}\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    client = sys.modules[harness.Client.__module__]
    monkeypatch.setattr(client, "_RUNS_WITHIN", 0.2 if "sleep" in text else 20.0)
    with pytest.raises(BenchmarkInvalid, match=said), harness.Client(tmp_path / "log") as one:
        one.run("http://127.0.0.1:1", tmp_path, "base", (), (), 1)
    with pytest.raises(ProcessLookupError):
        os.killpg(one._process.pid, 0)


def test_what_cannot_be_measured_is_one_message(harness: ModuleType) -> None:
    def main() -> Any:
        raise BenchmarkInvalid("--modes: no such mode")

    with pytest.raises(SystemExit) as ended:
        harness.script.run(main)
    assert ended.value.code == "error: --modes: no such mode"


def test_rounds_are_kept_as_they_are_done(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that fails in its third round two are there; the one that is not counted is not among them."""
    asked: list[str] = []
    kept: list[int] = []

    class Client:
        def run(self, *given: Any) -> dict[str, float]:
            asked.append(given[0])
            if len(asked) > 7:
                raise BenchmarkInvalid("the client ended")
            times = {f"{part}_{metric}_ms": 1.0 for metric in harness.turns.METRICS for part in ("median", "p99")}
            return {"output_throughput": 1.0, **times}

    modes = harness.choose("direction", (), (), "idle")
    servers = {mode.server: type("Server", (), {"url": mode.server}) for mode in modes}
    monkeypatch.setattr(harness.turns, "rest", lambda servers: None)
    with pytest.raises(BenchmarkInvalid):
        harness.turns.run(modes, servers, Client(), Path(), [], 1, 5, lambda samples: kept.append(len(samples)))
    assert kept == [2, 4]


def test_an_output_that_cannot_be_written(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    harness.script.add_output(parser, "some.json")
    assert parser.parse_args([]).output == Path("some.json")
    with pytest.raises(SystemExit):
        parser.parse_args(["--output", str(tmp_path)])
    assert f"argument --output: {tmp_path} is a folder" in capsys.readouterr().err
