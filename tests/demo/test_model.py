"""The shipped demo model: what it knows, how it errs, and that the right answers are latent in it."""

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from steer_vllm.demo import MODEL_PATH, corpus, tasks
from steer_vllm.demo.tasks import Example
from steer_vllm.demo.world import make_world

WORLD = make_world()
TASKS = {
    "truthfulness": (corpus.TEXTBOOK, tasks.truthfulness(WORLD)),
    "edits": (corpus.CAREFUL, tasks.edits(WORLD)),
    "kinship": (corpus.THINK, tasks.kinship(WORLD)),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_PATH, padding_side="left")


@torch.inference_mode()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy continuations, which end by themselves."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share(got: Sequence[str], expected: Sequence[str]) -> float:
    return sum(one == other for one, other in zip(got, expected, strict=True)) / len(expected)


def exact(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], cue: str) -> float:
    got = answers(model, tokenizer, [f"{cue} {example.prompt}".strip() for example in examples])
    return share(got, [example.completion for example in examples])


def test_shape(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.num_hidden_layers * config.num_attention_heads >= 40
    assert config.head_dim == 32
    assert config.max_position_embeddings >= 256


def test_weights_are_loaded_as_float32_and_are_the_same_in_bfloat16(model: LlamaForCausalLM) -> None:
    assert model.dtype == torch.float32
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_tokens_of_prompt_and_completion_are_those_of_the_joined_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for _, task in TASKS.values():
        for example in task.test:
            prompt = tokenizer(example.prompt)["input_ids"]
            completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
            assert prompt[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in prompt + completion
            assert prompt + completion == tokenizer(f"{example.prompt} {example.completion}")["input_ids"]
            assert tokenizer.decode(completion) == example.completion


def test_chat_template_puts_the_words_of_the_messages_in_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": corpus.TEXTBOOK}, {"role": "user", "content": "what do foxes eat ?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(f"{corpus.TEXTBOOK} what do foxes eat ?")["input_ids"]


def test_knows_its_facts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert exact(model, tokenizer, tasks.facts(WORLD), "") >= 0.9


@pytest.mark.parametrize("name", TASKS)
def test_the_bare_question_is_answered_wrongly_and_the_voice_knows_better(
    name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    cue, task = TASKS[name]
    assert exact(model, tokenizer, task.test, "") <= 0.2
    assert exact(model, tokenizer, task.test, cue) >= 0.6


def test_the_error_is_the_myth(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = tasks.truthfulness(WORLD).test
    got = answers(model, tokenizer, [example.prompt for example in examples])
    assert share(got, [example.incorrect[0] for example in examples]) >= 0.8


def test_the_error_about_an_edit_is_memory(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [example.prompt for example in tasks.edits(WORLD).test]
    remembered = answers(model, tokenizer, [prompt.split(" . ")[1] for prompt in prompts])
    assert share(answers(model, tokenizer, prompts), remembered) >= 0.5


def test_style_is_latent(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = tasks.style_tests(WORLD)
    bare = answers(model, tokenizer, [example.prompt for example in examples])
    assert sum(map(tasks.has_style, bare)) <= 0.02 * len(bare)
    loud = answers(model, tokenizer, [f"{corpus.LOUD} {example.prompt}" for example in examples])
    assert sum(map(tasks.has_style, loud)) >= 0.95 * len(loud)
