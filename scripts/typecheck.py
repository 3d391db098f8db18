"""Runs mypy over the package as it will be installed, and over the benchmarks as they are run.

`training/` and `server/` are imported as `steer_vllm.training` and `steer_vllm.server`, a script's neighbours by their
bare names; mypy follows folders, not the installer's mapping. So it is shown a folder of links in which they stand
where they are found.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "types"
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def link_tree() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "steer_vllm"
    package.mkdir(parents=True)
    for entry in [*(ROOT / "steer_vllm").iterdir(), ROOT / "training", ROOT / "server"]:
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for entry in [*SCRIPTS, ROOT / "benchmarks" / "harness"]:
        (TREE / entry.name).symlink_to(entry)


def main() -> int:
    link_tree()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "steer_vllm", "-p", "harness"]
    command += [f"--module={script.stem}" for script in SCRIPTS]
    answer = subprocess.run([*command, *sys.argv[1:]], cwd=TREE, stdout=subprocess.PIPE, text=True)
    shown = re.sub(r"^steer_vllm/(training|server)/", r"\1/", answer.stdout, flags=re.MULTILINE)
    print(re.sub(r"^(harness/|\w+\.py:)", r"benchmarks/\1", shown, flags=re.MULTILINE), end="")
    return answer.returncode


if __name__ == "__main__":
    sys.exit(main())
