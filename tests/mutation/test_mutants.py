"""The list of deliberate faults keeps up with the code and the documentation. `make mutants` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import page
from .mutant import Mutant
from .mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fault_can_be_put_in(mutant: Mutant, root: Path) -> None:
    assert (root / mutant.path).read_text().count(mutant.before) == 1
    assert mutant.before != mutant.after
    for killer in mutant.killers:
        assert (root / killer.split("::")[0]).exists()


def test_faults_are_documented(root: Path) -> None:
    assert page.table() in (root / "docs" / "exactness.md").read_text()
