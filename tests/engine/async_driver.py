"""Runs one asynchronous engine, as the server has it, in a process of its own.

`python async_driver.py JOB.json RESULT.json`: the job and the results are those of `driver.py`; a request's "rank"
chooses an engine of a data-parallel group. The steps are the methods of `Steps` that begin with `do_`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from engine.driver import result
from steer_vllm import Intervention
from steer_vllm.catalog import Catalog, Entry
from steer_vllm.config import SteerConfig
from steer_vllm.engine.client import AsyncEngine
from steer_vllm.engine.conversation import Call
from steer_vllm.engine.settings import KEY, entry
from steer_vllm.errors import SteerError
from steer_vllm.request import EXTRA_ARG, bind, parse

LONGEST = 120
"""Seconds for anything that is waited for."""


class Steps:
    """What a job can do with an engine."""

    def __init__(self, llm: AsyncLLM, config: SteerConfig) -> None:
        self.llm = llm
        self.config = config
        self.engine = AsyncEngine(llm)
        self.catalog = Catalog()
        self.arriving = 0
        """Requests that have chosen their content and are not yet sent: a server holds it for them."""
        self._add, llm.add_request = llm.add_request, self._sent

    async def _sent(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await self._add(*args, **kwargs)
        finally:
            self.arriving -= 1

    async def free(self, digest: str) -> bool:
        """Once all that arrive are sent."""
        while self.arriving:
            await asyncio.sleep(0.002)
        return await self.engine.unload(digest)

    async def attempt(self, step: dict[str, Any]) -> Any:
        started = time.monotonic()
        try:
            return await getattr(self, f"do_{step['do']}")(step)
        except SteerError as error:
            return {"error": error.code, "message": error.message, "seconds": time.monotonic() - started}
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}

    async def do_load(self, step: dict[str, Any]) -> Any:
        intervention = Intervention.load(step["folder"])
        summary = await self.engine.load(step["folder"], intervention.digest)
        self.catalog.publish(Entry.of(step["name"], step["folder"], intervention, summary))
        return {"digest": intervention.digest}

    async def do_replace(self, step: dict[str, Any]) -> Any:
        """A name gets other content; the former is freed when nobody uses it."""
        before = self.catalog.get(step["name"]).digest
        await self.do_load(step)
        while not await self.free(before):
            await asyncio.sleep(0.02)
        return {}

    async def do_unload(self, step: dict[str, Any]) -> Any:
        """Until it is free, as the server does; "wait": false asks once."""
        digest = self.catalog.withdraw(step["name"]).digest
        while not (freed := await self.free(digest)) and step.get("wait", True):
            await asyncio.sleep(0.02)
        return {"freed": freed}

    async def do_cancelled_load(self, step: dict[str, Any]) -> Any:
        """The caller goes away after some seconds."""
        load = asyncio.create_task(self.do_load(step))
        await asyncio.sleep(step["after"])
        load.cancel()
        done = await asyncio.gather(load, return_exceptions=True)
        return {"ended": type(done[0]).__name__}

    async def do_generate(self, step: dict[str, Any]) -> Any:
        return await asyncio.gather(*(self.generate(request) for request in step["requests"]))

    async def generate(self, request: dict[str, Any], started: asyncio.Event | None = None) -> Any:
        """One request. started: set at the second token."""
        steering = bind(parse(request.get("interventions") or []), self.catalog.get, self.config)
        extra = {EXTRA_ARG: steering.to_wire()} if steering else None
        values = {"temperature": 0, "logprobs": 1, "ignore_eos": True, **request.get("params", {})}
        params = SamplingParams(**values, extra_args=extra)
        prompt = {"prompt_token_ids": request["tokens"]}
        self.arriving += 1
        output = None
        async for output in self.llm.generate(
            prompt, params, str(uuid.uuid4()), data_parallel_rank=request.get("rank")
        ):
            if started is not None and len(output.outputs[0].token_ids) >= 2:
                started.set()
        return result(output)

    async def do_together(self, step: dict[str, Any]) -> Any:
        """Several steps at once; "start" delays one of them."""

        async def one(part: dict[str, Any]) -> Any:
            await asyncio.sleep(part.get("start", 0))
            return await self.attempt(part)

        return await asyncio.gather(*map(one, step["steps"]))

    async def do_rpc(self, step: dict[str, Any]) -> Any:
        """A method of every worker, by name."""
        return await self.llm.collective_rpc(step["method"], kwargs=step.get("kwargs"))

    async def do_reset(self, step: dict[str, Any]) -> Any:
        """Forget the prefix cache."""
        return await self.llm.reset_prefix_cache(reset_running_requests=step.get("running", False))

    async def do_during(self, step: dict[str, Any]) -> Any:
        """Steps while requests run: an answer per step, and one per request; "send" adds requests.

        They begin when every request has its second token, or with "sent" when the engine has them all, though some
        may wait there.
        """
        events = [asyncio.Event() for _ in step["requests"]]
        tasks = [asyncio.create_task(self.generate(*pair)) for pair in zip(step["requests"], events, strict=True)]
        async with asyncio.timeout(LONGEST):
            await (self._all_sent() if "sent" in step else asyncio.gather(*(event.wait() for event in events)))
        answers: list[Any] = []
        for part in step["steps"]:
            if part["do"] == "shutdown":
                answers.append(await self._shutdown(tasks))
            elif part["do"] == "send":
                tasks += [asyncio.create_task(self.generate(request)) for request in part["requests"]]
                await self._all_sent()
                answers.append({})
            elif part["do"] == "cancel":
                answers.append([task.cancel() for task in tasks[:: part.get("every", 1)]])
            else:
                answers.append(await self.attempt(part))
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LONGEST)
        told = [{"raised": type(end).__name__} if isinstance(end, BaseException) else end for end in ended]
        return {"steps": answers, "requests": told}

    async def _all_sent(self) -> None:
        """Requests whose task was created are in the engine."""
        await asyncio.sleep(0)  # they choose their content
        while self.arriving:
            await asyncio.sleep(0.002)
        await self.engine.settle()

    async def _shutdown(self, tasks: list[asyncio.Task[Any]]) -> Any:
        """What is left of the engine, and of the requests once it is gone: who still waits then is told nothing."""
        roots = [psutil.Process(one.pid) for one in self.llm.engine_core.resources.engine_manager.processes]
        family = [process for root in roots for process in (root, *root.children(recursive=True))]
        self.llm.shutdown()
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, 30)
        await asyncio.wait(tasks, timeout=1)
        return {"ended": len(family) - len(alive), "alive": len(alive), "waiting": [task.cancel() for task in tasks]}

    async def do_pause(self, step: dict[str, Any]) -> Any:
        await self.llm.pause_generation(mode=step["mode"], clear_cache=step.get("clear", True))
        return {"paused": await self.llm.is_paused()}

    async def do_resume(self, step: dict[str, Any]) -> Any:
        await self.llm.resume_generation()
        return {"paused": await self.llm.is_paused()}

    async def do_preemptions(self, step: dict[str, Any]) -> Any:
        """How many there were."""
        metrics = [metric for metric in REGISTRY.collect() if metric.name == "vllm:num_preemptions"]
        return sum(sample.value for metric in metrics for sample in metric.samples if sample.name.endswith("_total"))

    async def do_kill(self, step: dict[str, Any]) -> Any:
        """Kill the process of an engine, without a word."""
        manager = self.llm.engine_core.resources.engine_manager
        os.kill(manager.processes[step["engine"]].pid, signal.SIGKILL)
        return {}

    async def do_facts(self, step: dict[str, Any]) -> Any:
        """Of every engine, once everything sent before is done."""
        await self.engine.settle()
        return list((await self.engine._ask(Call("steer_facts"))).values())


async def main(job: dict[str, Any]) -> list[Any]:
    config = SteerConfig.from_dict(job["steer"])
    arguments = AsyncEngineArgs(model=job["model"], additional_config={KEY: entry(config)}, **job["llm"])
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        steps = Steps(llm, config)
        return [await steps.attempt(step) for step in job["steps"]]
    finally:
        llm.shutdown()


if __name__ == "__main__":
    answers = asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(answers))
