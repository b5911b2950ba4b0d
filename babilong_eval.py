"""Ask trained models the BABILong questions: tasks x lengths x models, three memory modes, and retrieval.

    python babilong_eval.py --tasks qa1 --lengths 0k 4k --n 50         # a minute on a laptop
    python babilong_eval.py --tasks qa1 --lengths 128k 1M:5 --n 20     # far beyond any window
    python babilong_eval.py --memory on off other --rag 10             # all the ways of asking
    python babilong_eval.py --ckpt lm2=out/ckpt.pt llama=out/llama/ckpt.pt --compare "lm2 on" "llama on"
    python babilong_eval.py --source babilong --path babilong --lengths 0k 1k     # the published samples
    python babilong_eval.py --from_predictions out/predictions.jsonl   # the tables of a file again

Writes predictions.jsonl, one line an answer, beside the (first) checkpoint or to --out: a run that was cut
short goes on there. Prints the tables of it, see data/metrics.py.

Memory `on` is as trained; `off` holds every bank at its initial value, so that only the last segment can
help; `other` gives the last segment the bank of another document; `rag` reads no long document, but the
sentences of it that BM25 finds closest to the question.
"""
import hashlib
import math
import time
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.babilong import COUNTS, Builder
from data.checkpoint import name_and_path, read_models
from data.cli import Parser, one_line, save_json
from data.device import keep_freed_memory, peak_memory, pick_device
from data.document import Document, length_name, read_lengths
from data.metrics import cells, compare, official_score, report_cost, table  # noqa: F401  for importers
from data.predictions import MODES, Predictions, load
from data.published import published_table
from data.samples import Downloaded, Samples, check_cells, generated
from data.tokenizer import Tokenizer
from lm2 import LM2, LM2State


def of_rows(state: LM2State, rows: list[int]) -> LM2State:
    """The state of some rows of a batch, in that order."""
    return state.map(lambda t: t[rows])


@torch.no_grad()
def carried(model: LM2, prompts: list[np.ndarray]) -> LM2State:
    """What each prompt carries into its last segment, in which it is answered: a state of len(prompts) rows.
    Prompts may differ in length: the batch shrinks as they end, none is padded."""
    S, left = model.cfg.segment_len, model.initial_state(len(prompts))
    ends = [(len(p) - 1) // S for p in prompts]                     # whole segments before the last
    rows, done, state = list(range(len(prompts))), 0, left
    if not (model.cfg.n_mem_layer or model.cfg.n_mem_token):
        return left                                                             # nothing is carried
    for end in sorted(set(ends)):
        if end > done:
            idx = torch.from_numpy(np.stack([prompts[i][done * S:end * S] for i in rows]))
            _, state = model.read(idx.to(left.blocks[0].k.device), state)
        at = torch.tensor(rows, device=left.blocks[0].k.device)
        for to, have in zip(left.blocks, state.blocks):
            if have.bank is not None:
                to.bank = to.bank.index_copy(0, at, have.bank)
        if state.mem is not None:                                               # of an RMT
            left.mem = left.mem.index_copy(0, at, state.mem)
        stay = [j for j, i in enumerate(rows) if ends[i] > end]
        rows, done, state = [rows[j] for j in stay], end, of_rows(state, stay)
    return left


@torch.no_grad()
def answer(model: LM2, tokenizer: Tokenizer, prompts: list[np.ndarray], state: LM2State, write: bool = True,
           most: int = 12) -> list[str]:
    """Greedy answers, up to the end of text or `most` tokens, from the last segments of `prompts` and what
    is carried into them. Rows are padded on the right and read anew for each token: no position sees what
    follows it, and the last segment is short (but of full attention, whose only one it is). write=False: one
    that fills up leaves the bank as it was."""
    S = model.cfg.segment_len
    rows = [p[(len(p) - 1) // S * S:].tolist() for p in prompts]
    starts, active = [len(r) for r in rows], list(range(len(rows)))
    for _ in range(most):
        width = max(len(rows[i]) for i in active)
        idx, last = torch.zeros(len(active), width, dtype=torch.int64), torch.full((len(active), width), -1)
        for j, i in enumerate(active):
            idx[j, :len(rows[i])], last[j, len(rows[i]) - 1] = torch.tensor(rows[i]), 0
        device = state.blocks[0].k.device
        logits, _, _ = model(idx.to(device), last.to(device), state, keep="targets", write=write)
        new = logits.argmax(dim=-1).tolist()
        stay = [j for j, token in enumerate(new) if token != tokenizer.eot]
        for j in stay:
            rows[active[j]].append(new[j])
        if not stay:
            break
        active, state = [active[j] for j in stay], of_rows(state, stay)
    return [tokenizer.decode(row[start:]).strip() for row, start in zip(rows, starts)]


def batches(n: int, size: int, pairs: bool) -> list[range]:
    """0 .. n in batches; with `pairs` of two or more, as each document lends its neighbour a bank."""
    size = max(2, size // 2 * 2) if pairs else max(1, size)
    starts = list(range(0, n, size))
    if pairs and len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, starts[1:] + [n])]


def ask(model: LM2, tokenizer: Tokenizer, documents: list[Document], modes: Iterable[str], rag: int
        ) -> dict[str, tuple[list[str], list[bool | None], float]]:
    """Answers to a batch in each mode, whether retrieval found what is needed, and the seconds a document.
    On a GPU layers multiply in bfloat16."""
    modes, out, prompts = list(modes), {}, [d.prompt() for d in documents]
    start, reading = time.perf_counter(), 0.0
    with torch.autocast("cuda", torch.bfloat16, model.norm.weight.is_cuda):
        if {"on", "other"} & set(modes):
            state = carried(model, prompts)
            if model.norm.weight.is_cuda:
                torch.cuda.synchronize()
            reading = time.perf_counter() - start
        for mode in modes:
            found, start = [None] * len(documents), time.perf_counter()
            if mode == "rag":
                short, found = zip(*(d.retrieve(tokenizer, rag) for d in documents))
                outputs = answer(model, tokenizer, short, carried(model, short))
            elif mode == "off":
                outputs = answer(model, tokenizer, prompts, model.initial_state(len(prompts)), write=False)
            else:
                neighbours = [j ^ 1 if j ^ 1 < len(prompts) else j - 1 for j in range(len(prompts))]
                bank = state if mode == "on" else of_rows(state, neighbours)
                outputs = answer(model, tokenizer, prompts, bank)
            seconds = time.perf_counter() - start + (reading if mode in ("on", "other") else 0)
            out[mode] = outputs, list(found), seconds / len(documents)
    return out


Work = list[tuple[str, int, int]]   # (task, length, samples) of each cell


def evaluate(model: LM2, tokenizer: Tokenizer, samples: Samples, work: Work,
             modes: Iterable[str] = ("on", "off"), rag: int = 10, max_tokens: int = 200_000,
             name: str = "lm2", done: set = frozenset(), show: bool = False) -> Iterator[list[dict]]:
    """Yield the predictions of these cells batch by batch: model, task, length, i, memory, question, target,
    output, outside, found, seconds (a sample of its batch). Those in `done` are not asked again."""
    training = model.training
    model.eval()
    bar = tqdm(total=sum(length * n for _, length, n in work), desc=name, unit="tok", unit_scale=True,
               disable=None if show else True, leave=False)
    for task, length, n in work:
        for batch in batches(n, max_tokens // max(length, 3000), "other" in modes):
            todo = [m for m in modes if any((name, task, length, i, m) not in done for i in batch)]
            bar.set_postfix(cell=f"{task} {length_name(length)}", refresh=False)
            bar.update(length * len(batch))
            if not todo:
                continue
            documents, rows = [samples(task, length, i) for i in batch], []
            for mode, (outputs, found, seconds) in ask(model, tokenizer, documents, todo, rag).items():
                for i, d, output, f in zip(batch, documents, outputs, found):
                    if (name, task, length, i, mode) not in done:
                        q, outside = d.questions[0], d.outside(model.cfg.segment_len)
                        rows.append(dict(model=name, task=task, length=length, i=i, memory=mode,
                                         question=q.text, target=q.answer, output=output, outside=outside,
                                         found=f, seconds=round(seconds, 5)))
            yield rows
    bar.close()
    model.train(training)


def forecast(model: LM2, tokenizer: Tokenizer, samples: Samples, work: Work, modes: list[str], rag: int,
             max_tokens: int = 200_000, most: float = 64_000) -> float:
    """Seconds that this work will take: of each length up to `most` a batch is tried, from all tasks in turn
    and at most a twentieth of the samples but two at least; beyond, time grows with the length."""
    cost: dict[int, float] = {}             # seconds a sample
    for length in sorted({min(length, most) for _, length, _ in work}):
        counts = [(task, n) for task, size, n in work if min(size, most) == length]
        have = [(task, i) for i in range(max(n for _, n in counts)) for task, n in counts if i < n]
        few = max(2, min(len(have) // 20, max_tokens // max(length, 3000)))
        which = (have * 2)[:few]
        for _ in range(1 if cost else 2):   # the first call of a process is slow
            start = time.perf_counter()
            ask(model, tokenizer, [samples(task, length, i) for task, i in which], modes, rag)
            cost[length] = (time.perf_counter() - start) / few
    return sum(cost[min(length, most)] * max(1, length / most) * n for _, length, n in work)


def read_flags(argv: list[str] | None):
    parser = Parser("babilong_eval.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="+", default=["out/ckpt.pt"],
        help="checkpoints of train.py, as PATH or NAME=PATH (default out/ckpt.pt)")
    add("--tasks", nargs="+", help="bAbI tasks, such as qa1 qa2 (default those of the training)")
    add("--lengths", nargs="+", default=["0k", "1k", "2k", "4k", "8k", "16k"],
        help="tokens of facts + background, 0k is without; 64k:25 asks 25 (default 0k 1k 2k 4k 8k 16k)")
    add("--n", type=int, default=200, help="samples a task and length (default 200)")
    add("--memory", nargs="+", default=["on", "off"], choices=("on", "off", "other", "none"),
        help="on: as trained; off: banks at their initial value; other: another document's; none: with "
             "--rag alone (default on off)")
    add("--rag", type=int, default=0,
        help="also with the K best sentences by BM25 for the whole context (default 0: not)")
    add("--metric", nargs="+", default=["exact", "official"], choices=("exact", "official"),
        help="what the tables show (default exact official)")
    add("--source", default="generated", choices=("generated", "babi", "babilong"),
        help="stories: generated, of original bAbI files, or the published samples (default generated)")
    add("--path", help="file or folder of --source babi or babilong (default none)")
    add("--background", help="folder of .txt files (default Python's own documentation)")
    add("--count", default="own", choices=COUNTS, help="what a length counts: the model's tokens, GPT-2's or "
        "4.4 characters; by the last two 4k is 3,700 as published (default own)")
    add("--seed", type=int, default=0, help="seed of the samples (default 0)")
    add("--max_tokens", type=int, default=200_000, help="tokens of prompts held at once (default 200000)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--out", help="file for the answers (default predictions.jsonl beside the first checkpoint)")
    add("--again", action="store_true", help="replace all answers in --out, of other models too, "
        "instead of going on (default off)")
    add("--compare", nargs=2, metavar=("A", "B"), help="also McNemar's test between two columns, such as "
        '"lm2 on" "lm2 off", on the same questions (default none)')
    add("--figures", help="also write the counts of every cell to this JSON file (default none)")
    add("--from_predictions", help="only print the tables of this file again (default none)")
    add("--published", action="store_true", help="also print the papers' own rows (default off)")
    args = parser.parse_args(argv)
    if args.n < 1 or args.max_tokens < 1 or args.rag < 0:
        parser.error(f"--n {args.n} and --max_tokens {args.max_tokens} must be at least 1, --rag {args.rag} "
                     "at least 0")
    if (args.source == "generated") != (args.path is None):
        parser.error(f"--source {args.source} with --path {args.path}: --path belongs to babi and babilong")
    args.modes = [m for m in MODES if m in args.memory or m == "rag" and args.rag]
    if not args.modes:
        parser.error("--memory none asks nothing: give --rag K with it")
    return args


def check_figures(args, out: str | Path) -> None:
    """ValueError, before any work, for --figures that would replace answers or a checkpoint."""
    if args.figures is None:
        return
    path, taken = Path(args.figures), [out, *(name_and_path(text)[1] for text in args.ckpt)]
    if (path.suffix != ".json" or path.is_dir() or not path.parent.is_dir()
            or path.resolve() in [Path(x).resolve() for x in taken]):
        raise ValueError(f"--figures {path}: name a new .json file in a folder that is there")


def show(rows: list[dict], args) -> None:
    """Print what is asked for of these predictions, and write the figures."""
    figures = cells(rows)
    print(table(figures, args.metric))
    for metric in args.metric if args.compare else ():
        print("\n" + compare(rows, *args.compare, metric))
    if args.published:
        print("\n" + published_table())
    if args.figures:
        save_json(dict(cells=figures), args.figures)


def read_source(args, tokenizer: Tokenizer, longest: int) -> tuple[Samples, str | None]:
    """The samples that the flags ask for, in this model's tokens, and a fingerprint of the background."""
    if args.source == "babilong":
        return Downloaded(args.path, tokenizer), None
    builder = Builder(tokenizer, "val", args.background, None, args.path, args.count)
    print(f"background of {len(builder.prose):,} tokens, {builder.chars_per_token:.2f} characters each")
    if args.source == "babi":
        print("questions of the files are drawn at random, with replacement")
    if longest > builder.sizes[-1]:
        print(f"a sample of {length_name(longest)} goes round it {longest / builder.sizes[-1]:.1f} times")
    text = hashlib.blake2b("".join(builder.sentences).encode(), digest_size=8).hexdigest()
    return generated(builder, args.seed), text


def run(args) -> None:
    """Ask all models, from where an earlier run stopped, and show the answers."""
    device, counts = pick_device(args.device), read_lengths(args.lengths, args.n)
    models = read_models(args.ckpt, device)
    content = next(iter(models.values()))[2]
    tasks = list(dict.fromkeys(args.tasks or content.get("train", {}).get("tasks", "qa1").split()))
    out = Path(args.out or name_and_path(args.ckpt[0])[1].with_name("predictions.jsonl"))
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out} is a folder or in none: name a file in a folder that is there")
    if out.exists() and any(out.samefile(name_and_path(text)[1]) for text in args.ckpt):
        raise ValueError(f"--out {out} is the checkpoint: name another file")
    columns = [f"{name} {mode}" for name in models for mode in args.modes]
    if wrong := [name for name in args.compare or () if name not in columns]:
        raise ValueError(f"--compare: column {wrong[0]!r} is not asked: choose from {columns}")
    cells_asked = len(tasks) * (1 if args.source == "babi" else len(counts))
    if args.path and Path(args.path).is_file() and cells_asked > 1:
        raise ValueError(f"--path {args.path} is one file: give a folder for several tasks or lengths")
    check_figures(args, out)
    sources, work, settings = {}, [], []
    for name, (model, tokenizer, content, digest) in models.items():
        print(f"{name}: {model.n_params()[0]:,} parameters, segments of {model.cfg.segment_len}, {device}")
        trained = content.get("train", {}).get("background", args.background)
        if args.source != "babilong" and Path(trained or "").name != Path(args.background or "").name:
            print(f"{name} was trained on the prose of {trained or 'Python'}: --background names another")
        if tokenizer.ranks not in sources:      # models of one tokenizer share their samples
            sources[tokenizer.ranks] = read_source(args, tokenizer, max(counts))
        samples, text = sources[tokenizer.ranks]
        prints = check_cells(samples, tasks, counts)
        settings.append(dict(model=name, checkpoint=digest, source=args.source, **prints)
                        | (dict(rag=args.rag) if args.rag else {})
                        | dict(bfloat16=device.type == "cuda")
                        | (dict(seed=args.seed, count=args.count, background=text) if text else {}))
    if len(sources) > 1 and args.count == "own":
        print("lengths are in each model's own tokens, so the texts differ: --count chars makes them equal")
    for task in tasks:
        for length, n in counts.items():
            have = len(samples.rows(task, length)) if args.source == "babilong" else n
            work.append((task, length, min(n, have)))
            if have < n:
                print(f"{task} {length_name(length)}: {have} samples published, not {n}")
    if "other" in args.modes and min(n for *_, n in work) < 2:
        raise ValueError("--memory other needs 2 documents a cell, which lend each other a bank: give --n 2")
    predictions = Predictions(out, settings, args.again)
    asked = {(name, task, length, i, mode) for name in models for task, length, n in work for i in range(n)
             for mode in args.modes}
    if already := len(asked & predictions.done):
        print(f"{out} has {already:,} of {len(asked):,} answers already")
    seconds = 0.0
    for name, (model, tokenizer, *_) in models.items():
        left = [(task, length, sum(any((name, task, length, i, m) not in predictions.done for m in args.modes)
                                   for i in range(n))) for task, length, n in work]
        left = [cell for cell in left if cell[2]]
        most = 64_000   # published lengths are those of the files
        if args.source == "babilong":
            most = max((x for x in counts if 0 < x <= most), default=math.inf)
        seconds += forecast(model, tokenizer, sources[tokenizer.ranks][0], left, args.modes, args.rag,
                            args.max_tokens, most)
    print(f"this will take about {seconds / 60:.1f} minutes", flush=True)
    began = time.perf_counter()
    for name, (model, tokenizer, *_) in models.items():
        for rows in evaluate(model, tokenizer, sources[tokenizer.ranks][0], work, args.modes, args.rag,
                             args.max_tokens, name, predictions.done, True):
            predictions.add(rows)
    print(f"it took {(time.perf_counter() - began) / 60:.1f} minutes\n")
    rows = [r for r in predictions.rows if (r["model"], r["task"], r["length"], r["i"], r["memory"]) in asked]
    show(rows, args)
    print("\n" + report_cost(rows), f"peak resident set {peak_memory() / 2**20:.0f} MiB", f"answers in {out}",
          sep="\n")


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    keep_freed_memory()
    with one_line("babilong_eval.py"):
        if args.from_predictions:
            check_figures(args, args.from_predictions)
            show(load(args.from_predictions), args)
        else:
            run(args)


if __name__ == "__main__":
    main()
