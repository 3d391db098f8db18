"""What is run: a random-weight Llama, which batches of prompts, how long and how often.

Knows no mode; what follows from these numbers is the same for every engine of a run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .shapes import LlamaShape

ALIGN = 128
"""KV block size of vLLM on a CPU: contexts are a multiple of it."""

_STEP = (2048, 8192)
"""Tokens of a step: at least, and at most for the prompts of a decode load, which vLLM takes in several steps then."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Load:
    """A batch: all requests start together. With one output token its prefill is what counts, else its decode steps.

    repeats: how often it is run in a turn.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    repeats: int = 1

    @property
    def decodes(self) -> bool:
        """Timed are the steps in which every request decodes."""
        return self.output_tokens > 1

    @property
    def name(self) -> str:
        """`decode REQUESTS` or `prefill REQUESTSxTOKENS`, as targets and tables call it."""
        return f"decode {self.requests}" if self.decodes else f"prefill {self.requests}x{self.prompt_tokens}"

    def cached_tokens(self, block: int) -> int:
        """Tokens in the KV cache at the end, in whole blocks of so many, with one more for each request."""
        return self.requests * (-(-(self.prompt_tokens + self.output_tokens + 1) // block) * block)


@dataclass(frozen=True)
class Workload:
    """rounds: at most. prefix_cache: keys are computed and looked up; caches are emptied before every batch."""

    shape: LlamaShape
    loads: tuple[Load, ...]
    dtype: str = "float32"
    compiled: bool = True
    prefix_cache: bool = False
    rounds: int = 15
    seed: int = 0

    @property
    def requests(self) -> int:
        """Of the largest batch."""
        return max(load.requests for load in self.loads)

    @property
    def context(self) -> int:
        """The longest request, up to a multiple of `ALIGN`."""
        return max(load.cached_tokens(ALIGN) // load.requests for load in self.loads)

    @property
    def step_tokens(self) -> int:
        """Tokens that a step may take: every prefill load in one, prompts of decode loads up to a limit."""
        least, most = _STEP
        return max(
            least, *(min(load.requests * load.prompt_tokens, most if load.decodes else 1 << 30) for load in self.loads)
        )

    def kv_bytes(self, block: int) -> int:
        """KV cache for the largest load, and for one request of the model's length, with a fiftieth to spare.

        block: tokens of a KV block.
        """
        tokens = max(self.context, *(load.cached_tokens(block) for load in self.loads)) + 8 * block
        return tokens * self.shape.kv_numbers * _BYTES[self.dtype] * 51 // 50

    def prompts(self, load: Load) -> list[list[int]]:
        """Random token ids, one list per request."""
        random = np.random.default_rng((self.seed, load.requests, load.prompt_tokens))
        ids = random.integers(10, self.shape.vocab_size, (load.requests, load.prompt_tokens))
        return [list(map(int, row)) for row in ids]

    def write_model(self, folder: Path) -> None:
        """The config from which vLLM makes the model with random weights (`load_format="dummy"`)."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "max_position_embeddings": self.context,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": self.dtype,
            **asdict(self.shape),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))

    def engine_arguments(self, model: Path) -> dict[str, Any]:
        """vLLM's arguments, alike for every engine."""
        return {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": self.dtype,
            "enforce_eager": not self.compiled,
            "max_model_len": self.context,
            "max_num_seqs": self.requests,
            "max_num_batched_tokens": self.step_tokens,
            "enable_prefix_caching": self.prefix_cache,
            "seed": self.seed,
        }
