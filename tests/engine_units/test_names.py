"""The book of names: compare and set, holders, turns, and when content may be freed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from steer_vllm.catalog import Entry
from steer_vllm.engine import names
from steer_vllm.engine.board import Board
from steer_vllm.engine.names import NameBook
from steer_vllm.errors import ArtifactExists, EngineUnavailable, ModelNotFound
from steer_vllm.plan import PartSummary, Summary
from steer_vllm.positions import Positions


def entry(name: str, digest: str) -> Entry:
    parts = (PartSummary(True, 0, 1.5), PartSummary(False, 4, 2.5))
    return Entry(
        name, "out/x", digest, "loreft", ("block_output",), (0, 3), 4, Positions.parse("f2+l1/untied"), 0.5, "base",
        "for tests", None, Summary(digest, parts),
    )  # fmt: skip


def load(book: NameBook, name: str, digest: str, *, replace: bool = False) -> None:
    """What a server does, without an engine."""
    assert book.take_turn(digest, f"load {name}")
    try:
        book.publish(entry(name, digest), f"load {name}", replace)
    finally:
        book.end_turn(digest, f"load {name}", False)


def seen(book: NameBook, server: int, *needed: str) -> dict[str, str]:
    return {one.name: one.digest for one in book.copy(server, needed, 0)[0]}


def test_entries_cross_processes() -> None:
    one = entry("x", "d1")
    assert Entry.from_wire(json.loads(json.dumps(one.to_wire()))) == one


def test_publish_and_withdraw_are_changes() -> None:
    book = NameBook()
    load(book, "x", "d1")
    assert (book.epoch, seen(book, 0)) == (1, {"x": "d1"})
    with pytest.raises(ArtifactExists, match="load_inplace"):
        load(book, "x", "d2")
    assert (book.epoch, seen(book, 0)) == (1, {"x": "d1"})
    load(book, "x", "d2", replace=True)
    assert book.withdraw("x").digest == "d2"
    assert (book.epoch, seen(book, 0)) == (3, {})
    with pytest.raises(ModelNotFound):
        book.withdraw("x")
    assert book.epoch == 3


def test_a_copy_is_what_has_changed() -> None:
    """So that it does not take longer the more names there are."""
    book = NameBook()
    for name in ("x", "y", "z"):
        load(book, name, f"d-{name}")

    def changes(server: int, since: int) -> tuple[list[str], list[str]]:
        entries, gone = book.copy(server, [], since)
        return sorted(one.name for one in entries), sorted(gone)

    assert changes(0, 0) == (["x", "y", "z"], [])
    assert changes(0, 3) == ([], [])
    load(book, "y", "d2", replace=True)
    book.withdraw("x")
    assert changes(0, 3) == (["y"], ["x"])
    assert changes(0, 3) == (["y"], ["x"]), "an answer that was lost is asked for again"
    assert changes(1, 0) == (["y", "z"], ["x"]), "a name that the server never had"
    assert changes(0, 5) == ([], [])
    load(book, "x", "d3")
    assert changes(0, 5) == (["x"], [])
    assert changes(1, 5) == (["x"], [])
    book.withdraw("z")
    assert changes(0, 6) == changes(1, 6) == ([], ["z"])
    assert changes(0, 7) == changes(1, 7) == ([], [])
    assert changes(0, 6) == ([], []), "nobody needs to be told of z any more"


def test_published_in_its_turn_only() -> None:
    """Without a turn another server may be freeing it."""
    book = NameBook()
    with pytest.raises(EngineUnavailable):
        book.publish(entry("x", "d1"), "mine", False)
    assert book.take_turn("d1", "theirs")
    with pytest.raises(EngineUnavailable):
        book.publish(entry("x", "d1"), "mine", False)
    assert book.epoch == 0


def test_one_turn_at_a_time() -> None:
    book = NameBook()
    assert book.take_turn("d1", "a")
    assert not book.take_turn("d1", "b")
    assert book.take_turn("d2", "b")
    assert book.take_turn_to_free("d1", "b") is False
    book.end_turn("d1", "b", True)  # not b's: nothing happens
    assert not book.take_turn("d1", "b")
    book.end_turn("d1", "a", False)
    assert book.take_turn_to_free("d1", "b") is True
    assert not book.take_turn("d1", "a")
    book.end_turn("d1", "b", True)
    assert book.take_turn_to_free("d1", "b") is None


def test_freed_when_the_last_holder_gives_it_back() -> None:
    book = NameBook()
    load(book, "x", "d1")
    assert book.unused() == []  # named, though no server has fetched it yet
    assert book.take_turn_to_free("d1", "a") is None
    seen(book, 0)
    seen(book, 1)
    book.withdraw("x")
    seen(book, 0)
    assert book.unused() == []
    seen(book, 1, "d1")  # a request of server 1 uses it
    assert book.unused() == []
    assert book.take_turn_to_free("d1", "a") is None
    seen(book, 1)
    assert book.unused() == ["d1"]
    assert book.take_turn_to_free("d1", "a") is True
    assert book.unused() == []  # somebody is at it


def test_published_again_before_it_is_freed() -> None:
    book = NameBook()
    load(book, "x", "d1")
    book.withdraw("x")
    load(book, "y", "d1")
    assert book.unused() == []
    assert book.take_turn_to_free("d1", "a") is None


def test_a_load_that_failed_leaves_unused_content() -> None:
    book = NameBook()
    assert book.take_turn("d1", "a")
    assert book.unused() == []
    book.end_turn("d1", "a", False)
    assert book.unused() == ["d1"]


def test_utilities_answer() -> None:
    """Plain data, whatever happens: an exception would reach the log of the core and the caller as text."""
    core: Any = SimpleNamespace()
    one = entry("x", "d1").to_wire()
    assert names.steer_names_turn(core, "d1", "t") == {"state": "done"}
    assert names.steer_names_turn(core, "d1", "other") == {"state": "busy"}
    assert names.steer_names_publish(core, one, "t", False) == {"state": "done", "epoch": 1}
    assert names.steer_names_end_turn(core, "d1", "t", False) == {"state": "done"}
    assert names.steer_names_turn_to_free(core, "d1", "t") == {"state": "done", "needed": False}
    assert names.steer_names_open(core) == {"state": "done"}
    assert names.steer_names_copy(core, 0, [], 0) == {
        "state": "done", "epoch": 1, "opened": True, "entries": [one], "gone": [], "unused": []
    }  # fmt: skip
    assert names.steer_names_withdraw(core, "x") == {"state": "done", "epoch": 2, "entry": one}
    failed = names.steer_names_withdraw(core, "x")
    assert (failed["state"], failed["code"]) == ("failed", "model_not_found")
    assert names.steer_names_publish(core, {}, "t", False)["state"] == "failed"


def test_board() -> None:
    board = Board(3)
    assert (board.latest, board.failure) == (0, "")
    board.announce(2, 5)
    board.announce(0, 4)
    board.announce(2, 3)  # an answer that was overtaken
    assert board.latest == 5
    board.failure = "ärger " * 2000
    assert board.failure.startswith("ärger ärger")
