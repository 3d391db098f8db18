"""Faults while loading, for tests: what goes wrong is written in the name of the artifact's folder.

`slow@VllmWorker-1`: reading takes a second in the process of that name and in those it started (`*`: in all). Also
`fail-read`, `fail-commit`, `die` (while reading). With this folder on PYTHONPATH, the processes of an engine do so.
"""

import importlib.util
import multiprocessing
import os
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

LOADER = "steer_vllm.engine.loader"


def fault_of(load):
    what, _, where = Path(load.folder).name.partition("@")
    here = [multiprocessing.current_process(), multiprocessing.parent_process()]
    return what if where == "*" or where in [process.name for process in here if process] else None


def spoil(loader):
    prepare, commit = loader.Load._prepare, loader.Load.commit

    def prepare_or_not(self):
        fault = fault_of(self)
        if fault == "slow":
            time.sleep(1)
        elif fault == "die":
            os._exit(7)
        elif fault == "fail-read":
            return {"state": "failed", "code": "artifact_invalid", "message": "a fault on purpose"}
        return prepare(self)

    def fail(*, plain=True):
        raise MemoryError("a fault on purpose")

    def commit_or_not(self):
        if fault_of(self) == "fail-commit":
            self.compilation.project = fail  # before ranks add up their parts, if they do
            if self.parts:
                fail()
        return commit(self)

    loader.Load._prepare, loader.Load.commit = prepare_or_not, commit_or_not


class _Spoiled(MetaPathFinder):
    """Changes the loader right after it has been imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_spoil(module):
            execute(module)
            spoil(module)

        spec.loader.exec_module = execute_and_spoil
        return spec


sys.meta_path.insert(0, _Spoiled())
