"""As `async_driver.py`, for what a sampler can be asked: all choices, with the log-probabilities of all tokens."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from engine import async_driver
from steer_vllm.errors import SteerError
from steer_vllm.request import EXTRA_ARG, bind, parse


class Steps(async_driver.Steps):
    """A request's "cancel_after": tokens after which its reader goes away, 0 before the first. "stream": its prompt
    arrives in pieces."""

    async def generate(self, request: dict[str, Any]) -> Any:
        values = {"logprobs": 0, "ignore_eos": True, **request.get("params", {})}
        if "structured_outputs" in values:
            values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
        if "logit_bias" in values:
            values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
        facts = await self.engine.facts()
        asks = parse(request.get("interventions") or [])
        steering = bind(asks, self.catalog.get, facts.config, response_start=request.get("response_start"))
        extra = {EXTRA_ARG: steering.to_wire()} if steering else None
        params = SamplingParams(**values, extra_args=extra, output_kind=RequestOutputKind.CUMULATIVE)
        prompt = pieces(request["tokens"]) if request.get("stream") else {"prompt_token_ids": request["tokens"]}
        try:
            answers = self.llm.generate(prompt, params, str(uuid.uuid4()), priority=request.get("priority", 0))
        except SteerError as error:
            return {"error": error.code, "message": error.message}
        cancel = request.get("cancel_after")
        if cancel == 0:
            reader = asyncio.ensure_future(anext(answers))
            await asyncio.sleep(0.01)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            return {"cancelled": True}
        output: Any = None
        newest: dict[int, Any] = {}  # an output has the choices that have grown, which need not be all of them
        async for output in answers:
            newest |= {made.index: made for made in output.outputs}
            if cancel and len(output.outputs[0].token_ids) >= cancel:
                await answers.aclose()
                break
        scored = output.prompt_logprobs
        return {
            "choices": [choice(newest[number]) for number in sorted(newest)],
            "cached": output.num_cached_tokens,
            "prompt_logprobs": scored and logprobs(scored[1:], output.prompt_token_ids[1:]),
        }


def choice(made: Any) -> dict[str, Any]:
    return {
        "tokens": list(made.token_ids),
        "logprobs": logprobs(made.logprobs, made.token_ids),
        "text": made.text,
        "finish": made.finish_reason,
    }


def logprobs(at: Any, tokens: Any) -> list[float]:
    return [row[token].logprob for row, token in zip(at, tokens, strict=True)]


async def pieces(tokens: list[int]) -> AsyncIterator[StreamingInput]:
    yield StreamingInput(prompt={"prompt_token_ids": tokens[:4]})
    yield StreamingInput(prompt={"prompt_token_ids": tokens[4:]})


if __name__ == "__main__":
    async_driver.Steps = Steps
    answers = asyncio.run(async_driver.main(json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(answers))
