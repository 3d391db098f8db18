"""A rank's steering on a toy model: every token is routed by request and absolute position, however steps are cut."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.make import BASE, direction, lofit, loreft
from engine_units.toy import Decoder
from hypothesis import given
from hypothesis import strategies as st

from steer_vllm import Intervention
from steer_vllm.config import SteerConfig
from steer_vllm.edit import Site
from steer_vllm.engine import worker as module
from steer_vllm.engine.admission import Admission
from steer_vllm.engine.settings import KEY, entry
from steer_vllm.engine.worker import StepView, WorkerSteering, attach
from steer_vllm.errors import StartupRefused
from steer_vllm.packed import pack
from steer_vllm.plan import Plan, Summary
from steer_vllm.positions import Positions
from steer_vllm.request import Steering
from steer_vllm.segments import Component

CONFIG = SteerConfig(additive_rows=4, low_rank_rows=4, max_rank=8, additive_sites=tuple(Site))
ITEMS = {
    "lofit": lofit(),
    "loreft": loreft(positions="f2+l2/untied"),
    "direction": direction(),
    "mlp": direction((0, 2), site=Site.MLP_OUTPUT, positions="all"),
}
REQUESTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "a": (5, ("lofit",)),
    "b": (7, ("loreft", "direction")),
    "c": (4, ()),
    "d": (1, ("loreft", "mlp")),
}
"""id: prompt length and what it asks for"""
TOTAL = 9
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # sums in another order


def vllm_config(config: SteerConfig | None = CONFIG) -> Any:
    return SimpleNamespace(
        additional_config={} if config is None else {KEY: entry(config)},
        model_config=SimpleNamespace(dtype=torch.float32, model="folder", revision=None),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
    )


class Rank:
    """A worker over the toy model, with everything loaded and a book beside it."""

    def __init__(self) -> None:
        self.model = Decoder()
        self.steering = WorkerSteering(vllm_config(), CONFIG, self.model, torch.device("cpu"))
        self.admission = Admission(CONFIG, 1e30)
        self.plans: dict[str, Plan | None] = {}
        for item in ITEMS.values():
            self.load(item)

    def load(self, item: Intervention) -> None:
        parts = item.compile(lambda layer, heads: self.steering.projections[layer](heads).detach())
        packed = [pack(edits, self.steering.layout, torch.float32, "here") for edits in parts]
        self.steering.store.update({(item.digest, n): part for n, part in enumerate(packed)})
        self.admission.publish(Summary(item.digest, tuple(part.summary() for part in packed)))

    def add(self, name: str) -> Plan | None:
        prompt_len, asked = REQUESTS[name]
        components = tuple(Component(ITEMS[key].digest, 1.0, ITEMS[key].positions) for key in asked)
        plan = self.admission.admit(Steering(components), prompt_len) if asked else None
        self.steering.add(name, plan)
        self.plans[name] = plan
        return plan

    def finish(self, name: str) -> None:
        self.steering.remove(name)
        plan = self.plans.pop(name)
        if plan is not None:
            self.admission.release(plan)

    @torch.no_grad()
    def step(self, *pieces: tuple[str, int, int], padding: int = 0) -> list[torch.Tensor]:
        """One forward over tokens [start, stop) of each request, and junk behind them."""
        ends = torch.tensor([0, *(stop - start for _, start, stop in pieces)]).cumsum(0).int()
        tokens = torch.cat([tokens_of(name)[start:stop] for name, start, stop in pieces])
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in pieces])
        total, junk = len(tokens), torch.zeros(padding, dtype=torch.long)
        view = StepView(
            [name for name, _, _ in pieces],
            torch.cat([ends, ends[-1:].expand(2)]),  # runners pad it
            torch.cat([positions, junk]),
            total,
            decoding=all(stop - start == 1 and start >= REQUESTS[name][0] for name, start, stop in pieces),
        )
        self.steering.prepare(view)
        assert not self.steering.tokens.scales[total:].any(), "padding has no edit"
        out = self.model(torch.cat([tokens, junk]))[:total]
        return list(out.split([stop - start for _, start, stop in pieces]))


def tokens_of(name: str) -> torch.Tensor:
    return torch.randint(0, BASE.vocab_size, (TOTAL,), generator=torch.Generator().manual_seed(ord(name)))


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of vLLM and files of the model are tested beside this."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "base_fingerprint", lambda config: BASE)
        yield


@functools.cache
def alone() -> dict[str, torch.Tensor]:
    """Each request in one step of its own, on a fresh rank."""
    found = {}
    for name in REQUESTS:
        rank = Rank()
        rank.add(name)
        (found[name],) = rank.step((name, 0, TOTAL))
    return found


def test_the_edits_are_there() -> None:
    """So that equality below is not that of nothing; and the unsteered one is the model to the bit."""
    base = Decoder()
    for name, found in alone().items():
        with torch.no_grad():
            plain_output = base(tokens_of(name))
        assert torch.equal(found, plain_output) == (name == "c")


def test_one_batch_of_all_is_each_alone() -> None:
    """Invariant: mixed interventions in one batch, each request exactly its own; padding behind."""
    rank, wanted = Rank(), alone()
    for name in REQUESTS:
        rank.add(name)
    found = rank.step(*((name, 0, TOTAL) for name in ("c", "a", "d", "b")), padding=7)
    for name, out in zip(("c", "a", "d", "b"), found, strict=True):
        torch.testing.assert_close(out, wanted[name], **CLOSE)


@given(st.data())
def test_however_the_steps_are_cut(data: st.DataObject) -> None:
    """Invariant: chunked prefill, decodes of one or several tokens, preemption and resume need no special case: tokens
    that are computed again get the same edits. (The toy mixes no tokens, so each step can be compared.)"""
    rank, wanted = Rank(), alone()
    done: dict[str, int] = {}
    for _ in range(12):
        action = data.draw(st.sampled_from(["add", "step", "decode", "decode", "preempt", "finish"]))
        if action == "add" and len(done) < len(REQUESTS):
            name = data.draw(st.sampled_from(sorted(set(REQUESTS) - set(done))))
            rank.add(name)
            done[name] = 0
        elif action == "preempt" and done:
            name = data.draw(st.sampled_from(sorted(done)))
            done[name] = 0
            if data.draw(st.booleans()):  # V2 removes and adds again; V1 keeps it
                rank.steering.remove(name)
                rank.steering.add(name, rank.plans[name])
        elif action == "finish" and done:
            name = data.draw(st.sampled_from(sorted(done)))
            del done[name]
            rank.finish(name)
        else:
            batch = sorted(n for n, at in done.items() if at < TOTAL)
            if action == "decode":  # so often the batch of the step before
                pieces = [(name, done[name], done[name] + 1) for name in batch]
            else:
                batch = data.draw(st.permutations(batch))[:3]
                pieces = [(name, done[name], data.draw(st.integers(done[name] + 1, TOTAL))) for name in batch]
            if pieces:
                found = rank.step(*pieces, padding=data.draw(st.integers(0, 3)))
                for (name, start, stop), out in zip(pieces, found, strict=True):
                    torch.testing.assert_close(out, wanted[name][start:stop], **CLOSE)
                    done[name] = stop


def test_a_row_that_is_taken_over() -> None:
    """Rows of finished requests go to others; nothing of the former content is left in any token."""
    rank, wanted = Rank(), alone()
    for _ in range(3):
        for name in REQUESTS:
            rank.add(name)
            (found,) = rank.step((name, 0, TOTAL))
            torch.testing.assert_close(found, wanted[name], **CLOSE)
            rank.finish(name)


def test_an_id_that_comes_back_without_a_plan() -> None:
    """The same ids in the batch as in the last step, another request behind one of them."""
    rank = Rank()
    rank.add("a")
    rank.add("b")
    rank.step(("a", 0, 3), ("b", 0, 3))
    rank.steering.add("a", None)
    (found, _) = rank.step(("a", 0, 3), ("b", 3, 4))
    with torch.no_grad():
        torch.testing.assert_close(found, Decoder()(tokens_of("a")[:3]), **CLOSE)


def test_adding_twice_leaks_nothing() -> None:
    rank = Rank()
    for _ in range(50):
        rank.steering.add("a", rank.add("a"))
    assert len(rank.steering.requests) == 1
    rank.steering.remove("a")
    rank.steering.remove("a")
    rank.steering.remove("never seen")
    assert len(rank.steering.requests) == 0


def test_a_step_after_the_last_steered_request_is_clear() -> None:
    rank = Rank()
    rank.add("a")
    rank.step(("a", 0, TOTAL))
    assert rank.steering.tokens.scales.any()
    rank.steering.remove("a")
    rank.step(("c", 0, TOTAL))
    assert not rank.steering.tokens.scales.any()


def test_steered_requests_elsewhere_do_not_steer_a_step() -> None:
    rank = Rank()
    rank.add("a")
    rank.step(("a", 0, TOTAL))
    (found,) = rank.step(("c", 0, TOTAL))
    with torch.no_grad():
        assert torch.equal(found, Decoder()(tokens_of("c")))


def test_a_request_without_tokens_in_the_step() -> None:
    rank, wanted = Rank(), alone()
    for name in ("a", "b"):
        rank.add(name)
    _, found = rank.step(("a", 2, 2), ("b", 0, TOTAL))
    torch.testing.assert_close(found, wanted["b"], **CLOSE)


def test_attach() -> None:
    runner = SimpleNamespace(vllm_config=vllm_config(), device=torch.device("cpu"))
    assert isinstance(attach(runner, Decoder()), WorkerSteering)
    off, model = SimpleNamespace(vllm_config=vllm_config(None), device=torch.device("cpu")), Decoder()
    assert attach(off, model) is None
    assert not any("forward" in vars(m) for m in model.modules()), "an engine without steering is not touched"


def test_a_model_that_cannot_be_bound_does_not_start() -> None:
    runner = SimpleNamespace(vllm_config=vllm_config(), device=torch.device("cpu"))
    with pytest.raises(StartupRefused, match="no decoder layers"):
        attach(runner, torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_positions_of_the_items_differ() -> None:
    """The batch above holds every kind of span."""
    assert {str(item.positions) for item in ITEMS.values()} == {"all", "response", "f2+l2/untied"}
    assert Positions("response") in {item.positions for item in ITEMS.values()}
