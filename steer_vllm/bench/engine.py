"""The other end of `steer_vllm.engine.probe`: starts an engine process, asks it, sees that it rests, stops it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import BenchmarkInvalid
from .rest import cpu_seconds


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
        return cpu_seconds(self._process.pid)

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
