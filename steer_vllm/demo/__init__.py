"""A miniature of the LoFiT and ReFT papers: a synthetic world, tasks about it, and a small model that knows it.

``MODEL_PATH`` is the folder of the model that ships with the package, in Hugging Face's format; run it in float32.
``steer_vllm.demo.pretrain`` makes such a folder from nothing.
"""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
