"""A tiny multi-modal model (Idefics3: a vision tower of five layers, a Llama of three) and pictures for it.

Random weights; a picture is four tokens wide. Built without network, with transformers alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

SPECIAL = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
IMAGE = 4
"""The token that stands for a picture in a prompt."""
FIRST_WORD = 8
VOCABULARY = 96
SIDE = 28


def build(folder: Path) -> Path:
    """Write the model with its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    words = ["<pad>", "<s>", "</s>", "<unk>", *SPECIAL]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(SPECIAL), **names)
    shape = {"hidden_size": 64, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    width = {"intermediate_size": 128, "max_position_embeddings": 512, "num_key_value_heads": 2}
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "num_hidden_layers": 3, **shape, **width, **ids}
    vision = Idefics3VisionConfig(num_hidden_layers=5, intermediate_size=96, image_size=SIDE, patch_size=7, **shape)
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    edge = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    Idefics3Processor(images, fast, image_seq_len=4).save_pretrained(folder)
    return folder


def draw(folder: Path, seed: int) -> Path:
    """A picture of noise."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{seed}.png")
    return folder / f"{seed}.png"


def pixels(model: Path, images: list[Path]) -> dict[str, torch.Tensor]:
    """What transformers' model takes for these pictures."""
    from PIL import Image
    from transformers import AutoProcessor

    if not images:
        return {}
    processor = AutoProcessor.from_pretrained(model)
    made = processor.image_processor([[Image.open(path) for path in images]], return_tensors="pt")
    return {"pixel_values": made["pixel_values"], "pixel_attention_mask": made["pixel_attention_mask"]}
