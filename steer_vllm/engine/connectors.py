"""vLLM's KV connectors by what they name keys and values with: whether edits are part of that name.

The prefix cache's block hashes carry the edits (`cache_keys`); a connector is exact when it names blocks by them and by
nothing else. It knows vLLM's names for connectors, and starts none.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["none", "exact", "hashing", "transferring", "other"]

_HASHING = ("LMCache", "FlexKV", "HF3FS", "Example", "SharedStorage")
_TRANSFERRING = ("Nixl", "MooncakeConnector", "MoRIIO", "P2pNccl")


def kind(vllm_config: Any) -> Kind:
    """ "exact": OffloadingConnector with vLLM's own tier in host memory, whose keys are request.block_hashes."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return "none"
    name = str(transfer.kv_connector)
    if name.startswith(_HASHING):
        return "hashing"
    if name.startswith(_TRANSFERRING):
        return "transferring"
    native = (transfer.kv_connector_extra_config or {}).get("spec_name", "CPUOffloadingSpec") == "CPUOffloadingSpec"
    own = transfer.kv_connector_module_path is not None
    return "exact" if name == "OffloadingConnector" and native and not own else "other"
