"""Bringing artifacts into a worker's store, in two phases, while steps go on.

`begin` reads, checks and compiles in a thread of its own, without collectives; `commit` makes the result usable in one
short call, in which ranks add up their parts. Every answer is a plain dict and nothing raises: a worker method that
fails leaves later replies out of step with their calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch

from ..errors import ArtifactInvalid, SteerError
from ..intervention import Intervention
from ..packed import Packed, check_tables, pack
from .worker import WorkerSteering

Answer = dict[str, Any]
"""{"state": "busy" | "ready" | "failed" | "done", ...}: what crosses processes."""

_pending: dict[str, _Load] = {}


def answered(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """Turn whatever goes wrong into an answer."""

    @wraps(method)
    def safe(*args: Any) -> Answer:
        try:
            return method(*args)
        except SteerError as error:
            return {"state": "failed", "code": error.code, "message": error.message}
        except Exception as error:
            return {"state": "failed", "code": "engine_unavailable", "message": f"{type(error).__name__}: {error}"}

    return safe


class _Load:
    """One artifact on its way in."""

    def __init__(self, steering: WorkerSteering, folder: str, digest: str) -> None:
        self.steering = steering
        self.folder = folder
        self.digest = digest
        self.intervention: Intervention | None = None
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
        intervention.check_base(steering.base, self.folder)
        self.intervention = intervention
        check_tables(intervention.compile(self._project), steering.config, self.folder)
        if steering.tensor_parallel == 1:
            self.parts = self._pack(self.projected)
        return {"state": "ready"}

    def _project(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """This rank's part; kept, so that ranks can add theirs up at commit. Zero for layers of other ranks."""
        projection = self.steering.projections.get(layer)
        mine = projection(heads).cpu() if projection else torch.zeros(self.steering.base.hidden_size)
        self.projected[layer] = mine
        return mine

    def _pack(self, projected: Mapping[int, torch.Tensor]) -> tuple[Packed, ...]:
        assert self.intervention is not None
        steering = self.steering
        parts = self.intervention.compile(lambda layer, heads: projected[layer])
        packed = (pack(edits, steering.layout, steering.dtype, self.folder) for edits in parts)
        return tuple(part.pinned() if steering.device.type == "cuda" else part for part in packed)

    def commit(self) -> Answer:
        """Make it usable; a collective under tensor parallelism, so every rank comes here or none."""
        if not self.parts:
            reduced = self.steering.all_reduce(list(self.projected.values()))
            self.parts = self._pack(dict(zip(self.projected, reduced, strict=True)))
        for number, part in enumerate(self.parts):
            self.steering.store[self.digest, number] = part
        return {"state": "done", "parts": [part.summary()._asdict() for part in self.parts]}


@answered
def begin(steering: WorkerSteering, folder: str, digest: str) -> Answer:
    """Start reading; a second start of the same content takes the place of the first."""
    _pending[digest] = _Load(steering, folder, digest)
    return _pending[digest].answer


@answered
def poll(steering: WorkerSteering, digest: str) -> Answer:
    """How far it is."""
    return _pending[digest].answer


@answered
def commit(steering: WorkerSteering, digest: str) -> Answer:
    """The second phase. Every rank has answered "ready" before."""
    return _pending.pop(digest).commit()


@answered
def drop(steering: WorkerSteering, digest: str) -> Answer:
    """Forget content, loaded or on its way."""
    _pending.pop(digest, None)
    for key in [key for key in steering.store if key[0] == digest]:
        del steering.store[key]
    return {"state": "done"}


@answered
def facts(steering: WorkerSteering) -> Answer:
    """What the front wants to know of this rank."""
    return {
        "state": "done",
        "base": steering.base.to_config(),
        "table_bytes": steering.tables.nbytes,
        "loaded": sorted({digest for digest, _ in steering.store}),
    }
