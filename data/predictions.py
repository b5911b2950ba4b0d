"""predictions.jsonl: one line an answer, written as it comes, so that an evaluation cut short can go on.

    rows = load("out/predictions.jsonl")

Before the answers of a model stands a line of the settings that they depend on. Going on with other settings
is refused, so that no table ever mixes two. Writes the file that it is given.
"""
import json
from pathlib import Path

from data.common import replacing
from data.metrics import LABELS

KINDS = dict(model=str, task=str, length=int, i=int, memory=str, question=str, target=str, output=str,
             outside=bool | None, found=bool | None, seconds=int | float)
DEFAULTS = dict(model="lm2", found=None, seconds=0.0)   # what older files lack
BEGINNING = b'{"settings": {"model": '
MODES = ("on", "off", "other", "rag")


def parse(path: Path, number: int, line: bytes) -> dict:
    """A line of the file; ValueError names one that is neither a prediction nor settings."""
    try:
        row = json.loads(line.decode("utf-8"))
        if isinstance(row.get("settings"), dict) and isinstance(row["settings"].get("model"), str):
            return row
        row = DEFAULTS | row
        if (not all(isinstance(row[key], kind) for key, kind in KINDS.items()) or row["task"] not in LABELS
                or row["memory"] not in MODES or min(row["length"], row["i"]) < 0
                or isinstance(row["length"], bool) or isinstance(row["i"], bool)):
            raise ValueError
        return row
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path} line {number} is no prediction: give another file, or run the evaluation "
                         "again") from None


def read(path: Path, lines: list[bytes]) -> tuple[dict[str, dict], list[dict]]:
    """(settings of each model, predictions) of a file's lines. ValueError for a line that is neither, that
    answers what was answered before, or whose settings contradict the earlier ones."""
    known, rows, seen = {}, [], set()
    for number, line in enumerate(lines, 1):
        row = parse(path, number, line)
        if "settings" in row:
            check(path, known, row["settings"])
            known.setdefault(row["settings"]["model"], {}).update(row["settings"])
        elif identity(row) in seen:
            raise ValueError(f"{path} line {number} answers {identity(row)} again: take one of the two out")
        else:
            seen.add(identity(row))
            rows.append(row)
    return known, rows


def identity(row: dict) -> tuple[str, str, int, int, str]:
    return row["model"], row["task"], row["length"], row["i"], row["memory"]


def check(path: Path, known: dict[str, dict], new: dict) -> None:
    """ValueError if the file's settings are not those of `new`; checkpoint and samples, of the same model."""
    for old in known.values():
        for key in sorted(old.keys() & new.keys(), key=lambda key: (key.startswith("samples"), key)):
            own = key in ("model", "checkpoint") or key.startswith("samples")
            if old[key] != new[key] and (old["model"] == new["model"] or not own):
                raise ValueError(f"{path} has answers of {old['model']} with {key} {old[key]}, not "
                                 f"{new[key]}: give another --out, or --again to replace all in it")


def load(path: str | Path) -> list[dict]:
    """The predictions of a file, but for a last line that was cut off; ValueError names what is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name a predictions.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    if len(lines) > 1 and not lines[-1].endswith((b"\n", b"}")):     # a run was cut off while it wrote
        lines.pop()
    rows = read(path, lines)[1]
    if not rows:
        raise ValueError(f"{path} holds no prediction: run the evaluation again")
    return rows


def save(rows: list[dict], path: Path) -> None:
    """Write rows to `path`; a file that is there is replaced only when the new one is complete."""
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


class Predictions:
    """The file of a run, open for more: `done` holds (model, task, length, i, memory) of every answer in it.

    settings is a dict for each model of this run, `model` its name. Raises ValueError if the file is not one
    of predictions, or holds a model's answers under other settings; again=True starts anew instead."""

    def __init__(self, path: Path, settings: list[dict], again: bool = False):
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]            # the last may have been cut off
        if lines and not whole and not lines[0].startswith(BEGINNING[:len(lines[0])]):
            parse(path, 1, b"")                                             # somebody else's: refused
        if again:
            if whole:
                parse(path, 1, whole[0])
            whole = []
        known, self.rows = read(path, whole)
        self.done = set(map(identity, self.rows))
        for new in settings:
            check(path, known, new)
            if new["model"] not in known and any(row["model"] == new["model"] for row in self.rows):
                raise ValueError(f"{path} has answers of {new['model']} without their settings: give another "
                                 "--out, or --again to replace all in it")
        if len(whole) < len(lines):
            with replacing(path) as partial:
                partial.write_bytes(b"".join(whole))
        self.file = open(path, "a", encoding="utf-8")
        self.add([], [dict(settings=s) for s in settings if s.keys() - known.get(s["model"], {}).keys()])

    def add(self, rows: list[dict], settings: list[dict] | None = None) -> None:
        """Keep rows, and write them at once."""
        self.rows += rows
        self.file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in (settings or []) + rows))
        self.file.flush()
