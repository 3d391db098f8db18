"""The offline class before its engine: what it refuses by name, what it asks the engine and how often."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.lora.request import LoRARequest

from steer_vllm.engine.llm import LLM
from steer_vllm.engine.plain import REASONS
from steer_vllm.errors import Unsupported
from steer_vllm.positions import Positions
from steer_vllm.request import Steering
from steer_vllm.segments import Component

ASKED = [{"name": "honest"}]


def bare() -> Any:
    """One whose engine only remembers what it was asked about adapters."""
    llm: Any = LLM.__new__(LLM)
    llm.asked = []
    llm._engine = SimpleNamespace(check_adapter=lambda lora, digest: llm.asked.append((lora.lora_name, digest)))
    return llm


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_carry_interventions_says_so(name: str) -> None:
    with pytest.raises(Unsupported, match=f"{name} cannot carry interventions: ") as caught:
        getattr(bare(), name)(["text"], interventions=ASKED)
    assert caught.value.param == "interventions"


@pytest.mark.parametrize("name", REASONS)
def test_without_interventions_it_is_vllms(name: str) -> None:
    """The list holds methods that vLLM has, and they take what vLLM's take."""
    assert getattr(LLM, name).__wrapped__ is getattr(vllm.LLM, name)
    with pytest.raises((TypeError, AttributeError)):  # of vLLM itself: there is no engine
        getattr(bare(), name)(["text"], interventions=[])


def test_every_pair_is_asked_about_once() -> None:
    """However many prompts have it; one that is loaded in place is asked about for itself, and refused."""

    def steering(*digests: str) -> Steering:
        return Steering(tuple(Component(digest, 1.0, Positions.parse("all")) for digest in digests))

    llm = bare()
    one, two = LoRARequest("one", 1, "/one"), LoRARequest("two", 2, "/two")
    again = LoRARequest("one", 1, "/one", load_inplace=True)
    asked = [steering("a", "b"), steering("a"), steering("a"), steering("c"), None, steering("a")]
    llm._check_adapters([one, one, two, None, one, again], asked)
    assert sorted(llm.asked) == [("one", "a"), ("one", "a"), ("one", "b"), ("two", "a")]
    llm.asked.clear()
    llm._check_adapters(one, [steering("a")] * 50)
    assert llm.asked == [("one", "a")]
    llm._check_adapters(None, [steering("a")])
    assert len(llm.asked) == 1
