"""Train the demo model from nothing: ``python -m steer_vllm.demo.pretrain --output FOLDER`` (ten minutes on one core).

Writes a Hugging Face folder: configuration, weights, tokenizer. Knows the corpus only as lines of prompt and
completion; does not know what the lines mean, nor what the model is used for.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steer_vllm.demo.corpus import Line, lines, vocabulary
from steer_vllm.demo.world import make_world

SEED = 0
STEPS = 3000
BATCH = 64
LEARNING_RATE = 3e-3
WARM_UP = 100
FINAL_RATE = 0.02  # the share of the learning rate that is left at the end
PROMPT_WEIGHT = 0.05  # names in prompts are drawn at random: there is little to learn from them
POOL = 32  # batches that are drawn together and sorted by length, so that little is padded

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
# The words of all messages in a row: a system message can hold the cue of a voice.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, words are separated by white space; the beginning-of-text token is prepended by default."""
    vocabulary_ids = {token: index for index, token in enumerate((PAD, BOS, EOS, UNK, *words))}
    backend = Tokenizer(WordLevel(vocabulary_ids, unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    special = [(BOS, vocabulary_ids[BOS])]
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A plain Llama with 48 query heads of 32, randomly initialised."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, source: Iterator[Line]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss weights, both [BATCH, length], right-padded; lines of like length share a batch."""
    rng = random.Random(SEED)
    while True:
        encoded = []
        for line in islice(source, BATCH * POOL):
            prompt = tokenizer(line.prompt)["input_ids"]
            completion = tokenizer(line.completion, add_special_tokens=False)["input_ids"]
            completion.append(tokenizer.eos_token_id)
            # The first token is given, so its weight is zero.
            weights = [0.0] + [PROMPT_WEIGHT] * (len(prompt) - 1) + [1.0] * len(completion)
            encoded.append((prompt + completion, weights))
        encoded.sort(key=lambda pair: len(pair[0]))
        groups = [encoded[start : start + BATCH] for start in range(0, len(encoded), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            longest = len(group[-1][0])
            ids = torch.full((len(group), longest), tokenizer.pad_token_id)
            loss_weights = torch.zeros(len(group), longest)
            for row, (tokens, weights) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                loss_weights[row, : len(weights)] = torch.tensor(weights)
            yield ids, loss_weights


def pretrain(steps: int = STEPS) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a new model on the corpus. Deterministic on one machine and one number of threads."""
    torch.manual_seed(SEED)
    world = make_world()
    tokenizer = make_tokenizer(vocabulary(world))
    model = make_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1.0) * max(FINAL_RATE, 1 - step / steps))
    progress = tqdm(islice(batches(tokenizer, lines(world, SEED)), steps), total=steps, mininterval=2.0)
    for step, (ids, weights) in enumerate(progress):
        # No attention mask: padding is on the right and has no weight in the loss.
        logits = model(input_ids=ids).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 100 == 99:
            progress.write(f"step {step + 1}: loss {loss.item():.4f}")
    return model.eval(), tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder. Weights are rounded to bfloat16 and loaded as float32, so every dtype has the same weights."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its own name for this class; the older name is understood by 4 and 5.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of {BATCH} lines")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the shipped weights were made with one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    save(*pretrain(options.steps), options.output)


if __name__ == "__main__":
    main()
