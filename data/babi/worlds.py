"""bAbI tasks 1-3 and 5-13: actors walk, take objects, put them down, hand them on, and are asked about.

    python -m data.babi --task qa5 --stories 2        # the command line of all tasks

Writes nothing. Statements and odds are those of the released files (v1.2, English). The start is drawn, never
told: only what the text answers is asked. A task is a row of WORLD: a world, a rule and what suggests topics.
"""
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, permutations
from typing import NamedTuple

ACTORS = ("Mary", "John", "Sandra", "Daniel")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")  # the rooms of qa10
OBJECTS = ("apple", "football", "milk")
VERBS = {"move": ("went", "went back", "moved", "journeyed", "travelled"),  # "went back" on first visits too
         "get": ("got", "took", "grabbed", "picked up"),
         "drop": ("dropped", "left", "discarded", "put down"),
         "give": ("gave", "handed", "passed"),
         "then": ("After that", "Afterwards", "Following that", "Then")}  # before "he", "she" or "they"
MOVES = ("move", "then", "is in", "is not in", "is no longer in", "is either in")  # ways to tell a move


class Event(NamedTuple):
    """One statement, and what it does not tell."""
    kind: str  # "get", "drop", "give" or one of MOVES
    actor: str
    obj: str | None  # what is taken, put down or given
    room: str  # where the actor is afterwards; the reader knows only what he was told
    text: str  # the statement
    other: str | None = None  # who is given the object, or goes along
    named: tuple[str, ...] = ()  # rooms the statement names instead: the one left, or two it may be


class Question(NamedTuple):
    """A question on the statements before it."""
    text: str  # ends with "?"
    answer: str
    support: tuple[int, ...]  # indices of statements, from 0, in the order of the released files


class Story(NamedTuple):
    """Statements, and the questions asked in between."""
    events: list[Event]
    questions: list[tuple[int, Question]]  # with the number of statements before each


Odds = dict[Question, float]  # what can be asked, with weights; empty: nothing


@dataclass(frozen=True)
class Task:
    """One bAbI task: the statements of its world, and what is asked about them."""
    stem: str  # the released files are named "<task>_<stem>_train.txt"
    world: Callable[[random.Random], Iterator[Event]]  # statements for ever
    rule: Callable[[list[Event], str], Odds]  # (events, topic) -> what can be asked
    prompts: tuple[str, ...] = MOVES  # kinds of statement that make their topics worth a question
    topics: tuple[str, ...] = ("actor",)  # fields of Event the questions are about
    choose: bool = False  # a lesson asks one question on each topic, by weight; else all
    skip: float = 0.0  # probability that no question is asked though there is one
    tail: str = " "  # what the files have between the question mark and the tab

    def named(self, events: list[Event]) -> list[str]:
        """The topics of the statements, as often as they are named."""
        return [getattr(e, field) for e in events if e.kind in self.prompts for field in self.topics]

    def ask(self, events: list[Event], rng: random.Random) -> Question | None:
        """A question on what one of the last five facts names, as things stand now, or None."""
        topics = [] if rng.random() < self.skip else self.named(events[-5:])[-5:]  # "A and B went": two facts
        while topics:  # one per FACT: what is named twice is asked about twice as often
            if odds := self.rule(events, topics.pop(int(rng.random() * len(topics)))):
                return rng.choices(list(odds), odds.values())[0]
        return None

    def story(self, rng: random.Random) -> Story:
        """Two statements, a question if there is one to ask, and so on until five are asked."""
        events, questions, world = [], [], self.world(rng)
        while len(questions) < 5:
            events += [next(world), next(world)]
            if question := self.ask(events, rng):
                questions.append((len(events), question))
        return Story(events, questions)

    def everything(self, events: list[Event], rng: random.Random) -> list[Question]:
        """Questions on every topic in the statements, in random order, each text once."""
        odds = [self.rule(events, topic) for topic in dict.fromkeys(self.named(events))]
        asked = (rng.choices(list(o), o.values()) if self.choose else o for o in odds if o)
        return sorted({q.text: q for some in asked for q in some}.values(), key=lambda q: rng.random())

    def lesson(self, n_facts: int, rng: random.Random) -> tuple[list[Event], list[Question]]:
        """n_facts statements, or more where so few allow no question, and every question on them."""
        for tries in count():
            events = list(islice(self.world(rng), n_facts + tries // 100))
            if questions := self.everything(events, rng):
                return events, questions


def pick(rng: random.Random, options: Sequence):
    """One of the options, each as likely; faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def act(rng: random.Random, *, actions: tuple[str, ...] = ("move", "get", "drop"),
        actors: tuple[str, ...] = ACTORS, get_there: float = 1.0) -> Iterator[Event]:
    """One possible action after another, for ever. get_there: how often a get ends in " there"."""
    room = {actor: pick(rng, ROOMS) for actor in actors}
    place = {obj: pick(rng, ROOMS) for obj in OBJECTS}  # the room it lies in, or the actor who holds it
    while True:
        actor, kind, obj, other = pick(rng, actors), pick(rng, actions), None, None
        if kind == "move":
            goal = pick(rng, ROOMS)
            if goal == room[actor]:
                continue  # after a failure BOTH actor and kind are drawn anew
            room[actor], rest = goal, f"to the {goal}."
        elif kind == "give":  # a quirk of the files: whoever was drawn, the first possible in this order
            actor, obj, other = next(((place[o], o, to) for o in OBJECTS for to in actors
                                      if to != place[o] and room[to] == room.get(place[o])), 3 * (None,))
            if not obj:
                continue
            place[obj], rest = other, f"the {obj} to {other}."
        else:
            source, target = (room[actor], actor) if kind == "get" else (actor, room[actor])
            within_reach = [o for o in OBJECTS if place[o] == source]
            if not within_reach:
                continue
            obj = pick(rng, within_reach)
            there = rng.random() < (get_there if kind == "get" else 0.2)
            place[obj], rest = target, f"the {obj} there." if there else f"the {obj}."
        yield Event(kind, actor, obj, room[actor], f"{actor} {pick(rng, VERBS[kind])} {rest}", other)


def roam(rng: random.Random, *, told: tuple[str, ...] = ("move",), actors: tuple[str, ...] = ACTORS,
         rooms: tuple[str, ...] = ROOMS, party: int = 1, again: bool = False) -> Iterator[Event]:
    """Moves of one actor or a party of two for ever, told in one of these ways. again: they go on at once."""
    room = {actor: pick(rng, rooms) for actor in actors}
    parties = list(permutations(actors, party))
    while True:
        who, goal, kind, named = pick(rng, parties), pick(rng, rooms), pick(rng, told), ()
        if goal in [room[actor] for actor in who]:
            continue  # the party is drawn anew, too
        actor, other = who[0], who[1] if party == 2 else None
        if kind in ("move", "is in"):
            rest = f"{pick(rng, VERBS[kind])} to the {goal}." if kind == "move" else f"is in the {goal}."
        elif kind == "is either in":
            named = pick(rng, rooms), goal  # from ALL rooms, so it may be "either in the park or the park"
            named = pick(rng, (named, named[::-1]))
            rest = f"is either in the {named[0]} or the {named[1]}."
        else:
            named, rest = (room[actor],), f"{kind} the {room[actor]}."
        yield Event(kind, actor, None, goal, f"{' and '.join(who)} {rest}", other, named)
        if again:
            goal = pick(rng, [r for r in rooms if r != goal])
            subject = "they" if other else "she" if actor in ("Mary", "Sandra") else "he"
            text = f"{pick(rng, VERBS['then'])} {subject} {pick(rng, VERBS['move'])} to the {goal}."
            yield Event("then", actor, None, goal, text, other)
        room.update(dict.fromkeys(who, goal))


def back(events: list[Event], name: str, *kinds: str, start=0, stop: int | None = None) -> Iterator[int]:
    """Indices in events[start:stop] of these kinds of statement on an actor or object, the latest first."""
    for i in reversed(range(start, len(events) if stop is None else stop)):
        if events[i].kind in kinds and name in (events[i].actor, events[i].obj, events[i].other):
            yield i


def where(events: list[Event], actor: str) -> Odds:
    """qa1, qa11-13: the room of the actor's last move; "he" and "they" need the statement before."""
    i = next(back(events, actor, *MOVES))
    support = (i - 1, i) if events[i].kind == "then" else (i,)
    return {Question(f"Where is {actor}?", events[i].room, support): 1}


def where_object(events: list[Event], obj: str) -> Odds:
    """qa2: where the object was put down, or where its holder is, if he has moved since he took it."""
    i = next(back(events, obj, "get", "drop"))
    start, stop = (0, i) if events[i].kind == "drop" else (i, None)
    move = next(back(events, events[i].actor, "move", start=start, stop=stop), None)
    return {} if move is None else {Question(f"Where is the {obj}?", events[move].room, (i, move)): 1}


def where_before(events: list[Event], obj: str) -> Odds:
    """qa3: the room before another one on the object's last way, from its last get to its drop or to now; of
    two visits to that one the later counts. The weight 1.3^j is a fit: late rooms are asked more."""
    i, start = next(back(events, obj, "get", "drop")), next(back(events, obj, "get"))
    way = list(back(events, events[i].actor, "move", start=start, stop=None if i == start else i))[::-1]
    rooms, text = [events[j].room for j in way], f"Where was the {obj} before the "
    return {Question(f"{text}{rooms[j]}?", rooms[j - 1], (i, way[j], way[j - 1])): 1.3 ** j
            for j in range(1, len(way)) if rooms[j] not in rooms[j + 1:]}


def gift(events: list[Event], obj: str) -> Odds:
    """qa5: what was given, by whom, or to whom: a third each."""
    i = next(back(events, obj, "give"))
    giver, taker = events[i].actor, events[i].other
    return {Question(f"What did {giver} give to {taker}?", obj, (i,)): 2,
            Question(f"Who gave the {obj}?", giver, (i,)): 1,
            Question(f"Who gave the {obj} to {taker}?", giver, (i,)): 1,
            Question(f"Who received the {obj}?", taker, (i,)): 1,
            Question(f"Who did {giver} give the {obj} to?", taker, (i,)): 1}


def is_in(events: list[Event], actor: str, *, rooms: tuple[str, ...] = ROOMS) -> Odds:
    """qa6, qa9, qa10: half the time the true room, else another; if told what he left, only that."""
    i = next(back(events, actor, *MOVES))
    room, named = events[i].room, events[i].named
    answers = {room: "yes"} if not named else dict.fromkeys(named, "maybe" if len(named) == 2 else "no")
    return {Question(f"Is {actor} in the {r}?", answers.get(r, "no"), (i,)): 5 if r == room else 1
            for r in (named if len(named) == 1 else rooms)}


def carrying(events: list[Event], actor: str, *, number: bool = False) -> Odds:
    """qa7 (number) and qa8: what the actor holds. The support is each statement in which he gets, loses or is
    given an object: for qa7 in order, for qa8 object by object, as he first touched them."""
    lines = {}
    for i, event in enumerate(events):
        if event.obj and actor in (event.actor, event.other):
            lines.setdefault(event.obj, []).append(i)
    held = [o for o, at in lines.items() if events[at[-1]].kind == "get" or events[at[-1]].other == actor]
    support = tuple(i for at in lines.values() for i in at)
    if number:
        answer = ("none", "one", "two", "three")[len(held)]
        return {Question(f"How many objects is {actor} carrying?", answer, tuple(sorted(support))): 1}
    return {Question(f"What is {actor} carrying?", ",".join(held) or "nothing", support): 1}


GIFTS = partial(act, actions=("move", "get", "drop", "give"))
NEGATION = partial(roam, told=4 * ("move",) + 2 * ("is in",) + ("is not in", "is no longer in"))
DOUBT = partial(roam, told=2 * ("move",) + ("is in", "is either in"), rooms=TOWN)
WORLD = {  # the order of the actors is that in which a gift looks for its taker
    "qa1": Task("single-supporting-fact", partial(act, actions=("move",)), where),
    "qa2": Task("two-supporting-facts", act, where_object, ("get", "drop"), ("obj",)),
    "qa3": Task("three-supporting-facts", partial(act, get_there=0.2), where_before, ("get", "drop"),
                ("obj",), skip=0.004),  # 11 of 2936 in the released files
    "qa5": Task("three-arg-relations", partial(GIFTS, actors=("Mary", "Fred", "Bill", "Jeff")), gift,
                ("give",), ("obj",), choose=True),
    "qa6": Task("yes-no-questions", act, is_in, choose=True),
    "qa7": Task("counting", partial(GIFTS, actors=("John", "Mary", "Sandra", "Daniel")),
                partial(carrying, number=True), ("get", "drop", "give")),
    "qa8": Task("lists-sets", act, carrying, ("get", "drop")),
    "qa9": Task("simple-negation", NEGATION, is_in, choose=True),
    "qa10": Task("indefinite-knowledge", partial(DOUBT, actors=("Fred", "Mary", "Bill", "Julie")),
                 partial(is_in, rooms=TOWN), choose=True),
    "qa11": Task("basic-coreference", partial(roam, again=True), where),
    "qa12": Task("conjunction", partial(roam, party=2), where, topics=("actor", "other")),
    "qa13": Task("compound-coreference", partial(roam, party=2, again=True), where,
                 topics=("actor", "other")),
}
