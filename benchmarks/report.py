"""Writes RESULTS.md from the JSON files in results/.

Usage: python benchmarks/report.py
"""

from __future__ import annotations

from pathlib import Path

from steer_vllm.bench.result import markdown, read

HERE = Path(__file__).resolve().parent


def main() -> None:
    results = {path.stem: read(path) for path in sorted((HERE / "results").glob("*.json"))}
    (HERE / "RESULTS.md").write_text(markdown(results))
    print(f"RESULTS.md: {len(results)} results")


if __name__ == "__main__":
    main()
