"""The long run: `make fuzz MINUTES=60`. Draws one configuration after the other and plays cases in each.

Every configuration adds a line to a JSON-lines record; `python -m differential.fuzz --summary RECORD...` adds records
up. A failure is printed with the command that repeats it; the run goes on and exits with 1 at its end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import conftest  # sets the environment that engines need

from steer_vllm.engine.requirements import vllm_version

from . import configurations
from .checker import Count
from .hunt import Failure, hunt, watch

CANARY_EVERY, CANARY_ROUNDS = 4, 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="differential.fuzz", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="after which no other configuration begins; the last one is ended"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first configuration")
    parser.add_argument("--examples", type=int, default=40, help="cases in each configuration")
    parser.add_argument(
        "--folder", type=Path, default=conftest.CACHE / "differential", help="for the record and for failing cases"
    )
    parser.add_argument("--summary", type=Path, nargs="+", help="add up these records and run nothing")
    options = parser.parse_args()
    if options.summary:
        print(json.dumps(summary(options.summary), indent=1))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    return fuzz(options.seed, 60 * options.minutes, options.examples, options.folder)


def fuzz(first: int, seconds: float, examples: int, folder: Path) -> int:
    """Run for about that long; 1 when a configuration failed, else 0."""
    record = folder / f"record-{first}.jsonl"
    end = time.monotonic() + seconds
    seed, failed = first, 0
    while time.monotonic() < end:
        started, failure, count = time.monotonic(), None, Count()
        try:
            count.add(hunt(seed, examples, folder))
            if seed % CANARY_EVERY == 0:
                count.add(watch(seed, CANARY_ROUNDS, folder))
        except Failure as error:
            failure = str(error)
            failed = 1
            print(failure, file=sys.stderr, flush=True)
        line = {
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
            **asdict(count),
            "failure": failure,
            "commit": commit(),
            "vllm": vllm_version(),
            "configuration": configurations.draw(seed).model_dump(),
        }
        with record.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"configuration {seed}: {'FAILED' if failure else 'ok'} {line['seconds']} s, {count}", flush=True)
        seed += 1
    print(json.dumps(summary([record]), indent=1))
    return failed


def summary(records: list[Path]) -> dict[str, Any]:
    """Sums over the lines of these records."""
    lines = [json.loads(line) for record in records for line in record.read_text().splitlines()]
    total = Count()
    for line in lines:
        total.add(Count(**{name: line[name] for name in asdict(total)}))
    return {
        "configurations": len({json.dumps(line["configuration"], sort_keys=True) for line in lines}),
        "seeds": [min(line["seed"] for line in lines), max(line["seed"] for line in lines)] if lines else [],
        "hours": round(sum(line["seconds"] for line in lines) / 3600, 2),
        **asdict(total),
        "failures": [line["seed"] for line in lines if line["failure"]],
        "commits": sorted({line["commit"] for line in lines}),
        "vllm": sorted({line["vllm"] for line in lines}),
    }


def commit() -> str:
    """The commit that is checked out, marked where the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=conftest.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
