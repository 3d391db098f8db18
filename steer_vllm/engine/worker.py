"""One rank's steering: its tables, its store of loaded interventions, and the routing of every step.

`StepView` is all it sees of a step, whichever runner made it. It decides nothing: plans come with the requests, loads
from the engine core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..config import SteerConfig
from ..fingerprint import Fingerprint
from ..host_memory import HostMemory
from ..packed import Layout, Packed
from ..plan import Plan
from ..slots import RequestSlots, SlotTables, TokenSlots, staged
from .binding import Binding
from .compilation import Compilation
from .settings import base_fingerprint, base_source, steer_config
from .wrapping import wrap

if TYPE_CHECKING:
    from .loader import Load


@dataclass(frozen=True)
class StepView:
    """A step's batch.

    request_ids: one per batch row. query_start_loc: int [rows + 1 or more], on the device, where each row's tokens
    start and the last ends. positions: int [tokens or more], absolute. tokens: how many there are, at most. decoding:
    every row has one token, and that is behind its prompt.
    """

    request_ids: list[str]
    query_start_loc: torch.Tensor
    positions: torch.Tensor
    tokens: int
    decoding: bool


class WorkerSteering:
    """Everything steer-vllm keeps in a worker. The step's calls (`add`, `remove`, `prepare`) do not raise."""

    def __init__(self, vllm_config: Any, config: SteerConfig, model: torch.nn.Module, device: torch.device) -> None:
        self.config = config
        self.base = base_fingerprint(vllm_config)
        self.base_source: tuple[str, str | None] | None = base_source(vllm_config)  # None: to be read again
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.device = device
        self.binding = Binding(model, config)
        self.projections = self.binding.projections
        self.layout = Layout.of(self.binding.places, self.base.hidden_size, config)
        self.tables = SlotTables(self.layout, config, self.dtype, device)
        scheduler = vllm_config.scheduler_config
        self.tokens = TokenSlots(scheduler.max_num_batched_tokens + scheduler.max_num_seqs, device)
        self.requests = RequestSlots(scheduler.max_num_seqs, config, device)
        self.store: dict[tuple[str, int], Packed] = {}
        self.head_layers: dict[str, frozenset[int]] = {}
        self.memory = HostMemory(config.memory_bytes)
        self.pending: dict[str, Load] = {}
        # For loads, one for all: torch keeps what each stream has freed for itself. Its own, since a copy to the host
        # waits for its stream, and that of the steps is never done.
        self.loading = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bases: dict[str, Fingerprint] = {}
        self.compilations: dict[str, Compilation] = {}
        self._batch: list[str] | None = None  # whose rows these are; None: to be looked up
        self._rows = torch.zeros(0, dtype=torch.int32, device=device)
        self._steered = False
        self._settled = False  # the slots are this batch's, and stay so as long as it decodes
        self.asleep = False
        self.stale = False  # from when weights may have changed until everything that depends on them is computed again
        wrap(self.binding, self.tables, self.tokens)
        self._warm_up()

    def _warm_up(self) -> None:
        """Route one token of nobody: the kernel is compiled now, and not when the first steered request comes."""
        nobody = torch.zeros(2, dtype=torch.int32, device=self.device)
        self.requests.route(nobody[:1].long(), nobody, nobody[:1], 1, self.tokens)
        self.tokens.clear()

    def restore(self) -> None:
        """Write everything again that is on the device, which has lost it. The host knows what was where."""
        self.tables.restore(self.store)
        self.tokens.restore()
        self.requests.restore()
        self._batch = None

    @property
    def tensor_parallel(self) -> int:
        """Ranks that share each layer."""
        return max((projection.base.tp_size for projection in self.projections.values()), default=1)

    def all_reduce(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The sums of every rank's tensors. A collective: all ranks call it at the same point."""
        if not parts:
            return parts
        from vllm.distributed import tensor_model_parallel_all_reduce

        whole = tensor_model_parallel_all_reduce(torch.stack(parts).to(self.device))
        return list(whole.cpu())

    def add(self, request_id: str, plan: Plan | None) -> None:
        """A request enters, or comes back after a preemption, with the plan it was admitted with."""
        self.remove(request_id)
        if plan is not None:
            self.tables.fill(plan, self.store)
            self.requests.add(request_id, plan.placements)
            self._batch = None

    def remove(self, request_id: str) -> None:
        """A request leaves; those that never entered are no error."""
        if self.requests.remove(request_id):
            self._batch = None

    def prepare(self, view: StepView) -> None:
        """Set the token slots of a step, before the model runs or its graph is replayed.

        No segment starts or stops behind its request's prompt, so while the same batch decodes, its slots stay.
        """
        if not len(self.requests):
            self.tokens.clear()
            return
        if view.request_ids != self._batch:
            rows = [self.requests.row(request_id) for request_id in view.request_ids]
            self._steered = any(rows)
            self._rows = staged(torch.tensor(rows, dtype=torch.int32), self.device).to(self.device, non_blocking=True)
            self._batch = list(view.request_ids)
        elif self._settled and view.decoding:
            return
        self._settled = view.decoding
        if self._steered:
            self.requests.route(view.positions, view.query_start_loc, self._rows, view.tokens, self.tokens)
        else:
            self.tokens.clear()

    def rest(self) -> None:
        """A step without requests: no token is edited."""
        self.tokens.clear()
        self._batch = None


def found_in(worker: Any) -> WorkerSteering | None:
    """Where a worker's runner keeps it: V1 on itself, V2 on its model state. None where there is none."""
    runner = worker.model_runner
    found: WorkerSteering | None = getattr(getattr(runner, "model_state", runner), "steering", None)
    return found


def attach(runner: Any, model: torch.nn.Module) -> WorkerSteering | None:
    """Give a runner its steering, once its weights are there; None where steering is off.

    Errors: `StartupRefused` when a setting, the model or the base's files do not allow it.
    """
    config = steer_config(runner.vllm_config)
    return None if config is None else WorkerSteering(runner.vllm_config, config, model, runner.device)
