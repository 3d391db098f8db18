"""Bringing artifacts into a worker's store, in two phases, while steps go on.

`begin` reads, checks and compiles in a thread of its own, without collectives; `commit` makes the result usable in one
short call, in which ranks add up their parts. Every answer is a plain dict and nothing raises: a worker method that
fails leaves later replies out of step with their calls.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from ..errors import ArtifactInvalid
from ..fit import check_fit
from ..intervention import Intervention
from ..packed import Packed, pack
from .answer import Answer, answered
from .worker import WorkerSteering


class Load:
    """One artifact on its way in."""

    def __init__(self, steering: WorkerSteering, folder: str, digest: str) -> None:
        self.steering = steering
        self.folder = folder
        self.digest = digest
        self.intervention: Intervention | None = None
        self.heads: dict[int, torch.Tensor] = {}
        self.projected: dict[int, torch.Tensor] = {}
        self.parts: tuple[Packed, ...] = ()
        self.answer: Answer = {"state": "busy"}
        threading.Thread(target=self._run, name=f"steer-load-{digest[:12]}", daemon=True).start()

    def _run(self) -> None:
        self.answer = self._prepare()

    @answered
    @torch.inference_mode()
    def _prepare(self) -> Answer:
        steering = self.steering
        intervention = Intervention.load(self.folder)
        if intervention.digest != self.digest:
            raise ArtifactInvalid(f"{self.folder}: changed while it was loaded (sha256 {intervention.digest})")
        check_fit(intervention, steering.base, steering.config, self.folder)
        self.intervention = intervention
        intervention.compile(self._collect)
        self._project(plain=True)
        if not self.heads or (steering.tensor_parallel == 1 and len(self.projected) == len(self.heads)):
            self.parts = self._pack(self.projected)
        return {"state": "ready"}

    def _collect(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        self.heads[layer] = heads
        return heads.new_zeros(self.steering.base.hidden_size)

    def _project(self, *, plain: bool) -> None:
        """This rank's parts of W_o z; zero for layers of other ranks.

        Weights that only a kernel of their own can read wait for the commit: such kernels keep locks and workspaces per
        stream, which belong to the worker's own thread.
        """
        for layer, heads in self.heads.items():
            projection = self.steering.projections.get(layer)
            if projection is None:
                self.projected[layer] = torch.zeros(self.steering.base.hidden_size)
            elif projection.plain == plain:
                self.projected[layer] = projection(heads).cpu()

    def _pack(self, projected: Mapping[int, torch.Tensor]) -> tuple[Packed, ...]:
        assert self.intervention is not None
        steering = self.steering
        parts = self.intervention.compile(lambda layer, heads: projected[layer])
        packed = (pack(edits, steering.layout, steering.dtype, self.folder) for edits in parts)
        return tuple(part.pinned() if steering.device.type == "cuda" else part for part in packed)

    @torch.inference_mode()
    def commit(self) -> Answer:
        """Make it usable. A collective under tensor parallelism: a rank that fails before it still takes part."""
        if not self.parts:
            failure: Exception | None = None
            try:
                self._project(plain=False)
            except Exception as error:
                failure = error
            whole, failures = self._reduce(failed=failure is not None)
            if failure is not None:
                raise failure
            if failures:
                return {"state": "undone"}
            self.parts = self._pack(dict(zip(self.heads, whole, strict=True)))
        for number, part in enumerate(self.parts):
            self.steering.store[self.digest, number] = part
        self.steering.head_layers[self.digest] = frozenset(self.heads)
        return {"state": "done", "parts": [part.summary()._asdict() for part in self.parts]}

    def _reduce(self, *, failed: bool) -> tuple[list[torch.Tensor], bool]:
        """The whole of every projected vector, and whether a rank has failed."""
        nothing = torch.zeros(self.steering.base.hidden_size)
        mine = [nothing if failed else self.projected[layer] for layer in self.heads]
        if self.steering.tensor_parallel == 1:
            return mine, failed
        *whole, failures = self.steering.all_reduce([*mine, nothing + failed])
        return whole, bool(failures.any())


@answered
def begin(steering: WorkerSteering, folder: str, digest: str) -> Answer:
    """Start reading; a second start of the same content takes the place of the first."""
    load = steering.pending[digest] = Load(steering, folder, digest)
    return load.answer


@answered
def poll(steering: WorkerSteering, digest: str) -> Answer:
    """How far it is."""
    return steering.pending[digest].answer


@answered
def commit(steering: WorkerSteering, digest: str) -> Answer:
    """The second phase. Every rank has answered "ready" before."""
    return steering.pending.pop(digest).commit()


@answered
def drop(steering: WorkerSteering, digest: str) -> Answer:
    """Forget content on its way."""
    steering.pending.pop(digest, None)
    return {"state": "done"}


@answered
def free(steering: WorkerSteering, digest: str) -> Answer:
    """Forget content that is loaded."""
    for key in [key for key in steering.store if key[0] == digest]:
        del steering.store[key]
    steering.head_layers.pop(digest, None)
    return {"state": "done"}


@answered
def facts(steering: WorkerSteering) -> Answer:
    """What the front wants to know of this rank."""
    return {
        "state": "done",
        "base": steering.base.to_config(),
        "table_bytes": steering.tables.nbytes,
        "loaded": sorted({digest for digest, _ in steering.store}),
        "pending": sorted(steering.pending),
    }
