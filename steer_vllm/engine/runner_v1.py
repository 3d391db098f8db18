"""Hooks into vLLM's first V1 model runner (`GPUModelRunner`, and `CPUModelRunner` on top of it).

Turns what that runner keeps into `WorkerSteering` calls; knows nothing of edits.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

from .lifetimes import plan_of
from .worker import StepView, attach


def install() -> None:
    """Ledger: replaces four methods of `GPUModelRunner`, one of `CPUModelRunner`.

    What: `load_model` also wraps the layers; `_update_states` also tells which requests left and entered;
    `_prepare_inputs` also sets the token slots, and `_dummy_run`, which does not call it, clears them: an idle engine
    of a data-parallel group runs dummy batches in step with the others. Why: the runner has no plugin interface
    between its state and the model. Since 0.26 (`load_model` gains keywords in 0.32, `_prepare_inputs` returns three
    values there: both pass through). Can go with this runner, which vLLM has deprecated on CUDA.
    """
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _patch_load(GPUModelRunner)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        _patch_load(CPUModelRunner)  # it overrides load_model without calling its parent's
    _patch_update(GPUModelRunner)
    _patch_prepare(GPUModelRunner)
    _patch_dummy(GPUModelRunner)


def _patch_load(runner: Any) -> None:
    load_model = runner.load_model

    @wraps(load_model)
    def load_and_attach(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(self, *args, **kwargs)
        if getattr(self, "steering", None) is None:
            self.steering = attach(self, self.get_model())
        return result

    runner.load_model = load_and_attach


def _patch_update(runner: Any) -> None:
    update_states = runner._update_states

    @wraps(update_states)
    def update_and_tell(self: Any, scheduler_output: Any) -> Any:
        result = update_states(self, scheduler_output)
        if self.steering is not None:
            for request_id in scheduler_output.finished_req_ids:
                self.steering.remove(request_id)
            for new in scheduler_output.scheduled_new_reqs:
                self.steering.add(new.req_id, plan_of(new.sampling_params))
        return result

    runner._update_states = update_and_tell


def _patch_prepare(runner: Any) -> None:
    prepare_inputs = runner._prepare_inputs

    @wraps(prepare_inputs)
    def prepare_and_route(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = prepare_inputs(self, scheduler_output, num_scheduled_tokens)
        if self.steering is not None:
            batch, tokens = self.input_batch, scheduler_output.total_num_scheduled_tokens
            self.steering.prepare(
                StepView(
                    request_ids=batch.req_ids,
                    query_start_loc=self.query_start_loc.gpu,
                    positions=self.positions,
                    tokens=tokens,
                    decoding=tokens == len(batch.req_ids) and _behind_prompts(batch),
                )
            )
        return result

    runner._prepare_inputs = prepare_and_route


def _behind_prompts(batch: Any) -> bool:
    """Is every request past its prompt? Drafts that may yet be rejected are counted, prompts hold none."""
    count = len(batch.req_ids)
    return bool((batch.num_computed_tokens_cpu[:count] >= batch.num_prompt_tokens[:count]).all())


def _patch_dummy(runner: Any) -> None:
    dummy_run = runner._dummy_run

    @wraps(dummy_run)
    def clear_and_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steering is not None:
            self.steering.rest()
        return dummy_run(self, *args, **kwargs)

    runner._dummy_run = clear_and_run
