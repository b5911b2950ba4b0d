"""The twenty bAbI tasks by name, and which of them can share a story.

    from data.babi import TASKS
    story = TASKS["qa2"].story(random.Random(1))

Writes nothing.
"""

import random
from collections.abc import Sequence

from data.babi.puzzles import PUZZLES, Puzzle
from data.babi.story import Event, Question
from data.babi.worlds import WORLD, Task

UNSORTED = WORLD | PUZZLES
TASKS: dict[str, Task | Puzzle] = {f"qa{n}": UNSORTED[f"qa{n}"] for n in range(1, 21)}
ALSO = {  # task -> the tasks whose questions its stories answer, too
    "qa2": {"qa1", "qa3", "qa6", "qa8"},
    "qa3": {"qa1", "qa2", "qa6", "qa8"},
    "qa5": {"qa1", "qa6"},
    "qa6": {"qa1", "qa2", "qa3", "qa8"},
    "qa7": {"qa1", "qa6"},
    "qa8": {"qa1", "qa2", "qa3", "qa6"},
}


def check_tasks(names: Sequence[str]) -> None:
    """ValueError if one of the names of --tasks is no task."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks {name!r} is unknown: choose from {' '.join(TASKS)}")


def with_others(
    task: str,
    events: list[Event],
    own: list[Question],
    tasks: Sequence[str],
    rng: random.Random,
) -> list[Question]:
    """The task's own questions on a story, and behind them what other tasks ask about it.

    own    the task's own questions
    tasks  the tasks that may ask; those in ALSO[task] do so, in random order

    Of the first eight questions three are of other tasks, or all if there are fewer. For that the
    last of `own` are left out."""
    others = []
    for name in sorted(ALSO.get(task, set()) & set(tasks)):
        others += TASKS[name].everything(events, rng)
    if not others:
        return own
    rng.shuffle(others)
    n_own = 8 - min(3, len(others))
    return own[:n_own] + others
