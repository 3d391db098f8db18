"""Every family: transformers parity of all three sites, or a refusal by name; and the page in the docs that says so.

Families whose tests were selected share an engine process; a process with all of them takes about as long as its
engines do.
"""

from __future__ import annotations

import pytest

from steer_vllm.edit import Site

from . import everything, table
from .models import FAMILIES, family
from .observe import CASES, Observation, title

NAMES = [one.name for one in FAMILIES]
WITHOUT_HEADS = {"Granite hybrid": "(GraniteMoeHybridMambaDecoderLayer), which could not be bound: mamba (MambaMixer2)"}
"""Families with layers that have no attention, and what is said of them."""


@pytest.fixture(scope="module")
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observation]:
    """What was observed on Runner V1 of the families that this run asks for."""
    items = [item for item in request.session.items if item.fspath == request.node.fspath]
    asked = {getattr(item, "callspec", None) and item.callspec.params.get("name") for item in items}
    whole = any(item.name == "test_the_page_says_what_was_observed" for item in items)
    chosen = [family(name) for name in NAMES if whole or name in asked]
    return {one.family: one for one in everything.first(tmp_path_factory.mktemp("families"), chosen)}


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observation]:
    return {one.family: one for one in everything.second(tmp_path_factory.mktemp("families"))}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observation]:
    return {one.family: one for one in everything.parallel(tmp_path_factory.mktemp("families"))}


def check(found: Observation) -> None:
    """Every site and kind is exact where the model has it; what it lacks is refused by layer and site."""
    assert not found.faults
    cases = {title(site, kind) for site, kind in CASES}
    assert set(found.exact) == cases
    lacking = WITHOUT_HEADS.get(found.family)
    at_attention = {f"lacking.{title(site, kind)}" for site, kind in CASES if site is Site.ATTENTION_OUTPUT}
    assert set(found.refusals) == (at_attention if lacking else set())
    for message in found.refusals.values():
        assert "edits attention_output of layer 0 " in message
        assert lacking is not None
        assert lacking in message


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str, first: dict[str, Observation]) -> None:
    check(first[name])


@pytest.mark.parametrize("name", everything.ON_V2)
def test_on_runner_v2(name: str, second: dict[str, Observation]) -> None:
    check(second[name])


@pytest.mark.parametrize("name", everything.ON_TWO_RANKS)
def test_on_two_ranks(name: str, parallel: dict[str, Observation]) -> None:
    """Invariant: each rank's part once, whether ranks' outputs are whole or shares of a sum."""
    check(parallel[name])


def test_the_page_says_what_was_observed(
    first: dict[str, Observation], second: dict[str, Observation], parallel: dict[str, Observation]
) -> None:
    written = table.page([first[name] for name in NAMES], list(second.values()), list(parallel.values()))
    assert table.PAGE.read_text() == written, "python -m families.table, in the folder tests, writes it"
