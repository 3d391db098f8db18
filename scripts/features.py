"""Writes docs/features.md from `steer_vllm/engine/features.py`; with --check it only says whether that is done."""

from __future__ import annotations

import sys
from pathlib import Path

from steer_vllm.engine.features import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "features.md"
HEAD = """# Features of vLLM

How each stands with interventions. A refusal names the feature and its reason: at start-up the server does not start,
per request the answer is an error. `steer-vllm doctor` prints the same. Written by `python scripts/features.py`.

"""


def main() -> int:
    page = HEAD + markdown()
    if "--check" in sys.argv:
        return int(not PAGE.is_file() or PAGE.read_text() != page)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
