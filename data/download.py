"""Fetch the published BABILong samples. A cell, a task at a length, is a file with a JSON list of
{"input", "question", "target"}.

    # the set of 100 samples a cell
    python -m data.download --tasks qa1 qa2 --lengths 0k 1k --out babilong
    # the set of about 1,000 samples a cell
    python -m data.download --set 1000 --tasks qa1 --lengths 4k --out babilong-1k
    # compare a file with its checksum
    cd babilong/qa1 && sha256sum -c 0k.json.sha256

Writes OUT/qa1/0k.json and OUT/qa1/0k.json.sha256, each whole or not at all. A file that is there is
checked, not fetched again. A cell is held in memory: the file of a cell of 1M is 0.4 GB, that of
10M 4 GB, and it needs several times that memory. The set of 100 is always that of one revision. The
set of 1,000 is the current one.
"""

import hashlib
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.common import Parser, flag, one_line, replacing
from data.published import FIELDS, parse_json, parse_samples

REVISION = "ee0d588794c7ac098062ee0d247c733d62e94fe2"
# Where each set is: a folder of files, and a call that gives rows of a data set.
URLS = {
    "100": f"https://huggingface.co/datasets/RMT-team/babilong/resolve/{REVISION}/data",
    "1000": "https://datasets-server.huggingface.co/rows",
}
ROWS_OF = "RMT-team/babilong-1k-samples"
PAGE = 100  # rows that a call asks for, the most that it gives
TASKS = [f"qa{number}" for number in range(1, 21)]
LENGTHS = ["0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1M", "10M"]
# The greatest length that a set has of qa1 to qa5, of qa6 to qa10, and of qa11 to qa20.
LONGEST = {"100": ("10M", "1M", "0k"), "1000": ("128k", "0k", "0k")}
TRY_AGAIN = (408, 429)  # HTTP statuses besides 500 and more: timeout, too many requests


@dataclass(frozen=True)
class Source:
    """What to fetch from where, and how patiently."""

    set: str = flag("100", "Fetch the set of 100 samples a cell, or that of about 1000.")
    url: str = flag(
        "",
        "Fetch from this mirror. It is the folder that has qa1/0k.json, or with --set 1000 the "
        "address of the call that gives rows.",
    )
    again: bool = flag(False, "Fetch files that are there as well, and replace them.")
    tries: int = flag(4, "Request an address up to this number of times.")
    pause: float = flag(
        2.0,
        "Wait this number of seconds before the second try, and longer before each further try.",
    )
    timeout: float = flag(30.0, "End a try after this number of seconds without a byte.")
    limit: float = flag(3600.0, "End a try that is not complete after this number of seconds.")

    def __post_init__(self):
        if self.set not in URLS:
            raise ValueError(f"--set {self.set!r} is unknown: choose from {' '.join(URLS)}")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url!r} must begin with http:// or https://")
        for name, least in (("tries", 1), ("pause", 0), ("timeout", 0.001), ("limit", 0.001)):
            value = getattr(self, name)
            if not least <= value <= 86400:  # False for NaN, too.
                raise ValueError(f"--{name} {value} is out of range: give {least} to 86400")

    def address(self, task: str, length: str, first: int = 0) -> str:
        """The URL of a cell. In the set of 1,000 it is that of a page, the rows from `first` on."""
        base = self.url or URLS[self.set]
        base = base.rstrip("/")
        if self.set == "100":
            return f"{base}/{task}/{length}.json"
        query = f"dataset={ROWS_OF}&config={length}&split={task}&offset={first}&length={PAGE}"
        return f"{base}?{query}"


def longest(set_name: str, task: str) -> str:
    """The greatest length at which a set has a task."""
    up_to_qa5, up_to_qa10, up_to_qa20 = LONGEST[set_name]
    number = TASKS.index(task) + 1
    if number <= 5:
        return up_to_qa5
    if number <= 10:
        return up_to_qa10
    return up_to_qa20


def cells(set_name: str, tasks: list[str], lengths: list[str]) -> list[tuple[str, str]]:
    """Every task at every length, each once. ValueError for one that the set does not have."""
    for name, given, known in (("--tasks", tasks, TASKS), ("--lengths", lengths, LENGTHS)):
        for value in given:
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown: choose from {' '.join(known)}")
    found = []
    for task in dict.fromkeys(tasks):
        most = longest(set_name, task)
        for length in dict.fromkeys(lengths):
            if LENGTHS.index(length) > LENGTHS.index(most):
                raise ValueError(
                    f"{task} at {length} is not published: "
                    f"the set of {set_name} has it up to {most}"
                )
            found.append((task, length))
    return found


def request(url: str, source: Source, bar: tqdm) -> bytes:
    """The body of one answer. OSError or HTTPException if another try may bring it, ValueError if
    none will."""
    stop = time.monotonic() + source.limit
    body = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=source.timeout) as answer:
            size = answer.length  # bytes that the server announces, None if it does not
            bar.reset(total=size)
            while True:
                piece = answer.read1(1 << 16)  # what is there, without waiting for more
                if not piece:
                    break
                body += piece
                bar.update(len(piece))
                if time.monotonic() > stop:
                    raise TimeoutError(f"the answer had no end after {source.limit:g} seconds")
    except urllib.error.HTTPError as error:
        error.close()
        message = f"the server answered {error.code} {error.reason}"
        if error.code >= 500 or error.code in TRY_AGAIN:
            raise OSError(message) from None
        raise ValueError(message) from None
    if size is not None and len(body) != size:
        raise OSError(f"only {len(body)} of {size} bytes came")
    return bytes(body)


def get(url: str, source: Source, bar: tqdm) -> bytes:
    """The body of the first answer that comes whole. Pauses between the tries double, up to 64
    times the first one. ValueError if no try brings it."""
    pause = source.pause
    for number in range(1, source.tries + 1):
        try:
            return request(url, source, bar)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # a URLError says it there
        if number < source.tries:
            tqdm.write(f"{reason}: try {number + 1} of {source.tries} in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 64 * source.pause)
    raise ValueError(f"{reason} at try {number} of {number}")


def samples_of_page(page: object, first: int) -> tuple[list[dict[str, str]], int]:
    """The samples of an answer to the call for the rows from `first` on, and the number of all rows
    of the cell. ValueError if a row is cut short, missing or out of order."""
    samples = []
    try:
        n_rows = page["num_rows_total"]
        due = list(range(first, min(first + PAGE, n_rows)))
        numbers = []
        for row in page["rows"]:
            if row["truncated_cells"]:
                raise ValueError(
                    f"row {row['row_idx']} has fields cut short: {row['truncated_cells']}"
                )
            numbers.append(row["row_idx"])
            samples.append({field: row["row"][field] for field in FIELDS})
    except (KeyError, TypeError):
        raise ValueError(f"the answer for the rows from {first} on is not a page of rows") from None
    if numbers != due or page.get("partial"):
        raise ValueError(f"the rows from {first} on did not come whole and in order")
    return samples, n_rows


def get_cell(source: Source, task: str, length: str, bar: tqdm) -> bytes:
    """The content of the file of a cell. For the set of 1,000 it is put together from pages."""
    if source.set == "100":
        return get(source.address(task, length), source, bar)
    samples = []
    n_rows = None
    while n_rows is None or len(samples) < n_rows:
        first = len(samples)
        page = parse_json(get(source.address(task, length, first), source, bar))
        found, n_now = samples_of_page(page, first)
        if n_rows not in (None, n_now):
            raise ValueError(f"the number of rows changed from {n_rows} to {n_now} at row {first}")
        n_rows = n_now
        samples += found
    return json.dumps(samples).encode()


def obtain(path: Path, source: Source, task: str, length: str) -> str:
    """Check the file of a cell that is there, or fetch it -> "already there" or "fetched". In the
    end its checksum is beside it. ValueError for another file, or if the cell cannot be had."""
    checksum_file = Path(f"{path}.sha256")
    is_there = path.exists() and not source.again
    if is_there:
        raw = path.read_bytes()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)  # so that a bad --out fails at once
        with tqdm(desc=str(path), unit="B", unit_scale=True, disable=None, leave=False) as bar:
            raw = get_cell(source, task, length, bar)
    checksum = hashlib.sha256(raw).hexdigest().encode()
    if is_there and checksum_file.exists():
        is_as_noted = checksum_file.read_bytes().startswith(checksum)
        if not is_as_noted:
            raise ValueError(
                f"this is not the file that {checksum_file.name} was written for: --again replaces "
                "both"
            )
    n_samples = len(parse_samples(raw))
    found_set = "1000" if n_samples > 100 else "100"
    if found_set != source.set:
        raise ValueError(
            f"a file of {n_samples} samples is of the set of {found_set}, not of that of "
            f"{source.set}: give each set its own --out"
        )
    if not is_there:
        with replacing(path) as partial:
            partial.write_bytes(raw)
            checksum_file.unlink(missing_ok=True)  # that of the older file
    if not checksum_file.exists():
        with replacing(checksum_file) as partial:
            partial.write_bytes(checksum + f"  {path.name}\n".encode())
    outcome = "already there" if is_there else "fetched"
    print(f"{outcome}: {path}, {n_samples} samples, {len(raw):,} bytes")
    return outcome


def main(argv: list[str] | None = None) -> None:
    """Fetch every task at every length. A cell that fails does not stop the others."""
    parser = Parser("python -m data.download", "Fetch the published BABILong samples.")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="The tasks to fetch, qa1 to qa20."
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        required=True,
        metavar="LENGTH",
        help=f"The lengths to fetch: {' '.join(LENGTHS)}.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="The folder to write to. Each set needs its own."
    )
    parser.add_settings(Source)
    given = vars(parser.parse_args(argv))
    tasks = given.pop("tasks")
    lengths = given.pop("lengths")
    out = given.pop("out")
    outcomes = Counter()
    with one_line(parser.prog):
        source = Source(**{name: value for name, value in given.items() if value is not None})
        for task, length in cells(source.set, tasks, lengths):
            path = out / task / f"{length}.json"
            try:
                outcome = obtain(path, source, task, length)
            except ValueError as error:
                outcome = "failed"
                address = source.address(task, length)
                if source.set == "100":
                    by_hand = f"fetch {address} by hand and save it as {path}"
                else:
                    by_hand = (
                        f"fetch {address} and the pages after it by hand and save their samples as "
                        f"one list in {path}"
                    )
                message = " ".join(f"{path}: {error}; or {by_hand}".split())
                print(f"{parser.prog}: {message}", file=sys.stderr)
            outcomes[outcome] += 1
        summary = [f"{name} {outcomes[name]}" for name in ("fetched", "already there", "failed")]
        print(", ".join(summary))
    if outcomes["failed"]:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
