"""Hooks into vLLM's Model Runner V2, through the model state it makes for every model.

Turns its calls into `WorkerSteering` calls; knows nothing of edits.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from .lifetimes import plan_of
from .worker import StepView, WorkerSteering, attach


def install() -> None:
    """Ledger: replaces `init_model_state` where `model_runner` has imported it.

    What: the model state that vLLM makes also steers. It is made after the weights are loaded and before the first
    forward, and its methods are called at the points that matter. Why: vLLM lets a model class bring a state of its
    own, but no plugin add to every model's. Since 0.26. Can go when it does.
    """
    from vllm.v1.worker.gpu import model_runner

    init_model_state = model_runner.init_model_state

    @wraps(init_model_state)
    def init_and_attach(vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> Any:
        state = init_model_state(vllm_config, model, encoder_cache, device)
        state.steering = attach(state, model)
        if state.steering is not None:
            _steer(state, state.steering)
        return state

    model_runner.init_model_state = init_and_attach


def _steer(state: Any, steering: WorkerSteering) -> None:
    add_request, remove_request, prepare_inputs = state.add_request, state.remove_request, state.prepare_inputs

    def add_and_tell(req_index: int, new_req_data: Any) -> Any:
        result = add_request(req_index, new_req_data)
        steering.add(new_req_data.req_id, plan_of(new_req_data.sampling_params))
        return result

    def remove_and_tell(req_id: str) -> Any:
        steering.remove(req_id)
        return remove_request(req_id)

    def prepare_and_route(input_batch: Any, req_states: Any) -> Any:
        steering.prepare(
            StepView(
                request_ids=input_batch.req_ids[: input_batch.num_reqs],
                query_start_loc=input_batch.query_start_loc,
                positions=input_batch.positions,
                tokens=input_batch.num_tokens,
                decoding=input_batch.num_tokens == input_batch.num_reqs and not input_batch.is_prefilling_np.any(),
            )
        )
        return prepare_inputs(input_batch, req_states)

    state.add_request, state.remove_request, state.prepare_inputs = add_and_tell, remove_and_tell, prepare_and_route
