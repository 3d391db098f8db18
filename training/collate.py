"""From examples to tokens, and from tokens to batches.

A prompt's tokens are exactly those a server sees (alone, with special tokens); the completion's follow. Labels are -100
on the prompt and on padding. It knows no model and no method.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from .data import Example, join

IGNORED = -100
"""The label that cross-entropy leaves out."""

_log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """The tokens of a prompt and its completion."""

    ids: tuple[int, ...]
    prompt_length: int


class Encoder:
    """Tokenises examples. `longest`: tokens that fit; `separator`: see `data.join`."""

    def __init__(self, tokenizer: Any, longest: int, separator: str) -> None:
        self.tokenizer = tokenizer
        self.longest = longest
        self.separator = separator

    def prompt(self, text: str) -> list[int]:
        """As a server does. Errors: `UserError` when nothing is left of it."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if not ids:
            raise UserError(f"the prompt {text!r} has no tokens")
        return ids

    def encode(self, prompt: str, completion: str, *, end: bool) -> Encoded:
        """end: close with the end-of-text token, if there is one.

        The completion's tokens are what it adds to the prompt's; where the two would merge into one token, it is
        tokenised alone, so that the prompt stays as it is served.
        """
        before = self.prompt(prompt)
        whole: list[int] = self.tokenizer(join(prompt, completion, self.separator))["input_ids"]
        if whole[: len(before)] == before and len(whole) > len(before):
            after = whole[len(before) :]
        else:
            after = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        if not after:
            raise UserError(f"the completion {completion!r} has no tokens")
        last = self.tokenizer.eos_token_id
        if end and last is not None and after[-1] != last:
            after = [*after, last]
        return Encoded((*before, *after), len(before))

    def examples(self, examples: Sequence[Example]) -> list[Encoded]:
        """All that fit, for training. Errors: `UserError` when none does."""
        encoded = [self.encode(example.prompt, example.completion, end=True) for example in examples]
        kept = [item for item in encoded if len(item.ids) <= self.longest]
        if not kept:
            raise UserError(f"none of the {len(encoded)} examples fits into {self.longest} tokens (max_length)")
        if len(kept) < len(encoded):
            _log.warning(
                "%d of %d examples are longer than %d tokens (max_length) and left out",
                len(encoded) - len(kept), len(encoded), self.longest,
            )  # fmt: skip
        return kept


class Collator:
    """Batches of one length, padded on the given side with any token: the mask hides it."""

    def __init__(self, tokenizer: Any, side: str = "right") -> None:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in known if token is not None)
        self.side = side

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels: [batch, longest]; prompt_lengths: [batch], tokens without padding."""
        longest = max(len(item.ids) for item in batch)
        return {
            "input_ids": self._pad([list(item.ids) for item in batch], self.pad, longest),
            "attention_mask": self._pad([[1] * len(item.ids) for item in batch], 0, longest),
            "labels": self._pad(
                [[IGNORED] * item.prompt_length + list(item.ids[item.prompt_length :]) for item in batch],
                IGNORED,
                longest,
            ),
            "prompt_lengths": torch.tensor([item.prompt_length for item in batch]),
        }

    def _pad(self, rows: list[list[int]], value: int, longest: int) -> torch.Tensor:
        fill = [[value] * (longest - len(row)) for row in rows]
        parts = zip(fill, rows, strict=True) if self.side == "left" else zip(rows, fill, strict=True)
        return torch.tensor([[*first, *second] for first, second in parts])
