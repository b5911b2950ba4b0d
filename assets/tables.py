"""A table over seeds, in Markdown, from the counts that babilong_eval.py --figures wrote.

    python assets/tables.py assets/models.json --columns "lm2 on" "rmt on"
    python assets/tables.py assets/models.json --columns "lm2 off" "lm2 other" --which outside
    python assets/tables.py assets/ten.json --across lengths --tasks qa1-5   # a line a column and seed
    python assets/tables.py assets/ten.json --across tasks --lengths 4k

Writes nothing. A model evaluated as --ckpt lm2-0=... lm2-1=... is one column, "lm2 on", of seeds 0 and 1. A
cell is the median of the seeds (of an even number the lower of the middle two), Wilson's interval for that
seed's samples, which says nothing of other seeds, and every seed's share in their order; with tasks or with
lengths side by side every seed has a line. Means over tasks appear where all of qa1-5 or qa1-10 were asked.
"""
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/tables.py`

from babilong_eval import BLOCKS, GROUPS, column, percent, pooled, share  # noqa: E402
from data.babi import TASKS  # noqa: E402
from data.common import Parser, one_line  # noqa: E402
from data.document import length_name, parse_length  # noqa: E402


Seeds = dict[str, dict[tuple[str, int], dict]]      # model -> (task, length) -> cell


def load_figures(path: str) -> list[dict]:
    """The cells of a file of `babilong_eval.py --figures`; ValueError names a file or a cell that is none."""
    number, seen, mend = 0, set(), "write it with babilong_eval.py --figures"
    try:
        cells = json.loads(Path(path).read_bytes())["cells"]
        for number, c in enumerate(cells, 1):
            counts = [c[key] for key in ("exact", "floor", "official", "floor_official")]
            far = [c[key] for key in ("outside_exact", "floor_outside", "outside_n")]
            seen.add((c["model"] + c["memory"] + c["task"], c["length"]))
            if (not 0 <= min(counts) <= max(counts) <= c["n"] or c["n"] < 1 or c["length"] < 0
                    or not 0 <= min(far) <= max(far) == far[2] <= c["n"] or len(seen) < number
                    or c["task"] not in TASKS):
                raise ValueError
    except (ValueError, KeyError, TypeError):
        where = f"cell {number} is broken or there twice" if number else "that is none of its files"
        raise ValueError(f"{path} holds no figures, {where}: {mend}") from None
    if not cells:
        raise ValueError(f"{path} holds no figures, it is empty: {mend}")
    return cells


def choose(flag: str, asked: list[str] | None, there: list[str]) -> list[str]:
    """What was asked for, or all; ValueError for what is not there."""
    there = list(dict.fromkeys(there))
    for x in asked or ():
        if x not in there:
            raise ValueError(f"{flag} {x!r} is not in the file: choose from {', '.join(map(repr, there))}")
    return list(dict.fromkeys(asked or there))


def by_column(cells: list[dict]) -> dict[str, Seeds]:
    """column -> its seeds' cells; the column's name is the model's without "-SEED". ValueError for a cell
    that is there twice."""
    columns: dict[str, Seeds] = {}
    for c in cells:
        name, _, seed = c["model"].rpartition("-")
        name = column(c | dict(model=name if seed.isdecimal() and name else c["model"]))
        mine, key = columns.setdefault(name, {}).setdefault(c["model"], {}), (c["task"], c["length"])
        if key in mine:
            raise ValueError(f"{column(c)!r} has {key[0]} at {length_name(key[1])} in two files: name one")
        mine[key] = c
    return columns


def pick(seeds: Seeds, tasks: list[str], length: int, n_key: str) -> list[list[dict]]:
    """Of every seed the cells of these tasks at a length, if it has all of them."""
    found = ([seed.get((t, length), {}) for t in tasks] for seed in seeds.values())
    return [cells for cells in found if all(c.get(n_key) for c in cells)]


def middle(found: list[list[dict]], n_key: str, hits_key: str) -> list[dict]:
    """Of seeds' cells those with the median of the means."""
    shares = [share(cells, n_key, hits_key) for cells in found]
    return found[shares.index(statistics.median_low(shares))]


def merged(cells: list[dict], tasks: list[str], metric: str) -> list[dict]:
    """At each length of each column the cells of the seed in the middle of these tasks' means, by the
    column's name; where no seed has all the tasks, those of the first that has any."""
    out = []
    for name, seeds in by_column(cells).items():
        for length in sorted({x for seed in seeds.values() for _, x in seed}):
            some = ([c for (_, x), c in seed.items() if x == length] for seed in seeds.values())
            found = pick(seeds, tasks, length, "n")
            chosen = middle(found, "n", metric) if found else next(filter(None, some))
            out += [c | dict(model=name.rpartition(" ")[0]) for c in chosen]
    return out


def size(cells: list[dict], n_key: str) -> int:
    """Samples in all."""
    return sum(c[n_key] for c in cells)


def cell(found: list[list[dict]], keys: tuple[str, str, str], n: int | None = None) -> str:
    """"98.0 [95, 99] (97.0 98.0 98.0)"; one seed has no brackets behind, none at all is a dash. Where the
    samples are not n, it says how many they are, and their floor."""
    if not found:
        return "-"
    n_key, hits_key, floor_key = keys
    shares = [share(cells, n_key, hits_key) for cells in found]
    most = middle(found, n_key, hits_key)
    text = percent(*pooled(most, n_key, hits_key)).replace(",", ", ")
    text += f" ({' '.join(f'{100 * s:.1f}' for s in shares)})" if len(shares) > 1 else ""
    few = f", n = {size(most, n_key)}, floor {100 * share(most, n_key, floor_key):.1f}"
    return text + (few if n not in (None, size(most, n_key)) else "")


def groups_of(cells: list[dict], asked: list[str] | None = None) -> dict[str, list[str]]:
    """The tasks in order, each by itself, and of "qa1-5" and "qa1-10" those whose tasks are all there; or
    those asked for. ValueError for one that is not there."""
    tasks = sorted({c["task"] for c in cells}, key=lambda task: int(task[2:]))
    groups = {t: [t] for t in tasks} | {g: of for g, of in GROUPS.items() if set(of) <= set(tasks)}
    return {name: groups[name] for name in choose("--tasks", asked, list(groups))}


def lengths_of(cells: list[dict], asked: list[str] | None = None) -> dict[str, int]:
    """The lengths in order by their names, or those asked for. ValueError for one that is not there."""
    there = {length_name(x): x for x in sorted({c["length"] for c in cells})}
    names = asked and [length_name(parse_length(x)) for x in asked]
    return {name: there[name] for name in choose("--lengths", names, list(there))}


def markdown(cells: list[dict], columns: list[str] | None = None, which: str = "exact",
             tasks: list[str] | None = None, lengths: list[str] | None = None) -> str:
    """The table with the columns side by side: a line a task and length; ValueError for a column, a task or
    a length that is not there."""
    _, *keys = BLOCKS[which]
    n_key, _, floor_key = keys
    there = by_column(cells)
    columns = choose("--columns", columns, list(there))
    head = ["task", "length", "n", "floor", *columns]
    rows = [head, ["---"] * len(head)]
    for group, members in groups_of(cells, tasks).items():
        for length in lengths_of(cells, lengths).values():
            found = [pick(there[name], members, length, n_key) for name in columns]
            first = next((f[0] for f in found if f), None)
            if first:
                n = size(first, n_key)
                name, best = "mean of " * (len(members) > 1) + group, 100 * share(first, n_key, floor_key)
                rows.append([name, length_name(length), f"{n}", f"{best:.1f}"]
                            + [cell(f, keys, n) for f in found])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def side_by_side(cells: list[dict], columns: list[str] | None = None, which: str = "exact",
                 across: str = "tasks", tasks: list[str] | None = None, lengths: list[str] | None = None
                 ) -> str:
    """The table with the tasks side by side, a line a length, column and seed, or with the lengths side by
    side, a line a task, column and seed; of means, and of tasks that have a line, the interval too. Below
    these lines one of the best constant answers, to the samples of the line that has most, and how many
    samples a task the lines have."""
    _, n_key, hits_key, floor_key = BLOCKS[which]
    there, groups = by_column(cells), groups_of(cells, tasks)
    columns = choose("--columns", columns, list(there))
    names = lengths_of(cells, lengths)
    downs, acrosses = (names, groups) if across == "tasks" else (groups, names)
    rows = [["length" if across == "tasks" else "task", "column", *acrosses], ["---"] * (2 + len(acrosses))]
    for down in downs:
        most, sizes = [(0, "-")] * len(acrosses), set()
        for name, model in ((name, model) for name in columns for model in there[name]):
            row = []
            for i, right in enumerate(acrosses):
                group, length = (right, down) if across == "tasks" else (down, right)
                text = "-"
                for found in pick({model: there[name][model]}, groups[group], names[length], n_key):
                    sizes |= {c[n_key] for c in found}
                    text = percent(*pooled(found, n_key, hits_key)).replace(",", ", ")
                    if size(found, n_key) > most[i][0]:
                        most[i] = size(found, n_key), f"{100 * share(found, n_key, floor_key):.1f}"
                row.append(text if across == "lengths" or len(groups[group]) > 1 else text.split(" ")[0])
            if set(row) != {"-"}:
                rows.append([down, f"{model} {name.rpartition(' ')[2]}", *row])
        if sizes := sorted(sizes):
            n = f"n = {sizes[0]}" + f" to {sizes[-1]}" * (len(sizes) > 1)
            rows.append([down, f"floor, {n}", *(text for _, text in most)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python assets/tables.py", __doc__.split("\n")[0])
    parser.add_argument("figures", metavar="FILE", nargs="+",
                        help="what babilong_eval.py --figures wrote; several make one table")
    parser.add_argument("--columns", nargs="+", help='such as "lm2 on" "lm2 off" (default all)')
    parser.add_argument("--tasks", nargs="+", help="such as qa1, or qa1-5 for that mean (default all)")
    parser.add_argument("--lengths", nargs="+", help="such as 0k 4k (default all)")
    parser.add_argument("--which", default="exact", choices=("exact", "outside", "official"),
                        help="exact match; of facts outside the window; the benchmark's own metric "
                             "(default exact)")
    parser.add_argument("--across", default="models", choices=("models", "lengths", "tasks"),
                        help="what stands side by side (default models)")
    args = parser.parse_args(argv)
    with one_line("python assets/tables.py"):
        cells = sum(map(load_figures, args.figures), [])
        chosen = args.tasks, args.lengths
        print(markdown(cells, args.columns, args.which, *chosen) if args.across == "models" else
              side_by_side(cells, args.columns, args.which, args.across, *chosen))


if __name__ == "__main__":
    main()
