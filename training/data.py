"""Examples to learn from, and the files they are read from.

Four formats, told apart by ending and first line: JSONL with `prompt` and `completion`, TruthfulQA's csv, MQuAKE's
jsonl and CLUTRR's json, with the prompts of LoFiT (Yin et al. 2024, appendix). It knows no tokens and no model.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..errors import UserError

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class Example:
    """A prompt and its completion. `correct` and `incorrect`: the answers of a multiple choice, where there is one."""

    prompt: str
    completion: str
    correct: tuple[str, ...] = ()
    incorrect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.completion.strip():
            raise ValueError(f"{'completion' if self.prompt.strip() else 'prompt'} is empty")

    @property
    def answers(self) -> tuple[str, ...]:
        """Everything that counts as right: the completion first."""
        return (self.completion, *(answer for answer in self.correct if answer != self.completion))


@dataclass(frozen=True, config=_STRICT)
class Pair:
    """Two whole texts that differ in what a direction is to capture, best in their last token's meaning."""

    positive: str
    negative: str


class Format(NamedTuple):
    """How a file is read, and the template its prompts were made with (None: the file's own)."""

    rows: Callable[[Path], Iterator[Example]]
    prompt_format: str | None


def detect(path: Path) -> str:
    """The format's name by ending and first line. Errors: `UserError`."""
    if path.suffix == ".csv":
        return "truthfulqa"
    if path.suffix == ".json":
        return "clutrr"
    if path.suffix == ".jsonl":
        first = next(iter(_objects(path)), (0, {}))[1]
        return "mquake" if "requested_rewrite" in first else "jsonl"
    raise UserError(f"{path}: expected .jsonl, .csv (TruthfulQA) or .json (CLUTRR), or a format given by --task")


def read(path: Path, task: str | None = None) -> list[Example]:
    """All examples of a file. task: a name of `FORMATS`; None: by `detect`.

    Errors: `UserError` with file, line and field.
    """
    examples = list(_format(path, task).rows(path))
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def prompt_format(path: Path, task: str | None = None) -> str | None:
    """The template behind the file's prompts, if the format has one."""
    return _format(path, task).prompt_format


def title(path: Path, task: str | None = None) -> str:
    """What to call the file's task in a table: its name, after the format's where there is one."""
    name = task if task is not None else detect(path)
    return path.stem if name == "jsonl" else f"{name} {path.stem}"


def read_pairs(path: Path, task: str | None = None, separator: str = " ") -> list[Pair]:
    """Contrasts of a file: JSONL rows `positive`, `negative`; or examples, whose completion and incorrect answers make
    a pair each.

    Errors: `UserError` with file, line and field, or when no example has an incorrect answer.
    """
    if path.suffix == ".jsonl" and task in (None, "jsonl"):
        objects = list(_objects(path))
        if objects and {"positive", "negative"} & set(objects[0][1]):
            return [_row(Pair, value, f"{path}:{line}") for line, value in objects]
    pairs = [
        Pair(join(example.prompt, example.completion, separator), join(example.prompt, wrong, separator))
        for example in read(path, task)
        for wrong in example.incorrect
    ]
    if not pairs:
        raise UserError(f"{path}: expected `positive` and `negative` texts, or examples with `incorrect` answers")
    return pairs


def join(prompt: str, completion: str, separator: str) -> str:
    """The whole text: with the separator unless there is space at the joint already."""
    return prompt + ("" if prompt[-1].isspace() or completion[0].isspace() else separator) + completion


def _format(path: Path, task: str | None) -> Format:
    name = task if task is not None else detect(path)
    if name not in FORMATS:
        raise UserError(f"--task: {name!r} is none of {', '.join(FORMATS)}")
    return FORMATS[name]


T = TypeVar("T")


def _row(kind: type[T], value: dict[str, Any], where: str) -> T:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        known = ", ".join(kind.__dataclass_fields__)  # type: ignore[attr-defined]
        what = (
            f"unknown field; there are {known}"
            if first["type"] == "unexpected_keyword_argument"
            else first["msg"].removeprefix("Value error, ")
        )
        raise UserError(f"{where}: {field + ': ' if field else ''}{what}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}")
        yield number, value


def _jsonl(path: Path) -> Iterator[Example]:
    for line, value in _objects(path):
        yield _row(Example, value, f"{path}:{line}")


def _truthfulqa(path: Path) -> Iterator[Example]:
    rows = csv.DictReader(line for _, line in _lines(path))
    needed = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    missing = [name for name in needed if name not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{path}: the columns {', '.join(missing)} are missing")
    for number, row in enumerate(rows, 1):
        question, best, correct, incorrect = (row[name] for name in needed)
        if None in (question, best, correct, incorrect):
            raise UserError(f"{path}: row {number} has too few columns")
        value = {
            "prompt": f"Q: {question.strip()} A:",
            "completion": best.strip(),
            "correct": list(dict.fromkeys([best.strip(), *_answers(correct)])),
            "incorrect": _answers(incorrect),
        }
        yield _row(Example, value, f"{path}: row {number}")


def _answers(text: str) -> list[str]:
    return [answer for part in text.split("; ") if (answer := part.strip().strip(";").strip())]


def _mquake(path: Path) -> Iterator[Example]:
    """As LoFiT: the first of the paraphrased questions, the new answer; its aliases count as right."""
    for line, item in _objects(path):
        try:
            edits = [
                f"{rewrite['prompt'].format(rewrite['subject'])} {rewrite['target_new']['str']}"
                for rewrite in item["requested_rewrite"]
            ]
            value = {
                "prompt": f"Q: Imagine that {' and '.join(edits)}. {item['questions'][0]} A:",
                "completion": item["new_answer"],
                "correct": [item["new_answer"], *item["new_answer_alias"]],
            }
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{line}: not an MQuAKE item: {type(error).__name__} {error}") from error
        yield _row(Example, value, f"{path}:{line}")


_CLUTRR = (
    'Read the following story about a family. "{story}" Assume the relations described in the story are all true. '
    "Based on relations between the fictional characters in the story (assume the relations are all true) and your "
    "commonsense knowledge about family relationship, how is {c2} related to {c1}? Answer: {c2} is {c1} 's"
)


def _clutrr(path: Path) -> Iterator[Example]:
    """As LoFiT: the clean story without its brackets; the query is the pair (c1, c2)."""
    try:
        items = json.loads("\n".join(line for _, line in _lines(path)))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a list of stories, got {type(items).__name__}")
    for number, item in enumerate(items, 1):
        try:
            c1, c2 = ast.literal_eval(item["query"])
            story = item["clean_story"].replace("[", "").replace("]", "")
            value = {"prompt": _CLUTRR.format(story=story, c1=c1, c2=c2), "completion": item["target_text"]}
        except (KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
            raise UserError(f"{path}: story {number}: not a CLUTRR item: {type(error).__name__} {error}") from error
        yield _row(Example, value, f"{path}: story {number}")


FORMATS = {
    "jsonl": Format(_jsonl, None),
    "truthfulqa": Format(_truthfulqa, "Q: {q} A:"),
    "mquake": Format(_mquake, "Q: Imagine that {edit}. {q} A:"),
    "clutrr": Format(_clutrr, _CLUTRR),
}
