"""The parent's end of the engine process: starts it for a configuration, plays cases, says how it died."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine.engines import V2, two_cores

from . import models
from .case import MODEL_LEN, Case, Configuration

HERE = Path(__file__).parent
LONGEST = 300
"""Seconds after which an engine that does not answer is taken to hang."""
ENDS_WITHIN = 5
"""Seconds that an engine has to end its own processes."""


class EngineDied(Exception):
    """The engine's process ended, or does not answer. Its last words are the message."""


class Engine:
    """An engine of one configuration; started when first needed, and again after it died."""

    def __init__(self, configuration: Configuration, folder: Path) -> None:
        self.configuration = configuration
        self.model = models.make(configuration.shape, folder / "models")
        self._last_words = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = folder

    def play(self, case: Case, folders: list[Path]) -> dict[str, Any]:
        """Play it from a clean state. Errors: `EngineDied`."""
        if self._process is None:
            self._start()
        requests = [{**request.model_dump(), "tokens": request.prompt.tokens()} for request in case.requests]
        body = {**case.model_dump(), "requests": requests, "model_len": MODEL_LEN}
        return self._ask({"case": body, "folders": list(map(str, folders))})

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            for pipe in (self._to, self._from):
                with contextlib.suppress(OSError):
                    pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_WITHIN)  # nothing more to read is its sign to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its workers too
            self._process.wait()
            self._process = None
            self._log.seek(0)
            self._last_words = self._log.read().decode(errors="replace")[-4000:]
            self._log.close()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with the process)
        there, to = os.pipe()
        back, here = os.pipe()
        self._to, self._from = os.fdopen(to, "w"), os.fdopen(back)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(there), str(here)],
            env=environment(self.configuration),
            pass_fds=(there, here),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(there)
        os.close(here)
        self._ask({"model": str(self.model), "llm": arguments(self.configuration), "steer": self.configuration.steer})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self._to.write(json.dumps(message) + "\n")
            self._to.flush()
            ready, _, _ = select.select([self._from], [], [], LONGEST)
            line = self._from.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            raise EngineDied(self._last_words)
        return json.loads(line)


def environment(configuration: Configuration) -> dict[str, str]:
    """Variables of the engine's process."""
    values = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if configuration.processes else "0"}
    if configuration.runner == "v2":
        kept = {name: values[name] for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "PYTHONPATH") if name in values}
        values |= V2.env | kept
        values["PYTHONPATH"] = os.pathsep.join(filter(None, (V2.env["PYTHONPATH"], kept.get("PYTHONPATH"))))
        if configuration.compiled:
            values["VLLM_CPU_CI_ENV"] = "1"  # the interpreter cannot run generated code
    if {"tensor_parallel_size", "pipeline_parallel_size"} & set(configuration.llm):
        values |= two_cores()
    return values


def arguments(configuration: Configuration) -> dict[str, Any]:
    """Arguments of vLLM."""
    return {
        "dtype": "float32",
        "gpu_memory_utilization": 0.1,
        "max_model_len": MODEL_LEN,
        "seed": 0,
        "enforce_eager": not configuration.compiled,
        **configuration.llm,
    }
