"""The bAbI generator against the rules and the measured statistics of the released files (v1.2, English).

    python -m pytest tests/test_babi.py -q

The checker reads only the formatted text. It follows the story forwards and keeps what a reader knows, while
the generator looks backwards from a question; the two share no code.
"""

import bisect
import collections
import functools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import babi

ROOT = Path(__file__).resolve().parent.parent
LINE = {
    "move": re.compile(r"(?P<who>Mary|John|Sandra|Daniel) (?P<verb>went|went back|moved|journeyed|travelled) "
                       r"to the (?P<what>bathroom|bedroom|garden|hallway|kitchen|office)\."),
    "get": re.compile(r"(?P<who>Mary|John|Sandra|Daniel) (?P<verb>got|took|grabbed|picked up) "
                      r"the (?P<what>apple|football|milk)(?P<there> there)?\."),
    "drop": re.compile(r"(?P<who>Mary|John|Sandra|Daniel) (?P<verb>dropped|left|discarded|put down) "
                       r"the (?P<what>apple|football|milk)(?P<there> there)?\."),
}
STORIES = {"qa1": 1000, "qa2": 800, "qa3": 400}

Fact = collections.namedtuple("Fact", "id kind who what verb there")
Asked = collections.namedtuple("Asked", "id text answer ids")


def read(text):
    """The stories of a file, each a list of Fact and Asked; asserts the format."""
    assert text.isascii() and text.endswith("\n") and "\r" not in text
    stories = []
    for line in text[:-1].split("\n"):
        number, rest = line.split(" ", 1)
        if number == "1":
            stories.append([])
        assert number == str(len(stories[-1]) + 1), line
        if "\t" in line:
            question, answer, ids = rest.split("\t")
            assert question.endswith("? ") and not question.endswith("  "), line
            ids = tuple(int(i) for i in ids.split(" "))
            assert all(i < int(number) and isinstance(stories[-1][i - 1], Fact) for i in ids), line
            stories[-1].append(Asked(int(number), question[:-1], answer, ids))
        else:
            kind, match = next((k, m) for k, p in LINE.items() if (m := p.fullmatch(rest)))
            stories[-1].append(Fact(int(number), kind, match["who"], match["what"], match["verb"],
                                    kind != "move" and bool(match["there"])))
    return stories


class Reader:
    """What a reader of the text knows after each statement, and the questions that can be asked then."""

    def __init__(self):
        self.seen = {}  # actor -> room, known from his move or from what he took
        self.told = {}  # actor -> (line, room) of the last move
        self.holder = {}  # object -> actor, or None once it lies somewhere
        self.lies = {}  # object -> room, where known
        self.event = {}  # object -> (line of its last get or drop, the (line, room) that answers qa2 or None)
        self.carry = {}  # object -> [(line, room), ...] of the moves of its last carry

    def take_in(self, fact):
        """Updates the knowledge by one statement; asserts that it was possible."""
        who, what = fact.who, fact.what
        if fact.kind == "move":
            assert self.seen.get(who) != what, f"{who} is in the {what} already: {fact}"
            self.seen[who], self.told[who] = what, (fact.id, what)
            for obj in [o for o, holder in self.holder.items() if holder == who]:
                self.event[obj] = self.event[obj][0], (fact.id, what)
                self.carry[obj].append((fact.id, what))
        elif fact.kind == "get":
            assert self.holder.get(what) is None, f"{what} is held: {fact}"
            if what in self.lies:
                assert self.seen.setdefault(who, self.lies[what]) == self.lies[what], f"not there: {fact}"
            self.holder[what], self.event[what], self.carry[what] = who, (fact.id, None), []
            self.lies.pop(what, None)
        else:
            assert self.holder.get(what) == who, f"{who} does not hold it: {fact}"
            self.holder[what], self.event[what] = None, (fact.id, self.told.get(who))
            if who in self.seen:
                self.lies[what] = self.seen[who]

    def allowed(self, task, facts):
        """All (question, answer, ids) about what `facts` name."""
        if task == "qa1":
            return {(f"Where is {f.who}?", self.told[f.who][1], (self.told[f.who][0],)) for f in facts}
        found = set()
        for obj in {f.what for f in facts if f.kind != "move"}:
            line, move = self.event[obj]
            if task == "qa2" and move:
                found.add((f"Where is the {obj}?", move[1], (line, move[0])))
            if task == "qa3":
                final = {room: i for i, (_, room) in enumerate(self.carry[obj])}
                found |= {(f"Where was the {obj} before the {room}?", self.carry[obj][i - 1][1],
                           (line, self.carry[obj][i][0], self.carry[obj][i - 1][0]))
                          for room, i in final.items() if i > 0}
        return found


@functools.cache
def written(task):
    """A file of stories as the program writes it, read back."""
    rules, rng = babi.TASKS[task], random.Random(7)
    return read("".join(babi.format_story(babi.story(rules, rng), rules) for _ in range(STORIES[task])))


@functools.cache
def counted(task):
    """Histograms of the written text, by name."""
    count = collections.defaultdict(collections.Counter)
    for story in written(task):
        facts, before, last_text = [], 0, None
        for line in story:
            if isinstance(line, Fact):
                count[f"{line.kind} verbs"][line.verb] += 1
                count[f"{line.kind} there"][line.there] += 1
                if facts:
                    count["same actor again"][line.who == facts[-1].who] += 1
                facts.append(line)
                count[f"kind of statement {len(facts)}"][line.kind] += 1
                continue
            place = {fact.id: len(facts) - 1 - i for i, fact in enumerate(facts)}
            for k, i in enumerate(line.ids, 1):
                count[f"lag of support {k}"][place[i]] += 1
            count["answers"][line.answer] += 1
            count[("first" if last_text is None else "next") + " question after"][len(facts) - before] += 1
            if last_text is not None:
                count["same question again"][line.text == last_text] += 1
            before, last_text = len(facts), line.text
    return count


def test_a_story_is_five_questions_after_blocks_of_two_statements_and_ends_with_one():
    for task in babi.TASKS:
        for story in written(task):
            assert [isinstance(line, Asked) for line in story].count(True) == 5
            assert isinstance(story[-1], Asked)
            runs = "".join("q" if isinstance(line, Asked) else "s" for line in story).split("q")[:-1]
            assert all(run and len(run) % 2 == 0 for run in runs)


def test_no_statement_contradicts_what_the_text_has_told():
    for task in babi.TASKS:
        for story in written(task):
            reader = Reader()
            for line in story:
                if isinstance(line, Fact):
                    reader.take_in(line)


@pytest.mark.parametrize("task", babi.TASKS)
def test_a_question_is_asked_exactly_when_the_last_five_statements_offer_it(task):
    offered = missed = 0
    for story in written(task):
        reader, facts = Reader(), []
        for i, line in enumerate(story):
            if isinstance(line, Asked):
                continue
            reader.take_in(line)
            facts.append(line)
            allowed = reader.allowed(task, facts[-5:]) if len(facts) % 2 == 0 else set()
            offered += bool(allowed)
            if isinstance(story[i + 1], Asked):
                assert story[i + 1][1:] in allowed, (story[i + 1], allowed)
            else:
                missed += bool(allowed)
    # The released qa3 files leave out 11 questions of 2936.
    assert missed == 0 if task != "qa3" else 0 < missed < 0.015 * offered


@pytest.mark.parametrize("task", babi.TASKS)
def test_all_questions_are_those_that_the_whole_text_allows(task):
    rng = random.Random(3)
    for n in range(40):
        events = list(babi.simulate(babi.TASKS[task], rng, n))
        assert len(events) == n
        text = "".join(f"{i} {event.text}\n" for i, event in enumerate(events, 1))
        facts, reader = read(text)[0] if n else [], Reader()
        for fact in facts:
            reader.take_in(fact)
        found = [(q.text, q.answer, tuple(i + 1 for i in q.support))
                 for q in babi.all_questions(babi.TASKS[task], events, rng)]
        assert len(found) == len(set(found)) and set(found) == reader.allowed(task, facts)


def test_no_object_is_preferred_when_several_are_within_reach():
    rng, n = random.Random(2), 3000
    worlds = (babi.simulate(babi.TASKS["qa2"], rng) for _ in range(n))
    first = collections.Counter(next(event.obj for event in world if event.obj) for world in worlds)
    assert all(abs(first[obj] - n / 3) < 130 for obj in babi.OBJECTS), first  # 5 standard deviations


def events_of(*rows):
    """Events from "Mary move kitchen" and the like."""
    events, room = [], {}
    for who, kind, what in (row.split() for row in rows):
        room[who] = what if kind == "move" else room.get(who, "somewhere")
        events.append(babi.Event(kind, who, None if kind == "move" else what, room[who], ""))
    return events


def share(task, events, text, n=4000):
    """How often `ask` asks `text`."""
    rng = random.Random(5)
    asked = [babi.ask(babi.TASKS[task], events, rng) for _ in range(n)]
    return sum(q is not None and q.text == text for q in asked) / n


def test_who_is_named_in_four_of_five_statements_is_asked_about_in_four_of_five_questions():
    rooms = ("kitchen", "office", "garden", "hallway")
    events = events_of("John move office", *(f"Mary move {room}" for room in rooms))
    assert abs(share("qa1", events, "Where is Mary?") - 0.8) < 0.03  # 4.7 standard deviations


def test_the_window_is_five_statements():
    rooms = ("kitchen", "office", "garden", "hallway", "kitchen")
    events = events_of("John move office", *(f"Mary move {room}" for room in rooms))
    assert share("qa1", events, "Where is Mary?") == 1.0


def test_qa2_does_not_ask_for_an_object_just_picked_up():
    rows = ["Mary move kitchen", "Mary get milk"]
    assert share("qa2", events_of(*rows), "Where is the milk?") == 0
    assert share("qa2", events_of(*rows, "Mary move office"), "Where is the milk?") == 1


def test_qa3_prefers_the_end_of_the_carry_by_1_3_a_room():
    events = events_of("Mary get milk", "Mary move garden", "Mary move kitchen", "Mary move hallway")
    expected = 0.996 * 1.3 / 2.3
    assert abs(share("qa3", events, "Where was the milk before the hallway?") - expected) < 0.03


def test_qa3_means_the_later_visit_of_a_room_seen_twice():
    events = events_of("Mary get milk", "Mary move garden", "Mary move kitchen", "Mary move hallway",
                       "Mary move kitchen", "Mary drop milk")
    found = {q.text: q for q in babi.all_questions(babi.TASKS["qa3"], events, random.Random(0))}
    assert set(found) == {"Where was the milk before the kitchen?", "Where was the milk before the hallway?"}
    assert found["Where was the milk before the kitchen?"][1:] == ("hallway", (5, 4, 3))


def test_qa3_does_not_join_two_carries():
    events = events_of("Mary get milk", "Mary move garden", "Mary drop milk", "Mary get milk",
                       "Mary move office")
    assert babi.ask(babi.TASKS["qa3"], events, random.Random(0)) is None


# Counts in the released files (en-10k, train and test). A number as key stands for all up to the next key.
# Questions of one story are alike; where this tells, chi-square is divided by the measured design effect, the
# variance of an answer's share over that of independent questions. The answers of qa3 are left out: in the
# released files they are less even than any rule explains.
DESIGN = {"qa1": 1.18, "qa2": 2.35, "qa3": 1.79}


def numbered(first, step, *counts):
    return {first + step * i: count for i, count in enumerate(counts)}


def kinds(move, get, drop):
    return {"move": move, "get": get, "drop": drop}


RELEASED = {
    "qa1": {
        "move verbs": {"went": 4470, "journeyed": 4430, "travelled": 4428, "went back": 4366, "moved": 4306},
        "same actor again": {True: 4981, False: 14819},
        "lag of support 1": numbered(0, 1, 4952, 3171, 1483, 948, 446),
        "answers": {"bathroom": 1882, "garden": 1850, "office": 1841,
                    "bedroom": 1815, "hallway": 1811, "kitchen": 1801},
        "same question again": {True: 3160, False: 5640},
    },
    "qa2": {
        "move verbs": {"moved": 6398, "journeyed": 6341, "went back": 6277, "travelled": 6262, "went": 6203},
        "get verbs": {"picked up": 2414, "grabbed": 2402, "got": 2401, "took": 2340},
        "drop verbs": {"left": 1921, "discarded": 1838, "dropped": 1803, "put down": 1790},
        "get there": {True: 9557},
        "drop there": {True: 1486, False: 5866},
        "same actor again": {True: 13484, False: 32706},
        "kind of statement 1": kinds(1509, 691, 0),
        "kind of statement 2": kinds(1510, 564, 126),
        "kind of statement 3": kinds(1523, 477, 200),
        "kind of statement 4": kinds(1482, 452, 266),
        "kind of statement 8": kinds(1449, 420, 331),
        "first question after": numbered(2, 2, 113, 385, 391, 366, 275, 219, 154, 108, 79, 48, 62),
        "next question after": numbered(2, 2, 6276, 1293, 622, 286, 136, 63, 60, 64),
        "lag of support 1": numbered(0, 1, 2735, 2577, 2179, 1968, 1541),
        "lag of support 2": numbered(0, 1, 1866, 1520, 1212, 1098, 939, 902, 731, 626, 506, 378, 298, 924),
        "answers": {"bathroom": 1757, "garden": 1957, "office": 1760,
                    "bedroom": 1922, "hallway": 1889, "kitchen": 1715},
        "same question again": {True: 5850, False: 2950},
    },
    "qa3": {
        "move verbs": {"moved": 5594, "went": 5540, "went back": 5482, "travelled": 5440, "journeyed": 5348},
        "get verbs": {"picked up": 2130, "took": 2044, "got": 2039, "grabbed": 1971},
        "drop verbs": {"dropped": 1994, "put down": 1892, "left": 1870, "discarded": 1844},
        "get there": {True: 1612, False: 6572},
        "drop there": {True: 1582, False: 6018},
        "same actor again": {True: 12302, False: 30301},
        "kind of statement 1": kinds(407, 178, 0),
        "kind of statement 2": kinds(379, 160, 46),
        "kind of statement 3": kinds(384, 138, 63),
        "kind of statement 4": kinds(388, 127, 70),
        "kind of statement 8": kinds(369, 125, 91),
        "first question after": numbered(2, 10, 80, 138, 138, 89, 54, 36, 50),
        "next question after": {2: 1290, 4: 139, 6: 112, 8: 155, 12: 286, 22: 123, 32: 81, 42: 59, 52: 95},
        "lag of support 1": numbered(0, 1, 803, 565, 525, 516, 516),
        "lag of support 2": numbered(0, 1, 380, 377, 345, 329, 306, 319, 201, 155, 111, 96, 69, 53, 184),
        "lag of support 3": numbered(1, 1, 219, 319, 263, 203, 210, 259, 228, 212, 186, 148, 129, 105, 444),
        "same question again": {True: 940, False: 1400},
    },
}


def chi_square(own, released):
    """Two-sample chi-square of two histograms, and the number of degrees of freedom."""
    keys = list(released)
    mine = collections.Counter()
    for value, count in own.items():
        numbers = isinstance(value, int) and not isinstance(value, bool)
        mine[keys[bisect.bisect(keys, value) - 1] if numbers else value] += count
    a, b = sum(mine.values()), sum(released.values())
    used = [key for key in {*mine, *released} if mine[key] + released.get(key, 0)]
    value = sum(((b / a) ** 0.5 * mine[key] - (a / b) ** 0.5 * released.get(key, 0)) ** 2
                / (mine[key] + released.get(key, 0)) for key in used)
    return value, len(used) - 1


def critical(df):
    """The 99.9 % point of chi-square (Wilson and Hilferty); about 0 where only one value can occur."""
    return df * (1 - 2 / (9 * df) + 3.0902 * (2 / (9 * df)) ** 0.5) ** 3 if df else 1e-6


@pytest.mark.parametrize("task, name", [(task, name) for task, table in RELEASED.items() for name in table])
def test_the_counts_are_those_of_the_released_files(task, name):
    value, df = chi_square(counted(task)[name], RELEASED[task][name])
    if name in ("answers", "same question again", "next question after"):
        value /= DESIGN[task]
    assert value <= critical(df), f"{task} {name}: chi-square {value:.1f} > {critical(df):.1f} (df {df})"


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
    monkeypatch.setattr(babi, "format_story", full_disk)
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
