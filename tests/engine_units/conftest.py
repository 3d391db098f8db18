"""One thread and the hypothesis profile of the core's tests; toy models are built of vLLM's base classes."""

from __future__ import annotations

import torch
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None, print_blob=True)
settings.load_profile("shared_machine")
torch.set_num_threads(1)
