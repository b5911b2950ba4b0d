"""Training batches: documents that ask for what they tell, from two facts up to long prose.

    python -m data.lessons                               # print one training document, marked
    python -m data.lessons --stage 4:2:32 --tasks qa1 qa2 --number 7
    python -m data.lessons --names many                  # one with many names

Writes nothing.

A model learns from easy documents first. A *stage* says how many facts a document has at most, and
in how many segments of prose they are hidden. The *curriculum* is the list of stages and where the
run stands in it. A *lesson* is one training document of a stage: a story, prose around it, and
questions with their answers. Only the answers are learned. A *batch* is some lessons of the same
length, padded on the right.

The stage "echo" can come before all stories. Its documents are lists of tokens that are said twice
(see `echo`).

A batch is a function of the seed, of its number and of the stage, and of nothing else. So it does
not matter which process makes it, how far ahead it is made, or whether the run was resumed.
"""

import functools
import random
import textwrap
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from data import babi
from data.babi import Question
from data.babilong import Builder
from data.common import Parser, ignore_interrupts, one_line
from data.document import Document
from data.tokenizer import Tokenizer, load

MOST_QUESTIONS = 8  # at the end of a lesson
MOST_LISTED = 20  # tokens in a list of an echo
MOST_BETWEEN = 10  # tokens between the two lists
LONGEST_ECHO = MOST_LISTED + MOST_BETWEEN + MOST_LISTED


@dataclass(frozen=True)
class Stage:
    """A level of difficulty. "echo" has no facts and no segments. "text" has segments alone."""

    facts: int  # most facts in a document, 2 or more; 0 in "echo" and "text"
    segments: int  # most segments of a document, its questions included; a window has exactly these
    segment_len: int  # tokens in a segment
    tasks: tuple[str, ...] = ()  # bAbI tasks of the documents; empty: all that the run has

    @property
    def is_echo(self) -> bool:
        return self.facts == 0 and self.segments == 0

    @property
    def is_text(self) -> bool:
        return self.facts == 0 and self.segments > 0

    def __str__(self) -> str:
        if self.is_echo:
            return "echo"
        if self.is_text:
            return f"text in {self.segments} x {self.segment_len}"
        text = f"{self.facts} facts"
        if self.segments:
            text += f" in {self.segments} x {self.segment_len}"
        if self.tasks:
            text += f" of {', '.join(self.tasks)}"
        return text


def parse_stage(written: str, model_segment_len: int) -> Stage:
    """A stage from the way it is written. ValueError for anything else.

    echo                    lists of tokens that are said twice
    facts:segments          at most this many facts, in at most this many segments of prose
    facts:segments:tokens   the same in shorter segments, of this many tokens
    ...@task,task           the same with tasks of its own. A task named twice comes twice as often
    text:tokens             windows of this many tokens, in a run on text

    "10:8:64@qa1,qa2" has up to 10 facts in up to 8 segments of 64 tokens, of the tasks qa1 and
    qa2."""
    if written == "echo":
        return echo_stage(model_segment_len)
    kind, _, window = written.partition(":")
    if kind == "text" and window.isdecimal() and int(window) > 0:
        return text_stage(int(window), model_segment_len)
    return story_stage(written, model_segment_len)


def echo_stage(model_segment_len: int) -> Stage:
    """The stage "echo". ValueError if its documents are longer than a segment of the model."""
    if model_segment_len < LONGEST_ECHO:
        raise ValueError(
            f"stage 'echo' has up to {LONGEST_ECHO} tokens, more than the model's "
            f"--segment_len {model_segment_len}: leave it out, or give longer segments"
        )
    return Stage(facts=0, segments=0, segment_len=model_segment_len)


def text_stage(window: int, model_segment_len: int) -> Stage:
    """The stage of windows of this many tokens. ValueError if these are not whole segments."""
    segment_len = min(window, model_segment_len)
    segments = window // segment_len
    if segments * segment_len != window:
        raise ValueError(
            f"stage 'text:{window}': a window must be whole segments of {segment_len} tokens, "
            f"give text:{segments * segment_len}"
        )
    return Stage(facts=0, segments=segments, segment_len=segment_len)


def story_stage(written: str, model_segment_len: int) -> Stage:
    """A stage of stories. ValueError for what is not written as one."""
    numbers, at, names = written.partition("@")
    parts = numbers.split(":")
    if (
        not all(part.isdecimal() for part in parts)
        or len(parts) not in (2, 3)
        or (at and not names)
    ):
        raise ValueError(
            f"stage {written!r} is not a stage: write echo, facts:segments or "
            "facts:segments:tokens, and @task,task behind the numbers for tasks of its own. In a "
            "run on text write text:tokens"
        )
    facts = int(parts[0])
    segments = int(parts[1])
    segment_len = int(parts[2]) if len(parts) == 3 else model_segment_len
    if facts < 2:
        raise ValueError(f"stage {written!r} has {facts} facts: a document needs 2 or more")
    if not 1 <= segment_len <= model_segment_len:
        raise ValueError(
            f"stage {written!r} has segments of {segment_len} tokens: the model's --segment_len "
            f"allows 1 to {model_segment_len}"
        )
    tasks = tuple(names.split(",")) if at else ()
    return Stage(facts, segments, segment_len, tasks)


def parse_stages(
    texts: Sequence[str], model_segment_len: int, tasks: Sequence[str], whole: bool
) -> list[Stage]:
    """The stages of a run on these tasks. ValueError if one does not fit the tasks or the model.

    tasks  the bAbI tasks of the run; a run on text has none
    whole  the run reads each document as one segment, which then must fit into the model's
           segment_len"""
    if not texts:
        raise ValueError("--stages is empty: give one stage or more, such as 2:0 4:2:32")
    is_text_run = not tasks
    stages = []
    for text in texts:
        stage = parse_stage(text, model_segment_len)
        if stage.is_text and not is_text_run:
            raise ValueError(f"stage {text!r} is for a run on text: give --recipe text")
        if is_text_run and not stage.is_text:
            raise ValueError(
                f"stage {text!r} is not for a run on text: give stages such as text:1024, or "
                "another --recipe"
            )
        for task in stage.tasks:
            if task not in tasks:
                raise ValueError(
                    f"stage {text!r} names {task!r}, which is not among --tasks: {' '.join(tasks)}"
                )
        longest = stage.segments * stage.segment_len
        if whole and longest > model_segment_len:
            raise ValueError(
                f"--whole: the stage {text!r} has documents of {longest} tokens: "
                f"give --segment_len {longest}"
            )
        stages.append(stage)
    return stages


class Curriculum:
    """The stages of a run, and where the run stands in them.

    A stage is left when the model has learned it: when the answers to its longest documents were
    right often enough over a window of steps. It is also left when its steps are spent. The last
    stage is never left."""

    def __init__(
        self,
        stages: list[Stage],
        leave_at: float,  # share of right answers that ends a stage with prose, and "echo"
        leave_plain_at: float,  # share of right answers that ends a stage of facts without prose
        window: int,  # the share is taken over this many latest steps on the longest documents
        max_steps: int,  # steps after which a stage ends in any case
    ):
        self.stages = stages
        self.leave_at = leave_at
        self.leave_plain_at = leave_plain_at
        self.max_steps = max_steps
        self.number = 0  # the number of the current stage
        # The training loop adds to both of these.
        self.steps = 0  # the steps that were taken in the current stage
        self.recent: deque[float] = deque(maxlen=window)  # accuracies on the longest documents

    @property
    def stage(self) -> Stage:
        return self.stages[self.number]

    @property
    def is_last(self) -> bool:
        return self.number + 1 == len(self.stages)

    def advance(self) -> str | None:
        """Enter the next stage if the current one is learned or its steps are spent.

        Returns a line that says so, or None."""
        if self.is_last:
            return None
        left = self.stage
        steps = self.steps
        share = sum(self.recent) / max(1, len(self.recent))
        is_plain = left.segments == 0 and not left.is_echo
        wanted = self.leave_plain_at if is_plain else self.leave_at
        is_window_full = len(self.recent) == self.recent.maxlen
        is_learned = is_window_full and share >= wanted
        if not is_learned and steps < self.max_steps:
            return None
        self.number += 1
        self.steps = 0
        self.recent.clear()
        return f"{left} {share:.0%} after {steps} steps, now {self.stage}"

    def state_dict(self) -> dict:
        """What a checkpoint has to keep, in plain values."""
        return dict(number=self.number, steps=self.steps, recent=list(self.recent))

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        self.number = state["number"]
        self.steps = state["steps"]
        self.recent.clear()
        self.recent.extend(state["recent"])


@functools.lru_cache
def usual_facts(task: str, quantile: float) -> int:
    """The number of facts that is enough for a share of bAbI's own questions of a task.

    quantile  this share, from 0 to 1"""
    rng = random.Random(0)
    counts = []
    for _ in range(500):
        story = babi.TASKS[task].story(rng)
        counts.extend(n_facts for n_facts, _ in story.questions)
    counts.sort()
    return counts[min(len(counts) - 1, int(len(counts) * quantile))]


def lesson(
    builder: Builder,
    tasks: Sequence[str],
    n_facts: int,
    room: tuple[int, int],
    rng: random.Random,
    max_questions: int = MOST_QUESTIONS,
    n_asides: int = 0,
    share: float | None = None,
    usual: float = 0.9,
) -> Document:
    """One training document: a story, prose around its facts, and its questions with answers.

    The evaluation asks one question. A lesson asks up to max_questions of all that any of the tasks
    could ask, since this costs little and teaches more.

    tasks          the bAbI tasks. One of them is drawn and makes the story; all of them may ask
                   about it
    n_facts        the most facts of the story
    room           the least and the most tokens of the document; (0, 0) for the facts without
                   prose. If the facts fill the room, there is no prose either
    max_questions  the most questions at the end of the document
    n_asides       the most points before the end at which questions are asked as well
    share          how long the story is: 0 is two facts, just below 1 is n_facts; None is n_facts
    usual          a quantile such as 0.9: a story has at most as many facts as are enough for this
                   share of bAbI's own questions of its task"""
    task = tasks[int(rng.random() * len(tasks))]
    n_facts = min(n_facts, max(2, usual_facts(task, usual)))
    if share is not None:
        n_facts = 2 + int(share * (n_facts - 1))
    texts, questions, asides = builder.story(task, n_facts, rng, n_asides, tasks)
    questions = questions[:max_questions]

    n_fact_tokens = 0
    for text in texts:
        n_fact_tokens += len(builder.ids(text))
    n_other_tokens = 0 if builder.tokenizer.bos is None else 1  # the begin of text, the questions
    for question in [*questions, *[question for _, question in asides]]:
        asked = len(builder.ids(question.text))
        answered = len(builder.ids(question.answer))
        n_other_tokens += asked + answered + 1  # 1 for the end of text

    least = max(room[0] - n_other_tokens, n_fact_tokens)
    most = room[1] - n_other_tokens
    length = 0  # tokens of facts and prose; 0: no prose
    if most > n_fact_tokens:
        length = least + int(rng.random() * (most - least + 1))
    return builder.assemble(texts, questions, length, rng, asides)


def echo(tokenizer: Tokenizer, rng: random.Random) -> Document:
    """A list of different tokens, some tokens more, and the list again.

    What is learned is the second list from its second token on. Each of these stands behind the
    same token as in the first list. So the model learns to look back for what it has just read, and
    to say what stood behind it there. This is known as induction (arXiv 2209.11895). A question
    about a story needs a similar skill: to find the name in the story, and to say a word that comes
    soon after."""
    n_listed = rng.randint(6, MOST_LISTED)
    n_between = rng.randint(0, MOST_BETWEEN)
    # The first 256 tokens are single bytes, which a text hardly has.
    drawn = rng.sample(tokenizer.ids[256:], n_listed + n_between)
    listed = drawn[:n_listed]
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = [*begin, *drawn, *listed]
    stop = len(begin) + len(drawn)  # of the first list and what is between
    start = stop + 1  # of the second list's second token
    question = Question("", tokenizer.decode(listed[1:]), ())
    return Document(
        ids=np.array(ids),
        answers=[(start, len(ids))],
        questions=[question],
        places=[],
        texts=[],
        cuts=[len(begin), stop],
    )


class Batch(NamedTuple):
    """Some lessons, as the model takes them."""

    idx: Tensor  # (B, T) int64, padded with 0 on the right
    at: Tensor  # (n,) int64, the flat positions of idx whose next token belongs to an answer
    targets: Tensor  # (n,) int64, those next tokens; -1 where `padded` has added a position
    is_word: Tensor  # (n,) bool, false for the end of text behind an answer and for padding
    is_longest: bool  # whether the documents are as long as the stage has them

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. A copy from pinned memory does not wait for the device."""
        tensors = [tensor.to(device, non_blocking=True) for tensor in self[:4]]
        return Batch(*tensors, self.is_longest)

    def padded(self, width: int, multiple: int) -> "Batch":
        """The batch with `width` columns, and with its answer positions padded to a multiple of
        `multiple`, so that fewer shapes occur. An added position has the target -1, which the loss
        ignores."""
        T = self.idx.shape[1]
        row = self.at // T
        at = self.at + row * (width - T)  # the rows above have become longer
        padding = (0, -len(at) % multiple)
        return Batch(
            F.pad(self.idx, (0, width - T)),
            F.pad(at, padding),
            F.pad(self.targets, padding, value=-1),
            F.pad(self.is_word, padding),
            self.is_longest,
        )


Key = tuple[Stage, int]  # what decides a batch of a run: the stage, and the batch's number


@dataclass(frozen=True)
class Lessons:
    """All batches that a run can come to: `lessons[stage, number]` makes one of them."""

    builder: Builder
    tasks: tuple[str, ...]  # bAbI tasks, each as likely
    batch_size: int  # most documents in a batch
    batch_tokens: int  # most tokens in a batch, so that long documents come in smaller batches
    plain: float  # share of batches without prose in a stage that has prose
    n_asides: int  # most points before a document's end at which questions are asked
    seed: int
    # The batches that make one step, over all processes. All of them have the same number of
    # segments, so that no process waits for another.
    accumulate: int = 1
    usual: float = 0.9  # see `lesson`
    # most questions of a story of up to 4 facts in a stage without prose
    short_questions: int = MOST_QUESTIONS
    last_stage: Stage | None = None
    longest: float = 0.5  # share of the batches with prose that has the longest documents there

    def __getitem__(self, key: Key) -> tuple[Key, Batch]:
        """The key and its batch. (A DataLoader looks batches up like that.)"""
        stage, number = key
        n_segments = self.draw_n_segments(stage, number)
        documents = self.documents(stage, number, n_segments)
        is_longest = n_segments == stage.segments
        return key, self.join(documents, stage.segment_len, n_segments, is_longest)

    def draw_n_segments(self, stage: Stage, number: int) -> int:
        """How many segments the documents of a batch have; 0 for facts without prose.

        A share `plain` of the steps has no prose. Half of the rest has the longest documents, as
        their accuracy ends the stage; in the last stage, which nothing ends, a share `longest` has.
        The others draw a length, short ones more often, so that these are not forgotten."""
        rng = random.Random(f"{self.seed} step {number // self.accumulate}")
        if stage.segments == 0 or rng.random() < self.plain:
            return 0
        longest = self.longest if stage == self.last_stage else 0.5
        if rng.random() < longest:
            return stage.segments
        return 1 + int(rng.random() ** 2 * stage.segments)

    def documents(self, stage: Stage, number: int, n_segments: int) -> list[Document]:
        """The lessons of a batch. Half of them have as many facts as they may have."""
        S = stage.segment_len
        rng = random.Random(f"{self.seed} {number}")
        if stage.is_echo:
            return [echo(self.builder.tokenizer, rng) for _ in range(self.batch_size)]
        size = self.batch_size
        room = (0, 0)
        if n_segments:
            size = max(1, min(size, self.batch_tokens // (S * n_segments)))
            room = ((n_segments - 1) * S + 1, n_segments * S)
        odds_of_asides = self.odds_of_asides(stage)
        max_questions = MOST_QUESTIONS
        if stage.segments == 0 and stage.facts <= 4:
            # Where a short story is asked about all its people, the earlier answers leave few
            # rooms for the last one. A model learns this trick first, and then nothing for long.
            max_questions = self.short_questions
        documents = []
        for _ in range(size):
            share = None if rng.random() < 0.5 else rng.random()
            n_asides = 0
            if odds_of_asides and rng.random() < odds_of_asides:
                n_asides = 1 + int(rng.random() * self.n_asides)
            documents.append(
                lesson(
                    self.builder,
                    stage.tasks or self.tasks,
                    stage.facts,
                    room,
                    rng,
                    max_questions=max_questions,
                    n_asides=n_asides,
                    share=share,
                    usual=self.usual,
                )
            )
        return documents

    def odds_of_asides(self, stage: Stage) -> float:
        """The probability that a document of a stage asks questions before its end, too.

        It is higher where documents have many facts. There most of the cost is in reading, so that
        more questions come almost for free."""
        if self.n_asides == 0:
            return 0.0
        if stage.facts > 10:
            return 0.8
        return 0.5 if stage.segments else 0.0

    def join(
        self, documents: list[Document], segment_len: int, n_segments: int, is_longest: bool
    ) -> Batch:
        """A batch of documents. With prose, or beyond one segment, it is whole segments long."""
        width = max(len(document.ids) for document in documents)
        if n_segments or width > segment_len:
            width = (width + segment_len - 1) // segment_len * segment_len
        # A story that needs more segments than planned makes the batch wider. Documents are
        # dropped so that it stays within batch_tokens.
        documents = documents[: max(1, self.batch_tokens // width)]
        idx = np.zeros((len(documents), width), np.int64)
        targets = np.full((len(documents), width), -1, np.int64)
        for row, document in enumerate(documents):
            idx[row, : len(document.ids)] = document.ids
            for start, stop in document.answers:
                # Position t predicts token t + 1, so the targets are shifted by one.
                targets[row, start - 1 : stop - 1] = document.ids[start:stop]
        at = np.flatnonzero(targets != -1)
        answers = targets.flat[at]
        is_word = answers != self.builder.tokenizer.eot
        tensors = [torch.from_numpy(array) for array in (idx, at, answers, is_word)]
        return Batch(*tensors, is_longest)


def leave_interrupts_alone(_: int) -> None:
    """Make a worker ignore Ctrl-C and SIGTERM. The first process saves, then ends the workers."""
    ignore_interrupts()


def unchanged(item: tuple[Key, Batch]) -> tuple[Key, Batch]:
    """The same item. The DataLoader's own conversion would make lists of its tuples."""
    return item


class Batches:
    """The batches that one process of a run takes, one after the other: `next(batches)`.

    Worker processes make some of them ahead. When the run enters a new stage, those of the stage
    before are thrown away, and their numbers are made again."""

    def __init__(
        self,
        lessons: Lessons,
        stage: Stage,
        number: int = 0,  # the number of the first batch
        stride: int = 1,  # this process takes `number`, `number + stride` and so on
        workers: int = 0,  # processes that make batches ahead; 0: they are made when asked for
        pin: bool = False,  # whether batches lie in memory that a GPU copies from as it computes
    ):
        self.stage = stage
        self.next_to_take = number
        self.next_to_make = number  # workers run ahead of `next_to_take`
        self.stride = stride
        self.loader = iter(
            DataLoader(
                lessons,
                batch_size=None,
                sampler=self.keys_to_make(),
                num_workers=workers,
                pin_memory=pin,
                collate_fn=unchanged,
                worker_init_fn=leave_interrupts_alone,
                prefetch_factor=4 if workers else None,
            )
        )

    def keys_to_make(self) -> Iterator[Key]:
        """What the workers make, in turn and without end."""
        while True:
            number = self.next_to_make
            self.next_to_make += self.stride
            yield self.stage, number

    def enter(self, stage: Stage) -> None:
        """Take the batches of this stage from now on."""
        if stage != self.stage:
            self.stage = stage
            self.next_to_make = self.next_to_take  # what was ordered ahead is ordered anew

    def __next__(self) -> Batch:
        while True:
            key, batch = next(self.loader)
            # What was made ahead for an earlier stage is passed over.
            if tuple(key) == (self.stage, self.next_to_take):  # pinning may make a list of it
                self.next_to_take += self.stride
                return batch

    def close(self) -> None:
        """End the workers."""
        self.loader = None


def marked(document: Document, tokenizer) -> str:
    """The text of a document with every answer in square brackets. The model learns to say what
    stands in brackets, and the end of text (`|`) behind it."""
    pieces = []
    end = 0
    for start, stop in document.answers:
        pieces.append(tokenizer.decode(document.ids[end:start]))
        answer = tokenizer.decode(document.ids[start:stop]).replace("<|endoftext|>", "|")
        pieces.append(f" [{answer.strip()}]")
        end = stop
    pieces.append(tokenizer.decode(document.ids[end:]))
    return "".join(pieces).strip()


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.lessons", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--stage",
        default="4:2:64",
        help="The stage: echo, or facts:segments[:tokens][@task,task] (default 4:2:64).",
    )
    add("--tasks", nargs="+", default=["qa1"], help="The bAbI tasks of the run (default qa1).")
    add("--number", type=int, default=0, help="The number of the batch (default 0).")
    add("--seed", type=int, default=0, help="The seed of the run (default 0).")
    add(
        "--names",
        default="own",
        choices=("own", "many"),
        help="The names in the stories: bAbI's own alone, or many (default own).",
    )
    args = parser.parse_args(argv)
    with one_line("python -m data.lessons"):
        babi.check_tasks(args.tasks)
        (stage,) = parse_stages([args.stage], 128, args.tasks, whole=False)
        builder = Builder(load(), "train", names=args.names)
        lessons = Lessons(
            builder,
            tuple(args.tasks),
            batch_size=16,
            batch_tokens=4096,
            plain=0.1,
            n_asides=3,
            seed=args.seed,
            accumulate=2,
        )
        n_segments = lessons.draw_n_segments(stage, args.number)
        documents = lessons.documents(stage, args.number, n_segments)
        _, batch = lessons[stage, args.number]
        B, T = batch.idx.shape
        document = documents[0]
        print(f"Batch {args.number} of the stage {stage}: {B} documents, padded to {T} tokens.")
        print("Its first document, with what is learned in brackets (| is the end of text):\n")
        print(textwrap.fill(marked(document, builder.tokenizer), 79))
        positions = []
        for start, stop in document.answers:
            positions.extend(range(start - 1, stop - 1))
        print(f"\n{len(document.ids)} tokens, {len(document.answers)} questions.")
        print(f"The loss is taken at these positions: {' '.join(map(str, positions))}.")


if __name__ == "__main__":
    main()
