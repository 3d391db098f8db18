"""The other end of `steer_vllm.engine.probe`: starts an engine process, asks it, sees that it rests, stops it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ..errors import BenchmarkInvalid
from .log import tail
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
        """Ask without waiting. Errors: see `receive`."""
        try:
            self._lines.write(json.dumps(request) + "\n")
            self._lines.flush()
        except ConnectionError:
            raise self._failed("the process ended") from None

    def receive(self) -> dict[str, Any]:
        """The answer to the oldest question. Errors: `BenchmarkInvalid` with what the engine says, and its log."""
        try:
            line = self._lines.readline()
        except ConnectionError:  # it ended before it read the question
            line = ""
        if not line:
            raise self._failed("the process ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, what: str) -> BenchmarkInvalid:
        return BenchmarkInvalid(f"engine {self.name}: {what}; the end of its log:\n{tail(self._log)}")

    def ask(self, **request: Any) -> dict[str, Any]:
        """`send` and `receive`."""
        self.send(**request)
        return self.receive()

    def cpu_seconds(self) -> float:
        """CPU time that the processes of the group have used."""
        return cpu_seconds(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process group; where something went wrong, at once."""
        with suppress(ConnectionError):  # what it was not sent any more
            self._lines.close()
        try:
            if kind is None:
                self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
