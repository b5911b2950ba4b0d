"""Print a Markdown table from the counts that babilong_eval.py --figures wrote.

    python assets/tables.py assets/models.json --columns "lm2 on" "rmt on"
    python assets/tables.py assets/models.json --columns "lm2 off" "lm2 other" --which outside
    python assets/tables.py assets/ten.json --across lengths --tasks qa1-5
    python assets/tables.py assets/ten.json --across tasks --lengths 4k

Writes no file.

A model whose name ends in a number is a seed: `--ckpt lm2-0=... lm2-1=...` of babilong_eval.py
gives one column, "lm2 on", with the seeds 0 and 1.

By default the columns stand side by side. Then an entry is the share of the median seed (of an even
number of seeds the lower of the middle two), Wilson's 95 % interval of that share, and in brackets
the share of every seed. The interval tells how much the share depends on the samples. It tells
nothing about other seeds.

With `--across tasks` or `--across lengths` every seed has a line of its own. The last line of a
block is the floor, which is the best constant answer.

The means over qa1-5 and qa1-10 appear where all of their tasks are in the file.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/tables.py`

from babilong_eval import BLOCKS, GROUPS, column, percent, pooled, share  # noqa: E402
from data.babi import TASKS  # noqa: E402
from data.common import Parser, one_line  # noqa: E402
from data.document import length_name, parse_length  # noqa: E402

Cell = dict  # the counts of a model, memory mode, task and length: `cells` in babilong_eval.py
Seed = dict[tuple[str, int], Cell]  # (task, length) -> cell
Seeds = dict[str, Seed]  # the model's name, such as "lm2-0" -> its cells


class Keys(NamedTuple):
    """The keys of a cell under which the counts of one table stand."""

    n: str  # samples
    hits: str  # right answers
    floor: str  # right answers of the best constant answer


def keys_of(which: str) -> Keys:
    """The keys for --which: "exact", "outside" or "official"."""
    _, n, hits, floor = BLOCKS[which]
    return Keys(n, hits, floor)


def is_sound(cell: Cell) -> bool:
    """Whether the counts of a cell are possible. KeyError or TypeError if one of them is missing or
    not a number."""
    counts = [cell[key] for key in ("exact", "floor", "official", "floor_official")]
    outside_counts = [cell["outside_exact"], cell["floor_outside"]]
    return (
        isinstance(cell["model"], str)
        and isinstance(cell["memory"], str)
        and cell["task"] in TASKS
        and cell["length"] >= 0
        and cell["n"] >= 1
        and all(0 <= count <= cell["n"] for count in counts)
        and all(0 <= count <= cell["outside_n"] for count in outside_counts)
        and cell["outside_n"] <= cell["n"]
    )


def load_figures(path: str) -> list[Cell]:
    """The cells of a file of `babilong_eval.py --figures`. ValueError names a file that is not one,
    or the cell that is broken or occurs twice."""
    advice = "write the file with babilong_eval.py --figures"
    number = 0
    seen = set()
    try:
        cells = json.loads(Path(path).read_bytes())["cells"]
        for number, cell in enumerate(cells, 1):
            seen.add((cell["model"], cell["memory"], cell["task"], cell["length"]))
            is_new = len(seen) == number
            if not is_new or not is_sound(cell):
                raise ValueError
    except (ValueError, KeyError, TypeError):
        if number:
            problem = f"cell {number} is broken or occurs twice"
        else:
            problem = "it is not such a file"
        raise ValueError(f"{path} holds no figures, {problem}: {advice}") from None
    if not cells:
        raise ValueError(f"{path} holds no figures, it is empty: {advice}")
    return cells


def choose(flag: str, asked: list[str] | None, there: list[str]) -> list[str]:
    """What was asked for, each once, or all that is there. ValueError names what is not there."""
    there = list(dict.fromkeys(there))
    if asked is None:
        return there
    for name in asked:
        if name not in there:
            known = ", ".join(repr(x) for x in there)
            raise ValueError(f"{flag} {name!r} is not in the file: choose from {known}")
    return list(dict.fromkeys(asked))


def without_seed(model: str) -> str:
    """A model's name without its seed: "lm2-0" -> "lm2"."""
    name, _, seed = model.rpartition("-")
    if name and seed.isdecimal():
        return name
    return model


def by_column(cells: list[Cell]) -> dict[str, Seeds]:
    """The seeds of each column, such as "lm2 on". ValueError for a cell that occurs twice."""
    columns: dict[str, Seeds] = {}
    for cell in cells:
        name = f"{without_seed(cell['model'])} {cell['memory']}"
        seeds = columns.setdefault(name, {})
        seed = seeds.setdefault(cell["model"], {})
        task, length = cell["task"], cell["length"]
        if (task, length) in seed:
            where = f"{task} at {length_name(length)}"
            raise ValueError(f"{column(cell)!r} has {where} in two files: name one of them")
        seed[task, length] = cell
    return columns


def cells_of(seed: Seed, tasks: list[str], length: int, n_key: str = "n") -> list[Cell]:
    """A seed's cells of these tasks at a length. It is empty if a task is missing or has no sample,
    as the mean over tasks would not be one."""
    cells = []
    for task in tasks:
        cell = seed.get((task, length))
        if cell is None or cell[n_key] == 0:
            return []
        cells.append(cell)
    return cells


def complete_seeds(
    seeds: Seeds, tasks: list[str], length: int, n_key: str = "n"
) -> list[list[Cell]]:
    """The cells of each seed that has all of these tasks at a length."""
    candidates = [cells_of(seed, tasks, length, n_key) for seed in seeds.values()]
    return [cells for cells in candidates if cells]


def median_seed(seeds: list[list[Cell]], n_key: str, hits_key: str) -> list[Cell]:
    """The cells of the seed whose mean over its cells is the (lower) median."""
    shares = [share(cells, n_key, hits_key) for cells in seeds]
    return seeds[shares.index(statistics.median_low(shares))]


def n_samples(cells: list[Cell], keys: Keys) -> int:
    """The number of samples of all cells together."""
    return sum(cell[keys.n] for cell in cells)


def interval_text(cells: list[Cell], keys: Keys) -> str:
    """The mean over cells in % and its interval: "98.0 [95, 99]"."""
    hits, n = pooled(cells, keys.n, keys.hits)
    return percent(hits, n).replace(",", ", ")


def floor_text(cells: list[Cell], keys: Keys) -> str:
    """The mean floor of cells in %: "20.0"."""
    return f"{100 * share(cells, keys.n, keys.floor):.1f}"


def entry_text(seeds: list[list[Cell]], keys: Keys, n: int) -> str:
    """An entry of a column: "98.0 [95, 99] (97.0 98.0 98.0)", or "-" without a seed.

    seeds  for each seed its cells of the tasks of the line
    n      the samples of the line. An entry with another number says so and names its own floor."""
    if not seeds:
        return "-"
    median = median_seed(seeds, keys.n, keys.hits)
    text = interval_text(median, keys)
    if len(seeds) > 1:
        shares = [f"{100 * share(cells, keys.n, keys.hits):.1f}" for cells in seeds]
        text += f" ({' '.join(shares)})"
    if n_samples(median, keys) != n:
        text += f", n = {n_samples(median, keys)}, floor {floor_text(median, keys)}"
    return text


def groups_of(cells: list[Cell], asked: list[str] | None) -> dict[str, list[str]]:
    """The tasks behind each name that --tasks takes: a task stands for itself, "qa1-5" and "qa1-10"
    for several tasks if all of them are there. ValueError names what is not there."""
    tasks = sorted({cell["task"] for cell in cells}, key=lambda task: int(task[2:]))
    groups = {task: [task] for task in tasks}
    for name, members in GROUPS.items():
        if set(members) <= set(tasks):
            groups[name] = members
    return {name: groups[name] for name in choose("--tasks", asked, list(groups))}


def lengths_of(cells: list[Cell], asked: list[str] | None) -> dict[str, int]:
    """The length behind each name that --lengths takes. ValueError names one that is not there."""
    lengths = {}
    for length in sorted({cell["length"] for cell in cells}):
        lengths[length_name(length)] = length
    if asked is not None:
        asked = [length_name(parse_length(text)) for text in asked]
    return {name: lengths[name] for name in choose("--lengths", asked, list(lengths))}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def table_of_columns(
    cells: list[Cell],
    columns: list[str] | None = None,
    which: str = "exact",
    tasks: list[str] | None = None,
    lengths: list[str] | None = None,
) -> str:
    """The table with the columns side by side and a line for each task and length.

    ValueError names a column, a task or a length that is not there."""
    keys = keys_of(which)
    seeds_by_column = by_column(cells)
    columns = choose("--columns", columns, list(seeds_by_column))
    known_lengths = lengths_of(cells, lengths)
    rows = []
    for group, members in groups_of(cells, tasks).items():
        name = group if len(members) == 1 else f"mean of {group}"
        for length_text, length in known_lengths.items():
            entries = []
            for column_name in columns:
                seeds = seeds_by_column[column_name]
                entries.append(complete_seeds(seeds, members, length, keys.n))
            filled = [seeds for seeds in entries if seeds]
            if filled:
                first_seed = filled[0][0]  # its samples are those that the line names
                n = n_samples(first_seed, keys)
                row = [name, length_text, str(n), floor_text(first_seed, keys)]
                for seeds in entries:
                    row.append(entry_text(seeds, keys, n))
                rows.append(row)
    return markdown(["task", "length", "n", "floor", *columns], rows)


def seed_text(cells: list[Cell], keys: Keys, across: str) -> str:
    """An entry of a seed's line. A single task among others that stand beside it has no interval,
    as there is no room."""
    if not cells:
        return "-"
    text = interval_text(cells, keys)
    if across == "tasks" and len(cells) == 1:
        return text.split(" ")[0]
    return text


def floor_row(lines: list[list[list[Cell]]], keys: Keys) -> list[str]:
    """The floor below some lines: its name with the least and the greatest number of samples of a
    task, then for each place the floor of the line that has most samples there.

    lines  for each line and place the cells, which may be none"""
    sizes = {cell[keys.n] for line in lines for cells in line for cell in cells}
    name = f"floor, n = {min(sizes)}"
    if len(sizes) > 1:
        name += f" to {max(sizes)}"
    row = [name]
    for cells_at_place in zip(*lines, strict=True):
        largest = max(cells_at_place, key=lambda cells: n_samples(cells, keys))
        row.append(floor_text(largest, keys) if largest else "-")
    return row


def table_of_seeds(
    cells: list[Cell],
    columns: list[str] | None = None,
    which: str = "exact",
    across: str = "tasks",
    tasks: list[str] | None = None,
    lengths: list[str] | None = None,
) -> str:
    """The table with the tasks or the lengths side by side and a line for each column and seed.

    With the tasks side by side there is a block of lines for each length, and only means have an
    interval. With the lengths side by side there is a block for each task, and every entry has an
    interval. ValueError names a column, a task or a length that is not there."""
    keys = keys_of(which)
    seeds_by_column = by_column(cells)
    columns = choose("--columns", columns, list(seeds_by_column))
    groups = groups_of(cells, tasks)
    known_lengths = lengths_of(cells, lengths)
    if across == "tasks":
        blocks, places = list(known_lengths), list(groups)
        head = ["length", "column", *places]
    else:
        blocks, places = list(groups), list(known_lengths)
        head = ["task", "column", *places]
    rows = []
    for block in blocks:
        if across == "tasks":
            spots = [(groups[place], known_lengths[block]) for place in places]
        else:
            spots = [(groups[block], known_lengths[place]) for place in places]
        lines = []
        for column_name in columns:
            memory = column_name.split(" ")[-1]
            for model, seed in seeds_by_column[column_name].items():
                line = [cells_of(seed, members, length, keys.n) for members, length in spots]
                if any(line):
                    lines.append(line)
                    entries = [seed_text(found, keys, across) for found in line]
                    rows.append([block, f"{model} {memory}", *entries])
        if lines:
            rows.append([block, *floor_row(lines, keys)])
    return markdown(head, rows)


def main(argv: list[str] | None = None) -> None:
    """Print the table that the flags ask for."""
    parser = Parser("python assets/tables.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "figures",
        metavar="FILE",
        nargs="+",
        help="a file that babilong_eval.py --figures wrote; several files make one table",
    )
    add("--columns", nargs="+", help='the columns, such as "lm2 on" "lm2 off" (default all)')
    add("--tasks", nargs="+", help="the tasks, such as qa1, or qa1-5 for a mean (default all)")
    add("--lengths", nargs="+", help="the lengths, such as 0k 4k (default all)")
    add(
        "--which",
        default="exact",
        choices=("exact", "outside", "official"),
        help="what is counted: exact matches, exact matches of samples whose needed facts lie "
        "outside the window, or hits by the benchmark's own metric (default exact)",
    )
    add(
        "--across",
        default="models",
        choices=("models", "lengths", "tasks"),
        help="what stands side by side (default models)",
    )
    args = parser.parse_args(argv)
    with one_line("python assets/tables.py"):
        cells = []
        for path in args.figures:
            cells += load_figures(path)
        chosen = dict(
            columns=args.columns, which=args.which, tasks=args.tasks, lengths=args.lengths
        )
        if args.across == "models":
            print(table_of_columns(cells, **chosen))
        else:
            print(table_of_seeds(cells, across=args.across, **chosen))


if __name__ == "__main__":
    main()
