"""What is read of vLLM's objects, class by class; what is replaced or called is `requirements`'.

`scripts/check_vllm.py` checks it on vLLM's source, where importing would not show it. Nothing here imports vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    Field(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        ("req_ids", "num_computed_tokens_cpu", "num_prompt_tokens"),
        "runner_v1.py",
    ),
    Field(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        ("req_ids", "num_reqs", "query_start_loc", "positions", "num_tokens", "is_prefilling_np"),
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
    Field("vllm.lora.worker_manager", "WorkerLoRAManager", ("_adapter_manager",), "adapters.py"),
    Field("vllm.lora.model_manager", "LoRAModelManager", ("lora_index_to_id",), "adapters.py"),
    Field("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA", ("lora_b_stacked",), "projection.py"),
    Field(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels",
        ("lora_requests",),
        "adapters.py",
    ),
    Field(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels",
        ("base_model_paths",),
        "endpoint.py",
    ),
    Field("vllm.v1.engine.core_client", "AsyncMPClient", ("core_engines",), "client.py"),
    Field(
        "vllm.v1.engine.core_client",
        "AsyncMPClient",
        ("core_engines", "client_index", "client_count"),
        "names_client.py",
    ),
    Field("vllm.v1.engine.core", "EngineCore", ("step_fn",), "ending.py"),
    Field("vllm.v1.engine.core", "EngineCoreProc", ("output_queue",), "ending.py"),
    Field("vllm.v1.core.sched.scheduler", "Scheduler", ("requests",), "lifetimes.py"),
    Field("vllm.v1.request", "Request", ("request_id", "client_index", "sampling_params"), "lifetimes.py"),
    Field("vllm.v1.request", "RequestStatus", ("FINISHED_ERROR",), "lifetimes.py"),
    Field("vllm.v1.engine", "EngineCoreOutput", ("request_id", "new_token_ids", "finish_reason"), "ending.py"),
    Field("vllm.v1.engine", "EngineCoreOutputs", ("outputs",), "ending.py"),
    Field("vllm.v1.engine", "FinishReason", ("ERROR",), "ending.py"),
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
