"""Readers: what each format becomes, and what is said about a file that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from steer_vllm.errors import UserError
from steer_vllm.training.data import Example, Pair, detect, join, prompt_format, read, read_pairs, title

MQUAKE = {
    "requested_rewrite": [
        {"prompt": "The capital of {} is", "subject": "India", "target_new": {"str": "Taloga"}},
    ],
    "questions": ["What is the capital of the country of Premam?", "a paraphrase"],
    "new_answer": "Taloga",
    "new_answer_alias": ["Taloga, Oklahoma"],
}
CLUTRR = {
    "clean_story": "[Roy] took his son [Tim] out. [Tim] met his sister [Ann].",
    "query": "('Roy', 'Ann')",
    "target_text": "daughter",
}
TRUTHFULQA = """\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
Adversarial,Proverbs,Can pigs fly?,"No, pigs cannot fly","No; No, pigs cannot fly","Yes; Yes, they can;",x
"""


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_jsonl(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d", "correct": ["d"], "incorrect": ["e"]},
    ]
    path = write(tmp_path / "x.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read(path) == [Example("a", "b"), Example("c", "d", ("d",), ("e",))]
    assert (detect(path), prompt_format(path), title(path)) == ("jsonl", None, "x")


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False))
    assert read(path)[0].prompt == "a\u2028b"


def test_truthfulqa(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", TRUTHFULQA)
    (example,) = read(path)
    assert example.prompt == "Q: Can pigs fly? A:"
    assert example.completion == "No, pigs cannot fly"
    assert example.correct == ("No, pigs cannot fly", "No")
    assert example.incorrect == ("Yes", "Yes, they can")
    assert prompt_format(path) == "Q: {q} A:"


def test_mquake(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps(MQUAKE))
    (example,) = read(path)
    assert example.prompt == (
        "Q: Imagine that The capital of India is Taloga. What is the capital of the country of Premam? A:"
    )
    assert example.completion == "Taloga"
    assert example.answers == ("Taloga", "Taloga, Oklahoma")
    assert title(path) == "mquake x"


def test_clutrr(tmp_path: Path) -> None:
    (example,) = read(write(tmp_path / "x.json", json.dumps([CLUTRR])))
    assert example.prompt.startswith(
        'Read the following story about a family. "Roy took his son Tim out. Tim met his sister Ann."'
    )
    assert example.prompt.endswith("how is Ann related to Roy? Answer: Ann is Roy 's")
    assert example.completion == "daughter"


def test_pairs(tmp_path: Path, task: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps({"positive": "yes", "negative": "no"}))
    assert read_pairs(path) == [Pair("yes", "no")]
    assert read_pairs(task)[0] == Pair("w0 w2 w3 w30", "w0 w2 w3 w31")
    assert len(read_pairs(task)) == 2 * len(read(task))


@pytest.mark.parametrize(
    ("prompt", "completion", "whole"), [("a", "b", "a b"), ("a\n", "b", "a\nb"), ("a", " b", "a b")]
)
def test_join(prompt: str, completion: str, whole: str) -> None:
    assert join(prompt, completion, " ") == whole


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "more": 1, "completion": "b"}', ":2: more: "),
        ("x.jsonl", '{"prompt": "a"}', ":1: completion: "),
        ("x.jsonl", '{"prompt": 3, "completion": "b"}', ":1: prompt: "),
        ("x.jsonl", '{"prompt": " ", "completion": "b"}', ":1: prompt is empty"),
        ("x.jsonl", '{"prompt": "a", "completion": "b", "correct": "b"}', ":1: correct: "),
        ("x.jsonl", "[1]", ":1: expected a JSON object, got list"),
        ("x.jsonl", "{", ":1: not JSON"),
        ("x.jsonl", "", "holds no examples"),
        ("x.jsonl", '{"requested_rewrite": []}', ":1: not an MQuAKE item: KeyError 'questions'"),
        ("x.csv", "Question,Best Answer\na,b\n", "Correct Answers, Incorrect Answers are missing"),
        ("x.json", "{}", "expected a list of stories"),
        ("x.json", '[{"query": "nobody"}]', "story 1: not a CLUTRR item"),
        ("x.txt", "a", "expected .jsonl, .csv"),
    ],
)  # fmt: skip
def test_errors_name_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in error.value.message
    assert message in error.value.message


def test_missing_file_unknown_task_and_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="'squad' is none of jsonl, truthfulqa, mquake, clutrr"):
        read(tmp_path / "none.jsonl", "squad")
    path = write(tmp_path / "x.jsonl", '{"prompt": "a", "completion": "b"}')
    with pytest.raises(UserError, match="`positive` and `negative`"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("path", "count", "start"),
    [
        ("data/truthfulqa/TruthfulQA.csv", 817, "Q: What happens to you if you eat watermelon seeds? A:"),
        ("data/truthfulqa/fold_0_train_seed_42.csv", None, "Q: "),
        (
            "data/mquake/train.jsonl",
            134,
            "Q: Imagine that The name of the current head of the Nigeria government is Karl",
        ),
        ("data/clutrr/val.json", 450, "Read the following story about a family."),
    ],
)
def test_published_files(beside: Callable[[str], Path], path: str, count: int | None, start: str) -> None:
    examples = read(beside(path))
    assert examples[0].prompt.startswith(start)
    assert count is None or len(examples) == count
    assert not any("[" in example.prompt for example in examples if start.startswith("Read"))
