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
section is the floor, which is the best constant answer.

The means over qa1-5 and qa1-10 appear where all of their tasks are in the file.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/tables.py`

from babilong_eval import (  # noqa: E402
    BLOCKS,
    GROUPS,
    Block,
    Cell,
    column,
    percents,
    pooled,
    share,
)
from data.babi import TASKS  # noqa: E402
from data.common import Parser, one_line  # noqa: E402
from data.document import length_name, parse_length  # noqa: E402

Seed = dict[tuple[str, int], Cell]  # (task, length) -> cell
Seeds = dict[str, Seed]  # the model's name, such as "lm2-0" -> its cells


def is_sound(cell: object) -> bool:
    """Whether this is a cell that has all of its counts, and they are possible."""
    try:
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
    except (KeyError, TypeError):  # a count is missing or not a number
        return False


def fault(figures: object) -> str:
    """What is wrong with the content of a file of figures; "" if nothing is."""
    if not isinstance(figures, dict) or not isinstance(figures.get("cells"), list):
        return "it is not such a file"
    if not figures["cells"]:
        return "it is empty"
    seen = set()
    for number, cell in enumerate(figures["cells"], 1):
        if not is_sound(cell):
            return f"cell {number} is broken"
        place = (cell["model"], cell["memory"], cell["task"], cell["length"])
        if place in seen:
            return f"cell {number} occurs twice"
        seen.add(place)
    return ""


def load_figures(path: str) -> list[Cell]:
    """The cells of a file of `babilong_eval.py --figures`. ValueError names a file that is not one,
    or the cell that is broken or occurs twice."""
    try:
        figures = json.loads(Path(path).read_bytes())
    except ValueError:
        figures = None
    problem = fault(figures)
    if problem:
        raise ValueError(
            f"{path} holds no figures, {problem}: write the file with babilong_eval.py --figures"
        )
    return figures["cells"]


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
    """A seed's cells of these tasks at a length. There are none if a task is missing or has no
    sample, as a mean over the other tasks could not be compared."""
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
    seed_cells = [cells_of(seed, tasks, length, n_key) for seed in seeds.values()]
    return [cells for cells in seed_cells if cells]


def median_seed(seed_cells: list[list[Cell]], n_key: str, hits_key: str) -> list[Cell]:
    """The cells of one seed: the one whose mean over its cells is the median of all seeds.

    Of an even number of seeds it is the lower of the middle two."""
    shares = [share(cells, n_key, hits_key) for cells in seed_cells]
    return seed_cells[shares.index(statistics.median_low(shares))]


def n_samples(cells: list[Cell], block: Block) -> int:
    """The number of samples of all cells together."""
    return sum(cell[block.n] for cell in cells)


def mean_text(cells: list[Cell], block: Block, has_interval: bool = True) -> str:
    """The mean over cells in %, with its interval or without: "98.0 [95, 99]" or "98.0"."""
    hits, n = pooled(cells, block.n, block.hits)
    mean, low, high = percents(hits, n)
    if has_interval:
        return f"{mean} [{low}, {high}]"
    return mean


def floor_text(cells: list[Cell], block: Block) -> str:
    """The mean floor of cells in %: "20.0"."""
    return f"{100 * share(cells, block.n, block.floor):.1f}"


def entry_text(seed_cells: list[list[Cell]], block: Block, n: int) -> str:
    """An entry of a column: "98.0 [95, 99] (97.0 98.0 98.0)", or "-" without a seed.

    seed_cells  for each seed its cells of the tasks of the line
    n           the samples of the line. An entry with another number says so and names its own
                floor"""
    if not seed_cells:
        return "-"
    median = median_seed(seed_cells, block.n, block.hits)
    text = mean_text(median, block)
    if len(seed_cells) > 1:
        shares = [f"{100 * share(cells, block.n, block.hits):.1f}" for cells in seed_cells]
        text += f" ({' '.join(shares)})"
    if n_samples(median, block) != n:
        text += f", n = {n_samples(median, block)}, floor {floor_text(median, block)}"
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
    block = BLOCKS[which]
    seeds_by_column = by_column(cells)
    columns = choose("--columns", columns, list(seeds_by_column))
    known_lengths = lengths_of(cells, lengths)
    rows = []
    for group, members in groups_of(cells, tasks).items():
        name = group if len(members) == 1 else f"mean of {group}"
        for length_text, length in known_lengths.items():
            line = []  # for each column, the cells of each of its seeds
            for column_name in columns:
                seeds = seeds_by_column[column_name]
                line.append(complete_seeds(seeds, members, length, block.n))
            filled = [seed_cells for seed_cells in line if seed_cells]
            if filled:
                first_cells = filled[0][0]  # the line names the samples of its first seed
                n = n_samples(first_cells, block)
                row = [name, length_text, str(n), floor_text(first_cells, block)]
                for seed_cells in line:
                    row.append(entry_text(seed_cells, block, n))
                rows.append(row)
    return markdown(["task", "length", "n", "floor", *columns], rows)


def floor_row(lines: list[list[list[Cell]]], block: Block) -> list[str]:
    """The last line of a section. It begins with "floor, n = least to greatest", the numbers of
    samples of its cells. Each place shows the floor of the seed with the most samples there.

    lines  for each seed and place, its cells"""
    sizes = {cell[block.n] for line in lines for cells in line for cell in cells}
    name = f"floor, n = {min(sizes)}"
    if len(sizes) > 1:
        name += f" to {max(sizes)}"
    row = [name]
    for cells_at_place in zip(*lines, strict=True):
        largest = max(cells_at_place, key=lambda cells: n_samples(cells, block))
        row.append(floor_text(largest, block) if largest else "-")
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

    With the tasks side by side there is a section of lines for each length, and only means have an
    interval, as there is no room for more. With the lengths side by side there is a section for
    each task, and every entry has an interval.

    ValueError names a column, a task or a length that is not there."""
    block = BLOCKS[which]
    seeds_by_column = by_column(cells)
    columns = choose("--columns", columns, list(seeds_by_column))
    groups = groups_of(cells, tasks)
    known_lengths = lengths_of(cells, lengths)
    by_tasks = across == "tasks"
    sections = known_lengths if by_tasks else groups
    places = groups if by_tasks else known_lengths
    rows = []
    for section in sections:
        lines = []  # for each seed and place, its cells
        for column_name in columns:
            memory = column_name.split(" ")[-1]
            for model, seed in seeds_by_column[column_name].items():
                line = []
                row = [section, f"{model} {memory}"]
                for place in places:
                    group, length_text = (place, section) if by_tasks else (section, place)
                    own_cells = cells_of(seed, groups[group], known_lengths[length_text], block.n)
                    line.append(own_cells)
                    has_interval = not by_tasks or len(own_cells) > 1
                    row.append(mean_text(own_cells, block, has_interval) if own_cells else "-")
                if any(line):
                    lines.append(line)
                    rows.append(row)
        if lines:
            rows.append([section, *floor_row(lines, block)])
    return markdown(["length" if by_tasks else "task", "column", *places], rows)


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
