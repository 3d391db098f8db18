"""Which of a pair carries the residual stream: read from the layer's source, in the shapes that vLLM's layers have."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from vllm.model_executor.models.commandr import CohereDecoderLayer
from vllm.model_executor.models.gemma2 import Gemma2DecoderLayer
from vllm.model_executor.models.granitemoehybrid import GraniteMoeHybridAttentionDecoderLayer
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.phimoe import PhiMoEDecoderLayer
from vllm.model_executor.models.stablelm import StablelmDecoderLayer

from steer_vllm.engine.residual import Stream, stream_of


class Sums(nn.Module):
    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        if residual is None:
            residual = hidden_states
        return hidden_states, residual


class Scales(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        residual *= 0.5
        return hidden_states, residual


class ReadsOnTheRight(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        hidden_states, residual = self.norm(hidden_states, residual)  # type: ignore[operator]
        return hidden_states, residual


class Overwrites(nn.Module):
    def forward(self, hidden_states: Any, residual: Any = None) -> Any:
        residual = hidden_states
        return hidden_states + residual, residual


class TakesNone(nn.Module):
    def forward(self, positions: Any, hidden_states: Any) -> Any:
        return hidden_states, hidden_states


class NeverUsesIt(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        return hidden_states, hidden_states


class DiffersByBranch(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        if self.training or residual is None:
            residual = hidden_states
        return hidden_states, residual


class OverwritesInEachBranch(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        if self.training:
            residual = hidden_states
        else:
            residual = hidden_states * 2
            hidden_states = self.norm(hidden_states)  # type: ignore[operator]
        return hidden_states + residual, residual


class AnotherName(nn.Module):
    def forward(self, hidden_states: Any, skip: Any) -> Any:
        return hidden_states + skip, skip


@pytest.mark.parametrize(
    ("layer", "stream"),
    [
        (Sums, Stream.SUM),
        (Scales, Stream.SUM),
        (ReadsOnTheRight, Stream.SUM),
        (Overwrites, Stream.HIDDEN),
        (TakesNone, Stream.HIDDEN),
        (NeverUsesIt, Stream.UNKNOWN),
        (AnotherName, Stream.UNKNOWN),
        (DiffersByBranch, Stream.UNKNOWN),
        (OverwritesInEachBranch, Stream.HIDDEN),
        (LlamaDecoderLayer, Stream.SUM),
        (Gemma2DecoderLayer, Stream.SUM),
        (CohereDecoderLayer, Stream.HIDDEN),
        (GraniteMoeHybridAttentionDecoderLayer, Stream.HIDDEN),
        (PhiMoEDecoderLayer, Stream.HIDDEN),
        (StablelmDecoderLayer, Stream.HIDDEN),
    ],
)
def test_stream(layer: type[nn.Module], stream: Stream) -> None:
    """Invariant: an edit is added to what the next layer starts from, or the model does not start."""
    assert stream_of(layer.__new__(layer)) is stream
