"""The other end of `steer_vllm.engine.probe`: starts an engine process, asks it, sees that it rests, stops it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BenchmarkInvalid

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Engine:
    """A process group with one engine. What its processes print goes to `log`."""

    def __init__(self, name: str, environment: dict[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        ours, theirs = socket.socketpair()
        with theirs, log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "steer_vllm.engine.probe", str(theirs.fileno())],
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._lines = ours.makefile("rw")
        ours.close()

    def send(self, **request: Any) -> None:
        """Ask without waiting."""
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the oldest question. Errors: `BenchmarkInvalid` with what the engine says, and its log."""
        line = self._lines.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise BenchmarkInvalid(f"engine {self.name}: {answer['error']}; the end of its log:\n{last}")
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """`send` and `receive`."""
        self.send(**request)
        return self.receive()

    def cpu_seconds(self) -> float:
        """CPU time that the processes of the group have used."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            if int(fields[2]) == self._process.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks * _TICK

    def close(self) -> None:
        """End the process group."""
        self._lines.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return


def rest(engines: Sequence[Engine], within: float = 10.0) -> None:
    """Wait until they use no CPU: vLLM's workers poll for about a second after their last step.

    Errors: `BenchmarkInvalid` naming those that do not come to rest.
    """
    deadline = time.monotonic() + within
    busy = list(engines)
    while busy and time.monotonic() < deadline:
        before = [engine.cpu_seconds() for engine in busy]
        time.sleep(0.15)
        used = [engine.cpu_seconds() - was for engine, was in zip(busy, before, strict=True)]
        busy = [engine for engine, more in zip(busy, used, strict=True) if more > 1.5 * _TICK]
    if busy:
        names = ", ".join(engine.name for engine in busy)
        raise BenchmarkInvalid(f"{names}: still uses CPU {within:.0f} s after its last step")
