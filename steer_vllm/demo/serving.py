"""A server in a process of its own, for as long as it is needed.

Knows the command line and the health route; what is asked of the server is not known here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

from ..errors import EngineUnavailable

_STARTS_WITHIN, _STOPS_WITHIN = 300, 60  # seconds


@contextmanager
def serving(model: Path, artifacts: Mapping[str, Path], flags: Sequence[str], log: Path) -> Iterator[str]:
    """The address of `steer-vllm serve MODEL` with these artifacts; it is interrupted, as by Ctrl-C, at the end.

    flags: vLLM's. log: file for what the server prints. Errors: `EngineUnavailable` when it does not start or stop.
    """
    port = _free_port()
    command = [sys.executable, "-m", "steer_vllm.cli", "serve", str(model), f"--port={port}"]
    command += [f"--artifact={name}={folder}" for name, folder in artifacts.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--", *flags], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(process, log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN
    while process.poll() is None and time.monotonic() < deadline:
        if _is_up(url):
            return
        time.sleep(0.3)
    lines = log.read_text(errors="replace").splitlines()
    raise EngineUnavailable("the server did not start; the end of its log:\n" + "\n".join(lines[-30:]))


def _is_up(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (URLError, OSError):
        return False
    return True


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(_STOPS_WITHIN)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise EngineUnavailable(f"the server did not stop within {_STOPS_WITHIN} s: see {log}") from None
