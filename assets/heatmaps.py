"""Heat maps of the memory on one document: what its last tokens read, what slots were written from.

    python assets/pictures.py read --out read.png
    python assets/pictures.py write --out write.png

Writes nothing: it computes A and R, and draws them into a figure that assets/pictures.py makes and
saves.

read    A (paper, Fig. 6): a row for each token of the last segment, a column for each slot; a row
        sums to 1. Before: the bank is at M_0. After: as the earlier segments have written it. In
        the last row, the end of the question, the answer is looked up.
write   R: a row for each sentence, summed over its tokens, a column for each slot. Within a segment
        a column sums to 1 together with what the slot declined (the null), which the grey rows show
        as the mean over slots. Facts are bold, those that the question needs have an arrow. A slot
        that keeps facts is dark in bold rows and pale in all others. The last segment is not shown:
        it is written only when another one begins.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from babilong_eval import answer, last_segment_start, read_before_last
from data.document import Document
from data.tokenizer import Tokenizer
from lm2 import LM2, State

TOKENS = 40  # rows of a read: the document's last tokens
ROWS = 60  # rows of a write, besides one for each gap: segments that do not fit are left out
PANELS = 4  # blocks of a write, side by side
LETTERS = 46  # of a sentence
FACT = "#A63600"  # the colour of facts, dark enough to be read in grey


class Row(NamedTuple):
    """A row of a write: a sentence, or what slots declined of one segment or several."""

    text: str
    kind: str  # "prose", "fact", "needed" or "declined"
    share: Tensor  # (L, N), for each block and slot: R of the sentence, or of the null


class Written(NamedTuple):
    """What the slots took from one segment."""

    starts: list[int]  # where its sentences start, the first one cut by the segment's start
    share: Tensor  # (L, N, sentences + 1), R summed over the tokens of each, the null last


def pick(x: Tensor, head: str) -> Tensor:
    """One head of x (HM, ...), or the mean over them; ValueError for a head that is not there."""
    if head == "mean":
        return x.mean(dim=0)
    if head not in [str(i) for i in range(len(x))]:
        raise ValueError(
            f"--head {head!r} is not there: give mean or a number from 0 to {len(x) - 1}"
        )
    return x[int(head)]


def check_memory(model: LM2) -> None:
    """ValueError for a model without slots."""
    if not model.cfg.mem_blocks:
        raise ValueError("the model has no memory: choose a checkpoint with n_mem_layer above 0")
    if model.cfg.memory_kind != "lm2":
        raise ValueError(
            f"the model's memory is of the kind {model.cfg.memory_kind}, which has no slots: "
            "choose a checkpoint with memory_kind lm2"
        )


def prepare(model: LM2, doc: Document, layer: int | None) -> Tensor:
    """The document's prompt (1, T). ValueError where there is no memory, no such block, or nothing
    was written."""
    check_memory(model)
    blocks = model.cfg.mem_blocks
    ids = torch.from_numpy(doc.prompt())[None]
    if layer is not None and layer not in blocks:
        choices = " or ".join(str(i) for i in blocks)
        raise ValueError(f"--layer {layer} has no memory: give {choices}")
    if last_segment_start(ids[0], model.cfg.segment_len) == 0:
        raise ValueError(
            f"the document has {ids.shape[1]} tokens, no more than one segment of "
            f"{model.cfg.segment_len}: nothing was written before its end, give a longer one"
        )
    return ids


@contextmanager
def recording(model: LM2) -> Iterator[list[dict]]:
    """Record what the blocks with memory compute. Within it every call of the model adds a dict for
    each of them to the list:

    layer        which block
    g_in         (B, G-1, S, D) of the segments that are written
    R, g_forget  lists with an item for each write: (B, HM, N, S+1), (B, N, D)
    A, g_out     (B, G, HM, S, N), (B, G, S, D)"""
    notes = []

    def record(layer: int, **seen: Tensor) -> None:
        is_new_call = not notes or "A" in notes[-1]  # a block records its read last
        if is_new_call:
            notes.append(dict(layer=layer, R=[], g_forget=[]))
        for key, x in seen.items():
            if key in ("R", "g_forget"):
                notes[-1][key].append(x)
            else:
                notes[-1][key] = x

    memories = [(i, b.memory) for i, b in enumerate(model.layers) if b.memory is not None]
    try:
        for i, memory in memories:
            memory.record = partial(record, i)
        with torch.compiler.set_stance("force_eager"):  # a compiled block would not call it
            yield notes
    finally:
        for _, memory in memories:
            vars(memory).pop("record", None)  # the method of the class is there again


@torch.no_grad()
def reads(model: LM2, ids: Tensor, head: str) -> tuple[Tensor, Tensor]:
    """A in the last segment of ids (1, T), (L, tokens, N): from banks at M_0, and from those that
    the segments before have written."""
    start = last_segment_start(ids[0], model.cfg.segment_len)
    last = ids[:, start:]
    maps_of_states = []
    for state in (None, model.read(ids[:, :start])):
        with recording(model) as notes:
            model(last, state=state)
        # (B, G, HM, S, N): the segment before is read again with the last one, which is filled up
        maps = [pick(note["A"][0, -1, :, : last.shape[1]], head) for note in notes]
        maps_of_states.append(torch.stack(maps))  # (L, tokens, N)
    before, after = maps_of_states
    return before, after


def read_segments(model: LM2, ids: Tensor) -> Iterator[tuple[int, list[dict], Tensor, State]]:
    """Read ids (B, T) one segment at a time, as R of a million tokens is gigabytes.

    Yields for each segment where it starts, what the blocks recorded, the logits at its last token,
    (B, vocab), and the state after it. The call that reads a segment writes the one before it."""
    n_rows, T = ids.shape
    S = model.cfg.segment_len
    state = None
    for start in range(0, T, S):
        segment = ids[:, start : start + S]
        n = segment.shape[1]
        last_tokens = torch.arange(n_rows, device=ids.device) * n + n - 1
        with torch.no_grad(), recording(model) as notes:
            logits, _, state = model(segment, state=state, at=last_tokens)
        yield start, notes, logits, state


def writes(model: LM2, ids: Tensor, cuts: list[int], head: str) -> list[Written]:
    """What the slots took from each segment of ids (1, T) but the last; `cuts` is where the
    document's sentences start."""
    S = model.cfg.segment_len
    written = []
    for start, notes, _, _ in read_segments(model, ids):
        if start == 0:
            continue  # the first segment is written in the second call
        first = start - S  # where the segment starts that was written now
        R = torch.stack([pick(note["R"][0][0], head) for note in notes])  # (L, N, S+1)
        starts = [first, *cuts[bisect_right(cuts, first) : bisect_left(cuts, start)]]
        edges = [*starts, start, start + 1]  # the null is the last
        parts = []
        for a, b in zip(edges, edges[1:], strict=False):
            parts.append(R[..., a - first : b - first].sum(dim=-1))
        written.append(Written(starts, torch.stack(parts, dim=-1)))
    return written


def shown(sizes: list[int], holds_facts: list[bool], most: int) -> set[int]:
    """Which segments to show in `most` rows: those that hold facts first, of them the latest first;
    at least one."""
    order = sorted(range(len(sizes)), key=lambda g: (holds_facts[g], g), reverse=True)
    chosen = set()
    room = most
    for g in order:
        if chosen and sizes[g] > room:
            break
        chosen.add(g)
        room -= sizes[g]
    return chosen


def rows(model: LM2, tokenizer: Tokenizer, doc: Document, head: str, most: int = ROWS) -> list[Row]:
    """The rows of a write, in the document's order. Of the segments that are left out, only what
    was declined is shown."""
    ids = prepare(model, doc, None)
    segments = writes(model, ids, doc.cuts, head)
    needed = {doc.places[i] for i in doc.questions[0].support}
    kind_of_sentence = {i: "needed" if i in needed else "fact" for i in doc.places}
    kinds = []
    for starts, _ in segments:
        sentences = [bisect_right(doc.cuts, a) - 1 for a in starts]
        kinds.append([kind_of_sentence.get(i, "prose") for i in sentences])
    sizes = [len(k) + 1 for k in kinds]
    holds_facts = [set(k) != {"prose"} for k in kinds]
    chosen = shown(sizes, holds_facts, most)
    lines = []
    for visible, neighbours in groupby(range(len(segments)), chosen.__contains__):
        run = list(neighbours)
        if visible:
            for g in run:
                starts, share = segments[g]
                stops = [*starts[1:], (g + 1) * model.cfg.segment_len]
                for i, (a, b) in enumerate(zip(starts, stops, strict=True)):
                    text = tokenizer.decode(ids[0, a:b].tolist())
                    lines.append(Row(text, kinds[g][i], share[..., i]))
                lines.append(Row(f"segment {g + 1}: declined", "declined", share[..., -1]))
        else:
            if len(run) == 1:
                name = f"segment {run[0] + 1}"
            else:
                name = f"segments {run[0] + 1} to {run[-1] + 1}"
            declined = torch.stack([segments[g].share[..., -1] for g in run]).mean(dim=0)
            lines.append(Row(f"{name}, not shown: declined", "declined", declined))
    return lines


def said(model: LM2, tokenizer: Tokenizer, doc: Document, memory: bool) -> str:
    """The model's answer to the document, with the memory or without."""
    prompts = [doc.prompt()]
    state = read_before_last(model, prompts) if memory else None
    return answer(model, tokenizer, prompts, state)[0]


def plain(text: str, most: int = LETTERS) -> str:
    """A text as a label: white space made single, cut behind `most` letters, and no sign read as
    mathematics."""
    text = " ".join(text.split()) or "\u2423"
    if len(text) > most:
        text = text[: most - 1].rstrip() + "\u2026"
    return text.replace("$", r"\$")


def asked(doc: Document) -> str:
    """The question, with the right answer if it is known."""
    question = doc.questions[0]
    text = plain(question.text, 70)
    if question.answer:
        text += f" Right: {plain(question.answer)}."
    return text


def heads(head: str) -> str:
    """What the title says of --head."""
    return "mean over heads" if head == "mean" else f"head {head}"


def heat(ax, values: Tensor, most: float, title: str):
    """Draw a heat map from 0 to `most`, with slots from left to right. Returns its image."""
    ax.set_facecolor("0.9")  # NaN stays grey
    image = ax.imshow(values.float().numpy(), cmap="Blues", vmin=0, vmax=most, aspect="auto")
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("slot", fontsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    return image


def scale(bar, text: str) -> None:
    """Name a colour bar."""
    bar.set_label(text, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def draw_read(
    fig, model: LM2, tokenizer: Tokenizer, doc: Document, layer: int | None, head: str
) -> None:
    """Draw A before and after the earlier segments were written. Without a layer it is that of the
    block in which the last token reads a single slot most."""
    ids = prepare(model, doc, layer)
    before, after = reads(model, ids, head)
    blocks = model.cfg.mem_blocks
    if layer is None:
        layer = blocks[int(after[:, -1].amax(dim=-1).argmax())]
    place = blocks.index(layer)  # of this block in A
    maps = [before[place, -TOKENS:], after[place, -TOKENS:]]  # (tokens, N) each
    most = float(torch.stack(maps).max())
    texts = [tokenizer.decode([i]) for i in ids[0, -len(maps[0]) :].tolist()]
    n_written = last_segment_start(ids[0], model.cfg.segment_len) // model.cfg.segment_len
    plural = "s" if n_written > 1 else ""
    titles = ["before: bank at $M_0$", f"after: {n_written} segment{plural} written"]
    fig.set_size_inches(8, max(4.0, 0.155 * len(texts) + 1.5))
    axes = fig.subplots(1, 2, sharey=True)
    for i, memory in enumerate((False, True)):
        reply = plain(said(model, tokenizer, doc, memory))
        image = heat(axes[i], maps[i], most, f"{titles[i]}\nanswer: {reply}")
    axes[0].set_yticks(range(len(texts)), [plain(t) for t in texts], fontsize=7.5)
    n_question = ids.shape[1] - doc.context_len
    for text in axes[0].get_yticklabels()[-n_question:]:
        text.set_fontweight("bold")
    scale(fig.colorbar(image, ax=axes, aspect=40), "A, the share of a token's read")
    fig.suptitle(f"Read, block {layer}, {heads(head)}. {asked(doc)}", fontsize=10)


def draw_write(
    fig, model: LM2, tokenizer: Tokenizer, doc: Document, layer: int | None, head: str
) -> None:
    """Draw R by sentence and slot, of one block or, without a layer, of the last PANELS blocks with
    memory side by side."""
    prepare(model, doc, layer)
    lines = rows(model, tokenizer, doc, head)
    blocks = model.cfg.mem_blocks
    layers = blocks[-PANELS:] if layer is None else [layer]
    places = [blocks.index(layer) for layer in layers]  # of these blocks in R
    shares = []
    for row in lines:
        is_grey = row.kind == "declined"
        shares.append(torch.full_like(row.share, torch.nan) if is_grey else row.share)
    R = torch.stack(shares, dim=1)  # (L, rows, N)
    most = float(R[places].nan_to_num().max())
    fig.set_size_inches(8, max(4.0, 0.135 * len(lines) + 1.7))
    axes = fig.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for ax, block, place in zip(axes, layers, places, strict=True):
        image = heat(ax, R[place], most, f"block {block}")
        for y, row in enumerate(lines):
            if row.kind == "declined":
                percent = f"{100 * row.share[place].mean():.0f} %"
                middle = dict(transform=ax.get_yaxis_transform(), ha="center", va="center")
                ax.text(0.5, y, percent, fontsize=7, **middle)
    labels = []
    for row in lines:
        arrow = "\u25ba " if row.kind == "needed" else ""
        labels.append(arrow + plain(row.text))
    axes[0].set_yticks(range(len(lines)), labels, fontsize=7)
    colours = {"prose": "0.25", "declined": "0.45", "fact": FACT, "needed": FACT}
    for text, row in zip(axes[0].get_yticklabels(), lines, strict=True):
        text.set_color(colours[row.kind])
        text.set_fontweight("bold" if row.kind in ("fact", "needed") else "normal")
    scale(
        fig.colorbar(image, ax=axes, location="bottom", aspect=50, pad=0.01),
        "R, the share of a slot's update that is taken from a sentence",
    )
    reply = plain(said(model, tokenizer, doc, memory=True))
    fig.suptitle(f"Write, {heads(head)}. {asked(doc)} Answered: {reply}.", fontsize=10)
