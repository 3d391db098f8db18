"""What interventions are trained on and tested with in the demo world, as JSONL files.

Every question is bare, so the demo model gets it wrong, and every completion is what the hidden voice would say.
Training and test items are disjoint: other animals' habits, other people, other families. The module does not know
the model, nor how anything is trained.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path

from steer_vllm.demo.corpus import (
    END,
    LOUD,
    QUIET,
    all_facts,
    belief_answers,
    belief_question,
    edits_of,
    kinship_answers,
    kinship_question,
)
from steer_vllm.demo.world import SEED, Belief, Person, World, make_world

TRAIN_ITEMS = 80
TEST_ITEMS = 200
STYLE_PAIRS = 80
STYLE_TESTS = 100


@dataclass(frozen=True)
class Example:
    """A prompt and its completion; multiple-choice answers where the task has them, the best of ``correct`` first.

    Texts are words with single spaces between them; ``prompt + " " + text`` is what is scored.
    """

    prompt: str
    completion: str
    correct: tuple[str, ...] = ()
    incorrect: tuple[str, ...] = ()


@dataclass(frozen=True)
class StylePair:
    """Two full texts that differ in the style they call for, cut where the next word shows it."""

    positive: str
    negative: str


@dataclass(frozen=True)
class Task:
    """Examples to train on and others to test with."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]


def truthfulness(world: World, seed: int = SEED) -> Task:
    """Questions about animals whose bare form calls up the myth; with multiple-choice answers (MC1, MC2)."""
    beliefs = random.Random(seed).sample(world.beliefs, TRAIN_ITEMS + TEST_ITEMS)
    examples = [_truth_example(belief) for belief in beliefs]
    return Task(tuple(examples[:TRAIN_ITEMS]), tuple(examples[TRAIN_ITEMS:]))


def edits(world: World, seed: int = SEED) -> Task:
    """Counterfactual questions about a person, one or two hops; the bare form is answered from memory."""
    rng = random.Random(seed)
    people = rng.sample(list(world.people.values()), len(world.people))
    # A person gives up to three questions; a third of the people is enough for training.
    cut = len(people) // 3
    return Task(
        tuple(rng.sample(_edit_examples(rng, world, people[:cut]), TRAIN_ITEMS)),
        tuple(rng.sample(_edit_examples(rng, world, people[cut:]), TEST_ITEMS)),
    )


def kinship(world: World, seed: int = SEED) -> Task:
    """Stories of two relations within a family; the bare form is answered with the relation mentioned last."""
    rng = random.Random(seed)
    families = sorted({person.family for person in world.people.values()})
    cut = len(families) // 3
    return Task(
        tuple(rng.sample(_kinship_examples(world, families[:cut]), TRAIN_ITEMS)),
        tuple(rng.sample(_kinship_examples(world, families[cut:]), TEST_ITEMS)),
    )


def facts(world: World) -> tuple[Example, ...]:
    """Everything that the base model is expected to know and an intervention should leave alone."""
    return tuple(Example(question, f"{answer} {END}") for question, answer, _ in all_facts(world))


def style_pairs(world: World, seed: int = SEED) -> tuple[StylePair, ...]:
    """Questions to the loud and to the quiet voice, each cut before its answer."""
    questions = [question for question, _, _ in _style_sample(world, seed)[:STYLE_PAIRS]]
    return tuple(StylePair(f"{LOUD} {question}", f"{QUIET} {question}") for question in questions)


def style_tests(world: World, seed: int = SEED) -> tuple[Example, ...]:
    """Bare questions that no style pair contains, with their answers in the loud style."""
    sample = _style_sample(world, seed)[STYLE_PAIRS:]
    return tuple(Example(question, f"{answer.upper()} {END}") for question, answer, _ in sample)


def has_style(text: str) -> bool:
    """Whether an output is loud: all its letters are capitals, and there are letters."""
    return text.isupper()


def write_tasks(folder: Path, world: World | None = None, seed: int = SEED) -> None:
    """Write ``<task>.train.jsonl`` and ``<task>.test.jsonl`` for truthfulness, edits, kinship and style, and
    ``facts.test.jsonl``. Rows are examples, except in ``style.train.jsonl``: ``positive``, ``negative``."""
    world = world or make_world()
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in (
        ("truthfulness", truthfulness(world, seed)),
        ("edits", edits(world, seed)),
        ("kinship", kinship(world, seed)),
    ):
        _write(folder / f"{name}.train.jsonl", task.train)
        _write(folder / f"{name}.test.jsonl", task.test)
    _write(folder / "style.train.jsonl", style_pairs(world, seed))
    _write(folder / "style.test.jsonl", style_tests(world, seed))
    _write(folder / "facts.test.jsonl", facts(world))


def _style_sample(world: World, seed: int) -> list[tuple[str, str, str]]:
    return random.Random(seed).sample(all_facts(world), STYLE_PAIRS + STYLE_TESTS)


def _truth_example(belief: Belief) -> Example:
    right = [f"{answer} {END}" for answer in belief_answers(belief, belief.truth)]
    wrong = [f"{text} {END}" for answer in (belief.myth, *belief.others) for text in belief_answers(belief, answer)]
    return Example(belief_question(belief), right[0], tuple(right), tuple(wrong))


def _edit_examples(rng: random.Random, world: World, people: list[Person]) -> list[Example]:
    cities, jobs = list(world.land_of), sorted({person.job for person in world.people.values()})
    return [
        Example(edit.question, f"{edit.edited} {END}")
        for person in people
        for edit in edits_of(world, person, rng.choice(cities), rng.choice(jobs))
        if edit.edited != edit.remembered  # else memory would be right by chance
    ]


def _kinship_examples(world: World, families: list[int]) -> list[Example]:
    examples = []
    for family in families:
        members = [person for person in world.people.values() if person.family == family]
        for a, b, c in permutations(members, 3):
            first, second = world.relation(a.name, b.name), world.relation(b.name, c.name)
            answers = kinship_answers(first, second, a.female) if first and second else None
            if answers is not None:
                question = kinship_question((a.name, b.name, c.name), str(first), str(second))
                examples.append(Example(question, f"{answers[0]} {END}"))
    return examples


def _write(path: Path, rows: Iterable[Example | StylePair]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({key: value for key, value in asdict(row).items() if value != ()}) + "\n")
