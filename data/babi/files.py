"""bAbI (v1.2, English), all twenty tasks: write stories like those of the released files, or read the files.

    python -m data.babi --task qa1 --stories 2                           # look at two stories
    python -m data.babi --task qa3 --stories 200 --seed 1 --out qa3.txt
    python -m data.babi --all --out babi                                 # a folder with a file for each task

Prints the original format, or writes it to --out: numbered statements, and questions with their answer and
the numbers of their supporting lines. The same seed gives the same bytes. Reading takes the same format.
"""

import argparse
import contextlib
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

from data.babi.puzzles import PUZZLES, Puzzle
from data.babi.worlds import WORLD, Event, Question, Story, Task
from data.common import Parser, replacing

TASKS: dict[str, Task | Puzzle] = {f"qa{n}": (WORLD | PUZZLES)[f"qa{n}"] for n in range(1, 21)}
OBJECT_TASKS = {"qa1", "qa2", "qa3", "qa6", "qa8"}      # can be asked where objects are taken and put down
ALSO = {"qa5": {"qa1", "qa6"}, "qa7": {"qa1", "qa6"}}   # task -> tasks whose questions its stories answer too
ALSO |= {task: OBJECT_TASKS - {task} for task in OBJECT_TASKS - {"qa1"}}
FOLDERS = ("", "en-10k", "en-valid-10k", "tasks_1-20_v1-2/en-10k", "en")  # where in an archive to look


def with_others(task: str, events: list[Event], own: list[Question], tasks: Sequence[str],
                rng: random.Random) -> list[Question]:
    """A task's own questions on a story, and behind them those of the others of `tasks` that it answers too,
    in random order. Of the first eight three are theirs, or fewer if there are no more of them, or more if
    there are fewer than five of its own."""
    others = [q for t in sorted(ALSO.get(task, set()) & set(tasks)) for q in TASKS[t].everything(events, rng)]
    rng.shuffle(others)                         # of none this draws nothing
    return own[:8 - min(3, len(others))] + others if others else own


def format_story(story: Story, task: Task | Puzzle) -> str:
    """The story in the original format, up to its last question; line numbers count the questions too."""
    lines, line_of, done = [], [], 0
    for count, question in story.questions:
        for event in story.events[done:count]:
            line_of.append(len(lines) + 1)
            lines.append(f"{line_of[-1]} {event.text}")
        done, support = count, " ".join(str(line_of[i]) for i in question.support)
        lines.append(f"{len(lines) + 1} {question.text}{task.tail}\t{question.answer}\t{support}")
    return "\n".join(lines) + "\n"


def find_file(path: str | Path, task: str, part: str = "train") -> Path:
    """The file with a task's stories: path itself or, of a folder, the file for the part "train" or "val"
    (released as "test") in the first of FOLDERS that has one. ValueError if there are none or several."""
    path, name = Path(path), f"{task}_*{'test' if part == 'val' else part}.txt"  # en-valid-10k: qa1_test.txt
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder, name one with bAbI stories")
    for folder in FOLDERS if path.is_dir() else ():
        if found := sorted((path / folder).glob(name)):
            if len(found) > 1:
                raise ValueError(f"{path / folder}: {found[0].name} and {found[1].name}, keep one of them")
            return found[0]
    if path.is_dir():
        raise ValueError(f"{path}: no file {name} there or in {', '.join(FOLDERS[1:])}")
    return path


def read_stories(path: str | Path, task: str, part: str = "train") -> list[Story]:
    """The stories of find_file(path, task, part); what comes after a story's last question is left out.
    ValueError names the file and the line that is not in the original format."""
    file = find_file(path, task, part)
    stories, line_of, number = [], {}, 0  # line_of: the line number of a statement -> its index
    for at, line in enumerate(decoded(file).split("\n"), 1):
        wrong, (digits, _, rest) = f"{file}, line {at}: ", line.partition(" ")
        if not re.fullmatch("[0-9]+", digits) or not rest:
            raise ValueError(f"{wrong}{line[:60]!r} is not a number and a sentence")
        if int(digits) == 1:
            stories.append(Story([], []))
            line_of, number = {}, 0
        number += 1
        if int(digits) != number:
            raise ValueError(f"{wrong}its number is {digits}, expected {number}{' or 1' * (number > 1)}")
        events, questions = stories[-1]
        if "\t" not in rest and not rest.rstrip().endswith("?"):
            line_of[number] = len(events)
            events.append(Event("fact", "", None, "", rest))
            continue
        text, answer, ids = [*rest.split("\t"), "", ""][:3]
        if rest.count("\t") != 2 or not answer or not re.fullmatch("[0-9]+( [0-9]+)*", ids.strip()):
            raise ValueError(f"{wrong}a question needs an answer and the numbers of its lines, between tabs")
        if missing := [i for i in ids.split() if int(i) not in line_of]:
            raise ValueError(f"{wrong}{missing[0]} is not the number of a statement before the question")
        support = tuple(line_of[int(i)] for i in ids.split())
        questions.append((len(events), Question(text.rstrip(), answer, support)))
    if not any(story.questions for story in stories):
        raise ValueError(f"{file}, line {at}: the file ends without a question")
    return [Story(events[:questions[-1][0]], questions) for events, questions in stories if questions]


def decoded(file: Path) -> str:
    """The text of a file without its last line end, and with LF for CRLF."""
    try:
        data = file.read_bytes()
        text = data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
    except OSError as error:
        raise ValueError(f"{file}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8, give a file of text") from None
    if not text:
        raise ValueError(f"{file}, line 1: the file is empty, give one with stories")
    return text


def write_stories(name: str, stories: int, seed: int, path: str | Path | None) -> None:
    """Stories of a task into a file, or to standard output; an older file outlives any failure."""
    task, rng = TASKS[name], random.Random(seed)
    with contextlib.nullcontext(1) if path is None else replacing(path) as target:      # 1: standard output
        with open(target, "w", encoding="utf-8", newline="\n", closefd=target != 1) as file:
            file.writelines(format_story(task.story(rng), task) for _ in range(stories))


def whole(text: str) -> int:
    """A number from 0 up, for argparse; a negative seed is refused because Random(-1) is Random(1)."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, give 1, 2, 3, ...")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.babi", "Write bAbI.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--task", choices=TASKS, default="qa1", help="task, by name (default: %(default)s)")
    what.add_argument("--all", action="store_true", help="all tasks, each into a file in the folder --out")
    parser.add_argument("--stories", type=whole, default=200, help="how many (default: %(default)s stories)")
    parser.add_argument("--seed", type=whole, default=1, help="random seed, a number (default: %(default)s)")
    parser.add_argument("--out", help="path of the file to write (default: standard output)")
    args = parser.parse_args(argv)
    if args.stories < 1:
        parser.error(f"--stories {args.stories} writes nothing, give 1 or more")
    if args.all and args.out is None:
        parser.error("--all writes twenty files, name their folder: --out FOLDER")
    try:
        if args.all:
            os.makedirs(args.out, exist_ok=True)
            for name, task in TASKS.items():
                write_stories(name, args.stories, args.seed, Path(args.out, f"{name}_{task.stem}_train.txt"))
        elif args.out is not None and os.path.exists(args.out) and not os.path.isfile(args.out):
            parser.error(f"--out {args.out!r} is not a file, name one")  # nor must a device be replaced
        else:
            write_stories(args.task, args.stories, args.seed, args.out)
    except BrokenPipeError:
        pass  # `| head` has seen enough
    except OSError as error:
        where = "standard output" if args.out is None else f"--out {args.out!r}"
        kind = "folder" if args.all else "file in a folder"
        parser.error(f"cannot write {where} ({error.strerror}), name a {kind} you can write to")


if __name__ == "__main__":
    main()
