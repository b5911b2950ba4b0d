"""Measure whether the memory writes, reads and uses the facts that a question needs.

    python assets/inside.py --ckpt assets/five.pt --tasks qa1 --length 2k --out out/inside.json
    python assets/pictures.py inside out/inside.json --out out/inside.png

Prints three tables for each task, and writes them to --out as JSON. A picture of one document, as
assets/heatmaps.py draws it, shows what happened there. These are means over many documents, each
beside what it would be if the memory did not care about the needed facts. Each block that has a
memory has a line.

write   R says how much the slots take from a token. The first columns have the mean R of three
        kinds of tokens, where 1 is the average token of the document. The slots do not know the
        question yet, so the other facts should get as much as the needed ones, and prose less. The
        last column adds up R over all tokens of a needed fact: this part of a slot's update comes
        from the fact.
read    Of all that the question's tokens read, this part comes from the needed facts. A bank is a
        sum of what each token has given to it, so the part is exact (see `read_by_part`).
        `last token` is the same for the last token alone, as in the paper's Fig. 6. Three columns
        are there to compare with:
        other question  the same bank is asked for something else that the facts mention. The
                        needed facts' part should fall;
        read evenly     all slots are read alike. The part should be lower;
        other facts     as many facts that the question does not need. Their part should be lower.
answer  How often the answer's first token is right. In the line of a block, the slots of this block
        alone take nothing from the needed facts. In the line `all`, no block takes anything from
        the needed facts, and in its second column no block takes anything from the other facts.
        Above the table stands how often the other question gets another answer: hardly ever, if
        the model does not care what is asked.

In tasks where two questions can need the same facts (qa2, qa3, qa5) the other question is no clean
comparison. Nor does another question always have another answer.

A sample counts if its needed facts and another one lie before the last segment, if its question
lies in it, and if something else that the facts mention can be asked. An interval is the mean +-
1.96 standard errors, and Wilson's for answers. It says nothing of other seeds of the model.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/inside.py`

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from babilong_eval import last_segment_start, wilson  # noqa: E402
from data.babi import check_tasks  # noqa: E402
from data.babilong import Builder, Samples, generated  # noqa: E402
from data.common import Parser, one_line, save_json  # noqa: E402
from data.document import Document, length_name, parse_length  # noqa: E402
from data.tokenizer import of_checkpoint  # noqa: E402
from heatmaps import check_memory, read_segments, recording  # noqa: E402
from lm2 import LM2, Memory, State, load_checkpoint  # noqa: E402

NEEDED, OTHER, PROSE = range(3)  # the kinds of tokens: of a needed fact, of another one, all else
N_PARTS = 4  # of a bank: what tokens of each kind have given, and what is left of M_0

# The columns of each table, with their keys in a block's figures.
WEIGHTS = {
    "write_needed": "needed facts",
    "write_other": "other facts",
    "write_prose": "prose",
}
SHARE = {"write_share": "share of R, %"}
READ = {
    "read_needed": "needed facts",
    "read_last_token": "last token",
    "read_other_question": "other question",
    "read_evenly": "read evenly",
    "read_other_facts": "other facts",
}

# What was measured in a sample or in one of its blocks; None where there is no such token.
Figures = dict[str, float | bool | None]
Interval = list[float] | None  # a mean and the ends of its 95 % interval; None without any value


# -------------------------------------------------------------------------------------------------
# One document


def needed_facts(doc: Document) -> set[int]:
    """The numbers of the facts that the question needs."""
    return set(doc.questions[0].support)


def other_facts(doc: Document, segment_len: int) -> list[int]:
    """The numbers of the facts that the question does not need and that end before the segment of
    its last token, so that all of their tokens are written."""
    start = last_segment_start(doc.prompt(), segment_len)
    needed = needed_facts(doc)
    return [i for i, (_, stop) in enumerate(doc.facts) if i not in needed and stop <= start]


def is_measured(doc: Document, segment_len: int) -> bool:
    """Whether a document is measured, as the module says."""
    question_is_together = doc.context_len >= last_segment_start(doc.prompt(), segment_len)
    return bool(doc.outside(segment_len) and question_is_together and other_facts(doc, segment_len))


def kinds_of_tokens(doc: Document, segment_len: int) -> Tensor:
    """The kind of each token of the prompt, (T,)."""
    kinds = torch.full((len(doc.prompt()),), PROSE)
    for i in needed_facts(doc):
        start, stop = doc.facts[i]
        kinds[start:stop] = NEEDED
    for i in other_facts(doc, segment_len):
        start, stop = doc.facts[i]
        kinds[start:stop] = OTHER
    return kinds


@contextmanager
def erasing(model: LM2, erased: dict[int, Tensor]) -> Iterator[None]:
    """Within it the slots take nothing from some tokens of a document that is read from its start,
    though these tokens get their weight R as before. What tokens offer is recorded as
    `candidates`, (B, HM, S, D/HM).

    erased  for each block with a memory, which tokens of each row are erased, (B, T)"""

    def write(memory: Memory, segments: Iterator[Tensor], M: Tensor, Q: Tensor, offered: Tensor):
        is_erased = next(segments)[:, None, :, None]  # (B, 1, S, 1)
        candidates = offered.masked_fill(is_erased, 0)
        memory.record(candidates=candidates)
        return Memory.write(memory, M, Q, candidates)

    memories = [model.layers[i].memory for i in erased]
    try:
        for memory, mask in zip(memories, erased.values(), strict=True):
            segments = iter(mask.split(model.cfg.segment_len, dim=1))
            memory.write = partial(write, memory, segments)
        yield
    finally:
        for memory in memories:
            vars(memory).pop("write", None)  # the method of the class is there again


def parts_after(memory: Memory, parts: Tensor, note: dict, kinds: Tensor) -> Tensor:
    """The parts of a bank (4, N, D) after the write of a segment whose tokens have these kinds.

    Eq. (6), M <- sum over tokens of R * candidates + (1 - w (1 - g_forget)) * M, is a sum over
    tokens. So each kind of tokens has a part of its own, and the parts add up to the bank."""
    R = note["R"][0][0]  # (HM, N, S+1)
    candidates = note["candidates"][0]  # (HM, S, D/HM)
    share = 1 - R[..., -1:]
    w = memory.merge(share.expand(*share.shape[:-1], candidates.shape[-1]))  # (N, D)
    kept = 1 - w * (1 - note["g_forget"][0][0])
    parts = kept * parts
    R_of_tokens = R[..., :-1]
    for kind in (NEEDED, OTHER, PROSE):
        R_of_kind = R_of_tokens.masked_fill(kinds != kind, 0)
        parts[kind] += memory.merge(R_of_kind.to(candidates.dtype) @ candidates)
    return parts


def read_by_part(memory: Memory, parts: Tensor, A: Tensor, g_out: Tensor) -> Tensor:
    """What tokens read from each part of a bank, (4, n, D). The parts add up to E_gated.

    V = norm(M) W_V is linear in M once the norm's scale is known, and so is E_gated = g_out * A V.

    parts  (4, N, D)
    A      how much the tokens read from each slot, (HM, n, N)
    g_out  (n, D)"""
    M = parts.sum(dim=0)
    norm = memory.bank_norm
    scale = (M.pow(2).mean(dim=-1, keepdim=True) + norm.eps).rsqrt()  # (N, 1)
    V = memory.heads(memory.wv((parts * scale).to(norm.weight.dtype) * norm.weight))
    return g_out * memory.merge(A @ V)


def shares_of(by_part: Tensor) -> list[float]:
    """The share that each part of (4, n, D) has in their sum x: <part, x> / <x, x>.

    The shares add up to 1. One is below 0 if the part points away from the sum."""
    x = by_part.sum(dim=0)
    squared = x.pow(2).sum().clamp(min=1e-30)  # where nothing is read all shares are 0
    return ((by_part * x).sum(dim=(-2, -1)) / squared).tolist()


def reads_of_tokens(note: dict, first: int, n: int) -> tuple[Tensor, Tensor]:
    """A (HM, n, N) and g_out (n, D) of n tokens of the last segment of row 0, from `first` on."""
    A = note["A"][0, -1, :, first : first + n]
    g_out = note["g_out"][0, -1, first : first + n]
    return A, g_out


def weight(R: Tensor, is_kind: Tensor) -> float | None:
    """The mean weight R of some tokens, where 1 is the mean of all; None without such tokens."""
    if not is_kind.any():
        return None
    return float(R[is_kind].mean() / R.mean())


class Reading(NamedTuple):
    """What is seen while a document is read, for each block by its number."""

    parts: dict[int, Tensor]  # of the bank that the last segment finds, (4, N, D)
    R: dict[int, Tensor]  # of each written token, the mean over heads and slots
    notes: dict[int, dict]  # what was recorded in the call on the last segment
    state_before: State  # the state in which that call began
    answers: list[int]  # in each row, the likeliest token behind the question


@torch.no_grad()
def read_in_parts(
    model: LM2, doc: Document, kinds: Tensor, erased: dict[int, Tensor], n_rows: int
) -> Reading:
    """Read a document in several rows, in which different tokens are erased. All but `answers` is
    told of row 0."""
    S = model.cfg.segment_len
    parts = {}
    R = {}
    for i in model.cfg.mem_blocks:
        M = model.first_carried(1)[i][0]
        parts[i] = torch.zeros(N_PARTS, *M.shape, dtype=M.dtype)
        parts[i][-1] = M
        R[i] = []
    rows = torch.from_numpy(doc.prompt()).repeat(n_rows, 1)
    state = None
    with erasing(model, erased):
        for start, notes, logits, next_state in read_segments(model, rows):
            state_before = state
            state = next_state
            likeliest = logits.argmax(dim=-1)
            if start == 0:
                continue  # the first segment is written in the second call
            for note in notes:
                i = note["layer"]
                memory = model.layers[i].memory
                parts[i] = parts_after(memory, parts[i], note, kinds[start - S : start])
                R[i].append(note["R"][0][0, :, :, :-1].mean(dim=(0, 1)))
    return Reading(
        parts=parts,
        R={i: torch.cat(pieces) for i, pieces in R.items()},
        notes={note["layer"]: note for note in notes},
        state_before=state_before,
        answers=likeliest.tolist(),
    )


@torch.no_grad()
def measure(model: LM2, doc: Document, second: np.ndarray) -> tuple[Figures, dict[int, Figures]]:
    """The figures of a document that `is_measured`, and those of each of its blocks.

    second  the ids of another question, which ends in the same segment"""
    S = model.cfg.segment_len
    blocks = model.cfg.mem_blocks
    kinds = kinds_of_tokens(doc, S)
    # Row 0 is the document as it is. In row 1 + k the needed facts are erased from the k-th block,
    # in the last two rows the needed and the other facts from all blocks.
    n_rows = len(blocks) + 3
    erased = {}
    for k, i in enumerate(blocks):
        erased[i] = torch.zeros(n_rows, len(kinds), dtype=torch.bool)
        erased[i][1 + k] = kinds == NEEDED
        erased[i][-2] = kinds == NEEDED
        erased[i][-1] = kinds == OTHER
    seen = read_in_parts(model, doc, kinds, erased, n_rows)

    start = last_segment_start(doc.prompt(), S)
    context = doc.ids[start : doc.context_len]  # of the last segment
    asked_second = torch.from_numpy(np.concatenate((context, second)))[None]
    with recording(model) as notes_of_second:
        logits, _, _ = model(asked_second, state=seen.state_before.map(lambda tensor: tensor[:1]))

    first_answer, _ = doc.answers[0]
    is_right = [answer == doc.ids[first_answer] for answer in seen.answers]
    n_needed = len(needed_facts(doc))
    n_other = len(other_facts(doc, S))
    n_asked = len(doc.prompt()) - doc.context_len
    of_blocks = {}
    for k, (i, note_of_second) in enumerate(zip(blocks, notes_of_second, strict=True)):
        memory = model.layers[i].memory
        parts = seen.parts[i]
        A, g_out = reads_of_tokens(seen.notes[i], len(context), n_asked)
        by_part = read_by_part(memory, parts, A, g_out)
        shares = shares_of(by_part)
        even_A = torch.full_like(A, 1 / A.shape[-1])
        even_shares = shares_of(read_by_part(memory, parts, even_A, g_out))
        A, g_out = reads_of_tokens(note_of_second, len(context), len(second))
        second_shares = shares_of(read_by_part(memory, parts, A, g_out))
        R = seen.R[i]
        written = kinds[: len(R)]
        of_blocks[i] = dict(
            write_needed=weight(R, written == NEEDED),
            write_other=weight(R, written == OTHER),
            write_prose=weight(R, written == PROSE),
            write_share=100 * float(R[written == NEEDED].sum()) / n_needed,
            read_needed=100 * shares[NEEDED],
            read_last_token=100 * shares_of(by_part[:, -1:])[NEEDED],
            read_other_question=100 * second_shares[NEEDED],
            read_evenly=100 * even_shares[NEEDED],
            read_other_facts=100 * shares[OTHER] / n_other * n_needed,
            right_without_needed=bool(is_right[1 + k]),
        )
    of_document = dict(
        right=bool(is_right[0]),
        right_without_needed=bool(is_right[-2]),
        right_without_others=bool(is_right[-1]),
        changed_by_question=int(logits[0, -1].argmax()) != seen.answers[0],
    )
    return of_document, of_blocks


# -------------------------------------------------------------------------------------------------
# Many documents


def words(text: str) -> set[str]:
    """The words of a text, each once."""
    return set(re.findall(r"\w+", text))


def another_question(
    doc: Document, samples: Samples, task: str, number: int, builder: Builder, segment_len: int
) -> np.ndarray | None:
    """The ids of another question that could be asked about a document, which is sample `number`
    of its task.

    It is the first question of the next 50 samples that differs, has no word that the document's
    facts and question lack, and ends in the same segment. None if there is no such one."""
    question = doc.questions[0]
    known = words(" ".join([*doc.texts, question.text]))
    last_segment = last_segment_start(doc.prompt(), segment_len)
    for later in range(number + 1, number + 51):
        text = samples(task, 0, later).questions[0].text
        ids = builder.ids(text)
        end = doc.context_len + len(ids)
        ends_together = last_segment_start(range(end), segment_len) == last_segment
        if text != question.text and words(text) <= known and ends_together:
            return ids
    return None


def mean_and_interval(values: list[float]) -> Interval:
    """The mean, and 1.96 standard errors below and above it."""
    if not values:
        return None
    mean = statistics.fmean(values)
    error = 0.0
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return [mean, mean - 1.96 * error, mean + 1.96 * error]


def summary(samples: list[Figures]) -> dict[str, Interval]:
    """The mean and interval of each figure; of those that are true or false, how many are true in
    %."""
    means = {}
    for name in samples[0]:
        values = [figures[name] for figures in samples if figures[name] is not None]
        if isinstance(samples[0][name], bool):
            n_true = sum(values)
            low, high = wilson(n_true, len(values))
            means[name] = [100 * n_true / len(values), 100 * low, 100 * high]
        else:
            means[name] = mean_and_interval(values)
    return means


def measure_task(model: LM2, builder: Builder, task: str, length: int, n: int, seed: int) -> dict:
    """The figures of a task, over those of n samples that count. ValueError if none counts."""
    samples = generated(builder, seed)
    S = model.cfg.segment_len
    of_documents = []
    of_blocks = {i: [] for i in model.cfg.mem_blocks}
    for number in tqdm(range(n), desc=task, leave=False, disable=None):
        doc = samples(task, length, number)
        if not is_measured(doc, S):
            continue
        second = another_question(doc, samples, task, number, builder, S)
        if second is None:
            continue
        of_document, figures = measure(model, doc, second)
        of_documents.append(of_document)
        for i in of_blocks:
            of_blocks[i].append(figures[i])
    if not of_documents:
        raise ValueError(
            f"{task} at {length_name(length)}: in none of {n} samples are all needed facts and "
            f"another one before the last segment of {S} tokens: give a longer --length"
        )
    blocks = [dict(block=i, **summary(of_blocks[i])) for i in of_blocks]
    cell = dict(task=task, length=length, n=len(of_documents), n_asked=n, blocks=blocks)
    return cell | summary(of_documents)


# -------------------------------------------------------------------------------------------------
# The table and the file


def percent(interval: Interval) -> str:
    """A mean in % with its interval: "62.3 [58, 67]"."""
    mean, low, high = interval
    return f"{mean:.1f} [{round(low)}, {round(high)}]"


def ratio(interval: Interval) -> str:
    """A mean weight with its interval: "10.4 [8.3, 12.4]", "-" without one."""
    if interval is None:
        return "-"
    mean, low, high = interval
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def line(first: object, entries: list[str], width: int = 17) -> str:
    """A line of a table with columns of this width."""
    return f"{first:<6}" + " ".join(f"{text:>{width}}" for text in entries)


def table(cell: dict) -> str:
    """The three tables of a task, 80 columns wide."""
    name = f"{cell['task']} at {length_name(cell['length'])}"
    lines = [
        f"{name}: {cell['n']} of {cell['n_asked']} samples count",
        "",
        "write: the weight R of a token, 1 is the average",
        line("block", [*WEIGHTS.values(), *SHARE.values()]),
    ]
    for block in cell["blocks"]:
        entries = [ratio(block[key]) for key in WEIGHTS]
        entries += [percent(block[key]) for key in SHARE]
        lines.append(line(block["block"], entries))
    lines += ["", "read: the share of what the question reads, %"]
    lines.append(line("block", list(READ.values()), 14))
    for block in cell["blocks"]:
        lines.append(line(block["block"], [percent(block[key]) for key in READ], 14))
    lines += [
        "",
        f"answer: right in %, {percent(cell['right'])} with nothing erased; the other question",
        f"changes the answer in {percent(cell['changed_by_question'])} %",
        line("block", ["needed erased", "others erased"]),
    ]
    for block in cell["blocks"]:
        lines.append(line(block["block"], [percent(block["right_without_needed"])]))
    of_all_blocks = [cell["right_without_needed"], cell["right_without_others"]]
    lines.append(line("all", [percent(interval) for interval in of_all_blocks]))
    return "\n".join(lines)


def load_inside(path: str) -> dict:
    """The content of a file of --out. ValueError if it is not one."""
    try:
        figures = json.loads(Path(path).read_bytes())
        cells = figures["cells"]
        keys = [*WEIGHTS, *SHARE, *READ, "right_without_needed"]
        is_sound = bool(cells) and "ckpt" in figures
        for cell in cells:
            is_sound = is_sound and {"task", "length", "n", "right"} <= cell.keys()
            for block in cell["blocks"]:
                is_sound = is_sound and {"block", *keys} <= block.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{path} holds no such figures: write it with assets/inside.py --out")
    return figures


def main(argv: list[str] | None = None) -> None:
    """Print the tables of a checkpoint."""
    parser = Parser("python assets/inside.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", default="out/ckpt.pt", help="a checkpoint of train.py (default out/ckpt.pt)")
    add("--tasks", nargs="+", default=["qa1"], help="the tasks of the samples (default qa1)")
    add(
        "--length",
        default="4k",
        help="how many tokens of facts and background a sample has (default 4k)",
    )
    add("--n", type=int, default=200, help="how many samples of a task are made (default 200)")
    add("--seed", type=int, default=0, help="the seed of the samples (default 0)")
    add(
        "--background",
        help="a folder of .txt files with prose (default Python's own documentation)",
    )
    add("--out", help="a file for the figures as JSON, which assets/pictures.py inside draws")
    args = parser.parse_args(argv)
    with one_line("python assets/inside.py"):
        length = parse_length(args.length)
        if args.n < 1:
            raise ValueError(f"--n {args.n} must be at least 1")
        check_tasks(args.tasks)
        if args.out and Path(args.out).is_dir():
            raise ValueError(f"--out {args.out} is a folder: name a file in it")
        if args.out and not Path(args.out).parent.is_dir():
            raise ValueError(f"--out {args.out}: make its folder first, or name another")
        model, content = load_checkpoint(args.ckpt)
        check_memory(model)
        tokenizer = of_checkpoint(content, args.ckpt)
        builder = Builder(tokenizer, "val", args.background)
        cells = []
        for task in args.tasks:
            cells.append(measure_task(model.eval(), builder, task, length, args.n, args.seed))
            print(table(cells[-1]) + "\n", flush=True)
            if args.out:
                save_json(dict(ckpt=args.ckpt, seed=args.seed, cells=cells), args.out)


if __name__ == "__main__":
    main()
