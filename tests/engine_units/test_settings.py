"""What vLLM's configuration says: off, on with limits, or not understood."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steer_vllm.config import SteerConfig
from steer_vllm.edit import Site
from steer_vllm.engine.settings import KEY, base_fingerprint, entry, steer_config
from steer_vllm.errors import ArtifactInvalid, StartupRefused


def configured(additional: object) -> Any:
    return SimpleNamespace(additional_config=additional)


@pytest.mark.parametrize("additional", [None, {}, {"other": {"additive_rows": 3}}])
def test_off(additional: object) -> None:
    assert steer_config(configured(additional)) is None


def test_entry_round_trip() -> None:
    config = SteerConfig(additive_rows=3, max_rank=2, additive_sites=(Site.MLP_OUTPUT,), low_rank_rows=0)
    additional = json.loads(json.dumps({KEY: entry(config), "other": 1}))
    assert steer_config(configured(additional)) == config


def test_everything_that_shapes_the_graph_is_in_the_key() -> None:
    """Invariant: what shapes the compiled graph goes into what vLLM hashes, the plugin's graph version included."""
    assert {"version", "additive_rows", "low_rank_rows", "max_rank", "additive_sites", "low_rank_sites"} <= set(
        entry(SteerConfig())
    )


@pytest.mark.parametrize("values", [True, 1, "on", [], [1], {"rows": 3}, {"additive_rows": 0}])
def test_not_understood(values: object) -> None:
    with pytest.raises(StartupRefused, match="steer_vllm settings"):
        steer_config(configured({KEY: values}))


def loaded(folder: Path, load_format: str = "auto", **served: int) -> Any:
    shapes = SimpleNamespace(**{"hidden_size": 8, "num_hidden_layers": 2, **served})
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), revision=None, hf_text_config=shapes),
        load_config=SimpleNamespace(load_format=load_format),
    )


def test_base_fingerprint(tmp_path: Path) -> None:
    shapes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
    (tmp_path / "config.json").write_text(json.dumps(shapes))
    (tmp_path / "model.bin").write_bytes(b"weights")
    assert base_fingerprint(loaded(tmp_path)).weights is not None
    assert base_fingerprint(loaded(tmp_path, "dummy")).weights is None
    with pytest.raises(StartupRefused, match="num_layers 2, served 1"):
        base_fingerprint(loaded(tmp_path, num_hidden_layers=1))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactInvalid, match=r"config\.json"):
        base_fingerprint(loaded(tmp_path))
