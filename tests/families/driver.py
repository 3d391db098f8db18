"""Runs several engines one after the other in one process: `python driver.py JOB.json RESULT.json`.

The job is {"plain": bool, "engines": [{"name", "model", "llm", "steer", "steps"}]}; the result one entry per engine:
the answers of its steps, or {"error", "message"} when it did not start. Its steps are the engine tests' and one more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engine.driver import STEPS, attempt


def main(job: dict[str, Any]) -> list[Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    import families.probe  # noqa: F401  registers its method

    answers = []
    for engine in job["engines"]:
        llm = None
        try:
            code = import_model(engine["model"])
            llm = start(engine, job["plain"])
            answers.append({"code": code, "steps": [attempt(llm, step) for step in engine["steps"]]})
        except Exception as error:
            answers.append({"error": type(error).__name__, "message": str(error)})
        del llm
        cleanup_dist_env_and_memory()
    return answers


def ask(llm: Any, step: dict[str, Any]) -> list[Any]:
    """One batch of the requests whose interventions were loaded; None for the others."""
    loaded = {entry.name for entry in llm.interventions} if "steered" in step else None
    kept = [
        loaded is None or loaded >= {ask["name"] for ask in request["interventions"]} for request in step["requests"]
    ]
    requests = [request for request, keep in zip(step["requests"], kept, strict=True) if keep]
    answers = iter(STEPS["generate"](llm, {**step, "requests": requests}))
    return [next(answers) if keep else None for keep in kept]


STEPS["ask"] = ask


def start(engine: dict[str, Any], plain: bool) -> Any:
    if plain:
        from vllm import LLM

        return LLM(engine["model"], **engine["llm"])
    import steer_vllm

    return steer_vllm.LLM(engine["model"], steer=engine["steer"], **engine["llm"])


def import_model(folder: str) -> str:
    """Import the model's class here: vLLM would do so in a process of its own, ten seconds for each new one.

    Returns whose code it is: vLLM's own, or transformers' with vLLM's layers in it.
    """
    from vllm import ModelRegistry

    (name,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    if name not in ModelRegistry.models:
        return "transformers"
    kind = ModelRegistry.models[name].load_model_cls()
    ModelRegistry.register_model(name, kind)
    return "transformers" if ".models.transformers" in kind.__module__ else "vLLM"


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
