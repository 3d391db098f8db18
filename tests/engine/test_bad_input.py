"""Bad artifacts and bad requests: a clear error each, the engine alive, the others' answers untouched.

DESIGN: a request gets exactly the intervention it asked for, or an error. One engine; after every bad step the same
batch must give the same answers as before it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from steer_vllm import Intervention
from steer_vllm.artifact import CONFIG, TENSORS
from steer_vllm.demo import MODEL_PATH
from steer_vllm.edit import Site
from steer_vllm.fingerprint import Fingerprint
from steer_vllm.methods import Direction
from steer_vllm.request import Steering
from steer_vllm.segments import Component

from . import artifacts, engines

PROMPT = [20 + (7 * i) % 50 for i in range(24)]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A fault in the tensor file."""

    def spoil(folder: Path) -> None:
        content = safetensors.torch.load_file(folder / TENSORS)
        change(content)
        safetensors.torch.save_file(content, folder / TENSORS)

    return spoil


def config(**values: Any) -> Callable[[Path], None]:
    """A fault in the config file."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **values}))

    return spoil


def truncate(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


def symlink(folder: Path) -> None:
    shutil.move(folder / TENSORS, folder / "elsewhere")
    (folder / TENSORS).symlink_to(folder / "elsewhere")


BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (tensors(lambda t: t["offsets"].fill_(math.nan)), "NaN"),
    "infinite": (tensors(lambda t: t["offsets"][0].fill_(math.inf)), "NaN or infinite"),
    "shape": (tensors(lambda t: t.update(offsets=torch.zeros(3, 5))), "shape"),
    "missing": (tensors(lambda t: t.update(vectors=t.pop("offsets"))), "missing"),
    "changed": (tensors(lambda t: t["offsets"].add_(0.5)), "sha256"),
    "truncated": (truncate, "truncated"),
    "symlink": (symlink, "symlink"),
    "method": (config(method="telepathy"), "telepathy"),
    "unknown-field": (config(colour="red"), "colour"),
    "layer": (config(settings={"heads": [[0, 0], [0, 1], [99, 0]]}), "99"),
    "head": (config(settings={"heads": [[0, 0], [0, 1], [1, 99]]}), "99"),
}


def requests() -> list[dict[str, Any]]:
    """The batch that must not change."""
    asks: list[Any] = [None, [{"name": "good"}], [{"name": "good", "scale": -0.5}]]
    return [{"tokens": PROMPT[i:], "interventions": ask, "params": {"max_tokens": 8}} for i, ask in enumerate(asks)]


def bad_requests() -> dict[str, tuple[dict[str, Any], str]]:
    """A step of the driver and the code of its error."""

    def ask(*asks: Any, **params: Any) -> dict[str, Any]:
        request = {"tokens": PROMPT, "interventions": list(asks), "params": {"max_tokens": 4, **params}}
        return {"do": "generate", "steered": True, "requests": [*requests(), request]}

    good = {"name": "good"}
    return {
        "unknown name": (ask({"name": "nobody"}), "model_not_found"),
        "scale NaN": (ask({**good, "scale": math.nan}), "scale_out_of_range"),
        "scale 1e308": (ask({**good, "scale": 1e308}), "scale_out_of_range"),
        "scale above the limit": (ask({**good, "scale": 9}), "scale_out_of_range"),
        "scale as text": (ask({**good, "scale": "1"}), "invalid_intervention"),
        "unknown key": (ask({**good, "strength": 2}), "invalid_intervention"),
        "unknown positions": (ask({**good, "positions": "everywhere"}), "invalid_intervention"),
        "untied positions on a tied artifact": (ask({**good, "positions": "f1+l1/untied"}), "invalid_intervention"),
        "too many": (ask(*[good] * 5), "too_many_interventions"),
        "too much rank": (ask({"name": "wide-0"}, {"name": "wide-1"}), "too_many_interventions"),
        "scored text": (ask({**good, "positions": "response"}, prompt_logprobs=1), "unsupported_with_intervention"),
        "beam search": ({"do": "beam", "tokens": PROMPT, "interventions": [good]}, "unsupported_with_intervention"),
        "overflow": (ask({"name": "huge", "scale": 8}), "scale_out_of_range"),
        "name taken": ({"do": "load", "name": "good", "folder": "{wide-0}"}, "artifact_exists"),
        "bad name": ({"do": "load", "name": "../good", "folder": "{good}"}, "invalid_intervention"),
        "unload unknown": ({"do": "unload", "name": "nobody"}, "model_not_found"),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bad")
    base = Fingerprint.of(MODEL_PATH)
    good = artifacts.lofit(base, 1)
    huge = artifacts.direction(base, 5, strength=1e38)
    family = {
        "good": good,
        "wide-0": artifacts.loreft(base, 2, "f1+l1", rank=9),
        "wide-1": artifacts.loreft(base, 3, "f1+l1", rank=9),
        "huge": huge,
    }
    job: list[dict[str, Any]] = artifacts.save_all(family, folder)
    titles: list[str] = [f"load {name}" for name in family]

    def add(title: str, step: dict[str, Any]) -> None:
        if "folder" in step:
            step = {**step, "folder": step["folder"].format(**{name: str(folder / name) for name in family})}
        job.append(step)
        titles.append(title)
        job.append({"do": "generate", "steered": True, "requests": requests()})
        titles.append(f"after {title}")

    add("nothing", {"do": "facts"})
    for name, (spoil, _) in BAD_FILES.items():
        good.save(folder / "bad" / name)
        spoil(folder / "bad" / name)
        add(name, {"do": "load", "name": "bad", "folder": str(folder / "bad" / name)})
    other = replace(good, base=replace(base, weights="0" * 64))
    other.save(folder / "bad" / "other-base")
    add("other-base", {"do": "load", "name": "bad", "folder": str(folder / "bad" / "other-base")})
    mlp = Intervention(
        Direction((0,), 1.0, Site.MLP_OUTPUT), {"directions": torch.ones(1, base.hidden_size)}, base, good.positions
    )
    mlp.save(folder / "bad" / "no-table")
    add("no-table", {"do": "load", "name": "bad", "folder": str(folder / "bad" / "no-table")})
    add("absent", {"do": "load", "name": "bad", "folder": str(folder / "nowhere")})
    for title, (step, _) in bad_requests().items():
        add(title, step)
    wires = [
        None,
        Steering((Component("f" * 64, 1.0, good.positions),)).to_wire(),
        Steering((Component(good.digest, 1.0, good.positions),)).to_wire(),
        '{"components": "all of them"}',
        Steering((Component(good.digest, 1.0, good.positions),), response_start=999).to_wire(),
    ]
    add("forged", {"do": "forged", "prompts": [PROMPT] * len(wires), "extra_args": wires})
    add("facts", {"do": "facts"})
    answers = engines.run(engines.V1_PROCESSES, folder / "run", MODEL_PATH, job, enable_prefix_caching=False)
    return dict(zip(titles, answers, strict=True))


@pytest.mark.parametrize("name", [*BAD_FILES, "other-base", "no-table", "absent"])
def test_bad_artifact_is_refused(run: dict[str, Any], name: str) -> None:
    assert run[name]["error"] == "artifact_invalid", run[name]
    expected = {"other-base": "another base model", "no-table": "mlp_output", "absent": "No such file"}
    assert (expected.get(name) or BAD_FILES[name][1]) in run[name]["message"]


@pytest.mark.parametrize("title", bad_requests())
def test_bad_request_is_refused(run: dict[str, Any], title: str) -> None:
    assert run[title].get("error") == bad_requests()[title][1], run[title]


def test_core_refuses_what_the_front_never_saw(run: dict[str, Any]) -> None:
    base, unknown, good, malformed, behind = run["forged"]
    assert [unknown["finish"], malformed["finish"], behind["finish"]] == ["error"] * 3
    assert base["finish"] == good["finish"] == "length"
    before = run["after nothing"]
    assert good["logprobs"] != base["logprobs"]
    assert base["tokens"] == before[0]["tokens"]


def test_others_are_untouched(run: dict[str, Any]) -> None:
    expected = [answer["tokens"] for answer in run["after nothing"]]
    assert len({tuple(tokens) for tokens in expected}) == 3
    for title, answers in run.items():
        if title.startswith("after "):
            assert [answer["tokens"] for answer in answers] == expected, title


def test_nothing_is_left_behind(run: dict[str, Any]) -> None:
    held = run["facts"]["admission"]
    assert held["pinned"] == held["additive_rows"] == held["low_rank_rows"] == 0
    assert len(held["loaded"]) == 4
    assert all(rank["loaded"] == held["loaded"] for rank in run["facts"]["ranks"])
