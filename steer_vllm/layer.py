"""The modules of one decoder layer that carry the three sites, whichever library the model comes from.

Finding them is not known here: `hooks` does it for transformers, `engine.layers` for vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .edit import Site


@dataclass(frozen=True)
class LayerModules:
    """Every site is either in `sites`, or in `missing` with the reason why it could not be bound.

    block: the layer itself, whether or not its output is a site.
    """

    block: nn.Module
    sites: Mapping[Site, nn.Module]
    missing: Mapping[Site, str]

    @property
    def projection(self) -> nn.Module | None:
        """The attention's output projection, None in a layer without one."""
        return self.sites.get(Site.ATTENTION_OUTPUT)

    @property
    def mlp(self) -> nn.Module | None:
        """What computes the MLP's output, None in a layer without one."""
        return self.sites.get(Site.MLP_OUTPUT)


def modules(block: nn.Module, projection: nn.Module | str, mlp: nn.Module | str) -> LayerModules:
    """A layer from what was found for its sites: a module, or why there is none."""
    found = {Site.ATTENTION_OUTPUT: projection, Site.MLP_OUTPUT: mlp, Site.BLOCK_OUTPUT: block}
    return LayerModules(
        block=block,
        sites={site: module for site, module in found.items() if isinstance(module, nn.Module)},
        missing={site: reason for site, reason in found.items() if isinstance(reason, str)},
    )
