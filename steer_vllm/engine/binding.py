"""Which places of the model can be edited on this rank, and what an artifact may therefore ask for.

Refuses, with layer, site and reason. Knows how vLLM's layers are found (`layers`), not how they are edited
(`wrapping`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import nn

from ..config import SteerConfig
from ..edit import Edit, Edits, LowRank, Place
from ..errors import ArtifactInvalid, StartupRefused
from ..layer import LayerModules
from .layers import find_layers, is_whole, share_of
from .projection import OutputProjection

_log = logging.getLogger(__name__)


class Binding:
    """The decoder layers of one rank with their sites."""

    def __init__(self, model: nn.Module, config: SteerConfig) -> None:
        """Errors: `StartupRefused` when no layer has a configured site; a pipeline rank cannot tell."""
        self.layers: Mapping[int, LayerModules] = find_layers(model)
        bound = {place.site for place in self.places}
        lacking = sorted({*config.additive_sites, *config.low_rank_sites} - bound)
        if lacking and is_whole(model):
            index, layer = next(iter(self.layers.items()))
            raise StartupRefused(
                f"{type(model).__name__}: {lacking[0].value} could not be bound in any layer (layer {index}, "
                f"{type(layer.block).__name__}: {layer.missing[lacking[0]]}); without it in additive_sites and "
                "low_rank_sites the model can be served"
            )
        if any(projection.quantised for projection in self.projections.values()):
            _log.warning(
                "%s: attention output projections are quantised; head offsets are pushed through the weights as they "
                "are stored, without the rounding of inputs",
                type(model).__name__,
            )

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Every place that was bound."""
        return tuple(Place(index, site) for index, layer in self.layers.items() for site in sorted(layer.sites))

    @cached_property
    def shares(self) -> Mapping[Place, int]:
        """Places whose output is a share of a sum over the tensor-parallel ranks, with this rank's number."""
        found = {place: share_of(self.layers[place.layer], place.site) for place in self.places}
        return {place: rank for place, rank in found.items() if rank is not None}

    @cached_property
    def projections(self) -> Mapping[int, OutputProjection]:
        """W_o of each layer that has one."""
        found = {index: layer.projection for index, layer in self.layers.items()}
        return {index: OutputProjection(module, index) for index, module in found.items() if module is not None}

    def check(self, edits: Iterable[Place], where: str) -> None:
        """Errors: `ArtifactInvalid` for an edit of a site that a layer of this rank does not have."""
        for place in edits:
            layer = self.layers.get(place.layer)
            if layer is not None and place.site in layer.missing:
                raise ArtifactInvalid(
                    f"{where}: edits {place.site.value} of layer {place.layer} ({type(layer.block).__name__}), which "
                    f"could not be bound: {layer.missing[place.site]}"
                )

    def share(self, edits: Edits) -> Edits:
        """This rank's part of edits whose sites hold shares of a sum.

        The edit is affine, so sum_r B^T A x_r = B^T A x: every rank applies A and B to its own share, and the
        constants u and c are added on the first rank alone.
        """
        return {place: _without_constants(edit) if self.shares.get(place) else edit for place, edit in edits.items()}


def _without_constants(edit: Edit) -> Edit:
    low = edit.low_rank
    return Edit(
        offset=None if edit.offset is None else torch.zeros_like(edit.offset),
        low_rank=None if low is None else LowRank(low.A, low.B, torch.zeros_like(low.c)),
    )
