"""Any text to learn: files become documents, documents become token ids, and these become windows.

    python -m data.text --tokenizer learned     # what a run learns without --text: Python's library
    python -m data.text --text books/ notes.md  # your files, with the shipped tokenizer

Prints how many documents, bytes and tokens there are to train on and to validate. Writes nothing.

A *document* is the text of one file. About one document in ten is for validation, decided by the
hash of its text. Where there is only one, its last tenth is for validation. Files without text
count for nothing. Token ids lie on disk as nanoGPT has them: one document behind the other, an end
of text between two of them. So the `train.bin` and `val.bin` of nanoGPT can be read, too.

A *window* is a piece of a document, some segments long. A batch of training is some windows from
random places. Each begins with an empty memory. A document that is not longer than a window is not
trained on.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import tokenizer as tokenizers
from data.background import library_files
from data.common import Parser, one_line, replacing
from data.lessons import Batch, Key
from data.tokenizer import Tokenizer

PARTS = ("train", "val")
VAL_SHARE = 0.1  # the share of the documents that is for validation
TOKEN_FILES = tuple(f"{part}.bin" for part in PARTS)
IDS_AT_ONCE = 2**26  # a file may not fit into RAM

# -------------------------------------------------------------------------------------------------
# From files to the texts of documents


def list_files(sources: Sequence[str]) -> list[Path]:
    """The files of a run. ValueError for a path that does not exist or holds no file.

    sources  files and folders. A folder gives all files in it and below it, but no hidden ones and
             no files of tokens. Without sources, these are the modules of Python's library"""
    if not sources:
        # One module tells how this Python was built, and is not the same on two machines.
        files = [path for path in library_files() if not path.name.startswith("_sysconfigdata")]
        if not files:
            raise ValueError(
                "this Python came without the sources of its library: name texts with --text"
            )
        return files
    files = []
    for source in sources:
        root = Path(source)
        if root.name in TOKEN_FILES:
            raise ValueError(f"--text {source} holds token ids: name it alone, or leave it out")
        if root.is_file():
            files.append(root)
            continue
        if not root.is_dir():
            raise ValueError(f"--text {source} does not exist: name a file or a folder of texts")
        found = []
        for path in sorted(root.rglob("*")):
            is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.is_file() and not is_hidden and path.name not in TOKEN_FILES:
                found.append(path)
        if not found:
            raise ValueError(f"--text {source} holds no file: put texts there")
        files.extend(found)
    return files


def read_text(path: Path, skip_bad: bool) -> str:
    """The text of a file, its line ends as "\\n". ValueError if it is not UTF-8.

    skip_bad  then a file that is not UTF-8 counts as empty"""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if skip_bad:
            return ""
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, or leave such files out with "
            "--skip_bad"
        ) from None
    return text.replace("\r\n", "\n")


def hash_numbers(sources: Sequence[str], skip_bad: bool) -> dict[Path, float]:
    """The files that hold text, each with a number from 0 to 1 that depends on its text alone. Of
    several files with the same text, the first is kept.

    All files are read first, so that a bad one is named before anything is encoded. ValueError for
    files that cannot be used."""
    paths = {}  # number -> the first file that has it
    for path in list_files(sources):
        text = read_text(path, skip_bad)
        if text:
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            paths.setdefault(int.from_bytes(digest, "big") / 2**64, path)
    if not paths:
        raise ValueError(f"{describe_sources(sources)} holds no text in UTF-8: name other files")
    return {path: number for number, path in paths.items()}


def chosen_to_validate(numbers_of: dict[Path, float]) -> set[Path]:
    """Which files are for validation, if there are two or more: those with a number below
    VAL_SHARE, but at least one and never all.

    numbers_of  as `hash_numbers` returns it"""
    ordered = sorted(numbers_of, key=numbers_of.get)
    n_chosen = sum(number < VAL_SHARE for number in numbers_of.values())
    n_chosen = min(max(1, n_chosen), len(ordered) - 1)
    return set(ordered[:n_chosen])


def split_texts(numbers_of: dict[Path, float], part: str) -> Iterator[str]:
    """The text of each document of a part, in the order of the files.

    numbers_of  as `hash_numbers` returns it"""
    if len(numbers_of) == 1:
        (path,) = numbers_of
        text = read_text(path, skip_bad=False)
        border = int(len(text) * (1 - VAL_SHARE))
        pieces = dict(train=text[:border], val=text[border:])
        if pieces[part]:
            yield pieces[part]
        return
    to_validate = chosen_to_validate(numbers_of)
    for path in numbers_of:
        if (path in to_validate) == (part == "val"):
            yield read_text(path, skip_bad=False)


def read_texts(sources: Sequence[str], part: str, skip_bad: bool = False) -> Iterator[str]:
    """The text of each document of a part. ValueError for files that cannot be used."""
    yield from split_texts(hash_numbers(sources, skip_bad), part)


# -------------------------------------------------------------------------------------------------
# From texts to token ids


@dataclass(frozen=True)
class Documents:
    """The token ids of documents, one behind the other, in an array or in a file on disk.

    `documents[i]` are the ids of one of them: the end of text before it, its tokens, and the end of
    text behind it. Two neighbours share the one between them."""

    ids: np.ndarray  # (n,), ends of text included
    borders: np.ndarray  # (n_documents + 1,), the places of the ends of text

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """(n,) int64"""
        return self.ids[self.borders[i] : self.borders[i + 1] + 1].astype(np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """How many ids each document has, both ends of text included: (n_documents,)."""
        return np.diff(self.borders) + 1


def to_documents(ids: np.ndarray, eot: int) -> Documents:
    """The documents between the ends of text `eot` in ids (n,)."""
    found = []
    for start in range(0, len(ids), IDS_AT_ONCE):
        found.append(start + np.flatnonzero(ids[start : start + IDS_AT_ONCE] == eot))
    # The first and the last id are borders, too: nanoGPT's files begin without an end of text.
    borders = np.concatenate([[0], *found, [len(ids) - 1]])
    return Documents(ids, np.unique(borders))


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """The type of ids on disk: two bytes where they fit, as in nanoGPT's files, otherwise four."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")


def encode(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of texts as they lie on disk: an end of text before the first one, and one behind
    each. With the tokenizer of a released model, each text has its begin of text, too."""
    dtype = id_type(tokenizer)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    yield np.array([tokenizer.eot], dtype)
    for text in texts:
        yield np.array([*begin, *tokenizer.encode(text), tokenizer.eot], dtype)


def read_documents(
    sources: Sequence[str], part: str, tokenizer: Tokenizer, skip_bad: bool = False
) -> Documents:
    """The documents of a part, in RAM. ValueError for sources that cannot be used."""
    folder = token_folder(sources)
    if folder is not None:
        return read_tokens(folder / f"{part}.bin", tokenizer)
    ids = np.concatenate(list(encode(read_texts(sources, part, skip_bad), tokenizer)))
    if len(ids) == 1:
        raise ValueError(f"{describe_sources(sources)} is too short: no text for {part}")
    return to_documents(ids, tokenizer.eot)


def write_documents(
    folder: Path, sources: Sequence[str], tokenizer: Tokenizer, skip_bad: bool = False
) -> None:
    """Write the token ids of both parts to train.bin and val.bin in a folder, both or none.

    ValueError for sources that cannot be used."""
    numbers_of = hash_numbers(sources, skip_bad)
    folder.mkdir(parents=True, exist_ok=True)
    train_path, val_path = [folder / name for name in TOKEN_FILES]
    with replacing(train_path) as train_partial, replacing(val_path) as val_partial:
        for part, partial in zip(PARTS, (train_partial, val_partial), strict=True):
            n_written = 0
            with open(partial, "wb") as file:
                for ids in encode(split_texts(numbers_of, part), tokenizer):
                    file.write(ids.tobytes())
                    n_written += len(ids)
            if n_written == 1:
                raise ValueError(f"{describe_sources(sources)} is too short: no text for {part}")


def token_folder(sources: Sequence[str]) -> Path | None:
    """The folder of nanoGPT's train.bin and val.bin, if it or these files are what is given.
    ValueError if one of the two files is missing."""
    folders = set()
    for source in sources:
        path = Path(source)
        folders.add(path.parent if path.name in TOKEN_FILES else path)
    if len(folders) != 1:
        return None
    (folder,) = folders
    there = [name for name in TOKEN_FILES if (folder / name).is_file()]
    if len(there) == 1:
        missing = TOKEN_FILES[1 - TOKEN_FILES.index(there[0])]
        raise ValueError(f"--text {folder} has {there[0]} but no {missing}: it needs both")
    return folder if there else None


def read_tokens(path: Path, tokenizer: Tokenizer) -> Documents:
    """The documents of a file of token ids, which stays on disk. ValueError for a file that is
    empty, cut, or of another tokenizer."""
    token_type = id_type(tokenizer)
    n_bytes = path.stat().st_size
    if n_bytes % token_type.itemsize:
        raise ValueError(
            f"{path} has {n_bytes} bytes, but a token takes {token_type.itemsize}: it is cut short"
        )
    if n_bytes < 3 * token_type.itemsize:
        raise ValueError(f"{path} holds no text: make it again")
    ids = np.memmap(path, token_type, mode="r")
    largest = 0
    for start in range(0, len(ids), IDS_AT_ONCE):
        largest = max(largest, int(ids[start : start + IDS_AT_ONCE].max()))
    if largest >= tokenizer.n_vocab:
        raise ValueError(
            f"{path} has the id {largest}, but the tokenizer has {tokenizer.n_vocab} tokens: "
            "name the tokenizer of the file with --tokenizer"
        )
    documents = to_documents(ids, tokenizer.eot)
    if documents.sizes.max() < 3:
        raise ValueError(f"{path} holds ends of text alone: make it again")
    return documents


def describe_sources(sources: Sequence[str]) -> str:
    """The sources in words."""
    return f"--text {' '.join(sources)}" if sources else "Python's library"


# -------------------------------------------------------------------------------------------------
# From token ids to windows


@dataclass(frozen=True)
class Windows:
    """All batches of a run on text: `windows[stage, number]` makes one, as data.lessons.Lessons
    makes those of a run on stories.

    A window lies in one document. Its place is drawn at random, and may also lie up to n_tokens - 1
    places before the document. Such a window is moved to the document's start. So first tokens are
    seen at least as often as others, and mostly with an empty memory, as in an evaluation. The last
    tokens of a document are seen less often."""

    documents: Documents
    batch_size: int  # most windows in a batch
    batch_tokens: int  # most tokens in a batch, unless one window has more
    seed: int
    # length of a window -> what `places_up_to` has found
    places: dict[int, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> tuple[Key, Batch]:
        """The key and its batch: each token of a window but the first is a target, and so is the
        token behind the window."""
        stage, number = key
        n_tokens = stage.segments * stage.segment_len
        n_rows = max(1, min(self.batch_size, self.batch_tokens // n_tokens))
        rows = self.draw(n_rows, n_tokens, number)
        idx = rows[:, :-1].contiguous()
        targets = rows[:, 1:].flatten()
        at = torch.arange(len(targets))
        return key, Batch(idx, at, targets, torch.ones_like(at, dtype=torch.bool), True)

    def draw(self, n_rows: int, n_tokens: int, number: int) -> Tensor:
        """n_rows windows, each with the token behind it: (n_rows, n_tokens + 1) int64."""
        rng = random.Random(f"{self.seed} {number}")
        n_up_to = self.places_up_to(n_tokens)
        rows = []
        for _ in range(n_rows):
            place = int(rng.random() * n_up_to[-1])  # among those of all documents
            i = int(np.searchsorted(n_up_to, place, side="right"))  # the document
            n_before = int(n_up_to[i - 1]) if i > 0 else 0
            offset = max(0, place - n_before - n_tokens + 1)  # in the document
            start = int(self.documents.borders[i]) + offset
            rows.append(self.documents.ids[start : start + n_tokens + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def places_up_to(self, n_tokens: int) -> np.ndarray:
        """For each document, how many places it and all before it have for windows of n_tokens:
        (n_documents,). A document of no more than n_tokens ids has none.

        ValueError if no document is long enough for one."""
        if n_tokens not in self.places:
            # A window needs one id more than it has tokens: the last target.
            n_fit = np.maximum(0, self.documents.sizes - n_tokens)
            if n_fit.sum() == 0:
                raise ValueError(
                    f"no document is longer than a window of {n_tokens} tokens, the longest has "
                    f"{self.documents.sizes.max()}: give longer texts, or shorter windows, such "
                    "as --stages text:256"
                )
            self.places[n_tokens] = np.cumsum(n_fit + (n_fit > 0) * (n_tokens - 1))
        return self.places[n_tokens]


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.text", __doc__.split("\n")[0])
    parser.add_argument(
        "--text",
        nargs="+",
        default=(),
        metavar="PATH",
        help="Files and folders of texts in UTF-8 (default: the modules of Python's library).",
    )
    parser.add_argument(
        "--tokenizer",
        default="shipped",
        help="The tokenizer, as train.py takes it: shipped, bytes, gpt2, learned, ids, or a file "
        "of data/tokenizer.py (default shipped).",
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="Leave files out that are not UTF-8."
    )
    args = parser.parse_args(argv)
    with one_line("python -m data.text"):
        tokenizer = tokenizers.choose(args.tokenizer, args.text)
        size_of = tokenizer.n_bytes()
        print("part   documents       bytes      tokens  bytes/token  median tokens")
        for part in PARTS:
            documents = read_documents(args.text, part, tokenizer, args.skip_bad)
            n_tokens = len(documents.ids)
            n_bytes = "unknown"
            per_token = "unknown"
            if size_of is not None:
                total = int(size_of[documents.ids].sum())
                n_bytes = f"{total:,}"
                per_token = f"{total / n_tokens:.2f}"
            print(
                f"{part:5} {len(documents):10,} {n_bytes:>11} {n_tokens:11,} "
                f"{per_token:>12} {int(np.median(documents.sizes)):14,}"
            )


if __name__ == "__main__":
    main()
