"""The methods: what each stores, and how it compiles to edits.

A method is one file and one row of `METHODS`. It knows its own tensors, never files, training or serving.
"""

from __future__ import annotations

from ..errors import ArtifactInvalid
from .direction import Direction
from .lofit import LoFiT
from .loreft import LoReFT
from .method import Method, Project

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (LoFiT, LoReFT, Direction)}


def method_from_config(name: object, config: object, where: str) -> Method:
    """The method of that name with that config. Errors: `ArtifactInvalid` for an unknown name, key or value."""
    if not isinstance(name, str) or name not in METHODS:
        raise ArtifactInvalid(f"{where}: method {name!r} is none of {', '.join(METHODS)}")
    if not isinstance(config, dict):
        raise ArtifactInvalid(f"{where}: expected an object with the settings of {name}")
    return METHODS[name].from_config(config, where)


__all__ = ["METHODS", "Direction", "LoFiT", "LoReFT", "Method", "Project", "method_from_config"]
