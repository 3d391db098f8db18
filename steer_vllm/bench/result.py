"""The result of a run as JSON values, and the numbers that follow from its samples.

Every number shown is computed from the samples that the JSON keeps. It runs nothing and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..errors import BenchmarkInvalid
from . import record
from .modes import PLAIN, Case
from .run import Outcome
from .spread import Ratio, Spread
from .workload import Load, Workload

BENCHMARK, FORMAT = "offline", 3
_SPREADS = ("tokens_per_second", "step_ms", "first_tokens_ms")


@dataclass(frozen=True)
class Row:
    """A case and what was measured of it.

    ratio: of plain vLLM's speed under the same load; where they decoded in alternation that of the median step of a
    turn, else that of all steps. with_outliers: that of all steps in any case.
    """

    load: str
    mode: str
    distinct: int
    tokens_per_second: Spread
    step_ms: Spread
    first_tokens_ms: Spread
    ratio: Ratio
    with_outliers: Ratio


def begin(workload: Workload) -> dict[str, Any]:
    """What is known of a run before it begins: its code may change while it runs."""
    facts = {**asdict(workload), "parameters": workload.shape.parameters}
    return record.begin(BENCHMARK, FORMAT, facts, None)


def assemble(begun: Mapping[str, Any], cases: Sequence[Case], outcome: Outcome) -> dict[str, Any]:
    """Everything there is to know of a run, as JSON values. begun: what `begin` said."""
    samples = [asdict(sample) for sample in outcome.samples]
    result = {
        **begun,
        "hardware": {**begun["hardware"], "device": outcome.facts[PLAIN]["device"]},
        "share": outcome.share,
        "engines": outcome.facts,
        "modes": {case.mode.name: asdict(case.mode) for case in cases},
        "same_as_plain": [[*key, share] for key, share in outcome.same_as_plain.items()],
        "samples": samples,
    }
    return {**result, "table": [asdict(row) for row in rows(result)]}


def rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """One per case, by load, then in the order of the modes, then by the number of distinct interventions.

    A run that was stopped in its first round has no rows for some loads.
    """
    for case in measured(result):
        yield Row(
            case.load,
            case.mode,
            case.distinct,
            **{name: Spread.of([sample[name] for sample in case.samples]) for name in _SPREADS},
            ratio=Ratio.of(case.ratios),
            with_outliers=Ratio.of(case.with_outliers),
        )


class Measured(NamedTuple):
    """What was measured of a case, by round. ratios: of plain vLLM's speed, as `Row.ratio` has it."""

    load: str
    mode: str
    distinct: int
    samples: Sequence[Mapping[str, Any]]
    ratios: list[float]
    with_outliers: list[float]


def measured(result: Mapping[str, Any]) -> Iterator[Measured]:
    """In the order of `rows`."""
    order = {name: at for at, name in enumerate(result["modes"])}
    samples = sorted(result["samples"], key=lambda sample: sample["round"])
    loads = dict.fromkeys(_load_name(load) for load in result["workload"]["loads"])
    for load in loads:
        of: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        for sample in samples:
            if sample["load"] == load:
                of.setdefault((sample["mode"], sample["distinct"]), []).append(sample)
        plain = _Plain(of.get((PLAIN, 0), ()))
        for mode, distinct in sorted(of, key=lambda key: (order[key[0]], key[1])):
            own = of[mode, distinct]
            pairs = [(sample, plain.beside(sample)) for sample in own]
            whole = [sample["tokens_per_second"] / beside["tokens_per_second"] for sample, beside in pairs]
            typical = [beside["step_ms"] / sample["step_ms"] for sample, beside in pairs]
            yield Measured(load, mode, distinct, own, whole if result["share"] is None else typical, whole)


class _Plain:
    """Plain vLLM's samples under a load."""

    def __init__(self, samples: Iterable[Mapping[str, Any]]) -> None:
        self._of_turn = {(one["round"], one["turn"]): one for one in samples}
        self._of_round = {number: one for (number, _), one in self._of_turn.items()}

    def beside(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        """That of the sample's turn, where it worked in alternation with plain vLLM; else that of its round.

        Errors: `BenchmarkInvalid` when there is none.
        """
        number = sample["round"]
        found = self._of_turn.get((number, sample["turn"])) or self._of_round.get(number)
        if found is None:
            raise BenchmarkInvalid(f"round {number}, {sample['load']}: plain vLLM was not measured")
        return found


def _load_name(load: Mapping[str, Any]) -> str:
    return Load(**load).name


def check(result: Mapping[str, Any]) -> None:
    """Errors: `BenchmarkInvalid` for the result of another benchmark or in another format."""
    found, known = (result["benchmark"], result["format_version"]), (BENCHMARK, FORMAT)
    if found != known:
        raise BenchmarkInvalid(f"expected {BENCHMARK} {FORMAT}, got {found[0]} {found[1]}")
