"""After vLLM has called its workers by name, which is how weights are reloaded or updated, offsets follow the weights.

Any such call may change weights, also one that a worker extension brings; so none is singled out. Knows nothing of how
weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..errors import EngineUnavailable, Unsupported
from ..plan import PartSummary, merge
from .admission import Admission
from .answer import Answer
from .lifetimes import end_doomed

AskRanks = Callable[..., tuple[Answer, list[Answer]]]
OURS = "steer_"
_RELOADS = ("reload_weights", "load_model")
"""vLLM's calls that read weights from their files."""
_PAUSES = ("checkpoint_prepare",)
"""vLLM's calls after which no rank reaches another until a later call, which is followed again."""


class Own(str):
    """The name of a worker method in a call of the core's own; what a client sends is never of this class."""

    __slots__ = ()


def install(engine_core: Any, ask_ranks: AskRanks) -> None:
    """Ledger: replaces `EngineCore.collective_rpc`.

    What: a call that is not ours is followed by compiling every head offset again, on all ranks, before the next step.
    Why: u = W_o v belongs to the weights it was computed with, and the core's main loop is the one place that knows
    that such a call has ended on every rank and that no step runs. Our own methods are refused to anyone else: they
    would change what the ranks hold behind the core's book. Since 0.26. Can go when vLLM tells plugins of new
    weights.
    """
    collective_rpc = engine_core.collective_rpc

    @wraps(collective_rpc)
    def call_and_follow(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(method, Own):
            return collective_rpc(self, str(method), *args, **kwargs)
        if isinstance(method, str) and method.startswith(OURS):
            raise Unsupported(f"collective_rpc: {method[:100]} is called by steer-vllm alone")
        admission: Admission | None = getattr(self, "steering", None)
        if admission is None or method in _PAUSES:
            return collective_rpc(self, method, *args, **kwargs)
        try:
            return collective_rpc(self, method, *args, **kwargs)
        finally:
            follow(self, admission, ask_ranks, reloaded=method in _RELOADS)

    engine_core.collective_rpc = call_and_follow


def follow(core: Any, admission: Admission, ask_ranks: AskRanks, *, reloaded: bool) -> None:
    """Compile again on every rank, or on none. reloaded: the weights came from their files.

    Content whose base model is no longer the one served is refused to new requests; it comes back with its weights.
    Requests in flight go on, with offsets of the new weights, as vLLM lets them; those that use such content end with
    an error.
    Errors: `EngineUnavailable` when a rank fails; nothing is then admitted until a later call succeeds, and every
    request in flight that has interventions ends with an error.
    """
    try:
        worst, _ = ask_ranks(core, "steer_reproject", reloaded)
        if worst["state"] == "done":
            worst, answers = ask_ranks(core, "steer_repack")
    except Exception as error:  # a call that vLLM could not bring back: what the ranks did is not known
        worst = {"state": "failed", "message": f"{type(error).__name__}: {error}"}
    if worst["state"] == "busy":  # asleep, without weights that could have changed
        return
    if worst["state"] != "done":
        reason = f"head offsets could not be computed for the present weights: {worst.get('message', worst['state'])}"
        admission.spoil(reason)
        end_doomed(core, admission)
        raise EngineUnavailable(f"{reason}; requests in flight that have interventions have ended with an error")
    unfit = {digest: text for answer in answers for digest, text in answer["unfit"].items()}
    parts = {
        digest: [[PartSummary(**part) for part in answer["parts"][digest]] for answer in answers]
        for digest in answers[0]["parts"].keys() - unfit
    }
    admission.follow([merge(digest, ranks) for digest, ranks in parts.items()], unfit)
    end_doomed(core, admission)
