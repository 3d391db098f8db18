"""Runs one offline engine in a process of its own: `python driver.py JOB.json RESULT.json`.

A process, because what vLLM is (runner, Triton, plugins) is decided by its environment when it is imported. The job is
{"model", "plain", "llm": arguments, "steer": limits, "steps": [...]}; the result has one entry per step, and a step
that fails on purpose gives {"error": code, "message"}. The steps are the functions below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> list[Any]:
    if job["plain"]:
        from vllm import LLM

        llm = LLM(job["model"], **job["llm"])
    else:
        import steer_vllm

        llm = steer_vllm.LLM(job["model"], steer=job["steer"], **job["llm"])
    return [attempt(llm, step) for step in job["steps"]]


def attempt(llm: Any, step: dict[str, Any]) -> Any:
    from steer_vllm.errors import SteerError

    try:
        return STEPS[step["do"]](llm, step)
    except SteerError as error:
        return {"error": error.code, "message": error.message}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def load(llm: Any, step: dict[str, Any]) -> Any:
    return llm.load_intervention(step["name"], step["folder"], replace=step.get("replace", False)).to_json()


def unload(llm: Any, step: dict[str, Any]) -> Any:
    llm.unload_intervention(step["name"])
    return {}


def generate(llm: Any, step: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    requests = step["requests"]
    prompts = [prompt(request) for request in requests]
    params = [
        SamplingParams(**{"temperature": 0, "logprobs": 1, "ignore_eos": True, **request.get("params", {})})
        for request in requests
    ]
    more = {"interventions": [request.get("interventions") for request in requests]} if "steered" in step else {}
    if "response_start" in step:
        more["response_start"] = step["response_start"]
    outputs = llm.generate(prompts, params, use_tqdm=False, **of_prompts(requests), **more)
    return [result(output) for output in outputs]


def prompt(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, with pictures by their files; or embeddings, a safetensors file with [tokens, hidden]."""
    if "embeds" in request:
        from safetensors.torch import load_file

        return {"prompt_embeds": load_file(request["embeds"])["embeds"]}
    if "images" not in request:
        return {"prompt_token_ids": request["tokens"]}
    from PIL import Image

    images = [Image.open(path) for path in request["images"]]
    return {"prompt_token_ids": request["tokens"], "multi_modal_data": {"image": images}}


def of_prompts(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """vLLM's arguments with one entry per prompt, where the requests have them."""
    from vllm.lora.request import LoRARequest

    if not any("lora" in request for request in requests):
        return {}
    return {"lora_request": [LoRARequest(**request["lora"]) if "lora" in request else None for request in requests]}


def result(output: Any) -> dict[str, Any]:
    made = output.outputs[0]
    prompt = output.prompt_logprobs
    return {
        "prompt": list(output.prompt_token_ids or ()),
        "tokens": list(made.token_ids),
        "logprobs": [at[token].logprob for at, token in zip(made.logprobs or [], made.token_ids, strict=False)],
        "cached": output.num_cached_tokens,
        "finish": made.finish_reason,
        "prompt_logprobs": prompt
        and [at[token].logprob for at, token in zip(prompt[1:], output.prompt_token_ids[1:], strict=True)],
        "choices": [list(choice.token_ids) for choice in output.outputs],
    }


def beam(llm: Any, step: dict[str, Any]) -> Any:
    from vllm.sampling_params import BeamSearchParams

    llm.beam_search(
        [{"prompt_token_ids": step["tokens"]}],
        BeamSearchParams(beam_width=2, max_tokens=4),
        interventions=step["interventions"],
    )
    return {}


def facts(llm: Any, step: dict[str, Any]) -> Any:
    return llm._engine._ask("steer_facts")


def speculation(llm: Any, step: dict[str, Any]) -> Any:
    """Tokens that were drafted and accepted, since the start."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return [counts[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted")]


def forged(llm: Any, step: dict[str, Any]) -> Any:
    """Requests that never passed the front: one that the core must refuse beside others that it must not touch."""
    from vllm import LLM, SamplingParams

    from steer_vllm.engine import intake

    intake.check = lambda prompt, params: None  # a front that lets everything through
    prompts = [{"prompt_token_ids": tokens} for tokens in step["prompts"]]
    params = [
        SamplingParams(
            temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, extra_args=extra and {"steer_vllm": extra}
        )
        for extra in step["extra_args"]
    ]
    return [result(output) for output in LLM.generate(llm, prompts, params, use_tqdm=False, **of_prompts([step]))]


STEPS = {step.__name__: step for step in (forged, load, unload, generate, facts, beam, speculation)}

if __name__ == "__main__":
    answers = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answers))
