"""What all bAbI tasks share: statements, questions, stories, and the words they are made of.

    from data.babi.story import Event, Question, Story

Writes nothing.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")  # the rooms of qa10 and qa14
VERBS = {  # kind of statement -> its verbs, all of them as likely
    # "went back" is also said of a first visit.
    "move": ("went", "went back", "moved", "journeyed", "travelled"),
    "get": ("got", "took", "grabbed", "picked up"),
    "drop": ("dropped", "left", "discarded", "put down"),
    "give": ("gave", "handed", "passed"),
}


class Event(NamedTuple):
    """One statement, and what its generator knows about it.

    Only a world (see worlds.py) fills in more than the text. A reader knows only the text: the room
    may never have been told."""

    text: str
    kind: str = "fact"  # "get", "drop", "give" or one of worlds.MOVES, which tell a move
    actor: str = ""
    obj: str | None = None  # the object that is taken, put down or given
    room: str = ""  # where the actor is afterwards
    other: str | None = None  # who is given the object, or who goes along
    named: tuple[str, ...] = ()  # the room left, or the two possible ones, if the text names these


class Question(NamedTuple):
    """A question about the statements before it."""

    text: str  # ends with "?"
    answer: str
    support: tuple[int, ...]  # indices, from 0, of the statements that the answer follows from


class Story(NamedTuple):
    """Statements, and the questions that are asked in between."""

    events: list[Event]
    questions: list[tuple[int, Question]]  # (number of statements before it, question)


Odds = dict[Question, float]  # the questions that can be asked, with their weights


def pick(rng: random.Random, options: Sequence) -> Any:
    """One of the options, all of them as likely. This is faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def draw(rng: random.Random, odds: Odds) -> Question:
    """One of the questions, drawn by weight."""
    return rng.choices(list(odds), odds.values())[0]
