"""Prefix-cache keys through vLLM's own block hashing: hashes agree exactly as far as tokens and edits do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from steer_vllm.engine import cache_keys
from steer_vllm.plan import Plan
from steer_vllm.positions import Positions
from steer_vllm.request import EXTRA_ARG
from steer_vllm.segments import Component, resolve

SIZE, TOKENS = 4, list(range(100, 122))
NAME = "_gen_prompt_embeds_extra_hash_keys"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch over vLLM's own function, whether or not the plugin is registered in this process."""
    monkeypatch.setattr(kv_cache_utils, NAME, inspect.unwrap(getattr(kv_cache_utils, NAME)))
    kv_cache_utils.init_none_hash(sha256)
    cache_keys.install()


def hashes(*parts: tuple[str, float, str], tokens: list[int] = TOKENS, prompt: int = 10, **other: Any) -> list[bytes]:
    """Block hashes of a request: its prompt's, and those of the answer's tokens that follow."""
    segments = resolve([Component(d, s, Positions.parse(p)) for d, s, p in parts], prompt)
    params = SamplingParams(max_tokens=50, extra_args={EXTRA_ARG: Plan(segments, (), (), ())} if parts else None)
    hasher = kv_cache_utils.get_request_block_hasher(SIZE, sha256)
    request = Request("r", tokens[:prompt], params, None, block_hasher=hasher, **other)
    request.append_output_token_ids(tokens[prompt:])
    return list(request.block_hashes)


def shared(one: list[bytes], two: list[bytes]) -> int:
    """How many blocks both have in common from the start."""
    equal = [a == b for a, b in zip(one, two, strict=True)]
    assert equal == sorted(equal, reverse=True), "hashes chain: after a difference nothing is shared"
    return sum(equal)


def test_there_are_blocks() -> None:
    assert len(hashes()) == len(TOKENS) // SIZE == 5
    assert hashes() == hashes()


@pytest.mark.parametrize(
    ("positions", "blocks"),
    [("all", 0), ("prompt", 0), ("f1+l1", 0), ("response", 9 // SIZE), ("generated", 10 // SIZE), ("f0+l1", 9 // SIZE)],
)
def test_shared_with_the_base_model_up_to_the_first_edit(positions: str, blocks: int) -> None:
    """Invariant: all blocks before the one that holds the first edited position, and none after."""
    assert shared(hashes(), hashes(("d", 1.0, positions))) == blocks


def test_equal_edits_share_everything() -> None:
    one = hashes(("d", 1.0, "all"), ("e", 0.5, "response"))
    assert hashes(("e", 0.5, "response"), ("d", 1.0, "all")) == one
    assert hashes(("e", 0.25, "response"), ("d", 1.0, "all"), ("e", 0.25, "response")) == one


@pytest.mark.parametrize("other", [("e", 1.0, "all"), ("d", 2.0, "all"), ("d", -1.0, "all"), ("d", 1.0, "prompt")])
def test_other_edits_share_nothing_that_differs(other: tuple[str, float, str]) -> None:
    """Replacing an artifact under the same name is another digest, so it reuses nothing."""
    wanted = 2 if other[2] == "prompt" else 0  # the prompt's whole blocks are edited alike
    assert shared(hashes(("d", 1.0, "all")), hashes(other)) == wanted


def test_a_second_turn_reuses_the_first_under_all() -> None:
    """Under "all" the whole first turn; under "response" only what was not the answer."""
    longer = [*TOKENS, *range(200, 210)]
    for positions, reused in (("all", 5), ("response", 9 // SIZE)):
        first = hashes(("d", 1.0, positions))
        second = hashes(("d", 1.0, positions), tokens=longer, prompt=len(longer) - 2)
        assert shared(first, second[: len(first)]) == reused


def test_the_users_own_salt_still_separates() -> None:
    salted = {name: hashes(("d", 1.0, "all"), cache_salt=name) for name in ("a", "b")}
    assert shared(salted["a"], salted["b"]) == 0
    assert shared(salted["a"], hashes(("d", 1.0, "all"))) == 0
    assert shared(salted["a"], hashes(("d", 1.0, "all"), cache_salt="a")) == 5


def test_keys_are_pairs() -> None:
    """KV events keep the second element of a pair."""
    segments = resolve([Component("d", 1.0, Positions("all"))], 10)
    params = SamplingParams(extra_args={EXTRA_ARG: Plan(segments, (), (), ())})
    keys, _ = kv_cache_utils.generate_block_hash_extra_keys(Request("r", TOKENS, params, None), 0, SIZE, 0)
    assert keys is not None
    assert [name for name, _ in keys] == ["steer_vllm"]
    assert isinstance(keys[0][1], bytes)


def test_requests_without_a_plan_are_left_alone() -> None:
    other = SamplingParams(extra_args={"something": 1})
    for params in (other, SamplingParams()):
        keys, _ = kv_cache_utils.generate_block_hash_extra_keys(Request("r", TOKENS, params, None), 0, SIZE, 0)
        assert keys is None
