"""Settings: the file, what overrides it, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer_vllm.config import SteerConfig
from steer_vllm.errors import StartupRefused
from steer_vllm.server.settings import Settings, Source


def write(folder: Path, text: str) -> Path:
    file = folder / "steer.yaml"
    file.write_text(text)
    return file


def test_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        f"""
        model: some/model
        store: {tmp_path}
        limits: {{additive_rows: 7, max_scale: 2, body_mb: 0.5, additive_sites: [block_output]}}
        artifacts: [{{name: honest, source: ./honest}}]
        """,
    )
    settings = Settings.read(file)
    assert settings.model == "some/model"
    assert settings.artifacts == (Source(name="honest", source="./honest"),)
    assert settings.limits.body_bytes == 1 << 19
    assert settings.limits.engine.additive_rows == 7
    assert [site.value for site in settings.limits.engine.additive_sites] == ["block_output"]


def test_defaults_are_the_engines() -> None:
    assert Settings.read(model="m").limits.engine == SteerConfig()


def test_command_line_wins(tmp_path: Path) -> None:
    file = write(
        tmp_path, "{model: a, limits: {additive_rows: 7, low_rank_rows: 3}, artifacts: [{name: x, source: y}]}"
    )
    settings = Settings.read(
        file, model="b", store=None, artifacts=[Source.parse("z=w")], limits={"additive_rows": 9, "max_rank": None}
    )
    assert settings.model == "b"
    assert (settings.limits.additive_rows, settings.limits.low_rank_rows) == (9, 3)
    assert [artifact.name for artifact in settings.artifacts] == ["x", "z"]


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_VLLM_ADMIN_KEY", "secret")
    settings = Settings.read(model="m", api_key="other")
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "secret"
    assert "secret" not in repr(settings)
    assert "other" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{model: m, tenants: {}}", "tenants"),
        ("{model: m, presets: {}}", "presets"),
        ("{model: m, limits: {rows: 1}}", "limits.rows"),
        ("{model: m, limits: {additive_rows: many}}", "limits.additive_rows"),
        ("{model: m, limits: {body_mb: 0}}", "limits.body_mb"),
        ("{model: m, limits: []}", "limits"),
        ("{model: m, artifacts: [{name: a, source: b, pinned: true}]}", "artifacts.0.pinned"),
        ("{model: m, artifacts: [{name: a, source: b}, {name: a, source: c}]}", "given twice: a"),
        ("{model: m, store: /nowhere/at/all}", "store"),
        ("{}", "model"),
        ("[1, 2]", "expected settings"),
        ("model: [", "YAML"),
    ],
)
def test_refused(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(StartupRefused) as refused:
        Settings.read(file)
    assert says in refused.value.message
    assert str(file) in refused.value.message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match=r"nope\.yaml"):
        Settings.read(tmp_path / "nope.yaml")


def test_engine_limits_are_checked() -> None:
    with pytest.raises(StartupRefused, match="max_scale"):
        _ = Settings.read(model="m", limits={"max_scale": -1.0}).limits.engine


@pytest.mark.parametrize("text", ["honest", "=path", "honest=", ""])
def test_artifact_option(text: str) -> None:
    with pytest.raises(StartupRefused, match="NAME=PATH"):
        Source.parse(text)
