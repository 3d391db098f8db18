"""Random artifacts of every method for any base model: strong enough to matter, mild enough to stay finite."""

from __future__ import annotations

from pathlib import Path

import torch

from steer_vllm import Intervention, Positions
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.methods import Direction, LoFiT, LoReFT


def lofit(base: Fingerprint, seed: int, strength: float = 2.0) -> Intervention:
    """Offsets of three heads."""
    draw = torch.Generator().manual_seed(seed)
    heads = torch.randperm(base.num_layers * base.num_heads, generator=draw)[:3].sort().values.tolist()
    pairs = tuple((head // base.num_heads, head % base.num_heads) for head in heads)
    offsets = torch.randn(3, base.head_dim, generator=draw) * strength
    return Intervention(LoFiT(pairs), {"offsets": offsets}, base, LoFiT.positions)


def direction(base: Fingerprint, seed: int, positions: str = "response", strength: float = 1.5) -> Intervention:
    """One direction in two layers."""
    draw = torch.Generator().manual_seed(seed)
    layers = (seed % (base.num_layers - 1), base.num_layers - 1)
    vectors = torch.randn(2, base.hidden_size, generator=draw) * strength
    return Intervention(Direction(layers, 0.7), {"directions": vectors}, base, Positions.parse(positions))


def loreft(base: Fingerprint, seed: int, positions: str, rank: int = 4) -> Intervention:
    """LoReFT in two layers."""
    draw = torch.Generator().manual_seed(seed)
    at = Positions.parse(positions)
    shape = (at.parts, 2, rank, base.hidden_size)
    rotate = torch.linalg.qr(torch.randn(at.parts, 2, base.hidden_size, rank, generator=draw))[0].mT.contiguous()
    tensors = {
        "rotate": rotate,
        "weight": rotate + torch.randn(shape, generator=draw) * 0.4,
        "bias": torch.randn(shape[:3], generator=draw) * 3,
    }
    method = LoReFT((seed % (base.num_layers - 1), base.num_layers - 1), rank, at.tied)
    return Intervention(method, tensors, base, at)


def family(base: Fingerprint) -> dict[str, Intervention]:
    """Eight LoFiT artifacts, directions at every kind of position, LoReFT tied and untied."""
    made = {f"lofit-{i}": lofit(base, i) for i in range(8)}
    for i, positions in enumerate(("all", "prompt", "generated", "response")):
        made[f"direction-{positions}"] = direction(base, 20 + i, positions)
    for i, positions in enumerate(("f2+l2", "f1+l1", "f3+l2/untied", "all")):
        made[f"loreft-{i}"] = loreft(base, 40 + i, positions)
    return made


def save_all(interventions: dict[str, Intervention], folder: Path) -> list[dict[str, str]]:
    """Write them and return the load steps for the driver."""
    steps = []
    for name, intervention in interventions.items():
        intervention.save(folder / name)
        steps.append({"do": "load", "name": name, "folder": str(folder / name)})
    return steps
