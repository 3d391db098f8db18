"""An engine in a process of its own, which runs batches and says when each decode step of them ended.

Run as `python -m steer_vllm.engine.probe FD`, FD being one end of a socket on which requests and answers are lines of
JSON. An engine that is to let others work answers that it waits, and goes on when it is told to. It measures and
compares nothing; whether the plugin is in it is said by the caller (and by VLLM_PLUGINS).
"""

from __future__ import annotations

import json
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

GO_ON = {"call": "go on"}
"""What an engine that waits is told."""

Steps = list[tuple[float, list[str]]]
"""When each ended, and the requests for which it brought a token."""


class Probe:
    """One engine. Times are of the engine core's clock, which is the machine's monotonic one.

    wait: says that the engine waits, and comes back when it is to go on.
    """

    def __init__(self, wait: Callable[[], None], *, steered: bool, **arguments: Any) -> None:
        import vllm
        from vllm.config import CompilationMode
        from vllm.platforms import current_platform

        from .llm import LLM

        self._llm = LLM(**arguments) if steered else vllm.LLM(**arguments)
        core: Any = self._llm.llm_engine.engine_core
        self._stretches: list[Steps] = [[]]
        self._wait = wait
        self._share: int | None = None
        self._requests = 0
        core.get_output = self._noting(core.get_output)
        config = self._llm.llm_engine.vllm_config
        self._caches: bool = config.cache_config.enable_prefix_caching
        self.facts = {
            "vllm": vllm.__version__,
            "device": current_platform.get_device_name(),
            "compiled": config.compilation_config.mode != CompilationMode.NONE,  # vLLM itself may decide so
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "model_runner": 2 if config.use_v2_model_runner else 1,
        }

    def load(self, folders: dict[str, str]) -> dict[str, Any]:
        """Load artifact folders by name."""
        for name, folder in folders.items():
            self._llm.load_intervention(name, folder)
        return {}

    def run(
        self, prompts: list[list[int]], tokens: int, repeats: int = 1, share: int | None = None, **asked: Any
    ) -> dict[str, Any]:
        """Generate exactly `tokens` for each prompt, greedily, `repeats` times with nothing in the prefix cache.

        share: after so many steps with all requests the engine waits, and again after as many more; it needs to be in
        this process (VLLM_ENABLE_V1_MULTIPROCESSING=0). asked: as `_prepared` takes it. runs: for each repeat,
        `decode`, when each step ended in which every request decoded, after the one that brought the last first token,
        a list for each stretch without a wait; and `first_tokens`, seconds from the call of the engine until then.
        tokens: what was generated last, per prompt.
        """
        runs = []
        for _ in range(repeats):
            generate = self._prepared(prompts, tokens, **asked)
            self._share, self._requests = share, len(prompts)
            began = time.monotonic()
            try:
                generated = generate()
            finally:
                self._share = None
            decode = _decoding(self._stretches, len(prompts))
            runs.append({"decode": decode, "first_tokens": decode[0][0] - began})
        return {"runs": runs, "tokens": generated}

    def profile(self, prompts: list[list[int]], steps: int, **asked: Any) -> dict[str, Any]:
        """What a decode step launches: kernels and copies on a GPU, operators on a CPU, by PyTorch's profiler.

        Two runs are profiled, one of `steps` decode steps more than the other; what it has more are its last launches.
        Needs the engine in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0). launches: by name, how many and their
        microseconds, both per step.
        """
        self._prepared(prompts, 2 + steps, **asked)()
        short, long = (self._profiled(prompts, 2 + more, **asked) for more in (0, steps))
        launches = {name: took[len(short.get(name, ())) :] for name, took in long.items()}
        return {"launches": {name: [len(took) / steps, sum(took) / steps] for name, took in launches.items() if took}}

    def _profiled(self, prompts: list[list[int]], tokens: int, **asked: Any) -> dict[str, list[float]]:
        """Microseconds of every launch, by name, in the order of their beginning."""
        import torch
        from torch.profiler import ProfilerActivity

        cuda = torch.cuda.is_available()
        generate = self._prepared(prompts, tokens, **asked)
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
            generate()
            if cuda:
                torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for event in sorted(profiled.events(), key=lambda one: one.time_range.start):
            if event.device_type.name == ("CUDA" if cuda else "CPU") and not event.is_user_annotation:
                took = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
                found.setdefault(event.name, []).append(took)
        return found

    def _prepared(
        self,
        prompts: list[list[int]],
        tokens: int,
        interventions: list[Any] | None = None,
        adapters: list[tuple[int, str]] | None = None,
    ) -> Callable[[], list[list[int]]]:
        """What generates once, with nothing in the prefix cache, and returns the tokens per prompt.

        adapters: number and folder of each request's LoRA.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        more: dict[str, Any] = {} if interventions is None else {"interventions": interventions}
        if adapters is not None:
            more["lora_request"] = [LoRARequest(f"adapter-{n}", n + 1, folder) for n, folder in adapters]
        if self._caches:
            self._empty_cache()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._stretches = [[]]
        asked = [{"prompt_token_ids": ids} for ids in prompts]

        def generate() -> list[list[int]]:
            outputs = self._llm.generate(asked, params, use_tqdm=False, **more)
            return [list(output.outputs[0].token_ids) for output in outputs]

        return generate

    def _empty_cache(self) -> None:
        """Errors: `RuntimeError`. Blocks may be freed a moment after their request's last output."""
        for _ in range(100):
            if self._llm.reset_prefix_cache():
                return
            time.sleep(0.02)
        raise RuntimeError("the prefix cache could not be emptied")

    def _noting(self, get_output: Callable[[], Any]) -> Callable[[], Any]:
        def noted() -> Any:
            outputs = get_output()
            ids = [output.request_id for output in outputs.outputs if output.new_token_ids]
            if ids:
                self._stretches[-1].append((outputs.timestamp, ids))
                self._let_others()
            return outputs

        return noted

    def _let_others(self) -> None:
        """Wait, if the engine has had its share of steps."""
        if self._share is not None:
            whole = sum(len(ids) == self._requests for _, ids in self._stretches[-1])
            if whole == self._share:
                self._wait()
                self._stretches.append([])


def _decoding(stretches: list[Steps], requests: int) -> list[list[float]]:
    """When each step ended in which all of so many requests decoded; the first brought the last first token."""
    seen: set[str] = set()
    decoding: list[list[float]] = []
    for steps in stretches:
        ends: list[float] = []
        for ended, ids in steps:
            if len(seen) == requests == len(ids):
                ends.append(ended)
            elif len(seen) < requests:
                seen.update(ids)
                if len(seen) == requests:
                    ends.append(ended)
        if ends:
            decoding.append(ends)
    return decoding


def main() -> None:
    """Answer requests until the other end closes. A failed request is answered with its error; the process stays."""
    with socket.socket(fileno=int(sys.argv[1])) as end, end.makefile("rw") as lines:
        end.set_inheritable(False)
        probe: Probe | None = None

        def say(answer: dict[str, Any]) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        def wait() -> None:
            say({"waits": True})
            line = lines.readline()
            if not line:
                sys.exit("nobody is there any more")
            if json.loads(line) != GO_ON:
                raise RuntimeError(f"waits to go on and was asked {line}")

        for line in lines:
            request = json.loads(line)
            try:
                if probe is None:
                    probe = Probe(wait, **request)
                    answer = probe.facts
                else:
                    answer = getattr(probe, request.pop("call"))(**request)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            say(answer)


if __name__ == "__main__":
    main()
