"""What all methods share: the checks before anything is served, and settings that round trip as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from core.make import BASE, direction, lofit, loreft, randn

from steer_vllm import Intervention, Positions
from steer_vllm.errors import ArtifactInvalid
from steer_vllm.methods import METHODS, Direction, LoFiT, LoReFT, method_from_config

EVERY = {"lofit": lofit, "loreft": loreft, "direction": direction}
MAIN = {"lofit": "offsets", "loreft": "weight", "direction": "directions"}


def test_every_method_is_tested_here() -> None:
    own = {name for name, method in METHODS.items() if method.__module__.startswith("steer_vllm.")}
    assert set(EVERY) == own  # other tests register a method of theirs
    assert all(METHODS[name].name == name for name in METHODS)


@pytest.mark.parametrize("name", EVERY)
class TestEvery:
    def test_good_ones_pass(self, name: str) -> None:
        EVERY[name]().check()

    def test_settings_round_trip(self, name: str) -> None:
        method = EVERY[name]().method
        config = json.loads(json.dumps(method.to_config()))
        assert method_from_config(name, config, "here") == method

    def test_layers_and_sites_are_those_it_compiles_to(self, name: str) -> None:
        """Invariant: what the catalog says of an artifact is what the tables get."""
        item = EVERY[name]()
        parts = item.compile(lambda layer, heads: heads[: BASE.hidden_size])
        assert len(parts) == item.method.parts
        places = {place for edits in parts for place in edits}
        assert sorted({place.layer for place in places}) == list(item.method.layers)
        assert {place.site for place in places} == set(item.method.sites)

    def test_unknown_setting(self, name: str) -> None:
        config = {**EVERY[name]().method.to_config(), "colour": 1}
        with pytest.raises(ArtifactInvalid, match="colour"):
            method_from_config(name, config, "here")

    def test_missing_setting(self, name: str) -> None:
        config = EVERY[name]().method.to_config()
        config.popitem()
        with pytest.raises(ArtifactInvalid, match="takes the settings"):
            method_from_config(name, config, "here")

    @pytest.mark.parametrize("config", [None, [], "{}", 3])
    def test_settings_of_another_type(self, name: str, config: object) -> None:
        with pytest.raises(ArtifactInvalid, match="expected an object"):
            method_from_config(name, config, "here")

    @pytest.mark.parametrize(
        "value", [None, True, "x", -1, 1.5, 10**400, [], {}, [[]], [None], ["0"], [True], [-1], [1, 0], [0, 0], [[0]]]
    )
    def test_every_setting_refuses_nonsense(self, name: str, value: object) -> None:
        allowed = [("coefficient", -1), ("coefficient", 1.5), ("tied", True), ("rank", 10**400)]
        config = EVERY[name]().method.to_config()
        for key in config:
            if (key, value) not in allowed or (key == "rank" and value is True):
                with pytest.raises(ArtifactInvalid, match=r"^here"):
                    method_from_config(name, {**config, key: value}, "here")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, name: str, bad: float) -> None:
        item = EVERY[name]()
        item.tensors[MAIN[name]].view(-1)[-1] = bad
        with pytest.raises(ArtifactInvalid, match=f"{MAIN[name]} holds NaN or infinite"):
            item.check()

    def test_wrong_shape(self, name: str) -> None:
        item = EVERY[name]()
        tensors = {**item.tensors, MAIN[name]: item.tensors[MAIN[name]][..., :-1]}
        with pytest.raises(ArtifactInvalid, match="has shape"):
            dataclasses.replace(item, tensors=tensors).check()

    def test_shape_that_only_broadcasts(self, name: str) -> None:
        item = EVERY[name]()
        tensors = {**item.tensors, MAIN[name]: item.tensors[MAIN[name]][None]}
        with pytest.raises(ArtifactInvalid, match="has shape"):
            dataclasses.replace(item, tensors=tensors).check()

    @pytest.mark.parametrize(
        "dtype", [torch.int64, torch.int8, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
    )
    def test_wrong_dtype(self, name: str, dtype: torch.dtype) -> None:
        item = EVERY[name]()
        tensors = {**item.tensors, MAIN[name]: item.tensors[MAIN[name]].to(dtype)}
        with pytest.raises(ArtifactInvalid, match="dtype"):
            dataclasses.replace(item, tensors=tensors).check()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_stored_dtypes(self, name: str, dtype: torch.dtype) -> None:
        item = EVERY[name]()
        tensors = {key: tensor if key == "rotate" else tensor.to(dtype) for key, tensor in item.tensors.items()}
        dataclasses.replace(item, tensors=tensors).check()

    def test_missing_and_extra_tensors(self, name: str) -> None:
        item = EVERY[name]()
        with pytest.raises(ArtifactInvalid, match=f"missing: .*{MAIN[name]}.*unexpected: .*surprise"):
            dataclasses.replace(item, tensors={"surprise": randn(1)}).check()

    def test_layer_beyond_the_model(self, name: str) -> None:
        item = EVERY[name]()
        small = dataclasses.replace(BASE, num_layers=max(item.method.layers))
        with pytest.raises(ArtifactInvalid, match=r"layers .* are not in 0\.\."):
            dataclasses.replace(item, base=small).check("here")

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), True])
    def test_default_scale(self, name: str, scale: float) -> None:
        with pytest.raises(ArtifactInvalid, match="default_scale"):
            dataclasses.replace(EVERY[name](), default_scale=scale).check()

    def test_positions_must_have_as_many_edits(self, name: str) -> None:
        with pytest.raises(ArtifactInvalid, match="need 2 edits"):
            dataclasses.replace(EVERY[name](), positions=Positions.parse("f1+l1/untied")).check()


@pytest.mark.parametrize("name", ["", "LoFiT", "lofit ", None, 1, ["lofit"]])
def test_unknown_methods(name: object) -> None:
    with pytest.raises(ArtifactInvalid, match="is none of lofit, loreft, direction"):
        method_from_config(name, {}, "here")


def test_untied_needs_untied_positions() -> None:
    item = dataclasses.replace(loreft(positions="f2+l2/untied"), positions=Positions("all"))
    with pytest.raises(ArtifactInvalid, match="need 1 edits, loreft has 2"):
        item.check()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LoFiT, {"heads": ()}),
        (LoFiT, {"heads": ((1, 0), (0, 1))}),
        (LoFiT, {"heads": ((0, 1), (0, 1))}),
        (LoFiT, {"heads": ((0, -1),)}),
        (LoFiT, {"heads": ((0, 1, 2),)}),
        (LoFiT, {"heads": ((0, True),)}),
        (LoReFT, {"edited_layers": (), "rank": 2}),
        (LoReFT, {"edited_layers": (2, 0), "rank": 2}),
        (LoReFT, {"edited_layers": (0,), "rank": 0}),
        (LoReFT, {"edited_layers": (0,), "rank": 2.0}),
        (LoReFT, {"edited_layers": (0,), "rank": 2, "tied": "yes"}),
        (Direction, {"edited_layers": (1, 1)}),
        (Direction, {"edited_layers": (0,), "coefficient": float("nan")}),
        (Direction, {"edited_layers": (0,), "coefficient": "2"}),
        (Direction, {"edited_layers": (0,), "site": "somewhere"}),
    ],
)
def test_settings_are_checked_when_made(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        kind(**settings)


def test_identity() -> None:
    """Invariant: one identity, of what it does and nothing else."""
    item = lofit()
    assert isinstance(item, Intervention)
    assert item.digest == lofit().digest
