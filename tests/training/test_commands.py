"""What a user types: artifacts that load and act, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from steer_vllm import Intervention
from steer_vllm.head_set import HeadSet
from steer_vllm.hf import steered
from steer_vllm.methods import LoFiT, LoReFT
from steer_vllm.training.base import Base, load_base
from steer_vllm.training.commands import app, evaluate

evaluating = typer.Typer()
evaluating.command()(evaluate)


def run(*words: object, on: typer.Typer = app) -> Result:
    return CliRunner().invoke(on, [str(word) for word in words], env={"COLUMNS": "200"})


def done(*words: object, on: typer.Typer = app) -> str:
    result = run(*words, on=on)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


@pytest.fixture(scope="module")
def honest(folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoFiT artifact made by the command."""
    out = tmp_path_factory.mktemp("out") / "honest"
    common = ("--model", folder, "--data", task, "--output-dir", out)
    said = done("lofit", *common, "--eval-data", task, "--max-steps", 40, "--num-heads", 3, "--offset-lr", 0.05)
    assert "LoFiT offsets of 3 of 12 heads" in said
    return out


def test_the_artifact_is_complete(honest: Path, folder: Path) -> None:
    assert {str(path.relative_to(honest)) for path in honest.rglob("*") if path.is_file()} == {
        "intervention_config.json", "intervention.safetensors", "head_set.json", "README.md", "training_log.json",
        "plots/heads.png", "plots/offsets.png",
    }  # fmt: skip
    assert (honest / "plots/heads.png").read_bytes().startswith(b"\x89PNG")
    artifact = Intervention.load(honest)
    assert isinstance(artifact.method, LoFiT)
    assert artifact.method.heads == HeadSet.load(honest).top(3)
    assert artifact.card.base_model == "tiny-llama"
    assert artifact.card.training["max_steps"] == 40
    assert artifact.card.training["offset_lr"] == 0.05
    metrics = artifact.card.metrics
    assert metrics["loss_offsets_last"] < metrics["loss_offsets_first"]
    assert set(metrics["steered"]) == {"items", "exact_match", "mc1", "mc2"}
    assert metrics["steered"]["mc2"] > metrics["base"]["mc2"]
    log = json.loads((honest / "training_log.json").read_text())
    assert set(log) == {"scaling", "offsets"}
    card = (honest / "README.md").read_text()
    for expected in ("# honest", "steer-vllm serve tiny-llama --artifact honest=", artifact.digest, "| mc2 |"):
        assert expected in card


def test_the_artifact_changes_the_model(honest: Path, base: Base) -> None:
    ids = torch.tensor([[1, 4, 6, 7]])
    with torch.no_grad(), steered(base.model, Intervention.load(honest)):
        moved = base.model(ids).logits
    with torch.no_grad():
        assert (moved - base.model(ids).logits).abs().max() > 1e-2


def test_step_two_from_other_heads(honest: Path, folder: Path, task: Path, tmp_path: Path) -> None:
    common = ("--model", folder, "--data", task, "--max-steps", 3)
    done("lofit", *common, "--output-dir", tmp_path / "two", "--head-set", honest, "--num-heads", 2)
    two = Intervention.load(tmp_path / "two")
    assert two.method == LoFiT(HeadSet.load(honest).top(2))
    assert set(json.loads((tmp_path / "two/training_log.json").read_text())) == {"offsets"}
    done("lofit", *common, "--output-dir", tmp_path / "any", "--head-set", "random", "--seed", 9)
    assert Intervention.load(tmp_path / "any").method == LoFiT(HeadSet.random(two.base, 9).top(1))
    assert HeadSet.load(tmp_path / "any").method == "random"
    said = done("heads-compare", tmp_path / "two", tmp_path / "any", "--num-heads", 12)
    assert "100% of the best 12 heads" in said


def test_loreft_from_a_file_of_settings(folder: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("rank: 2\nlayers: [0, 2]\npositions: f2+l2/untied\nmax_steps: 3\n")
    out = tmp_path / "edits"
    common = ("--model", folder, "--data", task, "--output-dir", out)
    done("loreft", *common, "--config", tmp_path / "t.yaml", "--rank", 3)
    artifact = Intervention.load(out)
    assert artifact.method == LoReFT((0, 2), 3, tied=False)
    assert str(artifact.positions) == "f2+l2/untied"
    assert (out / "plots/edits.png").exists()
    first = artifact.digest
    done("loreft", *common, "--config", tmp_path / "t.yaml", "--rank", 3)  # an artifact may be replaced
    assert Intervention.load(out).digest == first  # and the same seed gives the same one


def test_direction_and_evaluate(honest: Path, folder: Path, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "style"
    done("direction", "--model", folder, "--data", task, "--output-dir", out, "--layers", "1", "--coefficient", 3)
    scores = tmp_path / "scores.json"
    common = ("--model", folder, "--data", task, "--output", scores)
    said = done("--artifact", out, "--artifact", honest, *common, on=evaluating)
    assert "steered" in said
    both = json.loads(scores.read_text())
    done("--artifact", out, "--artifact", honest, *common, "--scale", 0, on=evaluating)
    none = json.loads(scores.read_text())
    assert both["base"] == none["base"] == none["steered"]
    assert both["steered"]["mc2"] != both["base"]["mc2"]


def test_head_study(folder: Path, task: Path, tmp_path: Path) -> None:
    said = done(
        "head-study", "--model", folder, "--data", task, "--eval-data", task, "--other-data", task,
        "--output-dir", tmp_path / "study", "--seeds", "1,2", "--counts", 3, "--max-steps", 2,
    )  # fmt: skip
    assert "| other task's | 3 |" in said
    found = json.loads((tmp_path / "study/head_study.json").read_text())
    assert len(found["trials"]) == 2 * 3
    assert found["overlap"]["other task's 3"] == 1.0  # the same data with the same seed
    table = (tmp_path / "study/head_study.md").read_text()
    assert table.count("±") == 2 * 3


def test_wrong_input_is_one_line(honest: Path, folder: Path, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b", "label": 1}\n')
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    model, data, to = ("--model", folder), ("--data", task), ("--output-dir", out)
    for words, message in [
        (("lofit", *model, "--data", bad, *to), f"{bad}:1: label: unknown field"),
        (("lofit", *model, *data, *to, "--num-heads", 13), "--num-heads: 13, the model has 12"),
        (("lofit", *model, *data, *to, "--head-set", tmp_path), "head_set.json: No such file"),
        (("lofit", "--model", tmp_path, *data, *to), "config.json: cannot be read as a model config"),
        (("lofit", "--model", "no/such-model", *data, *to), "'no/such-model' is neither a folder nor a model"),
        (("loreft", *model, *data, *to, "--layers", "7"), "--layers: [7] are not in 0..2"),
        (("loreft", *model, *data, *to, "--dtype", "float16"), "--dtype: "),
        (("loreft", *model, *data, "--output-dir", full), f"{full} holds something other than an artifact"),
        (("loreft", *model, *data, *to, "--eval-data", bad), f"{bad}:1: label"),
        (("heads-compare", honest, tmp_path), "head_set.json: No such file"),
    ]:
        result = run(*words)
        assert result.exit_code == 2, words
        assert "step 1" not in result.stderr  # said before anything is trained
        lines = result.stderr.strip().splitlines()
        assert lines[-1].startswith("error: "), result.stderr
        assert message in lines[-1]
        assert "Traceback" not in result.output
    assert not out.exists()
    assert (full / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["lofit", "loreft", "direction", "heads-compare", "head-study"])
def test_help_has_an_example(command: str) -> None:
    said = done(command, "--help")
    assert f"steer-vllm train {command}" in said


@pytest.mark.parametrize(
    ("method", "data"), [("lofit", "data/mquake/train.jsonl"), ("loreft", "data/truthfulqa/fold_0_train_seed_42.csv")]
)
def test_published_data_on_a_published_model(
    beside: Callable[[str], Path], tmp_path: Path, method: str, data: str
) -> None:
    model, out = beside("models/stories260K-h32-fp32"), tmp_path / "real"
    done(method, "--model", model, "--data", beside(data), "--output-dir", out, "--max-steps", 3)
    artifact = Intervention.load(out)
    assert artifact.card.prompt_format is not None
    real = load_base(str(model))
    assert artifact.base == real.fingerprint
    with torch.no_grad(), steered(real.model, artifact):
        real.model.generate(**real.tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=3)
