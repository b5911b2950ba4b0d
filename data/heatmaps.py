"""Heat maps of the memory on one document: what its last tokens read, and what each slot was written from.

    python -m data.pictures read --out read.png
    python -m data.pictures write --out write.png

Writes nothing: it computes A and R and draws them into a figure that data/pictures.py makes and saves.

read    A (paper Fig. 6): a row a token of the last segment, a column a slot; a row sums to 1. Before: the
        bank is at M_0. After: as the earlier segments have written it. In the last row, the end of the
        question, the answer is looked up.
write   R: a row a sentence, summed over its tokens, a column a slot. Within a segment a column sums to 1 with
        what the slot declined, the null, which the grey rows show as the mean over slots. Facts are bold, the
        ones that the question needs have an arrow. A slot that keeps facts is dark in bold rows and pale in
        all others.
"""
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from functools import partial
from itertools import groupby, takewhile
from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from data.document import Document
from data.tokenizer import Tokenizer
from lm2 import LM2

TOKENS = 40         # rows of a read: the document's last tokens
ROWS = 60           # rows of a write, besides one for each gap: segments that do not fit are left out
PANELS = 4          # blocks of a write, side by side
LETTERS = 46        # of a sentence
FACT = "#A63600"    # colour of facts, dark enough to be read in grey


class Row(NamedTuple):
    """A row of a write: a sentence, or what slots declined of one segment or several."""
    text: str
    kind: str           # "prose", "fact", "needed" or "declined"
    share: Tensor       # (L, N), of blocks and slots: R of the sentence, or of the null


def pick(x: Tensor, head: str) -> Tensor:
    """One head of x (HM, ...), or the mean over them; ValueError for a head that is none."""
    if head != "mean" and head not in map(str, range(len(x))):
        raise ValueError(f"--head {head!r} is none: give mean or a number from 0 to {len(x) - 1}")
    return x.mean(dim=0) if head == "mean" else x[int(head)]


def prepare(model: LM2, doc: Document, layer: int | None) -> Tensor:
    """The document's prompt (1, T). ValueError where there is no memory, no such block, nothing written."""
    n, ids = model.cfg.n_mem_layer, torch.from_numpy(doc.prompt())[None]
    if n == 0:
        raise ValueError("the model has no memory: choose a checkpoint with n_mem_layer above 0")
    if layer is not None and not 0 <= layer < n:
        raise ValueError(f"--layer {layer} has no memory: give a number from 0 to {n - 1}")
    if ids.shape[1] <= model.cfg.segment_len:
        raise ValueError(f"the document has {ids.shape[1]} tokens, no more than one segment of "
                         f"{model.cfg.segment_len}: nothing was written before its end, give a longer one")
    return ids


@contextmanager
def recording(model: LM2) -> Iterator[list[dict]]:
    """A list that gets, within the `with`, a dict of each block with memory and piece of a call: layer, A (R,
    HM, T, N), g_out, g_in (R, T, D), and lists, an item a write, R (B, HM, N, S+1), g_forget (B, N, D).
    Compiled blocks run as they are meanwhile."""
    notes, blocks = [], [(i, b, b.fast) for i, b in enumerate(model.layers) if b.memory is not None]

    def record(layer: int, **seen: Tensor) -> None:
        if not notes or "A" in notes[-1]:               # a block's read is recorded last
            notes.append(dict(layer=layer, R=[], g_forget=[]))
        for key, x in seen.items():
            if key in ("R", "g_forget"):
                notes[-1][key].append(x)
            else:
                notes[-1][key] = x

    try:
        for i, block, _ in blocks:
            block.fast, block.memory.record = None, partial(record, i)
        yield notes
    finally:
        for _, block, fast in blocks:
            block.fast = fast
            vars(block.memory).pop("record", None)


@torch.no_grad()
def reads(model: LM2, ids: Tensor, head: str) -> list[Tensor]:
    """A of the last segment of ids (1, T), twice (L, tokens, N): with banks at M_0, and as carried to it."""
    last = (ids.shape[1] - 1) // model.cfg.segment_len * model.cfg.segment_len
    out = []
    for state in (None, model.read(ids[:, :last])[1]):
        with recording(model) as notes:
            model(ids[:, last:], state=state, keep="last")
        out.append(torch.stack([pick(note["A"][0], head) for note in notes]))           # (L, tokens, N)
    return out


@torch.no_grad()
def writes(model: LM2, ids: Tensor, cuts: list[int], head: str) -> list[tuple[list[int], Tensor]]:
    """Of each whole segment of ids (1, T): where the sentences in it start, those cut by its start too, and R
    summed over the tokens of each, the null last, (L, N, sentences + 1). `cuts` are the document's."""
    S, state, out = model.cfg.segment_len, None, []
    for start in range(0, ids.shape[1] - S + 1, S):     # one at a time: R of a million tokens is gigabytes
        with recording(model) as notes:
            _, _, state = model(ids[:, start:start + S], state=state, keep="last")
        R = torch.stack([pick(note["R"][0][0], head) for note in notes])                # (L, N, S+1)
        starts = [start, *cuts[bisect_right(cuts, start):bisect_left(cuts, start + S)]]
        edges = starts + [start + S, start + S + 1]                                     # the null is the last
        parts = [R[..., a - start:b - start].sum(dim=-1) for a, b in zip(edges, edges[1:])]
        out.append((starts, torch.stack(parts, dim=-1)))                                # (L, N, parts)
    return out


def shown(sizes: list[int], holds_facts: list[bool], most: int) -> set[int]:
    """Segments to show in `most` rows: those that hold facts first, the latest first; at least one."""
    order, chosen = sorted(range(len(sizes)), key=lambda g: (holds_facts[g], g), reverse=True), set()
    for g in order:
        if chosen and sum(sizes[i] for i in chosen) + sizes[g] > most:
            break
        chosen.add(g)
    return chosen


def rows(model: LM2, tokenizer: Tokenizer, doc: Document, head: str, most: int = ROWS) -> list[Row]:
    """The rows of a write, in the document's order; segments left out show what was declined of them."""
    ids = prepare(model, doc, None)
    segments = writes(model, ids, doc.cuts, head)
    needed = {doc.places[i] for i in doc.questions[0].support}
    kind = {i: "needed" if i in needed else "fact" for i in doc.places}
    kinds = [[kind.get(bisect_right(doc.cuts, a) - 1, "prose") for a in starts] for starts, _ in segments]
    chosen = shown([len(k) + 1 for k in kinds], [set(k) != {"prose"} for k in kinds], most)
    out = []
    for visible, run in groupby(range(len(segments)), chosen.__contains__):
        run = list(run)
        for g in run if visible else ():
            starts, share = segments[g]
            for i, (a, b) in enumerate(zip(starts, starts[1:] + [(g + 1) * model.cfg.segment_len])):
                out.append(Row(tokenizer.decode(ids[0, a:b].tolist()), kinds[g][i], share[..., i]))
            out.append(Row(f"segment {g + 1}: declined", "declined", share[..., -1]))
        if not visible:
            name = f"segment {run[0] + 1}" if len(run) == 1 else f"segments {run[0] + 1} to {run[-1] + 1}"
            out.append(Row(f"{name}, not shown: declined", "declined",
                           torch.stack([segments[g][1][..., -1] for g in run]).mean(dim=0)))
    return out


def said(model: LM2, tokenizer: Tokenizer, ids: Tensor, write: bool) -> str:
    """The model's answer to ids (1, T), with the memory or, write=False, with banks held at M_0."""
    new = (i.item() for i in model.stream(ids, 12, write=write))
    return tokenizer.decode(takewhile(lambda i: i != tokenizer.eot, new)).strip()


def plain(text: str, most: int = LETTERS) -> str:
    """Text for a label: white space made single, cut behind `most` letters, no sign read as mathematics."""
    text = " ".join(text.split()) or "\u2423"
    return (text if len(text) <= most else text[:most - 1].rstrip() + "\u2026").replace("$", r"\$")


def asked(doc: Document) -> str:
    """The question, with the right answer if it is known."""
    question = doc.questions[0]
    return plain(question.text, 70) + f" Right: {plain(question.answer)}." * bool(question.answer)


def heads(head: str) -> str:
    return "mean over heads" if head == "mean" else f"head {head}"


def heat(ax, values: Tensor, most: float, title: str):
    """A heat map from 0 to `most` with slots from left to right, the same for every picture."""
    ax.set_facecolor("0.9")         # what is no number stays grey
    image = ax.imshow(values.float().numpy(), cmap="Blues", vmin=0, vmax=most, aspect="auto")
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("slot", fontsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    return image


def scale(bar, text: str) -> None:
    """The letters of a colour bar."""
    bar.set_label(text, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def draw_read(fig, model: LM2, tokenizer: Tokenizer, doc: Document, layer: int | None, head: str) -> None:
    """A before and after the earlier segments were written; layer None takes the block in which the last
    token reads a single slot most."""
    ids = prepare(model, doc, layer)
    maps = reads(model, ids, head)
    layer = int(maps[1][:, -1].amax(dim=-1).argmax()) if layer is None else layer
    maps = [A[layer, -TOKENS:] for A in maps]                                           # (tokens, N)
    most = float(torch.stack(maps).max())
    texts = [tokenizer.decode([i]) for i in ids[0, -len(maps[0]):].tolist()]
    written = (ids.shape[1] - 1) // model.cfg.segment_len
    fig.set_size_inches(8, max(4.0, 0.155 * len(texts) + 1.5))
    axes = fig.subplots(1, 2, sharey=True)
    banks = ("before: bank at $M_0$", f"after: {written} segment{'s' * (written > 1)} written")
    for ax, A, bank, write in zip(axes, maps, banks, (False, True)):
        image = heat(ax, A, most, f"{bank}\nanswer: {plain(said(model, tokenizer, ids, write))}")
    axes[0].set_yticks(range(len(texts)), [plain(t) for t in texts], fontsize=7.5)
    for text in axes[0].get_yticklabels()[-(ids.shape[1] - doc.context_len):]:      # those of the question
        text.set_fontweight("bold")
    scale(fig.colorbar(image, ax=axes, aspect=40), "A, the share of a token's read")
    fig.suptitle(f"Read, block {layer}, {heads(head)}. {asked(doc)}", fontsize=10)


def draw_write(fig, model: LM2, tokenizer: Tokenizer, doc: Document, layer: int | None, head: str) -> None:
    """R by sentence and slot, of one block or, layer None, of the last PANELS with memory side by side."""
    ids = prepare(model, doc, layer)
    lines = rows(model, tokenizer, doc, head)
    layers = list(range(model.cfg.n_mem_layer))[-PANELS:] if layer is None else [layer]
    blank = torch.tensor(torch.nan)     # a grey row
    R = torch.stack([r.share * blank if r.kind == "declined" else r.share for r in lines], dim=1)
    most = float(R[layers].nan_to_num().max())
    fig.set_size_inches(8, max(4.0, 0.135 * len(lines) + 1.7))
    axes = fig.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for ax, block in zip(axes, layers):
        image = heat(ax, R[block], most, f"block {block}")
        for y, row in enumerate(lines):
            if row.kind == "declined":
                ax.text(0.5, y, f"{100 * row.share[block].mean():.0f} %", transform=ax.get_yaxis_transform(),
                        ha="center", va="center", fontsize=7)
    arrow = {"needed": "\u25ba "}
    axes[0].set_yticks(range(len(lines)), [arrow.get(r.kind, "") + plain(r.text) for r in lines], fontsize=7)
    for text, row in zip(axes[0].get_yticklabels(), lines):
        text.set(color={"prose": "0.25", "declined": "0.45"}.get(row.kind, FACT),
                 fontweight="bold" if row.kind in ("fact", "needed") else "normal")
    scale(fig.colorbar(image, ax=axes, location="bottom", aspect=50, pad=0.01),
          "R, the share of a slot's update that is taken from a sentence")
    fig.suptitle(f"Write, {heads(head)}. {asked(doc)} Answered: {plain(said(model, tokenizer, ids, True))}.",
                 fontsize=10)
