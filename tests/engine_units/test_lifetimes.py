"""Requests, loads and unloads in any order: nothing is taken from a request that needs it, nothing is left behind.

The book of the core (`Admission`) stands against a model that only counts, and drives a worker (tables, store and
segments, as a rank has them) as vLLM does: the core runs ahead of it by some steps, requests that ended leave with the
next step, preempted ones keep their rows or come in again. Whenever a request runs, its rows hold what its plan says.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from steer_vllm import config as limits
from steer_vllm.config import SteerConfig
from steer_vllm.edit import LowRank, Place, Site
from steer_vllm.engine.admission import Admission
from steer_vllm.errors import ArtifactInvalid, NoRows
from steer_vllm.packed import Layout, Packed, compose
from steer_vllm.plan import Plan, Summary, contents, needs
from steer_vllm.positions import Positions
from steer_vllm.request import Steering
from steer_vllm.rows import Content
from steer_vllm.segments import Component, resolve
from steer_vllm.slots import RequestSlots, SlotTables

CONFIG = SteerConfig(additive_rows=2, low_rank_rows=1, max_rank=4, per_request=2)
LAYOUT = Layout.of((Place(0, site) for site in Site), 3, CONFIG)
DIGESTS = ("add", "two", "low", "both")
PROMPT = 5


def content_of(digest: str) -> Packed:
    """Numbers that no other digest has."""
    value = 1.0 + DIGESTS.index(digest)
    low_rank = LowRank(torch.full((1, 1, 3), value), torch.full((1, 1, 3), -value), torch.full((1, 1), value))
    return Packed(
        offset=None if digest == "low" else torch.full((2, 3), 10 * value),
        low_rank=low_rank if digest in ("low", "both") else None,
    )


SUMMARIES = {digest: Summary(digest, (content_of(digest).summary(),)) for digest in DIGESTS}


@dataclass(eq=False)
class Request:
    """A request in the core: arriving (in the input queue), waiting, running, preempted."""

    name: str
    plan: Plan
    digests: set[str]
    state: str = "arriving"
    in_worker: bool = False


class Worker:
    """A rank: takes messages in order, some time after they were sent."""

    def __init__(self) -> None:
        self.tables = SlotTables(LAYOUT, CONFIG, torch.float32, "cpu")
        self.requests = RequestSlots(1, CONFIG, "cpu")
        self.store: dict[tuple[str, int], Packed] = {}

    def step(self, gone: list[str], new: list[Request], batch: list[Request]) -> None:
        """As the runners do: who left, who entered, then all that run."""
        for name in gone:
            self.requests.remove(name)
        for request in new:
            self.requests.remove(request.name)
            self.tables.fill(request.plan, self.store)
            self.requests.add(request.name, request.plan.placements)
        for request in batch:
            self.check(request)

    def check(self, request: Request) -> None:
        plan = request.plan
        for fill in plan.additive:
            wanted = whole(fill.content).offset
            assert wanted is not None
            assert torch.equal(self.tables.additive[fill.row], wanted), (request, fill)
        for fill in plan.low_rank:
            part = whole(fill.content).low_rank
            assert part is not None
            rank = part.A.shape[1]
            for name in ("A", "B", "c"):
                row = getattr(self.tables.low_rank, name)[fill.row]
                assert torch.equal(row[:, :rank], getattr(part, name)), (request, fill)
                assert not row[:, rank:].any()
        spans = self.requests.spans[self.requests.row(request.name)]
        assert [tuple(span[:4]) for span in plan.placements] == [
            tuple(s) for s in spans[: len(plan.placements)].tolist()
        ]


PARTS = st.lists(
    st.tuples(st.sampled_from(DIGESTS), st.sampled_from([1.0, 1.0, 2.0]), st.sampled_from(["all", "all", "prompt"])),
    min_size=1,
    max_size=2,
)
"""What a request asks for: digest, scale, positions."""


def whole(content: Content) -> Packed:
    return compose((content_of(term.digest), term.scale) for term in content)


class Lifetimes(RuleBasedStateMachine):
    """The core's side, and what it has sent to the worker."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(limits, "SPARE_ROWS", 1)
        self.admission = Admission(CONFIG, 1e3)
        self.worker = Worker()
        self.sent: deque[tuple[list[str], list[Request], list[Request]]] = deque()
        self.requests: list[Request] = []
        self.gone: list[str] = []
        self.held: dict[str, str] = {}

    @initialize()
    def start(self) -> None:
        for digest in DIGESTS:
            self.load(digest)

    # requests

    @rule(name=st.sampled_from("abc"), parts=PARTS)
    def admit(self, name: str, parts: list[tuple[str, float, str]]) -> None:
        """In the input thread, whatever the main loop is at. Ids may come back while their first request is there."""
        components = tuple(Component(digest, scale, Positions.parse(at)) for digest, scale, at in parts)
        digests = {digest for digest, _, _ in parts}
        additive, low_rank = contents(needs(resolve(components, PROMPT), SUMMARIES, CONFIG, 1e3))
        fits = len(additive | self.used("additive")) <= CONFIG.additive_table_rows - 1
        fits &= len(low_rank | self.used("low_rank")) <= CONFIG.low_rank_table_rows - 1
        try:
            plan = self.admission.admit(Steering(components), PROMPT)
        except ArtifactInvalid:
            assert any(self.held.get(digest) != "open" for digest in digests)
        except NoRows:
            assert not fits
        else:
            assert fits
            assert all(self.held.get(digest) == "open" for digest in digests)
            self.requests.append(Request(name, plan, digests))

    def used(self, table: str) -> set[Content]:
        return {fill.content for request in self.requests for fill in getattr(request.plan, table)}

    def in_state(self, *states: str) -> list[Request]:
        return [request for request in self.requests if request.state in states]

    @precondition(lambda self: self.in_state("arriving"))
    @rule(turned_away=st.sampled_from([False, False, False, True]))
    def enqueue(self, turned_away: bool) -> None:
        """In the main loop, in the order of arrival; or it is turned away, shutting down or paused. vLLM does not
        survive two requests of one id in its scheduler."""
        for first in self.in_state("arriving"):
            known = {request.name for request in self.in_state("waiting", "running", "preempted")}
            if turned_away or first.name in known:
                self.end(first)
            else:
                first.state = "waiting"

    @precondition(lambda self: self.in_state("waiting", "running", "preempted"))
    @rule(data=st.data())
    def finish_or_abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.in_state("waiting", "running", "preempted")))
        self.gone.append(request.name)
        self.end(request)

    def end(self, request: Request) -> None:
        self.requests.remove(request)
        self.admission.release(request.plan)
        self.admission.release(request.plan)  # a second time takes nothing from anybody

    # steps

    @rule(data=st.data(), again=st.booleans())
    def step(self, data: st.DataObject, again: bool) -> None:
        """again: preempted requests come in anew (V2), else they are still there (V1)."""
        running = self.in_state("running")
        for request in data.draw(st.lists(st.sampled_from(running), unique=True), "preempt") if running else ():
            request.state = "preempted"
            if again:
                self.gone.append(request.name)
                request.in_worker = False
        waiting = self.in_state("waiting", "preempted")
        self.send(data.draw(st.lists(st.sampled_from(waiting), unique=True), "schedule") if waiting else [])

    @rule(name=st.sampled_from("abc"), parts=PARTS)
    def serve(self, name: str, parts: list[tuple[str, float, str]]) -> None:
        """Straight through, as it is most of the time."""
        self.admit(name, parts)
        self.enqueue(turned_away=False)
        self.send(self.in_state("waiting", "preempted"))
        self.answer()

    def send(self, scheduled: list[Request]) -> None:
        new = [request for request in scheduled if not request.in_worker]
        for request in scheduled:
            request.state, request.in_worker = "running", True
        self.sent.append((self.gone, new, self.in_state("running")))
        self.gone = []
        while len(self.sent) > 2:
            self.work()

    @precondition(lambda self: self.sent)
    @rule()
    def work(self) -> None:
        self.worker.step(*self.sent.popleft())

    def answer(self) -> None:
        """A call to the worker is answered when all that was sent before is done."""
        while self.sent:
            self.work()

    # contents

    @rule(digest=st.sampled_from(DIGESTS))
    def load(self, digest: str) -> None:
        """New content, or content that is on its way out and is opened again."""
        assert self.admission.held(digest) == self.held.get(digest, "absent")
        if self.admission.reopen(digest) is None:
            self.answer()
            self.worker.store[digest, 0] = content_of(digest)
            self.admission.publish(SUMMARIES[digest])
        self.held[digest] = "open"

    @rule(digest=st.sampled_from(DIGESTS), free=st.booleans())
    def unload(self, digest: str, free: bool) -> None:
        """Closed, and freed or not: another engine may have a request that uses it."""
        users = any(digest in request.digests for request in self.requests)
        assert self.admission.close(digest) is not users
        if digest in self.held:
            self.held[digest] = "closing"
        if free:
            self.free(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def free(self, digest: str) -> None:
        """Also when nobody closed it, or it was opened again since."""
        users = any(digest in request.digests for request in self.requests)
        if self.admission.forget(digest):
            assert not users
            assert self.held.pop(digest, "closing") == "closing"
            self.answer()
            self.worker.store.pop((digest, 0), None)
        else:
            assert users or self.held[digest] == "open"

    def teardown(self) -> None:
        for request in list(self.requests):
            self.gone.append(request.name)
            self.end(request)
        self.sent.append((self.gone, [], []))
        self.answer()
        facts = self.admission.facts()
        assert facts["pinned"] == facts["additive_rows"] == facts["low_rank_rows"] == 0
        slots = self.worker.requests
        assert len(slots) == 0
        assert sorted(slots._free) == list(range(1, len(slots.spans))), "a row of a request was lost"
        for digest in DIGESTS:
            assert self.admission.close(digest)
            assert self.admission.forget(digest)
        assert not any(self.admission._users.values())
        self.patch.undo()


TestLifetimes = Lifetimes.TestCase
TestLifetimes.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads are changed as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_leave_nothing(restless: None) -> None:
    """Admission runs in the input thread, release, loading and unloading in the main loop: hammered, the book is even.

    Invariant: what a live plan names is held. (Without its lock the book breaks within a few hundred requests.)
    """
    admission = Admission(CONFIG, 1e3)
    failures: list[BaseException] = []
    arrived: deque[tuple[Plan, str]] = deque()
    running = threading.Event()
    running.set()

    def input_thread(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(1500):
            digest = draw.choice(DIGESTS)
            positions = Positions.parse(draw.choice(["all", "prompt"]))
            steering = Steering((Component(digest, 1.0, positions), Component(digest, 1.0, Positions.parse("all"))))
            try:
                arrived.append((admission.admit(steering, PROMPT), digest))
            except (ArtifactInvalid, NoRows):
                continue

    def main_loop(seed: int) -> None:
        draw = random.Random(seed)
        while running.is_set() or arrived:
            digest = draw.choice(DIGESTS)
            if draw.random() < 0.3:
                admission.publish(SUMMARIES[digest])
            elif draw.random() < 0.3 and admission.close(digest):
                admission.forget(digest)
            if arrived:
                plan, used = arrived.popleft()
                assert admission.held(used) != "absent", "freed while a request needs it"
                admission.release(plan)

    def guarded(work: Any, seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            failures.append(error)

    feeders = [threading.Thread(target=guarded, args=(input_thread, seed)) for seed in range(3)]
    loop = threading.Thread(target=guarded, args=(main_loop, 9))
    for thread in (*feeders, loop):
        thread.start()
    for thread in feeders:
        thread.join()
    running.clear()
    loop.join()
    assert not failures
    facts = admission.facts()
    assert facts["pinned"] == facts["additive_rows"] == facts["low_rank_rows"] == 0
    assert all(admission.close(digest) and admission.forget(digest) for digest in DIGESTS)
