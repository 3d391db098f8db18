"""The module that is trained: a frozen language model with something learnt on it, and the loss.

Cross-entropy on the completion's tokens, plus the penalty. Knows no method, no data and no optimiser.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from typing_extensions import Self

from ..hooks import Steering
from .collate import IGNORED
from .learned import Learned


class SteeredModel(nn.Module):
    """A transformers causal language model, frozen, and the parameters of an intervention."""

    accepts_loss_kwargs = True
    """Tells transformers' Trainer that `num_items_in_batch` is taken: gradient accumulation is exact."""

    def __init__(self, model: Any, learned: Learned) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.learned = learned
        self.steering = Steering(model)

    def train(self, mode: bool = True) -> Self:
        """The frozen model stays in evaluation mode: its dropout would be noise to the edit."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        prompt_lengths: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The mean cross-entropy of the labelled tokens plus the penalty.

        input_ids, attention_mask, labels: [batch, tokens]; prompt_lengths: [batch]. num_items_in_batch: labelled tokens
        of all the batches that make one update; then the losses of those batches add up to their common mean.
        """
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # a token's place is the same on either side's padding
        with self.learned.applied(self.steering, attention_mask, prompt_lengths.tolist()):
            logits = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
            ).logits
        targets = labels[:, 1:]
        kept = targets != IGNORED
        here = kept.sum()
        total = functional.cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="sum")
        share = here if num_items_in_batch is None else num_items_in_batch
        return {"loss": (total + here * self.learned.penalty()) / share}
