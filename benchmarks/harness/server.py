"""vLLM's OpenAI server in a process group of its own: vLLM's, without the plugin, or that of `steer-vllm serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

from steer_vllm.bench.log import tail
from steer_vllm.bench.rest import cpu_seconds
from steer_vllm.errors import BenchmarkInvalid

SERVED = "base"
_STARTS_WITHIN, _STOPS_WITHIN = 900, 30  # seconds
_OPEN = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
"""Seconds that a connection may rest. By vLLM's default of 5 the server closes one that a client is just taking up
again, where the others of a large batch were slow, and the request is lost."""


class Server:
    """`wait` for it before it is used, `stop` and `close` it at the end. What it prints goes to `log`."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        others = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env={**others, **_OPEN, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers. Errors: `BenchmarkInvalid` with the end of its log."""
        deadline = time.monotonic() + _STARTS_WITHIN
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._is_up():
                return
            time.sleep(0.3)
        raise BenchmarkInvalid(f"server {self.name} did not start; the end of its log:\n{tail(self._log)}")

    def _is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except (URLError, OSError):
            return False
        return True

    def applied(self, name: str) -> str | None:
        """What edits an answer to a request for that model, as the server says."""
        body = json.dumps({"model": name, "prompt": "what", "max_tokens": 1}).encode()
        asked = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            found: str | None = answer.headers.get("x-steer-applied")
        return found

    def cpu_seconds(self) -> float:
        """CPU time that the processes of the group have used."""
        return cpu_seconds(self._process.pid)

    def stop(self, at_once: bool = False) -> None:
        """Ask the process group to end, or end it. One that has ended is no error."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL if at_once else signal.SIGINT)

    def close(self) -> None:
        """Wait for a group that was asked to end; what is left of it is ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOPS_WITHIN)
        self.stop(at_once=True)
        self._process.wait()


class Servers(dict[str, Server]):
    """By name. All are asked to end before one is waited for; where something went wrong, they end at once."""

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for one in self.values():
            one.stop(at_once=kind is not None)
        for one in self.values():
            one.close()


def plain(name: str, model: Path, flags: Sequence[str], environment: Mapping[str, str], log: Path) -> Server:
    """vLLM's own server; the plugin is kept out of all its processes."""
    port = _free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}", *flags]
    return Server(name, command, {**environment, "VLLM_PLUGINS": ""}, port, log)


def steered(
    model: Path, limits: Sequence[str], store: Path, flags: Sequence[str], environment: Mapping[str, str], log: Path
) -> Server:
    """`steer-vllm serve`, with every artifact of the store. limits: flags of ours."""
    port = _free_port()
    command = ["-m", "steer_vllm.cli", "serve", str(model), f"--port={port}", *limits]
    command += [f"--artifact={folder.name}={folder}" for folder in sorted(store.iterdir())]
    return Server("steered", [*command, "--", *flags], environment, port, log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
