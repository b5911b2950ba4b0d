"""A table over seeds, in Markdown, from the counts that babilong_eval.py --figures wrote.

    python -m data.seeds assets/qa1.json                                  # every column
    python -m data.seeds assets/qa1.json --columns "lm2 on" "rmt on" --which outside

Writes nothing. A model evaluated as --ckpt lm2-0=... lm2-1=... is one column, "lm2 on", of seeds 0 and 1. A
cell is the median of the seeds, its Wilson interval, and every seed's share in their order.
"""
import statistics

from data.cli import Parser, one_line
from data.document import length_name
from data.metrics import BLOCKS, column, percent, share
from data.pictures import choose, load_figures


def by_seed(cells: list[dict]) -> dict[tuple[str, str, int], list[dict]]:
    """(column, task, length) -> the cells of its seeds; the column's name is the model's without "-SEED"."""
    groups: dict[tuple, list[dict]] = {}
    for c in cells:
        name, _, seed = c["model"].rpartition("-")
        name = name if seed.isdecimal() and name else c["model"]
        groups.setdefault((column(c | dict(model=name)), c["task"], c["length"]), []).append(c)
    return groups


def cell(found: list[dict], n_key: str, hits_key: str) -> str:
    """"98.0 [95, 99] (97.0 98.0 98.0)"; one seed has no brackets behind, no sample is a dash."""
    found = [c for c in found if c.get(n_key)]
    if not found:
        return "-"
    shares = [share([c], n_key, hits_key) for c in found]
    middle = found[shares.index(statistics.median_low(shares))]
    text = percent(middle[hits_key], middle[n_key]).replace(",", ", ")
    return text + (f" ({' '.join(f'{100 * s:.1f}' for s in shares)})" if len(shares) > 1 else "")


def markdown(cells: list[dict], columns: list[str] | None = None, which: str = "exact") -> str:
    """The table, a line a task and length; ValueError for a column that is not there."""
    _, n_key, hits_key, floor_key = BLOCKS[which]
    groups = by_seed(cells)
    columns = choose("--columns", columns, [name for name, _, _ in groups])
    lines = ["| task | length | n | floor | " + " | ".join(columns) + " |", "|---" * (4 + len(columns)) + "|"]
    for task, length in sorted({(t, x) for _, t, x in groups}, key=lambda tx: (int(tx[0][2:]), tx[1])):
        row = [groups.get((name, task, length), []) for name in columns]
        first = next((c for found in row for c in found if c.get(n_key)), None)
        if first:
            lines.append(f"| {task} | {length_name(length)} | {first[n_key]} | "
                         f"{100 * share([first], n_key, floor_key):.1f} | "
                         + " | ".join(cell(found, n_key, hits_key) for found in row) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.seeds", __doc__.split("\n")[0])
    parser.add_argument("figures", metavar="FILE", help="what babilong_eval.py --figures wrote")
    parser.add_argument("--columns", nargs="+", help='such as "lm2 on" "lm2 off" (default all)')
    parser.add_argument("--which", default="exact", choices=("exact", "outside", "official"),
                        help="exact match; of facts outside the window; the benchmark's own metric "
                             "(default exact)")
    args = parser.parse_args(argv)
    with one_line("python -m data.seeds"):
        print(markdown(load_figures(args.figures), args.columns, args.which))


if __name__ == "__main__":
    main()
