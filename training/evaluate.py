"""How a model answers, with or without interventions: exact match, MC1 and MC2.

Exact match: greedy, 16 tokens, the first line without spaces around it against the accepted answers. MC1 and MC2 (Lin
et al. 2022, TruthfulQA): summed log-probabilities of each answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..hf import Steer, steered
from ..intervention import Intervention
from .base import Base
from .collate import Collator, Encoder
from .data import Example

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Shares from 0 to 1. mc1, mc2: None where no item has incorrect answers. left_out: items too long to be scored."""

    items: int
    exact_match: float
    mc1: float | None
    mc2: float | None
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What was measured, by name; nothing of items left out when there are none."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known if self.left_out else {name: value for name, value in known.items() if name != "left_out"}


@dataclass(frozen=True)
class Evaluator:
    """Asks one base model. tokens: most that an answer may have. ignore_case: in exact match, as LoFiT's code does."""

    base: Base
    encoder: Encoder
    batch_size: int = 32
    tokens: int = 16
    progress: bool = True
    ignore_case: bool = False

    def scores(self, examples: Sequence[Example], *interventions: Intervention | Steer) -> Scores:
        """All metrics. Items that do not fit are left out, with a warning."""
        fitting = [example for example in examples if self._fits(example)]
        if len(fitting) < len(examples):
            _log.warning("%d of %d items are too long and left out", len(examples) - len(fitting), len(examples))
        said = self.generate([example.prompt for example in fitting], *interventions)
        matches = [
            matches_exactly(text, example.answers, self.ignore_case)
            for text, example in zip(said, fitting, strict=True)
        ]
        chosen = self.choices([example for example in fitting if example.incorrect], *interventions)
        return Scores(
            items=len(fitting),
            exact_match=_mean(matches),
            mc1=_mean([mc1 for mc1, _ in chosen]) if chosen else None,
            mc2=_mean([mc2 for _, mc2 in chosen]) if chosen else None,
            left_out=len(examples) - len(fitting),
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *interventions: Intervention | Steer) -> list[str]:
        """The greedy continuation of each prompt, in their order."""
        encoded = [self.encoder.prompt(prompt) for prompt in prompts]
        pad = Collator(self.base.tokenizer).pad
        said = [""] * len(prompts)
        for rows in self._batches([len(ids) for ids in encoded], "generate"):
            longest = max(len(encoded[row]) for row in rows)
            ids = [[pad] * (longest - len(encoded[row])) + encoded[row] for row in rows]
            mask = [[0] * (longest - len(encoded[row])) + [1] * len(encoded[row]) for row in rows]
            with steered(self.base.model, *interventions):
                output = self.base.model.generate(
                    input_ids=self._tensor(ids),
                    attention_mask=self._tensor(mask),
                    max_new_tokens=self.tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=pad,
                )
            for row, tokens in zip(rows, output[:, longest:].tolist(), strict=True):
                said[row] = self.base.tokenizer.decode(
                    tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
        return said

    def choices(self, examples: Sequence[Example], *interventions: Intervention | Steer) -> list[tuple[float, float]]:
        """(MC1, MC2) of each multiple choice.

        MC1: 1 when the best answer is likelier than every incorrect one. MC2: the correct answers' share of the mass.
        """
        asked = [(example.prompt, answer) for example in examples for answer in (*example.answers, *example.incorrect)]
        scored = iter(self.log_probabilities(asked, *interventions))
        result = []
        for example in examples:
            right = torch.tensor([next(scored) for _ in example.answers], dtype=torch.float64)
            wrong = torch.tensor([next(scored) for _ in example.incorrect], dtype=torch.float64)
            mass = torch.softmax(torch.cat([right, wrong]), 0)[: len(right)].sum().item()
            result.append((float(right[0] > wrong.max()), mass))
        return result

    @torch.no_grad()
    def log_probabilities(self, texts: Sequence[tuple[str, str]], *interventions: Intervention | Steer) -> list[float]:
        """The summed log-probability of each completion given its prompt."""
        encoded = [self.encoder.encode(prompt, completion, end=False) for prompt, completion in texts]
        collate = Collator(self.base.tokenizer)
        sums = [0.0] * len(texts)
        for rows in self._batches([len(item.ids) for item in encoded], "score"):
            batch = collate([encoded[row] for row in rows])
            lengths = batch["prompt_lengths"].tolist()
            ids, mask = batch["input_ids"].to(self._device), batch["attention_mask"].to(self._device)
            with steered(self.base.model, *interventions, prompt_lengths=lengths):
                logits = self.base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i, row in enumerate(rows):
                start, stop = encoded[row].prompt_length, len(encoded[row].ids)
                predicted = torch.log_softmax(logits[i, start - 1 : stop - 1].float(), -1)
                sums[row] = predicted.gather(-1, ids[i, start:stop, None]).sum().item()
        return sums

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.base.model.device
        return device

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self._device)

    def _fits(self, example: Example) -> bool:
        prompt = len(self.encoder.prompt(example.prompt)) + self.tokens
        answers = [
            len(self.encoder.encode(example.prompt, answer, end=False).ids)
            for answer in (*example.answers, *example.incorrect)
            if example.incorrect
        ]
        return max([prompt, *answers]) <= self.encoder.longest

    def _batches(self, lengths: list[int], name: str) -> Iterator[list[int]]:
        """Row numbers, those of like length together."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=name, disable=not (self.progress and lengths), leave=False):
            yield order[start : start + self.batch_size]


def matches_exactly(text: str, answers: Sequence[str], ignore_case: bool = False) -> bool:
    """Whether the first line of `text` is one of the answers, spaces around it aside."""
    lines = [line.split("\n")[0].strip() for line in (text.strip(), *(answer.strip() for answer in answers))]
    first, *expected = [line.casefold() for line in lines] if ignore_case else lines
    return first in expected


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
