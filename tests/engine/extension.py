"""What a trainer would bring into vLLM's workers (`worker_extension_cls`): weights that come from no checkpoint."""

from __future__ import annotations

from typing import Any

import safetensors.torch


class Trainer:
    def take_weights(self: Any, file: str) -> None:
        self.reload_weights(weights_iterator=iter(safetensors.torch.load_file(file).items()))

    def fail_on_purpose(self: Any) -> None:
        raise RuntimeError("on purpose")
