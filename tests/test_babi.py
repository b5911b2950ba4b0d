"""The bAbI generator (qa1-qa13) against the rules and the counts of the released files (v1.2, English).

    python -m pytest tests/test_babi.py -q
    python tests/test_babi.py --stories 2200 --seeds 0 1 2     # only the counts, for several seeds

The checker reads only the formatted text. It follows the story forwards and keeps what a reader knows, while
the generator looks backwards from a question; the two share no code. The counts in babi_histograms.json are
compared with those of as many own stories, by chi-square.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python tests/test_babi.py`

from data import babi  # noqa: E402
from data.babi.worlds import WORLD, Event, Question  # noqa: E402

TASKS = babi.TASKS
RELEASED = json.loads((ROOT / "tests" / "babi_histograms.json").read_text(encoding="utf-8"))

# What the sentences of a task may hold.
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
NAMES = {task: ("John", "Mary", "Sandra", "Daniel") for task in WORLD}  # in the order of qa7's takers
NAMES |= {"qa5": ("Mary", "Fred", "Bill", "Jeff"), "qa10": ("Fred", "Mary", "Bill", "Julie")}
PLACES = {task: ROOMS for task in WORLD}
PLACES |= {"qa10": ("school", "park", "office", "kitchen", "cinema", "bedroom")}
KINDS = {task: {"move"} for task in WORLD}
KINDS |= {task: {"move", "get", "drop"} for task in ("qa2", "qa3", "qa6", "qa8")}
KINDS |= {task: {"move", "get", "drop", "give"} for task in ("qa5", "qa7")}
KINDS |= {"qa9": {"move", "is in", "is not in", "is no longer in"}, "qa10": {"move", "is in", "is either in"}}
ABOUT = dict(KINDS)  # the statements that make a question about their actor, or their object
ABOUT |= {"qa2": {"get", "drop"}, "qa3": {"get", "drop"}, "qa5": {"give"}, "qa6": {"move"},
          "qa7": {"get", "drop", "give"}, "qa8": {"get", "drop"}}
PATTERNS = {kind: re.compile(pattern) for kind, pattern in {
    "move": r"(?P<who>.+) (?P<verb>went|went back|moved|journeyed|travelled) to the (?P<what>\w+)\.",
    "get": r"(?P<who>\w+) (?P<verb>got|took|grabbed|picked up) the (?P<what>\w+)(?P<there> there)?\.",
    "drop": r"(?P<who>\w+) (?P<verb>dropped|left|discarded|put down) the (?P<what>\w+)(?P<there> there)?\.",
    "give": r"(?P<who>\w+) (?P<verb>gave|handed|passed) the (?P<what>\w+) to (?P<to>\w+)\.",
    "is in": r"(?P<who>\w+) (?P<verb>is in) the (?P<what>\w+)\.",
    "is not in": r"(?P<who>\w+) (?P<verb>is not in) the (?P<what>\w+)\.",
    "is no longer in": r"(?P<who>\w+) (?P<verb>is no longer in) the (?P<what>\w+)\.",
    "is either in": r"(?P<who>\w+) (?P<verb>is either in) the (?P<what>\w+) or the (?P<to>\w+)\.",
    "relation": r"(?P<who>The \w+) (?P<verb>is (?:north|south|east|west) of) the (?P<what>\w+)\.",  # qa4
}.items()}
PRONOUN = re.compile(r"(After that|Afterwards|Following that|Then) (he|she|they)")

Fact = collections.namedtuple("Fact", "id kind who what verb there to subject")  # who: one actor or two
Asked = collections.namedtuple("Asked", "id text answer ids")


@functools.cache
def parse(sentence):
    """The kind of a statement and the parts of its pattern; kept, for few sentences differ."""
    kind, match = next((k, m) for k, p in PATTERNS.items() if (m := p.fullmatch(sentence)))
    return kind, {"there": None, "to": None} | match.groupdict()


def read(text, tail=" "):
    """The stories of a file, each a list of Fact and Asked; asserts the format."""
    assert text.isascii() and text.endswith("\n") and "\r" not in text
    stories = []
    for line in text[:-1].split("\n"):
        number, rest = line.split(" ", 1)
        if number == "1":
            stories.append([])
        story = stories[-1]
        assert number == str(len(story) + 1), line
        if "\t" in line:
            question, answer, ids = rest.split("\t")
            assert question.endswith("?" + tail), line
            ids = tuple(int(i) for i in ids.split(" "))
            assert all(i < int(number) and isinstance(story[i - 1], Fact) for i in ids), line
            story.append(Asked(int(number), question.removesuffix(tail), answer, ids))
        else:
            kind, part = parse(rest)
            who = tuple(part["who"].split(" and "))
            if PRONOUN.fullmatch(part["who"]):  # who that is, the statement before tells
                who = next(fact for fact in reversed(story) if isinstance(fact, Fact)).who
            story.append(Fact(int(number), kind, who, part["what"], part["verb"], bool(part["there"]),
                              part["to"], part["who"]))
    return stories


class Reader:
    """What a reader of the text knows after each statement, and the questions that can be asked then."""

    def __init__(self, task):
        self.task, self.count = task, 0
        self.seen = {}  # actor -> room, known from what he did
        self.told = {}  # actor -> (lines, kind, rooms) of his last move; "he" or "they" add a line
        self.holder = {}  # object -> actor, or None once it lies somewhere
        self.lies = {}  # object -> room, where known
        self.event = {}  # object -> (line of its last get or drop, the (line, room) that answers qa2 or None)
        self.carry = {}  # object -> [(line, room), ...] of the moves of its last carry
        self.gift = {}  # object -> (line, giver, taker)
        self.touched = collections.defaultdict(dict)  # actor -> object -> lines

    def take_in(self, fact):
        """Updates the knowledge by one statement; asserts that it was possible."""
        self.count += 1
        assert fact.kind in KINDS[self.task] and set(fact.who) <= set(NAMES[self.task]), fact
        assert len(fact.who) == len(set(fact.who)) == (2 if self.task in ("qa12", "qa13") else 1), fact
        if fact.kind not in ("get", "drop", "give"):
            self.take_in_move(fact)
            return
        who, = fact.who
        {"get": self.take_in_get, "drop": self.take_in_drop, "give": self.take_in_give}[fact.kind](who, fact)
        for actor in {who, fact.to} - {None}:
            self.touched[actor].setdefault(fact.what, []).append(fact.id)

    def take_in_move(self, fact):
        rooms = (fact.what, fact.to) if fact.to else (fact.what,)
        assert set(rooms) <= set(PLACES[self.task]), fact
        follows = PRONOUN.fullmatch(fact.subject)
        assert bool(follows) == (self.task in ("qa11", "qa13") and self.count % 2 == 0), fact
        if follows:
            known = {"Mary": "she", "Sandra": "she", "John": "he", "Daniel": "he"}[fact.who[0]]
            assert follows[2] == ("they" if len(fact.who) == 2 else known), fact
        for actor in fact.who:
            lines, kind, were = self.told.get(actor, ((), "", ()))
            if fact.kind in ("is not in", "is no longer in"):  # it is the room he left
                assert self.seen.pop(actor, fact.what) == fact.what, f"{actor} was elsewhere: {fact}"
                assert (kind not in ("is not in", "is no longer in")) or were != rooms, f"left before: {fact}"
            else:
                possible = {*rooms} - {self.seen.pop(actor, None)}
                assert possible, f"{actor} is there already: {fact}"
                self.seen |= {actor: room for room in possible if len(possible) == 1}
            self.told[actor] = (*(lines if follows else ()), fact.id), fact.kind, rooms
            for obj in [o for o, holder in self.holder.items() if holder == actor]:
                self.event[obj] = self.event[obj][0], (fact.id, fact.what)
                self.carry[obj].append((fact.id, fact.what))

    def take_in_get(self, who, fact):
        what = fact.what
        assert self.holder.get(what) is None and what in OBJECTS, f"{what} is held: {fact}"
        assert fact.there or self.task == "qa3", fact
        if what in self.lies:
            assert self.seen.setdefault(who, self.lies[what]) == self.lies.pop(what), f"not there: {fact}"
        self.holder[what], self.event[what], self.carry[what] = who, (fact.id, None), []

    def take_in_drop(self, who, fact):
        assert self.holder.get(fact.what) == who, f"{who} does not hold it: {fact}"
        lines, _, rooms = self.told.get(who, (None, None, None))
        self.holder[fact.what], self.event[fact.what] = None, (fact.id, lines and (lines[0], rooms[0]))
        self.lies |= {fact.what: self.seen[who]} if who in self.seen else {}

    def take_in_give(self, who, fact):
        assert self.holder.get(fact.what) == who and fact.to in set(NAMES[self.task]) - {who}, fact
        together = {self.seen[actor] for actor in (who, fact.to) if actor in self.seen}
        assert len(together) < 2, f"not in one room: {fact}"
        self.seen |= {actor: room for room in together for actor in (who, fact.to)}
        order = [(obj, actor) for obj in OBJECTS for actor in NAMES[self.task]]
        for obj, actor in order[:order.index((fact.what, fact.to))]:
            holder = self.holder.get(obj)
            met = holder not in (None, actor) and self.seen.get(holder, 1) == self.seen.get(actor, 2)
            assert not met, f"{holder} gives the {obj} to {actor} before: {fact}"
        self.holder[fact.what], self.gift[fact.what] = fact.to, (fact.id, who, fact.to)

    def allowed(self, topic):
        """All (question, answer, ids) about an actor or an object."""
        if self.task in ("qa1", "qa11", "qa12", "qa13"):
            lines, _, rooms = self.told[topic]
            return {(f"Where is {topic}?", rooms[0], lines)}
        if self.task == "qa2":
            line, move = self.event[topic]
            return {(f"Where is the {topic}?", move[1], (line, move[0]))} if move else set()
        if self.task == "qa3":
            line, carry = self.event[topic][0], self.carry[topic]
            final = {room: i for i, (_, room) in enumerate(carry)}
            return {(f"Where was the {topic} before the {room}?", carry[i - 1][1],
                     (line, carry[i][0], carry[i - 1][0])) for room, i in final.items() if i > 0}
        if self.task == "qa5":
            line, giver, taker = self.gift[topic]
            return {(f"What did {giver} give to {taker}?", topic, (line,)),
                    (f"Who gave the {topic}?", giver, (line,)),
                    (f"Who gave the {topic} to {taker}?", giver, (line,)),
                    (f"Who received the {topic}?", taker, (line,)),
                    (f"Who did {giver} give the {topic} to?", taker, (line,))}
        if self.task in ("qa7", "qa8"):
            held = [obj for obj in self.touched[topic] if self.holder[obj] == topic]
            ids = tuple(i for lines in self.touched[topic].values() for i in lines)
            if self.task == "qa7":
                return {(f"How many objects is {topic} carrying?", ("none", "one", "two", "three")[len(held)],
                         tuple(sorted(ids)))}
            return {(f"What is {topic} carrying?", ",".join(held) or "nothing", ids)}
        lines, kind, rooms = self.told[topic]
        if kind in ("is not in", "is no longer in"):
            return {(f"Is {topic} in the {rooms[0]}?", "no", lines)}
        yes = "maybe" if kind == "is either in" else "yes"
        return {(f"Is {topic} in the {room}?", yes if room in rooms else "no", lines)
                for room in PLACES[self.task]}


def topics(task, facts, window=0):
    """What the statements name, or the last `window` of them; "Mary and John went" counts as two."""
    atoms = [(fact.kind, fact.what if task in ("qa2", "qa3", "qa5") else actor)
             for fact in facts for actor in fact.who]
    return {topic for kind, topic in atoms[-window:] if kind in ABOUT[task]}


def written(task, seed, n):
    """A file of n stories as the program writes it; of qa3 fewer, of qa4 more, as in the released files."""
    rules, rng, n = TASKS[task], random.Random(seed), {"qa3": n * 3 // 11, "qa4": n * 5}.get(task, n)
    return "".join(babi.format_story(rules.story(rng), rules) for _ in range(n))


@functools.cache
def stories(task, seed=0, n=2200):
    """Stories as many as in the released files, read back."""
    return read(written(task, seed, n), TASKS[task].tail)


LETTER = {name: "A" for names in NAMES.values() for name in names} | {o: "O" for o in OBJECTS}
LETTER |= {room: "L" for rooms in PLACES.values() for room in rooms}


@functools.cache
def template(text):
    """A sentence with A for an actor, L for a room and O for an object."""
    return " ".join(LETTER.get(word, word) for word in re.findall(r"\w+|[.?]", text))


def counted(task, stories):
    """Histograms of the stories by name, as in babi_histograms.json."""
    count = collections.defaultdict(collections.Counter)
    for story in stories:
        facts, before, last = [], 0, None
        for line in story:
            if isinstance(line, Fact):
                facts.append(line)
                count["statement_templates"][template(f"{line.subject} {line.verb} the {line.what}.")] += 1
                count["verbs"][line.verb] += 1
                count["there_suffix " + line.kind]["there" if line.there else "bare"] += 1
                count[f"statement_class {len(facts)}"][line.kind] += 1
                if PRONOUN.fullmatch(line.subject):
                    count["adverbs"][line.subject] += 1
                if len(facts) > 1:
                    again = line.subject.split()[0] == facts[-2].subject.split()[0]
                    count["same_first_word"][str(again)] += 1
                continue
            place = {fact.id: str(len(facts) - 1 - i) for i, fact in enumerate(facts)}
            for k, i in enumerate(line.ids, 1):
                count[f"support_lag {k}"][place[i]] += 1
            when = "statements_between_questions" if last else "statements_before_first_question"
            count[when][str(len(facts) - before)] += 1
            count["facts_before_question"][str(len(facts))] += 1
            count["answers"][line.answer] += 1
            count["question_templates"][template(line.text)] += 1
            count["n_supporting_facts"][str(len(line.ids))] += 1
            if last:
                count["same_question"][str(line.text == last.text)] += 1
            before, last = len(facts), line
    return count


def chi_square(own, released):
    """Two-sample chi-square of two histograms, and its degrees of freedom; rare values count together."""
    values = sorted({*own, *released}, key=lambda v: int(v) if v.isdigit() else -released.get(v, 0))
    a, b = sum(own.values()), sum(released.values())
    bins = [(0, 0)]
    for value in values:
        if sum(bins[-1]) * min(a, b) >= 5 * (a + b):  # five expected in either
            bins.append((0, 0))
        bins[-1] = bins[-1][0] + own[value], bins[-1][1] + released.get(value, 0)
    if len(bins) > 1 and sum(bins[-1]) * min(a, b) < 5 * (a + b):
        (x, y), (u, v) = bins.pop(), bins.pop()
        bins.append((x + u, y + v))
    if len(bins) == 1:
        return 0.0, 0
    return sum(((b / a) ** 0.5 * x - (a / b) ** 0.5 * y) ** 2 / (x + y) for x, y in bins), len(bins) - 1


# The variance of an answer's share over that of independent questions: those of one story are alike. Measured
# in the released files; for qa11-qa13 in own stories. All other counts have an effect of 1, or near it.
EFFECT = RELEASED["design_effect"] | {"qa11": 1.59, "qa12": 1.0, "qa13": 1.22}
# The answers of qa3, and mildly of qa2, are less even in the released files than any known rule explains.
LEVEL = {("qa2", "answers"): 1e-5, ("qa3", "answers"): 1e-5}


def rejected(task, seed, n=2200):
    """The histograms of own stories that differ from the released ones, and the number of those compared."""
    count, names, compared = counted(task, stories(task, seed, n)), [], 0
    for name, released in RELEASED["tasks"][task].items():
        value, df = chi_square(count[name], released)
        value /= EFFECT[task] if name == "answers" else 1
        compared += df > 0
        half = torch.tensor([df, value], dtype=torch.float64) / 2
        if df and torch.special.gammaincc(*half) < LEVEL.get((task, name), 0.001):
            names.append(name)
    return names, compared


@pytest.mark.parametrize("task", RELEASED["tasks"])
def test_the_counts_are_those_of_the_released_files(task):
    assert rejected(task, seed=0)[0] == []


def test_a_story_is_five_questions_after_blocks_of_two_statements_and_ends_with_one():
    for task in WORLD:
        for story in stories(task):
            assert [isinstance(line, Asked) for line in story].count(True) == 5
            assert isinstance(story[-1], Asked)
            runs = "".join("q" if isinstance(line, Asked) else "s" for line in story).split("q")[:-1]
            assert all(run and len(run) % 2 == 0 for run in runs)


def test_no_statement_contradicts_what_the_text_has_told():
    for task in WORLD:
        for story in stories(task):
            reader = Reader(task)
            for line in story:
                if isinstance(line, Fact):
                    reader.take_in(line)


@pytest.mark.parametrize("task", WORLD)
def test_a_question_is_asked_exactly_when_the_last_five_statements_offer_it(task):
    offered = missed = 0
    for story in stories(task):
        reader, facts = Reader(task), []
        for i, line in enumerate(story):
            if isinstance(line, Asked):
                continue
            reader.take_in(line)
            facts.append(line)
            named = topics(task, facts, 5) if len(facts) % 2 == 0 else ()
            allowed = set().union(*map(reader.allowed, named))
            offered += bool(allowed)
            if isinstance(story[i + 1], Asked):
                assert story[i + 1][1:] in allowed, (story[i + 1], allowed)
            else:
                missed += bool(allowed)
    # The released qa3 files leave out 11 questions of 2936.
    assert missed == 0 if task != "qa3" else 0 < missed < 0.015 * offered


@pytest.mark.parametrize("task", WORLD)
def test_a_lesson_asks_about_everything_the_whole_text_names(task):
    rng = random.Random(3)
    for n in range(1, 60):
        events, questions = TASKS[task].lesson(n, rng)
        assert len(events) >= n and [q.text for q in questions] == list({q.text: 0 for q in questions})
        facts, = read("".join(f"{i} {event.text}\n" for i, event in enumerate(events, 1)))
        reader = Reader(task)
        for fact in facts:
            reader.take_in(fact)
        found = {(q.text, q.answer, tuple(i + 1 for i in q.support)) for q in questions}
        for topic in topics(task, facts):
            allowed = reader.allowed(topic)
            one = task in ("qa5", "qa6", "qa9", "qa10")  # of several questions one, drawn
            assert len(found & allowed) == 1 if one else allowed <= found, (topic, found, allowed)
            found -= allowed
        assert not found


@pytest.mark.parametrize("task", sorted(babi.ALSO))
def test_of_a_story_other_tasks_ask_what_they_would_and_behind_the_tasks_own_questions(task):
    rng, seen = random.Random(8), set()
    for n in range(2, 40):
        events, own = TASKS[task].lesson(n, rng)
        found = babi.with_others(task, events, own, ["qa1", "qa3", "qa6", "qa9"], rng)
        number = next(i for i, q in enumerate(found + [None]) if q not in own)
        assert found[:number] == own[:number] and number == min(len(own), 8 - min(3, len(found) - number))
        facts, = read("".join(f"{i} {event.text}\n" for i, event in enumerate(events, 1)))
        reader, allowed = Reader(task), {}
        for fact in facts:
            reader.take_in(fact)
        for reader.task in {"qa1", "qa3", "qa6"} - {task}:
            for topic in topics(reader.task, facts) if reader.task in babi.ALSO[task] else ():
                allowed |= dict.fromkeys(reader.allowed(topic), reader.task)
        seen |= {allowed[q.text, q.answer, tuple(i + 1 for i in q.support)] for q in found[number:]}
        assert babi.with_others(task, events, own, [task, "qa4", "qa9"], rng) == own
    assert seen == {"qa1", "qa3", "qa6"} & babi.ALSO[task]


@pytest.mark.parametrize("task", ("qa5", "qa6", "qa9", "qa10"))
def test_a_lesson_asks_at_the_odds_of_the_rule_and_not_each_question_once(task):
    rng, share = random.Random(4), collections.Counter()
    for _ in range(1500):
        share.update(template(q.text) if task == "qa5" else q.answer for q in TASKS[task].lesson(8, rng)[1])
    expected = {"qa5": {"What did A give to A ?": 1 / 3, "Who gave the O ?": 1 / 6},
                "qa6": {"yes": 1 / 2}, "qa9": {"yes": 3 / 8},
                "qa10": {"yes": 3 / 8, "maybe": (1 / 2 + 1 / 10 * 5 / 6) / 4}}[task]
    for value, p in expected.items():
        n = share.total()
        assert abs(share[value] / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5, (value, share)


def test_the_questions_of_a_lesson_come_in_random_order():
    rng, first = random.Random(6), collections.Counter()
    for _ in range(600):
        events, questions = TASKS["qa1"].lesson(12, rng)
        named = list(dict.fromkeys(event.actor for event in events))
        first[named.index(questions[0].text.split()[-1][:-1])] += len(named) == 4
    assert all(abs(first[i] / sum(first.values()) - 0.25) < 0.1 for i in range(4)), first


def test_a_lesson_has_one_statement_more_after_a_hundred_tries_without_a_question():
    lengths = []

    def rule(events, topic):
        lengths.append(len(events))
        return {Question("Why?", "so", (0,)): 1} if len(events) == 3 else {}

    events, questions = dataclasses.replace(TASKS["qa1"], rule=rule).lesson(1, random.Random(0))
    assert len(events) == 3 and len(questions) == 1
    assert lengths.count(1) == 100 and 100 < lengths.count(2) <= 200 and 1 <= lengths.count(3) <= 3


# Digests of 50 stories and 50 lessons: a model trained on one version can be trained again on the next.
DRAWS = {"qa1": "35111703c3f08137", "qa2": "6e8d9ff986a17c11", "qa3": "fd297636575f267b"}


@pytest.mark.parametrize("task", DRAWS)
def test_a_seed_gives_the_stories_and_lessons_it_always_gave(task):
    rng, digest = random.Random(5), hashlib.blake2b(digest_size=8)
    for n in range(50):
        digest.update(babi.format_story(TASKS[task].story(rng), TASKS[task]).encode())
        events, questions = TASKS[task].lesson(6 + n, rng)
        digest.update("\n".join([e.text for e in events] + [q.text for q in questions]).encode())
    assert digest.hexdigest() == DRAWS[task]


def test_no_object_is_preferred_when_several_are_within_reach():
    rng, n = random.Random(2), 3000
    worlds = (TASKS["qa2"].world(rng) for _ in range(n))
    first = collections.Counter(next(event.obj for event in world if event.obj) for world in worlds)
    assert all(abs(first[obj] - n / 3) < 130 for obj in OBJECTS), first  # 5 standard deviations


def test_a_room_twice_is_one_doubt_in_six_and_the_true_room_comes_first_as_often_as_second():
    world = TASKS["qa10"].world(random.Random(3))
    events = [event for event in itertools.islice(world, 40000) if event.kind == "is either in"]
    same = sum(len(set(event.named)) == 1 for event in events)
    first, second = (sum(event.named[i] == event.room for event in events) for i in (0, 1))
    assert first + second - same == len(events)  # the true room is among the two
    assert abs(same - len(events) / 6) < 190 and abs(first - second) < 460  # 5 standard deviations


def test_in_qa12_who_is_in_the_way_of_a_move_is_drawn_anew_like_the_room():
    together = apart = 0
    for seed in range(300):  # two who are in one room can go to 5 of 6 rooms, others to 4
        world, room = TASKS["qa12"].world(random.Random(seed)), {}
        for event in itertools.islice(world, 30):
            pair = event.actor, event.other
            if len(room) == 4:
                met = sum(room[a] == room[b] for a, b in itertools.combinations(room, 2)) / 6
                together += (room[pair[0]] == room[pair[1]]) - met * 5 / (met * 5 + (1 - met) * 4)
                apart += met * 5 / (met * 5 + (1 - met) * 4) * (1 - met * 5 / (met * 5 + (1 - met) * 4))
            room |= dict.fromkeys(pair, event.room)
    assert abs(together) < 4 * apart ** 0.5


def events_of(*rows):
    """Events from "Mary move kitchen", "Mary+John move kitchen", "Mary give milk John" and the like."""
    events, room = [], {}
    for who, kind, what, *to in (row.split() for row in rows):
        actor, other = (who.split("+") + to + [None])[:2]
        obj = what if kind in ("get", "drop", "give") else None
        for name in who.split("+"):
            room[name] = room.get(name, "somewhere") if obj else what
        events.append(Event(kind, actor, obj, room[actor], "", other))
    return events


def asked(task, *rows, n=4000):
    """How often each question is asked after these events, as a share of n tries."""
    rng, events = random.Random(5), events_of(*rows)
    questions = collections.Counter(TASKS[task].ask(events, rng) for _ in range(n))
    return collections.Counter({question and question.text: k / n for question, k in questions.items()})


def test_who_is_named_in_four_of_five_statements_is_asked_about_in_four_of_five_questions():
    rooms = ("kitchen", "office", "garden", "hallway")
    share = asked("qa1", "John move office", *(f"Mary move {room}" for room in rooms))
    assert abs(share["Where is Mary?"] - 0.8) < 0.03  # 4.7 standard deviations


def test_the_window_is_five_statements():
    rooms = ("kitchen", "office", "garden", "hallway", "kitchen")
    share = asked("qa1", "John move office", *(f"Mary move {room}" for room in rooms))
    assert share["Where is Mary?"] == 1


def test_in_qa12_the_window_is_five_facts_and_a_statement_of_two_actors_is_two():
    share = asked("qa12", "John+Daniel move office", "Mary+Sandra move garden", "Sandra+Mary move office")
    assert abs(share["Where is Daniel?"] - 0.2) < 0.03 and share["Where is John?"] == 0


def test_qa2_does_not_ask_for_an_object_just_picked_up():
    rows = "Mary move kitchen", "Mary get milk"
    assert asked("qa2", *rows) == {None: 1}
    assert asked("qa2", *rows, "Mary move office") == {"Where is the milk?": 1}


def test_qa3_prefers_the_end_of_the_carry_by_1_3_a_room():
    share = asked("qa3", "Mary get milk", "Mary move garden", "Mary move kitchen", "Mary move hallway")
    assert abs(share["Where was the milk before the hallway?"] - 0.996 * 1.3 / 2.3) < 0.03


def test_qa3_means_the_later_visit_of_a_room_seen_twice():
    events = events_of("Mary get milk", "Mary move garden", "Mary move kitchen", "Mary move hallway",
                       "Mary move kitchen", "Mary drop milk")
    found = {question.text: question for question in TASKS["qa3"].rule(events, "milk")}
    assert set(found) == {"Where was the milk before the kitchen?", "Where was the milk before the hallway?"}
    assert found["Where was the milk before the kitchen?"][1:] == ("hallway", (5, 4, 3))


def test_qa3_does_not_join_two_carries():
    assert asked("qa3", "Mary get milk", "Mary move garden", "Mary drop milk", "Mary get milk",
                 "Mary move office") == {None: 1}


def test_qa5_asks_for_object_giver_and_taker_a_third_each_of_the_latest_gift():
    share = asked("qa5", "Mary give milk Fred", "Fred give milk Bill", "Bill drop milk")
    two = {"Who gave the milk?", "Who gave the milk to Bill?"}, {"Who received the milk?",
                                                                 "Who did Fred give the milk to?"}
    assert set(share) == two[0] | two[1] | {"What did Fred give to Bill?"}
    assert abs(share["What did Fred give to Bill?"] - 1 / 3) < 0.035
    assert all(abs(share[text] - 1 / 6) < 0.028 for text in two[0] | two[1])


def test_qa6_asks_for_the_true_room_half_the_time_and_for_each_other_one_time_in_ten():
    share = asked("qa6", "Mary move kitchen", "John get milk")
    assert set(share) == {f"Is Mary in the {room}?" for room in ROOMS}
    assert all(abs(p - (0.5 if "kitchen" in text else 0.1)) < 0.04 for text, p in share.items())


def test_qa7_is_not_about_who_was_only_given_something():
    assert asked("qa7", "Mary give milk John") == {"How many objects is Mary carrying?": 1}


def test_qa8_names_objects_and_their_statements_in_the_order_they_were_first_touched():
    rows = "John get milk", "John get apple", "John drop milk", "John get football", "John get milk"
    question, = TASKS["qa8"].rule(events_of(*rows, "John drop football"), "John")
    assert question[1:] == ("milk,apple", (0, 2, 4, 1, 3, 5))


def run(*flags):
    return subprocess.run([sys.executable, "-m", "data.babi", *flags], cwd=ROOT, capture_output=True)


def test_the_same_seed_gives_the_same_bytes_on_screen_and_in_a_file(tmp_path):
    flags = ("--task", "qa3", "--stories", "3", "--seed", "4")
    first = run(*flags)
    assert first.returncode == 0 and not first.stderr and len(read(first.stdout.decode("ascii"))) == 3
    assert run(*flags, "--out", str(tmp_path / "qa3.txt")).returncode == 0
    assert (tmp_path / "qa3.txt").read_bytes() == first.stdout
    assert run(*flags[:-1], "5").stdout != first.stdout


def fails_in_one_line(result, *words):
    error = result.stderr.decode()
    assert result.returncode == 2 and not result.stdout and error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.mark.parametrize("flags, words", [
    (("--task", "qa99"), ("--task", "qa99", "qa1", "qa3")),
    (("--stories", "0"), ("--stories", "0", "1 or more")),
    (("--stories", "-3"), ("--stories", "-3", "whole number")),
    (("--stories", "two"), ("--stories", "two", "whole number")),
    (("--seed", "1.5"), ("--seed", "1.5", "whole number")),
    (("--stor", "5"), ("--stor", "--help")),  # no abbreviations
])
def test_a_wrong_flag_is_named_in_one_line(flags, words):
    fails_in_one_line(run(*flags), *words)


def test_an_out_path_that_cannot_be_written_is_named_in_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "old.txt").write_text("old", encoding="ascii")
    for path in (tmp_path / "missing" / "a.txt", tmp_path, tmp_path / "old.txt" / "a.txt", os.devnull):
        fails_in_one_line(run("--stories", "1", "--out", str(path)), "--out", str(path), "name")
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]
    assert not Path(os.devnull).is_file()


def test_a_failure_half_way_leaves_the_older_file_as_it_was(tmp_path, monkeypatch, capsys):
    out, calls, whole = tmp_path / "out.txt", [], babi.format_story

    def full_disk(story, task):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return whole(story, task)

    out.write_text("old", encoding="ascii")
    monkeypatch.setattr(babi.files, "format_story", full_disk)
    with pytest.raises(SystemExit) as stop:
        babi.main(["--stories", "5", "--out", str(out)])
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert out.read_text(encoding="ascii") == "old" and list(tmp_path.iterdir()) == [out]


def test_a_closed_pipe_ends_quietly():
    command = [sys.executable, "-m", "data.babi", "--stories", "2000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"1 ")
        process.stdout.close()
        assert process.stderr.read() == b""


def main():
    parser = argparse.ArgumentParser(description="Compare counts with those of the released bAbI files.")
    parser.add_argument("--stories", type=int, default=2200, help="for a task (qa3: 3/11, qa4: 5 times)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the files")
    args = parser.parse_args()
    refused = []
    for task in RELEASED["tasks"]:
        found = {seed: rejected(task, seed, args.stories) for seed in args.seeds}
        times = collections.Counter(name for names, _ in found.values() for name in names)
        compared = {n for _, n in found.values()}
        good = times.total() <= 2 and all(n < 2 for n in times.values())
        refused += [] if good else [task]
        print(f"{task:5} {max(compared)} histograms;", *(f"seed {seed} rejects {', '.join(names) or 'none'};"
              for seed, (names, _) in found.items()), "accepted" if good else "REFUSED", flush=True)
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()
