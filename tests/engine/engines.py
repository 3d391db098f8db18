"""The engine configurations of the tests, and how one is run: a job for a driver in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Engine:
    """A way to run vLLM: environment and arguments."""

    name: str
    env: dict[str, str] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    runner: str = "v1"
    driver: str = "driver"


_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": str(HERE / "interpreter")}

V1_EAGER = Engine("v1-eager", _IN_PROCESS, {"enforce_eager": True})
V1_COMPILED = Engine("v1-compiled", _IN_PROCESS, {"enforce_eager": False})
V1_PROCESSES = Engine("v1-processes", {}, {"enforce_eager": True, "async_scheduling": True})
V2_PROCESSES = Engine("v2-processes", _V2, {"enforce_eager": True, "async_scheduling": True}, runner="v2")
V2 = Engine("v2", {**_IN_PROCESS, **_V2}, {"enforce_eager": True}, runner="v2")
# Dynamo traces the edit, no code is generated: the interpreter's stand-in backend has no compiler.
V2_TRACED = Engine("v2-traced", {**V2.env, "VLLM_CPU_CI_ENV": "1"}, {"enforce_eager": False}, runner="v2")

OFFLOADING = Engine("offloading", {"PYTHONPATH": str(HERE / "offload")}, {"enforce_eager": True})


def two_cores() -> dict[str, str]:
    """Bind one rank each to two cores that this process may use, or both to the only one."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


_FAULTS = {"PYTHONPATH": str(HERE / "faults")}
TENSOR_PARALLEL = Engine(
    "tensor-parallel",
    {**_FAULTS, **two_cores()},
    {"enforce_eager": True, "tensor_parallel_size": 2},
    driver="async_driver",
)
DATA_PARALLEL = Engine(
    "data-parallel",
    {**_FAULTS, **two_cores()},
    {"enforce_eager": True, "data_parallel_size": 2},
    driver="async_driver",
)
PIPELINE_PARALLEL = Engine(
    "pipeline-parallel",
    {**_V2, **two_cores()},
    {"enforce_eager": True, "pipeline_parallel_size": 2},
    runner="v2",
    driver="async_driver",
)

V1_ASYNC = Engine("v1-async", {}, {"enforce_eager": True, "async_scheduling": True}, driver="async_driver")
V2_ASYNC = Engine("v2-async", _V2, {"enforce_eager": True}, runner="v2", driver="async_driver")


def run(
    engine: Engine,
    folder: Path,
    model: Path,
    steps: list[dict[str, Any]],
    *,
    plain: bool = False,
    steer: dict[str, Any] | None = None,
    **llm: Any,
) -> list[Any]:
    """Run the steps in a fresh engine; the results in order. plain: vLLM alone, with the plugin kept out."""
    arguments = {
        "dtype": "float32",
        "gpu_memory_utilization": 0.1,
        "max_model_len": 192,
        "seed": 0,
        "max_num_seqs": 64,
        "async_scheduling": False,
        **engine.llm,
        **llm,
    }
    job = {"model": str(model), "plain": plain, "llm": arguments, "steer": steer or {}, "steps": steps}
    found: list[Any] = launch(engine, folder, HERE / f"{engine.driver}.py", job, plain=plain)
    return found


def launch(engine: Engine, folder: Path, script: Path, job: Any, *, plain: bool = False, timeout: int = 420) -> Any:
    """Run a script on a job in a process with the engine's environment; what it left as result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    env = {**os.environ, **engine.env, **({"VLLM_PLUGINS": ""} if plain else {})}
    paths = (engine.env.get("PYTHONPATH"), str(HERE.parent), os.environ.get("PYTHONPATH"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(script), str(folder / "job.json"), str(folder / "result.json")]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, should it hang
    assert process.returncode == 0, f"{engine.name}: exit {process.returncode}\n{out[-3000:]}\n{err[-6000:]}"
    return json.loads((folder / "result.json").read_text())
