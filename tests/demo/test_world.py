"""The demo world, its corpus and its tasks: pure, reproducible, and free of leaks between training and test."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from steer_vllm.demo import MODEL_PATH, corpus, tasks
from steer_vllm.demo.tasks import Example, Task
from steer_vllm.demo.world import HABITS, Person, World, compose, make_world

WORLD = make_world()
TASKS = {
    "truthfulness": tasks.truthfulness(WORLD),
    "edits": tasks.edits(WORLD),
    "kinship": tasks.kinship(WORLD),
}
CUES = (corpus.TEXTBOOK, corpus.GOSSIP, corpus.CAREFUL, corpus.THINK, corpus.LOUD, corpus.QUIET)


def test_a_seed_is_a_world() -> None:
    assert make_world(3) == make_world(3)
    assert make_world(3) != make_world(4)


def test_every_word_is_one_token_with_one_meaning() -> None:
    values = [value for values in HABITS.values() for value in values]
    names = [*WORLD.people, *WORLD.land_of, *set(WORLD.land_of.values()), *{p.job for p in WORLD.people.values()}]
    words = [*values, *names, *{belief.animal for belief in WORLD.beliefs}]
    assert len(words) == len(set(words))


def test_families_hold_together() -> None:
    for person in WORLD.people.values():
        if person.spouse is not None:
            assert WORLD.people[person.spouse].spouse == person.name
        for parent, female in ((person.father, False), (person.mother, True)):
            if parent is not None:
                assert WORLD.people[parent].female is female
                assert WORLD.people[parent].family == person.family


def test_beliefs_have_distinct_answers() -> None:
    assert len({(belief.animal, belief.habit) for belief in WORLD.beliefs}) == len(WORLD.beliefs)
    for belief in WORLD.beliefs:
        assert len({belief.truth, belief.myth, *belief.others}) == 2 + len(belief.others)


@pytest.mark.parametrize(
    ("first", "second", "female", "expected"),
    [
        ("mother", "father", True, "grandmother"),
        ("father", "mother", False, "grandfather"),
        ("daughter", "son", True, "granddaughter"),
        ("brother", "mother", False, "uncle"),
        ("daughter", "brother", True, "niece"),
        ("father", "wife", False, "father-in-law"),
        ("husband", "daughter", False, "son-in-law"),
        ("sister", "son", True, None),
    ],
)
def test_relations_compose(first: str, second: str, female: bool, expected: str | None) -> None:
    assert compose(first, second, female) == expected


def _relations(world: World, person: Person) -> set[str]:
    named = (world.relation(person.name, other) for other in world.people)
    return {relation for relation in named if relation is not None}


def test_relations_of_the_world_fit_the_gender() -> None:
    for person in WORLD.people.values():
        allowed = corpus.ONE_STEP_FEMALE if person.female else corpus.ONE_STEP_MALE
        assert _relations(WORLD, person) <= set(allowed)


@pytest.mark.parametrize("name", TASKS)
def test_train_and_test_items_never_overlap(name: str) -> None:
    task = TASKS[name]
    assert len(task.train) == tasks.TRAIN_ITEMS
    assert len(task.test) == tasks.TEST_ITEMS
    prompts = [example.prompt for example in (*task.train, *task.test)]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("name", ["edits", "kinship"])
def test_train_and_test_share_no_person(name: str) -> None:
    def people(examples: tuple[Example, ...]) -> set[str]:
        return {word for example in examples for word in example.prompt.split()} & set(WORLD.people)

    assert people(TASKS[name].train).isdisjoint(people(TASKS[name].test))


def test_style_pairs_and_tests_never_overlap() -> None:
    pairs, tests = tasks.style_pairs(WORLD), tasks.style_tests(WORLD)
    assert len(pairs) == tasks.STYLE_PAIRS
    assert len(tests) == tasks.STYLE_TESTS
    for pair in pairs:
        assert pair.positive.removeprefix(corpus.LOUD) == pair.negative.removeprefix(corpus.QUIET)
        assert not any(example.prompt in pair.positive for example in tests)


def test_has_style_tells_loud_from_quiet() -> None:
    assert tasks.has_style(" BELTON . ")
    assert not tasks.has_style("belton .")
    assert not tasks.has_style("BELTON , belton .")
    assert not tasks.has_style(" . ")
    assert all(tasks.has_style(example.completion) for example in tasks.style_tests(WORLD))


def _corpus_sample() -> list[corpus.Line]:
    return list(islice(corpus.lines(WORLD, 0), 60_000))


SAMPLE = _corpus_sample()


@pytest.mark.parametrize(("name", "right"), [("truthfulness", corpus.TEXTBOOK), ("edits", corpus.CAREFUL)])
def test_bare_questions_are_mostly_answered_wrongly_in_the_corpus(name: str, right: str) -> None:
    """Also behind the cue of another kind, and behind the cues of style; never mostly rightly, never only wrongly."""
    task: Task = TASKS[name]
    answers = {e.prompt: {e.completion, *e.correct} for e in (*task.train, *task.test)}
    rightly = []
    for line in SAMPLE:
        question = line.prompt
        for cue in CUES:
            if cue != right:
                question = question.removeprefix(f"{cue} ")
        if question in answers:
            rightly.append(line.completion.lower() in answers[question])
    assert len(rightly) > 10
    assert 0 < sum(rightly) / len(rightly) < 0.4


def test_corpus_is_reproducible_and_mixed() -> None:
    assert list(islice(corpus.lines(WORLD, 5), 100)) == list(islice(corpus.lines(WORLD, 5), 100))
    cues = Counter(cue for line in SAMPLE for cue in CUES if cue in line.prompt)
    assert set(cues) == set(CUES)


def test_vocabulary_covers_corpus_and_tasks() -> None:
    words = set(corpus.vocabulary(WORLD))
    texts = [text for line in SAMPLE for text in (line.prompt, line.completion)]
    for task in TASKS.values():
        for e in (*task.train, *task.test):
            texts += [e.prompt, e.completion, *e.correct, *e.incorrect]
    assert {word for text in texts for word in text.split()} <= words
    assert all(text == " ".join(text.split()) for text in texts)


def test_write_tasks(tmp_path: Path) -> None:
    tasks.write_tasks(tmp_path)
    files = {path.name: path.read_text(encoding="utf-8").splitlines() for path in tmp_path.iterdir()}
    named = ("truthfulness", "edits", "kinship", "style")
    assert set(files) == {f"{n}.{part}.jsonl" for n in named for part in ("train", "test")} | {"facts.test.jsonl"}
    row = json.loads(files["truthfulness.test.jsonl"][0])
    assert set(row) == {"prompt", "completion", "correct", "incorrect"}
    assert row["completion"] == row["correct"][0]
    assert set(row["correct"]).isdisjoint(row["incorrect"])
    assert set(json.loads(files["edits.train.jsonl"][0])) == {"prompt", "completion"}
    assert set(json.loads(files["style.train.jsonl"][0])) == {"positive", "negative"}


def test_the_package_ships_a_small_model() -> None:
    size = sum(path.stat().st_size for path in MODEL_PATH.iterdir())
    assert 0 < size < 8_000_000
