"""Layers are found by structure, and a wrapped model gives what its definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.make import BASE, places, randn
from engine_units.toy import Attention, Decoder, Layer, Overwriting, Recurrent, RowParallel, Summed
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from steer_vllm.config import SteerConfig
from steer_vllm.edit import Edit, LowRank, Place, Site
from steer_vllm.engine.binding import Binding
from steer_vllm.engine.layers import find_layers
from steer_vllm.engine.wrapping import wrap
from steer_vllm.errors import ArtifactInvalid, StartupRefused
from steer_vllm.packed import Layout, Packed
from steer_vllm.slots import SlotTables, TokenSlots

CONFIG = SteerConfig(
    additive_rows=2, low_rank_rows=2, max_rank=3, additive_sites=tuple(Site), low_rank_sites=tuple(Site)
)
TOKENS = torch.randint(0, BASE.vocab_size, (6,), generator=torch.Generator().manual_seed(0))


def tables_for(model: Decoder, config: SteerConfig = CONFIG, seed: int = 1) -> SlotTables:
    """Rows 1 and 2 hold random edits at every place."""
    layout = Layout.of(places(range(len(model.layers))), BASE.hidden_size, config)
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


def put(slots: TokenSlots, *values: torch.Tensor) -> None:
    """Additive rows, low-rank rows and scales of the tokens, as routing writes them."""
    for into, given in zip(slots.reach(len(values[0])), values, strict=True):
        into[: len(given)] = given


def slots_with(rows: list[int]) -> TokenSlots:
    slots = TokenSlots(16, "cpu")
    at = torch.tensor(rows)
    put(slots, at, at.flip(0), torch.linspace(-1, 2, len(rows)))
    return slots


@pytest.mark.parametrize("batch_dimension", [False, True], ids=["[T, H]", "[1, T, H]"])
@pytest.mark.parametrize("kind", [Layer, Summed, Overwriting], ids=["sum", "tensor", "hidden"])
@torch.no_grad()
def test_wrapped_equals_by_hand(kind: type[Layer], batch_dimension: bool) -> None:
    """Invariant: the block's output is what the next layer starts from: hidden + residual where it adds them, hidden
    where it overwrites the residual. It is read whole, and one of the two is edited."""
    model, original = Decoder(kind), Decoder(kind)
    tables, slots = tables_for(model), slots_with([0, 1, 2, 1, 0, 2])
    wrap(Binding(model, CONFIG), tables, slots)
    found = model(TOKENS, batch_dimension)
    assert found.shape == ((1, 6, BASE.hidden_size) if batch_dimension else (6, BASE.hidden_size))
    torch.testing.assert_close(found.view(6, -1), by_hand(original, tables, slots), rtol=1e-4, atol=1e-4)
    assert (found.view(6, -1) - original(TOKENS)).abs().max() > 0.1


@torch.no_grad()
def test_without_slots_it_is_the_model() -> None:
    """Invariant: row 0 is the identity: unsteered tokens keep every bit."""
    model, original = Decoder(), Decoder()
    slots = TokenSlots(16, "cpu")
    wrap(Binding(model, CONFIG), tables_for(model), slots)
    assert torch.equal(model(TOKENS), original(TOKENS))
    put(slots, torch.tensor([0, 0, 1]), torch.zeros(3), torch.ones(3))
    assert torch.equal(model(TOKENS)[[0, 1, 3, 4, 5]], original(TOKENS)[[0, 1, 3, 4, 5]])
    assert not torch.equal(model(TOKENS)[2], original(TOKENS)[2])


@torch.no_grad()
def test_tables_written_later_count() -> None:
    """What is bound are the tables themselves, not their content at the time."""
    model = Decoder()
    tables, slots = tables_for(model), slots_with([1] * 6)
    wrap(Binding(model, CONFIG), tables, slots)
    before = model(TOKENS)
    tables.additive[1].zero_()
    assert not torch.equal(model(TOKENS), before)


@torch.no_grad()
def test_only_configured_sites_are_wrapped() -> None:
    config = SteerConfig(additive_rows=2, low_rank_rows=0, additive_sites=(Site.MLP_OUTPUT,))
    model, original = Decoder(), Decoder()
    tables, slots = tables_for(model, config), slots_with([1, 2] * 3)
    wrap(Binding(model, CONFIG), tables, slots)
    torch.testing.assert_close(model(TOKENS), by_hand(original, tables, slots), rtol=1e-4, atol=1e-4)
    wrapped = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert wrapped == {f"layers.{i}.mlp" for i in range(3)}


def test_buffers_are_not_part_of_the_weights() -> None:
    """They are inputs of the compiled graph, and no checkpoint's business."""
    model = Decoder()
    names = set(model.state_dict())
    tables = tables_for(model)
    wrap(Binding(model, CONFIG), tables, TokenSlots(16, "cpu"))
    assert set(model.state_dict()) == names
    buffers = dict(model.layers[0].named_buffers(recurse=False))
    assert buffers["steer_additive"].data_ptr() == tables.additive_at(Place(0, Site.BLOCK_OUTPUT)).data_ptr()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's tracer
def test_wrapped_models_compile_to_one_graph() -> None:
    """torch.compile traces the edit: other rows and other contents need no new graph."""
    model = Decoder()
    tables, slots = tables_for(model), slots_with([0, 1, 2, 1, 0, 2])
    wrap(Binding(model, CONFIG), tables, slots)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in ([0, 1, 2, 1, 0, 2], [2] * 6, [0] * 6):
        put(slots, torch.tensor(rows), torch.tensor(rows), torch.ones(6))
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
    elif change == "recurrent":
        model.layers[1] = Recurrent(24)
    elif change == "no MLP":
        del layer.mlp
    elif change == "two MLPs":
        layer.experts = RowParallel(4, 4)
    elif change == "shared MLP":
        layer.mlp = model.layers[2].mlp
    return model


@pytest.mark.parametrize(
    ("change", "site", "reason"),
    [
        ("two attentions", Site.ATTENTION_OUTPUT, "more than one attention module: self_attn, cross"),
        ("no projection", Site.ATTENTION_OUTPUT, "self_attn has 0 row-parallel output projections, expected one"),
        ("two projections", Site.ATTENTION_OUTPUT, "self_attn has 2 row-parallel output projections, expected one"),
        ("recurrent", Site.ATTENTION_OUTPUT, "mixer (Mixer) is no attention with heads"),
        ("no MLP", Site.MLP_OUTPUT, "the layer has no MLP"),
        ("two MLPs", Site.MLP_OUTPUT, "more than one module adds to it: mlp, experts"),
        ("shared MLP", Site.MLP_OUTPUT, "its module is shared with other layers"),
    ],
)
def test_what_cannot_be_bound_is_named(change: str, site: Site, reason: str) -> None:
    """The layer's other sites, and other layers, are bound."""
    layer = find_layers(broken(change))[1]
    assert layer.missing == {site: reason}
    assert set(layer.sites) == set(Site) - {site}


def test_a_block_that_layers_share_is_named() -> None:
    """Nothing of it can be edited for one layer alone: an artifact that edits it is refused with the reason."""
    model = Decoder()
    model.layers[1] = model.layers[2]
    binding = Binding(model, CONFIG)
    assert binding.layers[1].block is model.layers[2]
    assert {place.layer for place in binding.places} == {0}
    reason = r"it: edits block_output of layer 1 \(Layer\), which could not be bound: its module is shared"
    with pytest.raises(ArtifactInvalid, match=reason):
        binding.check([Place(1, Site.BLOCK_OUTPUT)], "it")


def test_no_layers_at_all() -> None:
    with pytest.raises(StartupRefused, match="no decoder layers with attention were found in Sequential"):
        find_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_configured_site_that_no_layer_has_refuses_to_start() -> None:
    model = Decoder()
    for layer in model.layers:
        del layer.mlp
    with pytest.raises(StartupRefused, match=r"mlp_output could not be bound in any layer .*the layer has no MLP"):
        Binding(model, CONFIG)
    Binding(model, SteerConfig())
    model.layers[0] = PPMissingLayer()
    assert Place(1, Site.MLP_OUTPUT) not in Binding(model, CONFIG).places, "another rank may have it"


@torch.no_grad()
def test_a_bias_that_waits_is_part_of_what_is_read() -> None:
    """Falcon's projections hand on their bias: what a low-rank edit reads has it, what it adds to has not."""
    model = Decoder()
    tables, slots = tables_for(model), slots_with([1, 2, 1])
    projection: Any = model.layers[0].self_attn.o_proj
    z = randn(3, 32, seed=4)
    whole = projection(z)[0]
    projection.skips_bias = True
    wrap(Binding(model, CONFIG), tables, slots)
    found, bias = projection(z)
    expected = whole - bias + edit(tables, Place(0, Site.ATTENTION_OUTPUT), slots, whole)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_bias_that_waits_is_left_alone_where_nothing_reads_it() -> None:
    """An offset is added to what is there; without a low-rank table the bias costs no operation in the step."""
    config = SteerConfig(additive_rows=2, low_rank_rows=0, additive_sites=tuple(Site))
    model = Decoder()
    tables, slots = tables_for(model, config), slots_with([1, 2, 1])
    projection: Any = model.layers[0].self_attn.o_proj
    y, bias = randn(3, BASE.hidden_size, seed=4), torch.zeros(7)  # adding it would be an error
    projection.forward = lambda z: (y, bias)
    wrap(Binding(model, config), tables, slots)
    found, left = projection(y)
    torch.testing.assert_close(found, y + edit(tables, Place(0, Site.ATTENTION_OUTPUT), slots, y))
    assert left is bias


@torch.no_grad()
def test_shares_of_a_sum_are_edited_once() -> None:
    """Invariant: where ranks hold shares, the sum of the edited shares is the edited sum: constants on one rank."""
    place, ranks = Place(0, Site.ATTENTION_OUTPUT), 2
    whole = Decoder()
    tables, slots = tables_for(whole), slots_with([1, 2, 1])
    z, total = randn(3, 32, seed=4), torch.zeros(3, BASE.hidden_size)
    kept: Any = whole.layers[0].self_attn.o_proj
    for rank in range(ranks):
        model = Decoder()
        part = RowParallel(32, BASE.hidden_size, tp_size=ranks, tp_rank=rank, reduce=False)
        part.weight.copy_(kept.weight[:, rank * 16 : (rank + 1) * 16])
        part.bias.copy_(kept.bias)
        part.skips_bias = True
        model.layers[0].self_attn.o_proj = part  # type: ignore[union-attr]
        binding = Binding(model, CONFIG)
        assert binding.shares == {place: rank}
        mine = tables_for(model)
        if rank:
            for table in (mine.additive, mine.low_rank.c):
                table.zero_()  # what `Binding.share` leaves of an edit on this rank
        wrap(binding, mine, slots)
        found, bias = part(z[:, rank * 16 : (rank + 1) * 16])
        total += found
        given = Edit(torch.ones(3), LowRank(*(torch.ones(3) for _ in range(3))))
        left = binding.share({place: given, Place(1, place.site): given})
        assert left[Place(1, place.site)] is given
        offset, low_rank = left[place].offset, left[place].low_rank
        assert offset is not None
        assert low_rank is not None
        assert given.low_rank is not None
        assert [bool(t.any()) for t in (offset, low_rank.c)] == [not rank] * 2
        assert torch.equal(low_rank.B, given.low_rank.B)
    unedited = kept(z)[0]
    torch.testing.assert_close(total + bias, unedited + edit(tables, place, slots, unedited), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", [None, (), (torch.zeros(6, 24),), (torch.zeros(6, 24),) * 3, [torch.zeros(6, 24)]])
def test_a_layer_that_returns_something_else(output: Any) -> None:
    model = Decoder()
    model.layers[0].forward = lambda *args: output
    wrap(Binding(model, CONFIG), tables_for(model), TokenSlots(16, "cpu"))
    with pytest.raises(StartupRefused, match=r"Layer: block_output could not be bound: it returns"):
        model.layers[0](torch.zeros(6, 24), None)


@pytest.mark.parametrize("shape", [(6, 4, 24), (2, 6, 24), (24,), (6, 23)])
def test_an_output_that_is_not_one_row_per_token(shape: tuple[int, ...]) -> None:
    """Residual streams of several rows, batches, other widths: no token row to edit."""
    model = Decoder(Summed)
    model.layers[0].forward = lambda *args: torch.zeros(shape)
    wrap(Binding(model, CONFIG), tables_for(model), TokenSlots(16, "cpu"))
    with pytest.raises(StartupRefused, match="expected one row per token"):
        model(torch.arange(6))


def test_the_language_model_of_a_multi_modal_one() -> None:
    """A tower with more layers of the same shape beside it is not taken."""
    model: Any = nn.Module()
    model.tower, model.text = Decoder(), Decoder()
    model.tower.layers.extend(Decoder().layers)
    model.get_language_model = lambda: model.text
    assert [layer.block for layer in find_layers(model).values()] == list(model.text.layers)
