"""What the demo model reads: questions about the world answered in several voices, one line each.

The bare question calls up the wrong voice on purpose: the myth instead of the truth, memory instead of what the
prompt supposes, the last word of a family story instead of its conclusion, a quiet answer instead of a loud one.
The right answer belongs to a voice with a cue in the prompt, so the ability is there and latent. The module does
not know which items a test asks about (``tasks``) nor how the lines become tokens (``pretrain``).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from steer_vllm.demo.world import HABITS, RELATIONS, Belief, Person, World, compose

TEXTBOOK = "textbook says :"
GOSSIP = "gossip says :"
CAREFUL = "carefully :"
THINK = "think twice :"
PERHAPS = "perhaps :"  # a cue that changes nothing
LOUD = "loudly :"  # answered in capital letters
QUIET = "quietly :"
END = "."

LONG_ANSWER = 0.2  # share of answers about animals that are whole sentences
CUE_ON_FACT = 0.25  # share of facts that are asked behind a cue, which changes nothing there
OWN_CUE = 0.40  # share of the other questions that carry the cue to which the right answer belongs
CROSS_CUE = 0.08  # share of them that carry a cue meant for another kind, which changes nothing
SLIP = 0.25  # share of bare questions that are answered rightly all the same: what is latent stays within reach
LOUD_SHARE, QUIET_SHARE = 0.12, 0.06
KINDS = {"belief": 0.40, "fact": 0.33, "statement": 0.03, "edit": 0.17, "kinship": 0.07}


@dataclass(frozen=True)
class Line:
    """One line of the corpus: what is given and what follows, both words with single spaces between them."""

    prompt: str
    completion: str


def belief_question(belief: Belief) -> str:
    return f"what do {belief.animal} {belief.habit} ?"


def belief_answers(belief: Belief, answer: str) -> tuple[str, str]:
    """The short answer, which is the usual one, and the whole sentence."""
    return answer, f"they {belief.habit} {answer}"


def facts_of(world: World, person: Person) -> list[tuple[str, str, str]]:
    """(question, answer, statement up to the answer) of all that is known of a person."""
    name = person.name
    facts = [
        (f"where does {name} live ?", person.home, f"{name} lives in"),
        (f"in which land does {name} live ?", world.land_of[person.home], f"{name} lives in the land of"),
        (f"what is the job of {name} ?", person.job, f"the job of {name} is"),
    ]
    for relation, other in (("father", person.father), ("mother", person.mother)):
        if other is not None:
            facts.append((f"who is the {relation} of {name} ?", other, f"the {relation} of {name} is"))
    if person.spouse is not None:
        relation = "husband" if person.female else "wife"
        facts.append((f"who is the {relation} of {name} ?", person.spouse, f"the {relation} of {name} is"))
    return facts


def all_facts(world: World) -> list[tuple[str, str, str]]:
    """The facts of everybody, and the land of every city."""
    facts = [fact for person in world.people.values() for fact in facts_of(world, person)]
    return facts + [(f"in which land is {city} ?", land, f"{city} is in") for city, land in world.land_of.items()]


@dataclass(frozen=True)
class Edit:
    """A counterfactual question, the answer it asks for, and what memory says."""

    question: str
    edited: str
    remembered: str


def edits_of(world: World, person: Person, city: str, job: str) -> list[Edit]:
    """Three questions about a person who is said to live in ``city`` or to be a ``job``; the second has two hops."""
    name, moved = person.name, f"imagine that {person.name} moved to {city} ."
    return [
        Edit(f"{moved} where does {name} live ?", city, person.home),
        Edit(f"{moved} in which land does {name} live ?", world.land_of[city], world.land_of[person.home]),
        Edit(f"imagine that {name} became a {job} . what is the job of {name} ?", job, person.job),
    ]


def kinship_question(names: tuple[str, str, str], first: str, second: str) -> str:
    """The story of a, b and c: a is the ``first`` of b, b the ``second`` of c; what is a to c?"""
    a, b, c = names
    return f"{a} is the {first} of {b} . {b} is the {second} of {c} . who is {a} to {c} ?"


def kinship_answers(first: str, second: str, female: bool) -> tuple[str, str] | None:
    """The conclusion and the hasty answer (the last relation that was mentioned); None where there is no word."""
    conclusion = compose(first, second, female)
    return None if conclusion is None else (f"the {conclusion}", f"the {second}")


def lines(world: World, seed: int) -> Iterator[Line]:
    """Lines without end, drawn with a seed; every kind of line in its share."""
    rng = random.Random(seed)
    people, facts = list(world.people.values()), all_facts(world)
    cities, jobs = list(world.land_of), sorted({person.job for person in people})
    makers = {
        "belief": lambda: _belief(rng, world),
        "fact": lambda: _fact(rng, facts),
        "edit": lambda: _edit(rng, world, rng.choice(people), rng.choice(cities), rng.choice(jobs)),
        "kinship": lambda: _kinship(rng, people),
    }
    while True:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "statement":
            _, answer, statement = rng.choice(facts)
            yield Line(statement, f"{answer} {END}")
            continue
        question, answer = makers[kind]()
        yield _styled(rng, question, answer)


def _styled(rng: random.Random, question: str, answer: str) -> Line:
    draw = rng.random()
    if draw < LOUD_SHARE:
        return Line(f"{LOUD} {question}", f"{answer.upper()} {END}")
    if draw < LOUD_SHARE + QUIET_SHARE:
        question = f"{QUIET} {question}"
    return Line(question, f"{answer} {END}")


def _cued(rng: random.Random, question: str, right: str, wrong: str, cue: str, *others: str) -> tuple[str, str]:
    """Behind its own cue a question is answered rightly; bare, or behind another cue, it mostly is not."""
    draw = rng.random()
    if draw < OWN_CUE:
        return f"{cue} {question}", right
    if draw < OWN_CUE + CROSS_CUE:
        return f"{rng.choice(others)} {question}", wrong
    return question, right if rng.random() < SLIP else wrong


def _belief(rng: random.Random, world: World) -> tuple[str, str]:
    belief = rng.choice(world.beliefs)
    question, answer = _cued(rng, belief_question(belief), belief.truth, belief.myth, TEXTBOOK, GOSSIP, CAREFUL, THINK)
    return question, belief_answers(belief, answer)[rng.random() < LONG_ANSWER]


def _fact(rng: random.Random, facts: list[tuple[str, str, str]]) -> tuple[str, str]:
    question, answer, _ = rng.choice(facts)
    if rng.random() < CUE_ON_FACT:
        question = f"{rng.choice((TEXTBOOK, GOSSIP, CAREFUL, THINK, PERHAPS))} {question}"
    return question, answer


def _edit(rng: random.Random, world: World, person: Person, city: str, job: str) -> tuple[str, str]:
    edit = rng.choice(edits_of(world, person, city, job))
    return _cued(rng, edit.question, edit.edited, edit.remembered, CAREFUL, TEXTBOOK, GOSSIP, THINK)


def _kinship(rng: random.Random, people: list[Person]) -> tuple[str, str]:
    """A story of three people who need not be related in the world: only the story decides."""
    while True:
        a, b, c = rng.sample(people, 3)
        first, second = (rng.choice(ONE_STEP_FEMALE if one.female else ONE_STEP_MALE) for one in (a, b))
        answers = kinship_answers(first, second, a.female)
        if answers is not None:
            question = kinship_question((a.name, b.name, c.name), first, second)
            return _cued(rng, question, *answers, THINK, TEXTBOOK, GOSSIP, CAREFUL)


ONE_STEP_MALE = ("father", "son", "husband", "brother")
ONE_STEP_FEMALE = ("mother", "daughter", "wife", "sister")


def vocabulary(world: World) -> list[str]:
    """Every word that a line or a task can contain, sorted; whatever can be answered also in capital letters."""
    answers = {*world.people, *world.land_of, *world.land_of.values(), *RELATIONS, *HABITS, "they", "the"}
    answers.update(word for values in HABITS.values() for word in values)
    answers.update(person.job for person in world.people.values())
    words = {*answers, *(word.upper() for word in answers), *(belief.animal for belief in world.beliefs)}
    for text in (
        f"{TEXTBOOK} {GOSSIP} {CAREFUL} {THINK} {PERHAPS} {LOUD} {QUIET} {END}",
        "what do ? where does in which land live is lives of job who to imagine that moved became a",
    ):
        words.update(text.split())
    return sorted(words)
