"""What an engine cannot serve is refused before anything is loaded, and told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steer_vllm.config import SteerConfig
from steer_vllm.errors import ArtifactInvalid
from steer_vllm.fit import check_fit
from steer_vllm.intervention import Intervention

from .make import BASE, direction, lofit, loreft


@pytest.mark.parametrize(
    ("item", "limits", "says"),
    [
        (lofit(base=replace(BASE, vocab_size=62)), {}, r"here: .*another base model .*: vocab_size 62 against 61"),
        (lofit(base=replace(BASE, weights="cd")), {}, r"another base model .*: weights cd against ab"),
        (loreft(rank=3), {"max_rank": 2}, "rank 3, this engine's max_rank is 2"),
        (loreft(), {"low_rank_rows": 0}, "no low_rank table"),
        (direction(), {"additive_sites": ("attention_output",)}, "no additive table"),
        (lofit(default_scale=9.0), {}, "default_scale 9, max_scale is 8"),
    ],
)
def test_refused(item: Intervention, limits: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtifactInvalid, match=says):
        check_fit(item, BASE, SteerConfig(**limits), "here")


@pytest.mark.parametrize("item", [lofit(), loreft(), direction()])
def test_what_fits_is_not(item: Intervention) -> None:
    check_fit(item, BASE, SteerConfig(), "here")
