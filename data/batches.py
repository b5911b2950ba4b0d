"""Training batches: documents of a stage of the curriculum, padded to equal length, made while a step runs.

    from data.batches import Batches, Stage
    python -m data.batches --stage 10:8:64 --n 20            # how fast they are made

Writes nothing. A batch is a function of the seed, its number and the stage, so that worker processes, however
many, and a resumed run see the same ones.
"""
import random
import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from data.babi import TASKS
from data.babilong import Builder
from data.cli import Parser, one_line
from data.tokenizer import load

FEW_FACTS = 10      # half of the documents of stages with background are asked earlier too (asides), of those
MANY_ASIDES = 0.8   # with more facts than this such a share, with background or not: the facts cost more


@dataclass(frozen=True)
class Stage:
    """Documents of 2 .. `facts` facts in 1 .. `segments` segments (more where the facts need them)."""
    facts: int                          # most facts in a document
    segments: int                       # most segments; 0: the facts alone, without background
    segment_len: int                    # tokens in a segment: short first, an update of the memory costs less
    tasks: tuple[str, ...] = ()         # of which tasks; (): of all that the run has

    def __str__(self) -> str:
        return (f"{self.facts} facts" + f" in {self.segments} x {self.segment_len}" * (self.segments > 0)
                + f" of {', '.join(self.tasks)}" * bool(self.tasks))

    @staticmethod
    def parse(text: str, longest: int) -> "Stage":
        """"10:8:64" or, with segments of the model's length `longest`, "10:8"; "10:8@qa1,qa2" of two."""
        numbers, at, tasks = text.partition("@")
        try:
            facts, segments, *rest = (int(x) for x in numbers.split(":"))
            named = tuple(tasks.split(",")) if at else ()
            stage = Stage(facts, segments, rest[0] if rest else longest, named)
        except (ValueError, TypeError):
            raise ValueError(f"--stages: {text!r} is not facts:segments or facts:segments:tokens, with @ and "
                             "the tasks behind it if not all") from None
        if stage.facts < 2 or stage.segments < 0 or not 1 <= stage.segment_len <= longest or len(rest) > 1:
            raise ValueError(f"--stages: {text!r} needs 2 facts or more, segments of 1 to {longest} tokens")
        return stage

    @staticmethod
    def parse_all(text: str, longest: int, tasks: list[str], whole: bool) -> "list[Stage]":
        """The stages of a run on these tasks, with spaces between; whole: each document is one segment."""
        stages = [Stage.parse(s, longest) for s in text.split()]
        if not stages:
            raise ValueError("--stages is empty: give facts:segments, once or more")
        most = max(stage.segments * stage.segment_len for stage in stages)
        if whole and most > longest:
            raise ValueError(f"--whole: --stages has documents of {most} tokens, give --segment_len {most}")
        if wrong := [task for stage in stages for task in stage.tasks if task not in tasks]:
            raise ValueError(f"--stages: {wrong[0]!r} is not among --tasks {' '.join(tasks)!r}")
        return stages


class Curriculum:
    """The stages of a run and where it stands in them: a stage is left when enough answers were right in the
    latest steps on its longest documents, or when its steps are spent; the last one never."""

    def __init__(self, stages: list[Stage], leave_at: float, leave_plain_at: float, window: int, steps: int):
        self.stages, self.most = stages, steps
        self.leave_at, self.leave_plain_at = leave_at, leave_plain_at
        self.at = self.steps = 0                    # number of the stage, steps taken in it
        self.recent = deque(maxlen=window)          # shares of right answers of its latest steps

    def __str__(self) -> str:
        return f"{self.at + 1}/{len(self.stages)}"

    @property
    def stage(self) -> Stage:
        return self.stages[self.at]

    @property
    def last(self) -> bool:
        return self.at + 1 == len(self.stages)

    def advance(self) -> str | None:
        """Enter the next stage if this one is learned or spent; a line to print if so."""
        left, steps, mean = self.stage, self.steps, sum(self.recent) / max(1, len(self.recent))
        learned = mean >= (self.leave_at if left.segments else self.leave_plain_at)
        if self.last or not (learned and len(self.recent) == self.recent.maxlen or steps >= self.most):
            return None
        self.at, self.steps = self.at + 1, 0
        self.recent.clear()
        return f"{left} {mean:.0%} after {steps} steps, now {self.stage}"


class Batch(NamedTuple):
    idx: Tensor                         # (B, T) int64, padded on the right, beyond a segment to whole ones
    targets: Tensor                     # (B, T) int64, -1 where nothing is asked
    keep: Tensor                        # (n,) int64: flat positions of idx whose next token is asked for
    words: Tensor                       # (n,) bool: those that are asked for a word, not for the answer's end
    longest: bool                       # whether its documents are the stage's longest

    def to(self, device: torch.device) -> "Batch":
        """On a device, without waiting where the batch is pinned."""
        moved = (x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self)
        return Batch(*moved)

    def padded(self, width: int, answers: int) -> "Batch":
        """On the right to so many columns, keep and words to a multiple of so many answers (of the first
        position: a document begins with no answer): fewer different shapes."""
        T = self.idx.shape[1]
        right, more = (0, width - T), (0, -len(self.keep) % answers)
        keep = self.keep + self.keep // T * (width - T)     # a row begins so much later for each before it
        return Batch(F.pad(self.idx, right), F.pad(self.targets, right, value=-1), F.pad(keep, more),
                     F.pad(self.words, more), self.longest)


@dataclass(frozen=True)
class Maker:
    """Makes the batches of a run: `maker[stage, number]`."""
    builder: Builder
    tasks: tuple[str, ...]              # bAbI tasks, each as likely
    size: int                           # most documents in a batch
    tokens: int                         # most tokens in a batch: long documents come in smaller ones
    plain: float                        # share of batches without background where the stage has some
    asides: int                         # points before the end, 1 to so many, at which some are asked too
    seed: int
    together: int = 1                   # batches of a step: their documents are of one length, or all plain
    usual: float = 0.9                  # a story's most facts: this quantile over its task's own questions

    def __getitem__(self, key: tuple[Stage, int]) -> tuple[tuple[Stage, int], Batch]:
        (stage, number), S = key, key[0].segment_len
        rng = random.Random(f"{self.seed} step {number // self.together}")
        bare = stage.segments == 0 or rng.random() < self.plain
        segments = stage.segments if rng.random() < 0.5 else 1 + int(rng.random() ** 2 * stage.segments)
        segments = 0 if bare else max(1, segments)  # half are the stage's longest, of the others many short
        size = self.size if bare else max(1, min(self.size, self.tokens // (S * segments)))
        room = (0, 0) if bare else ((segments - 1) * S + 1, segments * S)
        rng, documents = random.Random(f"{self.seed} {number}"), []
        often = self.asides and (MANY_ASIDES if stage.facts > FEW_FACTS else 0.5 if stage.segments else 0)
        for _ in range(size):  # half of them with all the facts
            share = None if rng.random() < 0.5 else rng.random()
            asides = 1 + int(rng.random() * self.asides) if often and rng.random() < often else 0
            documents.append(self.builder.lesson(stage.tasks or self.tasks, stage.facts, room, rng,
                                                 asides=asides, share=share, usual=self.usual))
        T = max(len(d.ids) for d in documents)
        T = T if bare and T < S else -(-T // S) * S     # whole segments: one pass, and few different shapes
        documents = documents[:max(1, self.tokens // T)]    # facts may need more segments than the stage has
        idx, targets = (np.full((len(documents), T), fill, np.int64) for fill in (0, -1))
        for row, d in enumerate(documents):
            idx[row, :len(d.ids)] = d.ids
            for start, stop in d.answers:  # each position is asked for the token behind it
                targets[row, start - 1:stop - 1] = d.ids[start:stop]
        keep = np.flatnonzero(targets != -1)
        words = targets.flat[keep] != self.builder.tokenizer.eot
        return key, Batch(*map(torch.from_numpy, (idx, targets, keep, words)), segments == stage.segments)


def quiet(_: int) -> None:
    """Of a worker: Ctrl-C is for the first process, which ends the workers when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def as_it_is(item):
    """DataLoader's own conversion would turn tuples into lists."""
    return item


class Batches:
    """The batches of a run in turn, in the stage that `stage` says: `next(batches)`. Workers make them ahead;
    those of a stage that has been left meanwhile are thrown away and their numbers made again. `every`: one
    batch in so many, for one of as many processes."""

    def __init__(self, maker: Maker, stage: Stage, number: int = 0, workers: int = 0, pin: bool = False,
                 every: int = 1):
        self.stage, self.number, self.every = stage, number, every  # number: of the next batch to come out
        self.given = number                         # of the next one to be ordered
        self.loader = iter(DataLoader(maker, batch_size=None, sampler=self.orders(), num_workers=workers,
                                      pin_memory=pin, collate_fn=as_it_is, worker_init_fn=quiet,
                                      prefetch_factor=4 if workers else None))

    def orders(self) -> Iterator[tuple[Stage, int]]:
        while True:
            self.given += self.every
            yield self.stage, self.given - self.every

    def enter(self, stage: Stage) -> None:
        """From the next batch on."""
        self.stage, self.given = stage, self.number

    def __next__(self) -> Batch:
        while True:
            (stage, number), batch = next(self.loader)
            if (stage, number) == (self.stage, self.number):
                self.number += self.every
                return batch


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.batches", __doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["qa1"], help="bAbI tasks (default qa1)")
    parser.add_argument("--stage", default="10:16", help="facts:segments[:tokens a segment] (default 10:16)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default 0: this one)")
    parser.add_argument("--n", type=int, default=50, help="batches (default 50)")
    args = parser.parse_args(argv)
    with one_line("python -m data.batches"):
        stage = Stage.parse(args.stage, 128)
        if wrong := [task for task in (*args.tasks, *stage.tasks) if task not in TASKS]:
            raise ValueError(f"task {wrong[0]!r} is unknown: choose from {' '.join(TASKS)}")
        if args.n < 1:
            raise ValueError(f"--n {args.n} must be at least 1")
        maker = Maker(Builder(load(), "train"), tuple(args.tasks), 32, 32768, 0.1, 3, 0)
        batches, tokens = Batches(maker, stage, workers=args.workers), 0
        next(batches)
        start = time.perf_counter()
        for _ in range(args.n):
            tokens += next(batches).idx.numel()
        seconds = time.perf_counter() - start
        print(f"{stage}: {1e3 * seconds / args.n:.2f} ms a batch, {tokens / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    main()
