"""What one change of the memory does to accuracy. Each variant is trained by the default recipe.

    # see in a minute that it runs; it learns nothing
    python tests/ablation.py --rows default --seeds 0 --flags '--tokens 90000' --n 9
    # train all rows with three seeds, which takes hours on two CPU cores
    python tests/ablation.py
    # train some of the rows
    python tests/ablation.py --rows "paper Eqs. (4) to (6)" "no null" --seeds 0 1 2
    # print the table of the figures in README
    python tests/ablation.py --show --out assets/ablation.jsonl --flags '--threads 1 --eval_n 2'

Appends a line of JSON to --out for every run (default out/ablation.jsonl), and prints a table of
the runs. It skips a run that the file already has with the same flags, lengths and n.

A row of the table changes sizes, flags of train.py, or a few lines of lm2.py. The classes below are
examples of how to change the model. All rows train on 8 M tokens. All have as many parameters as
the default, to 0.3 %, since a wider or narrower MLP makes up for what a row lacks or adds. Only the
rows with another number of slots differ more. pytest does not collect this file.
"""

import json
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tests/ablation.py`

import lm2  # noqa: E402
import train  # noqa: E402
from babilong_eval import load, to_cells, wilson  # noqa: E402
from data.common import Parser, keep_freed_memory, one_line  # noqa: E402
from data.document import length_name, parse_length  # noqa: E402
from data.lessons import parse_stage  # noqa: E402


class PlainForget(lm2.Memory):
    """M <- C + g_forget * M. A slot forgets as in Eq. (6) in every segment, even if it takes
    nothing from that segment."""

    def write(self, M: Tensor, Q: Tensor, candidates: Tensor) -> Tensor:
        K = self.heads(self.wk(self.normed(M)))  # (B, HM, N, D/HM)
        scores = K @ Q.mT / math.sqrt(Q.shape[-1])  # (B, HM, N, S)
        null = self.null[:, None, None].expand(*scores.shape[:-1], 1)  # (B, HM, N, 1)
        R = torch.cat((scores, null), dim=-1).softmax(dim=-1)  # (B, HM, N, S+1)
        C = self.merge(R[..., :-1].to(candidates.dtype) @ candidates)  # (B, N, D)
        g_forget = torch.sigmoid(self.w_forget(C))
        self.record(R=R, g_forget=g_forget)
        return C + g_forget * M


class SlotForget(lm2.Memory):
    """Each slot has one forget gate, not one for each of its channels."""

    def __init__(self, cfg: lm2.LM2Config):
        super().__init__(cfg)
        self.w_forget = nn.Linear(cfg.n_embd, 1)  # g_forget is (B, N, 1), the same in all channels


class PaperCandidate(lm2.Memory):
    """A token offers what it has read, tanh(E_mem), as in the paper. This tells the bank only which
    of its slots the token has read."""

    def __init__(self, cfg: lm2.LM2Config):
        super().__init__(cfg)
        del self.w_write

    def candidates(self, E: Tensor) -> Tensor:
        """Only the input gates, since E_mem needs the bank: E (..., S, D) -> (..., HM, S, D/HM)."""
        g_in = torch.sigmoid(self.w_in(E))
        self.record(g_in=g_in)
        return self.heads(g_in)

    def E_mem(self, M: Tensor, Q: Tensor) -> Tensor:
        """What the tokens of a segment read, (B, HM, S, D/HM)."""
        K, V = self.keys_and_values(M)  # (B, HM, N, D/HM)
        A = (Q @ K.mT / math.sqrt(Q.shape[-1])).softmax(dim=-1)  # (B, HM, S, N)
        return A.to(V.dtype) @ V

    def write(self, M: Tensor, Q: Tensor, g_in: Tensor) -> Tensor:
        return super().write(M, Q, g_in * torch.tanh(self.E_mem(M, Q)))


class PaperUpdate(PaperCandidate):
    """Eqs. (4) to (6) as printed: g_in * tanh(E_mem) + g_forget * M, with g_forget = sigmoid(E_mem
    w_forget). As printed, terms of a row for each token meet a bank of a row for each slot. Here R,
    which has no null, sums the tokens' terms for each slot."""

    def write(self, M: Tensor, Q: Tensor, g_in: Tensor) -> Tensor:
        K = self.heads(self.wk(self.normed(M)))  # (B, HM, N, D/HM)
        R = (K @ Q.mT / math.sqrt(Q.shape[-1])).softmax(dim=-1)  # (B, HM, N, S)
        E_mem = self.E_mem(M, Q)  # (B, HM, S, D/HM)
        g_forget = self.heads(torch.sigmoid(self.w_forget(self.merge(E_mem))))  # one for each token
        R = R.to(E_mem.dtype)
        added = self.merge(R @ (g_in * torch.tanh(E_mem)))  # (B, N, D)
        kept = self.merge(R @ g_forget)  # (B, N, D)
        return added + kept * M


class OwnQuery(lm2.Memory):
    """The write has queries of its own. They are a further projection of those of the read."""

    def __init__(self, cfg: lm2.LM2Config):
        super().__init__(cfg)
        self.wq_write = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def write(self, M: Tensor, Q: Tensor, candidates: Tensor) -> Tensor:
        Q_write = self.heads(self.wq_write(self.merge(Q)))  # (B, HM, S, D/HM)
        return super().write(M, Q_write, candidates)


class MemoryLast(lm2.Block):
    """The order is attention, MLP, memory. Tokens read and write the bank after the MLP."""

    def forward(
        self, x: Tensor, M: Tensor | None, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        segments = self.attention_norm(x).flatten(0, 1)  # (B*G, S, D)
        x = x + self.attention(segments, rope).view_as(x)
        x = x + self.feed_forward(self.ffn_norm(x))
        if self.memory is not None:
            from_memory, M = self.memory(x, M)
            x = x + from_memory
        return x, M

    def next_tokens(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: lm2.Cache) -> Tensor:
        x = x + self.attention.next_tokens(self.attention_norm(x), rope, cache)
        x = x + self.feed_forward(self.ffn_norm(x))
        if self.memory is not None:
            x = x + self.memory.next_tokens(x, cache.prepared)
        return x


class MemoryFirst(lm2.Block):
    """The memory's queries, input gates and candidates are made from the input of the block, before
    self-attention."""

    def forward(
        self, x: Tensor, M: Tensor | None, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        block_input = x
        segments = self.attention_norm(x).flatten(0, 1)  # (B*G, S, D)
        x = x + self.attention(segments, rope).view_as(x)
        if self.memory is not None:
            from_memory, M = self.memory(block_input, M)
            x = x + from_memory
        x = x + self.feed_forward(self.ffn_norm(x))
        return x, M

    def next_tokens(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: lm2.Cache) -> Tensor:
        block_input = x
        x = x + self.attention.next_tokens(self.attention_norm(x), rope, cache)
        if self.memory is not None:
            x = x + self.memory.next_tokens(block_input, cache.prepared)
        return x + self.feed_forward(self.ffn_norm(x))


def memories(model: lm2.LM2) -> list[lm2.Memory]:
    """The memories of the blocks that have one."""
    return [block.memory for block in model.layers if block.memory is not None]


def bias_starts_at(gate: str, value: float) -> Callable[[lm2.LM2], None]:
    """A function that sets the bias of a gate of a new model, in all channels."""

    def change(model: lm2.LM2) -> None:
        for memory in memories(model):
            nn.init.constant_(getattr(memory, gate).bias, value)

    return change


def null_starts_higher(by: float) -> Callable[[lm2.LM2], None]:
    """A function that raises the scores of the null of a new model."""

    @torch.no_grad()
    def change(model: lm2.LM2) -> None:
        for memory in memories(model):
            memory.null.add_(by)

    return change


@dataclass(frozen=True)
class Row:
    """One change to the default."""

    flags: str = ""  # flags of train.py
    memory: type[lm2.Memory] = lm2.Memory  # the class that takes the place of lm2.Memory
    block: type[lm2.Block] = lm2.Block  # the class that takes the place of lm2.Block
    start: Callable[[lm2.LM2], None] | None = None  # changes the initial weights


TOKENS = 8_000_000  # Every run trains on this number, whatever stage it is in at the end.
STAGES = train.TrainConfig.stages
UP_TO_16 = " ".join(STAGES[:-1])
UP_TO_64 = " ".join([*STAGES, "10:64"])
ROWS: dict[str, Row] = {
    "default": Row(),
    "paper Eqs. (4) to (6)": Row("--ffn_dim 183", memory=PaperUpdate),
    "candidate tanh(E_mem)": Row("--ffn_dim 183", memory=PaperCandidate),
    "g_forget * M always": Row(memory=PlainForget),
    "the same, b_forget 3": Row(memory=PlainForget, start=bias_starts_at("w_forget", 3.0)),
    "no null": Row(start=null_starts_higher(-math.inf)),  # No slot can decline a segment: w is 1.
    "null starts 2 higher": Row(start=null_starts_higher(2.0)),
    "b_forget starts at 3": Row(start=bias_starts_at("w_forget", 3.0)),
    "b_out starts at -2": Row(start=bias_starts_at("w_out", -2.0)),
    "one forget gate a slot": Row("--ffn_dim 183", memory=SlotForget),
    "write: query projected": Row("--ffn_dim 169", memory=OwnQuery),
    "memory behind the MLP": Row(block=MemoryLast),
    "tokens before attention": Row(block=MemoryFirst),
    "4 slots": Row("--n_slot 4"),
    "64 slots": Row("--n_slot 64"),
    "1 memory head": Row("--n_mem_head 1"),
    "memory in the first block": Row("--mem_blocks 0"),
    "memory in the second block": Row("--mem_blocks 1"),
    "memory in blocks 0 and 1": Row("--mem_blocks 0 1 --ffn_dim 126"),
    "memory in blocks 0 and 2": Row("--mem_blocks 0 2 --ffn_dim 126"),
    "memory in blocks 1 and 2": Row("--mem_blocks 1 2 --ffn_dim 126"),
    "memory in all blocks": Row("--mem_blocks 0 1 2 --ffn_dim 75"),
    "up to 16 segments": Row(f"--stages {UP_TO_16}"),
    "up to 64 segments": Row(f"--stages {UP_TO_64}"),
}


@contextmanager
def changed(row: Row) -> Iterator[None]:
    """Within this block models are built from the classes of the row, with its initial weights."""
    before = (lm2.MEMORIES["lm2"], lm2.Block, lm2.LM2)

    class Started(lm2.LM2):
        def __init__(self, cfg: lm2.LM2Config):
            super().__init__(cfg)
            row.start(self)

    lm2.MEMORIES["lm2"] = row.memory
    lm2.Block = row.block
    if row.start is not None:
        lm2.LM2 = Started
    try:
        yield
    finally:
        lm2.MEMORIES["lm2"], lm2.Block, lm2.LM2 = before


def measure(name: str, seed: int, lengths: list[str], n: int, flags: str) -> dict:
    """Train a row and evaluate it on n samples of each length -> what a line of --out holds. Its
    `exact` is the number of right answers by length. Its `floor` is that of the best constant
    answer."""
    row = ROWS[name]
    own_flags = f"--seed {seed} --tokens {TOKENS} --final_tokens {TOKENS} {flags} {row.flags}"
    with tempfile.TemporaryDirectory() as folder, changed(row):
        # Further processes would not have the classes of the row.
        argv = ["--out_dir", folder, "--processes", "1", *shlex.split(own_flags)]
        train.main([*argv, "--table_lengths", *lengths, "--table_n", str(n)])
        predictions = load(Path(folder, "table.jsonl"))
        model, content = lm2.load_checkpoint(Path(folder, "ckpt.pt"))
    exact = {}
    floor = {}
    for cell in to_cells(predictions):
        if cell["memory"] == "on":
            length = length_name(cell["length"])
            exact[length] = cell["exact"]
            floor[length] = cell["floor"]
    n_params, _ = model.n_params()
    stage = content["train"]["stages"][content["curriculum"]["number"]]
    return dict(
        row=name,
        seed=seed,
        flags=flags,
        minutes=round(content["progress"]["seconds"] / 60, 1),
        tokens=content["progress"]["tokens"],
        n=n,
        params=n_params,
        stage=str(parse_stage(stage, model.cfg.segment_len)),
        stages=list(STAGES),
        exact=exact,
        floor=floor,
    )


def show(runs: list[dict]) -> str:
    """The table of runs with the same lengths and n. It has a line for each row, the floor, and the
    width of a figure's interval.

    A figure is the share of right answers in %. It is the median of the seeds, or the lower of two.
    At the last length the figures of all seeds follow."""
    lengths = list(runs[0]["exact"])
    last = lengths[-1]
    n = runs[0]["n"]
    heads = "".join(f"{length:>7}" for length in lengths)
    lines = [f"{'% right':24}{heads}   seeds at {last}"]
    for name in dict.fromkeys(run["row"] for run in runs):
        of_row = [run for run in runs if run["row"] == name]
        of_row.sort(key=lambda run: run["seed"])
        medians = ""
        for length in lengths:
            median = statistics.median_low(run["exact"][length] for run in of_row)
            medians += f"{100 * median / n:7.1f}"
        seeds = " ".join(f"{100 * run['exact'][last] / n:.1f}" for run in of_row)
        lines.append(f"{name:24}{medians}   {seeds}")
    floors = "".join(f"{100 * runs[0]['floor'][length] / n:7.1f}" for length in lengths)
    lines.append(f"{'floor':24}{floors}")
    widths = []
    for right in (n // 2, 9 * n // 10):
        low, high = wilson(right, n)
        widths.append(f"{50 * (high - low):.1f} at {100 * right / n:.0f}")
    sure = " and ".join(widths)
    lines.append(f"n = {n}; a figure's 95 % interval is {sure} % to each side")
    return "\n".join(lines)


def earlier_runs(out: Path, flags: str, n: int, lengths: list[str]) -> list[dict]:
    """The runs in a file that were made with these flags, n and lengths. ValueError for a file with
    other content."""
    if not out.is_file():
        return []
    runs = []
    try:
        for line in out.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            if (run["flags"], run["n"], list(run["exact"])) == (flags, n, lengths):
                runs.append(run)
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} holds no figures of this script: name another file with --out"
        ) from None
    return runs


def main(argv: list[str] | None = None) -> None:
    parser = Parser("tests/ablation.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"Train these rows of the table: {'; '.join(ROWS)} (default all).",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        help="Train each row with these seeds (default 0 1 2).",
    )
    add(
        "--lengths",
        nargs="+",
        default=["0k", "1k", "4k", "8k", "16k"],
        help="Evaluate on documents of these lengths (default 0k 1k 4k 8k 16k).",
    )
    add("--n", type=int, default=200, help="Ask this number of questions a length (default 200).")
    add("--flags", default="", help="Give these flags to train.py in every run (default none).")
    add(
        "--out",
        default="out/ablation.jsonl",
        help="Keep the figures in this file, to which runs are added (default out/ablation.jsonl).",
    )
    add(
        "--show",
        action="store_true",
        help="Train nothing. Only print the table of the runs in --out (default off).",
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    with one_line("tests/ablation.py"):
        out = Path(args.out)
        lengths = list(dict.fromkeys(parse_length(text) for text in args.lengths))
        if args.n < 1:
            raise ValueError(f"--n {args.n} is too small: give 1 or more")
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: name a file")
        length_names = [length_name(length) for length in lengths]
        runs = earlier_runs(out, args.flags, args.n, length_names)
        if args.show and not runs:
            raise ValueError(
                f"{out} has no figures with these --flags, --lengths and --n: leave out --show"
            )
        if not args.show:
            for run in runs:
                if run.get("stages") != list(STAGES):
                    raise ValueError(
                        f"{out} has runs by another recipe: name another file with --out"
                    )
            done = {(run["row"], run["seed"]) for run in runs}
            for seed in args.seeds:
                for name in args.rows:
                    if (name, seed) in done:
                        continue
                    done.add((name, seed))
                    runs.append(measure(name, seed, length_names, args.n, args.flags))
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
        print(show(runs))


if __name__ == "__main__":
    main()
