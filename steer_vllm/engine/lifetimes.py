"""How long a request holds what it uses: from its arrival in the engine core to its end, however it ends.

Turns vLLM's calls into `Admission` calls; what content is loaded, and how, is not known here.
"""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ..errors import SteerError, Unsupported
from ..plan import Plan
from ..request import EXTRA_ARG, Steering
from . import adapters
from .admission import Admission
from .ending import tell
from .settings import steer_config

_creating = threading.Lock()


def plan_of(sampling_params: Any) -> Plan | None:
    """The plan that an admitted request carries."""
    extra = sampling_params.extra_args if sampling_params is not None else None
    return extra.get(EXTRA_ARG) if extra else None


def install() -> None:
    """Ledger: replaces `EngineCore.preprocess_add_request`, `EngineCoreProc._reject_add_in_shutdown` (and
    `_reject_add_while_paused`, which 0.33 adds), `Scheduler._free_request`, `EngineCore.add_lora` and `remove_lora`.

    What: a request is checked and pinned before vLLM builds it (block hashes are computed in its constructor), and
    released where the scheduler frees it, or where it is turned away before the scheduler sees it. Why: workers never
    see waiting requests, so only the core can count users; an exception in preprocessing fails that request alone.
    An adapter that is loaded or removed is checked again beside interventions: a number can get other weights.
    Since 0.26. Can go when vLLM has admission hooks.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    _patch_preprocess(EngineCore)
    for name in ("_reject_add_in_shutdown", "_reject_add_while_paused"):
        if hasattr(EngineCoreProc, name):
            _patch_reject(EngineCoreProc, name)
    _patch_free(Scheduler)
    _patch_lora(EngineCore, "add_lora", lambda lora_request: lora_request.lora_int_id)
    _patch_lora(EngineCore, "remove_lora", lambda lora_id: lora_id)


def admission_of(core: Any) -> Admission | None:
    """The core's book, made when first asked for: plugins may be loaded in the middle of the core's constructor."""
    with _creating:
        if not hasattr(core, "steering"):
            config = steer_config(core.vllm_config)
            largest = torch.finfo(core.vllm_config.model_config.dtype).max
            core.steering = core.scheduler.steering = Admission(config, largest) if config else None
        admission: Admission | None = core.steering
        return admission


def _patch_preprocess(engine_core: Any) -> None:
    preprocess_add_request = engine_core.preprocess_add_request

    @wraps(preprocess_add_request)
    def preprocess_and_admit(self: Any, request: Any) -> Any:
        params, lora = request.sampling_params, request.lora_request
        extra = params.extra_args if params is not None else None
        admission = admission_of(self)
        if admission is not None and lora is not None and lora.load_inplace:
            admission.unpair(lora.lora_int_id, restless=True)
        if not extra or EXTRA_ARG not in extra:
            return preprocess_add_request(self, request)
        try:
            if admission is None:
                raise Unsupported("this engine was started without steering: no intervention can be applied")
            plan = _admit(admission, request, extra[EXTRA_ARG])
        except SteerError:
            _receive_media(self, request)
            raise
        try:
            request.sampling_params = copy.copy(params)
            request.sampling_params.extra_args = {**extra, EXTRA_ARG: plan}
            return preprocess_add_request(self, request)
        except BaseException:
            admission.release(plan)
            raise

    engine_core.preprocess_add_request = preprocess_and_admit


def _admit(admission: Admission, request: Any, wire: object) -> Plan:
    """Errors: those of `Admission.admit` and `Steering.from_wire`, `Unsupported`."""
    if getattr(request, "resumable", False):
        raise Unsupported("streaming-input requests cannot carry interventions: their prompt grows")
    lora = request.lora_request
    if lora is not None:
        adapters.check_lasting(lora)
    adapter = adapters.identity(lora) if lora is not None else None
    return admission.admit(Steering.from_wire(wire), _prompt_len(request), adapter)


def _receive_media(core: Any, request: Any) -> None:
    """Take the pictures of a refused request in, as vLLM does first with every other.

    The front counts them as held here, and sends the next request that has them without their content.
    """
    if core.mm_receiver_cache is not None and request.mm_features:
        core.mm_receiver_cache.get_and_update_features(request.mm_features)


def _prompt_len(request: Any) -> int:
    ids = request.prompt_token_ids
    return len(ids) if ids is not None else len(request.prompt_embeds)


def _patch_reject(engine_core_proc: Any, name: str) -> None:
    reject = getattr(engine_core_proc, name)

    @wraps(reject)
    def reject_and_release(self: Any, request: Any) -> bool:
        rejected: bool = reject(self, request)
        plan = plan_of(request.sampling_params)
        if plan and not rejected and self.steering.doomed(plan):  # between its arrival and here weights have changed
            tell(self, [request.request_id], request.client_index)
            rejected = True
        if rejected and plan:
            self.steering.release(plan)
        return rejected

    setattr(engine_core_proc, name, reject_and_release)


def end_doomed(core: Any, admission: Admission) -> None:
    """End with an error what the scheduler has, running or waiting, and the book says must end. Between two steps."""
    from vllm.v1.request import RequestStatus

    plans = {name: plan_of(request.sampling_params) for name, request in core.scheduler.requests.items()}
    doomed = [name for name, plan in plans.items() if plan is not None and admission.doomed(plan)]
    clients: dict[int, list[str]] = defaultdict(list)
    for request in core.scheduler.finish_requests(doomed, RequestStatus.FINISHED_ERROR):
        clients[request.client_index].append(request.request_id)
    for client, names in clients.items():
        tell(core, names, client)


def _patch_lora(engine_core: Any, name: str, number_of: Callable[[Any], int]) -> None:
    change = getattr(engine_core, name)

    @wraps(change)
    def change_and_unpair(self: Any, given: Any) -> Any:
        admission = admission_of(self)
        if admission is None:
            return change(self, given)
        admission.unpair(number_of(given), restless=True)  # also if the call fails: some ranks may have done it
        result = change(self, given)
        admission.unpair(number_of(given))
        return result

    setattr(engine_core, name, change_and_unpair)


def _patch_free(scheduler: Any) -> None:
    free_request = scheduler._free_request

    @wraps(free_request)
    def free_and_release(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = free_request(self, request, *args, **kwargs)
        plan = plan_of(request.sampling_params)
        if plan:
            self.steering.release(plan)
        return result

    scheduler._free_request = free_and_release
