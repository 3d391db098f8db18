"""Identity: the digest is of what an intervention does, never of its name, path, card or base."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from core.make import BASE, direction, lofit, loreft

from steer_vllm import Intervention, Positions
from steer_vllm.intervention import Card
from steer_vllm.methods import LoFiT


def test_what_is_no_part_of_it() -> None:
    item = lofit()
    card = Card("base", "words", "Q: {q} A:", {"lr": 1.0}, {"accuracy": 0.5})
    for same in (
        dataclasses.replace(item, card=card),
        dataclasses.replace(item, default_scale=2.0),
        dataclasses.replace(item, base=dataclasses.replace(BASE, weights=None)),
        dataclasses.replace(item, tensors={n: t.clone().requires_grad_() for n, t in item.tensors.items()}),
        dataclasses.replace(item, tensors={"offsets": item.tensors["offsets"].T.contiguous().T}),
    ):
        assert same.digest == item.digest


def test_what_is_part_of_it() -> None:
    item = lofit(((0, 1), (2, 0), (2, 3)))
    (offsets,) = item.tensors.values()
    last_bit = offsets.clone()
    last_bit.view(torch.int32)[0, 0] ^= 1
    others = [
        dataclasses.replace(item, positions=Positions("response")),
        dataclasses.replace(item, method=LoFiT(((0, 1), (2, 0), (2, 2)))),
        dataclasses.replace(item, tensors={"offsets": last_bit}),
        dataclasses.replace(item, tensors={"offsets": offsets.double()}),
        dataclasses.replace(item, tensors={"offsets": offsets.T}),
        dataclasses.replace(item, tensors={"offset": offsets}),
        direction(),
        direction(seed=4),
        direction(coefficient=2.5),
        direction((2,)),
        loreft(),
        loreft(positions="f2+l3"),
        loreft(positions="f2+l2/untied"),
    ]
    digests = [other.digest for other in (item, *others)]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests)


def test_negative_zero_is_other_content() -> None:
    """By bytes, not by value: what is equal by digest is equal in every bit."""
    one, two = ({"directions": torch.full((1, BASE.hidden_size), value)} for value in (0.0, -0.0))
    assert dataclasses.replace(direction(), tensors=one).digest != dataclasses.replace(direction(), tensors=two).digest


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        lofit().default_scale = 2.0  # type: ignore[misc]


def test_compile_is_pure() -> None:
    """Invariant: an artifact is compiled by a pure function: twice the same, its tensors untouched."""
    item = loreft(positions="f2+l2/untied")
    before = item.digest
    one, two = (item.compile(lambda layer, heads: heads) for _ in range(2))
    for mine, other in zip(one, two, strict=True):
        assert set(mine) == set(other)
        assert all(torch.equal(mine[p].low_rank.A, other[p].low_rank.A) for p in mine)  # type: ignore[union-attr]
    assert Intervention(item.method, item.tensors, item.base, item.positions).digest == before
