"""Ask trained models the BABILong questions: by task, length, model and use of the memory.

    python babilong_eval.py --tasks qa1 --lengths 0k 4k --n 50       # a minute on a laptop
    python babilong_eval.py --tasks qa1 --lengths 128k 1M:5 --n 20   # far beyond any window
    python babilong_eval.py --memory on off other --rag 10           # all the ways of asking
    python babilong_eval.py --ckpt lm2=out/ckpt.pt rmt=out/rmt/ckpt.pt --compare "lm2 on" "rmt on"
    python babilong_eval.py --source babilong --path babilong --lengths 0k 1k   # published samples
    python babilong_eval.py --from_predictions out/predictions.jsonl   # the tables of a file again

Writes predictions.jsonl, a line for each answer, beside the first checkpoint or to --out. A run
that was cut short goes on there. Prints the tables of the answers, see data/metrics.py.

With memory `on` the document is read as in training. `off` reads every segment as a document of
its own, so that only the last one can help. `other` gives the last segment the memory that another
document has left. `rag` reads, in place of the document, the sentences of it that BM25 finds
closest to the question.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.babi import TASKS
from data.babilong import COUNTS, Builder, Samples, generated
from data.common import (
    Parser,
    keep_freed_memory,
    one_line,
    peak_memory,
    pick_device,
    save_json,
)
from data.document import Document, length_name, read_lengths
from data.metrics import (  # noqa: F401  the scripts in assets take some of them from here
    BLOCKS,
    GROUPS,
    cells,
    column,
    compare,
    official_score,
    percent,
    pooled,
    report_cost,
    share,
    table,
    wilson,
)
from data.predictions import MODES, Predictions, load
from data.published import Downloaded, published_table
from data.tokenizer import Tokenizer, of_checkpoint
from lm2 import LM2, RMT, State, load_checkpoint

Model = LM2 | RMT


def check_cells(samples: Samples, tasks: Iterable[str], lengths: Iterable[int]) -> dict[str, str]:
    """A fingerprint of the samples of each cell: of the first one, or of the whole published file.

    ValueError, before any time is spent, for an unknown task or a length too short for its
    facts."""
    prints = {}
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is unknown: choose from {' '.join(TASKS)}")
        for length in lengths:
            d = samples(task, length, 0)
            text = d.ids.tobytes()
            if isinstance(samples, Downloaded):
                text = json.dumps(samples.rows(task, length)).encode()
            digest = hashlib.blake2b(text, digest_size=8).hexdigest()
            prints[f"samples of {task} {length_name(length)}"] = digest
    return prints


def of_rows(state: State, rows: list[int]) -> State:
    """The state of some rows of a batch, in that order."""
    return state.map(lambda tensor: tensor[rows])


def last_segment(prompt: Sequence[int], segment_len: int) -> int:
    """Where the last segment of a prompt (T,) starts, in which it is answered."""
    return (len(prompt) - 1) // segment_len * segment_len


@torch.no_grad()
def read_before_last(model: Model, prompts: list[np.ndarray]) -> State:
    """Read each prompt (T,) up to its last segment -> the state in which those segments begin, of
    len(prompts) rows.

    Prompts of equally many segments are read together, so that none is padded."""
    state = model.initial_state(len(prompts))
    if model.cfg.kind == "llama":
        return state  # it carries nothing from segment to segment
    rows_by_start: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        start = last_segment(prompt, model.cfg.segment_len)
        rows_by_start.setdefault(start, []).append(row)
    for start, rows in rows_by_start.items():
        # The first token of the last segment makes the model write the segment before it.
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


@torch.no_grad()
def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[np.ndarray],
    state: State | None,
    most: int = 12,
) -> list[str]:
    """Greedy answers to prompts (T,), up to the end of text or `most` tokens.

    state  what the last segments of the prompts find, a row each, such as `read_before_last` gives.
           None is memory off: a token is predicted from its own segment alone."""
    S = model.cfg.segment_len
    texts = [prompt[last_segment(prompt, S) :].tolist() for prompt in prompts]
    answers = [[] for _ in prompts]
    active = list(range(len(prompts)))  # those whose answers have not ended
    for _ in range(most):
        if state is None:
            # An answer may go on in the next segment, which is a document of its own then.
            seen = [texts[i][last_segment(texts[i], S) :] for i in active]
            found = None
        else:
            seen = [texts[i] for i in active]
            found = of_rows(state, active)
        new_tokens = next_tokens(model, seen, found)
        still_active = []
        for i, token in zip(active, new_tokens, strict=True):
            if token != tokenizer.eot:
                texts[i].append(token)
                answers[i].append(token)
                still_active.append(i)
        active = still_active
        if not active:
            break
    return [tokenizer.decode(ids).strip() for ids in answers]


def batches(n: int, size: int, pairs: bool) -> list[range]:
    """0 .. n in batches of `size`; with `pairs` every batch has two or more, as each document lends
    its memory to another one."""
    size = max(2, size // 2 * 2) if pairs else max(1, size)
    starts = list(range(0, n, size))
    if pairs and len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()  # the last batch takes the one that would be left alone
    stops = [*starts[1:], n]
    return [range(a, b) for a, b in zip(starts, stops, strict=True)]


def neighbour(j: int, n: int) -> int:
    """Of n documents the one that lends its memory to document j: they lend in pairs, and the last
    of an odd number borrows from the one before it."""
    partner = j + 1 if j % 2 == 0 else j - 1
    return partner if partner < n else j - 1


# Of each mode: the answers, whether retrieval found what is needed, the seconds a document took.
Answers = dict[str, tuple[list[str], list[bool | None], float]]


def ask(
    model: Model,
    tokenizer: Tokenizer,
    documents: list[Document],
    modes: Iterable[str],
    n_sentences: int,
) -> Answers:
    """Answers to a batch of documents in each mode. On a GPU layers multiply in bfloat16.

    n_sentences  how many sentences mode `rag` reads"""
    on_gpu = model.norm.weight.is_cuda
    prompts = [document.prompt() for document in documents]
    answers: Answers = {}
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
                outputs = answer(model, tokenizer, short_prompts, short_state)
            elif mode == "off":
                outputs = answer(model, tokenizer, prompts, None)
            elif mode == "other":
                lenders = [neighbour(j, len(prompts)) for j in range(len(prompts))]
                outputs = answer(model, tokenizer, prompts, of_rows(state, lenders))
            else:
                outputs = answer(model, tokenizer, prompts, state)
            seconds = time.perf_counter() - start
            if mode in ("on", "other"):
                seconds += reading
            answers[mode] = outputs, found, seconds / len(documents)
    return answers


Work = list[tuple[str, int, int]]  # (task, length, samples) of each cell
Key = tuple[str, str, int, int, str]  # (model, task, length, i, mode) of an answer


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
) -> Iterator[list[dict]]:
    """Yield the predictions of these cells, batch by batch. Those in `done` are not asked again.

    A prediction has model, task, length, i, memory, question, target, output, outside, found and
    seconds (a sample's share of its batch)."""
    training = model.training
    model.eval()
    bar = tqdm(
        total=sum(length * n for _, length, n in work),
        desc=name,
        unit="tok",
        unit_scale=True,
        disable=None if show else True,
        leave=False,
    )
    for task, length, n in work:
        bar.set_postfix(cell=f"{task} {length_name(length)}", refresh=False)
        batch_size = max_tokens // max(length, 3000)
        for batch in batches(n, batch_size, pairs="other" in modes):
            bar.update(length * len(batch))
            left = []
            for mode in modes:
                if any((name, task, length, i, mode) not in done for i in batch):
                    left.append(mode)
            if not left:
                continue
            documents = [samples(task, length, i) for i in batch]
            rows = []
            for mode, answers in ask(model, tokenizer, documents, left, rag).items():
                outputs, found, seconds = answers
                for j, i in enumerate(batch):
                    if (name, task, length, i, mode) in done:
                        continue
                    question = documents[j].questions[0]
                    rows.append(
                        dict(
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
                    )
            yield rows
    bar.close()
    model.train(training)


def forecast(
    model: Model,
    tokenizer: Tokenizer,
    samples: Samples,
    work: Work,
    modes: list[str],
    rag: int,
    max_tokens: int = 200_000,
    longest: float = 64_000,
) -> float:
    """The seconds that this work will take.

    One batch of each length up to `longest` is tried: samples of all tasks in turn, at most a
    twentieth of them, but at least two. Beyond, time grows with the length."""
    tried: dict[int, list[tuple[str, int]]] = {}  # length -> (task, n) of its cells
    for task, length, n in work:
        tried.setdefault(min(length, longest), []).append((task, n))
    seconds_a_sample: dict[int, float] = {}
    for length in sorted(tried):
        in_turn = []
        for i in range(max(n for _, n in tried[length])):
            in_turn.extend((task, i) for task, n in tried[length] if i < n)
        few = max(2, min(len(in_turn) // 20, max_tokens // max(length, 3000)))
        chosen = (in_turn * 2)[:few]  # twice, as there may be only one
        n_calls = 1 if seconds_a_sample else 2  # the first call of a process is slow
        for _ in range(n_calls):
            start = time.perf_counter()
            documents = [samples(task, length, i) for task, i in chosen]
            ask(model, tokenizer, documents, modes, rag)
            seconds_a_sample[length] = (time.perf_counter() - start) / few
    total = 0.0
    for _, length, n in work:
        times_longer = max(1, length / longest)
        total += seconds_a_sample[min(length, longest)] * times_longer * n
    return total


def name_and_path(text: str) -> tuple[str, Path]:
    """Of NAME=PATH both, of PATH, which may hold "=" itself, no name."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).is_file():
        return name, Path(path)
    return "", Path(text)


@dataclass
class Loaded:
    """A checkpoint as the evaluation uses it."""

    model: Model
    tokenizer: Tokenizer
    train: dict  # of the training: tasks, background, ...
    digest: str  # a fingerprint of the file


def read_models(texts: list[str], device: torch.device) -> dict[str, Loaded]:
    """The checkpoints by name: the one given with NAME=PATH, otherwise "lm2", "rmt" or "llama" for
    a single one and its folder for one of several."""
    models = {}
    for text in texts:
        name, path = name_and_path(text)
        model, content = load_checkpoint(path, device)
        if not name:
            name = model.cfg.kind if len(texts) == 1 else path.resolve().parent.name
        if name in models:
            raise ValueError(f"--ckpt: two models are called {name!r}, give NAME=PATH")
        models[name] = Loaded(
            model,
            of_checkpoint(content, path),
            content.get("train", {}),
            hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest(),
        )
    return models


def read_flags(argv: list[str] | None):
    parser = Parser("babilong_eval.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--ckpt",
        nargs="+",
        default=["out/ckpt.pt"],
        help="checkpoints of train.py, as PATH or NAME=PATH (default out/ckpt.pt)",
    )
    add(
        "--tasks",
        nargs="+",
        help="bAbI tasks, such as qa1 qa2 (default those that the model was trained on)",
    )
    add(
        "--lengths",
        nargs="+",
        default=["0k", "1k", "2k", "4k", "8k", "16k"],
        help="tokens of facts and background: 0k has no background, 64k:25 asks 25 samples "
        "(default 0k 1k 2k 4k 8k 16k)",
    )
    add("--n", type=int, default=200, help="samples of each task and length (default 200)")
    add(
        "--memory",
        nargs="+",
        default=["on", "off"],
        choices=("on", "off", "other", "none"),
        help="on: as trained; off: every segment is a document of its own; other: with the memory "
        "of another document; none: only what --rag asks (default on off)",
    )
    add(
        "--rag",
        type=int,
        default=0,
        help="ask also with the K sentences that BM25 finds closest to the question, in place of "
        "the document (default 0, which does not)",
    )
    add(
        "--metric",
        nargs="+",
        default=["exact", "official"],
        choices=("exact", "official"),
        help="what the tables show (default exact official)",
    )
    add(
        "--source",
        default="generated",
        choices=("generated", "babi", "babilong"),
        help="stories are generated, or of original bAbI files, or the published samples "
        "(default generated)",
    )
    add("--path", help="file or folder of --source babi or babilong (default none)")
    add("--background", help="folder of .txt files (default Python's own documentation)")
    add(
        "--count",
        default="own",
        choices=COUNTS,
        help="what a length counts: the model's tokens, GPT-2's, or 4.4 characters; with the last "
        "two 4k is 3,700 as in the published files (default own)",
    )
    add("--seed", type=int, default=0, help="seed of the samples (default 0)")
    add(
        "--max_tokens",
        type=int,
        default=200_000,
        help="tokens of prompts that are held at once (default 200000)",
    )
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--out", help="file for the answers (default predictions.jsonl beside the checkpoint)")
    add(
        "--again",
        action="store_true",
        help="replace all answers in --out, of other models too, instead of going on (default off)",
    )
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help='add McNemar\'s test between two columns, such as "lm2 on" "lm2 off", on the '
        "questions that both have answered (default none)",
    )
    add("--figures", help="write the counts of every cell to this JSON file (default none)")
    add("--from_predictions", help="only print the tables of this file again (default none)")
    add("--published", action="store_true", help="print the papers' own rows too (default off)")
    args = parser.parse_args(argv)
    if args.n < 1 or args.max_tokens < 1 or args.rag < 0:
        parser.error(
            f"--n {args.n} and --max_tokens {args.max_tokens} must be at least 1, "
            f"--rag {args.rag} at least 0"
        )
    if (args.source == "generated") != (args.path is None):
        parser.error(
            f"--source {args.source} with --path {args.path}: --path belongs to babi and babilong"
        )
    args.modes = []
    for mode in MODES:
        if mode in args.memory or (mode == "rag" and args.rag):
            args.modes.append(mode)
    if not args.modes:
        parser.error("--memory none asks nothing: give --rag K with it")
    return args


def check_figures(args, out: str | Path) -> None:
    """ValueError, before any work, for --figures that would replace answers or a checkpoint."""
    if args.figures is None:
        return
    path = Path(args.figures)
    taken = [Path(out).resolve()]
    for text in args.ckpt:
        taken.append(name_and_path(text)[1].resolve())
    is_new_json = path.suffix == ".json" and not path.is_dir() and path.parent.is_dir()
    if not is_new_json or path.resolve() in taken:
        raise ValueError(f"--figures {path}: name a new .json file in a folder that is there")


def check_out(args, out: Path) -> None:
    """ValueError, before any work, for an --out that answers cannot be written to."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(
            f"--out {out} is a folder or in none: name a file in a folder that is there"
        )
    for text in args.ckpt:
        if out.exists() and out.samefile(name_and_path(text)[1]):
            raise ValueError(f"--out {out} is the checkpoint: name another file")


def show(rows: list[dict], args) -> None:
    """Print what the flags ask for of these predictions, and write the figures."""
    figures = cells(rows)
    print(table(figures, args.metric))
    if args.compare:
        for metric in args.metric:
            print("\n" + compare(rows, *args.compare, metric))
    if args.published:
        print("\n" + published_table())
    if args.figures:
        save_json(dict(cells=figures), args.figures)


def read_source(args, tokenizer: Tokenizer, longest: int) -> tuple[Samples, str | None]:
    """The samples that the flags ask for, in this model's tokens, and a fingerprint of the
    background."""
    if args.source == "babilong":
        return Downloaded(args.path, tokenizer), None
    builder = Builder(tokenizer, "val", args.background, None, args.path, args.count)
    n_tokens = len(builder.prose)
    print(f"background of {n_tokens:,} tokens, {builder.chars_per_token:.2f} characters each")
    if args.source == "babi":
        print("questions of the files are drawn at random, with replacement")
    available = builder.sizes[-1]
    if longest > available:
        print(f"a sample of {length_name(longest)} goes round it {longest / available:.1f} times")
    text = "".join(builder.sentences).encode()
    return generated(builder, args.seed), hashlib.blake2b(text, digest_size=8).hexdigest()


def plan(args, tasks: list[str], counts: dict[int, int], samples: Samples) -> Work:
    """The cells to ask. Published files may have fewer samples than --n asks for."""
    work = []
    for task in tasks:
        for length, n in counts.items():
            have = len(samples.rows(task, length)) if args.source == "babilong" else n
            if have < n:
                print(f"{task} {length_name(length)}: {have} samples published, not {n}")
            work.append((task, length, min(n, have)))
    if "other" in args.modes and min(n for _, _, n in work) < 2:
        raise ValueError(
            "--memory other needs 2 documents a cell, which lend each other a memory: give --n 2"
        )
    return work


def settings_of(args, name: str, loaded: Loaded, prints: dict, text: str | None) -> dict:
    """What the answers of a model depend on: the line before them in the file.

    prints  fingerprints of the cells' samples; text: that of the background"""
    settings = dict(model=name, checkpoint=loaded.digest, source=args.source, **prints)
    if args.rag:
        settings["rag"] = args.rag
    settings["bfloat16"] = loaded.model.norm.weight.is_cuda
    if text is not None:
        settings.update(seed=args.seed, count=args.count, background=text)
    return settings


def run(args) -> None:
    """Ask all models, from where an earlier run stopped, and show the answers."""
    device = pick_device(args.device)
    counts = read_lengths(args.lengths, args.n)
    models = read_models(args.ckpt, device)
    first = next(iter(models.values()))
    trained_tasks = first.train.get("tasks", ("qa1",))
    if isinstance(trained_tasks, str):  # in older checkpoints
        trained_tasks = trained_tasks.split()
    tasks = list(dict.fromkeys(args.tasks or trained_tasks))
    beside = name_and_path(args.ckpt[0])[1].with_name("predictions.jsonl")
    out = Path(args.out or beside)
    check_out(args, out)
    columns = [f"{name} {mode}" for name in models for mode in args.modes]
    for name in args.compare or ():
        if name not in columns:
            raise ValueError(f"--compare: column {name!r} is not asked: choose from {columns}")
    n_files = len(tasks) if args.source == "babi" else len(tasks) * len(counts)
    if args.path and Path(args.path).is_file() and n_files > 1:
        raise ValueError(
            f"--path {args.path} is one file: give a folder for several tasks or lengths"
        )
    check_figures(args, out)
    sources = {}  # by tokenizer: models that have the same one share their samples
    settings = []
    for name, loaded in models.items():
        model = loaded.model
        n_params = model.n_params()[0]
        print(f"{name}: {n_params:,} parameters, segments of {model.cfg.segment_len}, {device}")
        trained = loaded.train.get("background", args.background)
        if (
            args.source != "babilong"
            and Path(trained or "").name != Path(args.background or "").name
        ):
            prose = trained or "Python"
            print(f"{name} was trained on the prose of {prose}: --background names another")
        ranks = loaded.tokenizer.ranks
        if ranks not in sources:
            sources[ranks] = read_source(args, loaded.tokenizer, max(counts))
        samples, text = sources[ranks]
        prints = check_cells(samples, tasks, counts)
        settings.append(settings_of(args, name, loaded, prints, text))
    if len(sources) > 1 and args.count == "own":
        print(
            "lengths are in each model's own tokens, so the texts differ: --count chars makes "
            "them equal"
        )
    work = plan(args, tasks, counts, samples)
    predictions = Predictions(out, settings, args.again)
    asked = set()
    for name in models:
        for task, length, n in work:
            asked.update((name, task, length, i, mode) for i in range(n) for mode in args.modes)
    n_done = len(asked & predictions.done)
    if n_done:
        print(f"{out} has {n_done:,} of {len(asked):,} answers already")
    seconds = 0.0
    for name, loaded in models.items():
        left = []
        for task, length, n in work:
            n_left = 0
            for i in range(n):
                keys = {(name, task, length, i, mode) for mode in args.modes}
                if not keys <= predictions.done:
                    n_left += 1
            if n_left:
                left.append((task, length, n_left))
        longest = 64_000
        if args.source == "babilong":  # published lengths are those of the files
            longest = max((x for x in counts if 0 < x <= longest), default=math.inf)
        samples, _ = sources[loaded.tokenizer.ranks]
        seconds += forecast(
            loaded.model,
            loaded.tokenizer,
            samples,
            left,
            args.modes,
            args.rag,
            args.max_tokens,
            longest,
        )
    print(f"this will take about {seconds / 60:.1f} minutes", flush=True)
    began = time.perf_counter()
    for name, loaded in models.items():
        samples, _ = sources[loaded.tokenizer.ranks]
        for rows in evaluate(
            loaded.model,
            loaded.tokenizer,
            samples,
            work,
            args.modes,
            args.rag,
            args.max_tokens,
            name,
            predictions.done,
            show=True,
        ):
            predictions.add(rows)
    print(f"it took {(time.perf_counter() - began) / 60:.1f} minutes\n")
    shown = []
    for row in predictions.rows:
        if (row["model"], row["task"], row["length"], row["i"], row["memory"]) in asked:
            shown.append(row)
    show(shown, args)
    print("\n" + report_cost(shown))
    print(f"peak resident set {peak_memory() / 2**20:.0f} MiB")
    print(f"answers in {out}")


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
