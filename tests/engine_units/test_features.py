"""The table of features: every row has a test that is there, and the page in docs is this table."""

from __future__ import annotations

from pathlib import Path

from steer_vllm.engine.features import REFUSED_AT_START, REFUSED_PER_REQUEST, SUPPORTED, features, markdown
from steer_vllm.engine.refusals import REFUSALS


def test_the_page_is_this_table(root: Path) -> None:
    """Write it with `python scripts/features.py`."""
    assert (root / "docs" / "features.md").read_text().endswith("\n\n" + markdown())


def test_every_row_is_known_by_a_test(root: Path) -> None:
    assert not [row.known for row in features() if not (root / row.known).is_file()]


def test_every_state_is_one_of_three() -> None:
    for row in features():
        assert row.state == SUPPORTED or row.state.startswith((f"{REFUSED_PER_REQUEST}: ", f"{REFUSED_AT_START}: ")), (
            row
        )


def test_no_feature_is_named_twice() -> None:
    names = [row.name for row in features()]
    assert len(names) == len(set(names))


def test_every_refusal_is_in_it() -> None:
    states = {row.name: row.state for row in features()}
    for refused in REFUSALS:
        assert states[refused.setting] == f"{REFUSED_AT_START}: {refused.reason}"
