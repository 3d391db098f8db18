"""What the plugin costs the host in each step, in microseconds: both runners' hooks, called as their runners call them.

Usage: python benchmarks/step.py [--requests 256] [--output FILE]

The steering is that of a real engine in this process; the batches are made here, so that every case can be called often
and without the model. What the hooks wrap does nothing. On a GPU this is the time until the work is handed over, not
until it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import script
from harness.target import Interval, Target

from steer_vllm.bench import record
from steer_vllm.bench.fleet import limits
from steer_vllm.bench.shapes import SHAPES
from steer_vllm.bench.spread import Spread
from steer_vllm.bench.workload import Load, Workload
from steer_vllm.engine import runner_v1, runner_v2
from steer_vllm.engine.worker import WorkerSteering, found_in
from steer_vllm.packed import Packed
from steer_vllm.plan import Fill, Placement, Plan
from steer_vllm.positions import OPEN
from steer_vllm.segments import Term

FORMAT = 1
PROMPT, CHUNK, LAYERS = 512, 2048, 2
NOTHING_CHANGED = "decoding, nothing changed"


def _nothing_changed(runner: str) -> Callable[[Mapping[str, Any]], Interval]:
    def of(result: Mapping[str, Any]) -> Interval:
        (found,) = (one for one in result["cases"] if (one["runner"], one["case"]) == (runner, NOTHING_CHANGED))
        return Interval.of(found["samples"])

    return of


TARGETS = tuple(
    Target(
        f"host time of a decode step in which nothing changed, runner {runner}, us",
        30.0,
        "{:.3g}",
        _nothing_changed(runner),
    )
    for runner in ("V1", "V2")
)

Step = Callable[[list[str], int, bool], Callable[[], Any]]
"""A step of these requests and so many tokens, which all decode or do not: what calls the hook for it."""


class Steps:
    """The hooks of both runners around nothing, over batches as the runners would hold them."""

    def __init__(self, steering: WorkerSteering, requests: int) -> None:
        self._steering = steering
        self._requests = requests
        self._positions = torch.full((max(CHUNK, requests),), PROMPT, device=steering.device)
        self._prompts = np.full(requests, PROMPT, dtype=np.int32)

    def _starts(self, tokens: int) -> torch.Tensor:
        """As many tokens for each request."""
        whole = torch.arange(self._requests + 1) * tokens // self._requests
        return whole.to(self._steering.device, torch.int32)

    def v1(self, names: list[str], tokens: int, decoding: bool) -> Callable[[], Any]:
        class Runner:
            steering, positions = self._steering, self._positions
            query_start_loc = SimpleNamespace(gpu=self._starts(tokens))
            input_batch = SimpleNamespace(
                req_ids=names,
                num_computed_tokens_cpu=self._prompts if decoding else self._prompts - 1,
                num_prompt_tokens=self._prompts,
            )

            def _prepare_inputs(self, output: Any, scheduled: Any) -> None:
                return None

        runner_v1._patch_prepare(Runner)
        return partial(Runner()._prepare_inputs, SimpleNamespace(total_num_scheduled_tokens=tokens), None)

    def v2(self, names: list[str], tokens: int, decoding: bool) -> Callable[[], Any]:
        state = SimpleNamespace(add_request=None, remove_request=None, prepare_inputs=lambda batch, states: None)
        runner_v2._steer(state, self._steering)
        batch = SimpleNamespace(
            req_ids=names,
            num_reqs=len(names),
            query_start_loc=self._starts(tokens),
            positions=self._positions,
            num_tokens=tokens,
            is_prefilling_np=np.full(len(names), not decoding),
        )
        return partial(state.prepare_inputs, batch, None)


def plan(steering: WorkerSteering, number: int) -> Plan:
    """All positions, with a row of its own; its content goes into the store."""
    content = Term(f"content-{number}", 0, 1.0)
    shape = len(steering.layout.additive), steering.layout.hidden_size
    steering.store[content.digest, content.part] = Packed(torch.ones(shape, dtype=steering.dtype), None)
    return Plan((), (Placement(0, OPEN, number + 1, 0, 1.0),), (Fill(number + 1, (content,)),), ())


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Microseconds of a call."""
    for _ in range(repeats // 10 + 1):
        call()
    samples = []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - began) / 1000)
    return samples


def measure(worker: Any, requests: int, repeats: int) -> list[dict[str, Any]]:
    """Every case on both runners. The engine serves nothing meanwhile."""
    steering = found_in(worker)
    assert steering is not None
    steps = Steps(steering, requests)
    return [
        {"runner": runner, "case": case, "samples": samples}
        for runner, step in (("V1", steps.v1), ("V2", steps.v2))
        for case, samples in cases(steering, step, requests, repeats)
    ]


def cases(steering: WorkerSteering, step: Step, requests: int, repeats: int) -> Iterator[tuple[str, list[float]]]:
    """Name and microseconds of each."""
    *names, last = (f"request-{i}" for i in range(requests + 1))
    plans = {name: plan(steering, number) for number, name in enumerate([*names, last])}
    decode = step(names, requests, True)
    yield "nothing steered", timed(decode, repeats)
    for name in plans:
        steering.add(name, plans[name])
    yield NOTHING_CHANGED, timed(decode, repeats)
    turns = cycle([decode, step([*names[:-1], last], requests, True)])
    yield "decoding, another batch than before", timed(lambda: next(turns)(), repeats)
    yield f"prefill, {CHUNK} tokens", timed(step(names, CHUNK, False), repeats)
    enter = partial(steering.add, last, plans[last])
    yield f"a request leaves and enters, {requests} others there", timed(enter, repeats)
    for name in names:
        steering.remove(name)
    yield "a request leaves and enters, no other there", timed(enter, repeats)
    steering.remove(last)


def markdown(result: dict[str, Any]) -> str:
    """Its section of RESULTS.md."""
    lines = [
        f"Microseconds of host time that the plugin adds to a step of {result['workload']['requests']} requests, each "
        f"with an intervention of its own. {record.origin(result)}",
        "",
        record.how(result),
        "",
        "| runner | case | median | quartiles |",
        "|---|---|---|---|",
    ]
    for row in result["cases"]:
        spread = Spread.of(row["samples"])
        lines.append(f"| {row['runner']} | {row['case']} | {spread.median:.1f} | {spread.q1:.1f} to {spread.q3:.1f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256, help="in the batch (default: 256)")
    parser.add_argument("--repeats", type=int, default=2000, help="calls of each case (default: 2000)")
    script.add_output(parser, "step.json")
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "steer_vllm"}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from steer_vllm.engine.llm import LLM

    shape = replace(SHAPES["100m"], num_hidden_layers=LAYERS)
    workload = Workload(shape, (Load(options.requests, PROMPT // 8, PROMPT // 8),), compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        workload.write_model(Path(folder))
        steer = limits(options.requests, low_rank=True) | {"additive_rows": options.requests + 1}
        llm = LLM(steer=steer, gpu_memory_utilization=0.1, **workload.engine_arguments(Path(folder)))
        (measured,) = llm.collective_rpc(measure, args=(options.requests, options.repeats))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    workload_facts = {"requests": options.requests, "repeats": options.repeats, "layers": LAYERS}
    result = record.begin("step", FORMAT, workload_facts, device) | {"cases": measured}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    script.run(main)
