"""Gradient training of anything `Learned`, on transformers' Trainer and accelerate.

AdamW, linear decay, clipping, seeds, accumulation, progress bar and log are the Trainer's. It does not know what is
learnt and saves nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from .base import Base
from .collate import Collator, Encoded
from .learned import Learned
from .module import SteeredModel
from .settings import GradientSettings

Log = list[dict[str, Any]]
"""The Trainer's history: step, epoch, loss, learning rate, norm of the gradient."""


def fit(learned: Learned, base: Base, data: Sequence[Encoded], settings: GradientSettings, lr: float) -> Log:
    """Train `learned` in place. lr: the learning rate at the start."""
    steps = settings.steps(len(data))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=round(settings.warmup * steps),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
            optim="adamw_torch",
            seed=settings.seed,
            logging_steps=min(settings.logging_steps, steps),
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        # One process, one GPU: nn.DataParallel would copy the hooks' state. Several GPUs go through accelerate.
        arguments._n_gpu = min(1, arguments.n_gpu)
        trainer = Trainer(
            model=SteeredModel(base.model, learned),
            args=arguments,
            train_dataset=list(data),
            data_collator=Collator(base.tokenizer),
        )
        trainer.train()
    return list(trainer.state.log_history)
