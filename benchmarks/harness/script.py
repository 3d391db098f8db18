"""How a script of benchmarks/ is run: what cannot be measured is said in a message, without a traceback."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from steer_vllm.bench import record
from steer_vllm.errors import BenchmarkInvalid, SteerError


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """The option `--output`."""
    parser.add_argument("--output", type=_output, default=Path(default), help=f"JSON file (default: {default})")


def _output(text: str) -> Path:
    """What can be written when all is measured."""
    path = Path(text)
    try:
        record.check_output(path)
    except BenchmarkInvalid as error:
        raise argparse.ArgumentTypeError(error.message) from None
    return path


def run(main: Callable[[], None]) -> None:
    """Call it. Errors of ours become one message and exit status 1, as in `steer-vllm`.

    An interrupt ends it, also where whoever started it ignores them: what it has started ends with it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error.message}")
