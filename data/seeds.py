"""A table over seeds, in Markdown, from the counts that babilong_eval.py --figures wrote.

    python -m data.seeds assets/models.json --columns "lm2 on" "rmt on"
    python -m data.seeds assets/models.json --columns "lm2 off" "lm2 other" --which outside
    python -m data.seeds assets/five.json --across lengths                # a line a task and model
    python -m data.seeds assets/ten.json --across tasks                   # a line a length, model and seed

Writes nothing. A model evaluated as --ckpt lm2-0=... lm2-1=... is one column, "lm2 on", of seeds 0 and 1. A
cell is the median of the seeds (of an even number the lower of the middle two), Wilson's interval for that
seed's samples, which says nothing of other seeds, and every seed's share in their order; with the tasks side
by side every seed has a line. Means over tasks appear where all of qa1-5 or qa1-10 were asked.
"""
import json
import statistics
from pathlib import Path

from data.babi import TASKS
from data.cli import Parser, one_line
from data.document import length_name
from data.metrics import BLOCKS, GROUPS, column, percent, pooled, share

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
            if (not 0 <= min(counts) <= max(counts) <= c["n"] > 0 <= c["length"] or len(seen) < number
                    or not 0 <= min(far) <= max(far) == far[2] <= c["n"] or c["task"] not in TASKS):
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


def groups_of(cells: list[dict]) -> dict[str, list[str]]:
    """The tasks in order, each by itself, and of "qa1-5" and "qa1-10" those whose tasks are all there."""
    tasks = sorted({c["task"] for c in cells}, key=lambda task: int(task[2:]))
    return {t: [t] for t in tasks} | {g: of for g, of in GROUPS.items() if set(of) <= set(tasks)}


def markdown(cells: list[dict], columns: list[str] | None = None, which: str = "exact",
             across: str = "models") -> str:
    """The table: a line a task and length, or with `across` "lengths" a line a task and column, and one of
    the best constant answer below each task; ValueError for a column that is not there."""
    _, *keys = BLOCKS[which]
    n_key, _, floor_key = keys
    there = by_column(cells)
    columns = choose("--columns", columns, list(there))
    groups = {g if len(of) == 1 else f"mean of {g}": of for g, of in groups_of(cells).items()}
    lengths, rows = sorted({c["length"] for c in cells}), []
    for group, members in groups.items():
        found = {(name, x): pick(there[name], members, x, n_key) for name in columns for x in lengths}
        first = {x: next((found[name, x][0] for name in columns if found[name, x]), None) for x in lengths}
        floors = {x: f"{100 * share(f, n_key, floor_key):.1f}" if f else "-" for x, f in first.items()}
        if across == "models":
            for x, n in [(x, size(first[x], n_key)) for x in lengths if first[x]]:
                rows.append([group, length_name(x), f"{n}", floors[x]]
                            + [cell(found[name, x], keys, n) for name in columns])
        else:       # a line's floor says what n is, where that is not the first task's
            most = {x: size(first[x] or [], n_key) for x in lengths}
            usual = usual if rows else most
            rows += [[group, name] + [cell(found[name, x], keys, most[x]) for x in lengths]
                     for name in columns if any(found[name, x] for x in lengths)]
            rows.append([group, "floor", *(f"{floors[x]}, n = {n}" if n not in (0, usual[x]) else floors[x]
                                           for x, n in most.items())])
    head = (["task", "length", "n", "floor", *columns] if across == "models" else
            ["task", "column", *(f"{length_name(x)}, n = {n}" for x, n in usual.items())])
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def side_by_side(cells: list[dict], columns: list[str] | None = None, which: str = "exact") -> str:
    """The table with the tasks side by side: a line a length, column and seed, and one of the best constant
    answers (the first line's that has any) with the samples a task; of means the interval too."""
    _, n_key, hits_key, floor_key = BLOCKS[which]
    there, groups = by_column(cells), groups_of(cells)
    rows = [["length", "column", *groups], ["---"] * (2 + len(groups))]
    for length in sorted({c["length"] for c in cells}):
        floors, sizes = ["-"] * len(groups), set()
        for name in choose("--columns", columns, list(there)):
            for model, seed in there[name].items():
                row = []
                for i, members in enumerate(groups.values()):
                    text = "-"
                    for found in pick({model: seed}, members, length, n_key):
                        sizes |= {c[n_key] for c in found}
                        text = percent(*pooled(found, n_key, hits_key)).replace(",", ", ")
                        if floors[i] == "-":
                            floors[i] = f"{100 * share(found, n_key, floor_key):.1f}"
                    row.append(text if len(members) > 1 else text.split(" ")[0])
                if set(row) != {"-"}:
                    label = name if len(there[name]) == 1 else f"{model} {name.rpartition(' ')[2]}"
                    rows.append([length_name(length), label, *row])
        if sizes := sorted(sizes):
            n = f"n = {sizes[0]}" + f" to {sizes[-1]}" * (len(sizes) > 1)
            rows.append([length_name(length), f"floor, {n}", *floors])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.seeds", __doc__.split("\n")[0])
    parser.add_argument("figures", metavar="FILE", nargs="+",
                        help="what babilong_eval.py --figures wrote; several make one table")
    parser.add_argument("--columns", nargs="+", help='such as "lm2 on" "lm2 off" (default all)')
    parser.add_argument("--which", default="exact", choices=("exact", "outside", "official"),
                        help="exact match; of facts outside the window; the benchmark's own metric "
                             "(default exact)")
    parser.add_argument("--across", default="models", choices=("models", "lengths", "tasks"),
                        help="what stands side by side (default models)")
    args = parser.parse_args(argv)
    with one_line("python -m data.seeds"):
        cells = sum(map(load_figures, args.figures), [])
        print(side_by_side(cells, args.columns, args.which) if args.across == "tasks" else
              markdown(cells, args.columns, args.which, args.across))


if __name__ == "__main__":
    main()
