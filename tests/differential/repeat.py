"""Runs a failing case again: `make repeat CASE=case-....json`; with `--simplify`, also with simpler engines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import conftest

from .case import Case
from .checker import Mismatch
from .engine import EngineDied
from .session import keep, run_once, simplify


def main() -> int:
    parser = argparse.ArgumentParser(prog="differential.repeat")
    parser.add_argument("case", type=Path)
    parser.add_argument("--simplify", action="store_true", help="look for the simplest engine on which it still fails")
    parser.add_argument("--folder", type=Path, default=conftest.CACHE / "differential")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    case = Case.model_validate_json(options.case.read_text())
    if options.simplify:
        case = simplify(case, options.folder)
        print(keep(case, options.folder))
    try:
        print(run_once(case, options.folder))
    except (Mismatch, EngineDied) as error:
        print(case)
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
