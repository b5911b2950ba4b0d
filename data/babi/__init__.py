"""bAbI (v1.2, English): stories of its twenty tasks, made by rule or read from the released files.

    python -m data.babi --task qa1 --stories 2

story.py    statements, questions and stories
worlds.py   tasks 1-3 and 5-13: actors who walk about and carry objects
puzzles.py  tasks 4 and 14-20: statements and one kind of deduction each
tasks.py    all twenty by name, and which tasks can share a story
names.py    other names for people, rooms and things
files.py    reading and writing files, and the command line
"""

from data.babi.files import find_file, format_story, main, read_stories
from data.babi.story import Event, Question, Story
from data.babi.tasks import ALSO, TASKS, check_tasks, with_others
from data.babi.worlds import Task

__all__ = [
    "ALSO",
    "TASKS",
    "Event",
    "Question",
    "Story",
    "Task",
    "check_tasks",
    "find_file",
    "format_story",
    "main",
    "read_stories",
    "with_others",
]
