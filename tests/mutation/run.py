"""Puts each deliberate fault into a copy of the tree and runs the tests that must notice: `make mutants`.

First the tests run on a copy without a fault, where they must pass: only then is a failure with it its detection. A
mutant that survives is a hole in the tests.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import conftest

from .mutant import Mutant
from .mutants import MUTANTS

FAILED, PASSED = "failed", "passed"
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutation.run")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(BY_NAME)}")
    names = parser.parse_args().names
    if unknown := set(names) - set(BY_NAME):
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [BY_NAME[name] for name in names] or list(MUTANTS)
    for killer in sorted({killer for mutant in chosen for killer in mutant.killers}):
        if (result := run(None, killer)) != PASSED:
            print(f"without any fault, {killer} {result}")
            return 2
    survivors = 0
    for mutant in chosen:
        for killer in mutant.killers:
            started = time.monotonic()
            result = run(mutant, killer)
            survivors += result != FAILED
            verdict = {FAILED: "killed", PASSED: "SURVIVED"}.get(result, result)
            print(f"{mutant.name}: {verdict} by {killer} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(chosen)} mutants, {survivors} not killed")
    return 1 if survivors else 0


def run(mutant: Mutant | None, killer: str) -> str:
    """What became of the test on a copy with that fault. A test that cannot be collected has noticed nothing."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = copy(Path(folder) / "tree")
        if mutant is not None:
            mutant.apply(root)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp", killer],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 1 and re.search(r"\d+ failed", done.stdout):
        return FAILED
    if done.returncode == 0:
        return PASSED
    return f"was not run (exit {done.returncode})\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def copy(folder: Path) -> Path:
    """The tracked files, importable as one package from that folder alone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=conftest.ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (conftest.ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(conftest.ROOT / name, folder / name)
    for part in ("training", "server"):  # an installation maps these two into the package
        (folder / "steer_vllm" / part).symlink_to(folder / part)
    return folder


if __name__ == "__main__":
    sys.exit(main())
