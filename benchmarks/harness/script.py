"""How a script of benchmarks/ is run: what cannot be measured is said in a message, without a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from steer_vllm.errors import SteerError


def run(main: Callable[[], None]) -> None:
    """Call it. Errors of ours become one message and exit status 1, as in `steer-vllm`.

    An interrupt ends it, also where whoever started it ignores them: what it has started ends with it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error.message}")
