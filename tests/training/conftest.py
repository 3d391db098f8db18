"""A tiny random Llama with a word tokenizer, and a task for it. Small enough to train in a second."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steer_vllm.training.base import Base, load_base
from steer_vllm.training.collate import Encoded

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
LAYERS, HEADS, HEAD_DIM, HIDDEN = 3, 4, 8, 32


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base(folder: Path) -> Base:
    """Loaded once: training leaves it as it is, which `test_module` checks."""
    return load_base(str(folder))


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two answers by the question's first word, with multiple choices."""
    path = tmp_path_factory.mktemp("task") / "parity.jsonl"
    rows = [
        {
            "prompt": f"w{i % 2} w{i} w{i + 1}",
            "completion": f"w{30 + i % 2}",
            "correct": [f"w{30 + i % 2}"],
            "incorrect": [f"w{31 - i % 2}", "w35 w36"],
        }
        for i in range(2, 26)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def ragged() -> list[Encoded]:
    """Examples of different lengths: [prompt] + completion."""
    return [
        Encoded((1, 5, 6, 7, 8, 30, 2), 5),
        Encoded((1, 9, 31, 32, 33, 2), 2),
        Encoded((1, 10, 11, 34, 2), 3),
    ]
