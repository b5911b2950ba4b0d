"""bAbI stories in files: write them, read them, and the command line.

    python -m data.babi --task qa1 --stories 2                           # look at two stories
    python -m data.babi --task qa3 --stories 200 --seed 1 --out qa3.txt
    python -m data.babi --all --out babi                                 # all tasks, a file each

Writes the format of the released files (v1.2, English) to standard output or to --out: numbered
statements, and numbered questions with their answer and the numbers of the statements that support
it. The same seed gives the same bytes. Reads the same format.
"""

import argparse
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

from data.babi.puzzles import Puzzle
from data.babi.story import Event, Question, Story
from data.babi.tasks import TASKS
from data.babi.worlds import Task
from data.common import Parser, replacing

# Where in a folder the files of a task can be, the preferred place first.
FOLDERS = ("", "en-10k", "en-valid-10k", "tasks_1-20_v1-2/en-10k", "en")


def format_story(story: Story, task: Task | Puzzle) -> str:
    """The text of a story in the original format, up to its last question."""
    lines = []
    number_of = []  # the line number of each statement
    n_told = 0
    for n_facts, question in story.questions:
        for event in story.events[n_told:n_facts]:
            number = len(lines) + 1
            number_of.append(number)
            lines.append(f"{number} {event.text}")
        n_told = n_facts
        support = " ".join([str(number_of[i]) for i in question.support])
        number = len(lines) + 1
        lines.append(f"{number} {question.text}{task.tail}\t{question.answer}\t{support}")
    return "\n".join(lines) + "\n"


def find_file(path: str | Path, task: str, part: str = "train") -> Path:
    """The file with the stories of a task.

    path  the file itself, or a folder: then the first of FOLDERS in it that has a file counts
    part  "train", or "val", which the released files call "test"

    ValueError if there is no such file, or if a folder has several."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder, name one with bAbI stories")
    if not path.is_dir():
        return path
    released_part = "test" if part == "val" else part
    name = f"{task}_*{released_part}.txt"  # in en-valid-10k it is qa1_test.txt
    for folder in FOLDERS:
        found = sorted((path / folder).glob(name))
        if len(found) > 1:
            raise ValueError(
                f"{path / folder}: {found[0].name} and {found[1].name}, keep one of them"
            )
        if found:
            return found[0]
    raise ValueError(f"{path}: no file {name} there or in {', '.join(FOLDERS[1:])}")


def read_stories(path: str | Path, task: str, part: str = "train") -> list[Story]:
    """The stories of find_file(path, task, part), each up to its last question.

    ValueError names the file and the line that is not in the original format."""
    file = find_file(path, task, part)
    lines = read_text(file).split("\n")
    stories = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            number, rest = split_number(line)
            if number == 1:
                stories.append(Story([], []))
                index_of = {}  # the line number of a statement in its story -> its index
                expected = 1
            elif not stories:
                raise ValueError(f"its number is {number}, expected 1")
            elif number != expected:
                raise ValueError(f"its number is {number}, expected {expected} or 1")
            events, questions = stories[-1]
            if "\t" in rest or rest.rstrip().endswith("?"):
                questions.append((len(events), parse_question(rest, index_of)))
            else:
                index_of[number] = len(events)
                events.append(Event(rest.rstrip()))
            expected += 1
        except ValueError as error:
            raise ValueError(f"{file}, line {line_number}: {error}") from None
    if not any(story.questions for story in stories):
        raise ValueError(f"{file}, line {len(lines)}: the file ends without a question")
    complete = []
    for events, questions in stories:
        if questions:
            n_facts, _ = questions[-1]
            complete.append(Story(events[:n_facts], questions))
    return complete


def read_text(file: Path) -> str:
    """The text of a file, with LF for CRLF and without the last line end.

    ValueError if it cannot be read, is not UTF-8, or is empty."""
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except OSError as error:
        raise ValueError(f"{file}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line_number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line_number}: not UTF-8, give a file of text") from None
    if not text:
        raise ValueError(f"{file}, line 1: the file is empty, give one with stories")
    return text


def split_number(line: str) -> tuple[int, str]:
    """The number of a line in its story, and the rest of the line."""
    digits, _, rest = line.partition(" ")
    if not re.fullmatch("[0-9]+", digits) or not rest:
        raise ValueError(f"{line[:60]!r} is not a number and a sentence")
    return int(digits), rest


def parse_question(text: str, index_of: dict[int, int]) -> Question:
    """The question of a line: its text, its answer, and the line numbers of its support, with tabs
    between. A file may leave the support out.

    index_of  the line numbers of the statements before it -> their indices"""
    columns = text.split("\t")
    if len(columns) == 2:
        columns.append("")
    if (
        len(columns) != 3
        or not columns[1].strip()
        or not re.fullmatch("([0-9]+( [0-9]+)*)?", columns[2].strip())
    ):
        raise ValueError("a question needs an answer and the numbers of its lines, between tabs")
    question, answer, numbers = columns
    support = []
    for number in numbers.split():
        if int(number) not in index_of:
            raise ValueError(f"{number} is not the number of a statement before the question")
        support.append(index_of[int(number)])
    return Question(question.rstrip(), answer.strip(), tuple(support))


def texts_of(name: str, n_stories: int, seed: int) -> Iterator[str]:
    """Stories of a task, each as a text in the original format."""
    task = TASKS[name]
    rng = random.Random(seed)
    for _ in range(n_stories):
        yield format_story(task.story(rng), task)


def write_stories(name: str, n_stories: int, seed: int, path: str | Path | None) -> None:
    """Write stories of a task to a file, or to standard output if path is None.

    If that fails, an older file stays as it was."""
    texts = texts_of(name, n_stories, seed)
    if path is None:
        # By its number, because sys.stdout writes CRLF on Windows.
        with open(1, "w", encoding="utf-8", newline="\n", closefd=False) as file:
            file.writelines(texts)
    else:
        with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(texts)


def whole_number(text: str) -> int:
    """A whole number that is not negative, for argparse.

    A negative seed would be misleading, because Random(-1) draws what Random(1) draws."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, give 1, 2, 3, ...")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """The command line. A mistake ends it in one line on standard error, with exit code 2."""
    parser = Parser(
        "python -m data.babi", "Write bAbI stories in the format of the released files."
    )
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument(
        "--task",
        choices=TASKS,
        default="qa1",
        help="Write stories of this task (default: %(default)s).",
    )
    tasks.add_argument(
        "--all",
        action="store_true",
        help="Write stories of all twenty tasks, each into a file in the folder --out.",
    )
    parser.add_argument(
        "--stories",
        type=whole_number,
        default=200,
        help="Write this number of stories for a task (default: %(default)s).",
    )
    parser.add_argument(
        "--seed",
        type=whole_number,
        default=1,
        help="Seed the random draws; a seed always gives the same stories (default: %(default)s).",
    )
    parser.add_argument(
        "--out",
        help="Write to this file, or with --all to this folder (default: standard output).",
    )
    args = parser.parse_args(argv)
    if args.stories < 1:
        parser.error(f"--stories {args.stories} writes nothing, give 1 or more")
    if args.all and args.out is None:
        parser.error("--all writes twenty files, name their folder: --out FOLDER")
    # A folder cannot be replaced by a file, and a device such as /dev/null must not be.
    if not args.all and args.out and os.path.exists(args.out) and not os.path.isfile(args.out):
        parser.error(f"--out {args.out!r} is not a file, name one")
    try:
        if args.all:
            os.makedirs(args.out, exist_ok=True)
            for name, task in TASKS.items():
                path = Path(args.out, f"{name}_{task.stem}_train.txt")
                write_stories(name, args.stories, args.seed, path)
        else:
            write_stories(args.task, args.stories, args.seed, args.out)
    except BrokenPipeError:
        pass  # whoever read the output has seen enough, as in `| head`
    except OSError as error:
        where = "standard output" if args.out is None else f"--out {args.out!r}"
        target = "folder" if args.all else "file in a folder"
        parser.error(f"cannot write {where} ({error.strerror}), name a {target} you can write to")
