"""Lets vLLM's Model Runner V2 run where there is no GPU, on Triton's interpreter.

vLLM's CPU build takes Triton into use only when a Triton backend named "cpu" is there. The released package has none,
yet its interpreter needs none: it runs kernels as NumPy. With this folder on PYTHONPATH and TRITON_INTERPRET=1, the
name exists. Slow, and for tests only.
"""

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder


class _CpuBackend(MetaPathFinder):
    """Adds the backend right after `triton.backends` has been executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "triton.backends":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_add(module):
            execute(module)
            model = module.backends["nvidia"]
            driver = type("InterpretedDriver", (model.driver,), {"is_active": staticmethod(lambda: True)})
            module.backends["cpu"] = type(model)(compiler=model.compiler, driver=driver)

        spec.loader.exec_module = execute_and_add
        return spec


if os.environ.get("TRITON_INTERPRET") == "1":
    sys.meta_path.insert(0, _CpuBackend())
