"""Interventions on a transformers model: batches, padding, generation, composition; the model is untouched after."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from core.make import BASE, direction, lofit, loreft, orthonormal

from steer_vllm import Intervention, Positions
from steer_vllm.edit import Site
from steer_vllm.errors import InvalidIntervention, ScaleOutOfRange, Unsupported
from steer_vllm.hf import steered
from steer_vllm.hooks import Steering, find_layers

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums in another order
EVERY = {
    "lofit": lofit(),
    "loreft": loreft(),
    "untied": loreft(positions="f2+l2/untied"),
    "direction": direction(),
    "mlp": direction((0, 1), site=Site.MLP_OUTPUT, positions="generated"),
}
MIX = (
    (lofit(), 1.25, Positions("generated")),
    (loreft(), 0.5, Positions.parse("f2+l3")),
    (direction(), -1.0, Positions("response")),
    (loreft((1,), positions="f1+l1/untied", seed=8), 2.0, Positions.parse("f3+l1/untied")),
)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, **kwargs).logits
    return found


def padded(rows: Iterable[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of a batch of rows of different lengths."""
    rows = list(rows)
    width = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, 1
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*EVERY, "mix"])
def test_a_batch_is_each_alone(model: Any, name: str, side: str) -> None:
    """Invariant: positions are absolute, of the sequence without its padding."""
    asked: tuple[Any, ...] = MIX if name == "mix" else (EVERY[name],)
    rows = [ids(n, seed=n) for n in (9, 4, 1, 7)]
    lengths = [5, 4, 1, 2]
    tokens, mask = padded(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with steered(model, *asked, prompt_lengths=lengths):
        together = logits(model, tokens, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        with steered(model, *asked, prompt_lengths=[lengths[i]]):
            alone = logits(model, row[None])
        torch.testing.assert_close(together[i][mask[i].bool()], alone[0], **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_it_does_something_only_where_it_should(model: Any, name: str) -> None:
    """Causality: logits before the first edited position are the base model's to the bit."""
    item, tokens, n = EVERY[name], ids(1, 9), 6
    base = logits(model, tokens)
    with steered(model, item, prompt_lengths=[n]):
        found = logits(model, tokens)
    first = item.positions.spans(n)[0].start
    assert torch.equal(found[:, :first], base[:, :first])
    assert (found[:, first:] - base[:, first:]).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 3.0])
def test_scale(model: Any, scale: float) -> None:
    """A direction at scale s is the direction of coefficient s times as large; at 0 it is the base model."""
    tokens = ids(2, 6)
    with steered(model, direction(coefficient=2.0, positions="all"), scale=scale):
        found = logits(model, tokens)
    with steered(model, direction(coefficient=2.0 * scale, positions="all")):
        torch.testing.assert_close(found, logits(model, tokens), **CLOSE)
    assert torch.equal(found, logits(model, tokens)) == (scale == 0.0)


def test_default_scale(model: Any) -> None:
    tokens = ids(1, 5)
    with steered(model, lofit(default_scale=2.0)):
        found = logits(model, tokens)
    with steered(model, lofit(), scale=2.0):
        torch.testing.assert_close(found, logits(model, tokens))


def test_composition_is_simultaneous(model: Any) -> None:
    """Invariant: every component reads the same x. Two LoReFTs at one layer: h + d1(h) + d2(h), not d2(h + d1(h))."""
    one, two = loreft((1,), seed=4, positions="f7+l7"), loreft((1,), seed=5, positions="f7+l7")
    tokens = ids(1, 6)

    def delta(item: Intervention, h: torch.Tensor) -> torch.Tensor:
        R, W, b = (item.tensors[name][0, 0] for name in ("rotate", "weight", "bias"))
        return (h @ W.T + b - h @ R.T) @ R

    hook = model.model.layers[1].register_forward_hook(
        lambda m, a, h: h + 0.5 * delta(one, h) - 1.5 * delta(two, h) + h.new_ones(h.shape[-1])
    )
    wanted = logits(model, tokens)
    hook.remove()
    ones = Intervention(
        direction((1,), 1.0).method, {"directions": torch.ones(1, BASE.hidden_size)}, BASE, Positions("all")
    )
    with steered(model, (one, 0.5, one.positions), (two, -1.5, two.positions), ones):
        torch.testing.assert_close(logits(model, tokens), wanted, **CLOSE)


def test_composition_at_different_positions(model: Any) -> None:
    """Position by position: a hook that adds what each token should get."""
    tokens, n = ids(1, 8), 5
    one, two = direction((1,), seed=4), direction((1,), seed=5)
    add = torch.zeros(8, BASE.hidden_size)
    add[:n] += 0.5 * 2 * one.tensors["directions"][0]
    add[n - 1 :] += -1.0 * 2 * two.tensors["directions"][0]
    hook = model.model.layers[1].register_forward_hook(lambda m, a, h: h + add)
    wanted = logits(model, tokens)
    hook.remove()
    with steered(model, (one, 0.5, Positions("prompt")), (two, -1.0, Positions("response")), prompt_lengths=[n]):
        torch.testing.assert_close(logits(model, tokens), wanted, **CLOSE)


@pytest.mark.parametrize("name", [*EVERY, "mix"])
def test_generation_is_teacher_forcing(model: Any, name: str) -> None:
    """Invariant: prefill and cached decode edit the same absolute positions as one forward over the whole text."""
    asked: tuple[Any, ...] = MIX if name == "mix" else (EVERY[name],)
    rows = [ids(n, seed=n) for n in (6, 3)]
    tokens, mask = padded(rows, "left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    with steered(model, *asked):
        made = model.generate(tokens, attention_mask=mask, output_logits=True, **options)
    for i, row in enumerate(rows):
        answer = made.sequences[i, tokens.shape[1] :]
        with steered(model, *asked, prompt_lengths=[len(row)]):
            whole = logits(model, torch.cat([row, answer])[None])[0]
        torch.testing.assert_close(torch.stack([step[i] for step in made.logits]), whole[len(row) - 1 : -1], **CLOSE)


def test_two_generations_in_one_context(model: Any) -> None:
    """A new prompt is a new request: nothing of the first remains."""
    options = {"max_new_tokens": 3, "do_sample": False}
    with steered(model, *MIX):
        model.generate(ids(2, 7), **options)
        second = model.generate(ids(1, 3, seed=5), **options)
    with steered(model, *MIX):
        assert torch.equal(model.generate(ids(1, 3, seed=5), **options), second)


def test_embeddings_as_input(model: Any) -> None:
    tokens = ids(2, 5)
    with steered(model, *MIX), torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
        torch.testing.assert_close(found, model(tokens).logits, **CLOSE)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_untouched_after(model: Any, fails: bool) -> None:
    tokens = ids(1, 6)
    before = logits(model, tokens)
    hooks = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(IndexError) if fails else nullcontext(), steered(model, *MIX):
        logits(model, tokens + (BASE.vocab_size if fails else 0))  # beyond the vocabulary
    assert [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, tokens), before)


def test_what_cannot_be_compiled_leaves_no_hook(model: Any) -> None:
    item = lofit(((0, 1),))
    wrong = Intervention(item.method, {"offsets": torch.full((1, BASE.head_dim), 3e38)}, BASE, item.positions)
    with pytest.raises(Exception, match="not finite"), steered(model, wrong):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e308, -1e39])
def test_scales_that_cannot_be(model: Any, scale: float) -> None:
    with pytest.raises(ScaleOutOfRange), steered(model, lofit(), scale=scale):
        logits(model, ids(1, 3))


@pytest.mark.parametrize("lengths", [[3], [3, 3, 3], []])
def test_one_prompt_length_per_sequence(model: Any, lengths: list[int]) -> None:
    """Invariant: never guessed. One length for two sequences would route both by the first."""
    with (
        pytest.raises(InvalidIntervention, match="prompt_lengths"),
        steered(model, direction(), prompt_lengths=lengths),
    ):
        logits(model, ids(2, 5))


@pytest.mark.parametrize("length", [0, -1, 6])
def test_a_prompt_length_lies_within_its_sequence(model: Any, length: int) -> None:
    with (
        pytest.raises(InvalidIntervention, match="prompt_lengths"),
        steered(model, direction(), prompt_lengths=[length]),
    ):
        logits(model, ids(1, 5))


def test_a_mask_of_the_new_tokens_alone_is_refused(model: Any) -> None:
    """With a cache the positions follow from the whole mask."""
    with steered(model, direction()), torch.no_grad():
        cache = model(ids(1, 5), use_cache=True).past_key_values
        with pytest.raises(Unsupported, match="attention_mask"):
            model(ids(1, 1), past_key_values=cache, attention_mask=torch.ones(1, 1, dtype=torch.long))


def test_a_mask_of_four_dimensions_is_refused(model: Any) -> None:
    with pytest.raises(Unsupported, match="attention_mask"), steered(model, lofit()):
        logits(model, ids(1, 3), attention_mask=torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: Any, dtype: torch.dtype) -> None:
    """The edit has the model's dtype and stays near the float32 one: within a few roundings of the logits' size."""
    import copy

    half, tokens = copy.deepcopy(model).to(dtype), ids(2, 6)
    with steered(model, *MIX, prompt_lengths=[4, 4]):
        wanted = logits(model, tokens)
    with steered(half, *MIX, prompt_lengths=[4, 4]):
        found = logits(half, tokens)
    assert found.dtype == dtype
    limit = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype] * wanted.abs().max()
    assert (found.float() - wanted).abs().max() < limit


def test_gradients_reach_edits(model: Any) -> None:
    """Training: the edits of a row get gradients through the model, and the padding and row 0 none."""
    from steer_vllm.plan import Placement
    from steer_vllm.positions import OPEN

    steering = Steering(model)
    offsets = torch.zeros(3, BASE.head_dim, requires_grad=True)
    parts = lofit().method.compile({"offsets": offsets}, BASE, steering.project)
    steering.set_rows(list(parts))
    tokens = ids(1, 5)
    with steering.active():
        steering.route(torch.ones(1, 5), 5, [[Placement(0, OPEN, 1, 0, 1.0)]])
        model(tokens).logits.square().sum().backward()
        assert offsets.grad is not None
        assert (offsets.grad != 0).all(dim=1).all()
        offsets.grad = None
        steering.set_rows(list(lofit().method.compile({"offsets": offsets}, BASE, steering.project)))
        steering.route(torch.ones(1, 5), 5, [[]])
        model(tokens).logits.square().sum().backward()
        assert offsets.grad is None or not offsets.grad.any()
    model.zero_grad()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        bos_token_id=None, eos_token_id=None, vocab_size=BASE.vocab_size, n_embd=32, n_layer=3, n_head=4, n_positions=64
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def test_projections_stored_transposed() -> None:
    """GPT-2 keeps its projection as [in, out]: square, so no shape tells; the edited heads do."""
    import dataclasses

    model = gpt2()
    base = dataclasses.replace(BASE, hidden_size=32)
    item, tokens = lofit(base=base), ids(1, 6)
    handles = []
    for row, (layer, head) in enumerate(item.method.heads):  # type: ignore[attr-defined]
        add = torch.zeros(32)
        add[head * 8 : head * 8 + 8] = item.tensors["offsets"][row]
        projection = model.transformer.h[layer].attn.c_proj
        handles.append(projection.register_forward_pre_hook(lambda m, a, add=add: (a[0] + add,)))
    wanted = logits(model, tokens)
    for handle in handles:
        handle.remove()
    with steered(model, item):
        torch.testing.assert_close(logits(model, tokens), wanted, **CLOSE)


def test_layers_are_found_by_structure() -> None:
    model = gpt2()
    layers = find_layers(model)
    assert [layer.block for layer in layers] == list(model.transformer.h)
    assert layers[1].projection is model.transformer.h[1].attn.c_proj
    assert layers[2].mlp is model.transformer.h[2].mlp


def test_models_without_decoder_layers_are_refused() -> None:
    with pytest.raises(Unsupported, match="no decoder layers"):
        find_layers(torch.nn.Sequential(torch.nn.Linear(3, 3)))


def test_a_layer_without_a_known_projection_is_refused(model: Any) -> None:
    import copy

    broken = copy.deepcopy(model)
    attention = broken.model.layers[2].self_attn
    attention.other = attention.o_proj
    del attention.o_proj
    assert sorted(find_layers(broken)[2].sites) == [Site.BLOCK_OUTPUT, Site.MLP_OUTPUT]
    refused = r"layer 2 \(LlamaDecoderLayer\) has no attention_output: 0 output projections under a known name"
    with pytest.raises(Unsupported, match=refused), steered(broken, lofit(((0, 0), (2, 1)))):
        pass


def test_a_projection_that_is_no_plain_matrix_is_refused(model: Any) -> None:
    """Packed weights have another shape: head offsets cannot be pushed through them here."""
    import copy

    packed = copy.deepcopy(model)
    projection = packed.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.flatten()[: 24 * 16].to(torch.uint8), requires_grad=False)
    with pytest.raises(Unsupported, match="layer 0"), steered(packed, lofit()):
        pass


def test_orthonormal_helper() -> None:
    R = orthonormal(3, BASE.hidden_size)
    torch.testing.assert_close(R @ R.T, torch.eye(3), rtol=1e-5, atol=1e-5)
