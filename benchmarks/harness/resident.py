"""What is resident, without an engine: a row of the tables, and the core's admission among few or many artifacts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from steer_vllm.bench.artifacts import KINDS
from steer_vllm.config import SteerConfig
from steer_vllm.edit import Place
from steer_vllm.engine.admission import Admission
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.packed import Layout, pack
from steer_vllm.plan import PartSummary, Summary
from steer_vllm.positions import Positions
from steer_vllm.request import Steering
from steer_vllm.segments import Component
from steer_vllm.slots import SlotTables


def rows(base: Fingerprint, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """What an artifact and a row take, and the microseconds to fill a row from host memory, per kind of artifact.

    copied: until the device has it. handed over: until the host can go on, which is all that a step waits for.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SteerConfig(additive_rows=8, low_rank_rows=8)
    places = [Place(layer, site) for layer in range(base.num_layers) for site in (*config.additive_sites,)]
    tables = SlotTables(Layout.of(places, base.hidden_size, config), config, dtype, device)
    found = []
    for kind in ("direction", "loreft"):
        intervention = KINDS[kind](base, torch.Generator().manual_seed(0))
        (edits,) = intervention.compile(lambda layer, heads: heads)
        packed = pack(edits, tables.layout, dtype, kind)
        packed = packed.pinned() if device.type == "cuda" else packed
        write = tables.write_additive if packed.offset is not None else tables.write_low_rank
        row = tables.additive[1] if packed.offset is not None else (tables.low_rank.A[1], tables.low_rank.B[1])
        handed, copied = _timed(partial(write, 1, packed), repeats)
        found.append(
            {
                "kind": kind,
                "artifact_bytes": packed.nbytes,
                "row_bytes": sum(part.nbytes for part in (row if isinstance(row, tuple) else (row,))),
                "handed_over_us": handed,
                "copied_us": copied,
            }
        )
    return found


def _timed(write: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """Microseconds until the call is back, and until the device is done."""
    handed, copied = [], []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        write()
        back = time.perf_counter_ns()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        handed.append((back - began) / 1000)
        copied.append((time.perf_counter_ns() - began) / 1000)
    return handed, copied


def admission(loaded: int, repeats: int) -> list[float]:
    """Microseconds in which the core admits a request with one intervention and releases it, `loaded` being there."""
    book = Admission(SteerConfig(), largest=3e38)
    digests = [f"{number:064x}" for number in range(loaded)]
    for digest in digests:
        book.publish(Summary(digest, (PartSummary(True, 0, 1.0),)))
    samples = []
    for number in range(repeats):
        steering = Steering((Component(digests[number % loaded], 1.0, Positions("response")),))
        began = time.perf_counter_ns()
        book.release(book.admit(steering, 100))
        samples.append((time.perf_counter_ns() - began) / 1000)
    return samples
