"""Fingerprints: the same model whatever its shards, another one after any change to its weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from core.make import BASE
from safetensors.torch import load_file, save_file

from steer_vllm.errors import ArtifactInvalid
from steer_vllm.fingerprint import Fingerprint

SHAPES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}


def configured(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_of_a_checkpoint(checkpoint: Path) -> None:
    found = Fingerprint.of(checkpoint)
    assert found.weights is not None
    assert len(found.weights) == 64
    assert dataclasses.replace(found, weights=BASE.weights) == BASE
    assert Fingerprint.of(str(checkpoint)) == found


def test_sharding_is_no_difference(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert len(list(checkpoint.glob("*.safetensors"))) == 1
    assert Fingerprint.of(tmp_path) == Fingerprint.of(checkpoint)


def test_every_matrix_is_sampled(checkpoint: Path, tmp_path: Path) -> None:
    """A chat model, which differs everywhere, does not pass for its base model."""
    shutil.copytree(checkpoint, tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    whole, wanted = load_file(file), Fingerprint.of(checkpoint).weights
    matrices = [name for name, tensor in whole.items() if tensor.dim() == 2]
    assert len(matrices) > 15
    for name in matrices:
        tensor = whole[name].clone()
        tensor[tensor.shape[0] // 2, 0] += 1e-3
        save_file({**whole, name: tensor}, file)
        assert Fingerprint.of(tmp_path / "m").weights != wanted, name


def test_names_shapes_and_dtypes_count(tmp_path: Path) -> None:
    configured(tmp_path, **SHAPES)
    seen = set()
    for name, tensor in (
        ("a", torch.ones(4, 4)),
        ("b", torch.ones(4, 4)),
        ("a", torch.ones(6, 4)),
        ("a", torch.ones(4, 4, dtype=torch.bfloat16)),
    ):
        save_file({name: tensor}, tmp_path / "model.safetensors")
        seen.add(Fingerprint.of(tmp_path).weights)
    assert len(seen) == 4


def test_random_weights_have_no_digest(checkpoint: Path, tmp_path: Path) -> None:
    assert Fingerprint.of(checkpoint, weights=False).weights is None
    assert Fingerprint.of(configured(tmp_path, **SHAPES)).weights is None


def test_old_checkpoints(tmp_path: Path) -> None:
    configured(tmp_path, **SHAPES)
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    one = Fingerprint.of(tmp_path)
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert one.weights is not None
    assert Fingerprint.of(tmp_path).weights != one.weights


def test_other_names_of_the_shapes(tmp_path: Path) -> None:
    wanted = Fingerprint(8, 2, 2, 4, 11, None)
    assert Fingerprint.of(configured(tmp_path / "a", **SHAPES)) == wanted
    assert Fingerprint.of(configured(tmp_path / "b", n_embd=8, n_layer=2, n_head=2, vocab_size=11)) == wanted
    assert Fingerprint.of(configured(tmp_path / "c", text_config=SHAPES)) == wanted
    assert Fingerprint.of(configured(tmp_path / "d", **SHAPES, head_dim=None)) == wanted
    assert Fingerprint.of(configured(tmp_path / "e", **SHAPES, head_dim=16)).head_dim == 16
    latent = Fingerprint.of(configured(tmp_path / "f", **SHAPES, head_dim=16, v_head_dim=12))
    assert latent.head_dim == 12, "what a head puts out"


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "{}", '{"hidden_size": "8"}', "\udcff"])
def test_bad_config(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactInvalid, match=r"config\.json"):
        Fingerprint.of(tmp_path)


def test_damaged_weights(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactInvalid, match=file.name):
        Fingerprint.of(tmp_path / "m")


def test_json_round_trip() -> None:
    assert Fingerprint.from_config(json.loads(json.dumps(BASE.to_config())), "here") == BASE


@pytest.mark.parametrize(
    "values",
    [None, [], "x", {}, {**BASE.to_config(), "x": 1}, {**BASE.to_config(), "num_layers": None},
     {**BASE.to_config(), "num_layers": True}, {**BASE.to_config(), "num_layers": 3.0},
     {**BASE.to_config(), "weights": 1}],
)  # fmt: skip
def test_bad_json(values: object) -> None:
    with pytest.raises(ArtifactInvalid, match=r"^here"):
        Fingerprint.from_config(values, "here")


def test_difference_says_what() -> None:
    assert BASE.difference(dataclasses.replace(BASE)) is None
    assert BASE.difference(dataclasses.replace(BASE, num_layers=4, head_dim=9)) == (
        "num_layers 3 against 4, head_dim 8 against 9"
    )
    assert BASE.difference(dataclasses.replace(BASE, weights=None)) == f"weights {BASE.weights} against None"
