"""Background prose for BABILong: English sentences that every Python has, or those of your books.

    python -m data.background                      # counts and samples of Python's documentation
    python -m data.background --background books/  # the same for a folder of .txt files, say novels

Writes nothing. The documentation differs a little between versions of Python, and so does the
default background.
"""

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data.common import Parser, one_line

# BABILong drops sentences under 10 GPT-2 tokens, which are about 8 words. Shorter ones are dropped
# here, too, so that, as in the benchmark, every short sentence of a document is a fact.
MIN_WORDS = 8
PASSAGE = 32  # sentences that go to train or to val together
VAL_PERCENT = 10  # the percentage of the passages that go to val
# Parts of Python's library that are not read. Tests and tables hold no prose, installed packages
# differ between machines, and the topics of pydoc_data are read in another way.
SKIP = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "turtledemo",
}

PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "..."})
BULLET = re.compile(r"^ *(?:[-*+]|\(?\d{1,2}[.)]) +", re.MULTILINE)  # "- ", "* ", "2. ", "(3) "
# A line whose next line is blank or indented otherwise: a heading, or the end of a list.
INDENT_CHANGES = re.compile(r"^( *)(\S.*)\n(?!\1\S)", re.MULTILINE)
MARKUP = re.compile(
    r":[a-z:]+:(?=`)|`+"  # a role before a backtick, such as :class:, and backticks
    r"|(?<![\w*])(?:\*{1,2}|_)(?=\w)"  # *, ** or _ before a word
    r"|(?<=[^\s_])(?:\*{1,2}|_)(?![\w_])"  # the same behind a word
)
# A full stop behind one of these abbreviations or behind an initial ("J. Smith") ends no sentence.
# A full stop behind "I" may end one.
SHORT = """
Mr Mrs Ms Messrs Dr St Prof Rev Hon Capt Col Gen Lieut Mme Mlle Jr cf vs viz etc al e.g i.e
""".split()  # noqa: SIM905
INITIALS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
NOT_AFTER = "".join(rf"(?<!\b{re.escape(word)}\.)" for word in [*SHORT, *INITIALS])
# Between two sentences. Group 1 is what ends the first of them.
BOUNDARY = re.compile(rf"""([.!?]{NOT_AFTER}["')]*)\s+(?=["'(]*[A-Z])""")
SENTENCE = re.compile(r"""["']?[A-Z].*[.!?]["']?""")
CODE = re.compile(
    r"""[][<>{}|\\=_@#~^*+$%`]|::|\(\)|""|\.{4}|---|\W/|/\W|\s-+\w"""
    r"""|[a-z](?<!\bMc)(?<!\bMac)[A-Z]"""  # camelCase, but not McGregor
    r"""|(?<!\b[aeip])\.[a-z]"""  # os.path, but not e.g.
)


def is_clean(sentence: str) -> bool:
    """Whether a sentence is running English: long enough, complete, no code, markup or table."""
    words = sentence.split()
    if len(words) < MIN_WORDS:
        return False
    if SENTENCE.fullmatch(sentence) is None or CODE.search(sentence) is not None:
        return False
    if sentence.count("(") != sentence.count(")"):
        return False
    n_plain = sum(map(str.isalpha, sentence)) + sentence.count(" ")
    if n_plain < 0.9 * len(sentence):
        return False
    n_shouted = sum(len(word) > 2 and word.isupper() for word in words)
    return n_shouted <= len(words) // 4


def split_sentences(text: str) -> list[str]:
    """The sentences of a text without line breaks."""
    return BOUNDARY.sub(r"\1\n", text).split("\n")


def sentences(text: str, is_documentation: bool = False) -> Iterator[str]:
    """The clean sentences of a text whose paragraphs have blank lines between them.

    is_documentation  whether lists and code are taken out of the paragraphs first"""
    text = text.translate(PLAIN)
    if is_documentation:
        text = BULLET.sub(lambda bullet: "\n" + " " * len(bullet[0]), text)
        text = INDENT_CHANGES.sub(r"\1\2\n\n", text)
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        line = MARKUP.sub("", line)
        for sentence in split_sentences(line):
            if is_clean(sentence):
                yield sentence


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module and of its classes and functions, in the order of the source."""
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child)


def shipped_texts() -> Iterator[str]:
    """The topics of Python's `help()`, then the docstrings of each module of its library."""
    try:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield topics[name]
    except ImportError:
        pass  # some systems package the topics apart; most prose is in the docstrings
    for file in library_files():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some modules have a stray backslash
                module = ast.parse(file.read_bytes())
            yield "\n\n".join(docstrings(module))
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # the file cannot be read or is not Python


def library_files() -> list[Path]:
    """The source files of Python's library, without those under a name in SKIP, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.glob("*"):
        if path.name in SKIP:
            continue  # before its files are listed, as site-packages can be huge
        if path.is_dir():
            files.extend(path.rglob("*.py"))
        elif path.suffix == ".py":
            files.append(path)
    return sorted(file for file in files if not SKIP & set(file.relative_to(root).parts))


def book(file: Path) -> str:
    """The text of a book without the licence that Project Gutenberg puts around it.

    UnicodeDecodeError if it is not UTF-8."""
    text = file.read_text(encoding="utf-8-sig")
    text = re.split(r"\*\*\* ?START OF .*?\*\*\*", text, maxsplit=1)[-1]
    return re.split(r"\*\*\* ?END OF ", text, maxsplit=1)[0]


def documents(folder: str | Path | None = None) -> list[list[str]]:
    """Documents, each a list of clean sentences in their natural order.

    folder  every text file in it (see is_text) is a document. None for Python's documentation

    A sentence that a book repeats is kept once in that book. Python's modules copy each other, so
    there a sentence is kept once in all. ValueError for a folder that cannot be used."""
    if folder is None:
        found = shipped_documents()
        if not found:
            raise ValueError(
                "this Python came without the sources of its library: name a folder of .txt files"
            )
        return found
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"background {folder} does not exist: name a folder of .txt files")
    if not folder.is_dir():
        raise ValueError(f"background {folder} is not a folder: name a folder of .txt files")
    files = sorted(file for file in folder.iterdir() if is_text(file))
    found = []
    not_utf8 = []
    for file in files:
        try:
            text = book(file)
        except UnicodeDecodeError as error:
            not_utf8.append(f"{file.name} (byte {error.start})")
            continue
        document = list(dict.fromkeys(sentences(text)))  # each sentence once, in order
        if document:
            found.append(document)
    if not_utf8:
        raise ValueError(
            f"folder {folder} holds files that are not UTF-8: {', '.join(not_utf8)}: convert them "
            "or move them away"
        )
    if not found:
        what = "no English sentence in its .txt files" if files else "no .txt file"
        raise ValueError(f"folder {folder} holds {what}: put plain-text novels there")
    return found


def is_text(path: Path) -> bool:
    """Whether a path is a file whose name ends in .txt, or in .txt.utf-8 as Project Gutenberg has
    it, in small or capital letters."""
    return path.is_file() and path.name.lower().endswith((".txt", ".txt.utf-8"))


def shipped_documents() -> list[list[str]]:
    """Python's documentation as documents. No sentence comes twice."""
    found = []
    seen = set()
    for text in shipped_texts():
        document = []
        for sentence in sentences(text, is_documentation=True):
            if sentence not in seen:
                seen.add(sentence)
                document.append(sentence)
        if document:
            found.append(document)
    return found


def split(documents: list[list[str]], part: str) -> list[list[str]]:
    """The runs of sentences of a part, "train" or "val", in natural order. ValueError for another
    part.

    Each document is divided into passages of PASSAGE sentences. A hash of a passage's own text
    decides its part, so that more documents move no passage to the other part. Neighbouring
    passages of the same part make one run. Sentences that also occur in val are left out of
    train."""
    if part not in ("train", "val"):
        raise ValueError(f'part is {part!r}: say "train" or "val"')
    runs: dict[str, list[list[str]]] = {"train": [], "val": []}
    for document in documents:
        last_part = None
        for start in range(0, len(document), PASSAGE):
            passage = document[start : start + PASSAGE]
            own_part = passage_part(passage)
            if own_part != last_part:
                runs[own_part].append([])  # a new run begins
            runs[own_part][-1].extend(passage)
            last_part = own_part
    if part == "val":
        return runs["val"]
    held_out = set()
    for run in runs["val"]:
        held_out.update(run)
    kept = []
    for run in runs["train"]:
        rest = [sentence for sentence in run if sentence not in held_out]
        if rest:
            kept.append(rest)
    return kept


def passage_part(passage: list[str]) -> str:
    """The part that a passage belongs to, "train" or "val", by a hash of its text."""
    digest = hashlib.blake2b("\n".join(passage).encode("utf-8"), digest_size=8).digest()
    if int.from_bytes(digest, "big") % 100 < VAL_PERCENT:
        return "val"
    return "train"


def counts_line(name: str, groups: list[list[str]], unit: str) -> str:
    """A line with the numbers of sentences, of characters and of groups, which `unit` names."""
    n_sentences = sum(len(group) for group in groups)
    n_characters = 0
    for group in groups:
        for sentence in group:
            n_characters += len(sentence) + 1  # with the space before it
    return (
        f"{name:5s} {n_sentences:7,d} sentences {n_characters:10,d} characters "
        f"in {len(groups):,d} {unit}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.background", __doc__.split("\n")[0])
    parser.add_argument(
        "--background",
        metavar="FOLDER",
        help="The folder of UTF-8 .txt files to read (default: the documentation that ships with "
        "Python).",
    )
    args = parser.parse_args(argv)
    with one_line(parser.prog):
        found = documents(args.background)
        print(counts_line("all", found, "documents"))
        print(counts_line("train", split(found, "train"), "runs of sentences"))
        print(counts_line("val", split(found, "val"), "runs of sentences"))
        every = []
        for document in found:
            every.extend(document)
        for sentence in random.Random(0).sample(every, min(5, len(every))):
            print(f"  {sentence}")


if __name__ == "__main__":
    main()
