"""Steering in the engine core: admission of requests, their release, and the utilities that load and unload.

Turns vLLM's calls into `Admission` calls; edits and tables are the workers'.
"""

from __future__ import annotations

import copy
import threading
from functools import wraps
from typing import Any

import torch

from ..errors import EngineUnavailable, SteerError, Unsupported
from ..plan import PartSummary, Plan, merge
from ..request import EXTRA_ARG, Steering
from . import adapters, weights
from .admission import Admission
from .answer import Answer, answered
from .settings import steer_config

_creating = threading.Lock()


def plan_of(sampling_params: Any) -> Plan | None:
    """The plan that an admitted request carries."""
    extra = sampling_params.extra_args if sampling_params is not None else None
    return extra.get(EXTRA_ARG) if extra else None


def install() -> None:
    """Ledger: replaces `EngineCore.preprocess_add_request`, `EngineCoreProc._reject_add_in_shutdown` (and
    `_reject_add_while_paused`, which 0.33 adds) and `Scheduler._free_request`; adds utilities to `EngineCore`.

    What: a request is checked and pinned before vLLM builds it (block hashes are computed in its constructor), and
    released where the scheduler frees it, or where it is turned away before the scheduler sees it. Why: workers never
    see waiting requests, so only the core can count users; an exception in preprocessing fails that request alone.
    Since 0.26. Can go when vLLM has admission hooks.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    _patch_preprocess(EngineCore)
    for name in ("_reject_add_in_shutdown", "_reject_add_while_paused"):
        if hasattr(EngineCoreProc, name):
            _patch_reject(EngineCoreProc, name)
    _patch_free(Scheduler)
    weights.install(EngineCore, _ask_ranks)
    loading = (steer_begin, steer_poll, steer_commit, steer_drop, steer_close, steer_free)
    for utility in (*loading, steer_adapter, steer_settle, steer_facts):
        setattr(EngineCore, utility.__name__, utility)


def _admission(core: Any) -> Admission | None:
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
        params = request.sampling_params
        extra = params.extra_args if params is not None else None
        admission, lora = _admission(self), request.lora_request
        adapter = adapters.identity(lora) if lora is not None else None
        if admission is not None and lora is not None and lora.load_inplace:
            admission.unpair(adapter)
        if not extra or EXTRA_ARG not in extra:
            return preprocess_add_request(self, request)
        if admission is None:
            raise Unsupported("this engine was started without steering: no intervention can be applied")
        if getattr(request, "resumable", False):
            raise Unsupported("streaming-input requests cannot carry interventions: their prompt grows")
        if lora is not None:
            adapters.check_lasting(lora)
        plan = admission.admit(Steering.from_wire(extra[EXTRA_ARG]), _prompt_len(request), adapter)
        try:
            request.sampling_params = copy.copy(params)
            request.sampling_params.extra_args = {**extra, EXTRA_ARG: plan}
            return preprocess_add_request(self, request)
        except BaseException:
            admission.release(plan)
            raise

    engine_core.preprocess_add_request = preprocess_and_admit


def _prompt_len(request: Any) -> int:
    ids = request.prompt_token_ids
    return len(ids) if ids is not None else len(request.prompt_embeds)


def _patch_reject(engine_core_proc: Any, name: str) -> None:
    reject = getattr(engine_core_proc, name)

    @wraps(reject)
    def reject_and_release(self: Any, request: Any) -> bool:
        rejected: bool = reject(self, request)
        plan = plan_of(request.sampling_params)
        if rejected and plan:
            self.steering.release(plan)
        return rejected

    setattr(engine_core_proc, name, reject_and_release)


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


def _ask_ranks(core: Any, method: str, *args: Any) -> tuple[Answer, list[Answer]]:
    """Call a worker method on every rank: the worst answer, and all of them."""
    answers = core.collective_rpc(weights.Own(method), args=args)
    order = ("failed", "undone", "busy", "ready", "done")
    return min(answers, key=lambda answer: order.index(answer["state"])), answers


def _required(core: Any) -> Admission:
    admission = _admission(core)
    if admission is None:
        raise SteerError("this engine was started without steering")
    return admission


@answered
def steer_begin(self: Any, folder: str, digest: str) -> Answer:
    """Utility: start loading on every rank. held: what was there before; content that is there is "ready" at once."""
    held = _required(self).held(digest)
    answer = {"state": "ready"} if held != "absent" else _ask_ranks(self, "steer_begin", folder, digest)[0]
    return {**answer, "held": held}


@answered
def steer_poll(self: Any, digest: str) -> Answer:
    """Utility: "ready" when every rank is."""
    return _ask_ranks(self, "steer_poll", digest)[0]


@answered
def steer_commit(self: Any, digest: str) -> Answer:
    """Utility: make it usable on every rank, or on none. Requests may name it from here on."""
    admission = _required(self)
    summary = admission.reopen(digest)
    if summary is None:
        ready = steer_poll(self, digest)
        if ready["state"] != "ready":  # the commit is a collective: all ranks come to it or none
            raise EngineUnavailable(ready.get("message", f"committed while it was {ready['state']}"))
        worst, answers = _ask_ranks(self, "steer_commit", digest)
        if worst["state"] != "done":
            _ask_ranks(self, "steer_free", digest)
            return worst
        summary = merge(digest, [[PartSummary(**part) for part in answer["parts"]] for answer in answers])
        admission.publish(summary)
    return {"state": "done", "parts": [part._asdict() for part in summary.parts]}


@answered
def steer_drop(self: Any, digest: str) -> Answer:
    """Utility: give up a load that did not commit. What is held stays."""
    return _ask_ranks(self, "steer_drop", digest)[0]


@answered
def steer_close(self: Any, digest: str) -> Answer:
    """Utility: admit no more requests for it; "busy" while some use it, else "ready" to be freed."""
    return {"state": "ready" if _required(self).close(digest) else "busy"}


@answered
def steer_free(self: Any, digest: str) -> Answer:
    """Utility: free closed content on every rank; "busy" when it is open again or requests use it."""
    if not _required(self).forget(digest):
        return {"state": "busy"}
    return _ask_ranks(self, "steer_free", digest)[0]


@answered
def steer_adapter(self: Any, lora_request: Any, digest: str) -> Answer:
    """Utility: let requests use a LoRA beside this content, if every rank says that it is exact."""
    import msgspec
    from vllm.lora.request import LoRARequest

    if self.vllm_config.lora_config is None:
        raise Unsupported("LoRA is not enabled in this engine")
    lora_request = msgspec.convert(lora_request, LoRARequest)  # a list, when it comes from another process
    adapters.check_lasting(lora_request)
    admission, adapter = _required(self), adapters.identity(lora_request)
    if not admission.paired(adapter, digest):
        worst, answers = _ask_ranks(self, "steer_adapter", lora_request, digest)
        if worst["state"] != "done":
            return worst
        adapters.refuse(adapter, digest, (layer for answer in answers for layer in answer["layers"]))
        admission.pair(adapter, digest)
    return {"state": "done"}


@answered
def steer_settle(self: Any) -> Answer:
    """Utility: an answer that comes when everything sent before has been done, aborts included."""
    return {"state": "done"}


@answered
def steer_facts(self: Any) -> Answer:
    """Utility: what the front wants to know of the engine and its ranks."""
    admission = _required(self)
    worst, answers = _ask_ranks(self, "steer_facts")
    if worst["state"] != "done":
        return worst
    dtype = self.vllm_config.model_config.dtype
    return {
        "state": "done",
        "config": admission.config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "largest": torch.finfo(dtype).max,
        "base": answers[0]["base"],
        "ranks": answers,
        "admission": admission.facts(),
    }
