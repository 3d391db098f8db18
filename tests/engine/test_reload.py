"""New weights under running interventions: offsets follow them, and what was made for another base is refused.

Invariant: u = W_o v with the weights that are served, in every step after the call that changed them; an artifact is
served only on the base it was made for. Every answer is checked against transformers with the same weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from steer_vllm import Intervention
from steer_vllm.demo import MODEL_PATH
from steer_vllm.fingerprint import Fingerprint

from . import artifacts, engines, oracle

PROMPT = [20 + (7 * i) % 50 for i in range(40)]
PROJECTION = "o_proj.weight"


def copy_of(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The demo model with other weights."""
    shutil.copytree(MODEL_PATH, folder)
    file = folder / "model.safetensors"
    weights = {name: change(name, tensor) for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    return folder


def unsampled(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Other output projections, but for the row that the fingerprint reads: the same base, by its own account."""
    if not name.endswith(PROJECTION):
        return weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std()
    noise[weight.shape[0] // 2] = 0
    return (weight + noise).to(weight.dtype)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embeddings stay: vLLM's CPU build keeps a packed copy of tied ones, which a reload does not renew."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "first": copy_of(folder / "first", lambda name, weight: weight),
        "twin": copy_of(folder / "twin", unsampled),
        "other": copy_of(folder / "other", lambda name, weight: weight * (1 if "embed" in name else 0.9)),
        "halved": copy_of(folder / "halved", lambda name, weight: weight * (0.5 if name.endswith(PROJECTION) else 1)),
    }


def requests(suffix: str = "") -> list[dict[str, Any]]:
    asks: list[list[dict[str, Any]]] = [
        [{"name": f"lofit{suffix}"}],
        [{"name": f"lofit{suffix}", "scale": -0.5}, {"name": f"direction{suffix}"}],
    ]
    return [{"tokens": PROMPT, "interventions": ask, "params": {"max_tokens": 6}} for ask in [*asks, []]]


def served(suffix: str = "") -> list[dict[str, Any]]:
    """The cache of the former weights is the operator's to forget."""
    return [{"do": "reset"}, {"do": "generate", "requests": requests(suffix)}]


def reload(**kwargs: str) -> dict[str, Any]:
    return {"do": "rpc", "method": "reload_weights", "kwargs": kwargs}


@pytest.mark.parametrize("engine", [engines.V1_ASYNC, engines.V2_ASYNC], ids=lambda engine: engine.name)
def test_new_weights(engine: engines.Engine, models: dict[str, Path], tmp_path: Path) -> None:
    paths = {name: str(path) for name, path in models.items()}
    base, other = Fingerprint.of(models["first"]), Fingerprint.of(models["other"])
    assert Fingerprint.of(models["twin"]) == base != other
    items: dict[str, Intervention] = {"lofit": artifacts.lofit(base, 1), "direction": artifacts.direction(base, 2)}
    items |= {"lofit-other": artifacts.lofit(other, 3), "direction-other": artifacts.direction(other, 4)}
    steps = artifacts.save_all(items, tmp_path / "artifacts")
    lofit, direction, lofit_other, direction_other = steps
    taken = {"do": "rpc", "method": "take_weights", "kwargs": {"file": str(models["halved"] / "model.safetensors")}}
    plan: list[tuple[str, list[dict[str, Any]]]] = [
        ("first", [lofit, direction, *served()]),
        ("first", [reload(), *served()]),
        ("twin", [reload(weights_path=paths["twin"]), *served()]),
        ("other", [reload(weights_path=paths["other"]), lofit, {"do": "generate", "requests": requests()[:1]}]),
        ("other", [lofit_other, direction_other, *served("-other")]),
        ("first", [reload(weights_path=paths["first"]), *served()]),
        ("halved", [taken, *served()]),
        ("halved", [{"do": "rpc", "method": "fail_on_purpose"}, *served(), {"do": "facts"}]),
    ]
    answers = engines.run(
        engine,
        tmp_path / "run",
        models["first"],
        [step for _, part in plan for step in part],
        worker_extension_cls="engine.extension.Trainer",
    )
    given = iter(answers)
    results = [[next(given) for _ in part] for _, part in plan]
    _, refused, (unserved,) = results[3]
    assert refused["error"] == "artifact_invalid"
    assert "weights" in refused["message"]
    assert unserved["finish"] == "error", "the name is still there, the engine refuses"
    failed = results[-1][0]
    assert "on purpose" in failed["message"]
    checked = 0
    for (weights, part), told in zip(plan, results, strict=True):
        model = oracle.load(paths[weights])
        for step, answer in zip(part, told, strict=True):
            if answer is refused or answer is failed or answer == [unserved]:
                continue
            if step["do"] == "reset":
                assert answer is True
            else:
                assert "error" not in answer, (step, answer)
            if step["do"] == "generate":
                checked += 1
                for request, result in zip(step["requests"], answer, strict=True):
                    oracle.check(model, request, result, items)
    assert checked == sum(step["do"] == "reset" for _, part in plan for step in part) == 7
    (facts,) = results[-1][-1]
    assert facts["admission"]["pinned"] == facts["admission"]["additive_rows"] == 0


def test_requests_in_flight(models: dict[str, Path], tmp_path: Path) -> None:
    """Invariant: exactly the intervention asked for, or an error: those whose edits no longer fit end with one."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(models["twin"] / "model.safetensors", bare)  # no config.json: which base it is cannot be read
    base = Fingerprint.of(models["first"])
    (lofit,) = artifacts.save_all({"lofit": artifacts.lofit(base, 1)}, tmp_path / "artifacts")
    asks: list[Any] = [[{"name": "lofit"}], [{"name": "lofit"}], None]
    params = [{"max_tokens": 120}, {"max_tokens": 120, "n": 2, "temperature": 1.0}, {"max_tokens": 120}]
    flying = [
        {"tokens": PROMPT, "interventions": ask, "params": param} for ask, param in zip(asks, params, strict=True)
    ]
    during = {"do": "during", "requests": flying}
    generate = {"do": "generate", "requests": requests()[::2]}
    answers = engines.run(
        engines.V1_ASYNC,
        tmp_path / "run",
        models["first"],
        [
            lofit,
            {**during, "steps": [reload(weights_path=str(models["first"]))]},
            {**during, "steps": [reload(weights_path=str(models["other"]))]},
            reload(weights_path=str(models["first"])),
            {**during, "steps": [reload(weights_path=str(bare)), {**lofit, "name": "late"}, generate]},
            reload(weights_path=str(models["first"])),
            {"do": "reset"},
            generate,
            {"do": "facts"},
        ],
    )
    _, same, other, _, unknown, _, _, generated, (facts,) = answers
    assert [answer["finish"] for answer in same["requests"]] == ["length"] * 3
    for answer in (other, unknown):
        assert [one["finish"] for one in answer["requests"]] == ["error", "error", "length"]
    failed, late, refused = unknown["steps"]
    assert "config.json" in failed["message"]
    assert late["error"] == "engine_unavailable"
    assert [answer["finish"] for answer in refused] == ["error", "length"]
    model = oracle.load(str(models["first"]))
    for request, result in zip(requests()[::2], generated, strict=True):
        oracle.check(model, request, result, {"lofit": artifacts.lofit(base, 1)})
    assert facts["admission"]["pinned"] == facts["admission"]["additive_rows"] == 0
