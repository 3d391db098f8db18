"""The end of what a process printed, for whoever asks why it failed."""

from __future__ import annotations

from pathlib import Path

_LINES = 100
"""That many are shown: the cause comes before a trace of all who waited for it."""


def tail(log: Path) -> str:
    """Its last lines. Bytes that are no text are replaced."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LINES:])
