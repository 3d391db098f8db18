"""Requests that are thrown out for want of KV space and come back: their generated tokens are prefilled again.

A resumed request looks like one with a longer prompt; its interventions must stay where they were.
"""

from __future__ import annotations

import pytest

from .case import Artifact, Ask, Case, Configuration, Prompt, Request, Shape
from .session import Session

ARTIFACTS = (
    Artifact(method="direction", seed=1, positions="response"),
    Artifact(method="lofit", seed=2, positions="generated"),
    Artifact(method="loreft", seed=3, positions="f3+l2"),
    Artifact(method="direction", seed=4, positions="prompt", site="mlp_output"),
)


def case(runner: str) -> Case:
    """Eight requests that need twice the blocks there are."""
    return Case(
        configuration=Configuration(
            shape=Shape(layers=3),
            runner=runner,
            llm={
                "block_size": 32,
                "max_num_batched_tokens": 64,
                "max_num_seqs": 8,
                "num_gpu_blocks_override": 10,
                "async_scheduling": False,
            },
            steer={"additive_sites": ["attention_output", "mlp_output", "block_output"]},
        ),
        artifacts=ARTIFACTS,
        requests=tuple(
            Request(
                at=i,
                prompt=Prompt(shared=33, own=8 + i, seed=i),
                asks=(Ask(name=f"a{i % 4}", scale=0.5), Ask(name=f"a{(i + 1) % 4}")),
                params={"temperature": 0.0, "max_tokens": 45},
            )
            for i in range(8)
        ),
    )


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_resumed_requests_keep_their_interventions(runner: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = case(runner)
    with Session(made.configuration, tmp_path_factory.mktemp("preemption")) as session:
        count = session.run(made)
    assert count.preempted > 0
    assert count.tokens == 8 * 45
