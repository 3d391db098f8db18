"""CPU time of process groups, and waiting until they use none: what rests does not disturb what is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import BenchmarkInvalid

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Resting(Protocol):
    """What is started for a benchmark."""

    name: str

    def cpu_seconds(self) -> float:
        """CPU time that its processes have used."""


def cpu_seconds(group: int) -> float:
    """CPU time that the processes of the group have used."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks * _TICK


def rest(started: Sequence[Resting], within: float = 10.0) -> None:
    """Wait until they use no CPU: vLLM's workers poll for about a second after their last step.

    Errors: `BenchmarkInvalid` naming those that do not come to rest.
    """
    deadline = time.monotonic() + within
    busy = list(started)
    while busy and time.monotonic() < deadline:
        before = [one.cpu_seconds() for one in busy]
        time.sleep(0.15)
        used = [one.cpu_seconds() - was for one, was in zip(busy, before, strict=True)]
        busy = [one for one, more in zip(busy, used, strict=True) if more > 1.5 * _TICK]
    if busy:
        names = ", ".join(one.name for one in busy)
        raise BenchmarkInvalid(f"{names}: still uses CPU {within:.0f} s after its last step")
