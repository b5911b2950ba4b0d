"""Background prose for BABILong: English sentences that are on every machine, or those of your own books.

    python -m data.background                      # counts and samples of Python's documentation
    python -m data.background --background books/  # the same for .txt files, say novels

Writes nothing. The shipped documentation, and so the default text, differs a little between Python versions.
"""

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data.common import Parser

MIN_WORDS = 8  # BABILong drops sentences under 10 GPT-2 tokens, about 8 words, so facts are the short ones
PASSAGE = 32  # sentences that go to train or val as a whole
VAL_PERCENT = 10  # of the passages
# Tests and tables hold no prose, installed packages differ between machines, and topics are read apart.
SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "encodings",
        "pydoc_data", "turtledemo"}

PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "..."})
BULLET = re.compile(r"^ *(?:[-*+]|\(?\d{1,2}[.)]) +", re.MULTILINE)
INDENT_CHANGES = re.compile(r"^( *)(\S.*)\n(?!\1\S)", re.MULTILINE)  # a heading, a list or code
MARKUP = re.compile(r":[a-z:]+:(?=`)|`+|(?<![\w*])(?:\*{1,2}|_)(?=\w)|(?<=[^\s_])(?:\*{1,2}|_)(?![\w_])")
# A full stop ends no sentence after an abbreviation or an initial ("J. Smith"); "I." may be an end.
SHORT = "Mr Mrs Ms Messrs Dr St Prof Rev Hon Capt Col Gen Lieut Mme Mlle Jr cf vs viz etc al e.g i.e".split()
NOT_AFTER = "".join(rf"(?<!\b{re.escape(word)}\.)" for word in [*SHORT, *"ABCDEFGHJKLMNOPQRSTUVWXYZ"])
BOUNDARY = re.compile(rf"""([.!?]{NOT_AFTER}["')]*)\s+(?=["'(]*[A-Z])""")
SENTENCE = re.compile(r"""["']?[A-Z].*[.!?]["']?""")
CODE = re.compile(r"""[][<>{}|\\=_@#~^*+$%`]|::|\(\)|""|\.{4}|---|\W/|/\W|\s-+\w"""
                  r"""|[a-z](?<!\bMc)(?<!\bMac)[A-Z]|(?<!\b[aeip])\.[a-z]""")  # os.path is code, e.g. is not


def is_clean(sentence: str) -> bool:
    """True for a sentence of running English: long enough, complete, no code, markup or table."""
    words = sentence.split()
    return (len(words) >= MIN_WORDS and SENTENCE.fullmatch(sentence) is not None
            and CODE.search(sentence) is None and sentence.count("(") == sentence.count(")")
            and sum(map(str.isalpha, sentence)) + sentence.count(" ") >= 0.9 * len(sentence)
            and sum(len(w) > 2 and w.isupper() for w in words) <= len(words) // 4)


def sentences(text: str, markup: bool = False) -> Iterator[str]:
    """The clean sentences of paragraphs between blank lines; `markup` sets lists and code apart first."""
    text = text.translate(PLAIN)
    if markup:
        text = INDENT_CHANGES.sub(r"\1\2\n\n", BULLET.sub(lambda m: "\n" + " " * len(m[0]), text))
    for paragraph in re.split(r"\n\s*\n", text):
        line = MARKUP.sub("", " ".join(paragraph.split()))
        yield from filter(is_clean, BOUNDARY.sub(r"\1\n", line).split("\n"))


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, in the order of the source."""
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child)


def shipped_texts() -> Iterator[str]:
    """What Python brings along: the topics of `help()`, then each library module's docstrings as one text."""
    try:
        from pydoc_data.topics import topics
        yield from (topics[name] for name in sorted(topics))
    except ImportError:  # packaged apart by some distributions; the docstrings are the larger part
        pass
    root = Path(sysconfig.get_paths()["stdlib"])
    tops = [p for p in root.glob("*") if p.name not in SKIP]  # first, as site-packages can be huge
    files = [f for p in tops for f in (p.rglob("*.py") if p.is_dir() else [p]) if f.suffix == ".py"]
    for file in sorted(f for f in files if not SKIP & set(f.relative_to(root).parts)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a stray backslash in a module is not our business
                yield "\n\n".join(docstrings(ast.parse(file.read_bytes())))
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # not readable, or not Python: its prose is not missed


def book(file: Path) -> str:
    """The text of a book, without Project Gutenberg's licence around it; ValueError if it is not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): convert it or move it away") from None
    text = re.split(r"\*\*\* ?START OF .*?\*\*\*", text, maxsplit=1)[-1]
    return re.split(r"\*\*\* ?END OF ", text, maxsplit=1)[0]


def documents(folder: str | Path | None = None) -> list[list[str]]:
    """Documents, each a list of clean sentences in natural order: Python's own, or a folder's .txt files.

    A sentence that a book repeats is kept once; Python's modules copy each other, so there once in all.
    A folder that cannot be used raises ValueError.
    """
    if folder is None:
        seen: set[str] = set()
        found = [[s for s in sentences(text, markup=True) if not (s in seen or seen.add(s))]
                 for text in shipped_texts()]
        mend = "this Python came without the sources of its library: name a folder of .txt files"
    else:
        folder = Path(folder)
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise ValueError(f"background {folder} {what}: name a folder of .txt files")
        files = sorted(f for f in folder.iterdir() if f.suffix == ".txt" and f.is_file())
        found = [list(dict.fromkeys(sentences(book(file)))) for file in files]
        what = "no English sentence in its .txt files" if files else "no .txt file"
        mend = f"folder {folder} holds {what}: put plain-text novels there"
    if not any(found):
        raise ValueError(f"{mend}")
    return [document for document in found if document]


def split(documents: list[list[str]], part: str) -> list[list[str]]:
    """The passages of `part`, "train" or "val", in natural order; neighbours in one document are merged.

    The unit is PASSAGE sentences, placed by a hash of its own text: more documents move nothing across.
    Train is without the sentences that occur in val too.
    """
    if part not in ("train", "val"):
        raise ValueError(f'part is {part!r}: say "train" or "val"')
    passages: dict[str, list[list[str]]] = {"train": [], "val": []}
    for document in documents:
        last = None
        for start in range(0, len(document), PASSAGE):
            passage = document[start:start + PASSAGE]
            digest = hashlib.blake2b("\n".join(passage).encode("utf-8"), digest_size=8).digest()
            side = "val" if int.from_bytes(digest, "big") % 100 < VAL_PERCENT else "train"
            if side != last:
                passages[side].append([])
            passages[side][-1].extend(passage)
            last = side
    if part == "val":
        return passages["val"]
    held_out = {s for passage in passages["val"] for s in passage}
    kept = [[s for s in passage if s not in held_out] for passage in passages["train"]]
    return [passage for passage in kept if passage]


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.background", __doc__.split("\n")[0])
    parser.add_argument("--background", metavar="FOLDER",
                        help="folder of UTF-8 .txt files (default: the documentation that ships with Python)")
    args = parser.parse_args(argv)
    try:
        texts = documents(args.background)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for part, passages in (("all", texts), ("train", split(texts, "train")), ("val", split(texts, "val"))):
        characters = sum(len(s) + 1 for passage in passages for s in passage)
        print(f"{part:5s} {sum(map(len, passages)):7,d} sentences {characters:10,d} characters "
              f"in {len(passages):,d} {'documents' if part == 'all' else 'passages'}")
    every = [s for document in texts for s in document]
    for sentence in random.Random(0).sample(every, min(5, len(every))):
        print(f"  {sentence}")


if __name__ == "__main__":
    main()
