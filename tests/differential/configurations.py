"""Engine configurations drawn from a seed: shapes, runners, schedulers, caches and limits: what decides a step."""

from __future__ import annotations

import random
from typing import Any

from .case import MODEL_LEN, Configuration, Shape


def draw(seed: int) -> Configuration:
    """The configuration of this seed, always the same one."""
    roll = random.Random(f"configuration {seed}")
    shape = _shape(roll)
    runner = roll.choices(["v1", "v2"], [4, 1])[0]
    parallel = roll.choices(["none", "tensor", "pipeline"], [20, 1, 1])[0]
    if parallel == "pipeline":  # where it can run without a GPU
        runner = "v2"
    if parallel == "tensor":
        runner = "v1"
        shape = shape.model_copy(update={"heads": 4, "kv_heads": 2})
    llm: dict[str, Any] = {
        "block_size": roll.choice([32, 32, 64]),
        "enable_prefix_caching": roll.random() < 0.85,
        "max_num_batched_tokens": roll.choice([17, 33, 64, 101, 512]),
        "max_num_seqs": roll.choice([2, 5, 16]),
        "async_scheduling": roll.random() < 0.5,
        "scheduling_policy": roll.choice(["fcfs", "fcfs", "priority"]),
    }
    llm["max_num_batched_tokens"] = max(llm["max_num_batched_tokens"], llm["max_num_seqs"])
    if roll.random() < 0.3:
        llm["long_prefill_token_threshold"] = roll.choice([5, 11])
    if roll.random() < 0.5:
        blocks = -(-MODEL_LEN // llm["block_size"])
        if shape.family == "gemma3":  # blocks of sliding windows are counted apart, and there is one more of them
            groups = 3 if shape.layers == 3 else 2
            blocks = groups * (blocks + 1)
        llm["num_gpu_blocks_override"] = blocks + roll.choice([1, 2, 6])
        if llm["scheduling_policy"] == "priority":  # where vLLM keeps cached blocks that were never computed
            llm["enable_prefix_caching"] = False
    if parallel == "tensor":
        llm["tensor_parallel_size"] = 2
    if parallel == "pipeline":
        llm["pipeline_parallel_size"] = 2
    if runner == "v1" and parallel == "none" and roll.random() < 0.15:
        llm |= {
            "async_scheduling": False,
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": roll.choice([1, 3]),
                "prompt_lookup_min": 1,
                "prompt_lookup_max": 3,
            },
        }
    steer = {
        "additive_rows": roll.choice([2, 8, 64]),
        "low_rank_rows": roll.choice([1, 4, 16]),
        "max_rank": 16,
        "additive_sites": ["attention_output", "mlp_output", "block_output"],
    }
    return Configuration(
        shape=shape,
        runner=runner,
        compiled=parallel == "none" and roll.random() < 0.15,
        processes=parallel != "none" or roll.random() < 0.05,
        llm=llm,
        steer=steer,
    )


def _shape(roll: random.Random) -> Shape:
    heads = roll.choice([2, 4])
    return Shape(
        family=roll.choice(["llama", "llama", "qwen2", "qwen3", "gemma3"]),
        layers=roll.choice([2, 3, 4]),
        heads=heads,
        kv_heads=roll.choice([1, 2, heads]),
        head_dim=roll.choice([32, 64]),
        hidden=roll.choice([64, 96]),
        tied=roll.random() < 0.5,
        seed=roll.randrange(3),
    )
