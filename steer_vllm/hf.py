"""Apply interventions to a transformers model, as the server would: for evaluation, and as the oracle of the tests.

Segments, composition and rows are those of the engine, the edit that of `ops.reference`. How a model is hooked is not
known here (`hooks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import MAX_SCALE, SteerConfig
from .edit import Edits, Site
from .errors import InvalidIntervention, Unsupported
from .hooks import Steering
from .intervention import Intervention
from .packed import Layout, pack, unpack
from .plan import Fill, Placement, Summary, needs
from .positions import Positions
from .rows import Content
from .segments import Component, Segment, check_scale, resolve
from .slots import gather

_EVERYTHING = SteerConfig(1, 1, 1 << 16, tuple(Site), tuple(Site), per_request=1 << 10, max_scale=MAX_SCALE)
"""No limits but those of the numbers: this is not a shared engine."""

Steer = tuple[Intervention, float, Positions]
"""An intervention with its scale and positions decided."""


@contextmanager
def steered(
    model: nn.Module,
    *interventions: Intervention | Steer,
    scale: float | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[nn.Module]:
    """Run a transformers model with interventions, as the server would; every sequence of a batch gets all of them.

    Each is an `Intervention` (its own positions, and its default scale unless `scale` is given) or an (intervention,
    scale, positions) triple. A sequence's prompt is what its first forward holds, unless `prompt_lengths` (tokens
    without padding, one per sequence) says otherwise: text that is scored contains its answer.
    Errors: those of `plan.needs` when the composition cannot be served, `ScaleOutOfRange`, `InvalidIntervention` for
    prompt lengths that the sequences do not have, `Unsupported` for a model or mask that is not understood.
    """
    asked = [item if isinstance(item, tuple) else _ask(item, scale) for item in interventions]
    steering = Steering(model)
    rows = _Rows(steering, [item for item, _, _ in asked])
    limit = _EVERYTHING.max_scale
    components = [Component(item.digest, check_scale(by, limit), positions) for item, by, positions in asked]
    placements: list[tuple[Placement, ...]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        past = kwargs.get("past_key_values")
        seen = past.get_seq_length() if past is not None else 0
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(tokens.shape[0], seen + tokens.shape[1], dtype=torch.long, device=tokens.device)
        if mask.dim() != 2 or mask.shape[1] != seen + tokens.shape[1]:
            raise Unsupported(
                f"steered: attention_mask has the shape {tuple(mask.shape)}, [batch, all {seen + tokens.shape[1]} "
                "tokens so far] is needed"
            )
        if seen == 0:
            lengths = _lengths(mask, prompt_lengths)
            placements[:] = [rows.place(resolve(components, length)) for length in lengths]
            steering.set_rows(rows.edits())
        steering.route(mask, tokens.shape[1], placements)

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with steering.active():
            yield model
    finally:
        handle.remove()


def _lengths(mask: torch.Tensor, given: Sequence[int] | None) -> Sequence[int]:
    """Prompt length of each sequence. Errors: `InvalidIntervention` for lengths that the sequences do not have."""
    tokens: list[int] = mask.sum(1).tolist()
    lengths = tokens if given is None else given
    if len(lengths) != len(tokens) or not all(1 <= n <= most for n, most in zip(lengths, tokens, strict=True)):
        raise InvalidIntervention(f"prompt_lengths: {lengths} do not lie within sequences of {tokens} tokens")
    return lengths


def _ask(item: Intervention, scale: float | None) -> Steer:
    return item, item.default_scale if scale is None else scale, item.positions


class _Rows:
    """Just the rows that a run needs, numbered as they come up."""

    def __init__(self, steering: Steering, interventions: Sequence[Intervention]) -> None:
        weight = steering.weight
        self._largest = torch.finfo(weight.dtype).max
        compiled = {item.digest: item.compile(steering.project) for item in interventions}
        used = {place for parts in compiled.values() for edits in parts for place in edits}
        self._layout = Layout.of(used, weight.shape[0], _EVERYTHING)
        self._store = {
            (digest, part): pack(edits, self._layout, weight.dtype, digest)
            for digest, parts in compiled.items()
            for part, edits in enumerate(parts)
        }
        self._summaries = {
            digest: Summary(digest, tuple(self._store[digest, part].summary() for part in range(len(parts))))
            for digest, parts in compiled.items()
        }
        self._row: dict[Content, int] = {}

    def place(self, segments: Sequence[Segment]) -> tuple[Placement, ...]:
        """The segments with their rows."""
        needed = needs(segments, self._summaries, _EVERYTHING, self._largest)
        return tuple(
            Placement(segment.start, segment.stop, self._number(need.additive), self._number(need.low_rank), need.scale)
            for segment, need in zip(segments, needed, strict=True)
        )

    def edits(self) -> list[Edits]:
        """Content of the rows from 1 up."""
        packed = (gather(Fill(row, content), self._store, "cpu") for content, row in self._row.items())
        return [unpack(part, self._layout) for part in packed]

    def _number(self, content: Content | None) -> int:
        return 0 if content is None else self._row.setdefault(content, len(self._row) + 1)
