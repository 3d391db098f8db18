"""After a foreign call of the workers, everything that depends on the weights is computed again, or refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.make import BASE, lofit
from engine_units import test_worker as toys

from steer_vllm.engine import compilation, loader, weights, worker_methods
from steer_vllm.engine.compilation import Compilation
from steer_vllm.errors import ArtifactInvalid, EngineUnavailable, Unsupported
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.plan import Summary
from steer_vllm.request import Steering
from steer_vllm.segments import Component

SOURCE = ("folder", None)
FACTORS = {"double": 2.0, "overflow": torch.inf}
"""What calls of this name multiply output projections by."""


class Core:
    """An engine core of one rank, whose worker answers in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toys.module, "base_fingerprint", lambda config: BASE)
        self.rank = toys.Rank()
        self.base: Fingerprint | None = BASE
        self.called: list[Any] = []
        for item in toys.ITEMS.values():
            made = Compilation(self.rank.steering, item, "here")
            self.rank.steering.bases[item.digest] = item.base
            if made.heads:
                self.rank.steering.compilations[item.digest] = made
        self.steering = self.rank.admission
        self.scheduler = SimpleNamespace(requests={}, finish_requests=lambda names, status: [])

    def read_base(self) -> Fingerprint:
        if self.base is None:
            raise ArtifactInvalid("config.json: cannot be read as a model config")
        return self.base

    def collective_rpc(self, method: Any, timeout: float | None = None, args: Any = ()) -> list[Any]:
        self.called.append(method)
        if method == "steer_reproject":
            (reloaded,) = args
            if reloaded:
                self.rank.steering.base_source = None
            return [compilation.reproject(self.rank.steering, SOURCE, self.read_base)]
        if method == "steer_repack":
            return [compilation.repack(self.rank.steering)]
        if method == "break":
            raise RuntimeError("the call itself failed")
        if method in FACTORS:
            for layer in self.rank.model.layers:
                layer.self_attn.o_proj.weight.data.mul_(FACTORS[method])  # type: ignore[union-attr, operator]
        return ["its result"]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    kind = type("PatchedCore", (Core,), {})

    def ask(self: Any, method: str, *args: Any) -> Any:
        answers = self.collective_rpc(weights.Own(method), args=args)
        return answers[0], answers

    weights.install(kind, ask)
    return kind(monkeypatch)


def admit(core: Core, name: str) -> None:
    core.steering.admit(Steering((Component(toys.ITEMS[name].digest, 1.0, toys.ITEMS[name].positions),)), 3)


def test_offsets_follow(core: Core) -> None:
    """The store, a row that is resident and the summary; what has no head offsets stays as it is."""
    steering = core.rank.steering
    core.rank.add("a")
    core.rank.add("d")
    digest, other = toys.ITEMS["lofit"].digest, toys.ITEMS["direction"].digest
    (row,) = [row for row, content in steering.tables._additive_held.items() if content[0].digest == digest]
    before, row_before = steering.store[digest, 0].offset.clone(), steering.tables.additive[row].clone()
    largest, untouched = core.steering._loaded[digest].parts[0].largest, steering.store[other, 0]
    assert core.collective_rpc("double") == ["its result"]
    torch.testing.assert_close(steering.store[digest, 0].offset, before * 2)
    torch.testing.assert_close(steering.tables.additive[row], row_before * 2)
    assert row_before.any()
    assert core.steering._loaded[digest].parts[0].largest == pytest.approx(2 * largest)
    assert steering.store[other, 0] is untouched


def test_our_own_calls_are_followed_by_nothing(core: Core) -> None:
    core.collective_rpc(weights.Own("steer_facts"))
    assert core.called == ["steer_facts"]
    assert type(core.called[0]) is str, "vLLM gets text, and not a class of ours"


@pytest.mark.parametrize("started", [True, False])
def test_nobody_else_calls_our_methods(core: Core, started: bool) -> None:
    """Invariant: what the ranks hold changes only with the core's book."""
    if not started:
        del core.steering
    for method in ("steer_free", "steer_reproject", "steer_"):
        with pytest.raises(Unsupported, match=f"{method} is called by steer-vllm alone"):
            core.collective_rpc(method, args=("d" * 64,))
    assert core.called == []


def test_before_a_front_has_asked_there_is_nothing_to_follow(core: Core) -> None:
    del core.steering
    core.collective_rpc("update_max_model_len")
    assert core.called == ["update_max_model_len"]


def test_a_call_that_fails_is_followed_too(core: Core) -> None:
    with pytest.raises(RuntimeError, match="the call itself failed"):
        core.collective_rpc("break")
    assert core.called == ["break", "steer_reproject", "steer_repack"]
    admit(core, "lofit")


def test_another_base_is_refused_until_its_own_is_back(core: Core) -> None:
    core.base = dataclasses.replace(BASE, weights="cd" * 32)
    core.collective_rpc("reload_weights")
    for name in ("lofit", "direction"):
        with pytest.raises(ArtifactInvalid, match="does not fit the weights served: weights abab"):
            admit(core, name)
        with pytest.raises(ArtifactInvalid, match="does not fit"):
            core.steering.reopen(toys.ITEMS[name].digest)
    assert core.steering.facts()["pinned"] == 0
    core.base = BASE
    core.collective_rpc("reload_weights")
    admit(core, "lofit")


def test_files_are_read_when_they_are_loaded(core: Core) -> None:
    """What lies in the folder later is not what is served."""
    core.base = None
    core.collective_rpc("double")
    admit(core, "lofit")
    core.base = dataclasses.replace(BASE, weights="cd" * 32)
    core.collective_rpc("double")
    admit(core, "direction")


def test_offsets_that_are_not_finite_are_refused_alone(core: Core) -> None:
    core.collective_rpc("overflow")
    admit(core, "direction")
    with pytest.raises(ArtifactInvalid, match="not finite"):
        admit(core, "lofit")


def test_a_rank_that_fails_refuses_everything_until_the_next_call(core: Core) -> None:
    good = core.rank.steering.projections
    core.rank.steering.projections = {layer: lambda heads: 1 / 0 for layer in good}  # type: ignore[misc]
    with pytest.raises(EngineUnavailable, match=r"could not be computed .*requests in flight .* ended with an error"):
        core.collective_rpc("double")
    with pytest.raises(EngineUnavailable, match="could not be computed"):
        admit(core, "direction")
    core.rank.steering.projections = good
    core.collective_rpc("anything")
    admit(core, "direction")


def test_what_is_on_its_way_fails(core: Core, tmp_path: Any) -> None:
    """It was checked against the former base and compiled with the former weights, wholly or in part."""
    item = lofit(seed=9)
    item.save(tmp_path)
    loader.begin(core.rank.steering, str(tmp_path), item.digest)
    core.collective_rpc("double")
    for ask in (loader.poll, loader.commit):
        answer = ask(core.rank.steering, item.digest)
        assert (answer["state"], answer["code"]) == ("failed", "artifact_invalid")
        assert "replaced while it was loaded" in answer["message"]


def test_what_is_on_its_way_fails_also_where_the_base_cannot_be_read(core: Core, tmp_path: Any) -> None:
    """As from a folder of weights without config.json. Nothing begins or commits before a call succeeds."""
    steering, item = core.rank.steering, lofit(seed=9)
    worker = SimpleNamespace(model_runner=SimpleNamespace(steering=steering))
    item.save(tmp_path)
    worker_methods.steer_begin(worker, str(tmp_path), item.digest)
    steering.pending[item.digest].thread.join()
    core.base = None
    with pytest.raises(EngineUnavailable, match=r"config\.json"):
        core.collective_rpc("reload_weights")
    for ask in (worker_methods.steer_poll, worker_methods.steer_commit):
        assert ask(worker, item.digest)["state"] == "failed"
    begun = worker_methods.steer_begin(worker, str(tmp_path), item.digest)
    assert (begun["state"], begun["code"]) == ("failed", "engine_unavailable")
    core.base = BASE
    core.collective_rpc("reload_weights")
    assert worker_methods.steer_begin(worker, str(tmp_path), item.digest)["state"] != "failed"


def test_loading_again_does_not_get_round_it(core: Core) -> None:
    """What is loaded or opened after the failure is refused as what was there before."""
    core.base = None
    with pytest.raises(EngineUnavailable):
        core.collective_rpc("reload_weights")
    digest = toys.ITEMS["lofit"].digest
    core.steering.close(digest)
    assert core.steering.forget(digest)
    core.rank.load(toys.ITEMS["lofit"])
    core.steering.publish(Summary("new", ()))
    with pytest.raises(EngineUnavailable, match="could not be computed"):
        admit(core, "lofit")
    for one in (digest, "new", "never loaded"):
        with pytest.raises(EngineUnavailable, match="could not be computed"):
            core.steering.reopen(one)
    core.base = BASE
    core.collective_rpc("reload_weights")
    admit(core, "lofit")


def test_content_that_is_loaded_again_is_written_again(core: Core, tmp_path: Any) -> None:
    """Its row held the offsets of the former weights, by the same digest, and the core gives it out again."""
    steering, item = core.rank.steering, toys.ITEMS["lofit"]
    core.rank.add("a")
    (row,) = steering.tables._additive_held
    before = steering.tables.additive[row].clone()
    core.rank.finish("a")
    core.steering.close(item.digest)
    assert core.steering.forget(item.digest)
    loader.free(steering, item.digest)
    for layer in core.rank.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(2)  # type: ignore[union-attr, operator]
    core.rank.load(item)
    plan = core.rank.add("a")
    assert plan is not None
    assert [fill.row for fill in plan.additive] == [row]
    torch.testing.assert_close(steering.tables.additive[row], before * 2)


def test_composed_rows_are_forgotten_with_any_of_their_terms(core: Core) -> None:
    """Of both tables; rows of other content stay as they are."""
    tables = core.rank.steering.tables
    core.rank.add("a")
    core.rank.add("b")
    gone = toys.ITEMS["direction"].digest
    kept = {row for row, content in tables._additive_held.items() if all(term.digest != gone for term in content)}
    assert set(tables._additive_held) > kept
    assert tables._low_rank_held
    loader.free(core.rank.steering, gone)
    loader.free(core.rank.steering, toys.ITEMS["loreft"].digest)
    assert set(tables._additive_held) == kept != set()
    assert not tables._low_rank_held
