"""Loading in two phases: busy, ready, done; every failure is an answer, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.make import BASE, direction, lofit, loreft
from engine_units.toy import Decoder, Recurrent, RowParallel
from vllm.model_executor.models.utils import PPMissingLayer

from steer_vllm import Intervention
from steer_vllm.config import SteerConfig
from steer_vllm.edit import Site
from steer_vllm.engine import loader
from steer_vllm.engine.binding import Binding
from steer_vllm.errors import ArtifactInvalid, HostMemoryFull
from steer_vllm.host_memory import HostMemory
from steer_vllm.packed import Layout, Packed

CONFIG = SteerConfig(additive_rows=2, low_rank_rows=2, max_rank=4)


class Rank:
    """What the loader needs of a worker's steering."""

    def __init__(
        self,
        layers: tuple[int, ...] = (0, 1, 2),
        tp_rank: int = 0,
        ranks: int = 1,
        reduce: bool = True,
        mamba: tuple[int, ...] = (),
    ) -> None:
        self.config, self.base, self.dtype = CONFIG, BASE, torch.float32
        self.device = torch.device("cpu")
        self.store: dict[tuple[str, int], Packed] = {}
        self.head_layers: dict[str, frozenset[int]] = {}
        self.memory = HostMemory(1 << 20)
        self.loading = None
        self.pending: dict[str, loader.Load] = {}
        self.bases: dict[str, Any] = {}
        self.compilations: dict[str, Any] = {}
        self.tensor_parallel = ranks
        self.tables = SimpleNamespace(nbytes=1234, forget=lambda digest: None)
        self.others: list[Rank] = []
        model = Decoder()
        for number, layer in enumerate(model.layers):
            whole: Any = layer.self_attn.o_proj  # type: ignore[union-attr]
            part = RowParallel(32, BASE.hidden_size, tp_size=ranks, tp_rank=tp_rank, reduce=reduce)
            size = 32 // ranks
            part.weight.data.copy_(whole.weight.data[:, tp_rank * size : (tp_rank + 1) * size])
            layer.self_attn.o_proj = part  # type: ignore[union-attr]
            if number not in layers:
                model.layers[number] = PPMissingLayer()
            elif number in mamba:
                model.layers[number] = Recurrent(BASE.hidden_size)
        self.binding = Binding(model, CONFIG)
        self.projections = self.binding.projections
        self.layout = Layout.of(self.binding.places, BASE.hidden_size, CONFIG)
        self.waiting: list[list[torch.Tensor]] = []
        self.reduced = 0

    def all_reduce(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of what the test has prepared of every rank."""
        assert len(parts) == len(self.waiting[0])
        self.reduced += 1
        return [torch.stack(same).sum(0) for same in zip(*self.waiting, strict=True)]


def finish(rank: Any, digest: str) -> dict[str, Any]:
    until = time.monotonic() + 10
    while (answer := loader.poll(rank, digest))["state"] == "busy":
        assert time.monotonic() < until
        time.sleep(0.001)
    return answer


def start(rank: Any, item: Intervention, folder: Path, digest: str | None = None) -> dict[str, Any]:
    item.save(folder)
    assert loader.begin(rank, str(folder), digest or item.digest)["state"] in ("busy", "ready", "failed")
    return finish(rank, digest or item.digest)


@pytest.mark.parametrize("item", [lofit(), loreft(positions="f2+l2/untied"), direction()], ids=lambda i: i.method.name)
def test_load(item: Intervention, tmp_path: Path) -> None:
    rank: Any = Rank()
    assert start(rank, item, tmp_path) == {"state": "ready"}
    assert rank.store == {}, "nothing is usable before every rank is ready"
    answer = loader.commit(rank, item.digest)
    assert answer["state"] == "done"
    assert set(rank.store) == {(item.digest, n) for n in range(item.method.parts)}
    assert answer["parts"] == [rank.store[item.digest, n].summary()._asdict() for n in range(item.method.parts)]
    facts = loader.facts(rank)
    assert (facts["loaded"], facts["table_bytes"], facts["base"]) == ([item.digest], 1234, BASE.to_config())
    assert facts["pending"] == []
    assert loader.drop(rank, item.digest) == {"state": "done"}
    assert facts["loaded"] == loader.facts(rank)["loaded"], "a drop takes what is on its way, not what is held"
    assert loader.free(rank, item.digest) == {"state": "done"}
    assert rank.store == {}
    assert loader.free(rank, item.digest) == {"state": "done"}


def test_lofit_is_pushed_through_the_layers_own_weights(tmp_path: Path) -> None:
    rank: Any = Rank()
    item = lofit()
    start(rank, item, tmp_path)
    loader.commit(rank, item.digest)
    model = Decoder()
    (wanted,) = item.compile(lambda layer, z: model.layers[layer].self_attn.o_proj.weight.detach() @ z)  # type: ignore[union-attr]
    found = rank.store[item.digest, 0].offset
    for i, place in enumerate(rank.layout.additive):
        edit = wanted.get(place)
        torch.testing.assert_close(found[i], torch.zeros(24) if edit is None else edit.offset, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("item", [lofit(), loreft(), direction()], ids=lambda i: i.method.name)
def test_tensor_parallel_ranks_add_up(item: Intervention, tmp_path: Path) -> None:
    """Each rank pushes its heads; the reduction is at commit, and every rank ends with the same, whole content."""
    whole: Any = Rank()
    start(whole, item, tmp_path)
    loader.commit(whole, item.digest)
    ranks: list[Any] = [Rank(tp_rank=n, ranks=2) for n in range(2)]
    loads = []
    for rank in ranks:
        assert start(rank, item, tmp_path) == {"state": "ready"}
        loads.append(rank.pending.pop(item.digest))
        assert (loads[-1].parts == ()) == bool(loads[-1].compilation.heads), "only sums of ranks wait for the commit"
    waiting = [[*other.compilation.projected.values(), torch.zeros(24)] for other in loads]
    for rank, load in zip(ranks, loads, strict=True):
        rank.waiting = waiting
        rank.pending[item.digest] = load
        assert loader.commit(rank, item.digest)["state"] == "done"
        for n in range(item.method.parts):
            one, two = rank.store[item.digest, n], whole.store[item.digest, n]
            for mine, wanted in zip(one._tensors(), two._tensors(), strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("item", [lofit(), direction(site=Site.ATTENTION_OUTPUT)], ids=lambda i: i.method.name)
def test_partial_sums_get_the_whole_on_one_rank_only(item: Intervention, tmp_path: Path) -> None:
    """Where ranks' outputs are summed further on (Falcon), what every rank added would be there twice."""
    whole: Any = Rank()
    start(whole, item, tmp_path)
    loader.commit(whole, item.digest)
    ranks: list[Any] = [Rank(tp_rank=n, ranks=2, reduce=False) for n in range(2)]
    for rank in ranks:
        assert start(rank, item, tmp_path) == {"state": "ready"}
    for rank in ranks:
        rank.waiting = [
            [*other.pending[item.digest].compilation.projected.values(), torch.zeros(24)] for other in ranks
        ]
    assert [loader.commit(rank, item.digest)["state"] for rank in ranks] == ["done", "done"]
    first, second = (rank.store[item.digest, 0].offset for rank in ranks)
    torch.testing.assert_close(first, whole.store[item.digest, 0].offset, rtol=1e-5, atol=1e-5)
    assert not second.any()


def test_a_layer_without_the_site_is_refused_by_name(tmp_path: Path) -> None:
    """Invariant: a model layer that could not be bound is an error; the layers around it are served."""
    rank: Any = Rank(mamba=(1,))
    item = lofit(((0, 0), (1, 2)))
    failed(
        start(rank, item, tmp_path / "bad"),
        "edits attention_output of layer 1 (Recurrent), which could not be bound: mixer (Mixer) is no attention",
    )
    loader.drop(rank, item.digest)
    for number, good in enumerate((lofit(((0, 0), (2, 2))), direction((0, 1, 2)))):
        assert start(rank, good, tmp_path / str(number)) == {"state": "ready"}
        assert loader.commit(rank, good.digest)["state"] == "done"


def test_pipeline_ranks_hold_their_layers(tmp_path: Path) -> None:
    item = lofit(((0, 1), (2, 0)))
    first: Any = Rank((0, 1))
    start(first, item, tmp_path)
    loader.commit(first, item.digest)
    found = first.store[item.digest, 0].offset
    assert found.shape[0] == 4
    assert found[0].any()
    assert not found[1:].any()


def failed(answer: dict[str, Any], message: str, code: str = ArtifactInvalid.code) -> None:
    assert answer["state"] == "failed"
    assert answer["code"] == code
    assert message in answer["message"]


def test_another_base_model(tmp_path: Path) -> None:
    """Invariant: an artifact is bound to its base by a digest of its weights, not its shapes alone."""
    for base, message in (
        (dataclasses.replace(BASE, weights="cd" * 32), "weights"),
        (dataclasses.replace(BASE, weights=None), "weights"),
        (dataclasses.replace(BASE, vocab_size=62), "vocab_size 62 against 61"),
    ):
        rank: Any = Rank()
        item = lofit(base=base)
        failed(start(rank, item, tmp_path), message)
        loader.drop(rank, item.digest)


def test_content_that_changed_on_the_way(tmp_path: Path) -> None:
    """Invariant: every rank, the core and the cache keys use the same identity: files swapped while read are found."""
    rank: Any = Rank()
    failed(start(rank, lofit(seed=5), tmp_path, digest="ab" * 32), "changed while it was loaded")
    loader.drop(rank, "ab" * 32)


def test_a_site_without_a_table(tmp_path: Path) -> None:
    rank: Any = Rank()
    item = direction(site=Site.MLP_OUTPUT)
    failed(start(rank, item, tmp_path), "mlp_output in additive_sites")
    loader.drop(rank, item.digest)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_what_overflows_in_the_models_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    rank: Any = Rank()
    rank.dtype = dtype
    item = direction(coefficient=1e5)
    failed(start(rank, item, tmp_path), "not finite in the model's dtype")
    loader.drop(rank, item.digest)


def test_overflow_of_the_sum_of_ranks_fails_the_commit(tmp_path: Path) -> None:
    """Found after the reduction: an answer, not an exception, and nothing is stored."""
    rank: Any = Rank(ranks=2)
    item = lofit()
    start(rank, item, tmp_path)
    rank.waiting = [[*[torch.full((24,), 3e38)] * 2, torch.zeros(24)]] * 2
    failed(loader.commit(rank, item.digest), "not finite")
    assert rank.store == {}


def test_a_rank_that_fails_in_the_commit_keeps_the_others_in_step(tmp_path: Path) -> None:
    """Invariant: on every rank or on none. It takes part in the sum all the same, or the others would wait forever."""
    item = lofit()
    for failing in (False, True):
        rank: Any = Rank(ranks=2)
        assert start(rank, item, tmp_path)["state"] == "ready"
        rank.waiting = [[torch.zeros(24), torch.zeros(24), torch.full((24,), float(n))] for n in range(2)]
        if failing:
            rank.pending[item.digest].compilation.project = lambda *, plain: 1 / 0
            failed(loader.commit(rank, item.digest), "ZeroDivisionError", code="engine_unavailable")
        else:
            assert loader.commit(rank, item.digest) == {"state": "undone"}
        assert rank.reduced == 1
        assert rank.store == rank.pending == {}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    rank: Any = Rank()
    loader.begin(rank, str(tmp_path / "nowhere"), "d")
    failed(finish(rank, "d"), "No such file")
    failed(loader.commit(rank, "d"), "", code="engine_unavailable")
    assert rank.store == {}


@pytest.mark.parametrize("method", [loader.poll, loader.commit])
def test_unknown_digests_are_an_answer(method: Any) -> None:
    """Invariant: worker methods never raise: a failed reply makes every later reply wrong."""
    failed(method(Rank(), "never begun"), "KeyError", code="engine_unavailable")


@pytest.mark.parametrize("argument", [None, 5, "x\0y", b"\xff"])
def test_odd_folders_are_an_answer(argument: Any) -> None:
    rank: Any = Rank()
    loader.begin(rank, argument, "d")
    assert finish(rank, "d")["state"] == "failed"
    loader.drop(rank, "d")


def test_a_load_that_is_begun_again(tmp_path: Path) -> None:
    rank: Any = Rank()
    item = lofit()
    item.save(tmp_path)
    loader.begin(rank, str(tmp_path / "nowhere"), item.digest)
    finish(rank, item.digest)
    assert start(rank, item, tmp_path) == {"state": "ready"}
    assert loader.commit(rank, item.digest)["state"] == "done"


def test_a_drop_while_it_is_busy(tmp_path: Path) -> None:
    rank: Any = Rank()
    item = lofit()
    item.save(tmp_path)
    loader.begin(rank, str(tmp_path), item.digest)
    loader.drop(rank, item.digest)
    assert loader.poll(rank, item.digest)["state"] == "failed"
    assert rank.store == {}


def test_memory_is_bounded(tmp_path: Path) -> None:
    """What is loaded takes no more than it may, and gives back what it took, however it ends."""
    rank: Any = Rank()
    items = [lofit(), loreft(), direction()]
    sizes = []
    for i, item in enumerate(items):
        assert start(rank, item, tmp_path / str(i))["state"] == "ready"
        assert loader.commit(rank, item.digest)["state"] == "done"
        held = sum(part.nbytes for (digest, _), part in rank.store.items() if digest == item.digest)
        kept = sum(t.nbytes for t in item.tensors.values()) if item.method.name == "lofit" else 0
        sizes.append(held + kept)
        assert rank.memory.used == sum(sizes) == loader.facts(rank)["memory_bytes"]

    rank.memory.limit = rank.memory.used + sizes[1] - 1
    other = loreft(seed=9)
    failed(start(rank, other, tmp_path / "more"), r"held by what is loaded: unload", HostMemoryFull.code)
    assert rank.memory.used == sum(sizes)
    loader.drop(rank, other.digest)
    loader.free(rank, items[0].digest)
    assert rank.memory.used == sum(sizes[1:])
    assert start(rank, other, tmp_path / "more")["state"] == "ready"
    assert rank.memory.used == sum(sizes[1:]) + sizes[1], "on its way it counts already"
    loader.drop(rank, other.digest)
    assert rank.memory.used == sum(sizes[1:])


def test_loads_beside_each_other(tmp_path: Path) -> None:
    rank: Any = Rank()
    items = [lofit(seed=n) for n in range(6)]
    for n, item in enumerate(items):
        item.save(tmp_path / str(n))
        loader.begin(rank, str(tmp_path / str(n)), item.digest)
    for item in items:
        assert finish(rank, item.digest) == {"state": "ready"}
        loader.commit(rank, item.digest)
    assert set(rank.store) == {(item.digest, 0) for item in items}
