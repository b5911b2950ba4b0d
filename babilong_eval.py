"""Ask a trained model the BABILong questions: tasks x lengths, memory on and off, with n and error intervals.

    python babilong_eval.py --tasks qa1 --lengths 0k 4k --n 50        # a minute on a laptop
    python babilong_eval.py --tasks qa1 --lengths 128k 1M --n 5       # far beyond any window, in equal memory
    python babilong_eval.py --from_predictions out/table.jsonl        # train.py's table again, from its file

Writes predictions.jsonl, one line an answer, beside the checkpoint (or to --out) and prints the table of it.

`exact` is exact match of the normalised answer, the headline. `official` is the benchmark's metric, faults
included. `off` holds every bank at its initial value, so that only the last segment can help. The columns
"outside" count the samples whose needed facts all lie before the segment in which the answer is due: there
only a memory can know.
"""
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.babilong import Builder, Document, length_name, parse_length
from data.checkpoint import load_checkpoint
from data.cli import Parser, one_line
from data.tokenizer import Tokenizer
from lm2 import LM2

ROOMS = "bathroom bedroom garden hallway kitchen office".split()
# the labels that the benchmark looks for in an output (github.com/booydar/babilong, metrics.py, Apache-2.0)
LABELS = {
    **{f"qa{i}": ROOMS for i in (1, 2, 3, 4, 11, 12, 13)},
    "qa5": "Bill Fred Jeff Mary apple football milk".split(),
    **{f"qa{i}": ["yes", "no"] for i in (6, 9, 17, 18)},
    "qa7": "none one two three".split(), "qa8": "apple football milk nothing".split(),
    "qa10": "yes no maybe".split(),
    "qa14": "bedroom cinema kitchen office park school".split(), "qa15": "cat mouse sheep wolf".split(),
    "qa16": "gray green white yellow".split(),
    "qa19": [f"{a},{b}" for a in "nesw" for b in "nesw" if {a, b} not in ({"n", "s"}, {"e", "w"})],
    "qa20": "bedroom bored garden hungry kitchen thirsty tired".split(),
}


def official_score(task: str, target: str, output: str, question: str) -> bool:
    """The benchmark's published metric, faults included ("none" holds "one", "know" holds "no").

    A label counts as given if it is a substring of the output's first sentence and not of the question. The
    target has to be the one label given; of a target with commas every part, and no label besides."""
    output, target, question = output.lower(), target.lower(), question.lower()
    output = output.split(".")[0].split("<context>")[0].split("<example>")[0]
    labels = {label.lower() for label in LABELS[task]}
    given = {label for label in labels if label in output and label not in question}
    if "," in target and len(target) > 3:
        parts = target.split(",")
        return all(part in given for part in parts) and len(given) == len(parts)
    return given == {target}


def exact_match(target: str, output: str) -> bool:
    """Equal but for case, surrounding space and a final full stop."""
    return output.strip().removesuffix(".").strip().lower() == target.strip().lower()


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, as two shares; (0, 1) without any sample."""
    if n == 0:
        return 0.0, 1.0
    p, d = hits / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


def answer(model: LM2, tokenizer: Tokenizer, prompts: Tensor, memory: bool, most: int = 12) -> list[str]:
    """Greedy answers to prompts (B, T) of equal length, up to the end of text or `most` tokens.

    memory=False holds the banks at M_0. Nothing before the last segment can be seen then, nor is it read."""
    S = model.cfg.segment_len
    if not memory:
        prompts = prompts[:, (prompts.shape[1] - 1) // S * S:]
    logits, state = model.read(prompts, write=memory)
    ids = []
    while True:
        ids.append(logits.argmax(dim=-1))                                       # (B,)
        if len(ids) == most or all(tokenizer.eot in row for row in torch.stack(ids, dim=1).tolist()):
            break
        logits, state = model.read(ids[-1][:, None], state, write=memory)
    rows = torch.stack(ids, dim=1).tolist()
    return [tokenizer.decode(row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row) for row in rows]


def batches(documents: list[Document], max_tokens: int) -> Iterator[list[int]]:
    """Indices of documents with prompts of one length, as many together as hold max_tokens (one at least)."""
    groups: dict[int, list[int]] = {}
    for i, d in enumerate(documents):
        groups.setdefault(len(d.prompt()), []).append(i)
    for length, members in sorted(groups.items()):
        size = max(1, max_tokens // length)
        yield from (members[i:i + size] for i in range(0, len(members), size))


def evaluate(model: LM2, tokenizer: Tokenizer, builder: Builder, tasks: Iterable[str], lengths: Iterable[int],
             n: int, seed: int = 0, modes: tuple[str, ...] = ("on", "off"), max_tokens: int = 200_000,
             show: bool = False) -> Iterator[dict]:
    """Yield one prediction a sample and mode: task, length, i, memory, question, target, output, outside,
    seconds (of its batch, a sample). Samples depend on seed, task and length only, so that models can be
    compared on the same ones."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    for task in tasks:
        for length in lengths:
            rng = random.Random(f"{seed} {task} {length}")
            at_once = max(1, max_tokens // max(1, length))  # a batch at a time: memory must not grow with n
            bar = tqdm(total=n, desc=f"{task} {length_name(length)}", disable=None if show else True,
                       leave=False)
            for first in range(0, n, at_once):
                documents = [builder.sample(task, length, rng) for _ in range(min(at_once, n - first))]
                for members in batches(documents, max_tokens):
                    prompts = torch.from_numpy(np.stack([documents[i].prompt() for i in members])).to(device)
                    for mode in modes:
                        start = time.perf_counter()
                        outputs = answer(model, tokenizer, prompts, mode == "on")
                        seconds = (time.perf_counter() - start) / len(members)
                        for i, output in zip(members, outputs):
                            d, q = documents[i], documents[i].questions[0]
                            yield dict(task=task, length=length, i=first + i, memory=mode, question=q.text,
                                       target=q.answer, output=output.strip(), seconds=round(seconds, 5),
                                       outside=d.outside(model.cfg.segment_len))
                    bar.update(len(members))
            bar.close()
    model.train(training)


def share(rows: list[dict]) -> tuple[int, int]:
    """(answers that match exactly, answers)"""
    return sum(exact_match(r["target"], r["output"]) for r in rows), len(rows)


def percent(rows: list[dict]) -> str:
    hits, n = share(rows)
    low, high = wilson(hits, n)
    value = f"{100 * hits / n:.1f}" if hits < n else "100"
    return f"{value} [{100 * low:.0f},{100 * high:.0f}]" if n else "-"


def table(rows: list[dict]) -> str:
    """The table of predictions, at most 80 columns wide: one line for each task and length."""
    cells: dict[tuple[str, int], list[dict]] = {}
    for r in rows:
        cells.setdefault((r["task"], r["length"]), []).append(r)
    lines = [f"exact match in %{'':29}| facts outside the window",
             f"{'task':>4} {'length':>6} {'n':>4} {'memory on':>14} {'offic.':>6} {'floor':>5} |"
             f"{'n':>4} {'memory on':>14} {'memory off':>14}"]
    for (task, length), cell in cells.items():
        on, off = ([r for r in cell if r["memory"] == mode] for mode in ("on", "off"))
        base = on or off
        targets = [r["target"] for r in base]
        floor = max(map(targets.count, set(targets))) / len(base)
        right = [official_score(task, r["target"], r["output"], r["question"]) for r in on]
        official = f"{100 * sum(right) / len(right):.1f}" if right else "-"
        far_on, far_off = ([r for r in part if r["outside"]] for part in (on, off))
        lines.append(f"{task:>4} {length_name(length):>6} {len(base):4} {percent(on):>14} {official:>6} "
                     f"{100 * floor:5.1f} |{len(far_on or far_off):4} {percent(far_on):>14} "
                     f"{percent(far_off):>14}")
    lines += ["[ , ]: Wilson's 95 % interval. offic.: the benchmark's own score, in % too.",
              "floor: exact match of the best constant answer on these samples.",
              "Outside: all needed facts lie before the last segment, the attention window.",
              "Memory off: banks held at their initial value, so the last segment alone."]
    return "\n".join(lines)


def peak_memory() -> int:
    """Peak resident set of this process in bytes (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report_cost(rows: list[dict]) -> str:
    """Seconds a sample and tokens a second, memory on, for each length."""
    cost: dict[int, list[float]] = {}
    for r in rows:
        if r["memory"] == "on":
            cost.setdefault(r["length"], []).append(r["seconds"])
    lines = [f"{length_name(length):>5}: {sum(s) / len(s):.3f} s a sample" +
             (f", {length * len(s) / sum(s):,.0f} tokens/s" if length and sum(s) else "")
             for length, s in cost.items()]
    return "reading, memory on\n" + "\n".join(lines) + f"\npeak resident set {peak_memory() / 2**20:.0f} MiB"


KINDS = dict(task=str, length=int, memory=str, question=str, target=str, output=str, outside=bool)


def load_predictions(path: str | Path) -> list[dict]:
    """The rows of a predictions.jsonl; ValueError names a file or line that is none."""
    path, rows = Path(path), []
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name a predictions.jsonl with --from_predictions")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line.decode("utf-8"))
            if (not all(isinstance(row[key], kind) for key, kind in KINDS.items())
                    or row["task"] not in LABELS or row["memory"] not in ("on", "off")):
                raise ValueError
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} line {number} is no prediction: run the evaluation again") from None
    if not rows:
        raise ValueError(f"{path} holds no prediction: run the evaluation again")
    return rows


def save_predictions(rows: list[dict], path: Path) -> None:
    """Write rows to `path`; a file that is there is replaced only when the new one is complete."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    partial.replace(path)


def check_cells(builder: Builder, tasks: Iterable[str], lengths: Iterable[int]) -> None:
    """ValueError, before any time is spent, for an unknown task or a length too short for its facts."""
    for task in tasks:
        for length in lengths:
            builder.sample(task, length, random.Random(0))


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA if there is one; ValueError for a device that this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # the angles are made in float64
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise ValueError(f"--device {name!r} is not on this machine: give cpu, cuda or auto") from None


def main(argv: list[str] | None = None) -> None:
    parser = Parser("babilong_eval.py", __doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py (default out/ckpt.pt)")
    parser.add_argument("--tasks", nargs="+", default=None,
                        help="bAbI tasks, such as qa1 qa2 (default those of the training)")
    parser.add_argument("--lengths", nargs="+", default=["0k", "1k", "2k", "4k", "8k", "16k"],
                        help="tokens of facts + background; 0k is without (default 0k 1k 2k 4k 8k 16k)")
    parser.add_argument("--n", type=int, default=200, help="samples a task and length (default 200)")
    parser.add_argument("--memory", nargs="+", default=["on", "off"], choices=("on", "off"),
                        help="on: as trained; off: banks held at their initial value (default on off)")
    parser.add_argument("--background", default=None,
                        help="folder of .txt files (default Python's own documentation)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--max_tokens", type=int, default=200_000,
                        help="tokens of prompts held at once (default 200000)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--out", default=None,
                        help="file for the answers (default predictions.jsonl beside the checkpoint)")
    parser.add_argument("--from_predictions", default=None,
                        help="only print the table of this file again (default none)")
    args = parser.parse_args(argv)
    if args.n < 1 or args.max_tokens < 1:
        parser.error(f"--n {args.n} and --max_tokens {args.max_tokens} must be at least 1")
    with one_line("babilong_eval.py"):
        if args.from_predictions:
            print(table(load_predictions(args.from_predictions)))
            return
        device = pick_device(args.device)
        lengths = list(dict.fromkeys(map(parse_length, args.lengths)))
        model, tokenizer, content = load_checkpoint(args.ckpt, device)
        tasks = list(dict.fromkeys(args.tasks or content.get("train", dict(tasks="qa1"))["tasks"].split()))
        builder = Builder(tokenizer, "val", args.background)
        check_cells(builder, tasks, lengths)
        out = Path(args.out or Path(args.ckpt).with_name("predictions.jsonl"))
        if out.is_dir() or not out.parent.is_dir():
            raise ValueError(f"--out {out} is a folder or in none: name a file in a folder that is there")
        if out.exists() and out.samefile(args.ckpt):
            raise ValueError(f"--out {out} is the checkpoint: name another file")
        print(f"{args.ckpt}: {model.n_params()[0]:,} parameters, segments of {model.cfg.segment_len} tokens\n"
              f"background of {len(builder.prose):,} tokens, {builder.chars_per_token:.2f} characters each, "
              f"{device}")
        if max(lengths) > len(builder.prose):
            print("samples longer than the background go round it more than once")
        modes = tuple(dict.fromkeys(args.memory))
        rows = list(evaluate(model, tokenizer, builder, tasks, lengths, args.n, args.seed, modes,
                             args.max_tokens, True))
        save_predictions(rows, out)
        print(table(rows), report_cost(rows), f"answers in {out}", sep="\n")


if __name__ == "__main__":
    main()
