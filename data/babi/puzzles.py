"""bAbI tasks 4 and 14-20: puzzles that share no world, each with a scheme of its own.

    python -m data.babi --task qa19 --stories 2        # the command line of all tasks

Writes nothing. Statements and odds are those of the released files (v1.2, English); where these do not show
their rule, one was fitted to their counts: `fitted:`. A task is one function and one row of PUZZLES.
"""
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from data.babi.worlds import ROOMS, TOWN, VERBS, Event, Odds, Question, Story, pick

WORKERS = ("Bill", "Julie", "Fred", "Mary")
TIMES = ("yesterday", "this morning", "this afternoon", "this evening")
WOMEN, PLURAL = ("Gertrude", "Winona", "Jessica", "Emily"), {
    "mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}
PETS, SPECIES = ("Lily", "Bernhard", "Greg", "Julius", "Brian"), ("swan", "lion", "frog", "rhino")
COLORS = ("green", "white", "gray", "yellow")
SHAPES = ("triangle", "pink rectangle", "blue square", "red sphere", "red square", "yellow square")
BOXES = ("box", "chest", "container", "suitcase")
AGENTS, MOODS = ("Sumit", "Yann", "Jason", "Antoine"), {  # a mood -> where it leads, and what to take there
    "hungry": ("kitchen", "apple"), "thirsty": ("kitchen", "milk"),
    "bored": ("garden", "football"), "tired": ("bedroom", "pajamas")}
VECTOR = {"north of": (0, 1), "south of": (0, -1), "east of": (1, 0), "west of": (-1, 0),
          "above": (0, 1), "below": (0, -1), "to the right of": (1, 0), "to the left of": (-1, 0)}
COMPASS, SIDES = list(VECTOR)[:4], list(VECTOR)[4:]
OPPOSITE = {side: list(VECTOR)[i ^ 1] for i, side in enumerate(VECTOR)}  # they are listed in pairs

Plan = list[tuple[int, Odds, int]]  # after how many statements, what can be asked, how often


@dataclass(frozen=True)
class Puzzle:
    """One bAbI task that is no world: how its statements are made, and what is asked when."""
    stem: str  # the released files are named "<task>_<stem>_train.txt"
    make: Callable[[random.Random], tuple[list[Event], Plan]]
    tail: str = ""  # what the files have between the question mark and the tab

    def story(self, rng: random.Random) -> Story:
        """A story as in the released files: questions by their weights, also again."""
        events, plan = self.make(rng)
        return Story(events, [(at, question) for at, odds, n in plan
                              for question in rng.choices(list(odds), list(odds.values()), k=n)])

    def everything(self, events: list[Event], rng: random.Random) -> list[Question]:
        """Nothing: a puzzle is asked when its statements are complete."""
        return []

    def lesson(self, n_facts: int, rng: random.Random) -> tuple[list[Event], list[Question]]:
        """A story up to one of its questions, and in random order what can be asked then, each text once.
        What has half the weight is left out half the time; what has none never, for the files only ask it
        elsewhere. n_facts has no say: puzzles have their own lengths."""
        events, plan = self.make(rng)
        at, odds, _ = pick(rng, plan)
        most = max(odds.values())
        kept = [question for question, weight in odds.items() if not weight or rng.random() * most < weight]
        rng.shuffle(kept)
        return events[:at], list({question.text: question for question in kept}.values())


def placed(rng: random.Random, thing: str, near: str, side: str, odds: float) -> Event:
    """`thing` is on this side of `near`; told so with probability `odds`, else from the other end."""
    if rng.random() >= odds:
        thing, near, side = near, thing, OPPOSITE[side]
    return Event("placed", thing, near, side, f"The {thing} is {side} the {near}.")


def seen_from(event: Event, thing: str) -> tuple[str, str]:
    """The other thing of such a statement, and its side as seen from this thing."""
    return (event.actor, event.room) if event.obj == thing else (event.obj, OPPOSITE[event.room])


def qa4(rng: random.Random) -> tuple[list[Event], Plan]:
    """Two rooms on opposite sides of a third. What is asked is always named first in its statement."""
    one, middle, other = rng.sample(ROOMS, 3)
    side = pick(rng, COMPASS)
    events = [placed(rng, one, middle, side, 2 / 3), placed(rng, other, middle, OPPOSITE[side], 2 / 3)]
    odds = {Question(f"What is {words}?", e.actor, (i,)): 1 for i, e in enumerate(events)
            for words in (f"{e.room} the {e.obj}", f"the {e.obj} {OPPOSITE[e.room]}")}
    return events, [(2, odds, 1)]


def qa14(rng: random.Random) -> tuple[list[Event], Plan]:
    """An actor is elsewhere at each time of day. Asked are the latest five moves, but they are told out of
    order; and the files ask "before the park" even of an actor who was there twice."""
    lived, told, plan, past = [], [], [], {actor: [] for actor in WORKERS}
    while len(plan) < 5:
        for _ in range(2):
            actor = pick(rng, [a for a in WORKERS if len(past[a]) < len(TIMES)])
            time, room = TIMES[len(past[actor])], pick(rng, [r for r in TOWN if r not in past[actor][-1:]])
            past[actor].append(room)
            said = f"{actor} {pick(rng, VERBS['move'])} to the {room}"
            text = pick(rng, (f"{time.capitalize()} {said}.", f"{said} {time}."))
            lived.append(Event("move", actor, time, room, text))
        if all(event.obj == TIMES[0] for event in lived[-5:]):
            continue
        block, mixed = lived[len(told):], lived[len(told):]
        while any(a is b for a, b in zip(block, mixed)):
            rng.shuffle(mixed)  # fitted: no statement of a block stays in its place
        told += mixed
        at, odds = {(e.actor, e.obj): i for i, e in enumerate(told)}, {}
        for i, (_, actor, time, room, *_) in enumerate(told):
            if time != TIMES[0]:
                j = at[actor, TIMES[TIMES.index(time) - 1]]
                question = Question(f"Where was {actor} before the {room}?", told[j].room, (i, j))
                odds[question] = int(told[i] in lived[-5:])
        plan.append((len(told), odds, 1))
    return told, plan


def qa15(rng: random.Random) -> tuple[list[Event], Plan]:
    """What each animal fears, and who is which; said of a person only when that animal's fear is known."""
    fears, odds, events = {}, {}, []
    while len(events) < 8:
        kind, person, animal = pick(rng, ("fear", "is a")), pick(rng, WOMEN), pick(rng, list(PLURAL))
        if kind == "fear" and animal not in fears:
            fear = pick(rng, [a for a in PLURAL if a != animal])
            fears[animal] = fear, len(events)
            text = f"{PLURAL[animal].capitalize()} are afraid of {PLURAL[fear]}."
            events.append(Event(kind, animal, fear, "", text))
        elif kind == "is a" and animal in fears and person not in [e.actor for e in events]:
            support = len(events), fears[animal][1]
            odds[Question(f"What is {person.lower()} afraid of?", fears[animal][0], support)] = 1
            events.append(Event(kind, person, animal, "", f"{person} is a {animal}."))
    return events, [(8, odds, 4)]


def qa16(rng: random.Random) -> tuple[list[Event], Plan]:
    """Five animals and the colors of four. Asked is the fifth: of its species, the last one named counts."""
    species, color, events = {}, {}, []  # species and color by name: what, and the index of the statement
    while len(events) < 9:
        kind, pet = pick(rng, ("is a", "is")), pick(rng, PETS)
        if kind == "is a" and pet not in species:
            species[pet] = pick(rng, SPECIES), len(events)
            events.append(Event(kind, pet, species[pet][0], "", f"{pet} is a {species[pet][0]}."))
        elif kind == "is" and pet in species and pet not in color:
            like = [color[p][0] for p in color if species[p][0] == species[pet][0]]
            hue = pick(rng, like if like and rng.random() < 0.5 else COLORS)  # fitted: one half
            color[pet] = hue, len(events)
            events.append(Event(kind, pet, hue, "", f"{pet} is {hue}."))
    last, = set(PETS) - set(color)
    like = [p for p in species if species[p][0] == species[last][0] and p != last]
    if len(like) in (0, 2):  # fitted: never two in the files; one, three or four as often as by chance
        return qa16(rng)
    support = species[last][1], species[like[-1]][1], color[like[-1]][1]
    return events, [(9, {Question(f"What color is {last}?", color[like[-1]][0], support): 1}, 1)]


def qa17(rng: random.Random) -> tuple[list[Event], Plan]:
    """Two shapes beside a third. Asked is how they lie to each other, half the time something true."""
    middle, *ends = rng.sample(SHAPES, 3)
    events, odds = [placed(rng, e, middle, side, 1 / 3) for e, side in zip(ends, rng.sample(SIDES, 2))], {}
    for i, j in ((0, 1), (1, 0)):
        (one, here), (other, there) = seen_from(events[i], middle), seen_from(events[j], middle)
        x, y = (VECTOR[here][k] - VECTOR[there][k] for k in (0, 1))
        true = [side for side in SIDES if VECTOR[side][0] * x + VECTOR[side][1] * y > 0]
        odds |= {Question(f"Is the {one} {side} the {other}?", "yes" if side in true else "no", (i, j)):
                 1 / (len(true) if side in true else 4 - len(true)) for side in SIDES}
    return events, [(2, odds, 8)]


def qa18(rng: random.Random) -> tuple[list[Event], Plan]:
    """Comparisons of size, five at a time. Asked are the outer two of three, the right or wrong way round.
    fitted: what follows from a statement and the FIRST other one that names one of its things; the support is
    its last repetition; a hundred tries for five questions, or there are more comparisons."""
    things = ("chocolate", "box of chocolates", *rng.sample(BOXES, 4))  # by size
    events, plan, found = [], [], 0
    while found < 5:
        for _ in range(5):
            small, big = (things[i] for i in sorted(rng.sample(range(6), 2)))
            texts = f"The {small} fits inside the {big}.", f"The {big} is bigger than the {small}."
            events.append(Event("bigger", big, small, "", pick(rng, texts)))
        last, odds = {e.text: i for i, e in enumerate(events)}, {}
        for event, middle in [(e, thing) for e in events for thing in (e.obj, e.actor)]:
            i = last[event.text]
            j = next((j for j, e in enumerate(events) if j != i and middle in (e.actor, e.obj)), i)
            if middle == event.obj == events[j].actor:
                answer, small, big = "yes", events[j].obj, event.actor
            elif middle == event.actor == events[j].obj:
                answer, small, big = "no", events[j].actor, event.obj
            else:
                continue
            for text in (f"Does the {small} fit in the {big}?", f"Is the {big} bigger than the {small}?"):
                question = Question(text, answer, (i, j))
                odds[question] = odds.get(question, 0) + 1
        chance = sum(odds.values()) / (4 * len(events))  # that statement, direction and wording fit together
        found = sum(rng.random() < chance for _ in range(100))
        plan += [(len(events), odds, min(found, 5))] if found else []
    return events, plan


def qa19(rng: random.Random) -> tuple[list[Event], Plan]:
    """A map of six rooms. Asked is a way of two steps; beside it are the three other rooms."""
    start, middle, goal, *more = rng.sample(ROOMS, 6)
    first = pick(rng, COMPASS)
    second = pick(rng, [side for side in COMPASS if side != OPPOSITE[first]])
    taken = {(start, first), (middle, OPPOSITE[first]), (middle, second), (goal, OPPOSITE[second])}
    free = [(room, side) for room in (start, middle, goal) for side in COMPASS if (room, side) not in taken]
    doors = [(middle, start, first), (goal, middle, second),
             *((room, *beside) for room, beside in zip(more, rng.sample(free, 3)))]
    told, odds = [], {}
    while len(told) < 5:  # a random room, then a random door of it: so the way itself is told late
        room = pick(rng, ROOMS)
        door = pick(rng, [door for door in doors if room in door])
        told += [door] if door not in told else []
    events = [placed(rng, *door, 1 / 2) for door in told]
    for (i, one), (j, other) in permutations(enumerate(events), 2):
        for via in {one.actor, one.obj} & {other.actor, other.obj}:
            (a, side), (b, step) = seen_from(one, via), seen_from(other, via)
            text, answer = f"How do you go from the {a} to the {b}?", f"{OPPOSITE[side][0]},{step[0]}"
            odds[Question(text, answer, (i, j))] = int((a, b) == (start, goal))
    return events, [(5, odds, 1)]


def qa20(rng: random.Random) -> tuple[list[Event], Plan]:
    """Each is in a mood, goes where it leads and takes what is there; asked after each statement."""
    mood, told = {actor: pick(rng, list(MOODS)) for actor in AGENTS}, {actor: [] for actor in AGENTS}
    events, plan, odds, taken = [], [], {}, set()
    while ready := [a for a in AGENTS if len(told[a]) < (2 if mood[a] in taken else 3)]:
        actor = pick(rng, ready)
        told[actor].append(len(events))
        (room, obj), feels, who, support = MOODS[mood[actor]], mood[actor], actor.lower(), (told[actor][0],)
        where = Question(f"Where will {who} go?", room, support)
        if len(told[actor]) == 1:
            rest, question = f"is {feels}.", where
        elif len(told[actor]) == 2:
            rest = f"{pick(rng, VERBS['move'])} to the {room}."
            question = Question(f"Why did {who} go to the {room}?", feels, support)
        else:
            rest = f"{pick(rng, VERBS['get'])} the {obj} there."
            question = Question(f"Why did {who} get the {obj}?", feels, support)
            taken.add(feels)
        events.append(Event("fact", actor, None, room, f"{actor} {rest}"))
        odds = {q: 0 for q in odds if q != where} | {question: 1}  # not where he will go once he went
        plan.append((len(events), odds, 1))
    return events, plan


PUZZLES = {
    "qa4": Puzzle("two-arg-relations", qa4),
    "qa14": Puzzle("time-reasoning", qa14, " "),
    "qa15": Puzzle("basic-deduction", qa15),
    "qa16": Puzzle("basic-induction", qa16),
    "qa17": Puzzle("positional-reasoning", qa17),
    "qa18": Puzzle("size-reasoning", qa18),
    "qa19": Puzzle("path-finding", qa19),
    "qa20": Puzzle("agents-motivations", qa20),
}
