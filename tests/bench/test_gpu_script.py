"""The script for a GPU machine: what it is asked for is understood before anything runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / "benchmarks" / "gpu.sh", *arguments], capture_output=True, text=True, check=False)


def test_help_lists_the_stages(root: Path) -> None:
    done = run(root, "--help")
    assert done.returncode == 0
    assert "benchmarks/gpu.sh [--minutes 9] [--commit HASH] [--dry-run] FOLDER [STAGE ...]" in done.stdout
    stages = re.search(r"Stages: (.*); by name only: (.*)\.", done.stdout)
    assert stages is not None
    text = (root / "benchmarks" / "gpu.sh").read_text()
    for stage in f"{stages[1]} {stages[2]}".split():
        assert len(re.findall(rf"^    {stage}\(\) {{", text, re.MULTILINE)) == 2, "on a GPU and in a dry run"


def test_every_script_is_there(root: Path) -> None:
    named = set(re.findall(r"\bscript ([a-z_]+) --", (root / "benchmarks" / "gpu.sh").read_text()))
    assert {"kernels", "ops", "training"} <= named
    assert all((root / "benchmarks" / f"{name}.py").is_file() for name in named)


def test_mistakes_are_said(root: Path, tmp_path: Path) -> None:
    for arguments in ((), ("--no-such", str(tmp_path)), (str(tmp_path), "no-such-stage")):
        done = run(root, *arguments)
        assert done.returncode == 2
        assert "Stages: smoke decode" in done.stderr
    assert not list(tmp_path.iterdir())
