"""Every route of the installed vLLM is known to be a tenant's or the operator's; a new one is put where it belongs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from steer_vllm.server.keys import OPERATOR_PATHS

TENANT = re.compile(
    r"/(v1|v2|cohere|inference|invocations|tokenize|detokenize|tokenizer_info|generative_scoring|classify|pooling"
    r"|rerank|score|ping|health|load|version|metrics|kv_event_sources)(/.*)?"
)
ROUTE = re.compile(r'router\.(?:get|post|put|delete)\(\s*"(/[^"]*)"')


def routes() -> set[str]:
    """As vLLM's source has them, also those that its settings leave out."""
    spec = find_spec("vllm")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "entrypoints"
    return {path for file in folder.rglob("*.py") for path in ROUTE.findall(file.read_text())}


def test_every_route_is_somebodys() -> None:
    found = routes()
    assert {"/v1/completions", "/collective_rpc", "/v1/load_lora_adapter"} <= found
    left = {path for path in found - OPERATOR_PATHS if not TENANT.fullmatch(path)}
    assert not left, "to be added to server/keys.py, or here"


def test_adapters_are_the_operators() -> None:
    loras = {path for path in routes() if "adapter" in path}
    assert loras
    assert loras <= OPERATOR_PATHS
