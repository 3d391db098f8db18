"""Tokens and batches: what is learnt from, and what is not."""

from __future__ import annotations

import logging

import pytest
import torch

from steer_vllm.errors import UserError
from steer_vllm.training.base import Base
from steer_vllm.training.collate import IGNORED, Collator, Encoded, Encoder
from steer_vllm.training.data import Example
from steer_vllm.training.settings import Settings


def test_prompt_as_served_completion_and_end(base: Base) -> None:
    encoder = base.encoder(Settings())
    encoded = encoder.encode("w1 w2", "w3 w4", end=True)
    assert encoded == Encoded((1, 5, 6, 7, 8, 2), 3)
    assert encoder.encode("w1 w2", "w3 w4", end=False).ids == (1, 5, 6, 7, 8)
    assert list(encoded.ids[:3]) == base.tokenizer("w1 w2")["input_ids"]


class _Letters:
    """Merges a space into the letter after it, as byte-level tokenizers do, and `ab` into one token."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [1] if add_special_tokens else []
        at = 0
        while at < len(text):
            size = 2 if text[at] == " " or text[at : at + 2] == "ab" else 1
            ids.append(sum(map(ord, text[at : at + size])))
            at += size
        return {"input_ids": ids}


def test_space_belongs_to_the_completion() -> None:
    encoded = Encoder(_Letters(), 99, " ").encode("x", "y", end=True)
    assert encoded == Encoded((1, ord("x"), ord(" ") + ord("y")), 2)  # and no end token where there is none


def test_a_merge_over_the_joint_leaves_the_prompt_alone() -> None:
    assert Encoder(_Letters(), 99, "").encode("a", "b", end=False) == Encoded((1, ord("a"), ord("b")), 2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_only_on_completions(base: Base, ragged: list[Encoded], side: str) -> None:
    batch = Collator(base.tokenizer, side)(ragged)
    assert batch["prompt_lengths"].tolist() == [5, 2, 3]
    for row, item in enumerate(ragged):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == list(item.ids)
        labels = batch["labels"][row]
        assert labels[~real].eq(IGNORED).all()
        assert labels[real].tolist() == [IGNORED] * item.prompt_length + list(item.ids[item.prompt_length :])
        assert bool(real[0]) is (side == "right" or len(item.ids) == real.numel())
    assert batch["input_ids"].dtype == torch.long


def test_long_examples_are_left_out_and_said(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(base.tokenizer, 6, " ")
    with caplog.at_level(logging.WARNING):
        kept = encoder.examples([Example("w1", "w2"), Example("w1 w2 w3 w4 w5", "w6")])
    assert len(kept) == 1
    assert "1 of 2 examples are longer than 6 tokens" in caplog.text
    with pytest.raises(UserError, match="none of the 1 examples fits into 6 tokens"):
        encoder.examples([Example("w1 w2 w3 w4 w5", "w6")])


def test_the_models_context_bounds_the_length(base: Base) -> None:
    assert base.encoder(Settings(max_length=512)).longest == 64
    assert base.encoder(Settings(max_length=16)).longest == 16
