"""The published BABILong: how its samples are read from files, and the papers' figures on it.

    python -m data.published                                  # print the figures of the papers
    samples = read_samples("babilong", "qa1", "0k")           # after python -m data.download
    row = published_rows()[0]                                 # row["figures"] is {"0k": 40.7, ...}

Writes nothing.
"""

import json
from pathlib import Path

from data.common import Parser, one_line
from data.document import Document, from_text, length_name
from data.tokenizer import Tokenizer

FIELDS = ("input", "question", "target")  # A sample of the benchmark has a text in each of them.


def parse_json(raw: bytes) -> object:
    """The content of a JSON file. ValueError with the place of the fault if it is not JSON in
    UTF-8."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the content is not JSON in UTF-8: {error}") from None


def parse_samples(raw: bytes) -> list[dict[str, str]]:
    """The samples of a published file, a JSON list of {"input", "question", "target"}, or JSON
    Lines of them. ValueError with what is wrong if it is neither."""
    lines = raw.splitlines()
    if len(lines) > 1 and lines[0].rstrip().endswith(b"}"):
        samples = [parse_json(line) for line in lines if line.strip()]
    else:
        samples = parse_json(raw)
    if not isinstance(samples, list) or not samples:
        raise ValueError("the content is no list of samples, or an empty one")
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise ValueError(f"sample {i} is not an object")
        for field in FIELDS:
            if not isinstance(sample.get(field), str):
                raise ValueError(f"sample {i} has no text in its field {field!r}")
    return samples


def find_file(folder: Path, task: str, length: str) -> Path:
    """The published file of a cell, in a folder as data/download.py writes it or as the benchmark's
    repository is laid out. `folder` may also be the file itself. ValueError if there is none."""
    if folder.suffix == ".json" or folder.is_file():
        candidates = [folder]
    else:
        file = Path(task, f"{length}.json")
        candidates = [folder / file, folder / "data" / file]
    for path in candidates:
        if path.is_file():
            return path
    command = f"python -m data.download --tasks {task} --lengths {length} --out {folder}"
    raise ValueError(f"there is no {candidates[0]}: fetch it ({command}) or name another folder")


def read_samples(folder: str | Path, task: str, length: str) -> list[dict[str, str]]:
    """The samples of a published file: folder/qa1/0k.json, folder/data/qa1/0k.json, or `folder`
    itself if it names a file.

    A question loses the space at its end. Inputs and targets stay as published. ValueError for a
    file that is missing or holds something else."""
    path = find_file(Path(folder), task, length)
    try:
        published = parse_samples(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; fetch it again (python -m data.download --again) or name another"
        ) from None
    samples = []
    for sample in published:
        question = sample["question"].strip()
        samples.append(dict(input=sample["input"], question=question, target=sample["target"]))
    return samples


class Downloaded:
    """The samples of the published files in a folder. It keeps those of the last cell only, as a
    cell of long documents takes gigabytes."""

    def __init__(self, folder: str, tokenizer: Tokenizer):
        self.folder = folder
        self.tokenizer = tokenizer
        self.cell: tuple[str, int] | None = None  # the task and the length of `samples`
        self.samples: list[dict[str, str]] = []

    def rows(self, task: str, length: int) -> list[dict[str, str]]:
        """The samples of a cell, as read_samples gives them. `length` is a number of tokens."""
        if self.cell != (task, length):
            self.samples = read_samples(self.folder, task, length_name(length))
            self.cell = (task, length)
        return self.samples

    def __call__(self, task: str, length: int, i: int) -> Document:
        """Sample i of a cell."""
        sample = self.rows(task, length)[i]
        return from_text(self.tokenizer, sample["input"], sample["question"], sample["target"])


def published_rows() -> list[dict]:
    """The figures of the papers, one row for each model in each of their tables. Nothing of it was
    measured here.

    A row has the `title` of its table, the tasks `over` which the table takes the mean, its
    `source`, the `model`, and `figures`: {length or task: accuracy in %, or None where the paper
    gives none}."""
    file = Path(__file__).with_name("published.json")
    rows = []
    for block in json.loads(file.read_text(encoding="utf-8")):
        for model, accuracies in block["rows"].items():
            row = {name: block[name] for name in ("title", "over", "source")}
            row["model"] = model
            row["figures"] = dict(zip(block["columns"], accuracies, strict=True))
            rows.append(row)
    return rows


def published_table() -> str:
    """All published rows as text of at most 80 columns. Each table of a paper is a block under its
    title and its source."""
    lines = []
    title = None
    for row in published_rows():
        if row["title"] != title:
            title = row["title"]
            names = "".join(f"{name:>6}" for name in row["figures"])
            lines.append("")
            lines.append(f"{title} ({row['over']}, accuracy in %)")
            lines.append(f"source: {row['source']}")
            lines.append("the paper's figures, not measured here")
            lines.append(f"{'':20}{names}")
        figures = ""
        for accuracy in row["figures"].values():
            shown = "-" if accuracy is None else str(accuracy)
            figures += f"{shown:>6}"
        lines.append(f"{row['model']:20}{figures}")
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> None:
    """Print the figures."""
    parser = Parser("python -m data.published", "Print the papers' figures on BABILong.")
    parser.parse_args(argv)
    with one_line(parser.prog):
        print(published_table())


if __name__ == "__main__":
    main()
