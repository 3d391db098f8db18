"""What the modes ask for is there, valid, and different where it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer_vllm.bench.artifacts import KINDS, RANK, make
from steer_vllm.bench.modes import CONTROL, MODES, PLAIN, choose
from steer_vllm.bench.workload import LlamaShape, Workload
from steer_vllm.errors import InvalidIntervention
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.intervention import Intervention

SMALL = Workload(shape=LlamaShape(64, 96, 5, 4, 2, 128), batch=3)


@pytest.fixture
def base(tmp_path: Path) -> Fingerprint:
    SMALL.write_model(tmp_path / "model")
    return Fingerprint.of(tmp_path / "model", weights=False)


@pytest.mark.parametrize("kind", KINDS)
def test_artifacts_are_valid_and_distinct(kind: str, base: Fingerprint, tmp_path: Path) -> None:
    paths = [make(kind, number, base, seed=0, folder=tmp_path) for number in range(3)]
    loaded = [Intervention.load(path) for path in paths]
    assert all(one.base == base for one in loaded)
    assert len({one.digest for one in loaded}) == 3
    again = make(kind, 1, base, seed=0, folder=tmp_path / "again")
    assert Intervention.load(again).digest == loaded[1].digest, "a seed names an artifact"
    assert Intervention.load(make(kind, 1, base, seed=1, folder=tmp_path / "other")).digest != loaded[1].digest


def test_artifacts_edit_what_they_say(base: Fingerprint, tmp_path: Path) -> None:
    made = {kind: Intervention.load(make(kind, 0, base, 0, tmp_path)) for kind in KINDS}
    assert len(made["lofit"].tensors["offsets"]) == round(0.1 * 5 * 4)
    every = tuple(range(5))
    assert all(made[kind].method.layers == every for kind in ("head-per-layer", "direction", "loreft", "low-rank"))
    assert made["low-rank"].tensors["rotate"].shape == (1, 5, RANK, 64)
    assert {kind: str(one.positions) for kind, one in made.items() if str(one.positions) != "all"} == {
        "loreft": "f7+l7"
    }
    assert all(bool(torch.isfinite(tensor).all()) for one in made.values() for tensor in one.tensors.values())


@pytest.mark.parametrize("name", MODES)
def test_each_request_asks_for_what_is_made(name: str) -> None:
    mode = MODES[name]
    made = {f"{kind}-{number}" for kind, number in mode.artifacts(3)}
    asked = mode.asked(3)
    if not mode.kinds:
        assert asked is None
        assert not made
        return
    assert asked is not None
    assert [len(items) for items in asked] == [len(mode.kinds)] * 3
    assert {item["name"] for items in asked for item in items} == made
    assert len(made) == len(mode.kinds) * (3 if mode.distinct else 1)


def test_choosing_modes() -> None:
    assert [mode.name for mode in choose("idle", quick=False)] == ["plain", "idle"]
    assert [mode.name for mode in choose(None, quick=False)] == list(MODES)
    assert CONTROL not in {mode.engine for mode in choose(None, quick=True)}
    assert choose("control", quick=True)[-1].engine == CONTROL
    assert MODES["plain"].engine == PLAIN
    with pytest.raises(InvalidIntervention, match="no-such"):
        choose("idle,no-such", quick=False)


def test_workload() -> None:
    assert 48e6 < Workload().shape.parameters < 52e6
    assert Workload().prompts() == Workload().prompts() != replace(Workload(), seed=1).prompts()
    assert [len(prompt) for prompt in SMALL.prompts()] == [32] * 3
    assert SMALL.context % 128 == 0
    assert SMALL.context >= SMALL.prompt_tokens + SMALL.output_tokens
    assert replace(Workload(), batch=128).limits()["low_rank_rows"] == 128
    assert Workload().quick().rounds < Workload().rounds


def test_parameters_are_those_of_the_model() -> None:
    transformers = pytest.importorskip("transformers")
    shape = SMALL.shape
    config = transformers.LlamaConfig(**vars(shape), tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
