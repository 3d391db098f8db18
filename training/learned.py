"""What is learnt: a method's parameters, and how they act on a model while they are learnt.

`Learned` is what the trainer sees; `Compiled` is the one for methods that are served, whose maths is the core's own,
under autograd. Knows no data and no optimiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from ..fingerprint import Fingerprint
from ..hooks import Steering
from ..intervention import Card, Intervention
from ..methods import Method
from ..plan import Placement
from ..positions import Positions


class Learned(nn.Module, ABC):
    """Its parameters are all that has gradients, in float32."""

    @abstractmethod
    def applied(
        self, steering: Steering, attention_mask: torch.Tensor, prompt_lengths: Sequence[int]
    ) -> AbstractContextManager[None]:
        """The model is edited inside. attention_mask: [batch, tokens]; prompt_lengths: tokens without padding."""

    def penalty(self) -> torch.Tensor | float:
        """Added to the cross-entropy."""
        return 0.0


class Compiled(Learned):
    """A served method: what is trained is what `compile` makes of `tensors`, routed as at inference."""

    def __init__(self, method: Method, base: Fingerprint, positions: Positions) -> None:
        super().__init__()
        self.method = method
        self.base = base
        self.positions = positions

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The method's tensors, by name, in the graph."""

    @contextmanager
    def applied(
        self, steering: Steering, attention_mask: torch.Tensor, prompt_lengths: Sequence[int]
    ) -> Iterator[None]:
        steering.set_rows(self.method.compile(self.tensors(), self.base, steering.project))
        placements = [
            [Placement(start, stop, part + 1, part + 1, 1.0) for start, stop, part in self.positions.spans(length)]
            for length in prompt_lengths
        ]
        steering.route(attention_mask, attention_mask.shape[1], placements)
        with steering.active():
            yield

    def intervention(self, card: Card) -> Intervention:
        """What has been learnt so far, as an artifact's content. Errors: `ArtifactInvalid` if training diverged."""
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors().items()}
        finished = Intervention(self.method, tensors, self.base, self.positions, card=card)
        finished.check(f"trained {self.method.name}")
        return finished
