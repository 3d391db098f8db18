"""LoRA adapters beside interventions: which pairs are exact, and which are refused by name.

Edits are applied to what the adapted layers put out, so an adapter and an intervention combine exactly, with one
exception: head offsets are compiled to u = W_o v with the base's W_o, which an adapter of W_o would change as well.
Only workers hold both, so they are asked; requests carry an adapter as vLLM's `LoRARequest`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ModelNotFound, Unsupported
from .admission import Adapter
from .answer import Answer
from .client import AsyncEngine
from .worker import WorkerSteering


def identity(lora_request: Any) -> Adapter:
    """Which adapter a request uses."""
    return Adapter(lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path)


def check_lasting(lora_request: Any) -> None:
    """Errors: `Unsupported` for an adapter whose files vLLM reads again while requests use it."""
    if lora_request.load_inplace:
        raise Unsupported(
            f"the LoRA {lora_request.lora_name!r} was loaded in place, so its weights may change under a request: load "
            "it under another name to use it with interventions"
        )


def conflicts(worker: Any, steering: WorkerSteering, lora_request: Any, digest: str) -> Answer:
    """On one rank: load the adapter if need be, and say at which layers it changes W_o under the head offsets."""
    try:
        worker.add_lora(lora_request)
    except Exception as error:
        raise Unsupported(f"the LoRA {lora_request.lora_name!r} cannot be loaded: {error}") from error
    slots = worker.model_runner.lora_manager._adapter_manager.lora_index_to_id
    slot = slots.index(lora_request.lora_int_id)
    offset = steering.head_layers[digest]
    layers = [layer for layer in offset if layer in steering.projections and steering.projections[layer].adapted(slot)]
    return {"state": "done", "layers": layers}


def refuse(adapter: Adapter, digest: str, layers: Iterable[int]) -> None:
    """Errors: `Unsupported` when there is a layer where both meet."""
    meeting = sorted(set(layers))
    if meeting:
        raise Unsupported(
            f"the LoRA {adapter.name!r} changes the attention output projection of layers {meeting}, and the head "
            f"offsets of the intervention {digest[:12]} were compiled with the base model's: not exact together"
        )


class ServedAdapters:
    """The adapters that vLLM's API server knows by name."""

    def __init__(self, engine: AsyncEngine, models: Any) -> None:
        self._engine = engine
        self._models = models

    def __contains__(self, name: object) -> bool:
        return name in self._models.lora_requests

    async def check(self, name: str, digests: Iterable[str]) -> None:
        """Errors: `Unsupported` for a pair that is not exact, `ModelNotFound` when the adapter is gone."""
        lora_request = self._models.lora_requests.get(name)
        if lora_request is None:
            raise ModelNotFound(f"no model {name!r}", param="model")
        for digest in sorted(digests):
            await self._engine.check_adapter(lora_request, digest)
