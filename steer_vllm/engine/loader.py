"""Bringing artifacts into a worker's store, in two phases, while steps go on.

`begin` reads, checks and compiles in a thread of its own, without collectives; `commit` makes the result usable in one
short call, in which ranks add up their parts. Every answer is a plain dict and nothing raises: a worker method that
fails leaves later replies out of step with their calls.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from contextlib import suppress

import torch

from ..errors import ArtifactInvalid
from ..fit import check_fit
from ..intervention import Intervention
from ..packed import Packed
from .answer import Answer, answered
from .compilation import Compilation
from .worker import WorkerSteering

_CORES = os.sched_getaffinity(0) if sys.platform == "linux" else frozenset[int]()
"""Those of the process, before vLLM binds the thread that runs the steps to one of them: a load would share it."""


class Load:
    """One artifact on its way in."""

    def __init__(self, steering: WorkerSteering, folder: str, digest: str) -> None:
        self.steering = steering
        self.folder = folder
        self.digest = digest
        self.compilation: Compilation | None = None
        self.parts: tuple[Packed, ...] = ()
        self.spoilt = False
        self.abandoned = False
        self.answer: Answer = {"state": "busy"}
        if steering.loading is not None:  # weights that are still on their way are read behind that
            steering.loading.wait_stream(torch.cuda.current_stream(steering.device))
        self.thread = threading.Thread(target=self._run, name=f"steer-load-{digest[:12]}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        if _CORES:
            with suppress(OSError):  # a sandbox may not allow it: slower, and nothing else
                os.sched_setaffinity(0, _CORES)  # of this thread
        self.answer = self._prepare()

    @answered
    @torch.inference_mode()
    def _prepare(self) -> Answer:
        steering = self.steering
        if steering.loading is not None:
            torch.cuda.set_device(steering.device)  # of this thread: that of a new one is the first
        intervention = Intervention.load(self.folder)
        if intervention.digest != self.digest:
            raise ArtifactInvalid(f"{self.folder}: changed while it was loaded (sha256 {intervention.digest})")
        check_fit(intervention, steering.base, steering.config, self.folder)
        self.compilation = Compilation(steering, intervention, self.folder)
        steering.memory.reserve(self, self.compilation.nbytes, self.folder)
        self._go_on()
        with torch.cuda.stream(steering.loading):
            self.compilation.project(plain=True)
        self._go_on()
        self.parts = self.compilation.pack_alone()
        for part in self.parts:
            part.summary()  # looks at every entry, which the commit need not do while steps wait
        return {"state": "ready"}

    def _go_on(self) -> None:
        """Errors: `ArtifactInvalid` once nobody waits for it any more: what it takes from here on is not counted."""
        if self.abandoned:
            self.steering.memory.release(self)  # it may have been reserved since
            raise ArtifactInvalid(f"{self.folder}: its load was given up")

    def abandon(self) -> None:
        """Nobody will commit it. Its thread ends soon."""
        self.abandoned = True
        self.steering.memory.release(self)

    def poll(self) -> Answer:
        """Errors: `ArtifactInvalid` when the weights that it was checked against and compiled with are gone."""
        if self.spoilt:
            raise ArtifactInvalid(f"{self.folder}: the model's weights were replaced while it was loaded; try again")
        return self.answer

    @torch.inference_mode()
    def commit(self) -> Answer:
        """Make it usable. A collective under tensor parallelism: a rank that fails before it still takes part."""
        self.poll()
        assert self.compilation is not None
        if not self.parts:
            whole = self.compilation.pack_together()
            if whole is None:
                return {"state": "undone"}
            self.parts = whole
        self.steering.memory.hand_over(self, self.digest)
        for number, part in enumerate(self.parts):
            self.steering.store[self.digest, number] = part
        self.steering.head_layers[self.digest] = frozenset(self.compilation.heads)
        self.steering.bases[self.digest] = self.compilation.intervention.base
        if self.compilation.heads:
            self.steering.compilations[self.digest] = self.compilation
        return {"state": "done", "parts": [part.summary()._asdict() for part in self.parts]}


@answered
def begin(steering: WorkerSteering, folder: str, digest: str) -> Answer:
    """Start reading; a second start of the same content takes the place of the first."""
    drop(steering, digest)
    load = steering.pending[digest] = Load(steering, folder, digest)
    return load.answer


@answered
def poll(steering: WorkerSteering, digest: str) -> Answer:
    """How far it is."""
    return steering.pending[digest].poll()


@answered
def commit(steering: WorkerSteering, digest: str) -> Answer:
    """The second phase. Every rank has answered "ready" before."""
    load = steering.pending.pop(digest)
    try:
        return load.commit()
    finally:
        load.abandon()  # where it failed: what is committed has been handed over


@answered
def drop(steering: WorkerSteering, digest: str) -> Answer:
    """Forget content on its way."""
    load = steering.pending.pop(digest, None)
    if load is not None:
        load.abandon()
    return {"state": "done"}


@answered
def free(steering: WorkerSteering, digest: str) -> Answer:
    """Forget content that is loaded."""
    steering.bases.pop(digest, None)
    steering.compilations.pop(digest, None)
    for number in itertools.count():
        if steering.store.pop((digest, number), None) is None:
            break
    steering.memory.release(digest)
    steering.head_layers.pop(digest, None)
    steering.tables.forget(digest)
    return {"state": "done"}


@answered
def base(steering: WorkerSteering) -> Answer:
    """The model served. Asked for at every load, so it says nothing of what is loaded: that may be long."""
    return {"state": "done", "base": steering.base.to_config()}


@answered
def facts(steering: WorkerSteering) -> Answer:
    """What the front wants to know of this rank."""
    return {
        "state": "done",
        "base": steering.base.to_config(),
        "table_bytes": steering.tables.nbytes,
        "memory_bytes": steering.memory.used,
        "loaded": sorted({digest for digest, _ in steering.store}),
        "pending": sorted(steering.pending),
    }
