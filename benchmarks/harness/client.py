"""vLLM's own benchmark client (`vllm bench serve`) in a process of its own, which is asked run after run.

`python client.py FD`: one end of a socket, on which arguments (a list) and results are lines of JSON. Its function is
called and not the command: the console command of vLLM's CPU build cannot start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS = ("ttft", "tpot", "itl", "e2el")
_RUNS_WITHIN = 600.0  # seconds
_ERROR = "first error"


class Client:
    """The process. What the client prints goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        ours, theirs = socket.socketpair()
        ours.settimeout(_RUNS_WITHIN)
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._lines = ours.makefile("rw")
        ours.close()

    def run(
        self, url: str, model: Path, served: str, names: Sequence[str], arguments: Sequence[str], requests: int
    ) -> dict[str, Any]:
        """One run. model: folder with the tokenizer. names: the models that requests ask for, in turn.

        Errors: `BenchmarkInvalid` when the client fails or a request is not answered.
        """
        from steer_vllm.bench.log import tail
        from steer_vllm.errors import BenchmarkInvalid

        given = [
            *("--backend=openai", f"--base-url={url}", "--endpoint=/v1/completions", "--disable-tqdm"),
            *(f"--model={model}", f"--served-model-name={served}", "--dataset-name=random", "--ignore-eos"),
            *(f"--num-prompts={requests}", "--temperature=0", "--ready-check-timeout-sec=0"),
            *(f"--percentile-metrics={','.join(METRICS)}", "--metric-percentiles=50,99", "--save-detailed"),
            *arguments,
            *(("--lora-assignment=round-robin", "--lora-modules", *names) if names else ()),
        ]
        answer = self._answer(given)
        if "error" in answer or answer["completed"] != requests:
            what = answer.get("error") or (
                f"{answer['completed']} of {requests} requests were answered; one of the others: {answer[_ERROR]}"
            )
            raise BenchmarkInvalid(f"{served} at {url}: {what}; the end of the client's log:\n{tail(self._log)}")
        return answer

    def _answer(self, given: Sequence[str]) -> dict[str, Any]:
        try:
            self._lines.write(json.dumps(given) + "\n")
            self._lines.flush()
            line = self._lines.readline()
        except TimeoutError:
            return {"error": f"the client has not answered in {_RUNS_WITHIN:g} s"}
        except ConnectionError:  # it ended before it read the arguments
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the client ended"}
        return answer

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process group; where something went wrong or it does not end by itself, at once."""
        with suppress(ConnectionError):  # what it was not sent any more
            self._lines.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20 if kind is None else 0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main() -> None:
    """Answer until the other end closes. Only the summaries of a result are sent, and of the errors the first."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = FlexibleArgumentParser()
    add_cli_args(parser)
    with socket.socket(fileno=int(sys.argv[1])) as end, end.makefile("rw") as lines:
        end.set_inheritable(False)
        for line in lines:
            answer: dict[str, Any]
            try:
                result = bench(parser.parse_args(json.loads(line)))
                answer = {name: value for name, value in result.items() if isinstance(value, (int, float))}
                answer[_ERROR] = next(filter(None, result["errors"]), "no error is given")
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
