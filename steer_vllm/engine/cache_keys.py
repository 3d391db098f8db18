"""Prefix-cache keys: a block carries what was edited in it.

Knows vLLM's block hashing and `segments.block_key`, which says what a block's edits are.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..segments import block_key
from .lifetimes import plan_of


def install() -> None:
    """Ledger: replaces `kv_cache_utils._gen_prompt_embeds_extra_hash_keys`.

    What: adds ("steer_vllm", key) for a block that the request's segments touch. Why this function: it is given the
    block's token range, is called for every block through its module's globals, and its callers are imported by name
    elsewhere and cannot be replaced. Keys are pairs because KV events in 0.32 keep the second element. Since 0.26. Can
    go when vLLM lets a plugin add extra keys by token range.
    """
    from vllm.v1.core import kv_cache_utils

    embeds_keys = kv_cache_utils._gen_prompt_embeds_extra_hash_keys

    @wraps(embeds_keys)
    def keys_with_edits(request: Any, start_token_idx: int, end_token_idx: int) -> list[Any]:
        keys = embeds_keys(request, start_token_idx, end_token_idx)
        plan = plan_of(request.sampling_params)
        key = block_key(plan.segments, start_token_idx, end_token_idx) if plan else None
        return keys if key is None else [*keys, ("steer_vllm", key)]

    kv_cache_utils._gen_prompt_embeds_extra_hash_keys = keys_with_edits
