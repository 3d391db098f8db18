"""What the loading and prefix benchmarks compute from what they saw; no engine."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from steer_vllm.errors import BenchmarkInvalid

Script = Callable[[str], ModuleType]


def test_a_pause_is_the_longest_gap_that_touches_the_window(script: Script) -> None:
    script("loading")
    from harness.batch import pauses  # type: ignore[import-not-found]

    steady = [(0.010 * i, 0.010) for i in range(1, 200)]
    long = (0.505, 0.045)  # from 0.46 to 0.505
    found = pauses([*steady, long], [(0.0, 0.2), (0.45, 0.47), (0.47, 0.49), (0.5, 0.6), (0.506, 0.6), (9.0, 9.1)])
    assert [round(one, 6) for one in found] == [0, 35, 35, 35, 0, 0]


def test_admission_among_many(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time another of all that are loaded is admitted, and nothing stays admitted."""
    script("loading")
    from harness import resident

    admitted, released = [], []

    class Book(resident.Admission):  # type: ignore[misc]
        def admit(self, steering: Any, tokens: int) -> Any:
            found = super().admit(steering, tokens)
            admitted.append((steering.components[0].digest, found))
            return found

        def release(self, found: Any) -> None:
            super().release(found)
            released.append(found)

    monkeypatch.setattr(resident, "Admission", Book)
    samples = resident.admission(3, 7)
    assert [int(digest, 16) for digest, _ in admitted] == [0, 1, 2, 0, 1, 2, 0]
    assert [found for _, found in admitted] == released
    assert len(samples) == 7
    assert min(samples) > 0


def sample(prefix: ModuleType, mode: str, tenant: int, milliseconds: float, cached: int) -> Any:
    return prefix.Sample(0, mode, tenant, milliseconds, cached, 16 - cached // 128)


def test_tenants_are_compared_in_pairs(script: Script) -> None:
    prefix = script("prefix")
    samples = [sample(prefix, "first", 0, 50.0, 0)]
    for tenant, base in ((1, 10.0), (2, 20.0)):
        samples += [
            sample(prefix, "base", tenant, base, 1920),
            sample(prefix, "steered", tenant, 1.5 * base, 1920),
            sample(prefix, "salted", tenant, 4 * base, 0),
        ]
    prefix.check(samples)
    rows = {row["mode"]: row for row in prefix.summary(samples)}
    assert rows["steered"]["of_base"]["median"] == 1.5
    assert rows["salted"]["of_base"]["low"] == 4
    assert [rows[mode]["blocks_filled"] for mode in prefix.TITLES] == [16, 2, 2, 32]


@pytest.mark.parametrize(("mode", "cached"), [("steered", 1792), ("salted", 128), ("first", 128)])
def test_what_is_cached_must_be_as_said(script: Script, mode: str, cached: int) -> None:
    prefix = script("prefix")
    right = {"first": 0, "base": 1920, "steered": 1920, "salted": 0}
    samples = [sample(prefix, one, 1, 1.0, {**right, mode: cached}[one]) for one in right]
    with pytest.raises(BenchmarkInvalid, match=str(cached)):
        prefix.check(samples)
