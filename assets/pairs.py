"""How many pairs of a key and a value can each kind of memory hold?

    python assets/pairs.py --out assets/pairs.json                 # minutes for each memory
    python assets/pairs.py --memories lm2 neural --steps 1000
    python assets/pictures.py pairs assets/pairs.json --out assets/pairs.png

Prints a table, and writes it to --out as JSON. Each kind trains a small model for the same number
of steps, on documents like this one (after MQAR, arXiv 2312.04927):

    k4 v9 k7 v1 k2 v2 k5 v9 | k1 v3 k9 v8 k3 v7 k8 v4 | k9 __ k2 __ k1 __ k7 __

No key stands twice before the last segment. In the last segment some of the keys are asked: the
loss is taken where the model has seen a key and has to say its value. It is not told the values of
the keys that were asked before: __ is a blank. Keys and values are drawn anew for each document.
The pairs of one segment are out of sight in the next, so that only a memory can know them.

The floor is one over the number of pairs. A model has it that knows which values a document has,
but not whose they are. All models have about as many parameters. The state of each with a memory is
2,048 numbers.

Training begins with few pairs: at first with all of them in sight, then in short segments, then in
segments of 16 tokens. Without these levels LM2 was at the floor after 3,000 steps.
"""

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/pairs.py`

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from data.common import Parser, keep_freed_memory, one_line, save_json  # noqa: E402
from lm2 import LM2, RMT, LM2Config, build_model  # noqa: E402
from train import optimizer_groups  # noqa: E402

N_KEYS = 128  # the keys are the tokens 0 to 127
N_VALUES = 128  # the values are the tokens behind them
BLANK = N_KEYS + N_VALUES  # the token in place of an answer
SEGMENT = 16  # tokens, that is 8 pairs
NUMBERS_OF_PAIRS = (8, 16, 32, 64)
# The levels of training: how many pairs, and how many tokens a segment has. A level ends when
# LEAVE_AT of the answers to its LEAVE_AFTER latest batches are right. A batch that is not there yet
# counts as wrong.
LEVELS = ((4, 16), (2, 4), (4, 4), (8, 4), (4, 8), (8, 8), (8, 16), (16, 16), (32, 16), (64, 16))
LEAVE_AT = 0.8
LEAVE_AFTER = 20
BATCH_TOKENS = 4096
N_TESTED = 200  # documents for each number of pairs at the end: 1,600 answers

SIZES = dict(
    vocab_size=BLANK + 1,
    n_layer=2,
    n_head=4,
    n_embd=64,
    segment_len=SEGMENT,
    n_mem_head=4,
    rope_theta=1000.0,
)
# An MLP of another width makes up for the parameters of a memory. All states are 2,048 numbers.
MODELS = {
    "lm2": dict(n_slot=32, mem_blocks=(-1,), ffn_dim=128),
    "neural": dict(memory_kind="neural", mem_blocks=(-1,), ffn_dim=147),
    "rmt": dict(n_mem_token=32, ffn_dim=198),
    "rmt-projection": dict(n_mem_token=32, mem_projection=True, ffn_dim=187),
    "none": dict(n_mem_layer=0, ffn_dim=203),
}


def documents(
    n_pairs: int, n_asked: int, n_documents: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Documents of n_pairs pairs, of which n_asked are asked behind them, (n_documents, T), and the
    values that are asked for, (n_documents, n_asked)."""
    keys = torch.rand(n_documents, N_KEYS, generator=rng).argsort(dim=1)[:, :n_pairs]
    values = N_KEYS + torch.randint(N_VALUES, (n_documents, n_pairs), generator=rng)
    pairs = torch.stack((keys, values), dim=-1).flatten(1)  # (n_documents, 2 * n_pairs)
    asked = torch.rand(n_documents, n_pairs, generator=rng).argsort(dim=1)[:, :n_asked]
    asked_keys = keys.gather(1, asked)  # (n_documents, n_asked)
    blanks = torch.full_like(asked_keys, BLANK)
    questions = torch.stack((asked_keys, blanks), dim=-1).flatten(1)
    return torch.cat((pairs, questions), dim=1), values.gather(1, asked)


def ask(model: LM2 | RMT, ids: Tensor, answers: Tensor, segment_len: int) -> tuple[Tensor, Tensor]:
    """The loss and the share of right answers for documents ids (B, T), read in segments of
    segment_len tokens. answers  (B, n_asked)"""
    rows, length = ids.shape
    # The places of the questions in a document: every other one, up to the end.
    keys = torch.arange(length - 2 * answers.shape[1], length, 2)
    at = (length * torch.arange(rows)[:, None] + keys).flatten()
    logits, _, _ = model(ids, at=at, segment_len=segment_len)
    targets = answers.flatten()
    return F.cross_entropy(logits, targets), (logits.argmax(dim=-1) == targets).float().mean()


def train(model: LM2 | RMT, lr: float, n_steps: int, seed: int) -> int:
    """Train a model through the levels, with the optimizer of train.py -> the level it reached.

    Seven in ten batches are of the present level, the others of any up to it. The learning rate
    rises over 100 steps and falls to 0 over the last half of the steps."""
    groups = optimizer_groups(model, gate_lr=1.0)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    rng = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    present = 0
    latest = []  # the shares of right answers in batches of the present level
    for step in range(n_steps):
        level = present if draw.random() < 0.7 else draw.randrange(present + 1)
        n_pairs, segment_len = LEVELS[level]
        n_asked = min(n_pairs, segment_len // 2)
        n_documents = BATCH_TOKENS // (2 * n_pairs + 2 * n_asked)
        ids, answers = documents(n_pairs, n_asked, n_documents, rng)
        loss, right = ask(model, ids, answers, segment_len)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100, 2 * (1 - step / n_steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if level == present:
            latest.append(right.item())
        is_learned = sum(latest[-LEAVE_AFTER:]) >= LEAVE_AT * LEAVE_AFTER
        if is_learned and present + 1 < len(LEVELS):
            present += 1
            latest = []
    return present


@torch.no_grad()
def accuracies(model: LM2 | RMT) -> dict[int, float]:
    """The share of right answers on new documents, by the number of pairs."""
    rng = torch.Generator().manual_seed(10**6)
    found = {}
    for n_pairs in NUMBERS_OF_PAIRS:
        ids, answers = documents(n_pairs, SEGMENT // 2, N_TESTED, rng)
        _, right = ask(model, ids, answers, SEGMENT)
        found[n_pairs] = right.item()
    return found


def state_numbers(model: LM2 | RMT) -> int:
    """How many numbers a state carries from segment to segment."""
    return sum(t.numel() for t in model.initial_state(1).carried if t is not None)


def table(rows: list[dict]) -> str:
    """The rows of all memories, as printed, and the floor."""
    heads = "".join(f"{n:>7}" for n in NUMBERS_OF_PAIRS)
    lines = [
        f"% right of the values asked back, by the number of pairs; {rows[0]['steps']:,} steps",
        f"{'memory':15}{heads}  parameters  state  minutes  rate",
    ]
    for row in rows:
        figures = "".join(f"{100 * row['right'][str(n)]:7.1f}" for n in NUMBERS_OF_PAIRS)
        lines.append(
            f"{row['memory']:15}{figures}  {row['parameters']:10,} {row['state']:6,} "
            f"{row['minutes']:8.1f}  {row['lr']:g}"
        )
    floors = "".join(f"{100 / n:7.1f}" for n in NUMBERS_OF_PAIRS)
    lines.append(f"{'floor':15}{floors}")
    return "\n".join(lines)


def measure(name: str, lr: float, n_steps: int, seed: int) -> dict:
    """Train a model with this memory and ask it -> a row of the table."""
    torch.manual_seed(seed)
    model = build_model(LM2Config(**SIZES | MODELS[name]))
    start = time.monotonic()
    level = train(model, lr, n_steps, seed)
    return dict(
        memory=name,
        right={str(n): right for n, right in accuracies(model).items()},
        parameters=model.n_params()[0],
        state=state_numbers(model),
        level=level,
        steps=n_steps,
        minutes=(time.monotonic() - start) / 60,
        lr=lr,
        seed=seed,
    )


def main(argv: list[str] | None = None) -> None:
    """Measure the memories that the flags name."""
    parser = Parser("assets/pairs.py", __doc__.split("\n")[0])
    parser.add_argument(
        "--memories",
        nargs="+",
        choices=list(MODELS),
        default=list(MODELS),
        help="The memories to train (default: all).",
    )
    parser.add_argument(
        "--steps", type=int, default=2500, help="Steps of training (default %(default)s)."
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[3e-3],
        help="Learning rates. Each memory is trained with each of them (default 0.003).",
    )
    parser.add_argument("--seed", type=int, default=0, help="The seed (default %(default)s).")
    parser.add_argument("--out", type=Path, help="The JSON file to write.")
    args = parser.parse_args(argv)
    with one_line("assets/pairs.py"):
        if args.steps < 1:
            raise ValueError(f"--steps {args.steps} must be at least 1")
        if min(args.lr) <= 0:
            raise ValueError(f"--lr {min(args.lr):g} must be above 0")
        if args.out is not None and not args.out.parent.is_dir():
            raise ValueError(f"--out {args.out}: its folder does not exist, make it first")
        keep_freed_memory()
        rows = []
        for name in args.memories:
            for lr in args.lr:
                rows.append(measure(name, lr, args.steps, args.seed))
                print(table(rows[-1:]).splitlines()[-2], flush=True)
        print(table(rows))
        if args.out is not None:
            save_json(rows, args.out)


if __name__ == "__main__":
    main()
