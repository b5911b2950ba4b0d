"""bAbI tasks 1-3 and 5-13: actors walk about, carry objects and give them away.

    from data.babi.worlds import WORLD
    story = WORLD["qa5"].story(random.Random(1))

A task is a row of WORLD: a world, which makes statements without end, and a rule, which finds the
questions that can be asked after some of them. Sentences and probabilities are those of the
released files (v1.2, English). Where actors and objects are at first is drawn but not told, so a
rule asks only what the text answers. Writes nothing.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice, permutations

from data.babi.story import ROOMS, TOWN, VERBS, Event, Odds, Question, Story, draw, pick

ACTORS = ("Mary", "John", "Sandra", "Daniel")
OBJECTS = ("apple", "football", "milk")
# The kinds of statement that tell a move.
MOVES = ("move", "then", "is in", "is not in", "is no longer in", "is either in")
ADVERBS = ("After that", "Afterwards", "Following that", "Then")  # how a statement "then" begins
WINDOW = 5  # a story asks about one of its last five topics
# In the released files this share of the "drop" statements ends with " there". In qa3 the "get"
# statements do so, too.
P_THERE = 0.2


@dataclass(frozen=True)
class Task:
    """One bAbI task: a world and what is asked about it."""

    stem: str  # the released files are named "<task>_<stem>_train.txt"
    world: Callable[[random.Random], Iterator[Event]]  # makes statements without end
    rule: Callable[[list[Event], str], Odds]  # (statements, topic) -> what can be asked after them
    prompts: tuple[str, ...] = MOVES  # the kinds of statement that suggest a question
    topics: tuple[str, ...] = ("actor",)  # the fields of Event that hold what the question is about
    choose: bool = False  # a lesson asks one question on each topic, drawn by weight, and not all
    skip: float = 0.0  # the probability that a story does not ask where it could
    tail: str = " "  # what the files have between the question mark and the tab

    def named(self, events: list[Event]) -> list[str]:
        """The topics that these statements suggest, once for each statement."""
        topics = []
        for event in events:
            if event.kind in self.prompts:
                for field in self.topics:
                    topics.append(getattr(event, field))
        return topics

    def ask(self, events: list[Event], rng: random.Random) -> Question | None:
        """A question on one of the last five topics, or None if nothing can be asked about them.

        A statement about two actors gives two topics. A topic that comes twice among the five is
        drawn twice as often."""
        if rng.random() < self.skip:
            return None
        topics = self.named(events[-WINDOW:])[-WINDOW:]
        while topics:
            topic = topics.pop(int(rng.random() * len(topics)))
            odds = self.rule(events, topic)
            if odds:
                return draw(rng, odds)
        return None

    def story(self, rng: random.Random) -> Story:
        """A story as in the released files: five questions, and two statements before each try."""
        world = self.world(rng)
        events = []
        questions = []
        while len(questions) < 5:
            events.append(next(world))
            events.append(next(world))
            question = self.ask(events, rng)
            if question:
                questions.append((len(events), question))
        return Story(events, questions)

    def everything(self, events: list[Event], rng: random.Random) -> list[Question]:
        """Questions on every topic of these statements in random order, each text once."""
        questions = {}  # by their texts
        for topic in dict.fromkeys(self.named(events)):
            odds = self.rule(events, topic)
            if odds and self.choose:
                odds = [draw(rng, odds)]
            for question in odds:
                questions[question.text] = question
        return sorted(questions.values(), key=lambda _: rng.random())

    def lesson(self, n_facts: int, rng: random.Random) -> tuple[list[Event], list[Question]]:
        """n_facts statements and the questions of `everything` on them.

        If a hundred tries in a row allow no question, there is one statement more."""
        for n_tries in count():
            events = list(islice(self.world(rng), n_facts + n_tries // 100))
            questions = self.everything(events, rng)
            if questions:
                return events, questions


# Worlds


def act(
    rng: random.Random,
    *,
    actions: tuple[str, ...] = ("move", "get", "drop"),
    actors: tuple[str, ...] = ACTORS,
    p_there: float = 1.0,
) -> Iterator[Event]:
    """Possible actions of the actors, without end.

    actions  the kinds of action, all of them as likely
    p_there  the probability that the statement of a "get" ends with " there" """
    room_of = {actor: pick(rng, ROOMS) for actor in actors}
    place_of = {obj: pick(rng, ROOMS) for obj in OBJECTS}  # a room, or the actor who holds it
    while True:  # who acts and what he does are both drawn again if it is not possible
        actor = pick(rng, actors)
        kind = pick(rng, actions)
        obj = None
        taker = None
        if kind == "move":
            goal = pick(rng, ROOMS)
            if goal == room_of[actor]:
                continue
            room_of[actor] = goal
            rest = f"to the {goal}."
        elif kind == "give":
            gift = first_gift(actors, room_of, place_of)
            if gift is None:
                continue
            # As in the released files, the giver need not be the actor who was drawn.
            actor, obj, taker = gift
            place_of[obj] = taker
            rest = f"the {obj} to {taker}."
        else:
            if kind == "get":
                source = room_of[actor]
                target = actor
                there_odds = p_there
            else:
                source = actor
                target = room_of[actor]
                there_odds = P_THERE
            within_reach = [thing for thing in OBJECTS if place_of[thing] == source]
            if not within_reach:
                continue
            obj = pick(rng, within_reach)
            place_of[obj] = target
            if rng.random() < there_odds:
                rest = f"the {obj} there."
            else:
                rest = f"the {obj}."
        text = f"{actor} {pick(rng, VERBS[kind])} {rest}"
        yield Event(text, kind, actor, obj, room_of[actor], taker)


def first_gift(
    actors: tuple[str, ...], room_of: dict[str, str], place_of: dict[str, str]
) -> tuple[str, str, str] | None:
    """The first gift that is possible, as (giver, object, taker), or None.

    The objects come in the order of OBJECTS, and the takers of each in the order of `actors`."""
    for obj in OBJECTS:
        giver = place_of[obj]
        if giver not in room_of:
            continue  # nobody holds it
        for taker in actors:
            if taker != giver and room_of[taker] == room_of[giver]:
                return giver, obj, taker
    return None


def roam(
    rng: random.Random,
    *,
    told: tuple[str, ...] = ("move",),
    actors: tuple[str, ...] = ACTORS,
    rooms: tuple[str, ...] = ROOMS,
    party: int = 1,
    again: bool = False,
) -> Iterator[Event]:
    """Moves of the actors, without end.

    told   the ways in which a move is told, all of them as likely
    party  how many go together: 1 or 2
    again  whether each move is followed by one of the same party, told with a pronoun"""
    room_of = {actor: pick(rng, rooms) for actor in actors}
    parties = list(permutations(actors, party))
    while True:  # the party, too, is drawn again if one of it is at the goal already
        who = pick(rng, parties)
        goal = pick(rng, rooms)
        kind = pick(rng, told)
        if goal in [room_of[actor] for actor in who]:
            continue
        actor = who[0]
        other = who[1] if party == 2 else None
        named = ()
        if kind == "move":
            rest = f"{pick(rng, VERBS['move'])} to the {goal}."
        elif kind == "is in":
            rest = f"is in the {goal}."
        elif kind == "is either in":
            named = (pick(rng, rooms), goal)  # the two can be the same room
            named = pick(rng, (named, named[::-1]))
            rest = f"is either in the {named[0]} or the {named[1]}."
        else:  # "is not in" or "is no longer in": only the room that was left is told
            named = (room_of[actor],)
            rest = f"{kind} the {named[0]}."
        yield Event(f"{' and '.join(who)} {rest}", kind, actor, None, goal, other, named)
        if again:
            goal = pick(rng, [room for room in rooms if room != goal])
            if other:
                pronoun = "they"
            elif actor in ("Mary", "Sandra"):
                pronoun = "she"
            else:
                pronoun = "he"
            text = f"{pick(rng, ADVERBS)} {pronoun} {pick(rng, VERBS['move'])} to the {goal}."
            yield Event(text, "then", actor, None, goal, other)
        for actor in who:
            room_of[actor] = goal


# Rules: each takes the statements so far and a topic, which one of them names.


def latest(
    events: list[Event], name: str, kinds: tuple[str, ...], start: int = 0, stop: int | None = None
) -> int | None:
    """The index of the latest statement of these kinds in events[start:stop] that names an actor or
    an object, or None."""
    if stop is None:
        stop = len(events)
    for i in range(stop - 1, start - 1, -1):
        event = events[i]
        if event.kind in kinds and name in (event.actor, event.obj, event.other):
            return i
    return None


def where(events: list[Event], actor: str) -> Odds:
    """qa1 and qa11-qa13: ask for the room of the actor's last move.

    Who "he", "she" or "they" are is told by the statement before. So it supports the answer."""
    i = latest(events, actor, MOVES)
    support = (i - 1, i) if events[i].kind == "then" else (i,)
    return {Question(f"Where is {actor}?", events[i].room, support): 1}


def where_object(events: list[Event], obj: str) -> Odds:
    """qa2: ask where the object was put down, or where its holder went with it."""
    i = latest(events, obj, ("get", "drop"))
    if events[i].kind == "drop":
        move = latest(events, events[i].actor, ("move",), stop=i)
    else:
        move = latest(events, events[i].actor, ("move",), start=i)
    if move is None:
        return {}
    return {Question(f"Where is the {obj}?", events[move].room, (i, move)): 1}


def where_before(events: list[Event], obj: str) -> Odds:
    """qa3: ask in which room the object was before another one.

    Only the latest carrying counts, from the last get to the drop after it. If the carrier was in
    a room twice, the question means the later visit. The weights are fitted to the released files:
    each room has 1.3 times the weight of the room before it."""
    i = latest(events, obj, ("get", "drop"))
    start = latest(events, obj, ("get",))
    stop = i if events[i].kind == "drop" else len(events)
    carrier = events[i].actor
    moves = []
    for j in range(start, stop):
        if events[j].kind == "move" and events[j].actor == carrier:
            moves.append(j)
    rooms = [events[j].room for j in moves]
    odds = {}
    for n in range(1, len(moves)):
        if rooms[n] not in rooms[n + 1 :]:
            text = f"Where was the {obj} before the {rooms[n]}?"
            question = Question(text, rooms[n - 1], (i, moves[n], moves[n - 1]))
            odds[question] = 1.3**n
    return odds


def gift(events: list[Event], obj: str) -> Odds:
    """qa5: ask what was given last, by whom, or to whom."""
    i = latest(events, obj, ("give",))
    giver = events[i].actor
    taker = events[i].other
    # Each of the three has a third of the weight. The last two have two wordings each.
    return {
        Question(f"What did {giver} give to {taker}?", obj, (i,)): 2,
        Question(f"Who gave the {obj}?", giver, (i,)): 1,
        Question(f"Who gave the {obj} to {taker}?", giver, (i,)): 1,
        Question(f"Who received the {obj}?", taker, (i,)): 1,
        Question(f"Who did {giver} give the {obj} to?", taker, (i,)): 1,
    }


def is_in(events: list[Event], actor: str, *, rooms: tuple[str, ...] = ROOMS) -> Odds:
    """qa6, qa9 and qa10: ask whether the actor is in a room.

    If only the room that he left was told, the question is about this room."""
    i = latest(events, actor, MOVES)
    true_room = events[i].room
    named = events[i].named
    if len(named) == 1:
        return {Question(f"Is {actor} in the {named[0]}?", "no", (i,)): 1}
    odds = {}
    for room in rooms:
        if room in named:
            answer = "maybe"
        elif room == true_room:
            answer = "yes"
        else:
            answer = "no"
        question = Question(f"Is {actor} in the {room}?", answer, (i,))
        # The true room has half of the weight, as much as the five others together.
        odds[question] = 5 if room == true_room else 1
    return odds


def touched(events: list[Event], actor: str) -> dict[str, list[int]]:
    """The objects that the actor took, put down, gave or received, each with the indices of the
    statements that say so. The objects are in the order of the first of these statements."""
    found = {}
    for i, event in enumerate(events):
        if event.obj and actor in (event.actor, event.other):
            found.setdefault(event.obj, []).append(i)
    return found


def held(events: list[Event], actor: str, indices_of: dict[str, list[int]]) -> list[str]:
    """Those of the touched objects that the actor holds now."""
    objects = []
    for obj, indices in indices_of.items():
        last = events[indices[-1]]
        if last.kind == "get" or last.other == actor:
            objects.append(obj)
    return objects


def how_many(events: list[Event], actor: str) -> Odds:
    """qa7: ask how many objects the actor holds; the support is in the order of the story."""
    indices_of = touched(events, actor)
    n_held = len(held(events, actor, indices_of))
    answer = ("none", "one", "two", "three")[n_held]
    support = sorted(chain(*indices_of.values()))
    return {Question(f"How many objects is {actor} carrying?", answer, tuple(support)): 1}


def which(events: list[Event], actor: str) -> Odds:
    """qa8: ask which objects the actor holds; the support is in the order of the objects."""
    indices_of = touched(events, actor)
    answer = ",".join(held(events, actor, indices_of)) or "nothing"
    support = chain(*indices_of.values())
    return {Question(f"What is {actor} carrying?", answer, tuple(support)): 1}


WITH_GIFTS = ("move", "get", "drop", "give")
# A kind of statement that is repeated is drawn that much more often.
WITH_NOT = ("move", "move", "move", "move", "is in", "is in", "is not in", "is no longer in")
WITH_EITHER = ("move", "move", "is in", "is either in")

WORLD = {  # The order of the actors of qa5 and qa7 is the order in which a gift looks for a taker.
    "qa1": Task("single-supporting-fact", partial(act, actions=("move",)), where),
    "qa2": Task(
        "two-supporting-facts", act, where_object, prompts=("get", "drop"), topics=("obj",)
    ),
    "qa3": Task(
        "three-supporting-facts",
        partial(act, p_there=P_THERE),
        where_before,
        prompts=("get", "drop"),
        topics=("obj",),
        skip=0.004,  # the released files skip 11 of 2936 questions
    ),
    "qa5": Task(
        "three-arg-relations",
        partial(act, actions=WITH_GIFTS, actors=("Mary", "Fred", "Bill", "Jeff")),
        gift,
        prompts=("give",),
        topics=("obj",),
        choose=True,
    ),
    "qa6": Task("yes-no-questions", act, is_in, choose=True),
    "qa7": Task(
        "counting",
        partial(act, actions=WITH_GIFTS, actors=("John", "Mary", "Sandra", "Daniel")),
        how_many,
        prompts=("get", "drop", "give"),
    ),
    "qa8": Task("lists-sets", act, which, prompts=("get", "drop")),
    "qa9": Task("simple-negation", partial(roam, told=WITH_NOT), is_in, choose=True),
    "qa10": Task(
        "indefinite-knowledge",
        partial(roam, told=WITH_EITHER, actors=("Fred", "Mary", "Bill", "Julie"), rooms=TOWN),
        partial(is_in, rooms=TOWN),
        choose=True,
    ),
    "qa11": Task("basic-coreference", partial(roam, again=True), where),
    "qa12": Task("conjunction", partial(roam, party=2), where, topics=("actor", "other")),
    "qa13": Task(
        "compound-coreference",
        partial(roam, party=2, again=True),
        where,
        topics=("actor", "other"),
    ),
}
