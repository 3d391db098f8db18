"""A small world made up from a seed: people in families, cities in lands, jobs, and what animals do.

About every animal there is a truth and a myth. The module knows what is the case; it does not know how anybody
talks about it (``corpus``) or what is asked in a test (``tasks``).
"""

import random
from dataclasses import dataclass
from itertools import product

SEED = 4
FAMILIES = 10
CITIES = 32

LANDS = ("arvia", "borland", "cestia", "dunmark", "elvania", "frosia", "galmark", "hestland")
JOBS = (
    *("baker", "barber", "carpenter", "clerk", "cook", "doctor", "driver", "farmer", "fisher", "gardener", "guard"),
    *("hunter", "judge", "lawyer", "miller", "miner", "nurse", "painter", "pilot", "plumber", "poet", "potter"),
    *("sailor", "singer", "smith", "tailor", "teacher", "weaver"),
)
ANIMALS = (
    *("ants", "apes", "badgers", "bats", "bears", "beavers", "bees", "bulls", "camels", "cats", "cows", "cranes"),
    *("crows", "deer", "dogs", "doves", "ducks", "eagles", "eels", "falcons", "ferrets", "foxes", "frogs", "geese"),
    *("goats", "hares", "hawks", "herons", "horses", "hyenas", "jackals", "lambs", "larks", "lions", "lizards"),
    *("mice", "moles", "monkeys", "moths", "mules", "newts", "otters", "owls", "oxen", "pandas", "parrots", "pigs"),
    *("ponies", "rabbits", "rats", "ravens", "seals", "sheep", "snails", "snakes", "spiders", "storks", "swans"),
    *("tigers", "toads", "turtles", "wasps", "whales", "wolves"),
)
HABITS = {
    "eat": (
        *("acorns", "apples", "bark", "beans", "beetles", "berries", "bread", "butter", "carrots", "cheese", "clover"),
        *("corn", "crabs", "eggs", "fish", "grapes", "grass", "honey", "leaves", "melons", "moss", "nuts", "onions"),
        *("peas", "plums", "rice", "roots", "salt", "seeds", "worms"),
    ),
    "fear": (
        *("bells", "bridges", "candles", "children", "clocks", "clouds", "drums", "echoes", "fences", "fire", "flags"),
        *("fog", "hail", "ice", "kites", "lamps", "masks", "mirrors", "mud", "noise", "rain", "ropes", "shadows"),
        *("smoke", "snow", "songs", "storms", "thunder", "whistles", "wind"),
    ),
    "carry": (
        *("bones", "bottles", "boxes", "bricks", "brooms", "buckets", "buttons", "coins", "combs", "cups", "feathers"),
        *("forks", "gloves", "hats", "keys", "letters", "nails", "needles", "pebbles", "pens", "pots", "ribbons"),
        *("rings", "shells", "shoes", "spoons", "sticks", "stones", "straw", "wool"),
    ),
    "love": (
        *("april", "autumn", "birthdays", "chess", "dancing", "dawn", "december", "dusk", "fairs", "february"),
        *("feasts", "fridays", "games", "june", "march", "markets", "midnight", "mondays", "music", "noon", "november"),
        *("october", "parades", "racing", "riddles", "spring", "summer", "sundays", "weddings", "winter"),
    ),
    "become": (
        *("blind", "bold", "brave", "calm", "clever", "cold", "cross", "dizzy", "fast", "fat", "gentle", "happy"),
        *("heavy", "hungry", "lazy", "loud", "lucky", "mad", "proud", "quiet", "rich", "rude", "sad", "shy", "sick"),
        *("sleepy", "slow", "strong", "wise", "young"),
    ),
}
RELATIONS = (
    *("father", "mother", "son", "daughter", "husband", "wife", "brother", "sister"),
    *("grandfather", "grandmother", "grandson", "granddaughter", "uncle", "aunt", "nephew", "niece"),
    *("father-in-law", "mother-in-law", "son-in-law", "daughter-in-law", "brother-in-law", "sister-in-law"),
)


@dataclass(frozen=True)
class Person:
    """One person; ``father``, ``mother`` and ``spouse`` are names, or None where the world does not reach."""

    name: str
    female: bool
    family: int
    home: str
    job: str
    father: str | None = None
    mother: str | None = None
    spouse: str | None = None


@dataclass(frozen=True)
class Belief:
    """What ``animal`` does (``habit``): the truth, the myth everybody repeats, and other wrong answers."""

    animal: str
    habit: str
    truth: str
    myth: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """Everything that is the case. ``people`` and ``land_of`` are keyed by the name of a person and of a city."""

    people: dict[str, Person]
    land_of: dict[str, str]
    beliefs: tuple[Belief, ...]

    def relation(self, one: str, other: str) -> str | None:
        """The word that says what ``one`` is to ``other`` within one step (parent, child, spouse, sibling), or None."""
        a, b = self.people[one], self.people[other]
        if one in (b.father, b.mother):
            return "mother" if a.female else "father"
        if other in (a.father, a.mother):
            return "daughter" if a.female else "son"
        if a.spouse == other:
            return "wife" if a.female else "husband"
        if one != other and a.father is not None and a.father == b.father:
            return "sister" if a.female else "brother"
        return None


def compose(first: str, second: str, female: bool) -> str | None:
    """What a is to c when a is the ``first`` of b and b is the ``second`` of c; None where no word of its own says it.

    ``female`` is the gender of a. The mother of the father is the grandmother. Chains that come back to a one-step
    word (the sister of the son is a daughter) are left out, so that the answer is never a word of the story.
    """
    pair = _COMPOSED.get((_NEUTRAL[first], _NEUTRAL[second]))
    return None if pair is None else pair[female]


_NEUTRAL = {
    "father": "parent",
    "mother": "parent",
    "son": "child",
    "daughter": "child",
    "husband": "spouse",
    "wife": "spouse",
    "brother": "sibling",
    "sister": "sibling",
}
# Keys are (what a is to b, what b is to c); values are the words for a man and for a woman.
_COMPOSED = {
    ("parent", "parent"): ("grandfather", "grandmother"),
    ("child", "child"): ("grandson", "granddaughter"),
    ("sibling", "parent"): ("uncle", "aunt"),
    ("child", "sibling"): ("nephew", "niece"),
    ("parent", "spouse"): ("father-in-law", "mother-in-law"),
    ("spouse", "child"): ("son-in-law", "daughter-in-law"),
    ("sibling", "spouse"): ("brother-in-law", "sister-in-law"),
    ("spouse", "sibling"): ("brother-in-law", "sister-in-law"),
}


def make_world(seed: int = SEED) -> World:
    """The world of a seed: the same seed gives the same world on every machine."""
    rng = random.Random(seed)
    taken: set[str] = {*LANDS, *JOBS, *ANIMALS, *RELATIONS}
    cities = [_invent(rng, ("ton", "burg", "ford", "ville", "mouth", "stead"), taken) for _ in range(CITIES)]
    land_of = {city: LANDS[index % len(LANDS)] for index, city in enumerate(cities)}
    people: dict[str, Person] = {}
    for family in range(FAMILIES):
        people.update({person.name: person for person in _make_family(rng, family, cities, taken)})
    beliefs = []
    for animal, (habit, values) in product(ANIMALS, HABITS.items()):
        truth, myth, *others = rng.sample(values, 5)
        beliefs.append(Belief(animal, habit, truth, myth, tuple(others)))
    return World(people, land_of, tuple(beliefs))


def _make_family(rng: random.Random, family: int, cities: list[str], taken: set[str]) -> list[Person]:
    """Two grandparents; a married son, a married daughter and an unmarried child; two children of each couple."""

    def person(female: bool, father: str | None = None, mother: str | None = None) -> Person:
        name = _invent(rng, ("a", "ia", "elle", "i") if female else ("o", "us", "ard", "en"), taken)
        return Person(name, female, family, rng.choice(cities), rng.choice(JOBS), father, mother)

    def couple(man: Person, woman: Person) -> tuple[Person, Person]:
        man_values, woman_values = vars(man) | {"spouse": woman.name}, vars(woman) | {"spouse": man.name}
        return Person(**man_values), Person(**woman_values)

    elders = couple(person(False), person(True))
    parents = (elders[0].name, elders[1].name)
    first = couple(person(False, *parents), person(True))
    second = couple(person(False), person(True, *parents))
    members = [*elders, *first, *second, person(rng.random() < 0.5, *parents)]
    for man, woman in (first, second):
        members += [person(rng.random() < 0.5, man.name, woman.name) for _ in range(2)]
    return members


def _invent(rng: random.Random, endings: tuple[str, ...], taken: set[str]) -> str:
    """A pronounceable new name with one of the endings; ``taken`` remembers it."""
    onsets = ("b", "br", "d", "dr", *"ghklmnprstvwz", "gr", "st", "tr")
    while True:
        name: str = rng.choice(onsets) + rng.choice("aeiou") + rng.choice("bdklmnrstvz") + rng.choice(endings)
        if name not in taken:
            taken.add(name)
            return name
