"""What every test needs: an offline process, caches inside the repository, and the way to models that lie beside it.

The variables are set before anything imports vLLM or transformers, which read them once; processes that tests start
inherit them. Knows nothing of engines: their fixtures stand beside the engine tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",  # forking after its threads have started warns
    # Nothing is read from or left in HOME, which may be empty or read-only. vLLM, transformers, matplotlib follow XDG.
    XDG_CACHE_HOME=str(CACHE),
    XDG_CONFIG_HOME=str(CACHE / "config"),
    TRITON_CACHE_DIR=str(CACHE / "triton"),
    TORCHINDUCTOR_CACHE_DIR=str(CACHE / "inductor"),
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # engines that run beside each other would share one core
    OMP_NUM_THREADS="1",  # models this small are faster on one thread, most of all beside other processes
    # vLLM on a small machine
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_USE_AOT_COMPILE="0",  # halves the second start of a compiled engine
    VLLM_USE_FLASHINFER_SAMPLER="0",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def beside() -> Callable[[str], Path]:
    """Finds what is too large for the repository, such as `models/NAME`, in any folder next to it; else skips."""

    def find(path: str) -> Path:
        found = sorted(ROOT.parent.glob(f"*/{path}"))
        if not found:
            pytest.skip(f"no {path} in a folder beside the repository")
        return found[0]

    return find
