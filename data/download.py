"""Fetch the published BABILong samples: a JSON list of {"input", "question", "target"} for each cell.

    python -m data.download --tasks qa1 qa2 --lengths 0k 1k --out babilong          # 100 samples a cell
    python -m data.download --set 1000 --tasks qa1 --lengths 4k --out babilong-1k   # about 1,000
    cd babilong/qa1 && sha256sum -c 0k.json.sha256

Writes OUT/qa1/0k.json and OUT/qa1/0k.json.sha256, each whole or not at all. What is there is checked and not
fetched again. A cell is checked in memory: 1M is 0.4 GB on disk, 10M 4 GB, and several times that in memory.
The set of 100 is pinned to a revision; the rows of the set of 1,000 are those of the day.
"""
import collections
import hashlib
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.common import Parser, flag, one_line, replacing
from data.published import FIELDS, parse_json, parse_samples

REVISION = "ee0d588794c7ac098062ee0d247c733d62e94fe2"
BASES = {"100": f"https://huggingface.co/datasets/RMT-team/babilong/resolve/{REVISION}/data",
         "1000": "https://datasets-server.huggingface.co/rows"}
ROWS_SET, PAGE = "RMT-team/babilong-1k-samples", 100  # the rows call gives 100 rows at the most
LENGTHS = "0k 1k 2k 4k 8k 16k 32k 64k 128k 256k 512k 1M 10M".split()
TASKS = [f"qa{i}" for i in range(1, 21)]
# Set -> the longest that it has of the tasks up to qa5, up to qa10 and up to qa20.
LONGEST = {"100": {5: "10M", 10: "1M", 20: "0k"}, "1000": {5: "128k", 10: "0k", 20: "0k"}}


@dataclass(frozen=True)
class Source:
    """What to fetch from where, and how patiently."""
    set: str = flag("100", "The number of samples in a cell: 100 or 1000.")
    url: str = flag("", "A mirror: the folder that has qa1/0k.json, or the address of the rows call.")
    again: bool = flag(False, "Fetch and replace what is there.")
    tries: int = flag(4, "At most so many requests for one address.")
    pause: float = flag(2.0, "Wait so many seconds before the second try, and twice as long each time.")
    timeout: float = flag(30.0, "Give up a try after so many seconds without a byte.")
    limit: float = flag(3600.0, "Give up an answer that is not complete after so many seconds.")

    def __post_init__(self):
        if self.set not in BASES:
            raise ValueError(f"--set {self.set!r} is none: choose from {' '.join(BASES)}")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url!r} is no address: begin it with http:// or https://")
        for name, least in (("tries", 1), ("pause", 0), ("timeout", 0.001), ("limit", 0.001)):
            if not least <= getattr(self, name) <= 86400:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range: give {least} to 86400")

    def address(self, task: str, length: str, first: int = 0) -> str:
        """The URL of a cell; in the set of 1,000 that of its rows from `first` on."""
        base = (self.url or BASES[self.set]).rstrip("/")
        if self.set == "100":
            return f"{base}/{task}/{length}.json"
        return f"{base}?dataset={ROWS_SET}&config={length}&split={task}&offset={first}&length={PAGE}"


def cells(name: str, tasks: list[str], lengths: list[str]) -> list[tuple[str, str]]:
    """Every task at every length, each once. ValueError for one that the set `name` does not have."""
    for flag, given, known in (("--tasks", tasks, TASKS), ("--lengths", lengths, LENGTHS)):
        if unknown := [x for x in given if x not in known]:
            raise ValueError(f"{flag} {unknown[0]!r} is none: choose from {' '.join(known)}")
    found = list(dict.fromkeys((task, length) for task in tasks for length in lengths))
    for task, length in found:
        longest = next(most for last, most in LONGEST[name].items() if int(task[2:]) <= last)
        if LENGTHS.index(length) > LENGTHS.index(longest):
            raise ValueError(f"{task} at {length} is not published: the set of {name} has it up to {longest}")
    return found


def request(url: str, source: Source, bar: tqdm) -> bytes:
    """The whole body of one answer. ValueError where asking again would not help; OSError or HTTPException
    where it may."""
    stop, body = time.monotonic() + source.limit, bytearray()
    try:
        with urllib.request.urlopen(url, timeout=source.timeout) as answer:
            size = answer.length  # from Content-Length; None if the server does not say
            bar.reset(total=size)
            while piece := answer.read1(1 << 16):  # unlike read, it does not wait until it has so many
                body += piece
                bar.update(len(piece))
                if time.monotonic() > stop:
                    raise TimeoutError(f"the answer had no end after {source.limit:g} seconds")
    except urllib.error.HTTPError as error:
        error.close()
        again = error.code >= 500 or error.code in (408, 429)  # 429: too many requests
        raise (OSError if again else ValueError)(f"the server answered {error.code} {error.reason}") from None
    if size is not None and len(body) != size:
        raise OSError(f"only {len(body)} of {size} bytes came")
    return bytes(body)


def get(url: str, source: Source, bar: tqdm) -> bytes:
    """`request`, tried again after growing pauses. ValueError if no try brings the whole answer."""
    for n in range(1, source.tries + 1):
        try:
            return request(url, source, bar)
        except (OSError, http.client.HTTPException) as error:
            lost = getattr(error, "reason", error)  # urllib wraps what went wrong
            if n == source.tries:
                raise ValueError(f"{lost} at try {n} of {n}") from None
            wait = source.pause * 2 ** min(n - 1, 6)
            tqdm.write(f"{lost}: try {n + 1} of {source.tries} in {wait:g} s")
            time.sleep(wait)


def get_cell(source: Source, task: str, length: str, bar: tqdm) -> bytes:
    """A cell as published; one of the set of 1,000 is put together from its rows, to the same JSON list.
    ValueError, naming the row, if any is cut, missing or out of order."""
    if source.set == "100":
        return get(source.address(task, length), source, bar)
    samples, total = [], None
    while total is None or len(samples) < total:
        first, before = len(samples), total
        page = parse_json(get(source.address(task, length, first), source, bar))
        try:
            found, total = page["rows"], page["num_rows_total"]
            if cut := [row for row in found if row["truncated_cells"]]:
                raise ValueError(f"row {cut[0]['row_idx']} has cells cut short: {cut[0]['truncated_cells']}")
            due, came = list(range(first, min(first + PAGE, total))), [row["row_idx"] for row in found]
            samples += [{field: row["row"][field] for field in FIELDS} for row in found]
        except (KeyError, TypeError):
            raise ValueError(f"what came from row {first} on is no answer of the rows call") from None
        if before not in (None, total):
            raise ValueError(f"the number of rows changed from {before} to {total} at row {first}")
        if came != due or page.get("partial"):
            raise ValueError(f"the rows from {first} on did not come whole and in order")
    return json.dumps(samples).encode()


def save(path: Path, sums: Path, raw: bytes) -> None:
    """Write a file and its checksum, each whole or not at all. OSError if that cannot be."""
    with replacing(sums) as checksum, replacing(path) as part:      # the last one takes its place first
        part.write_bytes(raw)
        checksum.write_bytes(f"{hashlib.sha256(raw).hexdigest()}  {path.name}\n".encode())
        sums.unlink(missing_ok=True)  # if this ends half-way, no checksum is better than the old one


def obtain(path: Path, source: Source, task: str, length: str) -> str:
    """Have one cell in `path`: "fetched" or "already there". ValueError if it cannot be had."""
    sums, known = Path(f"{path}.sha256"), None
    if path.exists() and not source.again:
        done, raw = "already there", path.read_bytes()
        known = sums.read_bytes().split()[:1] if sums.exists() else None  # None: put there by hand
        if known not in (None, [hashlib.sha256(raw).hexdigest().encode()]):
            raise ValueError(f"is not the file that {sums.name} was written for (--again replaces both)")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)  # first, so that a bad --out costs no waiting
        with tqdm(desc=str(path), unit="B", unit_scale=True, disable=None, leave=False) as bar:
            done, raw = "fetched", get_cell(source, task, length, bar)
    n = len(parse_samples(raw))
    if (n > 100) != (source.set == "1000"):  # else a folder of one set would pass for the other
        raise ValueError(f"holds {n} samples, so it is not of the set of {source.set} (another --out?)")
    if known is None:
        save(path, sums, raw)
    print(f"{done}: {path}, {n} samples, {len(raw):,} bytes")
    return done


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.download", "Fetch the published BABILong samples.")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="qa1 to qa20")
    parser.add_argument("--lengths", nargs="+", required=True, metavar="LENGTH", help=" ".join(LENGTHS))
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, one for each set")
    parser.add_settings(Source)
    given, count = vars(parser.parse_args(argv)), collections.Counter()
    tasks, lengths, out = (given.pop(name) for name in ("tasks", "lengths", "out"))
    with one_line(parser.prog):
        source = Source(**{name: value for name, value in given.items() if value is not None})
        for task, length in cells(source.set, tasks, lengths):
            path = out / task / f"{length}.json"
            try:
                count[obtain(path, source, task, length)] += 1
            except ValueError as error:
                count["failed"] += 1
                how = "save it as" if source.set == "100" else "so on by 100, save all rows as one list in"
                line = f"{path}: {error}; fetch {source.address(task, length)} by hand and {how} {path}"
                print(f"{parser.prog}: {' '.join(line.split())}", file=sys.stderr)
        print(", ".join(f"{what} {count[what]}" for what in ("fetched", "already there", "failed")))
    if count["failed"]:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
