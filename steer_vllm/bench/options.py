"""What the options of a benchmark may be: dtypes, and lists of batches, prefill loads, distinct interventions."""

from __future__ import annotations

import re

from ..errors import BenchmarkInvalid
from .workload import Load

DTYPES = ("float32", "bfloat16", "float16")
PREFILL_REPEATS = 4
"""A prefill is one step: a turn takes the median of several."""


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,16,64`; the empty text is no number. Errors: `BenchmarkInvalid` for anything but counts from 1 up."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BenchmarkInvalid(f"{option} {text}: expected numbers from 1 up, with commas")
    return tuple(dict.fromkeys(int(part) for part in parts))


def loads(batch: str, prompt_tokens: int, output_tokens: int, prefill: str) -> tuple[Load, ...]:
    """Decode loads for each number of `batch`, prefill loads for each REQUESTSxTOKENS of `prefill`.

    Errors: `BenchmarkInvalid` for other texts, and where there is no load at all.
    """
    found = [Load(requests, prompt_tokens, output_tokens) for requests in numbers("--batch", batch)]
    for part in (part.strip() for part in prefill.split(",") if part.strip()):
        sizes = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", part)
        if sizes is None:
            raise BenchmarkInvalid(f"--prefill {prefill}: expected REQUESTSxTOKENS like 1x2048, with commas")
        found.append(Load(int(sizes[1]), int(sizes[2]), 1, PREFILL_REPEATS))
    if not found:
        raise BenchmarkInvalid("neither --batch nor --prefill: there is nothing to run")
    return tuple(dict.fromkeys(found))
