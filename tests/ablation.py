"""Variants of the memory, each trained by the default recipe: what a change of one thing does to accuracy.

    # a minute: it runs, it learns nothing
    python tests/ablation.py --rows default --seeds 0 --flags '--tokens 90000' --n 9
    python tests/ablation.py                            # all rows, three seeds: hours on two CPU cores
    python tests/ablation.py --rows "paper Eqs. (4) to (6)" "no null" --seeds 0 1 2     # some of them
    # the table of the figures in README
    python tests/ablation.py --show --out assets/ablation.jsonl --flags '--threads 1 --eval_n 2'

Appends a line of JSON for every run to --out (default out/ablation.jsonl), skips runs that it has with the
same flags, lengths and n, and prints the table of those. All rows take 8 M tokens and have the default's
parameters to 0.3 % (wider MLPs make up for what a row lacks), but for those with other slots. A row is sizes
of the model, flags of train.py, or a few lines of code in place of lm2.py's: read them as examples of how to
change the model. pytest does not collect this file.
"""
import json
import math
import shlex
import statistics
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tests/ablation.py`

import lm2  # noqa: E402
import train  # noqa: E402
from data.cli import Parser, one_line  # noqa: E402
from data.device import keep_freed_memory  # noqa: E402
from data.document import length_name, parse_length  # noqa: E402
from data.metrics import cells, wilson  # noqa: E402


class PlainForget(lm2.Memory):
    """M <- C + g_forget * M: Eq. (6)'s forgetting, in every segment, whatever it wrote."""

    def write(self, M: Tensor, K: Tensor, Q: Tensor, c: Tensor) -> Tensor:
        scores = self.heads(K) @ self.heads(Q).mT / self.width ** 0.5                   # (B, HM, N, S)
        null = self.null[:, None, None].expand(*scores.shape[:-1], 1)
        R = torch.cat((scores, null), dim=-1).softmax(dim=-1)                           # (B, HM, N, S+1)
        C = (R[..., :-1] @ self.heads(c)).transpose(1, 2).flatten(-2)                   # (B, N, D)
        return C + torch.sigmoid(self.w_forget(C)) * M


class OneGate(nn.Linear):
    """(B, N, D) -> (B, N, D), the same in all channels."""

    def forward(self, C: Tensor) -> Tensor:
        return super().forward(C).expand_as(C)


class SlotForget(lm2.Memory):
    """One forget gate a slot, not one a slot and channel."""

    def __init__(self, cfg: lm2.LM2Config):
        super().__init__(cfg)
        self.w_forget = OneGate(cfg.n_embd, 1)


class PaperCandidate(lm2.Memory):
    """The candidate is what a token read, tanh(E_mem), as in the paper: only which slots it was."""

    def __init__(self, cfg: lm2.LM2Config):
        super().__init__(cfg)
        del self.w_write

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        E = self.token_norm(x)
        return self.wq(E), torch.sigmoid(self.w_in(E))

    def E_mem(self, M: Tensor, K: Tensor, Q: Tensor) -> Tensor:
        """What the tokens of a segment read, (B, S, D)."""
        A = (self.heads(Q) @ self.heads(K).mT / self.width ** 0.5).softmax(dim=-1)      # (B, HM, S, N)
        return (A @ self.heads(self.wv(self.step(M, None, None, False)[0]))).transpose(1, 2).flatten(-2)

    def write(self, M: Tensor, K: Tensor, Q: Tensor, g_in: Tensor) -> Tensor:
        return super().write(M, K, Q, g_in * torch.tanh(self.E_mem(M, K, Q)))


class PaperUpdate(PaperCandidate):
    """g_in * tanh(E_mem) + g_forget * M with g_forget = sigmoid(E_mem w_forget), Eqs. (4) to (6) as printed,
    but for what does not fit: T x d terms come to the N x d bank by R, which has no null."""

    def write(self, M: Tensor, K: Tensor, Q: Tensor, g_in: Tensor) -> Tensor:
        R = (self.heads(K) @ self.heads(Q).mT / self.width ** 0.5).softmax(dim=-1)      # (B, HM, N, S)
        E_mem = self.E_mem(M, K, Q)                                                     # (B, S, D)
        add, keep = ((R @ self.heads(x)).transpose(1, 2).flatten(-2)
                     for x in (g_in * torch.tanh(E_mem), torch.sigmoid(self.w_forget(E_mem))))
        return add + keep * M


class OwnQuery(lm2.Memory):
    """The write asks with a further projection of the read's query."""

    def __init__(self, cfg: lm2.LM2Config):
        super().__init__(cfg)
        self.wq_write = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def write(self, M: Tensor, K: Tensor, Q: Tensor, c: Tensor) -> Tensor:
        return super().write(M, K, self.wq_write(Q), c)


class MemoryLast(lm2.Block):
    """Attention, MLP, memory: tokens read and write behind the MLP."""

    def before(self, x: Tensor, turn: Tensor, cache: tuple | None) -> tuple:
        h, k, v = self.attention(self.attention_norm(x), turn, cache)
        x = x + h
        x = x + self.feed_forward(self.ffn_norm(x))
        return x, k, v, *self.memory.tokens(x)

    def after(self, x: Tensor, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        return x + self.memory.read(Q, K, V)


class MemoryFirst(lm2.Block):
    """Queries, input gates and candidates are made from the block's input, before self-attention."""

    def before(self, x: Tensor, turn: Tensor, cache: tuple | None) -> tuple:
        h, k, v = self.attention(self.attention_norm(x), turn, cache)
        return x + h, k, v, *self.memory.tokens(x)


def start(name: str, value: float) -> Callable[[lm2.LM2], None]:
    """Where all entries of a gate's bias (or the null, relative to what it is) start."""
    def change(model: lm2.LM2) -> None:
        with torch.no_grad():
            for block in filter(lambda block: block.memory, model.layers):
                if name == "null":
                    block.memory.null.add_(value)
                else:
                    getattr(block.memory, name).bias.fill_(value)
    return change


@dataclass(frozen=True)
class Row:
    """One change to the default."""
    flags: str = ""                     # of train.py
    memory: type = lm2.Memory           # in the place of lm2.Memory
    block: type = lm2.Block
    start: Callable[[lm2.LM2], None] | None = None      # what changes the initial weights


STAGES, NEVER = train.TrainConfig.stages, start("null", -math.inf)  # no slot declines: w is 1
TOKENS = 8_000_000                      # of every run, in whatever stage it is then
ROWS: dict[str, Row] = {
    "default": Row(),
    "paper Eqs. (4) to (6)": Row("--ffn_dim 197", memory=PaperUpdate),
    "candidate tanh(E_mem)": Row("--ffn_dim 197", memory=PaperCandidate),
    "g_forget * M always": Row(memory=PlainForget),
    "the same, b_forget 3": Row(memory=PlainForget, start=start("w_forget", 3.0)),
    "no null": Row(start=NEVER),
    "null starts 2 higher": Row(start=start("null", 2.0)),
    "b_forget starts at 3": Row(start=start("w_forget", 3.0)),
    "b_out starts at -2": Row(start=start("w_out", -2.0)),
    "one forget gate a slot": Row("--ffn_dim 197", memory=SlotForget),
    "write: query projected": Row("--ffn_dim 155", memory=OwnQuery),
    "memory behind the MLP": Row(block=MemoryLast),
    "tokens before attention": Row(block=MemoryFirst),
    "4 slots": Row("--n_slot 4"),
    "64 slots": Row("--n_slot 64"),
    "1 memory head": Row("--n_mem_head 1"),
    "memory in 1 block of 3": Row("--n_mem_layer 1 --ffn_dim 277"),
    "memory in 2 blocks of 3": Row("--n_mem_layer 2 --ffn_dim 226"),
    "up to 16 segments": Row(f"--stages '{STAGES.removesuffix(' 10:32')}'"),
    "up to 64 segments": Row(f"--stages '{STAGES} 10:64'"),
}


@contextmanager
def changed(row: Row) -> Iterator[None]:
    """While it lasts, models are built from the row's classes."""
    was = lm2.Memory, lm2.Block
    lm2.Memory, lm2.Block = row.memory, row.block
    try:
        yield
    finally:
        lm2.Memory, lm2.Block = was


def run(name: str, seed: int, lengths: list[int], n: int, flags: str) -> dict:
    """Train a row and evaluate it: what stands in a line of --out, right answers of n by length."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as folder, changed(row):
        own = shlex.split(f"--seed {seed} --tokens {TOKENS} --final_tokens {TOKENS} {flags} {row.flags}")
        t = train.Trainer(*train.read_flags(["--out_dir", folder, *own]))
        try:
            if row.start:
                row.start(t.model)  # helpers see it too: the weights are shared
            t.run()
        finally:
            t.close()
        found = {length_name(c["length"]): c for c in cells(t.evaluate(lengths, n, 0, ("on",)))}
    counts = {key: {x: c[key] for x, c in found.items()} for key in ("exact", "floor")}
    return dict(row=name, seed=seed, flags=flags, minutes=round(t.seconds / 60, 1), tokens=t.tokens, n=n,
                params=t.model.n_params()[0], stage=str(t.course.stage)) | counts


def show(runs: list[dict]) -> str:
    """A line a row: right answers in %, medians of its seeds (of two the lower); all seeds at the last
    length. Then the floor, and how sure the figures are."""
    lengths, n = list(runs[0]["exact"]), runs[0]["n"]
    lines = [f"{'% right':24}" + "".join(f"{x:>7}" for x in lengths) + f"   seeds at {lengths[-1]}"]
    for name in dict.fromkeys(r["row"] for r in runs):
        mine = sorted((r for r in runs if r["row"] == name), key=lambda r: r["seed"])
        middle = [100 * statistics.median_low(r["exact"][x] for r in mine) / n for x in lengths]
        lines.append(f"{name:24}" + "".join(f"{x:7.1f}" for x in middle)
                     + "   " + " ".join(f"{100 * r['exact'][lengths[-1]] / n:.1f}" for r in mine))
    lines.append(f"{'floor':24}" + "".join(f"{100 * runs[0]['floor'][x] / n:7.1f}" for x in lengths))
    sure = " and ".join(f"{50 * (high - low):.1f} at {100 * k / n:.0f}"
                        for k in (n // 2, 9 * n // 10) for low, high in [wilson(k, n)])
    return "\n".join([*lines, f"n = {n}; a figure's 95 % interval is {sure} % to each side"])


def main(argv: list[str] | None = None) -> None:
    parser = Parser("tests/ablation.py", __doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows (default all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default 0 1 2)")
    parser.add_argument("--lengths", nargs="+", default=["0k", "1k", "4k", "8k", "16k"],
                        help="lengths to evaluate at (default 0k 1k 4k 8k 16k)")
    parser.add_argument("--n", type=int, default=200, help="samples a length (default 200)")
    parser.add_argument("--flags", default="", help="of train.py, for every run (default none)")
    parser.add_argument("--out", default="out/ablation.jsonl", help="figures (default out/ablation.jsonl)")
    parser.add_argument("--show", action="store_true", help="train nothing (default off)")
    args = parser.parse_args(argv)
    keep_freed_memory()
    with one_line("tests/ablation.py"):
        out, lengths = Path(args.out), [parse_length(x) for x in dict.fromkeys(args.lengths)]
        if args.n < 1 or out.is_dir():
            raise ValueError(f"--out {out} is a folder: name a file" if args.n > 0 else
                             f"--n {args.n} samples a length: give 1 or more")
        lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
        asked = args.flags, args.n, [length_name(x) for x in lengths]      # others make other figures
        try:
            runs = [r for r in map(json.loads, lines) if (r["flags"], r["n"], list(r["exact"])) == asked]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{out} holds no figures of this script: name another") from None
        for seed in args.seeds if not args.show else ():
            for name in args.rows:
                if (name, seed) not in [(r["row"], r["seed"]) for r in runs]:
                    runs.append(run(name, seed, lengths, args.n, args.flags))
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
        if not runs:
            raise ValueError(f"{out} has no figures with these --flags, --lengths and --n"
                             + ": leave out --show" * args.show)
        print(show(runs))


if __name__ == "__main__":
    main()
