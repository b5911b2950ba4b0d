"""Write bAbI stories (v1.2, English) by the rules of the released files: the same sentences at the same odds.

    python -m data.babi --task qa1 --stories 2                           # look at two stories
    python -m data.babi --task qa3 --stories 200 --seed 1 --out qa3.txt

Prints the original format, or writes it to --out: numbered statements and, five times a story, a question,
its answer and the numbers of its supporting lines. The same seed gives the same bytes.
Actors walk, take objects and put them down; a statement is one such action. Where all start is drawn, never
told, so only what the text answers is asked. A further task is one function and one row of TASKS.
"""

import argparse
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.cli import Parser

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
VERBS = {"move": ("went", "went back", "moved", "journeyed", "travelled"),  # "went back" on first visits too
         "get": ("got", "took", "grabbed", "picked up"),
         "drop": ("dropped", "left", "discarded", "put down")}


class Event(NamedTuple):
    """One statement, and what it does not tell."""
    kind: str  # "move", "get" or "drop"
    actor: str
    obj: str | None  # what is taken or put down
    room: str  # where the actor is afterwards; the reader knows only if he has moved
    text: str  # the statement


class Question(NamedTuple):
    """A question on the statements before it."""
    text: str  # ends with "?"
    answer: str
    support: tuple[int, ...]  # indices of statements, from 0, in the order of the released files


class Story(NamedTuple):
    """Statements, and the questions asked in between."""
    events: list[Event]
    questions: list[tuple[int, Question]]  # with the number of statements before each


Odds = list[tuple[float, Question]]  # questions with their weights; empty: nothing can be asked


@dataclass(frozen=True)
class Task:
    """One bAbI task: the statements of its world, and what is asked about them."""
    stem: str  # the released files are named "<task>_<stem>_train.txt"
    questions: Callable[[list[Event], str], Odds]  # (events, topic) -> what can be asked
    topic: str  # field of Event the questions are about: "actor" or "obj"
    prompts: tuple[str, ...]  # kinds of statement that make their topic worth a question
    actions: tuple[str, ...]  # kinds of statement that happen
    get_there: float = 1.0  # probability that a get ends in " there"
    skip: float = 0.0  # probability that no question is asked though there is one
    tail: str = " "  # what the files have between the question mark and the tab
    actors: tuple[str, ...] = ("Mary", "John", "Sandra", "Daniel")


def moves(events: list[Event], actor: str, start: int, stop: int) -> list[int]:
    """Indices of the actor's moves in events[start:stop], in order."""
    return [i for i in range(start, stop) if events[i].actor == actor and events[i].kind == "move"]


def latest(events: list[Event], obj: str, kinds: tuple[str, ...] = ("get", "drop")) -> int:
    """Index of the last statement of these kinds about the object."""
    return next(i for i in reversed(range(len(events))) if events[i].obj == obj and events[i].kind in kinds)


def qa1(events: list[Event], actor: str) -> Odds:
    """The room of the actor's last move."""
    last = moves(events, actor, 0, len(events))[-1]
    return [(1.0, Question(f"Where is {actor}?", events[last].room, (last,)))]


def qa2(events: list[Event], obj: str) -> Odds:
    """Where the object was put down, or where its holder is, if he has moved since he took it."""
    last = latest(events, obj)
    start, stop = (0, last) if events[last].kind == "drop" else (last + 1, len(events))
    told = moves(events, events[last].actor, start, stop)
    return [(1.0, Question(f"Where is the {obj}?", events[told[-1]].room, (last, told[-1])))] if told else []


def qa3(events: list[Event], obj: str) -> Odds:
    """The room before another one on the object's last way: from its last get to its drop, or to now.

    A room seen twice on the way means its later visit. The weight 1.3^j is a fit: late rooms are asked more.
    """
    last = latest(events, obj)
    stop = last if events[last].kind == "drop" else len(events)
    way = moves(events, events[last].actor, latest(events, obj, ("get",)) + 1, stop)
    rooms = [events[i].room for i in way]
    text = f"Where was the {obj} before the "
    return [(1.3 ** j, Question(f"{text}{rooms[j]}?", rooms[j - 1], (last, way[j], way[j - 1])))
            for j in range(1, len(way)) if rooms[j] not in rooms[j + 1:]]


TASKS = {
    "qa1": Task("single-supporting-fact", qa1, "actor", ("move",), ("move",)),
    "qa2": Task("two-supporting-facts", qa2, "obj", ("get", "drop"), ("move", "get", "drop")),
    "qa3": Task("three-supporting-facts", qa3, "obj", ("get", "drop"), ("move", "get", "drop"),
                get_there=0.2, skip=0.004),  # skip: 11 of 2936 in the released files
}


def pick(rng: random.Random, options: Sequence):
    """One of the options, each as likely; faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def simulate(task: Task, rng: random.Random, n: int | None = None) -> Iterator[Event]:
    """The first n statements of a new world; without n, statements for ever."""
    room = {actor: pick(rng, ROOMS) for actor in task.actors}
    place = {obj: pick(rng, ROOMS) for obj in OBJECTS}  # the room it lies in, or the actor who holds it
    made = 0
    while n is None or made < n:
        actor, kind, obj = pick(rng, task.actors), pick(rng, task.actions), None  # BOTH anew after a failure
        if kind == "move":
            goal = pick(rng, ROOMS)
            if goal == room[actor]:
                continue
            room[actor], rest = goal, f"to the {goal}."
        else:
            source, target = (room[actor], actor) if kind == "get" else (actor, room[actor])
            within_reach = [o for o in OBJECTS if place[o] == source]
            if not within_reach:
                continue
            obj = pick(rng, within_reach)
            there = rng.random() < (task.get_there if kind == "get" else 0.2)
            place[obj], rest = target, f"the {obj} there." if there else f"the {obj}."
        made += 1
        yield Event(kind, actor, obj, room[actor], f"{actor} {pick(rng, VERBS[kind])} {rest}")


def ask(task: Task, events: list[Event], rng: random.Random, window: int = 5) -> Question | None:
    """A question on what one of the last `window` statements names, as things stand now, or None."""
    if rng.random() < task.skip:
        return None
    topics = [getattr(event, task.topic) for event in events[-window:] if event.kind in task.prompts]
    while topics:  # one per STATEMENT: what is named twice is asked about twice as often
        if found := task.questions(events, topics.pop(int(rng.random() * len(topics)))):
            return rng.choices([question for _, question in found], [weight for weight, _ in found])[0]
    return None


def all_questions(task: Task, events: list[Event], rng: random.Random) -> list[Question]:
    """Every question on the whole story, each text once, in random order: more to learn from one story."""
    topics = dict.fromkeys(getattr(event, task.topic) for event in events if event.kind in task.prompts)
    found = {question.text: question for topic in topics for _, question in task.questions(events, topic)}
    return sorted(found.values(), key=lambda question: rng.random())


def story(task: Task, rng: random.Random) -> Story:
    """Two statements, a question if there is one to ask, and so on until five are asked."""
    events, questions, world = [], [], simulate(task, rng)
    while len(questions) < 5:
        events += [next(world), next(world)]
        if question := ask(task, events, rng):
            questions.append((len(events), question))
    return Story(events, questions)


def format_story(story: Story, task: Task) -> str:
    """The story in the original format, up to its last question; line numbers count the questions too."""
    lines, line_of, done = [], [], 0
    for count, question in story.questions:
        for event in story.events[done:count]:
            line_of.append(len(lines) + 1)
            lines.append(f"{line_of[-1]} {event.text}")
        done, support = count, " ".join(str(line_of[i]) for i in question.support)
        lines.append(f"{len(lines) + 1} {question.text}{task.tail}\t{question.answer}\t{support}")
    return "\n".join(lines) + "\n"


def whole(text: str) -> int:
    """A number from 0 up, for argparse; a negative seed is refused because Random(-1) is Random(1)."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, give 1, 2, 3, ...")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.babi", "Write bAbI.")
    parser.add_argument("--task", choices=TASKS, default="qa1", help="task, by name (default: %(default)s)")
    parser.add_argument("--stories", type=whole, default=200, help="how many (default: %(default)s stories)")
    parser.add_argument("--seed", type=whole, default=1, help="random seed, a number (default: %(default)s)")
    parser.add_argument("--out", help="path of the file to write (default: standard output)")
    args = parser.parse_args(argv)
    if args.stories < 1:
        parser.error(f"--stories {args.stories} writes nothing, give 1 or more")
    if args.out is not None and os.path.exists(args.out) and not os.path.isfile(args.out):
        parser.error(f"--out {args.out!r} is not a file, name one")  # a device must not be replaced either
    task, rng = TASKS[args.task], random.Random(args.seed)
    partial = 1 if args.out is None else f"{args.out}.tmp"  # 1: standard output
    try:
        with open(partial, "w", encoding="utf-8", newline="\n", closefd=partial != 1) as file:
            file.writelines(format_story(story(task, rng), task) for _ in range(args.stories))
        if args.out is not None:
            os.replace(partial, args.out)  # only now: an older file outlives any failure
    except BrokenPipeError:
        pass  # `| head` has seen enough
    except OSError as error:
        if args.out is not None and os.path.isfile(partial):
            os.unlink(partial)
        where = "standard output" if args.out is None else f"--out {args.out!r}"
        parser.error(f"cannot write {where} ({error.strerror}), name a file in a folder you can write to")


if __name__ == "__main__":
    main()
