"""The error tree: every code is its own, and survives a process boundary."""

from __future__ import annotations

import pytest

from steer_vllm import errors
from steer_vllm.errors import EngineUnavailable, ServerError, SteerError, UserError, by_code


def tree(kind: type[SteerError] = SteerError) -> list[type[SteerError]]:
    """Those of the module: a test may derive its own."""
    below = [sub for sub in kind.__subclasses__() if sub.__module__ == errors.__name__]
    return [kind, *(found for sub in below for found in tree(sub))]


def test_the_picture_shows_the_tree() -> None:
    assert errors.__doc__ is not None
    for kind in tree():
        assert kind.__name__ in errors.__doc__
        if kind in (SteerError, UserError, ServerError):
            continue
        line = next(line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in line)
        assert str(kind.status) in line or kind.status == 500


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in tree()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", tree())
def test_by_code(kind: type[SteerError]) -> None:
    error = by_code(kind.code, "what was given")
    assert type(error) is kind
    assert error.message == str(error) == "what was given"


@pytest.mark.parametrize("kind", tree())
def test_statuses_follow_the_branches(kind: type[SteerError]) -> None:
    low, high = (400, 499) if issubclass(kind, UserError) else (500, 599)
    assert low <= kind.status <= high


def test_unknown_codes_are_the_engines_fault() -> None:
    assert type(by_code("no_such_code", "x")) is EngineUnavailable
