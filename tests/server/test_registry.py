"""The registry: published when the engine has it, freed with the last user, one load of a name at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from steer_vllm.catalog import Catalog, Entry
from steer_vllm.errors import (
    ArtifactExists,
    ArtifactInvalid,
    EngineUnavailable,
    InvalidIntervention,
    ModelNotFound,
)
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.server import registry as module
from steer_vllm.server.front import Front
from steer_vllm.server.registry import Registry

from .conftest import BASE, FakeEngine, Make, direction, eventually, lofit, loreft

Build = Callable[..., Front]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST", 0.001)
    monkeypatch.setattr(module, "_LONGEST", 0.002)


@pytest.fixture(params=[1, 2], ids=["alone", "first-of-two"])
async def registry(build: Build, request: pytest.FixtureRequest) -> Registry:
    return build(servers=request.param).registry


async def settle() -> None:
    await asyncio.sleep(0.05)


async def catalog(registry: Registry) -> Catalog:
    await registry.refresh()
    return registry.catalog


async def test_the_base_is_the_one_served_now(registry: Registry, engine: FakeEngine, make: Make) -> None:
    """After a reload of another model its artifacts load without a restart, and those of the former do not."""
    engine.serves = replace(BASE, weights="other")
    make("new", lofit(1), base=engine.serves)
    make("old", lofit(2))
    await registry.load("new", "new")
    with pytest.raises(ArtifactInvalid, match="weights"):
        await registry.load("old", "old")
    engine.serves = EngineUnavailable("not known")
    with pytest.raises(EngineUnavailable, match="not known"):
        await registry.load("old", "old")
    assert [entry.name for entry in await catalog(registry)] == ["new"]


async def test_load_and_unload(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    entry = await registry.load("honest", "honest")
    assert list(engine.loaded) == [entry.digest]
    assert (await catalog(registry)).get("honest").to_json()["method"] == "lofit"
    await registry.unload("honest")
    assert "honest" not in (await catalog(registry))
    await eventually(lambda: not engine.loaded)
    with pytest.raises(ModelNotFound):
        await registry.unload("honest")


async def test_published_only_when_the_engine_has_it(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    engine.hold.clear()
    loading = asyncio.create_task(registry.load("honest", "honest"))
    await eventually(lambda: engine.loads == 1)
    assert "honest" not in (await catalog(registry))
    engine.hold.set()
    await loading
    assert "honest" in (await catalog(registry))


async def test_of_two_loads_of_one_name_one_wins(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("a", lofit(1))
    make("b", lofit(2))
    both = await asyncio.gather(registry.load("x", "a"), registry.load("x", "b"), return_exceptions=True)
    (winner,) = (one for one in both if isinstance(one, Entry))
    assert sum(isinstance(one, ArtifactExists) for one in both) == 1
    await eventually(lambda: set(engine.loaded) == {winner.digest})
    assert (await catalog(registry)).get("x").digest == winner.digest


async def test_two_names_load_at_once(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("a", lofit(1))
    make("b", lofit(2))
    engine.hold.clear()
    both = [asyncio.create_task(registry.load(name, name)) for name in "ab"]
    await eventually(lambda: engine.at_once == 2)
    engine.hold.set()
    await asyncio.gather(*both)
    assert engine.most_at_once == 2


async def test_same_content_again_is_no_error(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    first = await registry.load("honest", "honest")
    assert (await registry.load("honest", "honest")).digest == first.digest
    assert list(engine.loaded) == [first.digest]


async def test_replace_keeps_what_runs(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("a", lofit(1))
    make("b", lofit(2))
    old = await registry.load("x", "a")
    registry.enter({old.digest})
    with pytest.raises(ArtifactExists, match="load_inplace"):
        await registry.load("x", "b")
    new = await registry.load("x", "b", load_inplace=True)
    await settle()
    assert (await catalog(registry)).get("x").digest == new.digest
    assert set(engine.loaded) == {old.digest, new.digest}
    registry.leave({old.digest})
    await eventually(lambda: set(engine.loaded) == {new.digest})


async def test_unload_waits_for_the_last_request(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    entry = await registry.load("honest", "honest")
    registry.enter({entry.digest})
    registry.enter({entry.digest})
    await registry.unload("honest")
    registry.leave({entry.digest})
    await settle()
    assert engine.loaded
    registry.leave({entry.digest})
    await eventually(lambda: not engine.loaded)


async def test_unload_waits_for_the_engine(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    entry = await registry.load("honest", "honest")
    engine.busy.add(entry.digest)
    await registry.unload("honest")
    await settle()
    assert engine.loaded
    engine.busy.clear()
    await eventually(lambda: not engine.loaded)


async def test_content_with_another_name_stays(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    entry = await registry.load("one", "honest")
    await registry.load("two", "honest")
    await registry.unload("one")
    await settle()
    assert entry.digest in engine.loaded
    await registry.unload("two")
    await eventually(lambda: not engine.loaded)


async def test_loaded_again_while_being_freed(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    entry = await registry.load("honest", "honest")
    engine.busy.add(entry.digest)
    await registry.unload("honest")
    await settle()
    await registry.load("honest", "honest")
    engine.busy.clear()
    await settle()
    assert entry.digest in engine.loaded


async def test_history(registry: Registry, engine: FakeEngine, make: Make) -> None:
    """Whatever happens at once, in the end the engine has what is published and nothing else."""
    import random

    draw = random.Random(5)
    for i in range(4):
        make(f"s{i}", lofit(i))

    async def user() -> None:
        for _ in range(25):
            name = draw.choice("abc")
            try:
                if draw.random() < 0.5:
                    await registry.load(name, f"s{draw.randrange(4)}", load_inplace=draw.random() < 0.7)
                elif draw.random() < 0.5:
                    await registry.unload(name)
                else:
                    digest = (await catalog(registry)).get(name).digest
                    registry.enter({digest})  # nothing is awaited since the look-up
                    await asyncio.sleep(draw.random() * 0.003)
                    assert digest in engine.loaded
                    registry.leave({digest})
            except (ArtifactExists, ModelNotFound):
                pass

    await asyncio.gather(*(user() for _ in range(6)))
    published = (await catalog(registry)).named
    await eventually(lambda: set(engine.loaded) == published)


@pytest.mark.parametrize("error", [ArtifactInvalid("rank 1 refuses"), EngineUnavailable("gone")])
async def test_a_failed_load_changes_nothing(
    registry: Registry, engine: FakeEngine, make: Make, error: Exception
) -> None:
    make("a", lofit(1))
    make("b", lofit(2))
    await registry.load("x", "a")
    engine.fails = error
    with pytest.raises(type(error)):
        await registry.load("x", "b", load_inplace=True)
    assert (await catalog(registry)).get("x").source == "a"
    engine.fails = None
    await registry.load("x", "b", load_inplace=True)


async def test_a_cancelled_load_leaves_nothing(registry: Registry, engine: FakeEngine, make: Make) -> None:
    make("honest")
    engine.hold.clear()
    loading = asyncio.create_task(registry.load("honest", "honest"))
    await eventually(lambda: engine.at_once == 1)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    engine.hold.set()
    await eventually(lambda: not engine.loaded)
    assert len(await catalog(registry)) == 0


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "A", "", "x" * 65, "a:b", "a@b", "tiny", "second", "\N{CYRILLIC SMALL LETTER A}", "a\0", None, 7],
)
async def test_names(registry: Registry, make: Make, name: object) -> None:
    make("honest")
    with pytest.raises(InvalidIntervention, match="name"):
        await registry.load(name, "honest")


async def test_wrong_base_says_what_differs(registry: Registry, make: Make) -> None:
    make("small", base=replace(BASE, vocab_size=100))
    make("tuned", base=replace(BASE, weights="other"))
    with pytest.raises(ArtifactInvalid, match=r"another base model .*: vocab_size 100 against 99"):
        await registry.load("small", "small")
    with pytest.raises(ArtifactInvalid, match=r"another base model .*: weights other against abc"):
        await registry.load("tuned", "tuned")


async def test_what_the_tables_cannot_hold(build: Build, make: Make, engine: FakeEngine) -> None:
    make("edit", loreft(rank=4))
    make("polite", direction())
    make("loud", default_scale=9.0)
    with pytest.raises(ArtifactInvalid, match="rank 4, this engine's max_rank is 2"):
        await build(max_rank=2).registry.load("edit", "edit")
    with pytest.raises(ArtifactInvalid, match="no low_rank table"):
        await build(low_rank_rows=0).registry.load("edit", "edit")
    with pytest.raises(ArtifactInvalid, match="no additive table"):
        await build(additive_sites=("attention_output",)).registry.load("polite", "polite")
    with pytest.raises(ArtifactInvalid, match="default_scale 9, max_scale is 8"):
        await build().registry.load("loud", "loud")
    await eventually(lambda: not engine.loaded)


async def test_the_base_is_asked_for_while_the_load_runs(
    registry: Registry, engine: FakeEngine, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer takes a step of those who decode."""
    loads: list[int] = []
    base = engine.base

    async def asked() -> Fingerprint:
        loads.append(engine.at_once)
        return await base()

    monkeypatch.setattr(engine, "base", asked)
    engine.hold.clear()
    loading = asyncio.create_task(registry.load("honest", make("honest").name))
    await eventually(lambda: loads == [1])
    engine.hold.set()
    await loading


async def test_content_that_is_there_is_checked_too(registry: Registry, engine: FakeEngine, make: Make) -> None:
    """The digest says neither what an artifact was made for nor how strong it is by default."""
    await registry.load("good", make("good", lofit(1)).name)
    make("foreign", lofit(1), base=replace(BASE, weights="other"))
    make("loud", lofit(1), default_scale=9.0)
    for name, says in (("foreign", "another base model"), ("loud", "max_scale is 8")):
        with pytest.raises(ArtifactInvalid, match=says):
            await registry.load(name, name)
    assert [entry.name for entry in await catalog(registry)] == ["good"]
    assert len(engine.loaded) == 1


def spoil_json(folder: Path, **fields: Any) -> None:
    file = folder / "intervention_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def spoil_nan(folder: Path) -> None:
    tensors = load_file(folder / "intervention.safetensors")
    tensors["offsets"][0, 0] = float("nan")
    save_file(tensors, folder / "intervention.safetensors")


def spoil_missing(folder: Path) -> None:
    save_file({}, folder / "intervention.safetensors")


def spoil_half(folder: Path) -> None:
    file = folder / "intervention.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_nan, "NaN"),
        (spoil_missing, "offsets"),
        (spoil_half, "safetensors"),
        (lambda folder: spoil_json(folder, extra=1), "extra"),
        (lambda folder: spoil_json(folder, sha256="0" * 64), "sha256"),
        (lambda folder: spoil_json(folder, settings={"heads": [[0, 9]]}), "heads"),
        (lambda folder: (folder / "intervention_config.json").unlink(), "intervention_config.json"),
    ],
)
async def test_damaged(
    registry: Registry, engine: FakeEngine, make: Make, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(make("bad"))
    with pytest.raises(ArtifactInvalid, match=says):
        await registry.load("bad", "bad")
    assert engine.loads == 0
    assert len(await catalog(registry)) == 0
