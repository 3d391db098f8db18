"""What the modes ask for is there, valid, and different where it says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steer_vllm.bench.artifacts import KINDS, RANK, make, make_all
from steer_vllm.bench.fleet import limits
from steer_vllm.bench.lora import make_adapter
from steer_vllm.bench.modes import ADDITIVE, CONTROL, EAGER, LORA, MODES, PLAIN, Case, cases, choose
from steer_vllm.bench.shapes import SHAPES, LlamaShape
from steer_vllm.bench.workload import Load, Workload
from steer_vllm.config import SteerConfig
from steer_vllm.errors import BenchmarkInvalid
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.fit import check_fit
from steer_vllm.intervention import Intervention

LOADS = (Load(3, 32, 64), Load(1, 100, 1))
SMALL = Workload(shape=LlamaShape(64, 96, 5, 4, 2, 128), loads=LOADS)


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


def test_many_are_made_at_once(base: Fingerprint, tmp_path: Path) -> None:
    wanted = [(kind, number) for number in range(6) for kind in ("loreft", "direction")]
    paths = make_all(wanted, base, 0, tmp_path / "many")
    assert [path.name for path in paths] == [f"{kind}-{number}" for kind, number in wanted]
    one_by_one = [make(kind, number, base, 0, tmp_path / "one") for kind, number in wanted]
    digests = [[Intervention.load(path).digest for path in some] for some in (paths, one_by_one)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(wanted)


@pytest.mark.parametrize("hidden", [64, 768, 100])
def test_rotations_are_orthonormal_and_differ_between_layers(hidden: int, base: Fingerprint) -> None:
    wide = replace(base, hidden_size=hidden)
    rotate = KINDS["loreft"](wide, torch.Generator().manual_seed(1)).tensors["rotate"][0]
    torch.testing.assert_close(rotate @ rotate.mT, torch.eye(RANK).expand(base.num_layers, RANK, RANK))
    used = hidden // RANK * RANK
    assert bool(rotate[..., :used].all()), "none of what may be used is left out"
    assert len({layer.numpy().tobytes() for layer in rotate}) == base.num_layers


def test_artifacts_edit_what_they_say(base: Fingerprint, tmp_path: Path) -> None:
    made = {kind: Intervention.load(make(kind, 0, base, 0, tmp_path)) for kind in KINDS}
    assert len(made["lofit"].tensors["offsets"]) == round(0.1 * 5 * 4)
    every = tuple(range(5))
    assert all(made[kind].method.layers == every for kind in ("head-per-layer", "direction", "loreft"))
    assert made["loreft"].tensors["rotate"].shape == (1, 5, RANK, 64)
    assert {kind: str(one.positions) for kind, one in made.items() if str(one.positions) != "all"} == {
        "loreft": "f7+l7"
    }
    assert all(bool(torch.isfinite(tensor).all()) for one in made.values() for tensor in one.tensors.values())


def test_the_engine_serves_the_artifacts_and_no_higher_rank(base: Fingerprint, tmp_path: Path) -> None:
    config = SteerConfig.from_dict(limits(300, low_rank=True))
    assert (config.additive_rows, config.low_rank_rows, config.max_rank) == (300, 300, RANK)
    for kind in KINDS:
        check_fit(Intervention.load(make(kind, 0, base, 0, tmp_path)), base, config, kind)
    assert SteerConfig.from_dict(limits(1, low_rank=False)).low_rank_sites == ()


@pytest.mark.parametrize("distinct", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.kinds])
def test_each_request_asks_for_what_is_made(name: str, distinct: int) -> None:
    case = Case(LOADS[0], MODES[name], distinct)
    made = {f"{kind}-{number}" for kind, number in case.artifacts()}
    asked = case.interventions()
    assert asked is not None
    assert case.adapters() is None
    assert [len(items) for items in asked] == [len(case.mode.kinds)] * 3
    assert {item["name"] for items in asked for item in items} == made
    assert len(made) == len(case.mode.kinds) * distinct
    assert {item.get("positions") for items in asked for item in items} == {case.mode.positions}


def test_modes_that_do_not_steer_call_vllm_as_it_is() -> None:
    for name in ("plain", "control", "idle", "idle-additive", "eager"):
        case = Case(LOADS[0], MODES[name], 0)
        assert case.interventions() is None
        assert case.adapters() is None
    assert Case(LOADS[0], MODES["lora"], 2).adapters() == [0, 1, 0]


def test_choosing_modes() -> None:
    assert [mode.name for mode in choose("idle", quick=False)] == ["plain", "idle"]
    assert {mode.name for mode in choose(None, quick=False)} == set(MODES) - {"lora", "eager"}
    assert not {CONTROL, ADDITIVE, LORA, EAGER} & {mode.engine for mode in choose(None, quick=True)}
    assert choose("control", quick=True)[-1].engine == CONTROL
    assert MODES["plain"].engine == PLAIN
    with pytest.raises(BenchmarkInvalid, match="no-such"):
        choose("idle,no-such", quick=False)


def test_cases_for_numbers_of_distinct_interventions() -> None:
    modes = choose("shared-offsets,distinct-offsets,lora", quick=False)
    loads = (Load(16, 32, 64), Load(2, 32, 64))
    assert [case.key for case in cases(modes, loads, (1, 8, 64))] == [
        ("decode 16", "plain", 0),
        ("decode 16", "shared-offsets", 1),
        *(("decode 16", "distinct-offsets", count) for count in (1, 8, 16)),
        *(("decode 16", "lora", count) for count in (1, 8, 16)),
        ("decode 2", "plain", 0),
        ("decode 2", "shared-offsets", 1),
        *(("decode 2", "distinct-offsets", count) for count in (1, 2)),
        *(("decode 2", "lora", count) for count in (1, 2)),
    ]
    assert [case.distinct for case in cases(modes, loads, None)] == [0, 1, 16, 16, 0, 1, 2, 2]


def test_the_adapter_fits_every_projection(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_adapter(SMALL.shape, "bfloat16", 0, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**vars(SMALL.shape)))
    linear = {f"base_model.model.{name}": one for name, one in model.named_modules() if name.endswith("_proj")}
    assert set(tensors) == {f"{name}.lora_{letter}.weight" for name in linear for letter in "AB"}
    for name, one in linear.items():
        assert tensors[f"{name}.lora_A.weight"].shape == (RANK, one.in_features)
        assert tensors[f"{name}.lora_B.weight"].shape == (one.out_features, RANK)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted({name.split(".")[-1] for name in linear}) == config["target_modules"]


def test_workload() -> None:
    assert SMALL.prompts(LOADS[0]) == SMALL.prompts(LOADS[0]) != SMALL.prompts(Load(3, 33, 64))
    assert [len(prompt) for prompt in SMALL.prompts(LOADS[0])] == [32] * 3
    assert [load.name for load in LOADS] == ["decode 3", "prefill 1x100"]
    assert (SMALL.requests, SMALL.context) == (3, 128)
    assert Workload(shape=SMALL.shape, loads=(Load(256, 512, 256),)).step_tokens == 8192
    assert Workload(shape=SMALL.shape, loads=(Load(2, 8192, 1), LOADS[0])).step_tokens == 16384


def test_the_kv_cache_holds_the_largest_load() -> None:
    gpu = Workload(shape=SHAPES["8b"], loads=(Load(256, 512, 256), Load(1, 8192, 1)), dtype="bfloat16")
    token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, their size, bytes
    assert gpu.kv_bytes(16) >= 256 * (768 + 1) * token
    assert gpu.kv_bytes(16) < 1.2 * 256 * 768 * token, "several engines share a GPU"
    assert gpu.kv_bytes(64) >= 256 * (768 + 64) * token
    assert gpu.context == 65 * 128
    one = Workload(shape=SHAPES["8b"], loads=(Load(1, 8192, 1),), dtype="bfloat16")
    assert one.kv_bytes(16) >= one.context * token


def test_shapes_are_those_of_the_models() -> None:
    transformers = pytest.importorskip("transformers")
    for name, (least, most) in {"100m": (95e6, 110e6), "1b": (1.4e9, 1.6e9), "8b": (8.0e9, 8.1e9)}.items():
        shape = SHAPES[name]
        config = transformers.LlamaConfig(**vars(shape), tie_word_embeddings=False)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
        assert least < shape.parameters < most
