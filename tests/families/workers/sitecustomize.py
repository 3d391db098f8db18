"""Makes the tests' own method known in workers that are processes of their own.

With this folder on PYTHONPATH, importing the engine's loader also imports `families.probe`; nothing else changes.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

LOADER = "steer_vllm.engine.loader"


class _Known(MetaPathFinder):
    """Imports the method right after the loader has been imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            importlib.import_module("families.probe")

        spec.loader.exec_module = execute_and_register
        return spec


sys.meta_path.insert(0, _Known())
