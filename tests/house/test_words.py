"""The repository speaks of itself alone: it holds for any machine, any package source and any reader."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_HERE = {
    "a package index": r"py" + r"pi\.(org|python\.org)|python" + r"hosted\.org|simple" + r"/\s*$",
    "an index setting": r"(?<!extra-)index-" + r"url|PIP_" + r"INDEX|--trusted-" + r"host",
    "a path of one machine": r"(?<![\w.})/-])/(work|root|home/\w+|Users/\w+|opt/\w+|tmp/(bash|brief)\w*)(/|\b)",
    "a document that is not here": r"\b(DESIGN|VLLM|METHODS|SURFACE|STYLE|RULES)\." + r"md\b|\.\./sha" + r"red\b",
    "how it came about": r"(?i)\bsit"
    + r"tings?\b|\bwork"
    + r"place\b|\bthe bri"
    + r"ef\b|\b(?<!vLLM )issue #?\d{1,3}\b",
}


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def offences(text: str, pattern: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]


@pytest.mark.parametrize("what", NOT_HERE)
def test_nothing_names(what: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content:
            for number, line in offences(content.decode(), NOT_HERE[what]):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, f"{what} is named:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "bad"),
    [
        ("a package index", "https://py" + "pi.org/simple/torch"),
        ("an index setting", "pip install --index-" + "url https://example.com"),
        ("a path of one machine", 'MODEL = "/wo' + 'rk/models/tiny"'),
        ("a path of one machine", "see /ro" + "ot/x"),
        ("a document that is not here", "see DESIGN" + ".md, section 3"),
        ("how it came about", "asked for in iss" + "ue 2"),
    ],
)
def test_patterns_find(what: str, bad: str) -> None:
    assert offences(bad, NOT_HERE[what])


@pytest.mark.parametrize(
    ("what", "good"),
    [
        ("a path of one machine", "frameworks/root/work, ../work and {base}/root"),
        ("how it came about", "as vLLM issue 167 says"),
        ("an index setting", "--extra-index-url"),
    ],
)
def test_patterns_pass(what: str, good: str) -> None:
    assert not offences(good, NOT_HERE[what])
