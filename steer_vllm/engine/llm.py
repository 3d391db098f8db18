"""`LLM`: vLLM's offline class with interventions per prompt.

A drop-in subclass: without interventions it does what its parent does. It keeps names and checks requests before vLLM
sees them; plans and edits are the engine's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from ..catalog import Catalog, Entry, check_name
from ..config import SteerConfig
from ..errors import EngineUnavailable, InvalidIntervention, NoRows, StartupRefused
from ..fit import check_fit
from ..intervention import Intervention
from ..plan import Summary, nominal_contents
from ..request import EXTRA_ARG, Steering, bind, parse
from ..rows import Content
from . import adapters, plugin
from .client import SyncEngine
from .plain import PlainLLM
from .settings import KEY, entry

Asked = Sequence[Mapping[str, Any]] | None
"""What one prompt asks for: [{"name": ..., "scale": ..., "positions": ...}, ...]; None or empty: the base model."""

_OF_PROMPTS = ("priority", "lora_request")
"""vLLM's arguments that may be lists with one entry per prompt."""

__all__ = ["LLM", "SamplingParams"]


class LLM(PlainLLM):
    """vLLM's `LLM` that can apply interventions.

    steer: limits, a `SteerConfig` or its dict. All other arguments are vLLM's.

        llm = LLM("model")
        llm.load_intervention("honest", "out/honest")
        llm.generate(prompts, params, interventions=[{"name": "honest", "scale": 1.2}])
    """

    def __init__(self, model: str, *, steer: SteerConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        plugin.register()
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None and KEY not in allowed.split(","):
            raise StartupRefused(f"VLLM_PLUGINS={allowed!r} keeps the plugin {KEY} out of the engine: add it")
        config = steer if isinstance(steer, SteerConfig) else SteerConfig.from_dict(steer or {})
        additional = {**(kwargs.pop("additional_config", None) or {}), KEY: entry(config)}
        super().__init__(model, additional_config=additional, **kwargs)
        self._engine = SyncEngine(self.llm_engine)
        self._facts = self._engine.facts()
        self._catalog = Catalog()
        self._leaving: set[str] = set()

    @property
    def interventions(self) -> list[Entry]:
        """What is loaded, by name."""
        return list(self._catalog)

    def load_intervention(self, name: str, folder: str | Path, *, replace: bool = False) -> Entry:
        """Load an artifact folder under a name.

        Errors: `ArtifactInvalid`; `ArtifactExists` when the name points to other content and `replace` is not said;
        `InvalidIntervention` for a name that may not be used; `HostMemoryFull`; `EngineUnavailable` after weights that
        could not be followed up.
        """
        check_name(name)
        path = str(Path(folder).absolute())
        intervention = Intervention.load(path)
        check_fit(intervention, self._engine.base(), self._facts.config, path)
        self._catalog.check_free(name, intervention.digest, replace)
        summary = self._engine.load(path, intervention.digest)
        published = Entry.of(name, path, intervention, summary)
        before = self._catalog.publish(published)
        if before is not None:
            self._free(before.digest)
        return published

    def unload_intervention(self, name: str) -> None:
        """Forget a name, and its content when no other name has it. Errors: `ModelNotFound`."""
        self._free(self._catalog.withdraw(name).digest)

    def _free(self, digest: str) -> None:
        """Free content that no name has; what enqueued requests still use is tried again at the next call."""
        self._leaving.add(digest)
        self._leaving = {one for one in self._leaving if self._catalog.is_unused(one) and not self._engine.unload(one)}

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        interventions: Asked | Sequence[Asked] = None,
        response_start: int | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """vLLM's `generate`; `interventions` is one list for every prompt, or one entry (a list or None) per prompt.

        response_start: where the answers begin in prompts that are scored (prompt_logprobs). Prompts that need more
        table rows than there are run in several waves.
        Errors: those of `request.bind` and `plan.needs`, before anything runs.
        """
        many = prompts if isinstance(prompts, (list, tuple)) and not _is_tokens(prompts) else [prompts]
        return self._steered(super().generate, many, sampling_params, kwargs, interventions, response_start)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        use_tqdm: Any = True,
        lora_request: Any = None,
        *,
        interventions: Asked | Sequence[Asked] = None,
        response_start: int | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """vLLM's `chat`, with interventions as in `generate`, one entry per conversation."""
        many = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        kwargs = {"use_tqdm": use_tqdm, "lora_request": lora_request, **kwargs}
        return self._steered(super().chat, many, sampling_params, kwargs, interventions, response_start)

    def _steered(
        self,
        run: Callable[..., list[Any]],
        prompts: Sequence[Any],
        sampling_params: Any,
        kwargs: dict[str, Any],
        interventions: Asked | Sequence[Asked],
        response_start: int | None,
    ) -> list[Any]:
        if not interventions and response_start is None:
            for one in sampling_params if isinstance(sampling_params, (list, tuple)) else [sampling_params]:
                _with(one, None)
            return run(prompts, sampling_params, **kwargs)
        if not interventions:
            raise InvalidIntervention("response_start says where edits begin, and there are no interventions")
        asked = _per_prompt(interventions, len(prompts))
        params = _params(sampling_params, len(prompts), self.get_default_sampling_params)
        summaries: dict[str, Summary] = {}

        def lookup(name: str) -> Entry:
            entry = self._catalog.get(name)
            summaries[entry.digest] = entry.summary
            return entry

        steerings = [
            bind(
                parse(one),
                lookup,
                self._facts.config,
                response_start=response_start,
                scored=param.prompt_logprobs is not None,
            )
            for one, param in zip(asked, params, strict=True)
        ]
        self._check_adapters(kwargs.get("lora_request"), steerings)
        steered = [_with(param, steering) for param, steering in zip(params, steerings, strict=True)]
        outputs: list[Any] = []
        for wave in self._waves(steerings, summaries):
            own = {name: kwargs[name][wave] for name in _OF_PROMPTS if isinstance(kwargs.get(name), (list, tuple))}
            outputs += self._run(run, prompts[wave], steered[wave], {**kwargs, **own})
        return outputs

    def _check_adapters(self, loras: Any, steerings: Sequence[Steering | None]) -> None:
        """Ask the engine once of each adapter and content that meet on a prompt. Errors: `Unsupported`."""
        per_prompt = list(loras) if isinstance(loras, (list, tuple)) else [loras] * len(steerings)
        meeting = {
            (adapters.identity(lora), lora.load_inplace, component.digest): lora
            for steering, lora in zip(steerings, per_prompt, strict=True)
            for component in (steering.components if steering and lora else ())
        }
        for (_, _, digest), lora in meeting.items():
            self._engine.check_adapter(lora, digest)

    def _run(self, run: Callable[..., list[Any]], prompts: Any, params: Any, kwargs: dict[str, Any]) -> list[Any]:
        """One call of vLLM; what goes wrong in the engine becomes an error and leaves no request behind.

        An engine in another process answers a request it refused with finish reason "error"; one in this process raises
        and would keep the other requests of the call.
        """
        try:
            outputs = run(prompts, params, **kwargs)
        except Exception:
            left = list(self.llm_engine.output_processor.request_states)
            self.llm_engine.abort_request(left, internal=True)
            raise
        failed = [i for i, output in enumerate(outputs) if any(o.finish_reason == "error" for o in output.outputs)]
        if failed:
            raise EngineUnavailable(f"the engine refused prompts {failed}: its log says why")
        return outputs

    def _waves(self, steerings: Sequence[Steering | None], summaries: Mapping[str, Summary]) -> Iterator[slice]:
        """Consecutive prompts whose edits fit the tables together. Errors: `NoRows` for one that never does."""
        config = self._facts.config
        additive: set[Content] = set()
        low_rank: set[Content] = set()
        start = 0
        for i, steering in enumerate(steerings):
            more = self._contents(steering, summaries)
            if len(more[0]) > config.additive_rows or len(more[1]) > config.low_rank_rows:
                raise NoRows(f"prompt {i} needs more table rows than there are")
            if len(additive | more[0]) > config.additive_rows or len(low_rank | more[1]) > config.low_rank_rows:
                yield slice(start, i)
                start, additive, low_rank = i, set(), set()
            additive, low_rank = additive | more[0], low_rank | more[1]
        yield slice(start, len(steerings))

    def _contents(
        self, steering: Steering | None, summaries: Mapping[str, Summary]
    ) -> tuple[set[Content], set[Content]]:
        if steering is None:
            return set(), set()
        return nominal_contents(steering.components, summaries, self._facts.config, self._facts.largest)


def _per_prompt(interventions: Asked | Sequence[Asked], count: int) -> list[Asked]:
    """One entry per prompt. A list of objects is meant for every prompt."""
    if all(isinstance(item, Mapping) for item in interventions or ()):
        return [interventions] * count  # type: ignore[list-item]
    if len(interventions or ()) != count:
        raise InvalidIntervention(f"interventions: {len(interventions or ())} entries for {count} prompts")
    return [item or () for item in interventions or ()]  # type: ignore[misc]


def _params(params: Any, count: int, default: Callable[[], SamplingParams]) -> list[SamplingParams]:
    if params is None:
        params = default()
    many = list(params) if isinstance(params, (list, tuple)) else [params] * count
    if len(many) != count:
        raise InvalidIntervention(f"{len(many)} sampling_params for {count} prompts")
    return many


def _with(params: SamplingParams, steering: Steering | None) -> SamplingParams:
    """The sampling parameters that carry it to the engine."""
    if params is not None and params.extra_args and EXTRA_ARG in params.extra_args:
        raise InvalidIntervention(f"extra_args[{EXTRA_ARG!r}] is reserved: use interventions", param="extra_args")
    if steering is None:
        return params
    carrying = copy.copy(params)
    carrying.extra_args = {**(params.extra_args or {}), EXTRA_ARG: steering.to_wire()}
    return carrying


def _is_tokens(prompts: Sequence[Any]) -> bool:
    """A single prompt given as token ids."""
    return bool(prompts) and isinstance(prompts[0], int)
