"""Drawn artifacts written to disk, each content once."""

from __future__ import annotations

from pathlib import Path

import torch
from engine import artifacts as made

from steer_vllm import Intervention, Positions
from steer_vllm.edit import Site
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.methods import Direction

from .case import Artifact


def forcing(base: Fingerprint, output: torch.Tensor, spec: Artifact) -> Intervention:
    """A direction towards one token's row of the output embedding [vocabulary, hidden], from the first layer on.

    So strong that nothing else decides the next token, and in the keys and values of all later layers.
    """
    towards = torch.nn.functional.normalize(output[spec.seed], dim=0) * 60.0
    method = Direction((0, base.num_layers - 1), 1.0, Site.BLOCK_OUTPUT)
    return Intervention(method, {"directions": towards.repeat(2, 1)}, base, Positions.parse(spec.positions))


def build(spec: Artifact, base: Fingerprint, output: torch.Tensor) -> Intervention:
    """The artifact of this draw for this base."""
    if spec.method == "lofit":
        lofit = made.lofit(base, spec.seed)
        return Intervention(lofit.method, lofit.tensors, base, Positions.parse(spec.positions))
    if spec.method == "loreft":
        return made.loreft(base, spec.seed, spec.positions, spec.rank)
    if spec.method == "force":
        return forcing(base, output, spec)
    draw = torch.Generator().manual_seed(spec.seed)
    layers = (spec.seed % (base.num_layers - 1), base.num_layers - 1)
    vectors = torch.randn(2, base.hidden_size, generator=draw) * 1.5
    method = Direction(layers, 0.7, Site(spec.site))
    return Intervention(method, {"directions": vectors}, base, Positions.parse(spec.positions))


class Shelf:
    """Artifacts of one base in a folder, and the interventions that the oracle needs."""

    def __init__(self, base: Fingerprint, output: torch.Tensor, folder: Path) -> None:
        self.base = base
        self.output = output
        self.folder = folder
        self._made: dict[Artifact, Intervention] = {}

    def get(self, spec: Artifact) -> Intervention:
        """The intervention of a draw, saved under `path`."""
        if spec not in self._made:
            self._made[spec] = build(spec, self.base, self.output)
            self._made[spec].save(self.path(spec))
        return self._made[spec]

    def path(self, spec: Artifact) -> Path:
        """Where the artifact lies."""
        return self.folder / "-".join(str(value).replace("/", "_") for value in spec.model_dump().values())
