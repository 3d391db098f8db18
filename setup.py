"""Names the packages of the wheel; everything else is in pyproject.toml.

`training/` and `server/` stand beside `steer_vllm/` in the repository and are installed inside it, so that the wheel
claims one name. Setuptools' declarative search cannot put a prefix before what it finds, hence these few lines.
"""

from setuptools import find_packages, setup

FOLDERS = {"steer_vllm": "steer_vllm", "steer_vllm.training": "training", "steer_vllm.server": "server"}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{inner}" for inner in find_packages(folder))]
    ],
)
