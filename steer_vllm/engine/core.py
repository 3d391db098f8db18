"""Utilities of the engine core: what a front asks it to load, to free and to tell.

They run in the core's main loop, one at a time. Turns calls into those of the ranks and of `Admission`; edits and
tables are the workers', requests are `lifetimes`'.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import SteerError, Unsupported
from ..plan import PartSummary, merge
from . import adapters, weights
from .admission import Admission
from .answer import Answer, answered, worst_of
from .lifetimes import admission_of


def install() -> None:
    """Ledger: adds utilities to `EngineCore`, and the patch of `weights`.

    Why: clients reach the core by the names of its methods. Since 0.26. Can go when plugins can register utilities.
    """
    from vllm.v1.engine.core import EngineCore

    weights.install(EngineCore, _ask_ranks)
    loading = (steer_begin, steer_commit, steer_drop, steer_close, steer_free)
    for utility in (*loading, steer_adapter, steer_settle, steer_base, steer_facts):
        setattr(EngineCore, utility.__name__, utility)


def _ask_ranks(core: Any, method: str, *args: Any) -> tuple[Answer, list[Answer]]:
    """Call a worker method on every rank: the worst answer, and all of them."""
    answers = core.collective_rpc(weights.Own(method), args=args)
    return worst_of(answers), answers


def _required(core: Any) -> Admission:
    admission = admission_of(core)
    if admission is None:
        raise SteerError("this engine was started without steering")
    return admission


@answered
def steer_begin(self: Any, folder: str, digest: str) -> Answer:
    """Utility: start loading on every rank. held: what was there before; content that is there is "ready" at once."""
    admission = _required(self)
    admission.check_known()
    held = admission.held(digest)
    answer = {"state": "ready"} if held != "absent" else _ask_ranks(self, "steer_begin", folder, digest)[0]
    return {**answer, "held": held}


@answered
def steer_commit(self: Any, digest: str) -> Answer:
    """Utility: make it usable on every rank, or on none: "busy" while one still prepares it. Requests may name it from
    here on."""
    admission = _required(self)
    summary = admission.reopen(digest)
    if summary is None:
        prepared = _ask_ranks(self, "steer_poll", digest)[0]
        if prepared["state"] != "ready":  # the commit is a collective: all ranks come to it or none
            return prepared
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
def steer_base(self: Any) -> Answer:
    """Utility: the fingerprint of the model served; "failed" while it is not known."""
    _required(self).check_known()
    worst, answers = _ask_ranks(self, "steer_base")
    return worst if worst["state"] != "done" else {"state": "done", "base": answers[0]["base"]}


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
