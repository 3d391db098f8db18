"""Names and their users: a name is published, moved and withdrawn; content lives as long as someone needs it."""

from __future__ import annotations

import json

import pytest
from core.make import lofit, loreft

from steer_vllm import Intervention
from steer_vllm.catalog import Catalog, Entry, check_name
from steer_vllm.errors import ArtifactExists, InvalidIntervention, ModelNotFound
from steer_vllm.plan import PartSummary, Summary


def entry(name: str, seed: int = 1) -> Entry:
    item = lofit(seed=seed)
    return Entry.of(name, "folder", item, Summary(item.digest, (PartSummary(True, 0, 1.0),)))


@pytest.mark.parametrize("name", ["a", "0", "truthful-8b_v1.2", "a" * 64, "0.9", "a..b", "con"])
def test_good_names(name: str) -> None:
    assert check_name(name, "base") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/b", "/a", "a\\b", "~a", "-a", "_a", ".a", "A", "aB", "a b", " a", "a ", "a\n", "\na",
     "a\0", "\0", "a:b", "a@b", "a,b", "a%2e", "a" * 65, "\u0430pple", "caf\u00e9", "a\u200b", "\uff41", "\u0661",
     "a\u0300", "a+b", "base", None, 3, b"a", ["a"], True],
)  # fmt: skip
def test_bad_names(name: object) -> None:
    with pytest.raises(InvalidIntervention) as caught:
        check_name(name, "base")
    assert caught.value.param == "name"


def test_entry_says_what_the_artifact_is() -> None:
    item: Intervention = loreft(positions="f2+l2/untied", default_scale=0.5)
    found = Entry.of(
        "x", "folder", item, Summary(item.digest, (PartSummary(False, 3, 1.0), PartSummary(False, 2, 1.0)))
    )
    shown = json.loads(json.dumps(found.to_json()))
    assert shown == {
        "id": "x", "object": "intervention", "digest": item.digest, "method": "loreft", "sites": ["block_output"],
        "layers": [0, 2], "rank": 3, "positions": "f2+l2/untied", "default_scale": 0.5, "base_model": "",
        "description": "", "prompt_format": None, "source": "folder",
    }  # fmt: skip


def test_names_come_and_go() -> None:
    catalog = Catalog()
    assert catalog.publish(entry("b")) is None
    assert catalog.publish(entry("a", 2)) is None
    assert [e.name for e in catalog] == ["a", "b"]
    assert len(catalog) == 2
    assert "a" in catalog
    assert catalog.withdraw("a").name == "a"
    assert "a" not in catalog
    for act in (catalog.get, catalog.withdraw):
        with pytest.raises(ModelNotFound, match="'a'"):
            act("a")


def test_a_name_is_moved_only_when_asked() -> None:
    catalog = Catalog()
    old, new = entry("a"), entry("a", 2)
    catalog.publish(old)
    catalog.check_free("a", old.digest, replace=False)
    catalog.check_free("b", new.digest, replace=False)
    catalog.check_free("a", new.digest, replace=True)
    with pytest.raises(ArtifactExists, match="load_inplace"):
        catalog.check_free("a", new.digest, replace=False)
    assert catalog.publish(new) == old
    assert catalog.get("a").digest == new.digest


def test_content_lives_until_its_last_user() -> None:
    """Invariant: unloading unpublishes the name at once and frees the content when its last request ends."""
    catalog = Catalog()
    one, two = entry("one"), entry("two", 2)
    for e in (one, two):
        catalog.publish(e)
    both = {one.digest, two.digest}
    catalog.enter(both)
    catalog.enter({one.digest})
    catalog.withdraw("one")
    assert not catalog.is_unused(one.digest)
    assert catalog.leave(both) == set()
    assert catalog.leave({one.digest}) == {one.digest}
    assert catalog.is_unused(one.digest)
    assert not catalog.is_unused(two.digest)


def test_content_under_two_names_lives_with_the_second() -> None:
    catalog = Catalog()
    catalog.publish(entry("one"))
    catalog.publish(entry("other"))
    digest = catalog.withdraw("one").digest
    assert not catalog.is_unused(digest)
    assert catalog.withdraw("other").digest == digest
    assert catalog.is_unused(digest)


def test_content_published_again_while_in_use_is_kept() -> None:
    catalog = Catalog()
    e = entry("one")
    catalog.publish(e)
    catalog.enter({e.digest})
    catalog.withdraw("one")
    catalog.publish(e)
    assert catalog.leave({e.digest}) == set()


def test_leaving_without_entering_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Catalog().leave({"x"})
