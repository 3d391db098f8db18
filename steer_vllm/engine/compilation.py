"""One intervention compiled on this rank, and compiled again when the model's weights have changed.

Head offsets go through the layers' own output projection, of which a tensor-parallel rank has its columns: each rank
projects alone, then the ranks add up. What has no head offsets does not depend on the weights. Requests, threads and
where the weights come from are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import ArtifactInvalid
from ..fingerprint import Fingerprint
from ..intervention import Intervention
from ..packed import Packed, pack, packed_bytes
from .answer import Answer, answered

if TYPE_CHECKING:
    from .worker import WorkerSteering


class Compilation:
    """heads: the layers with head offsets. projected: layer -> this rank's part, [hidden], until it is packed."""

    def __init__(self, steering: WorkerSteering, intervention: Intervention, where: str) -> None:
        """Errors: `ArtifactInvalid` when a layer of this rank lacks a site that is edited."""
        self.intervention = intervention
        self._steering = steering
        self._where = where
        self._pinned = steering.device.type == "cuda"
        self._heads: dict[int, torch.Tensor] = {}  # layer -> [num_heads * head_dim] before the projection
        self.projected: dict[int, torch.Tensor] = {}
        parts = intervention.compile(self._collect)
        for edits in parts:
            steering.binding.check(edits, where)
        self.heads = tuple(self._heads)
        shares = [steering.binding.share(edits) for edits in parts]
        packed = (packed_bytes(s, steering.layout, steering.dtype, pinned=self._pinned) for s in shares)
        kept = sum(tensor.nbytes for tensor in intervention.tensors.values()) if self.heads else 0
        self.nbytes = sum(packed) + kept
        """Host memory that it takes as long as it is loaded."""

    def project(self, *, plain: bool) -> None:
        """This rank's parts of W_o z; zero for layers of other ranks.

        Weights that only a kernel of their own can read wait for a call with plain=False: such kernels keep locks and
        workspaces per stream, which belong to the worker's own thread.
        """
        if not self._heads and self.heads:
            self.intervention.compile(self._collect)
        for layer, heads in self._heads.items():
            projection = self._steering.projections.get(layer)
            if projection is None:
                self.projected[layer] = torch.zeros(self._steering.base.hidden_size)
            elif projection.plain == plain:
                self.projected[layer] = projection(heads).cpu()

    def pack_alone(self) -> tuple[Packed, ...]:
        """What the tables store, where no other rank and no other thread is needed; else nothing."""
        alone = self._steering.tensor_parallel == 1 and len(self.projected) == len(self.heads)
        return self._pack(self.projected) if alone or not self.heads else ()

    def pack_together(self) -> tuple[Packed, ...] | None:
        """What the tables store; None when another rank has failed.

        A collective under tensor parallelism: a rank that fails before it still takes part. Errors: `ArtifactInvalid`
        when a value is not finite in the model's dtype.
        """
        failure: Exception | None = None
        try:
            self.project(plain=False)
        except Exception as error:
            failure = error
        whole, failures = self._reduce(failed=failure is not None)
        if failure is not None:
            raise failure
        return None if failures else self._pack(dict(zip(self.heads, whole, strict=True)))

    def _reduce(self, *, failed: bool) -> tuple[list[torch.Tensor], bool]:
        """The whole of every projected vector, and whether a rank has failed."""
        nothing = torch.zeros(self._steering.base.hidden_size)
        mine = [nothing if failed else self.projected[layer] for layer in self.heads]
        if self._steering.tensor_parallel == 1:
            return mine, failed
        *whole, failures = self._steering.all_reduce([*mine, nothing + failed])
        return whole, bool(failures.any())

    def _collect(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        self._heads[layer] = heads
        return heads.new_zeros(self._steering.base.hidden_size)

    def _pack(self, projected: Mapping[int, torch.Tensor]) -> tuple[Packed, ...]:
        steering = self._steering
        parts = self.intervention.compile(lambda layer, heads: projected[layer])
        packed = [pack(steering.binding.share(edits), steering.layout, steering.dtype, self._where) for edits in parts]
        self._heads, self.projected = {}, {}
        return tuple(part.pinned() if self._pinned else part for part in packed)


@answered
@torch.inference_mode()
def reproject(steering: WorkerSteering, source: tuple[str, str | None], read_base: Callable[[], Fingerprint]) -> Answer:
    """The weights may have changed: project every head offset anew, on this rank alone.

    source: of their files; read_base: what is in these. They are read where weights were loaded from them, and only
    then: files may change under a model that is served as it is.
    What is on its way was checked and compiled with others, wholly or in part, and fails, also where this does.
    """
    steering.stale = True
    for load in steering.pending.values():
        load.spoilt = True
    if steering.base_source != source:
        steering.base, steering.base_source = read_base(), source
    for compilation in steering.compilations.values():
        for plain in (True, False):
            compilation.project(plain=plain)
    return {"state": "done"}


def _packed(compilation: Compilation) -> tuple[Packed, ...] | Exception | None:
    """Of `pack_together`, an error as a value: a rank that stopped at it would leave the others in the next one."""
    try:
        return compilation.pack_together()
    except Exception as error:
        return error


@answered
@torch.inference_mode()
def repack(steering: WorkerSteering) -> Answer:
    """The second phase, once every rank has projected: store and table rows get what the ranks add up to.

    parts: the new summaries; unfit: digest -> why it no longer belongs to the base model, or is not finite with it.
    """
    packed: dict[str, tuple[Packed, ...]] = {}
    unfit: dict[str, str] = {}
    others: list[Exception | None] = []
    for digest, compilation in steering.compilations.items():
        outcome = _packed(compilation)
        if isinstance(outcome, tuple):
            packed[digest] = outcome
        elif isinstance(outcome, ArtifactInvalid):
            unfit[digest] = outcome.message
        else:
            others.append(outcome)
    for failure in filter(None, others):
        raise failure
    if others:
        return {"state": "undone"}
    for digest, parts in packed.items():
        steering.store.update({(digest, number): part for number, part in enumerate(parts)})
    steering.tables.refill(packed, steering.store)
    steering.stale = False
    differences = {digest: base.difference(steering.base) for digest, base in steering.bases.items()}
    unfit |= {digest: text for digest, text in differences.items() if text}
    return {
        "state": "done",
        "parts": {digest: [part.summary()._asdict() for part in parts] for digest, parts in packed.items()},
        "unfit": unfit,
    }
