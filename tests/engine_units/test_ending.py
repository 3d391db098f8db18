"""Requests whose edits no longer fit the weights end with an error, and nobody else does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from steer_vllm.config import SteerConfig
from steer_vllm.engine.admission import Admission
from steer_vllm.engine.lifetimes import end_doomed
from steer_vllm.plan import PartSummary, Plan, Summary
from steer_vllm.positions import Positions
from steer_vllm.request import EXTRA_ARG, Steering
from steer_vllm.segments import Component


@pytest.fixture
def admission() -> Admission:
    book = Admission(SteerConfig(), 1e30)
    for digest in ("first", "second"):
        book.publish(Summary(digest, (PartSummary(True, 0, 1.0),)))
    return book


class Core:
    """A core with requests in its scheduler: name -> (client, what it uses)."""

    def __init__(self, admission: Admission, **asked: tuple[int, tuple[str, ...]]) -> None:
        self.plans = {name: plan(admission, *digests) for name, (_, digests) in asked.items()}
        self.ended: list[RequestStatus] = []
        self.told: dict[int, list[str]] = {}
        requests = {name: self._request(name, client) for name, (client, _) in asked.items()}
        self.scheduler = SimpleNamespace(requests=requests, finish_requests=self._finish)

    def _request(self, name: str, client: int) -> Any:
        found = self.plans[name]
        params = SimpleNamespace(extra_args=None if found is None else {EXTRA_ARG: found})
        return SimpleNamespace(request_id=name, client_index=client, sampling_params=params)

    def _finish(self, names: list[str], status: RequestStatus) -> list[Any]:
        self.ended += [status] * len(names)
        return [self.scheduler.requests[name] for name in names]


class Served(Core):
    """In a process of its own."""

    output_queue = None

    def _send_error_outputs_to_client(self, names: list[str], client: int) -> None:
        self.told[client] = sorted(names)


class Offline(Core):
    """In the client's process."""

    def step_fn(self) -> tuple[dict[int, Any], bool]:
        return {}, True


def plan(admission: Admission, *digests: str) -> Plan | None:
    parts = tuple(Component(digest, 1.0, Positions.parse("all")) for digest in digests)
    return admission.admit(Steering(parts), 5) if parts else None


ASKED: dict[str, tuple[int, tuple[str, ...]]] = {
    "a": (0, ("first",)),
    "b": (1, ("first", "second")),
    "c": (1, ("second",)),
    "d": (1, ()),
    "e": (1, ("first",)),
}


def test_those_whose_content_no_longer_fits(admission: Admission) -> None:
    core = Served(admission, **ASKED)
    admission.follow([], {"first": "weights ab against cd"})
    end_doomed(core, admission)
    assert core.told == {0: ["a"], 1: ["b", "e"]}
    assert core.ended == [RequestStatus.FINISHED_ERROR] * 3


def test_all_that_use_anything_when_the_weights_are_not_known(admission: Admission) -> None:
    core = Served(admission, **ASKED)
    admission.spoil("not known")
    end_doomed(core, admission)
    assert core.told == {0: ["a"], 1: ["b", "c", "e"]}


def test_nobody_while_everything_fits(admission: Admission) -> None:
    core = Served(admission, **ASKED)
    admission.follow([], {"another": "weights"})
    end_doomed(core, admission)
    assert core.told == {}
    assert core.ended == []


def test_those_that_come_when_the_weights_are_back_go_on(admission: Admission) -> None:
    """What was doomed stays so: its beginning was of other weights."""
    core = Served(admission, **ASKED)
    admission.follow([], {"first": "weights"})
    admission.follow([], {})
    late = plan(admission, "first")
    assert late is not None
    assert not admission.doomed(late)
    before = core.plans["a"]
    assert before is not None
    assert admission.doomed(before)
    admission.release(before)
    assert not admission.doomed(before)


def test_the_client_in_this_process_hears_of_it_once(admission: Admission) -> None:
    core = Offline(admission, **{name: (0, digests) for name, (_, digests) in ASKED.items()})
    admission.follow([], {"first": "weights"})
    end_doomed(core, admission)
    outputs, ran = core.step_fn()
    assert not ran
    assert {(output.request_id, output.finish_reason) for output in outputs[0].outputs} == {
        (name, FinishReason.ERROR) for name in ("a", "b", "e")
    }
    assert core.step_fn() == ({}, True)
