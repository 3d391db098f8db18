"""A random-weight Llama with a tokenizer of real words, and what every engine or server over it is told.

Weights are vLLM's (`load_format="dummy"`); the tokenizer is the demo model's, filled up with words of its kind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steer_vllm.bench.options import DTYPES
from steer_vllm.bench.shapes import SHAPES, LlamaShape, shape
from steer_vllm.bench.workload import Load, Workload
from steer_vllm.demo import MODEL_PATH

_WORDS = 1024
"""The least vocabulary: the demo's 813 words, and some more."""


def add_options(parser: argparse.ArgumentParser, default: str) -> None:
    """--shape, --layers and --dtype."""
    parser.add_argument("--shape", choices=list(SHAPES), default=default, help=f"of the Llama (default: {default})")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape has")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")


def chosen(options: argparse.Namespace) -> LlamaShape:
    """The shape that the options name."""
    named = shape(options.shape)
    return replace(
        named,
        num_hidden_layers=options.layers or named.num_hidden_layers,
        vocab_size=max(named.vocab_size, _WORDS),
    )


def write_model(folder: Path, options: argparse.Namespace, context: int) -> None:
    """Config and tokenizer. context: the longest request, in tokens."""
    one = Load(requests=1, prompt_tokens=context - 1, output_tokens=1)
    Workload(shape=chosen(options), loads=(one,), dtype=options.dtype).write_model(folder)
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(MODEL_PATH / name, folder / name)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words: dict[str, int] = tokenizer["model"]["vocab"]
    words.update((f"word{number}", number) for number in range(len(words), chosen(options).vocab_size))
    file.write_text(json.dumps(tokenizer))


def environment() -> Mapping[str, str]:
    """Variables of every engine."""
    every = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if torch.cuda.is_available():
        # To look for the GPU may have set up its driver, which no forked process can use; vLLM does not know of it.
        return {**every, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    return {**every, "VLLM_CPU_KVCACHE_SPACE": space, "VLLM_USE_AOT_COMPILE": "0"}


def memory(options: argparse.Namespace, engines: int = 1, kept: float = 0.0) -> float:
    """`gpu_memory_utilization` of each engine. A CPU takes little: the KV cache has a size of its own there.

    kept: the share of a GPU that one of the engines needs beyond the others.
    """
    given: float | None = getattr(options, "memory", None)
    return given or (round((0.85 - kept) / engines, 3) if torch.cuda.is_available() else 0.1)


def device() -> str | None:
    """The accelerator's name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def workload(options: argparse.Namespace) -> dict[str, Any]:
    """What the result says of a run: its options, and the shape in full."""
    plain = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    return {**plain, "model": vars(chosen(options)), "parameters": chosen(options).parameters}
