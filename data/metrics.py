"""What is right and how sure one can be of it: two metrics, intervals, floors, a paired test, tables.

    from data.metrics import exact_match, official_score, wilson, mcnemar

`exact` is exact match of the normalised answer, the headline. `official` is the benchmark's own metric,
faults included: a perfect model gets about 53 % on qa7, where "none" holds the label "one". Writes nothing.
"""
import math
from typing import Iterable

from data.document import length_name

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


def score(metric: str, row: dict) -> bool:
    """Whether a prediction is right by a metric, "exact" or "official"."""
    if metric == "exact":
        return exact_match(row["target"], row["output"])
    return official_score(row["task"], row["target"], row["output"], row["question"])


def floor(metric: str, rows: list[dict]) -> int:
    """How many of these answers the best constant answer would get right, labels and targets tried."""
    constants = {c for r in rows for c in (r["target"], *LABELS[r["task"]])}
    return max((sum(score(metric, r | dict(output=c)) for r in rows) for c in constants), default=0)


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, as two shares; (0, 1) without any sample."""
    if n == 0:
        return 0.0, 1.0
    p, d = hits / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided: how likely is so uneven a split, if either of two models is as likely
    to be the one that is right where they differ?"""
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n)


def column(row: dict) -> str:
    """The name of a column, such as "lm2 on"; of a row as of a cell."""
    return f"{row['model']} {row['memory']}"


def cells(rows: Iterable[dict]) -> list[dict]:
    """The counts of every model, memory mode, task and length: what tables and pictures are made of.
    outside: samples whose needed facts all lie before the last segment; found: retrieval has them all."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["model"], r["memory"], r["task"], r["length"]), []).append(r)
    out = []
    for (model, memory, task, length), group in groups.items():
        far = [r for r in group if r["outside"]]
        cell = dict(model=model, memory=memory, task=task, length=length, n=len(group),
                    exact=sum(score("exact", r) for r in group), floor=floor("exact", group),
                    official=sum(score("official", r) for r in group),
                    floor_official=floor("official", group),
                    outside_n=len(far), outside_exact=sum(score("exact", r) for r in far),
                    floor_outside=floor("exact", far))
        if known := [r["found"] for r in group if r.get("found") is not None]:
            cell |= dict(found_n=len(known), found=sum(known))
        out.append(cell)
    return out


def percent(hits: float, n: int) -> str:
    """Share and interval in %, at most 13 characters; "-" without a sample."""
    if not n:
        return "-"
    low, high = wilson(hits, n)
    if hits >= n:
        return f"100 [{100 * low:.0f},100]"
    return f"{min(99.9, 100 * hits / n):.1f} [{min(99, round(100 * low))},{100 * high:.0f}]"


GROUPS = {"qa1-5": [f"qa{i}" for i in range(1, 6)], "qa1-10": [f"qa{i}" for i in range(1, 11)]}
BLOCKS = {  # title, and the fields of a cell: samples, right answers, floor
    "exact": ("exact match in %", "n", "exact", "floor"),
    "outside": ("exact match in %, facts outside the window", "outside_n", "outside_exact", "floor_outside"),
    "official": ("the benchmark's own metric in %", "n", "official", "floor_official"),
    "found": ("retrieval has all needed facts, in %", "found_n", "found", None),
}


def block(figures: list[dict], name: str, across: int = 4) -> list[str]:
    """Lines of one table, task and length down, up to `across` columns a part; then the means over tasks.

    Columns with other numbers of samples have lines of their own. A mean's interval is Wilson's, for as many
    samples as would give one share the variance of the mean."""
    title, n_key, hits_key, floor_key = BLOCKS[name]
    figures = [c for c in figures if c.get(n_key)]
    columns = list(dict.fromkeys(map(column, figures)))
    tasks = sorted({c["task"] for c in figures}, key=lambda task: int(task[2:]))
    by = {(column(c), c["task"], c["length"]): c for c in figures}
    lines = []
    for start in range(0, len(columns), across):
        part = columns[start:start + across]
        head = f"{'task':>6} {'length':>6} {'n':>4} {'floor':>5}" + "".join(f" {short(x):>13}" for x in part)
        lines += [""] * (start > 0) + [title, head]
        for group, members in ({t: [t] for t in tasks} | GROUPS).items():
            for length in sorted({c["length"] for c in figures}):
                found = [[by[c, t, length] for t in members if (c, t, length) in by] for c in part]
                sizes = [tuple(c[n_key] for c in f) if len(f) == len(members) else None for f in found]
                for size in dict.fromkeys(filter(None, sizes)):
                    alike = [f if s == size else [] for f, s in zip(found, sizes)]
                    lines.append(line(group, length, alike, n_key, hits_key, floor_key))
    return lines


def short(name: str) -> str:
    """A column's name in 13 characters: the end of the model's, and the mode."""
    model, _, mode = name.rpartition(" ")
    return f"{model[len(mode) - 12:]} {mode}"


def line(group: str, length: int, found: list[list[dict]], n_key: str, hits_key: str,
         floor_key: str | None) -> str:
    """One line of a table: for each column the mean of its cells' shares, "-" for one without cells."""
    base = next(filter(None, found))
    n = sum(c[n_key] for c in base)
    out = (f"{group:>6} {length_name(length):>6} {n if n < 10_000 else f'{n // 1000}k':>4} "
           + (f"{100 * share(base, n_key, floor_key):5.1f}" if floor_key else f"{'':>5}"))
    return out + "".join(f" {percent(*pooled(f, n_key, hits_key)) if f else '-':>13}" for f in found)


def share(figures: list[dict], n_key: str, hits_key: str) -> float:
    """The mean over cells of the share of hits."""
    return sum(c[hits_key] / c[n_key] for c in figures) / len(figures)


def pooled(figures: list[dict], n_key: str, hits_key: str) -> tuple[float, float]:
    """Hits and samples of one share that is as certain as the mean over these cells: their own number for one
    cell, more than all together where the shares differ, fewer where the samples do."""
    each = [((c[hits_key] + 1) / (c[n_key] + 2), c[n_key]) for c in figures]    # 0 of n is not certain
    mean = sum(q for q, _ in each) / len(each)
    n = mean * (1 - mean) * len(each) ** 2 / sum(q * (1 - q) / size for q, size in each)
    return share(figures, n_key, hits_key) * n, n


NOTES = ["[ , ]: Wilson's 95 % interval. floor: the best constant answer on these samples.",
         "outside the window: all needed facts lie before the last segment. Memory off:",
         "every segment is a document of its own. other: the memory of another document."]


def table(figures: list[dict], metrics: Iterable[str] = ("exact", "official")) -> str:
    """All tables of these cells, at most 80 columns wide: exact match, the same of samples whose facts lie
    outside the window, the share that retrieval has found, the benchmark's own metric."""
    names = [name for m in metrics for name in (("exact", "outside", "found") if m == "exact" else (m,))]
    blocks = [lines for name in names if (lines := block(figures, name))]
    return "\n".join("\n".join(lines) + "\n" for lines in blocks) + "\n".join(NOTES)


def compare(rows: list[dict], a: str, b: str, metric: str = "exact") -> str:
    """McNemar's test between two columns, "lm2 on" and "lm2 off", on the questions that both answered: those
    of the same text and target. Raises ValueError for a column that is not there, or if there are none."""
    right: dict[str, dict[tuple, bool]] = {}
    for r in rows:
        right.setdefault(column(r), {})[
            r["task"], r["length"], r["i"], r["question"], r["target"]] = score(metric, r)
    for name in (a, b):
        if name not in right:
            raise ValueError(f"column {name!r} is not there: choose from {', '.join(map(repr, right))}")
    both = [key for key in right[a] if key in right[b]]
    if not both:
        raise ValueError(f"{a!r} and {b!r} have answered no question in common: ask both the same samples")
    cell_names = list(dict.fromkeys(key[:2] for key in both))
    lines = [f"{metric}: A = {a}, B = {b}",
             f"{'task':>6} {'length':>6} {'n':>5} {'A %':>6} {'B %':>6} {'only A':>7} {'only B':>7} {'p':>8}"]
    for task, length in cell_names + [("all", None)] * (len(cell_names) > 1):
        pairs = [(right[a][k], right[b][k]) for k in both if length is None or k[:2] == (task, length)]
        n, only_a, only_b = len(pairs), sum(x > y for x, y in pairs), sum(y > x for x, y in pairs)
        p = mcnemar(only_a, only_b)
        lines.append(f"{task:>6} {'' if length is None else length_name(length):>6} {n:5} "
                     f"{100 * sum(x for x, _ in pairs) / n:6.1f} {100 * sum(y for _, y in pairs) / n:6.1f} "
                     f"{only_a:7} {only_b:7} {'< .0001' if p < 1e-4 else f'{p:.4f}':>8}")
    lines.append("p: McNemar's exact test, two-sided, on the same questions; not corrected for the")
    lines.append("number of lines.")
    if apart := len(right[a].keys() ^ right[b].keys()):
        lines.append(f"{apart:,} answers have no partner to the same question and are left out.")
    return "\n".join(lines)


def report_cost(rows: list[dict]) -> str:
    """Seconds a sample of each model, length and mode, and the tokens a second that are read."""
    took: dict[tuple[str, int], dict[str, list[float]]] = {}
    for r in rows:
        took.setdefault((r["model"], r["length"]), {}).setdefault(r["memory"], []).append(r["seconds"])
    lines = []
    for (model, length), modes in took.items():
        mean = {mode: sum(s) / len(s) for mode, s in modes.items()}
        rate = f"; {length / mean['on']:,.0f} tokens/s" if length and mean.get("on") else ""
        each = ", ".join(f"{mode} {s:.3f}" for mode, s in mean.items())
        lines.append(f"{model} {length_name(length)}: {each}{rate}")
    return "\n".join(["seconds a sample", *lines])
