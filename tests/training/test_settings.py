"""Settings: defaults, files, flags, and errors that name where a value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer_vllm.errors import UserError
from steer_vllm.training.settings import LEAST_STEPS, DirectionSettings, LoFiTSettings, LoReFTSettings, read_settings


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("rank: 2\nlr: 1e-3\nlayers: [3, 1]\n")
    settings = read_settings(LoReFTSettings, file, {"rank": 8})
    assert (settings.rank, settings.lr, settings.layers, settings.positions) == (8, 1e-3, (1, 3), "f7+l7")


@pytest.mark.parametrize(("text", "layers"), [("all", "all"), ("3,9", (3, 9)), ("9;3", (3, 9)), ("0", (0,))])
def test_layers(text: str, layers: object) -> None:
    assert read_settings(LoReFTSettings, flags={"layers": text}).layers == layers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rnak: 2", r"t\.yaml: rnak: no such setting; there are .*rank"),
        ("rank: 0", r"t\.yaml: rank: .*greater than or equal to 1, got 0"),
        ("rank: many", r"t\.yaml: rank: .*got 'many'"),
        ("layers: [a]", r"t\.yaml: layers: expected a word or layers"),
        ("layers: []", r"t\.yaml: layers: expected a word or layers"),
        ("positions: g3", r"t\.yaml: positions: 'g3' is none of"),
        ("[1, 2]", r"t\.yaml: expected settings by name"),
        ("a: [", r"t\.yaml: cannot be read as YAML"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_settings(LoReFTSettings, file)


def test_errors_name_the_flag() -> None:
    with pytest.raises(UserError, match=r"^--weight-decay: .*got -1"):
        read_settings(LoFiTSettings, flags={"weight_decay": -1})
    with pytest.raises(UserError, match=r"^--coefficient: "):
        read_settings(DirectionSettings, flags={"coefficient": float("nan")})


def test_steps() -> None:
    assert LoFiTSettings().steps(60) == LEAST_STEPS  # small data: more passes than the paper's five
    assert LoFiTSettings().steps(8000) == 5000
    assert LoFiTSettings(accumulation=2).steps(8000) == 2500
    assert LoFiTSettings(epochs=1.5).steps(80) == 15
    assert LoFiTSettings(epochs=5, max_steps=7).steps(80) == 7


def test_head_count() -> None:
    assert LoFiTSettings().count(40) == 4
    assert LoFiTSettings().count(3) == 1
    assert LoFiTSettings(num_heads=3).count(40) == 3
