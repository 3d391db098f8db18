"""One part of a compiled intervention as the tables store it: one tensor per table over all places of a layout.

A row of a table is one contiguous piece of memory, so filling it is one copy. Composition happens here, on packed
parts. Rows, digests and devices are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .config import SteerConfig
from .edit import Edit, Edits, LowRank, Place
from .errors import ArtifactInvalid
from .plan import PartSummary


@dataclass(frozen=True)
class Layout:
    """The places that have tables, in table order: [i] of a row belongs to `additive[i]` or `low_rank[i]`."""

    hidden_size: int
    additive: tuple[Place, ...]
    low_rank: tuple[Place, ...]

    @classmethod
    def of(cls, places: Iterable[Place], hidden_size: int, config: SteerConfig) -> Layout:
        """Those of the given places whose site is configured; a layer may lack a site."""
        places = sorted(places)
        return cls(
            hidden_size=hidden_size,
            additive=tuple(place for place in places if place.site in config.additive_sites),
            low_rank=tuple(place for place in places if place.site in config.low_rank_sites),
        )


@dataclass(frozen=True, eq=False)
class Packed:
    """offset: [additive places, hidden]. low_rank: A, B [low-rank places, rank, hidden], c [low-rank places, rank].

    What an intervention does not have is None.
    """

    offset: torch.Tensor | None
    low_rank: LowRank | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    @cached_property
    def largest(self) -> float:
        """The largest absolute entry; not finite where one is not. Looks at all of them, once."""
        ends = [end.float() for tensor in self._tensors() if tensor.numel() for end in tensor.aminmax()]
        return torch.stack(ends).abs().max().item() if ends else 0.0

    def summary(self) -> PartSummary:
        """What the host keeps of it. A float16 bias or a long sum is bounded by its largest entry."""
        rank = self.low_rank.A.shape[1] if self.low_rank else 0
        return PartSummary(additive=self.offset is not None, rank=rank, largest=self.largest)

    def pinned(self) -> Packed:
        """A copy in page-locked memory, from which a device copies on its own."""
        part = self.low_rank
        return Packed(
            offset=None if self.offset is None else self.offset.pin_memory(),
            low_rank=part and LowRank(part.A.pin_memory(), part.B.pin_memory(), part.c.pin_memory()),
        )

    def to(self, device: torch.device | str) -> Packed:
        """There. The host does not wait for it where this is `pinned`."""
        part = self.low_rank

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Packed(
            offset=None if self.offset is None else moved(self.offset),
            low_rank=part and LowRank(moved(part.A), moved(part.B), moved(part.c)),
        )

    def _tensors(self) -> list[torch.Tensor]:
        parts = [] if self.offset is None else [self.offset]
        return parts if self.low_rank is None else [*parts, self.low_rank.A, self.low_rank.B, self.low_rank.c]


def check_tables(parts: Iterable[Edits], config: SteerConfig, where: str) -> None:
    """Every edit must have a table, and fit it. Errors: `ArtifactInvalid` naming the setting that would make room."""
    for edits in parts:
        for place, edit in edits.items():
            if edit.low_rank is not None and edit.low_rank.rank > config.max_rank:
                rank = edit.low_rank.rank
                raise ArtifactInvalid(f"{where}: rank {rank}, this engine's max_rank is {config.max_rank}")
            for kind, needed in (("additive", edit.offset is not None), ("low_rank", edit.low_rank is not None)):
                served: Sequence[object] = getattr(config, f"{kind}_sites")
                if needed and place.site not in served:
                    raise ArtifactInvalid(
                        f"{where}: edits {place.site.value} (layer {place.layer}), and this engine has no {kind} table"
                        f" there: start it with {place.site.value} in {kind}_sites"
                    )


def packed_bytes(edits: Edits, layout: Layout, dtype: torch.dtype, *, pinned: bool) -> int:
    """The host memory that `pack` will keep, pinned or not. torch rounds page-locked memory up to a power of two."""
    places, rank = _extent(edits, layout)
    ranks = len(layout.low_rank) * rank
    numbers = (places * layout.hidden_size, ranks * layout.hidden_size, ranks * layout.hidden_size, ranks)
    sizes = [number * dtype.itemsize for number in numbers if number]
    return sum(1 << (size - 1).bit_length() if pinned else size for size in sizes)


def _extent(edits: Edits, layout: Layout) -> tuple[int, int]:
    """The places that the offsets are stored for, and the rank of all low-rank parts; 0 where there are none."""
    rank = max((edit.low_rank.rank for edit in edits.values() if edit.low_rank), default=0)
    offsets = any(edit.offset is not None for edit in edits.values())
    return len(layout.additive) if offsets else 0, rank if layout.low_rank else 0


def pack(edits: Edits, layout: Layout, dtype: torch.dtype, where: str) -> Packed:
    """The edits in table order, in `dtype`, zero where there is none. Places outside the layout belong to other ranks.

    Errors: `ArtifactInvalid` when a value is not finite in `dtype`.
    """
    places, rank = _extent(edits, layout)
    packed = Packed(
        offset=torch.stack([_offset(edits.get(place), layout.hidden_size) for place in layout.additive]).to(dtype)
        if places
        else None,
        low_rank=_stack([_low_rank(edits.get(place), rank, layout.hidden_size) for place in layout.low_rank], dtype)
        if rank
        else None,
    )
    if not math.isfinite(packed.largest):
        raise ArtifactInvalid(f"{where}: holds values that are not finite in the model's dtype {dtype}")
    return packed


def unpack(packed: Packed, layout: Layout) -> Edits:
    """The edits back, one per place of the layout."""
    edits: dict[Place, Edit] = {}
    if packed.offset is not None:
        edits |= {place: Edit(offset=packed.offset[i]) for i, place in enumerate(layout.additive)}
    if packed.low_rank is not None:
        part = packed.low_rank
        for i, place in enumerate(layout.low_rank):
            known = edits.get(place, Edit())
            edits[place] = Edit(known.offset, LowRank(part.A[i], part.B[i], part.c[i]))
    return edits


def compose(terms: Iterable[tuple[Packed, float]]) -> Packed:
    """One part equal to all terms at once, scales baked in; every term reads the same x.

    sum_i s_i (B_i^T (A_i x + c_i) + u_i) = [s_i B_i]^T ([A_i] x + [c_i]) + sum_i s_i u_i, summed in float32.
    """
    terms = tuple(terms)
    offsets = [(packed.offset, scale) for packed, scale in terms if packed.offset is not None]
    ranks = [(packed.low_rank, scale) for packed, scale in terms if packed.low_rank is not None]
    return Packed(
        offset=sum((u.float() * s for u, s in offsets), torch.zeros(())).to(offsets[0][0].dtype) if offsets else None,
        low_rank=LowRank(
            A=torch.cat([part.A for part, _ in ranks], 1),
            B=torch.cat([(part.B.float() * s).to(part.B.dtype) for part, s in ranks], 1),
            c=torch.cat([part.c for part, _ in ranks], 1),
        )
        if ranks
        else None,
    )


def _offset(edit: Edit | None, hidden: int) -> torch.Tensor:
    return torch.zeros(hidden) if edit is None or edit.offset is None else edit.offset.detach().float().cpu()


def _low_rank(edit: Edit | None, rank: int, hidden: int) -> LowRank:
    """Padded with zero ranks to `rank`: they add nothing."""
    blank = LowRank(torch.zeros(rank, hidden), torch.zeros(rank, hidden), torch.zeros(rank))
    if edit is not None and edit.low_rank is not None:
        for into, values in zip((blank.A, blank.B, blank.c), _triple(edit.low_rank), strict=True):
            into[: edit.low_rank.rank] = values.detach().float().cpu()
    return blank


def _stack(parts: list[LowRank], dtype: torch.dtype) -> LowRank:
    return LowRank(*(torch.stack(column).to(dtype) for column in zip(*map(_triple, parts), strict=True)))


def _triple(part: LowRank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return part.A, part.B, part.c
