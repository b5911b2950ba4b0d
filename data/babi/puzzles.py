"""bAbI tasks 4 and 14-20: puzzles, which share no world and have a scheme each.

    from data.babi.puzzles import PUZZLES
    story = PUZZLES["qa19"].story(random.Random(1))

A task is a function and a row of PUZZLES. Sentences and probabilities are those of the released
files (v1.2, English). Where the files do not show their rule, one was fitted to their counts; a
comment says so. Writes nothing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from data.babi.story import ROOMS, TOWN, VERBS, Event, Odds, Question, Story, pick

VECTOR = {  # side -> one step to it, as (to the right, up)
    "north of": (0, 1),
    "south of": (0, -1),
    "east of": (1, 0),
    "west of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
    "to the right of": (1, 0),
    "to the left of": (-1, 0),
}
COMPASS = ("north of", "south of", "east of", "west of")
SIDES = ("above", "below", "to the right of", "to the left of")
OPPOSITE = {
    "north of": "south of",
    "south of": "north of",
    "east of": "west of",
    "west of": "east of",
    "above": "below",
    "below": "above",
    "to the right of": "to the left of",
    "to the left of": "to the right of",
}


class Pause(NamedTuple):
    """A point of a puzzle at which questions are asked."""

    n_facts: int  # the number of statements before it
    odds: Odds  # what can be asked; only a lesson asks what has weight 0
    n_questions: int  # how many questions a story draws here


@dataclass(frozen=True)
class Puzzle:
    """One bAbI task that is no world."""

    stem: str  # the released files are named "<task>_<stem>_train.txt"
    make: Callable[[random.Random], tuple[list[str], list[Pause]]]  # its statements and its pauses
    tail: str = ""  # what the files have between the question mark and the tab

    def story(self, rng: random.Random) -> Story:
        """A story as in the released files: its questions are drawn by weight, and may repeat."""
        texts, pauses = self.make(rng)
        questions = []
        for n_facts, odds, n_questions in pauses:
            for question in rng.choices(list(odds), odds.values(), k=n_questions):
                questions.append((n_facts, question))
        return Story(list(map(Event, texts)), questions)

    def everything(self, events: list[Event], rng: random.Random) -> list[Question]:
        """No questions: a puzzle can be asked only where it was made to pause."""
        return []

    def lesson(self, n_facts: int, rng: random.Random) -> tuple[list[Event], list[Question]]:
        """A story up to one of its pauses, and what can be asked there, each text once.

        A question of less than the largest weight is left out more often the less it has, so that
        answers stay balanced. One of weight 0 is always kept. The questions come in random order.
        n_facts is not used, because a puzzle has a length of its own."""
        texts, pauses = self.make(rng)
        pause = pick(rng, pauses)
        largest = max(pause.odds.values())
        kept = []
        for question, weight in pause.odds.items():
            if weight == 0 or rng.random() * largest < weight:
                kept.append(question)
        rng.shuffle(kept)
        events = [Event(text) for text in texts[: pause.n_facts]]
        return events, list({question.text: question for question in kept}.values())


class Placed(NamedTuple):
    """A statement that a thing is on some side of another one."""

    thing: str
    side: str
    near: str
    text: str

    def seen_from(self, thing: str) -> tuple[str, str]:
        """Of the two things the other one, and on which side of this one it is."""
        if thing == self.near:
            return self.thing, self.side
        return self.near, OPPOSITE[self.side]


def placed(rng: random.Random, thing: str, side: str, near: str, odds: float) -> Placed:
    """Say on which side of another thing a thing is.

    With probability 1 - odds the sentence is turned round: it starts with the other thing."""
    if rng.random() >= odds:
        thing, near = near, thing
        side = OPPOSITE[side]
    return Placed(thing, side, near, f"The {thing} is {side} the {near}.")


# qa4: two-argument relations


def qa4(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Two rooms are on opposite sides of a third. Ask for the room that a statement names first."""
    one, middle, other = rng.sample(ROOMS, 3)
    side = pick(rng, COMPASS)
    facts = [
        placed(rng, one, side, middle, 2 / 3),
        placed(rng, other, OPPOSITE[side], middle, 2 / 3),
    ]
    odds = {}
    for i, (thing, side, near, _) in enumerate(facts):
        odds[Question(f"What is {side} the {near}?", thing, (i,))] = 1
        odds[Question(f"What is the {near} {OPPOSITE[side]}?", thing, (i,))] = 1
    return [fact.text for fact in facts], [Pause(2, odds, 1)]


# qa14: time reasoning

WALKERS = ("Bill", "Julie", "Fred", "Mary")
TIMES = ("yesterday", "this morning", "this afternoon", "this evening")


class Visit(NamedTuple):
    """A statement that an actor went to a room at a time of day."""

    actor: str
    time: int  # index in TIMES
    room: str
    text: str


def qa14(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Each time of day finds an actor in another room. Ask where he was before one of the last five
    visits.

    Two visits are drawn at a time, and told out of order. The files ask "before the park" also if
    the actor was there twice."""
    lived = []  # visits in the order in which they are drawn
    told = []  # the same ones in the order in which they are told
    rooms_of = {actor: [] for actor in WALKERS}  # by time
    pauses = []
    while len(pauses) < 5:
        for _ in range(2):
            visit = draw_visit(rng, rooms_of)
            rooms_of[visit.actor].append(visit.room)
            lived.append(visit)
        if all(visit.time == 0 for visit in lived[-5:]):
            continue  # nothing can be asked yet
        told += out_of_order(rng, lived[len(told) :])
        pauses.append(Pause(len(told), befores(told, lived[-5:]), 1))
    return [visit.text for visit in told], pauses


def draw_visit(rng: random.Random, rooms_of: dict[str, list[str]]) -> Visit:
    """The next visit of an actor whose day is not over, to a room that he is not in."""
    actor = pick(rng, [actor for actor in WALKERS if len(rooms_of[actor]) < len(TIMES)])
    time = len(rooms_of[actor])
    room = pick(rng, [room for room in TOWN if room not in rooms_of[actor][-1:]])
    words = f"{actor} {pick(rng, VERBS['move'])} to the {room}"
    text = pick(rng, (f"{TIMES[time].capitalize()} {words}.", f"{words} {TIMES[time]}."))
    return Visit(actor, time, room, text)


def out_of_order(rng: random.Random, visits: list[Visit]) -> list[Visit]:
    """The visits in a random order in which none has kept its place. This is fitted."""
    mixed = list(visits)
    while any(before is after for before, after in zip(visits, mixed, strict=True)):
        rng.shuffle(mixed)
    return mixed


def befores(told: list[Visit], asked: list[Visit]) -> Odds:
    """Questions on the room before each visit; those on the visits in `asked` have the weight."""
    index_of = {(visit.actor, visit.time): i for i, visit in enumerate(told)}
    odds = {}
    for i, visit in enumerate(told):
        if visit.time > 0:
            before = index_of[visit.actor, visit.time - 1]
            text = f"Where was {visit.actor} before the {visit.room}?"
            question = Question(text, told[before].room, (i, before))
            odds[question] = 1 if visit in asked else 0
    return odds


# qa15: basic deduction

WOMEN = ("Gertrude", "Winona", "Jessica", "Emily")
PLURAL = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}


def qa15(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Each kind of animal fears another, and each woman is an animal. Ask what she is afraid of.

    What she is, is told only once the fear of that animal is known."""
    texts = []
    fear_of = {}  # animal -> what it fears
    told_at = {}  # animal -> the index of the statement that tells its fear
    known = set()  # women of whom it is told what they are
    odds = {}
    while len(texts) < 8:
        tells_fear = pick(rng, (True, False))
        woman = pick(rng, WOMEN)
        animal = pick(rng, tuple(PLURAL))
        if tells_fear and animal not in fear_of:
            fear_of[animal] = pick(rng, [other for other in PLURAL if other != animal])
            told_at[animal] = len(texts)
            texts.append(f"{PLURAL[animal].capitalize()} are afraid of {PLURAL[fear_of[animal]]}.")
        elif not tells_fear and animal in fear_of and woman not in known:
            support = (len(texts), told_at[animal])
            odds[Question(f"What is {woman.lower()} afraid of?", fear_of[animal], support)] = 1
            known.add(woman)
            texts.append(f"{woman} is a {animal}.")
    return texts, [Pause(8, odds, 4)]


# qa16: basic induction

PETS = ("Lily", "Bernhard", "Greg", "Julius", "Brian")
SPECIES = ("swan", "lion", "frog", "rhino")
COLORS = ("green", "white", "gray", "yellow")


def qa16(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Five pets have a species each, and four of them a color. Ask for the color of the fifth.

    It is the color of the other pet of its species, or of the last such pet that was named."""
    while True:
        texts, species_of, color_of = draw_pets(rng)
        (asked,) = set(PETS) - set(color_of)
        species = species_of[asked]
        examples = [pet for pet in species_of if species_of[pet] == species and pet != asked]
        # This is fitted: the files never have two examples, and one, three or four by chance.
        if len(examples) in (1, 3, 4):
            break
    last = examples[-1]
    color = color_of[last]
    support = (
        texts.index(f"{asked} is a {species}."),
        texts.index(f"{last} is a {species}."),
        texts.index(f"{last} is {color}."),
    )
    return texts, [Pause(9, {Question(f"What color is {asked}?", color, support): 1}, 1)]


def draw_pets(rng: random.Random) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Nine statements, the species of five pets, and the colors of four of them.

    With probability 1/2, which is fitted, a color is taken from the pets of the same species."""
    texts = []
    species_of = {}
    color_of = {}
    while len(texts) < 9:
        tells_species = pick(rng, (True, False))
        pet = pick(rng, PETS)
        if tells_species and pet not in species_of:
            species_of[pet] = pick(rng, SPECIES)
            texts.append(f"{pet} is a {species_of[pet]}.")
        elif not tells_species and pet in species_of and pet not in color_of:
            choices = [color_of[p] for p in color_of if species_of[p] == species_of[pet]]
            if not choices or rng.random() >= 0.5:
                choices = COLORS
            color_of[pet] = pick(rng, choices)
            texts.append(f"{pet} is {color_of[pet]}.")
    return texts, species_of, color_of


# qa17: positional reasoning

SHAPES = (
    "triangle",
    "pink rectangle",
    "blue square",
    "red sphere",
    "red square",
    "yellow square",
)


def qa17(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Two shapes are beside a third. Ask how they lie to each other.

    What is true has half of the weight."""
    middle, *ends = rng.sample(SHAPES, 3)
    sides = rng.sample(SIDES, 2)
    facts = [placed(rng, end, side, middle, 1 / 3) for end, side in zip(ends, sides, strict=True)]
    odds = {}
    for i, j in ((0, 1), (1, 0)):
        right = VECTOR[sides[i]][0] - VECTOR[sides[j]][0]
        up = VECTOR[sides[i]][1] - VECTOR[sides[j]][1]
        true_sides = []
        for side in SIDES:
            if VECTOR[side][0] * right + VECTOR[side][1] * up > 0:
                true_sides.append(side)
        for side in SIDES:
            if side in true_sides:
                answer = "yes"
                weight = 1 / len(true_sides)
            else:
                answer = "no"
                weight = 1 / (len(SIDES) - len(true_sides))
            odds[Question(f"Is the {ends[i]} {side} the {ends[j]}?", answer, (i, j))] = weight
    return [fact.text for fact in facts], [Pause(2, odds, 8)]


# qa18: size reasoning

BOXES = ("box", "chest", "container", "suitcase")


class Comparison(NamedTuple):
    """A statement that one thing is bigger than another one."""

    big: str
    small: str
    text: str


def qa18(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Comparisons of six things, five at a time. Ask about two things that a third one connects.

    The number of questions is fitted: there are a hundred tries to find five. If that does not
    succeed, there are five comparisons more."""
    things = ("chocolate", "box of chocolates", *rng.sample(BOXES, 4))  # by size
    facts = []
    pauses = []
    n_found = 0
    while n_found < 5:
        for _ in range(5):
            small, big = sorted(rng.sample(range(6), 2))
            facts.append(compare(rng, things[small], things[big]))
        odds = conclusions(facts)
        # A try draws two statements, a direction and a wording, and they have to fit together.
        chance = sum(odds.values()) / (4 * len(facts))
        n_found = 0
        for _ in range(100):
            if rng.random() < chance:
                n_found += 1
        if n_found > 0:
            pauses.append(Pause(len(facts), odds, min(n_found, 5)))
    return [fact.text for fact in facts], pauses


def compare(rng: random.Random, small: str, big: str) -> Comparison:
    """Say in one of two ways which thing is bigger."""
    texts = (f"The {small} fits inside the {big}.", f"The {big} is bigger than the {small}.")
    return Comparison(big, small, pick(rng, texts))


def conclusions(facts: list[Comparison]) -> Odds:
    """Questions on what follows from a statement and another one that shares a thing with it.

    This is fitted: only the first other statement that names the thing counts. Of a repeated
    statement the last repetition is the support, and the weight counts all of them."""
    last = {fact.text: i for i, fact in enumerate(facts)}
    odds = {}
    for fact in facts:
        i = last[fact.text]
        for middle in (fact.small, fact.big):
            j = first_with(facts, middle, i)
            if j is None:
                continue
            if middle == fact.small == facts[j].big:
                answer = "yes"
                small = facts[j].small
                big = fact.big
            elif middle == fact.big == facts[j].small:
                answer = "no"  # asked the wrong way round
                small = facts[j].big
                big = fact.small
            else:
                continue
            for text in (
                f"Does the {small} fit in the {big}?",
                f"Is the {big} bigger than the {small}?",
            ):
                question = Question(text, answer, (i, j))
                odds[question] = odds.get(question, 0) + 1
    return odds


def first_with(facts: list[Comparison], thing: str, excluded: int) -> int | None:
    """The index of the first statement that names a thing, or None. One index is excluded."""
    for j, fact in enumerate(facts):
        if j != excluded and thing in (fact.big, fact.small):
            return j
    return None


# qa19: path finding


class Door(NamedTuple):
    """A room on some side of another one."""

    room: str
    side: str
    near: str


def qa19(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Five doors connect six rooms. Ask for the way from one room over a second to a third."""
    start, middle, goal, *more = rng.sample(ROOMS, 6)
    first = pick(rng, COMPASS)
    second = pick(rng, [side for side in COMPASS if side != OPPOSITE[first]])
    doors = [Door(middle, first, start), Door(goal, second, middle)]
    taken = {(start, first), (middle, OPPOSITE[first])}
    taken |= {(middle, second), (goal, OPPOSITE[second])}
    free = []
    for near in (start, middle, goal):
        for side in COMPASS:
            if (near, side) not in taken:
                free.append((near, side))
    for room, (near, side) in zip(more, rng.sample(free, 3), strict=True):
        doors.append(Door(room, side, near))

    told = []
    while (
        len(told) < 5
    ):  # A room is drawn, and then one of its doors, so the way itself is told late.
        room = pick(rng, ROOMS)
        door = pick(rng, [door for door in doors if room in door])
        if door not in told:
            told.append(door)
    facts = [placed(rng, door.room, door.side, door.near, 1 / 2) for door in told]
    return [fact.text for fact in facts], [Pause(5, ways(facts, start, goal), 1)]


def ways(facts: list[Placed], start: str, goal: str) -> Odds:
    """Questions on all ways of two steps; only the one from start to goal has a weight."""
    odds = {}
    for (i, one), (j, other) in permutations(enumerate(facts), 2):
        for middle in {one.thing, one.near} & {other.thing, other.near}:
            origin, side = one.seen_from(middle)
            target, second = other.seen_from(middle)
            first = OPPOSITE[side]
            text = f"How do you go from the {origin} to the {target}?"
            question = Question(text, f"{first[0]},{second[0]}", (i, j))
            odds[question] = 1 if (origin, target) == (start, goal) else 0
    return odds


# qa20: agents' motivations

AGENTS = ("Sumit", "Yann", "Jason", "Antoine")
MOODS = {  # mood -> the room where it leads, and what to take there
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "bored": ("garden", "football"),
    "tired": ("bedroom", "pajamas"),
}


def qa20(rng: random.Random) -> tuple[list[str], list[Pause]]:
    """Each agent is in a mood, goes where it leads, and takes what is there unless it is taken.
    Ask about each statement right after it."""
    mood_of = {agent: pick(rng, tuple(MOODS)) for agent in AGENTS}
    told_at = {agent: [] for agent in AGENTS}  # the indices of the statements about the agent
    taken = set()  # the moods whose object has been taken
    odds = {}
    texts = []
    pauses = []
    while True:
        ready = []
        for agent in AGENTS:
            n_steps = 2 if mood_of[agent] in taken else 3
            if len(told_at[agent]) < n_steps:
                ready.append(agent)
        if not ready:
            return texts, pauses
        agent = pick(rng, ready)
        name = agent.lower()
        mood = mood_of[agent]
        room, obj = MOODS[mood]
        told_at[agent].append(len(texts))
        support = (told_at[agent][0],)
        where = Question(f"Where will {name} go?", room, support)
        if len(told_at[agent]) == 1:
            texts.append(f"{agent} is {mood}.")
            question = where
        elif len(told_at[agent]) == 2:
            texts.append(f"{agent} {pick(rng, VERBS['move'])} to the {room}.")
            question = Question(f"Why did {name} go to the {room}?", mood, support)
        else:
            texts.append(f"{agent} {pick(rng, VERBS['get'])} the {obj} there.")
            question = Question(f"Why did {name} get the {obj}?", mood, support)
            taken.add(mood)
        odds = dict.fromkeys(odds, 0)  # earlier questions can be asked again, but only by a lesson
        odds.pop(where, None)  # not where he will go once he went
        odds[question] = 1
        pauses.append(Pause(len(texts), odds, 1))


PUZZLES = {
    "qa4": Puzzle("two-arg-relations", qa4),
    "qa14": Puzzle("time-reasoning", qa14, tail=" "),
    "qa15": Puzzle("basic-deduction", qa15),
    "qa16": Puzzle("basic-induction", qa16),
    "qa17": Puzzle("positional-reasoning", qa17),
    "qa18": Puzzle("size-reasoning", qa18),
    "qa19": Puzzle("path-finding", qa19),
    "qa20": Puzzle("agents-motivations", qa20),
}
