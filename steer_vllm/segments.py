"""From what a request asks for to what each of its tokens gets.

Components (interventions with scales and positions) become segments: spans of absolute token positions with the terms
that are active there. Segments are canonical: equal edits give equal segments, which is what cache keys rest on. The
module knows digests, not tensors, and no engine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .errors import InvalidIntervention, ScaleOutOfRange
from .positions import Positions


@dataclass(frozen=True)
class Component:
    """One intervention of a request, everything decided: which content, how strongly, where."""

    digest: str
    scale: float
    positions: Positions


class Term(NamedTuple):
    """One part of an intervention at a scale. Ordered by digest and part."""

    digest: str
    part: int
    scale: float


class Segment(NamedTuple):
    """Positions start <= p < stop that get the sum of the terms."""

    start: int
    stop: int
    terms: tuple[Term, ...]


def check_scale(scale: object, limit: float, param: str = "scale") -> float:
    """The scale as the tables hold it: a float32 value.

    Errors: `ScaleOutOfRange` unless it is a finite number with |scale| <= limit.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InvalidIntervention(f"{param}: expected a number, got {scale!r}", param=param)
    if not abs(scale) <= limit:  # also catches NaN
        given = repr(scale) if isinstance(scale, float) or abs(scale) < 1 << 64 else "a huge number"
        raise ScaleOutOfRange(f"{param}: {given} is not a number between -{limit:g} and {limit:g}", param=param)
    return float(np.float32(scale))


def resolve(components: Iterable[Component], prompt_len: int) -> tuple[Segment, ...]:
    """The canonical segments of a request whose prompt has `prompt_len` tokens.

    Positions are cut wherever a component starts or stops; in each piece the scales of equal parts add up; pieces where
    nothing remains are left out and equal neighbours are joined.
    """
    spans = [(c.digest, c.scale, span) for c in components for span in c.positions.spans(prompt_len)]
    cuts = sorted({edge for _, _, span in spans for edge in (span.start, span.stop)})
    segments: list[Segment] = []
    for start, stop in pairwise(cuts):
        scales: dict[tuple[str, int], list[float]] = {}
        for digest, scale, span in spans:
            if span.start <= start < span.stop:
                scales.setdefault((digest, span.part), []).append(scale)
        totals = {key: _total(scales[key]) for key in sorted(scales)}
        terms = tuple(Term(*key, total) for key, total in totals.items() if total != 0.0)
        if not terms:
            continue
        if segments and segments[-1].stop == start and segments[-1].terms == terms:
            segments[-1] = segments[-1]._replace(stop=stop)
        else:
            segments.append(Segment(start, stop, terms))
    return tuple(segments)


def _total(scales: list[float]) -> float:
    """Their sum as the tables hold it, the same in whatever order they come."""
    return float(np.float32(math.fsum(scales)))


def block_key(segments: Sequence[Segment], start: int, stop: int) -> bytes | None:
    """The extra prefix-cache key of the block of tokens [start, stop), or None when no segment touches it.

    Equal keys mean equal edits at every position of the block: segments are clipped to the block, so what an
    intervention does elsewhere separates nothing here.
    """
    clipped = [
        (max(segment.start, start), min(segment.stop, stop), segment.terms)
        for segment in segments
        if segment.start < stop and start < segment.stop
    ]
    if not clipped:
        return None
    digest = hashlib.sha256()
    for first, last, terms in clipped:
        digest.update(f"[{first},{last})".encode())
        for term in terms:
            digest.update(f"{term.digest}#{term.part}*{term.scale.hex()};".encode())
    return digest.digest()
