"""Draw the accuracy by length, the radar of task groups, what the memory does, or losses on text.

    python assets/pictures.py accuracy assets/models.json --out out/models.png
    python assets/pictures.py radar out/figures.json --length 4k --out out/radar.png
    python assets/pictures.py read --ckpt out/ckpt.pt --seed 5 --out out/read.png
    python assets/pictures.py write --ckpt out/ckpt.pt --seed 5 --out out/write.png
    python assets/pictures.py inside out/inside.json --out out/inside.png
    python assets/pictures.py text --figures out/text.json --out out/text.png
    python assets/pictures.py text --curves lm2=out/metrics.jsonl --out out/curves.png
    python assets/pictures.py pairs assets/pairs.json --out assets/pairs.png

Writes the picture to --out, a .png, .pdf or .svg. Needs matplotlib: pip install -e ".[pictures]".

`accuracy` and `radar` draw what `babilong_eval.py --figures` wrote. The radar is the paper's
Fig. 3. Models with the names NAME-0, NAME-1 and so on are seeds of one line. `read` and `write`
draw the memory on one document, a BABILong sample or --text. See assets/heatmaps.py for how to read
them. `inside` draws what assets/inside.py measured on many documents, and tells how to read it.
`text` draws what assets/text.py measured of models of plain text, and the losses of their training,
which train.py wrote to metrics.jsonl. `pairs` draws what assets/pairs.py measured.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/pictures.py`

from babilong_eval import name_and_path, pooled, share, wilson  # noqa: E402
from data.babilong import Builder  # noqa: E402
from data.background import split_sentences  # noqa: E402
from data.common import Parser, one_line, replacing  # noqa: E402
from data.document import Document, from_text, length_name, parse_length  # noqa: E402
from data.tokenizer import Tokenizer, of_checkpoint  # noqa: E402
from heatmaps import draw_read, draw_write  # noqa: E402
from inside import READ, WEIGHTS, load_inside  # noqa: E402
from lm2 import load_checkpoint  # noqa: E402
from tables import (  # noqa: E402
    Cell,
    Seeds,
    by_column,
    choose,
    complete_seeds,
    load_figures,
    median_seed,
)
from text import load_losses  # noqa: E402

# Colour-blind people can tell these colours of Okabe and Ito apart. In grey print the markers and
# the lines still differ.
STYLES = [
    dict(color="#0072B2", marker="o", linestyle="-"),
    dict(color="#D55E00", marker="s", linestyle="--"),
    dict(color="#009E73", marker="^", linestyle="-."),
    dict(color="#000000", marker="D", linestyle=":"),
    dict(color="#CC79A7", marker="v", linestyle="-"),
    dict(color="#56B4E9", marker="P", linestyle="--"),
    dict(color="#E69F00", marker="X", linestyle="-."),
]
SEED_DOT = dict(linestyle="", markersize=3, alpha=0.5)
FLOOR = dict(color="0.45", linestyle="--", label="best constant answer", zorder=1.8)

AVERAGE = dict(color="0.45", linestyle="--", linewidth=1, zorder=1.8)

# The style of each column of assets/inside.py.
COLUMN_STYLES = {
    "needed facts": 0,
    "other facts": 1,
    "other question": 2,
    "prose": 3,
    "read evenly": 4,
    "last token": 5,
}

# What the legend says of a memory mode.
MODES = {"on": "", "off": ", memory off", "other": ", another's memory", "rag": " + retrieval"}

# The groups of tasks in the radar, as in the paper's Fig. 3.
GROUPS = {
    "single-step\nqa1": ["qa1"],
    "multi-step\nqa2-3": ["qa2", "qa3"],
    "relation\nqa4-5": ["qa4", "qa5"],
    "basic queries\nqa6-8": ["qa6", "qa7", "qa8"],
    "negation and\nuncertainty\nqa9-10": ["qa9", "qa10"],
}
RADAR_TASKS = [task for tasks in GROUPS.values() for task in tasks]


def figure(out: str):
    """An empty matplotlib Figure, which needs no display.

    ValueError, before any work, if matplotlib is missing or no picture can be written to `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            'the package matplotlib is missing: pip install -e ".[pictures]"'
        ) from None
    path = Path(out)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out {out}: the name must end in .png, .pdf or .svg")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"--out {out} is a folder, or its folder does not exist: "
            "name a file in a folder that exists"
        )
    return Figure(dpi=150, layout="constrained")


def save(fig, out: str) -> None:
    """Draw into the file `out`. An older file stays whole until the new one is complete."""
    with replacing(out) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a sign that the font lacks becomes a box
        fig.savefig(partial, format=Path(out).suffix[1:].lower())


def legend_label(name: str) -> str:
    """A column in the legend: "lm2 on" -> "lm2", "lm2 off" -> "lm2, memory off"."""
    model, _, mode = name.rpartition(" ")
    return model + MODES.get(mode, f" {mode}")


def middle_cells(seeds: Seeds, name: str, tasks: list[str], length: int) -> list[Cell]:
    """A column's cells of these tasks at a length, of the seed with the median mean.

    ValueError if no seed has all the tasks. It names those that a seed lacks."""
    complete = complete_seeds(seeds, tasks, length)
    if complete:
        return median_seed(complete, "n", "exact")
    missing = []
    for task in tasks:
        if any((task, length) not in seed for seed in seeds.values()):
            missing.append(task)
    raise ValueError(
        f"{name!r} has no {' '.join(missing)} at {length_name(length)}: evaluate it, or choose "
        "other columns, tasks or lengths"
    )


def mean_and_interval(cells: list[Cell]) -> tuple[float, float, float]:
    """The mean over cells and the ends of its interval, in %."""
    hits, n = pooled(cells, "n", "exact")
    low, high = wilson(hits, n)
    return 100 * hits / n, 100 * low, 100 * high


def finish(fig, cells: list[Cell], text: str) -> None:
    """Add a title that tells how many samples are behind a point, and a legend below."""
    sizes = {cell["n"] for cell in cells}
    n = str(min(sizes))
    if len(sizes) > 1:
        n += f" to {max(sizes)}"
    fig.suptitle(f"BABILong {text}, n = {n} a task", fontsize=10)
    fig.legend(loc="outside lower center", ncols=3, frameon=False)


def axis_positions(lengths: list[int]) -> dict[int, float]:
    """Where each length stands on a logarithmic axis. 0 stands one doubling before the least
    other length."""
    zero_stands_at = min([x for x in lengths if x > 0], default=1) / 2
    return {length: math.log2(length or zero_stands_at) for length in lengths}


def draw_accuracy(fig, cells: list[Cell], columns: list[str], tasks: list[str]) -> None:
    """Draw a line of accuracy against length for each column, with 95 % intervals.

    Several tasks are drawn as their mean. A column of several seeds is drawn as the line of the
    median seed at each length and a dot for each seed. ValueError if a column lacks a task at a
    length at which it has another one."""
    cells = [cell for cell in cells if cell["task"] in tasks]
    seeds_by_column = by_column(cells)
    shown: dict[str, dict[int, list[Cell]]] = {}  # column -> length -> the cells of a point
    for name in columns:
        seeds = seeds_by_column.get(name, {})
        lengths = {length for seed in seeds.values() for _, length in seed}
        if not lengths:
            raise ValueError(f"{name!r} has no {' '.join(tasks)}: choose other columns or tasks")
        shown[name] = {x: middle_cells(seeds, name, tasks, x) for x in sorted(lengths)}
    all_lengths = sorted({length for points in shown.values() for length in points})
    positions = axis_positions(all_lengths)

    fig.set_size_inches(8, 4.6)
    ax = fig.subplots()
    floors: dict[int, float] = {}
    for i, (name, points) in enumerate(shown.items()):
        style = STYLES[i]
        aside = 0.05 * (i - (len(columns) - 1) / 2)  # so that no bar hides another one
        xs, means, below, above = [], [], [], []
        dot_xs, dots = [], []
        for length, point in points.items():
            x = positions[length] + aside
            mean, low, high = mean_and_interval(point)
            xs.append(x)
            means.append(mean)
            below.append(max(0.0, mean - low))
            above.append(max(0.0, high - mean))
            floors.setdefault(length, 100 * share(point, "n", "floor"))
            for seed_cells in complete_seeds(seeds_by_column[name], tasks, length):
                dot_xs.append(x)
                dots.append(100 * share(seed_cells, "n", "exact"))
        ax.errorbar(xs, means, [below, above], capsize=3, label=legend_label(name), **style)
        if len(seeds_by_column[name]) > 1:
            ax.plot(dot_xs, dots, **style | SEED_DOT)
    floor_xs = [positions[length] for length in sorted(floors)]
    floor_ys = [floors[length] for length in sorted(floors)]
    ax.errorbar(floor_xs, floor_ys, **FLOOR)  # `plot` would put it first in the legend

    ax.set_xticks(list(positions.values()), [length_name(length) for length in positions])
    ax.set(ylim=(0, 103), xlabel="tokens of facts + background", ylabel="accuracy (%)")
    ax.grid(axis="y", color="0.9")
    drawn = []
    for points in shown.values():
        for point in points.values():
            drawn.extend(point)
    what = tasks[0] if len(tasks) == 1 else f"mean of {' '.join(tasks)}"
    finish(fig, drawn, f"{what}: exact match, bars Wilson 95 %")


def group_means(cells: list[Cell], key: str) -> list[float]:
    """The mean over each of the radar's groups of tasks in %, from cells of all its tasks.

    key  "exact" for the right answers, "floor" for those of the best constant answer"""
    means = []
    for tasks in GROUPS.values():
        members = [cell for cell in cells if cell["task"] in tasks]
        means.append(100 * share(members, "n", key))
    return means


def draw_radar(fig, cells: list[Cell], columns: list[str], length: int) -> None:
    """Draw the five groups of tasks at one length, with a polygon for each column.

    ValueError names the tasks that a column lacks."""
    seeds_by_column = by_column(cells)
    angles = [2 * math.pi * i / len(GROUPS) for i in range(len(GROUPS))]
    closed_angles = [*angles, 2 * math.pi]
    fig.set_size_inches(8, 6.4)
    ax = fig.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    drawn = []
    for i, name in enumerate(columns):
        polygon = middle_cells(seeds_by_column[name], name, RADAR_TASKS, length)
        drawn.append(polygon)
        means = group_means(polygon, "exact")
        ax.plot(closed_angles, [*means, means[0]], label=legend_label(name), **STYLES[i])
    floors = group_means(drawn[0], "floor")
    ax.plot(closed_angles, [*floors, floors[0]], **FLOOR)
    ax.set_ylim(0, 100)
    ax.set_rgrids([20, 40, 60, 80, 100], angle=180 / len(GROUPS), color="0.35", fontsize=8)
    ax.set_xticks(angles, list(GROUPS))
    for text, angle in zip(ax.get_xticklabels(), angles, strict=True):
        # The names extend away from the circle.
        if angle == 0:
            text.set_ha("center")
        elif angle < math.pi:
            text.set_ha("left")
        else:
            text.set_ha("right")
    all_cells = [cell for polygon in drawn for cell in polygon]
    finish(fig, all_cells, f"at {length_name(length)}: exact match in %")


def draw_figures(fig, args: argparse.Namespace) -> None:
    """Draw the accuracy or the radar that the flags ask for."""
    cells = load_figures(args.figures)
    columns = choose("--columns", args.columns, list(by_column(cells)))
    if len(columns) > len(STYLES):
        raise ValueError(
            f"{len(columns)} columns are too many to tell apart: choose up to {len(STYLES)} "
            "with --columns"
        )
    if args.picture == "accuracy":
        tasks = choose("--tasks", args.tasks, [cell["task"] for cell in cells])
        draw_accuracy(fig, cells, columns, tasks)
    else:
        length = parse_length(args.length)
        known_lengths = [length_name(cell["length"]) for cell in cells]
        choose("--length", [length_name(length)], known_lengths)
        draw_radar(fig, cells, columns, length)


def draw_points(ax, cell: dict, columns: dict[str, str]) -> None:
    """Draw the mean and interval of each block and column of a cell of assets/inside.py."""
    for c, (key, label) in enumerate(columns.items()):
        aside = 0.13 * (c - (len(columns) - 1) / 2)  # so that no bar hides another one
        xs, means, below, above = [], [], [], []
        for x, block in enumerate(cell["blocks"]):
            if block[key] is not None:
                mean, low, high = block[key]
                xs.append(x + aside)
                means.append(mean)
                below.append(mean - low)
                above.append(high - mean)
        style = STYLES[COLUMN_STYLES[label]] | dict(linestyle="", markersize=5, capsize=3)
        ax.errorbar(xs, means, [below, above], label=label, **style)
    ax.set_xticks(range(len(cell["blocks"])), [block["block"] for block in cell["blocks"]])
    ax.set_xlim(-0.5, len(cell["blocks"]) - 0.5)
    ax.grid(axis="y", color="0.9")


def draw_inside(fig, figures: dict) -> None:
    """Draw what assets/inside.py measured: a row for each task, with a panel for each table."""
    cells = figures["cells"]
    fig.set_size_inches(8, 1.3 + 2.5 * len(cells))
    axes = fig.subplots(len(cells), 3, squeeze=False, width_ratios=(3, 4, 3))
    for (write, read, answer), cell in zip(axes, cells, strict=True):
        draw_points(write, cell, WEIGHTS)
        write.axhline(1, **AVERAGE)
        write.set_ylim(bottom=0)
        draw_points(read, cell, READ)
        draw_points(answer, cell, {"right_without_needed": "needed facts"})
        answer.axhline(cell["right"][0], **AVERAGE)
        answer.set_ylim(0, 105)
        n = f"n = {cell['n']}"
        write.set_ylabel(f"{cell['task']} at {length_name(cell['length'])}, {n}")
    titles = [
        "write: weight of a token\n(line: the average token)",
        "read: share of what the\nquestion reads (%)",
        "answer: right without the\nneeded facts (%; line: with)",
    ]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("block")
    handles = {}  # each label once
    for ax in axes[0]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    fig.suptitle(f"{figures['ckpt']}: means with 95 % intervals", fontsize=10)


def load_curves(text: str) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """The name and the curves of a NAME=PATH of metrics.jsonl. Without a name, it is the name of
    the file's folder.

    The curves are "loss" of training, in nats per token, and "bits per byte" of validation. Each is
    a list of (tokens, loss). ValueError for a file that is not of a run on plain text."""
    name, path = name_and_path(text)
    name = name or path.resolve().parent.name
    curves = {"loss": [], "bits per byte": []}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            losses = entry | entry.get("validation", {})
            for key, points in curves.items():
                if key in losses:
                    points.append((entry["tokens"], float(losses[key])))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no metrics.jsonl of train.py: name another file") from None
    if not all(curves.values()):
        raise ValueError(
            f"{path} has no validation in bits per byte: name the metrics.jsonl of a run on plain "
            "text that has come to its first validation, see --eval_every of train.py"
        )
    return name, curves


def draw_positions(ax, models: list[dict], styles: dict[str, dict]) -> None:
    """Draw the loss by the position in the document: a line for each model of assets/text.py, and a
    dashed one for its memory off."""
    for model in models:
        for mode in ("on", "off"):
            if mode not in model["modes"]:
                continue
            positions = []
            losses = []
            for entry in model["modes"][mode]["by_position"]:
                if entry["loss"] is not None:
                    end = min(entry["high"], model["longest"])
                    positions.append((entry["low"] + end) / 2)
                    losses.append(entry["loss"])
            name = model["name"]
            style = styles[name]
            if mode == "off":
                style = style | dict(linestyle="--", markerfacecolor="white")
            ax.plot(positions, losses, label=legend_label(f"{name} {mode}"), **style)
    for segment_len in {model["segment_len"] for model in models}:
        ax.axvline(segment_len, **AVERAGE | dict(linestyle=":"))
    ax.set_xscale("log", base=2)
    longest = max(model["longest"] for model in models)
    ticks = [2**k for k in range(5, 1 + math.ceil(math.log2(longest)))]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set_xlabel("position in the document (the model's tokens; dotted line: first segment's end)")
    ax.set_ylabel(f"loss ({models[0]['unit']})")
    ax.grid(axis="y", color="0.9")


def draw_curves(validation, training, curves: dict[str, dict], styles: dict[str, dict]) -> None:
    """Draw the losses of some runs against the tokens that they were trained on, the validation in
    one panel and the training in another."""
    for name, of_run in curves.items():
        tokens, losses = zip(*of_run["bits per byte"], strict=True)
        validation.plot([n / 1e6 for n in tokens], losses, label=name, **styles[name])
        tokens, losses = zip(*of_run["loss"], strict=True)
        style = styles[name] | dict(linewidth=0.8, markersize=4, markevery=0.2)
        training.plot([n / 1e6 for n in tokens], losses, **style)
    validation.set_ylabel("validation loss (bits per byte)")
    training.set_ylabel("training loss (nats per token)")
    for ax in (validation, training):
        ax.set_xlabel("tokens of training (millions)")
        ax.grid(axis="y", color="0.9")


def draw_text(fig, args: argparse.Namespace) -> None:
    """Draw what assets/text.py measured, the curves of training runs, or both."""
    if args.figures is None and not args.curves:
        raise ValueError("nothing to draw: give --figures, --curves or both")
    models = []
    if args.figures is not None:
        models = load_losses(args.figures)["models"]
    curves = {}
    for text in args.curves:
        name, of_run = load_curves(text)
        if name in curves:
            raise ValueError(f"--curves: two runs are called {name!r}, give NAME=PATH")
        curves[name] = of_run
    names = list(dict.fromkeys([*(model["name"] for model in models), *curves]))
    if len(names) > len(STYLES):
        raise ValueError(
            f"{len(names)} models are too many to tell apart: give up to {len(STYLES)}"
        )
    styles = {}
    for name, style in zip(names, STYLES, strict=False):  # some styles are left over
        styles[name] = style | dict(linestyle="-")

    rows = []
    if models:
        rows.append(["positions", "positions"])
    if curves:
        rows.append(["validation", "training"])
    fig.set_size_inches(8, 1 + 3.4 * len(rows))
    axes = fig.subplot_mosaic(rows)
    if models:
        draw_positions(axes["positions"], models, styles)
    if curves:
        draw_curves(axes["validation"], axes["training"], curves, styles)
    handles = {}  # each label once
    for ax in axes.values():
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    if models:
        fig.suptitle(f"{models[0]['documents']} documents for validation", fontsize=10)


def load_pairs(path: str) -> list[dict]:
    """The rows of a file of assets/pairs.py. ValueError for another file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        for row in rows:
            row["right"] = {int(n): float(right) for n, right in row["right"].items()}
            row["memory"], row["state"], row["steps"], row["lr"]  # they have to be there
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no file of assets/pairs.py: name another") from None
    if not rows:
        raise ValueError(f"{path} holds no rows: run assets/pairs.py again")
    return rows


def draw_pairs(fig, rows: list[dict]) -> None:
    """Draw the share of right answers against the number of pairs: a line for each memory, with the
    learning rate that is best for it."""
    best = {}
    for row in rows:
        name = row["memory"]
        if name not in best or sum(row["right"].values()) > sum(best[name]["right"].values()):
            best[name] = row
    ax = fig.subplots()
    for row, style in zip(best.values(), STYLES, strict=False):
        numbers = list(row["right"])
        right = [100 * share for share in row["right"].values()]
        ax.plot(numbers, right, label=row["memory"], **style)
    ax.plot(numbers, [100 / n for n in numbers], label="floor", **AVERAGE)
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.set_xlabel("pairs of a key and a value in the document")
    ax.set_ylabel("values asked back that are right (%)")
    ax.set_ylim(-2, 102)
    ax.grid(axis="y", color="0.9")
    ax.legend(frameon=False)
    fig.suptitle(f"What a memory holds, after {rows[0]['steps']:,} steps of training")


def document(tokenizer: Tokenizer, args: argparse.Namespace) -> Document:
    """The document of the flags: a BABILong sample, or --text with its last sentence as the
    question."""
    if args.text is None:
        builder = Builder(tokenizer, "val", args.background)
        return builder.sample(args.task, parse_length(args.length), Random(args.seed))
    text = " ".join(args.text.split())
    *facts, question = split_sentences(text)
    return from_text(tokenizer, " ".join(facts), question, "")


def draw_memory(fig, args: argparse.Namespace) -> None:
    """Draw what is read from the memory of a checkpoint, or what is written to it."""
    model, content = load_checkpoint(args.ckpt)
    tokenizer = of_checkpoint(content, args.ckpt)
    draw = draw_read if args.picture == "read" else draw_write
    draw(fig, model.eval(), tokenizer, document(tokenizer, args), args.layer, args.head)


def add_figures_flags(command: Parser) -> None:
    """Add the flags that `accuracy` and `radar` share."""
    add = command.add_argument
    add("figures", metavar="FILE", help="a file that babilong_eval.py --figures wrote")
    add("--columns", nargs="+", help='the columns, such as "lm2 on" "lm2 off" (default all)')


def add_memory_flags(command: Parser) -> None:
    """Add the flags that `read` and `write` share."""
    add = command.add_argument
    add("--ckpt", default="out/ckpt.pt", help="a checkpoint of train.py (default out/ckpt.pt)")
    add("--text", help="a document that ends with the question (default a BABILong sample)")
    add("--task", default="qa1", help="the task of the sample (default qa1)")
    add(
        "--length",
        default="1k",
        help="how many tokens of facts and background the sample has (default 1k)",
    )
    add("--seed", type=int, default=0, help="the seed of the sample (default 0)")
    add(
        "--background",
        help="a folder of .txt files with prose (default Python's own documentation)",
    )
    add(
        "--head",
        default="mean",
        help="the number of a memory head, from 0, or mean for all of them (default mean)",
    )


def main(argv: list[str] | None = None) -> None:
    """Draw the picture that the flags ask for."""
    parser = Parser("python assets/pictures.py", __doc__.split("\n")[0])
    pictures = parser.add_subparsers(
        dest="picture",
        required=True,
        metavar="PICTURE",
        parser_class=lambda **known: Parser(known["prog"], known["description"]),
    )

    def add_picture(name: str, draw, note: str) -> Parser:
        command = pictures.add_parser(name, help=note, description=note)
        command.set_defaults(draw=draw)
        command.add_argument("--out", required=True, help="the file to write: .png, .pdf or .svg")
        return command

    accuracy = add_picture("accuracy", draw_figures, "accuracy by length, with intervals")
    add_figures_flags(accuracy)
    accuracy.add_argument(
        "--tasks", nargs="+", help="the tasks, drawn as their mean if several (default all)"
    )

    radar = add_picture("radar", draw_figures, "accuracy on five groups of tasks at one length")
    add_figures_flags(radar)
    radar.add_argument(
        "--length", default="4k", help="the length at which they were asked (default 4k)"
    )

    read = add_picture(
        "read", draw_memory, "what the last tokens read from the memory, before and after writing"
    )
    add_memory_flags(read)
    read.add_argument(
        "--layer",
        type=int,
        help="the number of the block, from 0 (default the block in which the last token reads a "
        "single slot most)",
    )

    write = add_picture(
        "write", draw_memory, "from which sentences of a document each slot was written"
    )
    add_memory_flags(write)
    write.add_argument(
        "--layer",
        type=int,
        help="the number of the block, from 0 (default the last four blocks with memory)",
    )

    inside = add_picture(
        "inside",
        lambda fig, args: draw_inside(fig, load_inside(args.figures)),
        "what the memory writes, reads and uses, over many documents",
    )
    inside.add_argument("figures", metavar="FILE", help="a file that assets/inside.py --out wrote")

    text = add_picture(
        "text", draw_text, "the loss of models of plain text, by position and in training"
    )
    text.add_argument("--figures", metavar="FILE", help="A file that assets/text.py --out wrote.")
    text.add_argument(
        "--curves",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="The metrics.jsonl of runs of train.py on plain text, as PATH or NAME=PATH.",
    )

    pairs = add_picture(
        "pairs",
        lambda fig, args: draw_pairs(fig, load_pairs(args.figures)),
        "how many pairs of key and value each memory holds",
    )
    pairs.add_argument("figures", metavar="FILE", help="A file that assets/pairs.py --out wrote.")

    args = parser.parse_args(argv)
    with one_line(f"python assets/pictures.py {args.picture}"):
        fig = figure(args.out)
        args.draw(fig, args)
        save(fig, args.out)


if __name__ == "__main__":
    main()
