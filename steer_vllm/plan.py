"""The rows a request's segments need, and where each of them was placed.

A plan is made once, when a request is admitted, and travels with it to every worker: the worker fills the rows that do
not hold their content yet and routes tokens by the placements. Which parts an intervention has comes from its summary;
tensors are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .config import SteerConfig
from .errors import ScaleOutOfRange, TooManyInterventions
from .rows import Content
from .segments import Component, Segment, Term, resolve


class PartSummary(NamedTuple):
    """One part of a compiled intervention: does it add offsets, its rank (0: none), its largest absolute entry."""

    additive: bool
    rank: int
    largest: float


@dataclass(frozen=True)
class Summary:
    """What the host needs to know of a loaded intervention to place it."""

    digest: str
    parts: tuple[PartSummary, ...]


def merge(digest: str, ranks: Iterable[Sequence[PartSummary]]) -> Summary:
    """One summary from those of all ranks: pipeline ranks hold different layers, and what any has, the whole has."""
    return Summary(
        digest,
        tuple(
            PartSummary(
                additive=any(part.additive for part in parts),
                rank=max(part.rank for part in parts),
                largest=max(part.largest for part in parts),
            )
            for parts in zip(*ranks, strict=True)
        ),
    )


class Placement(NamedTuple):
    """Positions start <= p < stop use these rows (0: none) at this scale."""

    start: int
    stop: int
    additive_row: int
    low_rank_row: int
    scale: float


class Fill(NamedTuple):
    """A row and what it must hold."""

    row: int
    content: Content


@dataclass(frozen=True)
class Plan:
    """Everything the engine knows of a request's interventions. ticket: what is held for it, in the core's book."""

    segments: tuple[Segment, ...]
    placements: tuple[Placement, ...]
    additive: tuple[Fill, ...]
    low_rank: tuple[Fill, ...]
    ticket: int = field(default=0, compare=False)


class Need(NamedTuple):
    """What one segment needs: a row content per table (None: none) and the scale of its tokens."""

    additive: Content | None
    low_rank: Content | None
    scale: float


def needs(
    segments: Sequence[Segment], summaries: Mapping[str, Summary], config: SteerConfig, largest: float
) -> tuple[Need, ...]:
    """What each segment needs of the tables. `largest`: the largest finite value of the model's dtype.

    One term is stored unscaled and scaled in the step, so every strength shares its row; several are baked together.
    Errors: `TooManyInterventions` when there are more segments than `max_segments` or a sum of ranks above `max_rank`;
    `ScaleOutOfRange` when a composed or scaled edit could overflow the dtype.
    """
    if len(segments) > config.max_segments:
        raise TooManyInterventions(f"{len(segments)} segments on one request, at most {config.max_segments} are served")
    return tuple(_need(segment.terms, summaries, config, largest) for segment in segments)


def _need(terms: tuple[Term, ...], summaries: Mapping[str, Summary], config: SteerConfig, largest: float) -> Need:
    parts = [(term, summaries[term.digest].parts[term.part]) for term in terms]
    reach = sum(abs(term.scale) * part.largest for term, part in parts)
    if not math.isfinite(reach) or reach > largest:
        raise ScaleOutOfRange(
            f"the scaled edit reaches {reach:.3g}, the model's dtype holds {largest:.3g}", param="scale"
        )
    rank = sum(part.rank for _, part in parts)
    if rank > config.max_rank:
        raise TooManyInterventions(f"the interventions have rank {rank} together, at most {config.max_rank} is served")
    alone = len(terms) == 1
    kept = [(term._replace(scale=1.0) if alone else term, part) for term, part in parts]
    return Need(
        additive=tuple(term for term, part in kept if part.additive) or None,
        low_rank=tuple(term for term, part in kept if part.rank) or None,
        scale=terms[0].scale if alone else 1.0,
    )


def contents(needed: Iterable[Need]) -> tuple[set[Content], set[Content]]:
    """The distinct row contents of a request: additive, low-rank."""
    needed = tuple(needed)
    return {n.additive for n in needed if n.additive}, {n.low_rank for n in needed if n.low_rank}


NOMINAL_PROMPT = 1 << 20
"""A prompt length at which all positions of a request are distinct."""


def nominal_contents(
    components: Iterable[Component], summaries: Mapping[str, Summary], config: SteerConfig, largest: float
) -> tuple[set[Content], set[Content]]:
    """The row contents of a request whose prompt length the front does not know: additive, low-rank.

    Very short prompts can need others (the first and the last tokens meet); the spare rows are for them.
    Errors: those of `needs`.
    """
    return contents(needs(resolve(components, NOMINAL_PROMPT), summaries, config, largest))
