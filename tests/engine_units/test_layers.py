"""Binding to a model: layers are found by structure, and a wrapped model gives what its definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.make import BASE, randn
from engine_units.toy import Attention, Decoder, Layer, RowParallel, Summed
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from steer_vllm.config import SteerConfig
from steer_vllm.edit import LowRank, Place, Site
from steer_vllm.engine.layers import find_layers, wrap
from steer_vllm.errors import StartupRefused
from steer_vllm.packed import Layout, Packed
from steer_vllm.slots import SlotTables, TokenSlots

CONFIG = SteerConfig(
    additive_rows=2, low_rank_rows=2, max_rank=3, additive_sites=tuple(Site), low_rank_sites=tuple(Site)
)
TOKENS = torch.randint(0, BASE.vocab_size, (6,), generator=torch.Generator().manual_seed(0))


def tables_for(model: Decoder, config: SteerConfig = CONFIG, seed: int = 1) -> SlotTables:
    """Rows 1 and 2 hold random edits at every place."""
    layout = Layout.of(range(len(model.layers)), BASE.hidden_size, config)
    tables = SlotTables(layout, config, torch.float32, "cpu")
    for row in (1, 2):
        wide = (len(layout.low_rank), config.max_rank, BASE.hidden_size)
        low = LowRank(*(randn(*shape, seed=seed + row + i) * 0.2 for i, shape in enumerate((wide, wide, wide[:2]))))
        tables.write_additive(row, Packed(randn(len(layout.additive), BASE.hidden_size, seed=seed + row), None))
        if config.low_rank_sites:
            tables.write_low_rank(row, Packed(None, low))
    return tables


def edit(tables: SlotTables, place: Place, slots: TokenSlots, x: torch.Tensor) -> torch.Tensor:
    """What the tables add at a place, token by token."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        scale = slots.scales[t]
        if place in tables.layout.additive:
            out[t] += scale * tables.additive_at(place)[slots.additive[t]]
        if place in tables.layout.low_rank:
            part, row = tables.low_rank_at(place), slots.low_rank[t]
            out[t] += scale * (part.A[row] @ x[t] + part.c[row]) @ part.B[row]
    return out


def by_hand(model: Decoder, tables: SlotTables, slots: TokenSlots) -> torch.Tensor:
    """The toy's forward written out, with each edit where its site's definition puts it."""
    stream = model.embed(TOKENS)
    for index, layer in enumerate(model.layers):
        attention: Any = layer.self_attn
        projected = attention.o_proj.bias + attention.qkv(stream) @ attention.o_proj.weight.T
        stream = stream + projected + edit(tables, Place(index, Site.ATTENTION_OUTPUT), slots, projected)
        mlp: Any = layer.mlp
        out = mlp.up(stream).relu() @ mlp.down_proj.weight.T + mlp.down_proj.bias
        stream = stream + out + edit(tables, Place(index, Site.MLP_OUTPUT), slots, out)
        stream = stream + edit(tables, Place(index, Site.BLOCK_OUTPUT), slots, stream)
    return stream


def slots_with(rows: list[int]) -> TokenSlots:
    slots = TokenSlots(16, "cpu")
    at = torch.tensor(rows)
    slots.set(at, at.flip(0), torch.linspace(-1, 2, len(rows)))
    return slots


@pytest.mark.parametrize("batch_dimension", [False, True], ids=["[T, H]", "[1, T, H]"])
@pytest.mark.parametrize("kind", [Layer, Summed], ids=["tuple", "tensor"])
@torch.no_grad()
def test_wrapped_equals_by_hand(kind: type[Layer], batch_dimension: bool) -> None:
    """Invariant: the block's output is hidden + residual where they are separate; the sum is read, one is edited."""
    model, original = Decoder(kind), Decoder(kind)
    tables, slots = tables_for(model), slots_with([0, 1, 2, 1, 0, 2])
    wrap(find_layers(model), tables, slots)
    found = model(TOKENS, batch_dimension)
    assert found.shape == ((1, 6, BASE.hidden_size) if batch_dimension else (6, BASE.hidden_size))
    torch.testing.assert_close(found.view(6, -1), by_hand(original, tables, slots), rtol=1e-4, atol=1e-4)
    assert (found.view(6, -1) - original(TOKENS)).abs().max() > 0.1


@torch.no_grad()
def test_without_slots_it_is_the_model() -> None:
    """Invariant: row 0 is the identity: unsteered tokens keep every bit."""
    model, original = Decoder(), Decoder()
    slots = TokenSlots(16, "cpu")
    wrap(find_layers(model), tables_for(model), slots)
    assert torch.equal(model(TOKENS), original(TOKENS))
    slots.set(torch.tensor([0, 0, 1]), torch.zeros(3), torch.ones(3))
    assert torch.equal(model(TOKENS)[[0, 1, 3, 4, 5]], original(TOKENS)[[0, 1, 3, 4, 5]])
    assert not torch.equal(model(TOKENS)[2], original(TOKENS)[2])


@torch.no_grad()
def test_tables_written_later_count() -> None:
    """What is bound are the tables themselves, not their content at the time."""
    model = Decoder()
    tables, slots = tables_for(model), slots_with([1] * 6)
    wrap(find_layers(model), tables, slots)
    before = model(TOKENS)
    tables.additive[1].zero_()
    assert not torch.equal(model(TOKENS), before)


@torch.no_grad()
def test_only_configured_sites_are_wrapped() -> None:
    config = SteerConfig(additive_rows=2, low_rank_rows=0, additive_sites=(Site.MLP_OUTPUT,))
    model, original = Decoder(), Decoder()
    tables, slots = tables_for(model, config), slots_with([1, 2] * 3)
    wrap(find_layers(model), tables, slots)
    torch.testing.assert_close(model(TOKENS), by_hand(original, tables, slots), rtol=1e-4, atol=1e-4)
    wrapped = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert wrapped == {f"layers.{i}.mlp" for i in range(3)}


def test_buffers_are_not_part_of_the_weights() -> None:
    """They are inputs of the compiled graph, and no checkpoint's business."""
    model = Decoder()
    names = set(model.state_dict())
    tables = tables_for(model)
    wrap(find_layers(model), tables, TokenSlots(16, "cpu"))
    assert set(model.state_dict()) == names
    buffers = dict(model.layers[0].named_buffers(recurse=False))
    assert buffers["steer_additive"].data_ptr() == tables.additive_at(Place(0, Site.BLOCK_OUTPUT)).data_ptr()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's tracer
def test_wrapped_models_compile_to_one_graph() -> None:
    """torch.compile traces the edit: other rows and other contents need no new graph."""
    model = Decoder()
    tables, slots = tables_for(model), slots_with([0, 1, 2, 1, 0, 2])
    wrap(find_layers(model), tables, slots)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in ([0, 1, 2, 1, 0, 2], [2] * 6, [0] * 6):
        slots.set(torch.tensor(rows), torch.tensor(rows), torch.ones(6))
        tables.additive[1] += 1
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_layers_keep_their_number_in_the_whole_model() -> None:
    """Under pipelining the layers of other ranks are placeholders."""
    model = Decoder()
    model.layers[0] = PPMissingLayer()
    assert sorted(find_layers(model)) == [1, 2]


def test_the_longest_list_of_attention_layers_is_the_decoder() -> None:
    model = Decoder()
    model.draft = nn.ModuleList([Layer(8, 8)])
    model.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(20)])
    found = find_layers(model)
    assert [layer.block for layer in found.values()] == list(model.layers)
    assert found[1].projection is model.layers[1].self_attn.o_proj
    assert found[1].mlp is model.layers[1].mlp


def test_a_lora_wrapper_is_taken_whole() -> None:
    """The wrapper adds its own part to the output: the edit comes after it."""
    model = Decoder()

    class Wrapper(nn.Module):
        def __init__(self, base: RowParallel) -> None:
            super().__init__()
            self.base_layer = base

    attention: Any = model.layers[0].self_attn
    attention.o_proj = Wrapper(attention.o_proj)
    assert find_layers(model)[0].projection is attention.o_proj


def broken(change: str) -> nn.Module:
    model = Decoder()
    layer: Any = model.layers[1]
    if change == "two attentions":
        layer.cross = nn.Sequential(Attention())
    elif change == "no projection":
        layer.self_attn.o_proj = nn.Linear(32, 24)
    elif change == "two projections":
        layer.self_attn.other = RowParallel(32, 24)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("two attentions", r"layer 1 \(Layer\): expected one attention module, found 2"),
        ("no projection", r"layer 1 \(Layer\): expected one attention output projection, found 0"),
        ("two projections", r"layer 1 \(Layer\): expected one attention output projection, found 2"),
    ],
)
def test_what_cannot_be_bound_refuses_to_start(change: str, message: str) -> None:
    with pytest.raises(StartupRefused, match=message):
        find_layers(broken(change))


def test_no_layers_at_all() -> None:
    with pytest.raises(StartupRefused, match="no decoder layers with attention were found in Sequential"):
        find_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_configured_site_without_a_module_refuses_to_start() -> None:
    model = Decoder()
    layer: Any = model.layers[2]
    layer.second = RowParallel(4, 4)
    layers = find_layers(model)
    assert layers[2].mlp is None
    with pytest.raises(StartupRefused, match=r"layer 2 \(Layer\): mlp_output could not be bound"):
        wrap(layers, tables_for(model), TokenSlots(16, "cpu"))


@pytest.mark.parametrize("output", [None, (), (torch.zeros(6, 24),), (torch.zeros(6, 24),) * 3, [torch.zeros(6, 24)]])
def test_a_layer_that_returns_something_else(output: Any) -> None:
    model = Decoder()
    model.layers[0].forward = lambda *args: output
    wrap(find_layers(model), tables_for(model), TokenSlots(16, "cpu"))
    with pytest.raises(StartupRefused, match="a decoder layer returned"):
        model.layers[0](torch.zeros(6, 24), None)


@pytest.mark.parametrize("shape", [(6, 4, 24), (2, 6, 24), (24,), (6, 23)])
def test_an_output_that_is_not_one_row_per_token(shape: tuple[int, ...]) -> None:
    """Residual streams of several rows, batches, other widths: no token row to edit."""
    model = Decoder(Summed)
    model.layers[0].forward = lambda *args: torch.zeros(shape)
    wrap(find_layers(model), tables_for(model), TokenSlots(16, "cpu"))
    with pytest.raises(StartupRefused, match="expected one row per token"):
        model(torch.arange(6))


def test_the_language_model_of_a_multi_modal_one() -> None:
    """A tower with more layers of the same shape beside it is not taken."""
    model: Any = nn.Module()
    model.tower, model.text = Decoder(), Decoder()
    model.tower.layers.extend(Decoder().layers)
    model.get_language_model = lambda: model.text
    assert [layer.block for layer in find_layers(model).values()] == list(model.text.layers)
