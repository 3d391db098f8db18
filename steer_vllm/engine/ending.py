"""A client hears that its requests have ended with an error.

Which they are, and why, is not known here. An offline engine in this process says it in the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tell(core: Any, names: Sequence[str], client: int) -> None:
    """Ledger: calls `EngineCoreProc._send_error_outputs_to_client`, or replaces the next `EngineCore.step_fn`.

    Why: requests that end outside a step end without a word to their clients, who would wait for ever; vLLM itself
    tells them so where it ends requests (`pause_scheduler`). In process there is no queue, and what a step returns is
    all that the client sees. Since 0.26. Can go when vLLM can end a request with an error.
    """
    if hasattr(core, "output_queue"):
        core._send_error_outputs_to_client(list(names), client)
        return
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    step = core.step_fn

    def tell_once() -> tuple[dict[int, Any], bool]:
        core.step_fn = step
        ended = [EngineCoreOutput(name, [], finish_reason=FinishReason.ERROR) for name in names]
        return {client: EngineCoreOutputs(outputs=ended)}, False

    core.step_fn = tell_once
