"""One run: start the engines, see that every mode does what it says, then let the modes take turns.

All engines live at once and one works at a time; a turn begins when the others use no CPU. Each round runs every mode
once in an order of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..errors import BenchmarkInvalid
from ..fingerprint import Fingerprint
from .artifacts import make
from .engine import Engine
from .modes import CONTROL, PLAIN, STEERED, Mode
from .workload import Workload

_EVERY = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_EVERY_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_AOT_COMPILE": "0"}
_PLUGINS = {PLAIN: "", CONTROL: "", STEERED: "steer_vllm"}


@dataclass(frozen=True)
class Sample:
    """One mode in one round. tokens_per_second: of the whole batch, over `steps` decode steps; step_ms: their median.

    first_tokens_ms: from the call until every request has its first token. others_cpu: CPU time of the engines that
    had to rest, as a share of the turn's length.
    """

    round: int
    turn: int
    mode: str
    tokens_per_second: float
    step_ms: float
    steps: int
    first_tokens_ms: float
    others_cpu: float


@dataclass(frozen=True)
class Outcome:
    """same_as_plain: by mode, the share of requests that generated what plain vLLM did. facts: by engine."""

    samples: list[Sample]
    same_as_plain: dict[str, float]
    facts: dict[str, dict[str, Any]]


def measure(workload: Workload, modes: tuple[Mode, ...], folder: Path, say: Callable[[str], None]) -> Outcome:
    """Run everything. folder: for the model, the artifacts and the engines' logs. say: takes one line of progress.

    Errors: `BenchmarkInvalid` when an engine fails or does not rest, or a mode does not do what it says.
    """
    model = folder / "model"
    workload.write_model(model)
    with ExitStack() as stack:
        engines, facts = _start(dict.fromkeys(mode.engine for mode in modes), workload, model, stack, say)
        if STEERED in engines:
            _load(engines[STEERED], modes, workload, Fingerprint.of(model, weights=False), folder, say)
        same = _rehearse(engines, modes, workload, say)
        samples = list(_rounds(engines, modes, workload, say))
    return Outcome(samples, same, facts)


def _start(
    names: Iterable[str], workload: Workload, model: Path, stack: ExitStack, say: Callable[[str], None]
) -> tuple[dict[str, Engine], dict[str, dict[str, Any]]]:
    """Engines by name, and what they say of themselves.

    On a GPU one after the other, for each looks at what memory is free; on a CPU together, but for the control, which
    takes its compiled code from the cache that the plain engine fills.
    """
    cuda = torch.cuda.is_available()
    engines: dict[str, Engine] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in sorted(names, key=[PLAIN, STEERED, CONTROL].index):
        if cuda or name == CONTROL:
            facts |= {other: engines[other].receive() for other in engines if other not in facts}
        say(f"starting the {name} engine")
        environment = {**_EVERY, **({} if cuda else _EVERY_CPU), "VLLM_PLUGINS": _PLUGINS[name]}
        engines[name] = Engine(name, environment, model.parent / f"{name}.log")
        stack.callback(engines[name].close)
        limits = {"steer": workload.limits()} if name == STEERED else {}
        engines[name].send(steered=name == STEERED, **limits, **workload.engine_arguments(model))
    facts |= {name: engine.receive() for name, engine in engines.items() if name not in facts}
    return engines, facts


def _load(
    engine: Engine,
    modes: tuple[Mode, ...],
    workload: Workload,
    base: Fingerprint,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    wanted = dict.fromkeys(pair for mode in modes for pair in mode.artifacts(workload.batch))
    say(f"making and loading {len(wanted)} interventions")
    made = {
        f"{kind}-{number}": make(kind, number, base, workload.seed, folder / "artifacts") for kind, number in wanted
    }
    engine.ask(call="load", folders={name: str(path) for name, path in made.items()})


def _rehearse(
    engines: dict[str, Engine], modes: tuple[Mode, ...], workload: Workload, say: Callable[[str], None]
) -> dict[str, float]:
    """Run every mode once, untimed, and compare what it generates with plain's.

    Errors: `BenchmarkInvalid` when a mode that steers answers like plain vLLM, or one that does not answers otherwise
    (in float32: coarser types round differently in another graph).
    """
    generated: dict[str, list[list[int]]] = {}
    for mode in modes:
        say(f"rehearsing {mode.name}")
        generated[mode.name] = _run(engines[mode.engine], mode, workload)["tokens"]
    same = {
        name: sum(a == b for a, b in zip(tokens, generated[PLAIN], strict=True)) / workload.batch
        for name, tokens in generated.items()
    }
    for mode in modes:
        if mode.kinds and same[mode.name] > 0.1:
            raise BenchmarkInvalid(f"{mode.name}: {same[mode.name]:.0%} of the requests answer as without intervention")
        if not mode.kinds and same[mode.name] < 0.9 and workload.dtype == "float32":
            raise BenchmarkInvalid(f"{mode.name}: only {same[mode.name]:.0%} of the requests answer as plain vLLM does")
    return same


def _rounds(
    engines: dict[str, Engine], modes: tuple[Mode, ...], workload: Workload, say: Callable[[str], None]
) -> Iterable[Sample]:
    order = random.Random(workload.seed)
    for number in range(workload.rounds):
        for turn, mode in enumerate(order.sample(modes, len(modes))):
            say(f"round {number + 1} of {workload.rounds}: {mode.name}")
            others = [engine for name, engine in engines.items() if name != mode.engine]
            for engine in others:
                engine.rest()
            before, began = sum(engine.cpu_seconds() for engine in others), time.monotonic()
            answer = _run(engines[mode.engine], mode, workload)
            took = time.monotonic() - began
            yield _sample(number, turn, mode, answer, (sum(e.cpu_seconds() for e in others) - before) / took, workload)


def _run(engine: Engine, mode: Mode, workload: Workload) -> dict[str, Any]:
    answer = engine.ask(
        call="run",
        prompts=workload.prompts(),
        tokens=workload.output_tokens,
        interventions=mode.asked(workload.batch),
    )
    if any(len(tokens) != workload.output_tokens for tokens in answer["tokens"]):
        raise BenchmarkInvalid(f"{mode.name}: a request did not generate {workload.output_tokens} tokens")
    if len(answer["decode"]) < workload.output_tokens // 2:
        raise BenchmarkInvalid(f"{mode.name}: only {len(answer['decode'])} steps decoded the whole batch")
    return answer


def _sample(number: int, turn: int, mode: Mode, answer: dict[str, Any], others: float, workload: Workload) -> Sample:
    ended = answer["decode"]
    steps = [b - a for a, b in pairwise(ended)]
    return Sample(
        round=number,
        turn=turn,
        mode=mode.name,
        tokens_per_second=workload.batch * len(steps) / (ended[-1] - ended[0]),
        step_ms=1000 * median(steps),
        steps=len(steps),
        first_tokens_ms=1000 * answer["first_tokens"],
        others_cpu=others,
    )
