"""The store: a source in a request is no way out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer_vllm.errors import InvalidIntervention
from steer_vllm.server.store import Store


def test_below_the_root(tmp_path: Path) -> None:
    assert Store(tmp_path).folder("a/b") == tmp_path.resolve() / "a" / "b"


@pytest.mark.parametrize(
    "source", ["../x", "a/../../x", "a/../b", "/etc", "", ".", "a\0b", None, 3, ["a"], {"a": 1}, "//etc"]
)
def test_no_way_out(tmp_path: Path, source: object) -> None:
    with pytest.raises(InvalidIntervention, match="source"):
        Store(tmp_path).folder(source)


def test_symlinks_are_no_way_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inner").mkdir()
    (root / "loop").symlink_to(root / "inner")
    for source in ("link", "link/x", "loop"):
        with pytest.raises(InvalidIntervention, match="symlink"):
            Store(root).folder(source)


def test_a_root_that_is_a_symlink_is_the_operators_choice(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert Store(tmp_path / "root").folder("a") == (tmp_path / "real").resolve() / "a"


def test_what_was_given_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(None, ["out/honest", "/abs/polite"])
    monkeypatch.chdir("/")
    assert store.folder("out/honest") == tmp_path / "out" / "honest"
    assert store.folder("/abs/polite") == Path("/abs/polite")
    with pytest.raises(InvalidIntervention, match="no store"):
        store.folder("out/other")
