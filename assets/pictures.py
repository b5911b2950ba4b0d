"""Pictures: accuracy by length, the radar of task groups, what tokens read from the memory, what slots keep.

    python assets/pictures.py accuracy assets/models.json --out out/models.png
    python assets/pictures.py radar out/figures.json --length 4k --out out/radar.png
    python assets/pictures.py read --ckpt out/ckpt.pt --seed 5 --out out/read.png
    python assets/pictures.py write --ckpt out/ckpt.pt --seed 5 --out out/write.png

Writes --out, a .png, .pdf or .svg. Needs matplotlib: pip install -e ".[pictures]". The first two draw what
`babilong_eval.py --figures` wrote, the radar as in the paper's Fig. 3; models NAME-0, NAME-1 and so on are
seeds of one line. The others draw the memory on one document, a BABILong sample or --text; assets/heatmaps.py
tells how to read them.
"""
import math
import sys
import warnings
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/pictures.py`

from babilong_eval import column, pooled, share, wilson  # noqa: E402
from data.babilong import Builder  # noqa: E402
from data.background import BOUNDARY  # noqa: E402
from data.common import Parser, one_line, replacing  # noqa: E402
from data.document import Document, from_text, length_name, parse_length  # noqa: E402
from data.tokenizer import Tokenizer, of_checkpoint  # noqa: E402
from heatmaps import draw_read, draw_write  # noqa: E402
from lm2 import load_checkpoint  # noqa: E402
from tables import by_column, choose, load_figures, merged, pick  # noqa: E402


# Okabe and Ito's colours, which colour-blind people can tell apart; in grey the markers and lines differ
STYLES = [dict(color=c, marker=m, linestyle=s) for c, m, s in (
    ("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#000000", "D", ":"),
    ("#CC79A7", "v", "-"), ("#56B4E9", "P", "--"), ("#E69F00", "X", "-."))]
FLOOR = dict(color="0.45", linestyle="--", label="best constant answer", zorder=1.8)
MODES = {"on": "", "off": ", memory off", "other": ", another's memory", "rag": " + retrieval"}
METRICS = {"exact": ("exact match", "floor"), "official": ("the benchmark's own metric", "floor_official")}
GROUPS = {"single-step\nqa1": ["qa1"], "multi-step\nqa2-3": ["qa2", "qa3"], "relation\nqa4-5": ["qa4", "qa5"],
          "basic queries\nqa6-8": ["qa6", "qa7", "qa8"], "negation and\nuncertainty\nqa9-10": ["qa9", "qa10"]}


def figure(out: str):
    """An empty matplotlib Figure for the file `out`; needs no display. ValueError, before any work, where
    matplotlib is missing or no picture can be written to `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('the package matplotlib is missing: pip install -e ".[pictures]"') from None
    if Path(out).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out {out}: the name must end in .png, .pdf or .svg")
    if Path(out).is_dir() or not Path(out).parent.is_dir():
        raise ValueError(f"--out {out} is a folder or in none: name a file in a folder that is there")
    return Figure(dpi=150, layout="constrained")


def save(fig, out: str) -> None:
    """Draw into the file `out`; one that is there stays whole until the new one is complete."""
    with replacing(out) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")      # a sign that the font lacks becomes a box
        fig.savefig(partial, format=Path(out).suffix[1:].lower())


def label(name: str) -> str:
    """A column in a legend: "lm2 on" -> "lm2", "lm2 off" -> "lm2, memory off"."""
    model, _, mode = name.rpartition(" ")
    return model + MODES.get(mode, f" {mode}")


def mean(cells: list[dict], name: str, tasks: list[str], length: int, key: str) -> list[float]:
    """A column's mean over tasks and its interval, in %. ValueError names the tasks that are missing."""
    here = {c["task"]: c for c in cells if column(c) == name and c["length"] == length}
    if missing := [t for t in tasks if t not in here]:
        raise ValueError(f"{name!r} has no {' '.join(missing)} at {length_name(length)}: evaluate it, or "
                         "choose other columns, tasks or lengths")
    hits, n = pooled([here[t] for t in tasks], "n", key)
    return [100 * x for x in (hits / n, *wilson(hits, n))]


def finish(fig, cells: list[dict], text: str) -> None:
    """A title that tells the samples behind a point, and a legend below."""
    n = sorted({c["n"] for c in cells})
    fig.suptitle(f"BABILong {text}, n = {n[0]}{f' to {n[-1]}' * (len(n) > 1)} a task", fontsize=10)
    fig.legend(loc="outside lower center", ncols=3, frameon=False)


def draw_accuracy(fig, cells: list[dict], columns: list[str], tasks: list[str], metric: str) -> None:
    """Accuracy by length, a line a column, the mean where there are several tasks; of a column of seeds the
    one in the middle, and a dot each. ValueError for a column that lacks a task at a length."""
    cells = [c for c in cells if c["task"] in tasks]
    every, floor = by_column(cells), {}
    cells = [c for c in merged(cells, tasks, metric) if column(c) in columns]
    for name in columns:
        if name not in map(column, cells):
            raise ValueError(f"{name!r} has no {' '.join(tasks)}: choose other columns or tasks")
    lengths = sorted({c["length"] for c in cells})
    least = min(filter(None, lengths), default=1)
    at = {x: math.log2(x or least / 2) for x in lengths}    # 0 stands one doubling before the least other
    fig.set_size_inches(8, 4.6)
    ax = fig.subplots()
    for i, (name, style) in enumerate(zip(columns, STYLES)):
        have = [x for x in lengths if any(column(c) == name and c["length"] == x for c in cells)]
        points = [mean(cells, name, tasks, x, metric) for x in have]
        bars = [[max(0.0, p - low) for p, low, _ in points], [max(0.0, high - p) for p, _, high in points]]
        aside = 0.05 * (i - (len(columns) - 1) / 2)         # so that no bar hides another
        ax.errorbar([at[x] + aside for x in have], [p for p, *_ in points], bars, capsize=3,
                    label=label(name), **style)
        others = [(at[x] + aside, 100 * share(found, "n", metric)) for x in have * (len(every[name]) > 1)
                  for found in pick(every[name], tasks, x, "n")]
        if others:
            ax.plot(*zip(*others), **style | dict(linestyle="", markersize=3, alpha=0.5))
        floor |= {x: mean(cells, name, tasks, x, METRICS[metric][1])[0] for x in have if x not in floor}
    ax.errorbar([at[x] for x in sorted(floor)], [floor[x] for x in sorted(floor)], **FLOOR)
    ax.set_xticks(list(at.values()), [length_name(x) for x in at])
    ax.set(ylim=(0, 103), xlabel="tokens of facts + background", ylabel="accuracy (%)")
    ax.grid(axis="y", color="0.9")
    of = f"mean of {' '.join(tasks)}" if len(tasks) > 1 else tasks[0]
    finish(fig, cells, f"{of}: {METRICS[metric][0]}, bars Wilson 95 %")


def group_means(cells: list[dict], name: str, length: int, key: str) -> list[float]:
    """A column's mean of each group in %; ValueError names all tasks that are missing."""
    mean(cells, name, sum(GROUPS.values(), []), length, key)
    return [mean(cells, name, tasks, length, key)[0] for tasks in GROUPS.values()]


def draw_radar(fig, cells: list[dict], columns: list[str], length: int, metric: str) -> None:
    """The five groups of tasks, a polygon a column."""
    cells = merged(cells, sum(GROUPS.values(), []), metric)
    angles = [2 * math.pi * i / len(GROUPS) for i in range(len(GROUPS) + 1)]
    fig.set_size_inches(8, 6.4)
    ax = fig.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    lines = [(name, metric, dict(style, label=label(name))) for name, style in zip(columns, STYLES)]
    for name, key, style in lines + [(columns[0], METRICS[metric][1], FLOOR)]:
        means = group_means(cells, name, length, key)
        ax.plot(angles, means + means[:1], **style)
    ax.set_ylim(0, 100)
    ax.set_rgrids([20, 40, 60, 80, 100], angle=180 / len(GROUPS), color="0.35", fontsize=8)
    ax.set_xticks(angles[:-1], list(GROUPS))
    for text, angle in zip(ax.get_xticklabels(), angles):   # away from the circle
        text.set_ha("center" if angle == 0 else "left" if angle < math.pi else "right")
    cells = [c for c in cells if c["length"] == length and column(c) in columns]
    finish(fig, cells, f"at {length_name(length)}: {METRICS[metric][0]} in %")


def figures(fig, args) -> None:
    """Draw the accuracy or the radar that the flags ask for."""
    cells = load_figures(args.figures)
    columns = choose("--columns", args.columns, list(by_column(cells)))
    if len(columns) > len(STYLES):
        raise ValueError(f"{len(columns)} columns are too many to tell apart: choose up to {len(STYLES)} "
                         "with --columns")
    if args.picture == "accuracy":
        tasks = choose("--tasks", args.tasks, [c["task"] for c in cells])
        draw_accuracy(fig, cells, columns, tasks, args.metric)
    else:
        length = length_name(parse_length(args.length))
        choose("--length", [length], [length_name(c["length"]) for c in cells])
        draw_radar(fig, cells, columns, parse_length(length), args.metric)


def document(tokenizer: Tokenizer, args) -> Document:
    """--text, its last sentence as the question, or a BABILong sample."""
    if args.text is None:
        builder = Builder(tokenizer, "val", args.background)
        return builder.sample(args.task, parse_length(args.length), Random(args.seed))
    context, _, question = BOUNDARY.sub(r"\1\n", " ".join(args.text.split())).rpartition("\n")
    return from_text(tokenizer, context, question, "")


def memory(fig, args) -> None:
    """Draw what is read from or written to the memory of a checkpoint."""
    model, content = load_checkpoint(args.ckpt)
    tokenizer = of_checkpoint(content, args.ckpt)
    draw = draw_read if args.picture == "read" else draw_write
    draw(fig, model.eval(), tokenizer, document(tokenizer, args), args.layer, args.head)


PICTURES = {"accuracy": (figures, "accuracy against the length of the document, with intervals"),
            "radar": (figures, "accuracy on five groups of tasks at one length"),
            "read": (memory, "what the last tokens read from the memory, before and after it was written"),
            "write": (memory, "which sentences of a document each slot was written from")}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python assets/pictures.py", __doc__.split("\n")[0])
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE",
                                     parser_class=lambda **known: Parser(known["prog"], known["description"]))
    for name, (draw, note) in PICTURES.items():
        command = pictures.add_parser(name, help=note, description=note)
        command.set_defaults(draw=draw)
        add = command.add_argument
        add("--out", required=True, help="file to write: .png, .pdf or .svg")
        if draw is figures:
            add("figures", metavar="FILE", help="what babilong_eval.py --figures wrote")
            add("--columns", nargs="+", help='such as "lm2 on" "lm2 off" (default all)')
            add("--metric", default="exact", choices=METRICS,
                help="exact match or the benchmark's own metric (default exact)")
        if name == "accuracy":
            add("--tasks", nargs="+", help="several are drawn as their mean (default all)")
        if name == "radar":
            add("--length", default="4k", help="tokens of facts + background (default 4k)")
        if draw is memory:
            add("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py (default out/ckpt.pt)")
            add("--text", help="a document that ends with the question (default a BABILong sample)")
            add("--task", default="qa1", help="task of the sample (default qa1)")
            add("--length", default="1k", help="tokens of its facts + background (default 1k)")
            add("--seed", type=int, default=0, help="seed of the sample (default 0)")
            add("--background", help="folder of .txt files (default Python's own documentation)")
            add("--layer", type=int, help="block, from 0 (default of read: that in which the last token "
                "reads a single slot most; of write: all, of more than four the last)")
            add("--head", default="mean", help="mean or the number of a head, from 0 (default mean)")
    args = parser.parse_args(argv)
    with one_line(f"python assets/pictures.py {args.picture}"):
        fig = figure(args.out)
        args.draw(fig, args)
        save(fig, args.out)


if __name__ == "__main__":
    main()
