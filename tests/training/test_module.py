"""The loss: whose gradients, over which tokens, independent of padding and of the batch's company."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from steer_vllm.training.base import Base
from steer_vllm.training.collate import Collator, Encoded
from steer_vllm.training.learned import Learned
from steer_vllm.training.lofit import Offsets, Scaling
from steer_vllm.training.loreft import make_subspaces
from steer_vllm.training.module import SteeredModel
from steer_vllm.training.settings import LoReFTSettings
from steer_vllm.training.trainer import fit

KINDS = ["scaling", "offsets", "loreft", "untied"]


def make(kind: str, base: Base, size: float = 0.3) -> Learned:
    """Learnt values large enough that an error of routing shows."""
    learned: Learned
    if kind == "scaling":
        learned = Scaling(base.fingerprint, 5e-4, 0)
    elif kind == "offsets":
        learned = Offsets(((0, 1), (1, 0), (1, 3)), base.fingerprint, 0)
    else:
        positions = "f2+l2/untied" if kind == "untied" else "f1+l2"
        learned = make_subspaces(base.fingerprint, LoReFTSettings(rank=2, positions=positions, layers="0,2"))
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return learned


def loss(
    module: SteeredModel, base: Base, batch: list[Encoded], side: str = "right", items: int | None = None
) -> torch.Tensor:
    return module(**Collator(base.tokenizer, side)(batch), num_items_in_batch=items)["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_intervention_has_gradients(base: Base, ragged: list[Encoded], kind: str) -> None:
    module = SteeredModel(base.model, make(kind, base))
    loss(module, base, ragged).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())
    assert all(
        parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in module.learned.parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_company_change_nothing(base: Base, ragged: list[Encoded], kind: str) -> None:
    module = SteeredModel(base.model, make(kind, base))
    module.learned.penalty = lambda: 0.0  # type: ignore[method-assign]
    with torch.no_grad():
        right, left = loss(module, base, ragged), loss(module, base, ragged, "left")
        alone = [loss(module, base, [item]) * (len(item.ids) - item.prompt_length) for item in ragged]
        tokens = sum(len(item.ids) - item.prompt_length for item in ragged)
    torch.testing.assert_close(right, left, rtol=0, atol=1e-5)
    torch.testing.assert_close(right, sum(alone) / tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["scaling", "loreft"])
def test_accumulated_batches_have_the_gradient_of_the_whole(base: Base, ragged: list[Encoded], kind: str) -> None:
    tokens = sum(len(item.ids) - item.prompt_length for item in ragged)
    gradients = []
    for parts in ([ragged], [ragged[:1], ragged[1:]]):
        module = SteeredModel(base.model, make(kind, base))
        for part in parts:
            loss(module, base, part, items=tokens).backward()
        gradients.append([parameter.grad for parameter in module.learned.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-4, atol=1e-6)


def test_loss_is_cross_entropy_of_completion_tokens(base: Base, ragged: list[Encoded]) -> None:
    """Without any effect of the intervention, by a formula of its own."""
    module = SteeredModel(base.model, make("offsets", base, 0.0))
    with torch.no_grad():
        module.learned.get_parameter("offsets").zero_()
        expected = []
        for item in ragged:
            ids = torch.tensor([item.ids])
            logits = base.model(ids).logits[0]
            expected += [
                functional.cross_entropy(logits[at - 1], ids[0, at]) for at in range(item.prompt_length, len(item.ids))
            ]
        torch.testing.assert_close(loss(module, base, ragged), torch.stack(expected).mean(), rtol=0, atol=1e-5)


def test_penalty_is_a_sum(base: Base, ragged: list[Encoded]) -> None:
    """LoFiT's L1 term: lambda times the sum over all entries of A, once per update."""
    scaling = make("scaling", base)
    with torch.no_grad():
        with_l1 = loss(SteeredModel(base.model, scaling), base, ragged)
        total = sum(float(value.abs()) for value in scaling.get_parameter("scaling").flatten())
        scaling.l1 = 0.0  # type: ignore[assignment]
        without = loss(SteeredModel(base.model, scaling), base, ragged)
    assert (with_l1 - without).item() == pytest.approx(5e-4 * total, rel=1e-4)


def test_the_frozen_model_stays_in_evaluation_mode(base: Base) -> None:
    module = SteeredModel(base.model, make("offsets", base)).train()
    assert module.learned.training
    assert not any(part.training for part in base.model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_reproducibly_and_leaves_the_model(
    base: Base, ragged: list[Encoded], kind: str
) -> None:
    before = copy.deepcopy(base.model.state_dict())
    settings = LoReFTSettings(max_steps=25, batch_size=3, logging_steps=1)
    ends = []
    for _ in range(2):
        torch.manual_seed(len(ends))  # what others drew from the global stream must not matter
        learned = make(kind, base, 0.0)
        log = fit(learned, base, ragged, settings, 1e-2)
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) == 25
        assert losses[-1] < losses[0] - 0.05
        ends.append(copy.deepcopy(learned.state_dict()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_the_seed_decides_the_order_of_the_data(base: Base, ragged: list[Encoded]) -> None:
    first_losses = set()
    for seed in range(5):
        settings = LoReFTSettings(max_steps=1, batch_size=1, seed=seed)
        first_losses.add(fit(make("offsets", base), base, ragged, settings, 1e-2)[0]["loss"])
    assert len(first_losses) > 1  # from the same start values


def test_linear_decay_without_warm_up(base: Base, ragged: list[Encoded]) -> None:
    log = fit(make("offsets", base), base, ragged, LoReFTSettings(max_steps=4, logging_steps=1, clip=0.5), 0.4)
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    log = fit(make("offsets", base), base, ragged, LoReFTSettings(max_steps=4, logging_steps=1, warmup=0.5), 0.4)
    assert [entry["learning_rate"] for entry in log if "learning_rate" in entry] == pytest.approx([0.0, 0.2, 0.4, 0.2])


def test_bfloat16(folder: object, ragged: list[Encoded]) -> None:
    from steer_vllm.training.base import load_base

    half = load_base(str(folder), "bfloat16")
    assert half.model.dtype == torch.bfloat16
    learned = make("loreft", half, 0.0)
    log = fit(learned, half, ragged, LoReFTSettings(max_steps=20, batch_size=3, logging_steps=1), 1e-2)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert all(parameter.dtype == torch.float32 for parameter in learned.parameters())
