"""The published BABILong: its samples, read from files, and the papers' figures on it.

    python -m data.published                                  # print the figures of the papers
    samples = read_samples("babilong", "qa1", "0k")           # after python -m data.download
    row = published_rows()[0]                                 # {"model": "Llama-3.2-1.2B", "figures": ...}

Writes nothing.
"""
import json
from pathlib import Path

from data.common import Parser, one_line
from data.document import Document, from_text, length_name
from data.tokenizer import Tokenizer

FIELDS = ("input", "question", "target")  # what a sample of the benchmark holds, all of them texts


def parse_json(raw: bytes) -> object:
    """The content of a JSON file. ValueError, naming the place, for what is not UTF-8 or not JSON."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON at line {error.lineno} column {error.colno}") from None
    except (RecursionError, ValueError):  # nested without end, or a number of thousands of digits
        raise ValueError("is JSON that cannot be read") from None


def parse_samples(raw: bytes) -> list[dict[str, str]]:
    """A JSON list of {"input", "question", "target"} as published. ValueError, naming what is wrong."""
    samples = parse_json(raw)
    if not isinstance(samples, list) or not samples:
        raise ValueError("is no list of samples, or an empty one")
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise ValueError(f"sample {i} is no object")
        for field in FIELDS:
            if not isinstance(sample.get(field), str) or not sample[field].isprintable() and any(
                    "\ud800" <= c <= "\udfff" for c in sample[field]):
                raise ValueError(f"sample {i} has no text in its field {field!r}")
    return samples


def read_samples(folder: str | Path, task: str, length: str) -> list[dict[str, str]]:
    """The samples of a published file: folder/qa1/0k.json, folder/data/qa1/0k.json, or `folder` itself if
    it names a file. Questions lose the space they end in; inputs and targets stay as published. ValueError
    in one line for a file that is missing or not what it should be."""
    folder = Path(folder)
    paths = [base / task / f"{length}.json" for base in (folder, folder / "data")]
    if folder.suffix == ".json" or folder.is_file():
        paths = [folder]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise ValueError(f"there is no {paths[0]}: fetch it (python -m data.download --tasks {task} "
                         f"--lengths {length} --out {folder}) or name another folder")
    try:
        samples = parse_samples(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}: fetch it again (python -m data.download --again) or name "
                         "another") from None
    return [{field: s[field] for field in FIELDS} | {"question": s["question"].strip()} for s in samples]


class Downloaded:
    """The samples of the published files; of one cell at a time, as they are large."""

    def __init__(self, folder: str, tokenizer: Tokenizer):
        self.folder, self.tokenizer, self.cell, self.kept = folder, tokenizer, None, []

    def rows(self, task: str, length: int) -> list[dict]:
        """The samples of a cell, as read_samples gives them."""
        if self.cell != (task, length):
            self.kept = read_samples(self.folder, task, length_name(length))
            self.cell = task, length
        return self.kept

    def __call__(self, task: str, length: int, i: int) -> Document:
        row = self.rows(task, length)[i]
        return from_text(self.tokenizer, row["input"], row["question"], row["target"])


def published_rows() -> list[dict]:
    """One row a model and block: title, over (what the mean is over), source, model, and figures, a dict
    from length or task to accuracy in per cent, None where the paper gives none. Nothing measured here."""
    blocks = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return [{"title": block["title"], "over": block["over"], "source": block["source"], "model": model,
             "figures": dict(zip(block["columns"], figures))}
            for block in blocks for model, figures in block["rows"].items()]


def published_table() -> str:
    """All published rows in blocks, at most 80 columns wide, each with what it averages and its source."""
    lines, title = [], None
    for row in published_rows():
        if row["title"] != title:
            title = row["title"]
            lines += ["", f"{title} ({row['over']}, accuracy in %)",
                      f"source: {row['source']}", "the paper's figures, not measured here",
                      " " * 20 + "".join(f"{name:>6}" for name in row["figures"])]
        figures = ("-" if figure is None else str(figure) for figure in row["figures"].values())
        lines.append(f"{row['model']:20}" + "".join(f"{figure:>6}" for figure in figures))
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.published", "Print the papers' figures on BABILong.")
    parser.parse_args(argv)
    with one_line(parser.prog):
        print(published_table())


if __name__ == "__main__":
    main()
