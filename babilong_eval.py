"""Ask trained models the BABILong questions: by task, length, model and use of the memory.

    python babilong_eval.py --tasks qa1 --lengths 0k 4k --n 50       # a minute on a laptop
    python babilong_eval.py --tasks qa1 --lengths 128k 1M:5 --n 20   # far beyond any window
    python babilong_eval.py --memory on off other --rag 10 --out all.jsonl   # all ways of asking
    python babilong_eval.py --ckpt lm2=out/ckpt.pt rmt=out/rmt/ckpt.pt --compare "lm2 on" "rmt on"
    python babilong_eval.py --source babilong --path babilong --lengths 0k 1k --out published.jsonl
    python babilong_eval.py --from_predictions out/predictions.jsonl   # the tables of a file again
    python babilong_eval.py --mmlu data/mmlu --ckpt Llama-3.2-1B       # MMLU in place of BABILong

Prints tables and writes predictions.jsonl, a line for each answer, beside the first checkpoint or
to --out. A run that was cut short goes on there, and so does one that asks for more samples.

With memory `on` the document is read as in training. `off` reads every segment as a document of
its own, so that only the last one can help. `other` gives the last segment the memory that another
document has left. `rag` reads, in place of the document, the sentences of it that BM25 finds
closest to the question.

Two metrics are shown. `exact` is exact match of the answer, the headline. `official` is the
benchmark's own metric with its faults: a perfect model gets about 53 % on qa7, where "none" holds
the label "one".
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import mmlu
from data.babi import TASKS
from data.babi import names as babi_names
from data.babilong import COUNTS, Builder, Samples, generated
from data.common import (
    Parser,
    keep_freed_memory,
    lock,
    one_line,
    peak_memory,
    pick_device,
    replacing,
    save_json,
)
from data.document import Document, batches, length_name, read_lengths
from data.llama import fingerprint_of_files, tokenizer_of
from data.published import Downloaded, published_table
from data.template import with_template
from data.tokenizer import Tokenizer
from lm2 import LM2, RMT, State, load_model

Model = LM2 | RMT

# -------------------------------------------------------------------------------------------------
# What is asked

MODES = ("on", "off", "other", "rag")  # the uses of the memory

Work = list[tuple[str, int, int]]  # (task, length, number of samples) of each cell
Key = tuple[str, str, int, int, str]  # (model, task, length, i, mode): what one answer answers


def neighbour(i: int, n: int) -> int:
    """The one of n documents that lends its memory to document i.

    They lend in pairs. The last of an odd number borrows from the one before it."""
    partner = i + 1 if i % 2 == 0 else i - 1
    return partner if partner < n else i - 1


# -------------------------------------------------------------------------------------------------
# How a document is read and answered


def of_rows(state: State, rows: list[int]) -> State:
    """The state of some rows of a batch, in that order."""
    return state.map(lambda tensor: tensor[rows])


def last_segment_start(prompt: Sequence[int], segment_len: int) -> int:
    """Where the last segment of a prompt (T,) starts, in which it is answered."""
    return (len(prompt) - 1) // segment_len * segment_len


@torch.no_grad()
def read_before_last(model: Model, prompts: list[np.ndarray]) -> State:
    """Read each prompt (T,) up to its last segment -> the state in which those segments begin, of
    len(prompts) rows. It has no open ids.

    Prompts of equally many segments are read together, so that none is padded."""
    state = model.initial_state(len(prompts))  # nobody else has it yet, so it may be filled in
    if model.cfg.kind == "llama":
        return state  # it carries nothing from segment to segment
    rows_by_start: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        start = last_segment_start(prompt, model.cfg.segment_len)
        rows_by_start.setdefault(start, []).append(row)
    for start, rows in rows_by_start.items():
        # The first token of the last segment makes the model write the segment before it. Of what
        # comes back only the memory is kept, so this token is read again with its own segment.
        idx = torch.from_numpy(np.stack([prompts[row][: start + 1] for row in rows]))
        read = model.read(idx.to(state.open_ids.device))
        for carried, part in zip(state.carried, read.carried, strict=True):
            if carried is not None:
                carried[rows] = part.to(carried.dtype)
    return state


def next_tokens(model: Model, texts: list[list[int]], state: State | None) -> list[int]:
    """The likeliest next token of each text.

    Texts are padded on the right, where nothing sees the padding."""
    width = max(len(text) for text in texts)
    idx = torch.zeros(len(texts), width, dtype=torch.int64)
    last_positions = []  # flat, as `at` counts
    for row, text in enumerate(texts):
        idx[row, : len(text)] = torch.tensor(text)
        last_positions.append(row * width + len(text) - 1)
    device = model.norm.weight.device
    at = torch.tensor(last_positions, device=device)
    logits, _, _ = model(idx.to(device), state=state, at=at)  # (B, V)
    return logits.argmax(dim=-1).tolist()


# From so many tokens on, a prompt's last segment is read once and continued with a cache. Shorter
# ones are continued together, each new token by a call that reads them again.
LONG_SEGMENT = 1024


def continue_each(
    model: Model, texts: list[list[int]], state: State, most: int, ends: Callable[[int], bool]
) -> list[list[int]]:
    """Greedy continuations of texts, one text after the other, each up to a token that ends it."""
    continuations = []
    for row, text in enumerate(texts):
        continuations.append([])
        idx = torch.tensor([text], device=state.open_ids.device)
        for new in model.stream(idx, most, state=of_rows(state, [row])):
            continuations[-1].append(new.item())
            if ends(new.item()):
                break
    return continuations


def continue_together(
    model: Model,
    texts: list[list[int]],
    state: State | None,
    most: int,
    ends: Callable[[int], bool],
) -> list[list[int]]:
    """The same for all texts at once.

    state  None is memory off: a token is predicted from its own segment alone"""
    segment_len = model.cfg.segment_len
    continuations = [[] for _ in texts]
    active = list(range(len(texts)))  # those that have not ended
    for _ in range(most):
        seen = [texts[i] + continuations[i] for i in active]
        active_state = None
        if state is None:
            # An answer may go on in the next segment, which is a document of its own then.
            seen = [text[last_segment_start(text, segment_len) :] for text in seen]
        else:
            active_state = of_rows(state, active)
        new_tokens = next_tokens(model, seen, active_state)
        still_active = []
        for i, token in zip(active, new_tokens, strict=True):
            continuations[i].append(token)
            if not ends(token):
                still_active.append(i)
        active = still_active
        if not active:
            break
    return continuations


@torch.no_grad()
def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[np.ndarray],
    state: State | None,
    most: int = 12,
    to_line_end: bool = False,
) -> list[str]:
    """Greedy answers to prompts (T,), up to the end of text or `most` tokens.

    state        the state in which the last segments begin, a row for each prompt, as
                 `read_before_last` returns it. None is memory off
    to_line_end  whether an answer stops before its first line end, too"""
    segment_len = model.cfg.segment_len
    texts = [prompt[last_segment_start(prompt, segment_len) :].tolist() for prompt in prompts]

    def ends(token: int) -> bool:
        if token in tokenizer.ends:
            return True
        return to_line_end and "\n" in tokenizer.decode([token])

    if state is not None and max(map(len, texts)) > LONG_SEGMENT:
        continuations = continue_each(model, texts, state, most, ends)
    else:
        continuations = continue_together(model, texts, state, most, ends)
    outputs = []
    for ids in continuations:
        if ids[-1] in tokenizer.ends:
            ids = ids[:-1]
        output = tokenizer.decode(ids)
        if to_line_end:
            output, _, _ = output.partition("\n")
        outputs.append(output.strip())
    return outputs


class Answers(NamedTuple):
    """The answers to a batch of documents in one mode."""

    outputs: list[str]
    found: list[bool | None]  # whether retrieval found all that is needed
    seconds: float  # the mean time that a document took


def ask(
    model: Model,
    tokenizer: Tokenizer,
    documents: list[Document],
    modes: Iterable[str],
    n_sentences: int,
    template: bool = False,
) -> dict[str, Answers]:
    """Answers to a batch of documents in each mode. On a GPU layers multiply in bfloat16.

    n_sentences  how many sentences mode `rag` reads
    template     whether the documents have the benchmark's template, see data/template.py. A base
                 model does not end its text there, so an answer is one line of up to 20 tokens"""
    on_gpu = model.norm.weight.is_cuda
    prompts = [document.prompt() for document in documents]
    limits = dict(most=20, to_line_end=True) if template else {}
    answers = {}
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        reading = 0.0
        if "on" in modes or "other" in modes:
            start = time.perf_counter()
            state = read_before_last(model, prompts)
            if on_gpu:
                torch.cuda.synchronize()
            reading = time.perf_counter() - start
        for mode in modes:
            found = [None] * len(documents)
            start = time.perf_counter()
            if mode == "rag":
                short_prompts = []
                for i, document in enumerate(documents):
                    short, found[i] = document.retrieve(tokenizer, n_sentences)
                    short_prompts.append(short)
                short_state = read_before_last(model, short_prompts)
                outputs = answer(model, tokenizer, short_prompts, short_state, **limits)
            elif mode == "off":
                outputs = answer(model, tokenizer, prompts, None, **limits)
            elif mode == "other":
                lenders = [neighbour(i, len(prompts)) for i in range(len(prompts))]
                outputs = answer(model, tokenizer, prompts, of_rows(state, lenders), **limits)
            else:
                outputs = answer(model, tokenizer, prompts, state, **limits)
            seconds = time.perf_counter() - start
            if mode in ("on", "other"):
                seconds += reading
            answers[mode] = Answers(outputs, found, seconds / len(documents))
    return answers


# When a batch is filled, a shorter document counts as this many tokens. Otherwise a batch would
# have thousands of short documents. Their memories could fill the RAM, and a run that is cut short
# would lose all of their answers.
LEAST_TOKENS = 3000


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    samples: Samples,
    work: Work,
    modes: Iterable[str] = ("on", "off"),
    rag: int = 10,
    max_tokens: int = 200_000,
    name: str = "lm2",
    done: set[Key] = frozenset(),
    show: bool = False,
    names: str = "own",
    template: bool = False,
) -> Iterator[list[dict]]:
    """Yield the predictions of these cells, batch by batch. Those in `done` are not asked again.

    A prediction has model, task, length, i, memory, question, target, output, outside (whether all
    needed facts lie before the last segment), found (whether retrieval has them) and seconds. It
    has names, too, if these are not bAbI's own.

    rag         how many sentences mode `rag` reads
    max_tokens  A batch has at most this many tokens of prompts. One document always goes, or two if
                "other" is among the modes
    show        show a progress bar where standard error is a terminal
    names       the names in the samples, see --names
    template    whether to ask with the benchmark's template, see --template"""
    was_training = model.training
    model.eval()
    bar = tqdm(
        total=sum(length * n for _, length, n in work),
        desc=name,
        unit="tok",
        unit_scale=True,
        disable=None if show else True,  # with None tqdm shows the bar on a terminal only
        leave=False,
    )
    for task, length, n in work:
        bar.set_postfix(cell=f"{task} {length_name(length)}")
        batch_size = max_tokens // max(length, LEAST_TOKENS)
        for batch in batches(n, batch_size, pairs="other" in modes):
            left = []
            for mode in modes:
                if any((name, task, length, i, mode) not in done for i in batch):
                    left.append(mode)
            if left:
                documents = []
                for i in batch:
                    document = samples(task, length, i)
                    if template:
                        document = with_template(document, task, tokenizer)
                    documents.append(document)
                answers = ask(model, tokenizer, documents, left, rag, template)
                rows = []
                for mode in left:
                    outputs, found, seconds = answers[mode]
                    for j, i in enumerate(batch):
                        if (name, task, length, i, mode) in done:
                            continue
                        question = documents[j].questions[0]
                        row = dict(
                            model=name,
                            task=task,
                            length=length,
                            i=i,
                            memory=mode,
                            question=question.text,
                            target=question.answer,
                            output=outputs[j],
                            outside=documents[j].outside(model.cfg.segment_len),
                            found=found[j],
                            seconds=round(seconds, 5),
                        )
                        if names != "own":
                            row["names"] = names
                        rows.append(row)
                yield rows
            bar.update(length * len(batch))
    bar.close()
    model.train(was_training)


# -------------------------------------------------------------------------------------------------
# Scores

# The labels that the benchmark looks for in an output
# (github.com/booydar/babilong, metrics.py, Apache-2.0). They are the benchmark's own: they stay as
# they were published, even if the answers of our generated stories (data/babi) change.
ROOMS = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
YES_NO = ["yes", "no"]
LABELS = {
    "qa1": ROOMS,
    "qa2": ROOMS,
    "qa3": ROOMS,
    "qa4": ROOMS,
    "qa5": ["Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"],
    "qa6": YES_NO,
    "qa7": ["none", "one", "two", "three"],
    "qa8": ["apple", "football", "milk", "nothing"],
    "qa9": YES_NO,
    "qa10": ["yes", "no", "maybe"],
    "qa11": ROOMS,
    "qa12": ROOMS,
    "qa13": ROOMS,
    "qa14": ["bedroom", "cinema", "kitchen", "office", "park", "school"],
    "qa15": ["cat", "mouse", "sheep", "wolf"],
    "qa16": ["gray", "green", "white", "yellow"],
    "qa17": YES_NO,
    "qa18": YES_NO,
    "qa19": ["n,n", "n,e", "n,w", "e,n", "e,e", "e,s", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"],
    "qa20": ["bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"],
}


@functools.cache
def labels_of_renamed(task: str, target: str) -> list[str]:
    """The labels where stories have other names (data/babi/names.py): the benchmark's own for the
    task, and all names of the target's kind, if it is a name."""
    labels = list(LABELS[task])
    for own, others in babi_names.KINDS:
        kind = {*own, *others}
        if kind & set(target.split(",")):
            labels.extend(kind)
    return labels


def official_score(
    task: str, target: str, output: str, question: str, is_renamed: bool = False
) -> bool:
    """The benchmark's published metric, faults included ("none" holds "one", "know" holds "no").

    A label counts as given if it is a substring of the output's first sentence and not of the
    question. The target has to be the one label given. If the target has commas, every part of it
    has to be given, and no label besides.

    is_renamed  whether the story has other names than the benchmark's, which are labels then"""
    labels = labels_of_renamed(task, target) if is_renamed else LABELS[task]
    output = output.lower()
    target = target.lower()
    question = question.lower()
    for end in (".", "<context>", "<example>"):
        output, _, _ = output.partition(end)
    given = set()
    for label in labels:
        label = label.lower()
        if label in output and label not in question:
            given.add(label)
    # A target of 3 characters is a path of qa19 such as s,e. It is one label, comma included.
    if "," in target and len(target) > 3:
        parts = target.split(",")
        return all(part in given for part in parts) and len(given) == len(parts)
    return given == {target}


def exact_match(target: str, output: str) -> bool:
    """Whether the two are equal, apart from case, surrounding space and a final full stop."""
    plain = [text.strip().removesuffix(".").strip().lower() for text in (target, output)]
    return plain[0] == plain[1]


def score(metric: str, row: dict) -> bool:
    """Whether a prediction is right by a metric, "exact" or "official"."""
    if metric == "exact":
        return exact_match(row["target"], row["output"])
    is_renamed = row.get("names", "own") != "own"
    return official_score(row["task"], row["target"], row["output"], row["question"], is_renamed)


def count_right(metric: str, rows: list[dict]) -> int:
    """How many of these predictions are right."""
    return sum(score(metric, row) for row in rows)


def floor(metric: str, rows: list[dict]) -> int:
    """How many of these questions the best constant answer gets right.

    Only their own targets are tried, as any other answer is wrong everywhere."""
    best = 0
    for constant in {row["target"] for row in rows}:
        answered = [row | dict(output=constant) for row in rows]
        best = max(best, count_right(metric, answered))
    return best


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, as two shares; (0, 1) without any sample."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided, of two models that differ on only_a + only_b questions.

    It is the probability of so uneven a split, if each of the two is as likely as the other to be
    the one that is right."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


# -------------------------------------------------------------------------------------------------
# Tables

Cell = dict  # the counts of a model, memory mode, task and length: what tables and pictures show


def column(row: dict) -> str:
    """The name of a column, such as "lm2 on". It may be that of a prediction or of a cell."""
    return f"{row['model']} {row['memory']}"


def to_cells(rows: Iterable[dict]) -> list[Cell]:
    """A cell for every model, memory mode, task and length of these predictions.

    A cell has n, exact and official (right answers), floor and floor_official (those of the best
    constant answer). outside_n, outside_exact and floor_outside count only the samples whose needed
    facts all lie before the last segment. found_n and found are there for mode `rag`: the samples
    whose needed facts are known, and those for which retrieval has them all."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        place = (row["model"], row["memory"], row["task"], row["length"])
        groups.setdefault(place, []).append(row)
    cells = []
    for (model, memory, task, length), group in groups.items():
        outside = [row for row in group if row["outside"]]
        cell = dict(
            model=model,
            memory=memory,
            task=task,
            length=length,
            n=len(group),
            exact=count_right("exact", group),
            floor=floor("exact", group),
            official=count_right("official", group),
            floor_official=floor("official", group),
            outside_n=len(outside),
            outside_exact=count_right("exact", outside),
            floor_outside=floor("exact", outside),
        )
        found = [row["found"] for row in group if row["found"] is not None]
        if found:
            cell["found_n"] = len(found)
            cell["found"] = sum(found)
        cells.append(cell)
    return cells


def share(cells: list[Cell], n_key: str, hits_key: str) -> float:
    """The mean over cells of the share of hits."""
    return sum(cell[hits_key] / cell[n_key] for cell in cells) / len(cells)


def pooled(cells: list[Cell], n_key: str, hits_key: str) -> tuple[float, float]:
    """The mean over cells as hits out of n, so that `wilson` can give its interval.

    n is chosen so that hits out of n has the variance of that mean. For one cell these are the
    cell's own counts."""
    # Laplace's rule (+1, +2), so that a cell with 0 or n hits still has a variance.
    chances = [(cell[hits_key] + 1) / (cell[n_key] + 2) for cell in cells]
    variances = []  # of the share of each cell
    for cell, p in zip(cells, chances, strict=True):
        variances.append(p * (1 - p) / cell[n_key])
    # The variance of the mean is sum(variances) / len(cells) ** 2. That of a share of n samples is
    # mean * (1 - mean) / n.
    mean = sum(chances) / len(cells)
    n = mean * (1 - mean) * len(cells) ** 2 / sum(variances)
    return share(cells, n_key, hits_key) * n, n


def percents(hits: float, n: float) -> tuple[str, str, str]:
    """A share of n samples and the two ends of its interval, as texts in %.

    The share is "100" only if all samples are hits."""
    low, high = wilson(hits, n)
    if hits >= n:
        return "100", f"{100 * low:.0f}", "100"
    return f"{min(99.9, 100 * hits / n):.1f}", f"{min(99, round(100 * low))}", f"{100 * high:.0f}"


def percent(hits: float, n: float) -> str:
    """Share and interval in %, such as "98.0 [95,99]", at most 13 characters.

    It is "-" without a sample."""
    if n == 0:
        return "-"
    shown, low, high = percents(hits, n)
    return f"{shown} [{low},{high}]"


GROUPS = {  # the means that a table shows, and of which tasks
    "qa1-5": [f"qa{i}" for i in range(1, 6)],
    "qa1-10": [f"qa{i}" for i in range(1, 11)],
}


class Block(NamedTuple):
    """A block of lines in the table: its title, and the fields of a cell that it shows."""

    title: str
    n: str  # the field that holds the number of samples
    hits: str  # the field that holds the right answers
    floor: str | None  # the field that holds the right answers of the best constant answer


BLOCKS = {
    "exact": Block("exact match in %", "n", "exact", "floor"),
    "outside": Block(
        "exact match in %, facts outside the window",
        "outside_n",
        "outside_exact",
        "floor_outside",
    ),
    "official": Block("the benchmark's own metric in %", "n", "official", "floor_official"),
    "found": Block("retrieval has all needed facts, in %", "found_n", "found", None),
}
ACROSS = 4  # columns that stand beside each other

NOTES = """\
[ , ]: Wilson's 95 % interval. floor: the best constant answer on these samples.
outside the window: all needed facts lie before the last segment. Memory off:
every segment is a document of its own. other: the memory of another document."""


def table(cells: list[Cell], metrics: Iterable[str] = ("exact", "official")) -> str:
    """All tables of these cells, at most 80 columns wide.

    "exact" shows exact match, the same of samples whose facts lie outside the window, and the share
    that retrieval has found; "official" the benchmark's own metric."""
    blocks = []
    for metric in metrics:
        if metric == "exact":
            blocks.extend([BLOCKS["exact"], BLOCKS["outside"], BLOCKS["found"]])
        else:
            blocks.append(BLOCKS[metric])
    parts = []
    for block in blocks:
        lines = lines_of_block(cells, block)
        if lines:
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) + NOTES


def lines_of_block(cells: list[Cell], block: Block) -> list[str]:
    """The lines of one block: task and length down, columns across, then the means over tasks.

    Columns that do not fit stand in further parts below."""
    cell_at = {}  # (column, task, length) -> cell
    for cell in cells:
        if cell.get(block.n):
            cell_at[column(cell), cell["task"], cell["length"]] = cell
    columns = list(dict.fromkeys(column_name for column_name, _, _ in cell_at))
    tasks = sorted({task for _, task, _ in cell_at}, key=lambda task: int(task[2:]))
    groups = {task: [task] for task in tasks} | GROUPS
    lengths = sorted({length for _, _, length in cell_at})
    lines = []
    for start in range(0, len(columns), ACROSS):
        part = columns[start : start + ACROSS]
        heads = "".join(f" {short_name(column_name):>13}" for column_name in part)
        if start > 0:
            lines.append("")
        lines.append(block.title)
        lines.append(f"{'task':>6} {'length':>6} {'n':>4} {'floor':>5}{heads}")
        for group, members in groups.items():
            for length in lengths:
                cells_by_column = []
                for column_name in part:
                    places = [(column_name, task, length) for task in members]
                    is_whole = all(place in cell_at for place in places)
                    cells_by_column.append([cell_at[place] for place in places] if is_whole else [])
                lines.extend(lines_of_group(block, group, length, cells_by_column))
    return lines


def lines_of_group(
    block: Block, group: str, length: int, cells_by_column: list[list[Cell]]
) -> list[str]:
    """The lines of a task, or of a mean over tasks, at one length.

    If columns have different numbers of samples, each number gets a line, and the columns of other
    numbers show "-" there.

    cells_by_column  the cells of each column. A column without cells shows "-" in every line"""
    columns_by_sizes = {}  # the numbers of samples of some cells -> which columns have them
    for i, cells in enumerate(cells_by_column):
        if cells:
            sizes = tuple(cell[block.n] for cell in cells)
            columns_by_sizes.setdefault(sizes, []).append(i)
    lines = []
    for sizes, members in columns_by_sizes.items():
        n = sum(sizes)
        shown_n = str(n) if n < 10_000 else f"{n // 1000}k"
        shown_floor = ""
        if block.floor:
            first_cells = cells_by_column[members[0]]
            shown_floor = f"{100 * share(first_cells, block.n, block.floor):.1f}"
        line = f"{group:>6} {length_name(length):>6} {shown_n:>4} {shown_floor:>5}"
        for i, cells in enumerate(cells_by_column):
            shown = "-"
            if i in members:
                shown = percent(*pooled(cells, block.n, block.hits))
            line += f" {shown:>13}"
        lines.append(line)
    return lines


def short_name(column_name: str) -> str:
    """A column's name in 13 characters: the end of the model's name, and the mode."""
    model, _, mode = column_name.rpartition(" ")
    room = 12 - len(mode)  # the space between them takes one
    return f"{model[-room:]} {mode}"


def compare(rows: list[dict], a: str, b: str, metric: str = "exact") -> str:
    """McNemar's test between two columns, such as "lm2 on" and "lm2 off", by task and length.

    It pairs the answers to questions of the same text and target. ValueError for a column that is
    not there, or if the two have answered no question in common."""
    right: dict[str, dict[tuple, bool]] = {}  # column -> question -> whether its answer is right
    for row in rows:
        question = (row["task"], row["length"], row["i"], row["question"], row["target"])
        right.setdefault(column(row), {})[question] = score(metric, row)
    for name in (a, b):
        if name not in right:
            there = ", ".join(repr(known) for known in right)
            raise ValueError(f"column {name!r} is not there: choose from {there}")
    pairs = {}  # (task, length) -> for each question whether A is right and whether B is
    for question, is_right in right[a].items():
        if question in right[b]:
            task, length, *_ = question
            place = (task, length_name(length))
            pairs.setdefault(place, []).append((is_right, right[b][question]))
    if not pairs:
        raise ValueError(
            f"{a!r} and {b!r} have answered no question in common: ask both the same samples"
        )
    lines = [
        f"{metric}: A = {a}, B = {b}",
        f"{'task':>6} {'length':>6} {'n':>5} {'A %':>6} {'B %':>6} {'only A':>7} {'only B':>7} "
        f"{'p':>8}",
    ]
    for (task, length), of_cell in pairs.items():
        lines.append(line_of_pairs(task, length, of_cell))
    if len(pairs) > 1:
        of_all = []
        for of_cell in pairs.values():
            of_all.extend(of_cell)
        lines.append(line_of_pairs("all", "", of_all))
    lines.append("p: McNemar's exact test, two-sided, on the same questions; not corrected for the")
    lines.append("number of lines.")
    n_apart = len(right[a].keys() ^ right[b].keys())
    if n_apart:
        lines.append(f"{n_apart:,} answers have no partner to the same question and are left out.")
    return "\n".join(lines)


def line_of_pairs(task: str, length: str, pairs: list[tuple[bool, bool]]) -> str:
    """A line of a comparison. pairs: for each question whether A is right and whether B is"""
    n = len(pairs)
    percent_a = 100 * sum(a for a, _ in pairs) / n
    percent_b = 100 * sum(b for _, b in pairs) / n
    only_a = pairs.count((True, False))
    only_b = pairs.count((False, True))
    p = mcnemar(only_a, only_b)
    shown_p = "< .0001" if p < 1e-4 else f"{p:.4f}"
    return (
        f"{task:>6} {length:>6} {n:5} {percent_a:6.1f} {percent_b:6.1f} {only_a:7} {only_b:7} "
        f"{shown_p:>8}"
    )


def report_cost(rows: list[dict]) -> str:
    """The seconds that a sample takes, for each model, length and mode, and how many tokens of the
    document the model reads per second with the memory on."""
    groups: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        by_mode = groups.setdefault((row["model"], row["length"]), {})
        by_mode.setdefault(row["memory"], []).append(row["seconds"])
    lines = ["seconds a sample"]
    for (model, length), by_mode in groups.items():
        means = {mode: sum(seconds) / len(seconds) for mode, seconds in by_mode.items()}
        line = f"{model} {length_name(length)}: "
        line += ", ".join(f"{mode} {mean:.3f}" for mode, mean in means.items())
        if length and means.get("on"):
            line += f"; {length / means['on']:,.0f} tokens/s"
        lines.append(line)
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# The file of answers: a line of settings for each model, and a line for each answer

FIELDS = dict(  # the fields of an answer, and of what types they may be
    model=(str,),
    task=(str,),
    length=(int,),
    i=(int,),
    memory=(str,),
    question=(str,),
    target=(str,),
    output=(str,),
    outside=(bool, NoneType),
    found=(bool, NoneType),
    seconds=(int, float),
)
DEFAULTS = dict(model="lm2", found=None, seconds=0.0)  # the fields that older files lack
# The settings that a file leaves out, and what they are then.
UNSAID = dict(names="own", template=False)


def key_of(row: dict) -> Key:
    """What a prediction answers."""
    return row["model"], row["task"], row["length"], row["i"], row["memory"]


def is_settings(row: object) -> bool:
    """Whether a line of a file holds the settings of a model."""
    settings = row.get("settings") if isinstance(row, dict) else None
    return isinstance(settings, dict) and isinstance(settings.get("model"), str)


def is_prediction(row: object) -> bool:
    """Whether a line of a file holds an answer, and all of its fields are as they should be."""
    if not isinstance(row, dict):
        return False
    for name, types in FIELDS.items():
        if name not in row or type(row[name]) not in types:
            return False
    is_known = row["task"] in LABELS and row["memory"] in MODES
    is_known = is_known and row.get("names", "own") in babi_names.CHOICES
    return is_known and row["length"] >= 0 and row["i"] >= 0


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, but for a last one that a killed run has not finished.

    A lone line that is cut short is kept: no run leaves it, so the file is not one of answers."""
    lines = path.read_bytes().splitlines(keepends=True)
    if len(lines) > 1 and not lines[-1].endswith(b"\n"):
        try:
            json.loads(lines[-1])  # only its end is missing
        except (ValueError, RecursionError):
            lines.pop()
    return lines


def parse(path: Path, lines: list[bytes]) -> tuple[dict[str, dict], list[dict]]:
    """The settings of each model, and the predictions, in the lines of a file.

    ValueError for a line that is neither, or that answers what was answered before."""
    settings = {}
    rows = []
    seen = set()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8-sig"))  # an editor may have put a mark before it
        except (ValueError, RecursionError):
            row = None
        if is_settings(row):
            settings[row["settings"]["model"]] = row["settings"]
            continue
        if isinstance(row, dict):
            row = DEFAULTS | row
        if not is_prediction(row):
            raise ValueError(
                f"{path} line {number} is no prediction: give another file, or run the evaluation "
                "again"
            )
        if key_of(row) in seen:
            raise ValueError(
                f"{path} line {number} answers {key_of(row)} again: take one of the two out"
            )
        seen.add(key_of(row))
        rows.append(row)
    return settings, rows


def load(path: str | Path) -> list[dict]:
    """The predictions of a file. ValueError, naming the line, for a file of something else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name a predictions.jsonl")
    _, rows = parse(path, whole_lines(path))
    if not rows:
        raise ValueError(f"{path} holds no prediction: run the evaluation again")
    return rows


def as_lines(values: list[dict]) -> bytes:
    """JSON, a line for each value."""
    text = ""
    for value in values:
        text += json.dumps(value, ensure_ascii=False) + "\n"
    return text.encode("utf-8")


def save(rows: list[dict], path: Path) -> None:
    """Write rows to `path`. An older file stays until the new one is complete."""
    with replacing(path) as partial:
        partial.write_bytes(as_lines(rows))


class Predictions:
    """The file of answers that a run writes. Answers that are there already are kept.

    `rows` are all answers, `done` their keys.

    settings  one dict for each model of this run: its name under `model`, and all that its answers
              depend on
    again     throw away what is there

    ValueError, and nothing is written, if the file is not one of answers, if its answers were made
    with other settings, or while another run writes it."""

    def __init__(self, path: Path, settings: list[dict], again: bool = False):
        # A lock belongs to an open file and not to its name. So the file is opened once, locked
        # before it is read, and changed in place: of two runs that start together one is refused.
        self.file = open(path, "a+b")  # noqa: SIM115
        lock(self.file, f"another evaluation writes {path}: give another --out, or end that one")
        try:
            lines = whole_lines(path)
            known, self.rows = parse(path, lines)
            if again:
                lines = []
                known = {}
                self.rows = []
            check_settings(path, known, self.rows, settings)
        except ValueError:
            self.file.close()
            raise
        self.done = {key_of(row) for row in self.rows}
        self.file.truncate(sum(len(line) for line in lines))
        new = [dict(settings=own) for own in settings if own["model"] not in known]
        if lines and not lines[-1].endswith(b"\n"):
            self.file.write(b"\n")
        self.file.write(as_lines(new))
        self.file.flush()

    def add(self, rows: list[dict]) -> None:
        """Keep rows, and write them at once."""
        self.rows += rows
        self.file.write(as_lines(rows))
        self.file.flush()


def check_settings(
    path: Path, known: dict[str, dict], rows: list[dict], settings: list[dict]
) -> None:
    """ValueError if answers of a file were not made with the settings of this run.

    known  the settings of each model in the file, whose predictions are `rows`"""
    mend = "give another --out, or --again to replace all in it"
    for row in rows:
        if row["model"] not in known:
            raise ValueError(f"{path} has answers of {row['model']} without their settings: {mend}")
    wanted = {own["model"]: own for own in settings}
    for model, old in known.items():
        if model in wanted:
            new = wanted[model]
        else:
            # This run does not ask that model. Its answers stand in the same table, so they have to
            # be made as those of this run. The settings of a run's models, such as the first one,
            # differ in the model's name and checkpoint alone.
            new = settings[0] | dict(model=model, checkpoint=old.get("checkpoint"))
        for name in dict.fromkeys([*new, *old]):  # each name once, in order
            have = old.get(name, UNSAID.get(name, "missing"))
            want = new.get(name, UNSAID.get(name, "missing"))
            if have != want:
                raise ValueError(
                    f"{path} has answers of {model} with {name} {have}, not {want}: {mend}"
                )


# -------------------------------------------------------------------------------------------------
# The command line


def name_and_path(text: str) -> tuple[str, Path]:
    """The name and the path of NAME=PATH. Of a mere PATH, which may hold "=" itself, the name is
    empty."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return name, Path(path)
    return "", Path(text)


@dataclass
class Loaded:
    """A checkpoint as the evaluation uses it."""

    name: str
    model: Model
    tokenizer: Tokenizer
    train: dict  # the settings of its training: tasks, background, ...
    digest: str  # a fingerprint of the file, or of the folder


def read_models(texts: list[str], device: torch.device) -> list[Loaded]:
    """The checkpoints that were given as PATH or NAME=PATH.

    Without a name, a single one is called "lm2", "rmt" or "llama" and one of several by its folder.
    ValueError for two of one name."""
    models = []
    for text in texts:
        name, path = name_and_path(text)
        model, content = load_model(path, device)
        if not name:
            if len(texts) == 1:
                name = model.cfg.kind
            else:
                name = path.resolve().name if path.is_dir() else path.resolve().parent.name
        if name in [loaded.name for loaded in models]:
            raise ValueError(f"--ckpt: two models are called {name!r}, give NAME=PATH")
        tokenizer = tokenizer_of(content, path, model.cfg.vocab_size)
        train = content.get("train", {})
        models.append(Loaded(name, model, tokenizer, train, fingerprint_of_files(path)))
    return models


def add_mmlu_flags(parser: Parser) -> None:
    """Add the flags that belong to MMLU."""
    add = parser.add_argument_group("MMLU").add_argument
    add(
        "--mmlu",
        metavar="FOLDER",
        help="Ask the questions of MMLU in place of BABILong's. The folder holds the original CSV "
        "files, in dev, val and test. Answers are written to --out alone.",
    )
    add(
        "--shots",
        type=int,
        default=mmlu.MOST_SHOTS,
        choices=range(mmlu.MOST_SHOTS + 1),
        help="The number of examples before each question: the first ones of the subject's file in "
        "dev (default %(default)s).",
    )
    add(
        "--part",
        default="test",
        choices=mmlu.PARTS,
        help="The part of MMLU whose questions are asked (default test).",
    )
    add(
        "--score",
        default="letters",
        choices=mmlu.SCORES,
        help="How the model chooses. letters: the likeliest letter behind the question. answers: "
        "the likeliest text of an option, by its log-likelihood per byte (default letters).",
    )


def check_mmlu_flags(parser: Parser, args) -> None:
    """End the program if flags of MMLU and of BABILong are given together."""
    of_mmlu = ("mmlu", "shots", "part", "score")
    of_both = ("ckpt", "device", "out", "again")
    for name, value in vars(args).items():
        if name in of_both or value == parser.get_default(name):
            continue
        if args.mmlu is None and name in of_mmlu:
            parser.error(f"--{name} belongs to MMLU: give --mmlu FOLDER with it, or leave it out")
        if args.mmlu is not None and name not in of_mmlu:
            parser.error(f"--{name} belongs to BABILong: leave out --{name} or --mmlu")


def read_flags(argv: list[str] | None):
    """The flags, with the modes that they ask for as `modes`."""
    parser = Parser("babilong_eval.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--ckpt",
        nargs="+",
        default=["out/ckpt.pt"],
        help="The checkpoints of train.py to evaluate, or folders of released Llamas, as PATH or "
        "NAME=PATH (default out/ckpt.pt).",
    )
    add(
        "--tasks",
        nargs="+",
        help="The bAbI tasks to ask, such as qa1 qa2. Without it, those of the first model's "
        "training are asked.",
    )
    add(
        "--lengths",
        nargs="+",
        default=["0k", "1k", "2k", "4k", "8k", "16k"],
        help="The lengths of the documents in tokens. 0k has facts alone, and 64k:25 asks 25 "
        "samples (default 0k 1k 2k 4k 8k 16k).",
    )
    add(
        "--n",
        type=int,
        default=200,
        help="The number of samples of each task and length (default 200).",
    )
    add(
        "--memory",
        nargs="+",
        default=["on", "off"],
        choices=("on", "off", "other", "none"),
        help="How the memory is used. on: as in training. off: every segment is a document of its "
        "own. other: with the memory of another document. none: only --rag asks (default on off).",
    )
    add(
        "--rag",
        type=int,
        default=0,
        metavar="K",
        help="Ask also with the K sentences that BM25 finds closest to the question, in place of "
        "the document. With 0 this is not asked (default 0).",
    )
    add(
        "--metric",
        nargs="+",
        default=["exact", "official"],
        choices=("exact", "official"),
        help="The metrics that the tables show: exact match, and the benchmark's own (default "
        "exact official).",
    )
    add(
        "--source",
        default="generated",
        choices=("generated", "babi", "babilong"),
        help="Where the samples come from. Stories are generated, or read from original bAbI "
        "files. babilong takes the published samples as they are (default generated).",
    )
    add("--path", help="The file or folder that --source babi or babilong reads.")
    add(
        "--background",
        help="A folder of .txt files to hide facts in. Without it, Python's documentation is used.",
    )
    add(
        "--count",
        default="own",
        choices=COUNTS,
        help="What a length counts: the model's tokens, GPT-2's, or 4.4 characters. With the last "
        "two 4k is 3,700, as in the published files (default own).",
    )
    add(
        "--names",
        default="own",
        choices=babi_names.CHOICES,
        help="The names in generated stories: bAbI's own, the many of training with --names many, "
        "or unseen ones, which no training has (default own).",
    )
    add(
        "--template",
        action="store_true",
        help="Ask with an instruction, two examples and the marks of the benchmark around each "
        "document, for a model that was not trained on documents of this repository. Lengths "
        "count the document alone, and an answer is one line.",
    )
    add("--seed", type=int, default=0, help="The seed of the samples (default 0).")
    add(
        "--max_tokens",
        type=int,
        default=200_000,
        help="A batch has at most this many tokens of prompts. One document always goes, or two "
        "with --memory other (default 200000).",
    )
    add(
        "--device",
        default="auto",
        help="The device to compute on: auto, cpu or cuda (default auto).",
    )
    add(
        "--out",
        help="The file for the answers. Without it, they go to predictions.jsonl beside the first "
        "checkpoint.",
    )
    add(
        "--again",
        action="store_true",
        help="Replace all answers in --out, those of other models too, instead of going on.",
    )
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help='Print McNemar\'s test between two columns, such as "lm2 on" "lm2 off", on the '
        "questions that both have answered.",
    )
    add("--figures", help="Write the counts of every cell to this JSON file.")
    add(
        "--from_predictions",
        metavar="FILE",
        help="Ask nothing, and print the tables of this file of answers.",
    )
    add("--published", action="store_true", help="Print the figures of the papers, too.")
    add_mmlu_flags(parser)
    args = parser.parse_args(argv)
    check_mmlu_flags(parser, args)
    if args.n < 1 or args.max_tokens < 1 or args.rag < 0:
        parser.error(
            f"--n {args.n} and --max_tokens {args.max_tokens} must be at least 1, "
            f"--rag {args.rag} at least 0"
        )
    if (args.source == "generated") != (args.path is None):
        parser.error(
            f"--source {args.source} with --path {args.path}: --path belongs to babi and babilong"
        )
    if args.names != "own" and args.source != "generated":
        parser.error(
            f"--names {args.names} with --source {args.source}: only generated stories can have "
            "other names, leave one of the two out"
        )
    if args.template and args.from_predictions:
        parser.error(
            "--template with --from_predictions: the answers of a file stay as they were asked, "
            "leave one of the two out"
        )
    args.modes = []
    for mode in MODES:
        if mode in args.memory or (mode == "rag" and args.rag):
            args.modes.append(mode)
    if not args.modes:
        parser.error("--memory none asks nothing: give --rag K with it")
    return args


# -------------------------------------------------------------------------------------------------
# Checks. They find a mistake before any work begins, and raise ValueError.


def check_cells(samples: Samples, tasks: Iterable[str], lengths: Iterable[int]) -> None:
    """ValueError for an unknown task, a length too short for its facts or a published file that
    cannot be read."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is unknown: choose from {' '.join(TASKS)}")
        for length in lengths:
            samples(task, length, 0)


def check_figures(args, out: str | Path) -> None:
    """ValueError for --figures that would replace answers or a checkpoint."""
    if args.figures is None:
        return
    path = Path(args.figures)
    taken = [Path(out).resolve()]
    for text in args.ckpt:
        _, checkpoint = name_and_path(text)
        taken.append(checkpoint.resolve())
    is_json_in_a_folder = path.suffix == ".json" and not path.is_dir() and path.parent.is_dir()
    is_taken = path.resolve() in taken or path.resolve().parent in taken  # a model's folder
    if not is_json_in_a_folder or is_taken:
        raise ValueError(
            f"--figures {path}: name a .json file of its own, in a folder that is there"
        )


def check_out(args, out: Path) -> None:
    """ValueError for an --out that answers cannot be written to."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(
            f"--out {out} is a folder or in none: name a file in a folder that is there"
        )
    for text in args.ckpt:
        _, checkpoint = name_and_path(text)
        if out.exists() and out.samefile(checkpoint):
            raise ValueError(f"--out {out} is the checkpoint: name another file")
        if out.resolve().parent == checkpoint.resolve():
            raise ValueError(f"--out {out} lies among a model's files: name another folder")


def check_columns(args, models: list[Loaded]) -> None:
    """ValueError if --compare names a column that is not asked."""
    columns = [f"{loaded.name} {mode}" for loaded in models for mode in args.modes]
    for name in args.compare or ():
        if name not in columns:
            raise ValueError(f"--compare: column {name!r} is not asked: choose from {columns}")


def check_path(args, tasks: list[str], lengths: Iterable[int]) -> None:
    """ValueError if --path is one file where several are needed."""
    n_files = len(tasks)
    if args.source == "babilong":
        n_files *= len(list(lengths))
    if args.path and Path(args.path).is_file() and n_files > 1:
        raise ValueError(
            f"--path {args.path} is one file: give a folder for several tasks or lengths"
        )


# -------------------------------------------------------------------------------------------------
# A run


def print_tables(rows: list[dict], args) -> None:
    """Print what the flags ask for of these predictions, and write the figures."""
    cells = to_cells(rows)
    print(table(cells, args.metric))
    if args.compare:
        for metric in args.metric:
            print("\n" + compare(rows, *args.compare, metric))
    if args.published:
        print("\n" + published_table())
    if args.figures:
        save_json(dict(cells=cells), args.figures)


def describe(args, loaded: Loaded, device: torch.device) -> None:
    """Print what a model is, and whether it was trained on other prose than --background."""
    n_params, _ = loaded.model.n_params()
    segment_len = loaded.model.cfg.segment_len
    print(f"{loaded.name}: {n_params:,} parameters, segments of {segment_len}, {device}")
    if args.source == "babilong":
        return
    trained = loaded.train.get("background", args.background)
    if Path(trained or "").name != Path(args.background or "").name:
        print(
            f"{loaded.name} was trained on the prose of {trained or 'Python'}: --background names "
            "another"
        )


def read_source(args, tokenizer: Tokenizer, longest: int) -> tuple[Samples, str | None]:
    """The samples that the flags ask for, in a model's tokens, and a fingerprint of the background.

    longest  the length of the longest sample in tokens"""
    if args.source == "babilong":
        return Downloaded(args.path, tokenizer), None
    builder = Builder(tokenizer, "val", args.background, None, args.path, args.count, args.names)
    n_tokens = len(builder.prose)
    print(f"background of {n_tokens:,} tokens, {builder.chars_per_token:.2f} characters each")
    if args.source == "babi":
        print("questions of the files are drawn at random, with replacement")
    available = builder.size_before[-1]
    if longest > available:
        print(f"a sample of {length_name(longest)} goes round it {longest / available:.1f} times")
    text = "".join(builder.sentences).encode()
    return generated(builder, args.seed), hashlib.blake2b(text, digest_size=8).hexdigest()


def plan(args, tasks: list[str], counts: dict[int, int], samples: Samples) -> Work:
    """The cells to ask. Published files may have fewer samples than --n asks for."""
    work = []
    for task in tasks:
        for length, n in counts.items():
            have = n
            if isinstance(samples, Downloaded):
                have = len(samples.rows(task, length))
            if have < n:
                print(f"{task} {length_name(length)}: {have} samples published, not {n}")
            work.append((task, length, min(n, have)))
    if "other" in args.modes and min(n for _, _, n in work) < 2:
        raise ValueError(
            "--memory other needs 2 documents a cell, which lend each other a memory: give --n 2"
        )
    return work


def check_questions(rows: list[dict], samples: Samples, work: Work, out: Path) -> None:
    """ValueError if the first sample of a cell is no longer the one that was answered, as when the
    files of --path have changed. rows  the predictions of one model"""
    answered = {}  # (task, length) -> the questions that were answered as the first sample
    for row in rows:
        if row["i"] == 0:
            asked = answered.setdefault((row["task"], row["length"]), set())
            asked.add((row["question"], row["target"]))
    for task, length, _ in work:
        if (task, length) not in answered:
            continue
        question = samples(task, length, 0).questions[0]  # made once, as it may be long
        if answered[task, length] != {(question.text, question.answer)}:
            raise ValueError(
                f"{out} has answers to other questions of {task} {length_name(length)}: give "
                "another --out, or --again to replace all in it"
            )


def settings_of(args, loaded: Loaded, background: str | None) -> dict:
    """What the answers of a model depend on.

    background  a fingerprint of the background's text, None for published samples"""
    settings = dict(
        model=loaded.name,
        checkpoint=loaded.digest,
        source=args.source,
        path=args.path,
        background=background,
        count=args.count,
        seed=args.seed,
        rag=args.rag,
        bfloat16=loaded.model.norm.weight.is_cuda,
    )
    if args.names != "own":  # see UNSAID
        settings["names"] = args.names
    if args.template:
        settings["template"] = True
    return settings


def tokenizer_key(loaded: Loaded) -> str:
    """What models with the same tokenizer have in common."""
    return str(loaded.tokenizer.for_checkpoint())


def run(args) -> None:
    """Ask all models, from where an earlier run stopped, and show the answers."""
    device = pick_device(args.device)
    counts = read_lengths(args.lengths, args.n)
    models = read_models(args.ckpt, device)
    trained_tasks = models[0].train.get("tasks", ("qa1",))
    if isinstance(trained_tasks, str):  # in older checkpoints
        trained_tasks = trained_tasks.split()
    tasks = list(dict.fromkeys(args.tasks or trained_tasks))
    _, first_path = name_and_path(args.ckpt[0])
    out = Path(args.out or first_path.resolve().with_name("predictions.jsonl"))
    check_out(args, out)
    check_columns(args, models)
    check_path(args, tasks, counts)
    check_figures(args, out)

    sources = {}  # models that have the same tokenizer share their samples
    settings = []
    for loaded in models:
        describe(args, loaded, device)
        key = tokenizer_key(loaded)
        if key not in sources:
            sources[key] = read_source(args, loaded.tokenizer, max(counts))
        samples, background = sources[key]
        check_cells(samples, tasks, counts)
        settings.append(settings_of(args, loaded, background))
    if len(sources) > 1 and args.count == "own":
        print(
            "lengths are in each model's own tokens, so the texts differ: --count chars makes "
            "them equal"
        )
    work = plan(args, tasks, counts, samples)
    asked = set()
    for loaded in models:
        for task, length, n in work:
            for i in range(n):
                asked.update((loaded.name, task, length, i, mode) for mode in args.modes)

    predictions = Predictions(out, settings, args.again)
    for loaded in models:
        samples, _ = sources[tokenizer_key(loaded)]
        own_rows = [row for row in predictions.rows if row["model"] == loaded.name]
        check_questions(own_rows, samples, work, out)
    n_done = len(asked & predictions.done)
    if n_done:
        print(f"{out} has {n_done:,} of {len(asked):,} answers already")
    began = time.perf_counter()
    for loaded in models:
        samples, _ = sources[tokenizer_key(loaded)]
        for rows in evaluate(
            loaded.model,
            loaded.tokenizer,
            samples,
            work,
            args.modes,
            args.rag,
            args.max_tokens,
            loaded.name,
            predictions.done,
            show=True,
            names=args.names,
            template=args.template,
        ):
            predictions.add(rows)
    print(f"it took {(time.perf_counter() - began) / 60:.1f} minutes\n")
    shown = [row for row in predictions.rows if key_of(row) in asked]
    print_tables(shown, args)
    print("\n" + report_cost(shown))
    print(f"peak resident set {peak_memory() / 2**20:.0f} MiB")
    print(f"answers in {out}")


def run_mmlu(args) -> None:
    """Ask all models the questions of MMLU, and show how many answers are right."""
    device = pick_device(args.device)
    subjects = mmlu.read_subjects(Path(args.mmlu), args.part, args.shots)
    models = read_models(args.ckpt, device)
    if args.out:
        out = Path(args.out)
        check_out(args, out)
        if out.exists() and not args.again:
            raise ValueError(f"--out {out} is there: give another --out, or --again to replace it")
    missing = sorted(mmlu.CATEGORY_OF.keys() - subjects.keys())
    if missing:
        print(f"left out, as {args.mmlu}/{args.part} has no file of them: {', '.join(missing)}")
    answers = []
    for loaded in models:
        loaded.model.float()  # in bfloat16 the logits of two letters would often be equal
        answered = mmlu.ask(loaded.model, loaded.tokenizer, subjects, args.score, loaded.name)
        n_short = sum(answer["shots"] < args.shots for answer in answered)
        if n_short:
            print(
                f"{loaded.name} got fewer than {args.shots} examples in {n_short:,} of "
                f"{len(answered):,} prompts: its segments have {loaded.model.cfg.segment_len} "
                "tokens, and it has no memory"
            )
        n_tied = sum(answer["tied"] for answer in answered)
        if n_tied:
            print(
                f"{loaded.name} had two best options of equal score in {n_tied:,} of "
                f"{len(answered):,} questions: the first one counts as chosen"
            )
        answers.extend(answered)
    print(f"MMLU, {args.part}, {args.shots} examples, the model chooses by {args.score}\n")
    print(mmlu.table(answers, wilson))
    if args.out:
        save(answers, out)
        print(f"answers in {out}")


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    keep_freed_memory()
    with one_line("babilong_eval.py"):
        if args.from_predictions:
            check_figures(args, args.from_predictions)
            print_tables(load(args.from_predictions), args)
        elif args.mmlu is not None:
            run_mmlu(args)
        else:
            run(args)


if __name__ == "__main__":
    main()
