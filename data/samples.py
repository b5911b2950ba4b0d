"""Where the evaluation's questions come from: generated documents, or the files of the published benchmark.

    samples = generated(Builder(tokenizer, "val"), seed=0)
    document = samples("qa1", 4000, 17)         # the same one every time, whatever else is asked

Writes nothing.
"""
import hashlib
import json
import random
from typing import Callable, Iterable

from data.babi import TASKS
from data.babilong import Builder
from data.document import Document, from_text, length_name
from data.published import read_samples
from data.tokenizer import Tokenizer

Samples = Callable[[str, int, int], Document]   # (task, length, i) -> sample i of that cell, always the same


def generated(builder: Builder, seed: int) -> Samples:
    """Samples that depend on seed, task, length and i alone, so that models answer the same questions."""
    return lambda task, length, i: builder.sample(task, length, random.Random(f"{seed} {task} {length} {i}"))


class Downloaded:
    """The samples of the published files; of one cell at a time, as they are large."""

    def __init__(self, folder: str, tokenizer: Tokenizer):
        self.folder, self.tokenizer, self.cell, self.kept = folder, tokenizer, None, []

    def rows(self, task: str, length: int) -> list[dict]:
        """The samples of a cell, as read_samples gives them."""
        if self.cell != (task, length):
            self.kept = read_samples(self.folder, task, length_name(length))
            self.cell = task, length
        return self.kept

    def __call__(self, task: str, length: int, i: int) -> Document:
        row = self.rows(task, length)[i]
        return from_text(self.tokenizer, row["input"], row["question"], row["target"])


def check_cells(samples: Samples, tasks: Iterable[str], lengths: Iterable[int]) -> dict[str, str]:
    """A fingerprint of the samples of each cell: of the first, or of the whole published file. ValueError,
    before any time is spent, for an unknown task or a length too short for its facts."""
    prints = {}
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is unknown: choose from {' '.join(TASKS)}")
        for length in lengths:
            d = samples(task, length, 0)
            text = d.ids.tobytes()
            if isinstance(samples, Downloaded):
                text = json.dumps(samples.rows(task, length)).encode()
            digest = hashlib.blake2b(text, digest_size=8).hexdigest()
            prints[f"samples of {task} {length_name(length)}"] = digest
    return prints
