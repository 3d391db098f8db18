"""An engine of one configuration beside its oracle: plays a case and checks every request of it.

Also makes a failing case small: Hypothesis shrinks what happens, `simplify` the configuration. A failing case is left
as a file, with the command that repeats it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .case import Case, Configuration
from .checker import Checker, Count, Mismatch
from .engine import Engine, EngineDied

REPEAT = "make repeat CASE={}"


class Session:
    """Closed by `close` or as a context manager."""

    def __init__(self, configuration: Configuration, folder: Path) -> None:
        self.engine = Engine(configuration, folder)
        self.checker = Checker(self.engine.model, folder / f"artifacts-{self.engine.model.name}")

    def run(self, case: Case) -> Count:
        """Play and check. Errors: `Mismatch`, `EngineDied`."""
        return self.checker.check(case, self.play(case))

    def play(self, case: Case) -> dict[str, Any]:
        """What the engine serves, unchecked. Errors: `EngineDied`."""
        shelf = self.checker.shelf
        for artifact in case.artifacts:
            shelf.get(artifact)
        return self.engine.play(case, [shelf.path(artifact) for artifact in case.artifacts])

    def close(self) -> None:
        """End the engine."""
        self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def run_once(case: Case, folder: Path) -> Count:
    """Run a case in an engine of its own."""
    with Session(case.configuration, folder) as session:
        return session.run(case)


def simplify(case: Case, folder: Path) -> Case:
    """The same case with every setting at its default that does not matter to the failure; one engine start each."""
    for candidate in _simpler(case.configuration):
        smaller = case.model_copy(update={"configuration": candidate(case.configuration)})
        if smaller != case and _fails(smaller, folder):
            case = smaller
    return case


def _simpler(configuration: Configuration) -> Iterator[Callable[[Configuration], Configuration]]:
    plain = Configuration()
    for name in ("runner", "compiled", "processes"):
        yield lambda now, name=name: now.model_copy(update={name: getattr(plain, name)})
    yield lambda now: now.model_copy(update={"shape": plain.shape})
    for key in configuration.llm:
        yield lambda now, key=key: now.model_copy(update={"llm": {k: v for k, v in now.llm.items() if k != key}})


def _fails(case: Case, folder: Path) -> bool:
    try:
        run_once(case, folder)
    except (Mismatch, EngineDied):
        return True
    return False


def keep(case: Case, folder: Path) -> str:
    """Write the case down and return the command that repeats it."""
    text = case.model_dump_json(indent=1)
    path = folder / f"case-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
    path.write_text(text)
    return REPEAT.format(path)
