"""How well a model predicts documents: the loss of each token, by its position and by the memory.

    from data.loss import measure, table
    measured = measure(model, tokenizer, documents)
    print(table({"memory on": (measured, "on"), "memory off": (measured, "off")}))

Writes nothing.

A document is read from its start, segment by segment, and each of its tokens is predicted. The
memory is used in one of three ways. `on` is as in training. `off` reads every segment as a document
of its own. `other` gives each segment the memory that another document has at the same place.

The loss is given in bits per byte: the bits that a code built on the model's predictions needs for
a byte of the text. Models with different tokenizers can be compared by it. Where nobody knows which
bytes the ids stand for, the loss is given in nats per token.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.document import batches
from data.text import Documents
from data.tokenizer import Tokenizer

MODES = ("on", "off", "other")
LONGEST = 16384  # bytes that are read of a document, tokens where the bytes are not known
MOST_DOCUMENTS = 50
FEW = 10  # fewer documents are read in several pieces, and for fewer pieces there is no interval
BATCH = 8  # documents that are read together
FIRST_BIN = 64  # tokens; each further bin of positions is as wide as all before it


@torch.no_grad()
def token_losses(
    model: nn.Module, documents: Sequence[np.ndarray], modes: Sequence[str] = MODES
) -> dict[str, Tensor]:
    """The loss of each token of some documents, but for the first, which nothing predicts.

    documents  their ids (n,), of any lengths. A shorter one is repeated up to the length of the
               longest, to have a memory to lend at every place. The losses of the repeats are
               returned, too

    Returns mode -> (B, T) nats, T being one less than the longest length. In the mode `other` a
    document has the memory of the one half a batch away."""
    device = model.norm.weight.device
    B = len(documents)
    T = max(len(ids) for ids in documents) - 1
    rows = torch.from_numpy(np.stack([np.resize(ids, T + 1) for ids in documents])).to(device)
    far = (B + 1) // 2  # neighbours in a batch may be near-copies of each other
    empty = model.initial_state(B)
    state = empty
    found = {mode: [] for mode in modes}
    for start in range(0, T, empty.segment_len):
        stop = min(start + empty.segment_len, T)
        segment = rows[:, start:stop]
        targets = rows[:, start + 1 : stop + 1]
        logits_on, _, state = model(segment, state=state)
        # This segment is still open. So `state.carried` is the memory that it found.
        for mode in modes:
            if mode == "on":
                logits = logits_on
            elif mode == "off":
                logits, _, _ = model(segment, state=empty)
            else:
                lent = [None if M is None else M.roll(far, dims=0) for M in state.carried]
                logits, _, _ = model(segment, state=dataclasses.replace(empty, carried=lent))
            by_class = logits.to(model.precise_dtype).transpose(1, 2)  # (B, vocab, n)
            found[mode].append(F.cross_entropy(by_class, targets, reduction="none"))  # (B, n)
    return {mode: torch.cat(pieces, dim=1) for mode, pieces in found.items()}


class Measured(NamedTuple):
    """The losses of documents."""

    segment_len: int  # of the model
    targets: list[np.ndarray]  # for each document, the ids that are predicted: (n,)
    # for each document, how many bytes each target stands for: (n,); None: nobody knows
    n_bytes: list[np.ndarray] | None
    nats: dict[str, list[np.ndarray]]  # mode -> for each document, the loss of each target: (n,)

    @property
    def unit(self) -> str:
        return "nats per token" if self.n_bytes is None else "bits per byte"

    def sums(
        self, mode: str, low: int = 0, high: float = math.inf
    ) -> tuple[np.ndarray, np.ndarray]:
        """`sums_at` over the positions from low to high - 1."""
        return self.sums_at(mode, self.between(low, high))

    def between(self, low: int, high: float) -> list[np.ndarray]:
        """For each document, which targets lie at the positions from low to high - 1: (n,) bool."""
        is_in = []
        for ids in self.targets:
            position = np.arange(len(ids))
            is_in.append((position >= low) & (position < high))
        return is_in

    def sums_at(self, mode: str, is_in: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Two sums for each document, over its targets where is_in (n,) is true: the loss, in bits
        or nats, and the bytes or tokens to divide it by. (n_documents,) each."""
        losses = []
        sizes = []
        for i, mask in enumerate(is_in):
            nats = self.nats[mode][i][mask].sum()
            if self.n_bytes is None:
                losses.append(nats)
                sizes.append(mask.sum())
            else:
                losses.append(nats / math.log(2))
                sizes.append(self.n_bytes[i][mask].sum())
        return np.array(losses), np.array(sizes)


def measure(
    model: nn.Module,
    tokenizer: Tokenizer,
    documents: Documents,
    most: int = MOST_DOCUMENTS,
    longest: int = LONGEST,
    modes: Sequence[str] = MODES,
) -> Measured:
    """The losses of up to `most` documents, each read up to `longest` bytes, or tokens where the
    bytes are not known. All models read the same documents.

    Of fewer than FEW documents further pieces are read, each with an empty memory. The end of text
    behind a document is not predicted, as it has no bytes. A Llama has no memory, so it has the
    mode `on` alone. A single piece has no `other`. Pieces of one document lend to each other."""
    size_of = tokenizer.n_bytes()
    pieces = choose_pieces(documents, size_of, most, longest)
    if tokenizer.bos is not None:
        # A released model starts with the begin of text, without the end of text before it.
        pieces = [ids[1:] if ids[1] == tokenizer.bos else ids for ids in pieces]
    if model.cfg.kind == "llama":
        modes = ["on"]
    elif len(pieces) == 1:
        modes = [mode for mode in modes if mode != "other"]
    # Documents of about equal lengths are read together.
    order = sorted(range(len(pieces)), key=lambda k: len(pieces[k]))
    nats = {mode: [None] * len(pieces) for mode in modes}
    for numbers in batches(len(order), BATCH, pairs=True):
        batch = [order[number] for number in numbers]
        losses = token_losses(model, [pieces[k] for k in batch], modes)
        for mode in modes:
            for row, k in enumerate(batch):
                nats[mode][k] = losses[mode][row, : len(pieces[k]) - 1].double().cpu().numpy()
    targets = [ids[1:] for ids in pieces]
    n_bytes = None if size_of is None else [size_of[ids] for ids in targets]
    return Measured(model.cfg.segment_len, targets, n_bytes, nats)


def choose_pieces(
    documents: Documents, size_of: np.ndarray | None, most: int, longest: int
) -> list[np.ndarray]:
    """The ids (n,) of up to `most` documents, evenly spread over those that there are. Each has its
    first id, which nothing predicts, and then up to `longest` bytes or tokens. Of fewer than FEW
    documents there are further pieces, up to `most` in all.

    size_of  how many bytes each id stands for; None: nobody knows"""
    usable = np.flatnonzero(documents.sizes > 2)  # there is a token between the ends of text
    n_chosen = min(most, len(usable))
    chosen = [documents[usable[k * len(usable) // n_chosen]][:-1] for k in range(n_chosen)]
    pieces = []
    rests = []
    for ids in chosen:
        n = fitting(ids, size_of, longest)
        pieces.append(ids[:n])
        rests.append(ids[n - 1 :])
    if n_chosen >= FEW:
        return pieces
    while len(pieces) < most and any(len(ids) > 1 for ids in rests):
        for k, ids in enumerate(rests):
            if len(ids) > 1 and len(pieces) < most:
                n = fitting(ids, size_of, longest)
                pieces.append(ids[:n])
                rests[k] = ids[n - 1 :]
    return pieces


def fitting(ids: np.ndarray, size_of: np.ndarray | None, longest: int) -> int:
    """How many of the ids (n,) fit into a piece: two at least."""
    if size_of is None:
        return min(len(ids), longest + 1)
    n_bytes_up_to = np.cumsum(size_of[ids[1:]])
    return 1 + max(1, int(np.searchsorted(n_bytes_up_to, longest, side="right")))


def ratio(losses: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """The loss per byte of all documents together, and half the width of its 95 % interval.

    The interval treats the documents as drawn at random. It is too narrow for few, so below FEW
    documents the half is NaN. Without a byte both are NaN."""
    if sizes.sum() == 0:
        return math.nan, math.nan
    value = losses.sum() / sizes.sum()
    n = (sizes > 0).sum()
    if n < FEW:
        return value, math.nan
    residuals = losses - value * sizes
    standard_error = math.sqrt((residuals**2).sum() * n / (n - 1)) / sizes.sum()
    return value, 1.96 * standard_error


def position_bins(n_tokens: int) -> list[tuple[int, int]]:
    """The ranges of positions up to n_tokens: 0 to 63, 64 to 127, 128 to 255, and so on."""
    bins = [(0, FIRST_BIN)]
    while bins[-1][1] < n_tokens:
        _, high = bins[-1]
        bins.append((high, 2 * high))
    return bins


def in_quarter(n_tokens: int, S: int, number: int) -> np.ndarray:
    """Which positions of a document lie in a quarter (0 to 3) of a segment of S tokens, the first
    segment left out: (n_tokens,) bool."""
    position = np.arange(n_tokens)
    return (position >= S) & (position % S * 4 // S == number)


Column = tuple[Measured, str]  # losses of some documents, and which mode of them


def difference(first: Column, second: Column) -> tuple[float, float]:
    """The second column's loss minus the first one's, over all tokens behind the first segment, and
    half its 95 % interval. Segments are those of the first column's model. Both are of the same
    documents, which are compared one by one."""
    (a, a_mode), (b, b_mode) = first, second
    a_losses, sizes = a.sums(a_mode, a.segment_len)
    b_losses, _ = b.sums(b_mode, a.segment_len)
    return ratio(b_losses - a_losses, sizes)


def with_interval(value: float, half: float | None, style: str) -> str:
    """A value and the ends of its interval, such as "0.12 [0.10, 0.14]". Without a half, the value.

    style  how a number is written, as in .2f"""
    if half is None or math.isnan(half):
        return f"{value:{style}}"
    return f"{value:{style}} [{value - half:{style}}, {value + half:{style}}]"


Row = tuple[str, int, list[float]]  # a name, the tokens of the first column, each column's loss


def table(columns: dict[str, Column]) -> str:
    """The losses by position in the document and in the segment, and by how much each column is
    above the first one.

    columns  what stands above a column -> its losses. All are of the same documents and tokens. The
             first one says how long a segment is"""
    heads = list(columns)
    first, _ = columns[heads[0]]
    longest = max(len(ids) for ids in first.targets)
    width = max(9, *(len(head) + 2 for head in heads))
    n_documents = len(first.targets)
    lines = [
        f"{first.unit}, {n_documents} documents of up to {longest:,} tokens; lower is better",
        f"{'position':>18} {'tokens':>8}" + "".join(f"{head:>{width}}" for head in heads),
    ]

    def add(rows: list[Row]) -> None:
        for name, n_tokens, losses in rows:
            cells = "".join(f"{loss:{width}.3f}" for loss in losses)
            lines.append(f"{name:>18} {n_tokens:8,}{cells}")

    add(position_rows(columns, longest))
    if longest <= first.segment_len:
        lines.append(f"no document is longer than a segment of {first.segment_len} tokens")
        return "\n".join(lines)
    lines.append(f"without the first {first.segment_len} tokens, by quarter of a segment:")
    add(quarter_rows(columns))
    if len(heads) > 1:
        lines.append("and the differences there, with 95 % intervals over documents:")
    for head in heads[1:]:
        above, half = difference(columns[heads[0]], columns[head])
        lines.append(f"{head} - {heads[0]} = {with_interval(above, half, '+.3f')}")
    return "\n".join(lines)


def row_of(name: str, columns: dict[str, Column], is_in: list[np.ndarray]) -> Row:
    """The losses over the tokens of each document where is_in (n,) is true."""
    losses = []
    for measured, mode in columns.values():
        loss, _ = ratio(*measured.sums_at(mode, is_in))
        losses.append(loss)
    return name, int(sum(mask.sum() for mask in is_in)), losses


def position_rows(columns: dict[str, Column], longest: int) -> list[Row]:
    """The losses by position in the document, and over all positions."""
    first, _ = next(iter(columns.values()))
    rows = []
    for low, high in position_bins(longest):
        rows.append(row_of(f"{low} to {high - 1}", columns, first.between(low, high)))
    rows.append(row_of("all", columns, first.between(0, longest)))
    return rows


def quarter_rows(columns: dict[str, Column]) -> list[Row]:
    """The losses by quarter of the first column's segments, but for each document's first."""
    first, _ = next(iter(columns.values()))
    rows = []
    for number in range(4):
        is_in = [in_quarter(len(ids), first.segment_len, number) for ids in first.targets]
        if any(mask.any() for mask in is_in):
            rows.append(row_of(f"quarter {number + 1}", columns, is_in))
    return rows


def none_if_nan(value: float) -> float | None:
    """The value as a float, None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)


def summary(measured: Measured) -> dict:
    """The losses as plain values, for a file: by mode over all tokens, over those beyond the first
    segment, and by position. What cannot be known is None."""
    longest = max(len(ids) for ids in measured.targets)
    modes = {}
    for mode in measured.nats:
        by_position = []
        for low, high in position_bins(longest):
            value, half = ratio(*measured.sums(mode, low, high))
            by_position.append(
                dict(low=low, high=high, loss=none_if_nan(value), half=none_if_nan(half))
            )
        whole, _ = ratio(*measured.sums(mode))
        beyond, _ = ratio(*measured.sums(mode, measured.segment_len))
        above, half = difference((measured, "on"), (measured, mode))
        modes[mode] = dict(
            whole=none_if_nan(whole),
            beyond=none_if_nan(beyond),
            above_on=none_if_nan(above),
            above_half=none_if_nan(half),
            by_position=by_position,
        )
    n_tokens = sum(len(ids) for ids in measured.targets)
    return dict(
        unit=measured.unit,
        segment_len=measured.segment_len,
        documents=len(measured.targets),
        tokens=n_tokens,
        longest=longest,
        modes=modes,
    )
