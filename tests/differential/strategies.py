"""Hypothesis strategies for what happens in an engine: artifacts, requests, cancellations, loads and unloads.

Small numbers on purpose: few seeds, prompt families and steps, so that requests collide in time, in prefix and in
content. A shrunken case is one with few requests, short prompts and early steps.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from .case import Artifact, Ask, Case, Change, Configuration, Prompt, Request

PLAIN_POSITIONS = ("all", "prompt", "generated", "response")
REFT_POSITIONS = ("f1+l1", "f3+l2", "f7+l7", "f2+l1")

LATER = 25
"""Steps by which a second turn comes later, so that the first has mostly ended."""

_steps = st.one_of(st.just(0), st.integers(0, 30))


def artifacts() -> st.SearchStrategy[Artifact]:
    """One of any method; equal draws are equal content."""
    seed = st.integers(0, 7)
    return st.one_of(
        st.builds(
            Artifact,
            method=st.just("direction"),
            seed=seed,
            positions=st.sampled_from(PLAIN_POSITIONS),
            site=st.sampled_from(["block_output", "mlp_output", "attention_output"]),
        ),
        st.builds(Artifact, method=st.just("lofit"), seed=seed, positions=st.sampled_from(PLAIN_POSITIONS)),
        st.builds(
            Artifact,
            method=st.just("loreft"),
            seed=seed,
            positions=st.sampled_from([*REFT_POSITIONS, *PLAIN_POSITIONS, "f2+l3/untied"]),
            rank=st.sampled_from([1, 4, 8]),
        ),
    )


@st.composite
def asks(draw: st.DrawFn, made: list[Artifact]) -> Ask:
    """One intervention of a request, at the positions it was made for or at others."""
    number = draw(st.integers(0, len(made) - 1))
    positions = None
    if not made[number].positions.endswith("/untied"):
        positions = draw(st.one_of(st.none(), st.sampled_from([*PLAIN_POSITIONS, *REFT_POSITIONS])))
    scale = draw(st.one_of(st.none(), st.sampled_from([0.5, -0.5, 1.5, 0.0])))
    return Ask(name=f"a{number}", scale=scale, positions=positions)


@st.composite
def prompts(draw: st.DrawFn, earlier: int) -> Prompt:
    """A prompt that shares its beginning with others, or continues an earlier request."""
    follows = draw(st.one_of(st.none(), st.none(), st.integers(0, earlier - 1))) if earlier else None
    return Prompt(
        family=draw(st.integers(0, 1)),
        shared=draw(st.sampled_from([0, 31, 32, 33, 64, 65, 97])),
        own=draw(st.sampled_from([1, 1, 2, 7, 31])),
        seed=draw(st.integers(0, 2)),
        follows=follows,
    )


def sampling(configuration: Configuration) -> st.SearchStrategy[dict[str, Any]]:
    """Sampling parameters of one request."""
    greedy: dict[str, Any] = {"temperature": 0.0}
    kinds: list[dict[str, Any]] = [
        greedy,
        greedy,
        {"temperature": 0.0, "stop": ["e"]},
        {"temperature": 0.0, "prompt_logprobs": 0},
    ]
    speculative = "speculative_config" in configuration.llm
    if not speculative:  # not offered with it
        kinds += [
            {"temperature": 1.0, "n": 3},
            {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
            {"temperature": 0.0, "logit_bias": {"11": 4.0, "12": -4.0}},
            {"temperature": 0.0, "min_tokens": 1, "ignore_eos": False},
        ]
    # What fails in vLLM's own code on a CPU is left out: on V1 seeds of prompts that come in pieces, and whatever
    # samples beside speculation; on V2 what Triton's interpreter cannot run, grammars and top_k.
    if configuration.runner == "v2":
        kinds.append({"temperature": 1.0, "seed": 3})
    elif speculative:
        kinds.append({"temperature": 0.0, "regex": "[a-z ]{3,20}", "logprobs": 4})
    else:
        kinds.append({"temperature": 1.0, "regex": "[a-z ]{3,20}", "logprobs": 4})
        kinds.append({"temperature": 0.8, "top_p": 0.9, "top_k": 20})
    lengths = st.sampled_from([1, 2, 5, 9, 20])
    return st.builds(lambda kind, length: {**kind, "max_tokens": length}, st.sampled_from(kinds), lengths)


@st.composite
def cases(draw: st.DrawFn, configuration: Configuration) -> Case:
    """A workload for this configuration."""
    made = draw(st.lists(artifacts(), min_size=1, max_size=6))
    requests: list[Request] = []
    for number in range(draw(st.integers(1, 14))):
        prompt = draw(prompts(number))
        wanted = tuple(draw(st.lists(asks(made), max_size=3)))
        params = draw(sampling(configuration))
        start = None
        if wanted and "prompt_logprobs" in params:
            start = draw(st.integers(1, max(1, len(prompt.tokens()) - 1)))
        requests.append(
            Request(
                at=draw(_steps) + (0 if prompt.follows is None else LATER),
                prompt=prompt,
                asks=wanted,
                params=params,
                priority=draw(st.integers(0, 2)) if configuration.llm.get("scheduling_policy") == "priority" else 0,
                response_start=start,
                abort_after=draw(st.one_of(st.none(), st.none(), st.integers(0, 12))),
            )
        )
    changes = draw(
        st.lists(
            st.one_of(
                st.builds(
                    Change,
                    at=_steps,
                    do=st.just("load"),
                    name=st.integers(0, len(made) - 1).map("a{}".format),
                    artifact=st.integers(0, len(made) - 1),
                ),
                st.builds(
                    Change, at=_steps, do=st.just("unload"), name=st.integers(0, len(made) - 1).map("a{}".format)
                ),
                st.builds(Change, at=_steps, do=st.just("reset_cache")),
            ),
            max_size=3,
        )
    )
    return Case(configuration=configuration, artifacts=tuple(made), changes=tuple(changes), requests=tuple(requests))
