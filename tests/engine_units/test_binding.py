"""What a worker says of the projections that it pushes head offsets through."""

from __future__ import annotations

import logging

import pytest
from engine_units.toy import Decoder
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

from steer_vllm.config import SteerConfig
from steer_vllm.engine.binding import Binding


@pytest.mark.parametrize("quantised", [True, False])
def test_quantised_projections_are_told(quantised: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Once for the model, whichever of its layers it is."""
    model = Decoder()
    if quantised:
        model.layers[-1].self_attn.o_proj.quant_method = object.__new__(Fp8LinearMethod)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING):
        Binding(model, SteerConfig())
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.partition(";")[0] for message in told] == (
        ["Decoder: attention output projections are quantised"] if quantised else []
    )
