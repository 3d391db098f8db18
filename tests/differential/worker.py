"""The engine's process: plays cases, one JSON line in, one out, over the two file descriptors it is given.

A process, because what vLLM is (runner, Triton, plugins) is decided by its environment when it is imported. The engine
is stepped by hand, so that what happens at step t happens there every time the engine core is in this process. It
checks nothing: it reports what was asked, bound, refused and served.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from steer_vllm import LLM
from steer_vllm.errors import SteerError
from steer_vllm.plan import Content, nominal_contents
from steer_vllm.request import EXTRA_ARG, Steering, bind, parse

IDLE_STEPS, IDLE_SECONDS = 2000, 60.0
"""Steps without an output, and their time, after which a case is given up. A grammar is compiled beside the steps."""


class Player:
    """Plays one case on an engine that is left as it was found."""

    def __init__(self, llm: LLM, case: dict[str, Any], folders: list[str]) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.case = case
        self.folders = folders
        self.results: list[dict[str, Any]] = [{} for _ in case["requests"]]
        self.asked: dict[int, Any] = {}  # what requests in flight need of the tables
        self.deadlines: dict[int, int] = {}

    def play(self) -> dict[str, Any]:
        for number, folder in enumerate(self.folders):
            self.llm.load_intervention(f"a{number}", folder)
        changes = sorted(self.case["changes"], key=lambda change: change["at"])
        waiting = sorted(range(len(self.results)), key=lambda i: self.case["requests"][i]["at"])
        step = idle = 0
        last = time.monotonic()
        while changes or waiting or self.asked:
            while changes and changes[0]["at"] <= step:
                self._change(changes.pop(0))
            while waiting and self.case["requests"][waiting[0]]["at"] <= step:
                self._enter(waiting.pop(0), step)
            for number in [number for number, at in self.deadlines.items() if at <= step]:
                self._abort(number)
            if self._step():
                idle, last = 0, time.monotonic()
            idle += 1
            if idle > IDLE_STEPS and time.monotonic() > last + IDLE_SECONDS:
                raise RuntimeError(f"no output for {IDLE_STEPS} steps; in flight: {sorted(self.asked)}")
            step += 1
        self._settle()
        for result in self.results:
            result["choices"] = [choice for _, choice in sorted(result.get("choices", {}).items())]
        self.llm.load_intervention("last", self.folders[0])  # unloading it frees what was in use at its own unloading
        for entry in self.llm.interventions:
            self.llm.unload_intervention(entry.name)
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("blocks are still in use")
        facts = self.llm._engine._ask("steer_facts")
        return {"results": self.results, "left": [facts["admission"], *facts["ranks"]], "steps": step}

    def _change(self, change: dict[str, Any]) -> None:
        if change["do"] == "reset_cache":
            self.engine.reset_prefix_cache(reset_running_requests=True)  # else nothing happens while one runs
        elif change["do"] == "load":
            self.llm.load_intervention(change["name"], self.folders[change["artifact"]], replace=True)
        elif change["name"] in {entry.name for entry in self.llm.interventions}:
            self.llm.unload_intervention(change["name"])

    def _enter(self, number: int, step: int) -> None:
        request, result = self.case["requests"][number], self.results[number]
        result |= {"prompt": self._prompt(number, request), "choices": {}}
        params = sampling_params(request["params"])
        config = self.llm._facts.config
        try:
            asks = [{key: value for key, value in ask.items() if value is not None} for ask in request["asks"]]
            steering = bind(
                parse(asks),
                self.llm._catalog.get,
                config,
                response_start=request["response_start"],
                scored=params.prompt_logprobs is not None,
            )
            needs = self._needs(steering)
            result["rows"] = [
                len(needs[table].union(*(held[table] for held in self.asked.values()))) for table in (0, 1)
            ]
            if steering is not None:
                params.extra_args = {EXTRA_ARG: steering.to_wire()}
            self.asked[number] = needs
            self.engine.add_request(
                str(number),
                {"prompt_token_ids": result["prompt"]},
                params,
                priority=request["priority"],
            )
        except SteerError as error:
            result["error"], result["message"] = error.code, error.message
            self._forget(number)
            return
        if request["abort_after"] is not None:
            self.deadlines[number] = step + request["abort_after"]

    def _needs(self, steering: Steering | None) -> tuple[set[Content], set[Content]]:
        """What a request needs of the additive and of the low-rank table, as its front can know."""
        if steering is None:
            return set(), set()
        summaries = {entry.digest: entry.summary for entry in self.llm._catalog}
        facts = self.llm._facts
        return nominal_contents(steering.components, summaries, facts.config, facts.largest)

    def _prompt(self, number: int, request: dict[str, Any]) -> list[int]:
        """The prompt's tokens: after the first turn where there is one that has ended."""
        follows = request["prompt"]["follows"]
        turn: list[int] = []
        if follows is not None and follows not in self.asked and self.results[follows].get("choices"):
            earlier = self.results[follows]
            turn = earlier["prompt"] + next(iter(earlier["choices"].values()))["tokens"]
            self.results[number]["turn"] = 2
        room = self.case["model_len"] - request["params"]["max_tokens"] - 1
        return (turn + request["tokens"])[:room]

    def _abort(self, number: int) -> None:
        self.results[number]["aborted"] = True
        self._forget(number)

    def _forget(self, number: int) -> None:
        """Out of the engine, wherever it is."""
        self.engine.abort_request([str(number)])
        self.asked.pop(number, None)
        self.deadlines.pop(number, None)

    def _step(self) -> bool:
        if not self.engine.has_unfinished_requests():
            return False
        outputs = self.engine.step()
        for output in outputs:
            number = int(output.request_id)
            record(output, self.results[number])
            if output.finished:
                self.asked.pop(number, None)
                self.deadlines.pop(number, None)
        return bool(outputs)

    def _settle(self) -> None:
        """Let a step that was scheduled ahead of an abort come back."""
        core = getattr(self.engine.engine_core, "engine_core", None)
        while core is not None and core.batch_queue:
            core.step_with_batch_queue()


def sampling_params(values: dict[str, Any]) -> Any:
    """vLLM's sampling parameters; JSON has no integer keys."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    values = {"logprobs": 0, "ignore_eos": True, **values}
    if "logit_bias" in values:
        values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
    if "regex" in values:
        values["structured_outputs"] = StructuredOutputsParams(regex=values.pop("regex"))
    return SamplingParams(**values)


def record(output: Any, result: dict[str, Any]) -> None:
    """What was served so far. Of several choices an output has those that grew."""
    prompt = output.prompt_logprobs
    result["finished"] = output.finished
    result["cached"] = output.num_cached_tokens
    if prompt is not None:
        scored = zip(prompt[1:], output.prompt_token_ids[1:], strict=True)
        result["prompt_logprobs"] = [at[token].logprob for at, token in scored]
    for made in output.outputs:
        before = len(result["choices"].get(made.index, {"tokens": ()})["tokens"])
        result["drafted"] = result.get("drafted", 0) + max(0, len(made.token_ids) - before - 1)  # a step makes one
        rows = made.logprobs or []
        result["choices"][made.index] = {
            "tokens": list(made.token_ids),
            "text": made.text,
            "logprobs": [at[token].logprob for at, token in zip(rows, made.token_ids, strict=True)],
            "others": [{token: value.logprob for token, value in at.items()} for at in rows],
            "finish": made.finish_reason,
        }


def count_preemptions(llm: LLM) -> list[str]:
    """The requests that the scheduler preempts from now on; stays empty where the scheduler is in another process."""
    preempted: list[str] = []
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None:
        preempt = core.scheduler._preempt_request

        def preempt_and_note(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        core.scheduler._preempt_request = preempt_and_note
    return preempted


def main() -> None:
    reader, writer = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
    start = json.loads(reader.readline())
    llm = LLM(start["model"], steer=start["steer"], **start["llm"])
    preempted = count_preemptions(llm)
    if not start["llm"]["enforce_eager"]:
        # Without generated code vLLM makes its graph for the first batch: one of a single token would be all it can do.
        llm.generate([{"prompt_token_ids": list(range(20, 40))}], sampling_params({"max_tokens": 1}), use_tqdm=False)
        llm.llm_engine.reset_prefix_cache()

    def say(answer: dict[str, Any]) -> None:
        writer.write(json.dumps(answer) + "\n")
        writer.flush()

    say({"ready": True})
    for line in reader:
        job = json.loads(line)
        preempted.clear()
        answer = Player(llm, job["case"], job["folders"]).play()
        say({**answer, "preemptions": len(preempted)})


if __name__ == "__main__":
    main()
