"""The engines of a run: started with what their modes need, filled with interventions and adapters, and asked.

All are alive at once and one works at a time. On a GPU each is given its KV cache in bytes, so that none looks at the
memory that others take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..engine.probe import GO_ON
from ..fingerprint import Fingerprint
from .artifacts import RANK, make_all
from .engine import Engine
from .lora import make_adapter
from .modes import ADDITIVE, CONTROL, EAGER, ENGINES, LORA, PLAIN, STEERED, Case
from .workload import ALIGN, Load, Workload

_EVERY = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_ON_CPU = {
    # Core and worker in the engine's one process: the worker's would poll for a second after every turn, on the few
    # cores that the next engine wants, and what the plugin does would hide behind what the core does meanwhile.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
}
SHARE = 8
"""Steps that one of two engines in alternation makes until it lets the other work. The first is not counted: it finds
caches and threads as the other left them. Few enough that what else happens on the machine happens to both."""
_GIB = 1 << 30
_GPU_BLOCK = 16
"""KV block size of vLLM's attention on a GPU; several engines share its memory."""


class Fleet:
    """engines: by name. facts: what each says of itself. share: steps at a time of those that decode in alternation.

    On a GPU none do, and it is None: core and worker have a process of their own there, and work on when the process
    that asks them stands still.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        workload: Workload,
        folder: Path,
        stack: ExitStack,
        say: Callable[[str], None],
        more: dict[str, str] | None = None,
    ) -> None:
        """Start every engine that a case needs; `stack` ends them. more: environment variables for all.

        folder: for the model, the artifacts and the logs. The control starts when plain vLLM is there: it takes
        its compiled code from the same cache. Interventions are made while engines start, and loaded while it starts.
        Errors: `BenchmarkInvalid` when an engine does not start or refuses an intervention.
        """
        self.engines: dict[str, Engine] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.share = None if torch.cuda.is_available() else SHARE
        self._cases, self._workload, self._folder = cases, workload, folder
        self._model = folder / "model"
        self._adapter = folder / "adapter"
        workload.write_model(self._model)
        names = sorted({case.mode.engine for case in cases}, key=ENGINES.index)
        say(f"starting {len(names)} engines ({', '.join(names)}), making interventions")
        for name in names:
            if name != CONTROL:
                self._start(name, more or {}, stack)
        made = self._make()
        self._await()
        if CONTROL in names:
            self._start(CONTROL, more or {}, stack)
        if made:
            say(f"loading {len(made)} interventions")
            self.engines[STEERED].ask(call="load", folders=made)
        self._await()

    def _start(self, name: str, more: dict[str, str], stack: ExitStack) -> None:
        steered = name in (STEERED, ADDITIVE)
        arguments, environment = _memory(self._workload)
        environment = {**_EVERY, **environment, "VLLM_PLUGINS": "steer_vllm" if steered else "", **more}
        self.engines[name] = stack.enter_context(Engine(name, environment, self._folder / f"{name}.log"))
        arguments = {**self._workload.engine_arguments(self._model), **arguments, **self._own(name)}
        self.engines[name].send(steered=steered, **arguments)

    def _own(self, name: str) -> dict[str, Any]:
        """What this engine has that others do not."""
        if name == EAGER:
            return {"enforce_eager": True}
        if name == LORA:
            most = max(case.distinct for case in self._cases if case.mode.adapters)
            return {"enable_lora": True, "max_loras": most, "max_cpu_loras": most, "max_lora_rank": RANK}
        if name in (STEERED, ADDITIVE):
            return {"steer": limits(self._workload.requests, low_rank=name == STEERED)}
        return {}

    def _await(self) -> None:
        self.facts |= {name: engine.receive() for name, engine in self.engines.items() if name not in self.facts}

    def _make(self) -> dict[str, str]:
        """Interventions by name, and the adapter."""
        if any(case.mode.adapters for case in self._cases):
            make_adapter(self._workload.shape, self._workload.dtype, self._workload.seed, self._adapter)
        wanted = dict.fromkeys(pair for case in self._cases for pair in case.artifacts())
        base = Fingerprint.of(self._model, weights=False)
        made = make_all(wanted, base, self._workload.seed, self._folder / "artifacts")
        return {path.name: str(path) for path in made}

    def ask(self, case: Case, call: str, **more: Any) -> dict[str, Any]:
        """What the probe of the case's engine answers to one of its calls for this batch."""
        return self.engines[case.mode.engine].ask(**self._request(case, call, **more))

    def _request(self, case: Case, call: str, **more: Any) -> dict[str, Any]:
        numbers = case.adapters()
        return {
            "call": call,
            "prompts": self._workload.prompts(case.load),
            "interventions": case.interventions(),
            "adapters": None if numbers is None else [[number, str(self._adapter)] for number in numbers],
            **more,
        }

    def together(self, cases: Sequence[Case]) -> Sequence[Sequence[Case]]:
        """Which cases of a load work in alternation: each that decodes and plain vLLM, where engines can do so."""
        plain = [case for case in cases if case.mode.name == PLAIN]
        others = [case for case in cases if case.mode.name != PLAIN]
        if self.share is None or not (others and cases[0].load.decodes):
            return [[case] for case in cases]
        return [[*plain, case] for case in others]

    def run(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What the probes answer to the batches of these cases, each of another engine: several work in alternation."""
        share = self.share if len(cases) > 1 else None
        requests = {case: self._request(case, "run", share=share, **_length(case.load)) for case in cases}
        answers: dict[Case, dict[str, Any]] = {}
        while requests:
            for case, request in list(requests.items()):
                answer = self.engines[case.mode.engine].ask(**request)
                if "waits" in answer:
                    requests[case] = GO_ON
                else:
                    answers[case] = answer
                    del requests[case]
        return [answers[case] for case in cases]


def _length(load: Load) -> dict[str, int]:
    return {"tokens": load.output_tokens, "repeats": load.repeats}


def limits(requests: int, low_rank: bool) -> dict[str, int]:
    """Steering limits: row counts as by default, or one per request; the rank that is served."""
    return {
        "additive_rows": max(256, requests),
        "low_rank_rows": max(64, requests) if low_rank else 0,
        "max_rank": RANK,
    }


def _memory(workload: Workload) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments and environment variables that bound an engine's memory.

    gpu_memory_utilization: what must be free when an engine starts; of a CPU's memory likewise.
    """
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": workload.kv_bytes(_GPU_BLOCK)}, {}
    space = -(-workload.kv_bytes(ALIGN) // _GIB)
    return {"gpu_memory_utilization": 0.1}, {"VLLM_CPU_KVCACHE_SPACE": str(space), **_ON_CPU}
