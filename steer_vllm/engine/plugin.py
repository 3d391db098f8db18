"""The entry point that vLLM calls in every process (`vllm.general_plugins`): check, then put every patch in place.

A plugin that fails to import is only logged by vLLM, so nothing of vLLM is imported above; what is wrong raises in
`register`, and the process does not start.
"""

from __future__ import annotations

_registered = False


def register() -> None:
    """Install steer-vllm in this process; a second call does nothing.

    Errors: `StartupRefused` when vLLM is not as the patches need it.
    """
    global _registered
    if _registered:
        return
    from . import cache_keys, core, intake, lifetimes, names, requirements, runner_v1, runner_v2, worker_methods

    requirements.require()
    lifetimes.install()
    core.install()
    intake.install()
    names.install()
    cache_keys.install()
    worker_methods.install()
    runner_v1.install()
    runner_v2.install()
    _registered = True
