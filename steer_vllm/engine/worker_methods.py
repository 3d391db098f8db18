"""The methods that the engine core calls on every rank, by name.

Finds the rank's steering in whichever runner it has; the work is the loader's.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..errors import EngineUnavailable, StartupRefused
from . import adapters, compilation, loader, refusals, sleep
from .answer import Answer, answered
from .settings import base_fingerprint, base_source, steer_config
from .worker import WorkerSteering, found_in

_ASLEEP: Answer = {"state": "busy"}
"""No weights to follow and no tables to write: weights that come are brought by a call that ends here again."""


def install() -> None:
    """Ledger: adds methods to `WorkerBase`, and checks settings in its constructor.

    Why: `collective_rpc` takes the name of a worker method; passing functions would need insecure serialisation. Since
    0.26. Can go when plugins can register worker methods. The constructor is the first place that has the settings and
    the plugin in every process, before weights are loaded.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    loading = (steer_begin, steer_poll, steer_commit, steer_drop, steer_free)
    for method in (*loading, steer_reproject, steer_repack, steer_adapter, steer_base, steer_facts):
        setattr(WorkerBase, method.__name__, method)
    _patch_init(WorkerBase)


def _patch_init(worker_base: Any) -> None:
    init = worker_base.__init__

    @wraps(init)
    def check_and_init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if steer_config(vllm_config) is not None:
            refusals.check(vllm_config)
        init(self, vllm_config, *args, **kwargs)
        if steer_config(vllm_config) is not None and vllm_config.model_config.enable_sleep_mode:
            sleep.install(self)

    worker_base.__init__ = check_and_init


def steering_of(worker: Any) -> WorkerSteering:
    """Errors: `StartupRefused` when there is none."""
    found = found_in(worker)
    if found is None:
        raise StartupRefused("a worker runs without steer-vllm: is the plugin allowed by VLLM_PLUGINS?")
    return found


def _awake(worker: Any) -> WorkerSteering:
    """Errors: `EngineUnavailable` while the weights are not in memory: reading them would end the process."""
    steering = steering_of(worker)
    if steering.asleep:
        raise EngineUnavailable("the engine sleeps: wake it up first")
    return steering


def _current(worker: Any) -> WorkerSteering:
    """Errors: `EngineUnavailable` also when weights have changed and it could not be followed up which they are."""
    steering = _awake(worker)
    if steering.stale:
        raise EngineUnavailable("the weights have changed and are not known: reload them")
    return steering


@answered
def steer_begin(self: Any, folder: str, digest: str) -> Answer:
    return loader.begin(_current(self), folder, digest)


@answered
def steer_poll(self: Any, digest: str) -> Answer:
    return loader.poll(steering_of(self), digest)


@answered
def steer_commit(self: Any, digest: str) -> Answer:
    return loader.commit(_current(self), digest)


@answered
def steer_drop(self: Any, digest: str) -> Answer:
    return loader.drop(steering_of(self), digest)


@answered
def steer_free(self: Any, digest: str) -> Answer:
    return loader.free(steering_of(self), digest)


@answered
def steer_adapter(self: Any, lora_request: Any, digest: str) -> Answer:
    return adapters.conflicts(self, _awake(self), lora_request, digest)


@answered
def steer_reproject(self: Any, reloaded: bool) -> Answer:
    """reloaded: the weights were read from their files again."""
    steering, configs = steering_of(self), self.model_runner
    if reloaded:
        steering.base_source = None
    if steering.asleep:
        return _ASLEEP
    return compilation.reproject(steering, base_source(configs), lambda: base_fingerprint(configs))


@answered
def steer_repack(self: Any) -> Answer:
    steering = steering_of(self)
    return _ASLEEP if steering.asleep else compilation.repack(steering)


@answered
def steer_base(self: Any) -> Answer:
    return loader.base(steering_of(self))


@answered
def steer_facts(self: Any) -> Answer:
    runner = "v2" if hasattr(self.model_runner, "model_state") else "v1"
    return {**loader.facts(steering_of(self)), "runner": runner}
