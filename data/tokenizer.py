"""Byte-level BPE tokenizers: the shipped one needs no download, and any text gives another.

    from data.tokenizer import choose
    choose("shipped").encode("Mary went to the kitchen.")  # or bytes, gpt2, my.tiktoken

    python -m data.tokenizer --text src/ notes.md --vocab_size 8192 --out my.tiktoken
    python -m data.tokenizer --vocab_size 2048 --out data/bpe_2048.tiktoken  # made that file, 4 s

The command writes a rank file in tiktoken's format: every line has a token in base64, a space, and
the token's rank. With --text the tokens are learned from the texts that train.py would train on
(data/text.py). On one CPU core 2,048 tokens of 12 MB of Python take 8 s, and 8,192 take 9 s.

Without --text it makes a tokenizer for BABILong. The tokens are learned from the train part of the
background (data/background.py). The words of bAbI are given, one token each.
"""

import base64
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from data import background
from data.common import Parser, replacing

# A token lies within one piece of a text. A piece is a word or a run of signs, with the space
# before it, or one digit, or white space. So the sentences of a text, each but the first with its
# space, give the same tokens as the whole text.
#
# The classes of characters are spelled out, without \p{L} and \s, because Python's `re` and
# tiktoken have to agree. There is no look-ahead, so that a run of a million equal characters takes
# linear time. Beyond ASCII, U+0080-00BF and U+2000-206F count as signs, everything else as letters.
SPACE = r"\t\n\x0b\f\r "
SIGN = r"\x00-\x08\x0e-\x1f!-/:-@\[-`{-\xbf\u2000-\u206f"
PATTERN = f"'(?:ll|ve|re|[dmst])| ?[^{SPACE}{SIGN}0-9]+| ?[0-9]| ?[{SIGN}]+|[{SPACE}]+"

# The words of all twenty bAbI tasks are one token each, alone and behind a space. A small model
# sees a name or a room as one symbol. The tokenizer cannot change once a model is trained, so it
# has the words of all tasks from the start.
WORDS = """
Mary John Sandra Daniel Fred Bill Jeff Julie Gertrude Winona Jessica Emily Lily Bernhard Greg Julius
Brian Sumit Yann Jason Antoine gertrude winona jessica emily sumit yann jason antoine he she they
you bathroom bedroom garden hallway kitchen office school park cinema north south east west n s e w
apple football milk pajamas objects triangle rectangle square sphere box chocolate chocolates chest
container suitcase mouse mice sheep wolf wolves cat cats swan lion frog rhino green white gray
yellow pink blue red color went back moved journeyed travelled go got took grabbed picked up get
dropped left discarded put down gave handed passed give received carrying fit fits is are was did do
does will the a and to of in from there not no longer either or many before after that afterwards
then following yesterday this morning afternoon evening above below right inside bigger than afraid
hungry thirsty bored tired yes maybe none one two three nothing The Where Who What Why How Is Does
After Afterwards Then Following Yesterday This Mice Sheep Wolves Cats
""".split()  # noqa: SIM905


IDS_ONLY = "ids"
LEARNED = "learned"
CHOICES = ("shipped", "bytes", "gpt2", LEARNED, IDS_ONLY)  # the names that `choose` knows
LEARNED_SIZE = 2048  # ids of a tokenizer that is learned for one run
BYTES = [bytes([byte]) for byte in range(256)]
MAX_PATTERN = 1000  # characters of a split pattern: GPT-2's has about 80
# A split pattern has to divide these characters into pieces. They are those of Latin scripts.
PROBE = "".join(map(chr, range(0x250)))


class Tokenizer:
    """Turns a text into ids and back.

    ranks    the content of a rank file. A checkpoint carries it as a string
    pattern  the regular expression, as tiktoken takes it, whose matches are the pieces of a text

    ValueError if ranks is not a complete rank file, or if the pattern cannot be used."""

    def __init__(self, ranks: str, pattern: str = PATTERN):
        tokens = parse_ranks(ranks)
        check_pattern(pattern)
        self.ranks = ranks
        self.pattern = pattern
        self.ids = range(len(tokens))  # the id of each rank
        self.bos = None  # the id of the begin of a text, which released models have
        self.eot = len(tokens)  # id of the end of a text, behind the last rank
        self.ends = {self.eot}  # the ids that end what a model writes
        self._encoding = tiktoken.Encoding(
            name="lm2",
            pat_str=pattern,
            mergeable_ranks=tokens,
            special_tokens={"<|endoftext|>": self.eot},
        )

    @property
    def n_vocab(self) -> int:
        """The number of ids, the end of text included."""
        return self.eot + 1

    def encode(self, text: str) -> list[int]:
        """The ids of any text.

        "<|endoftext|>" is ordinary text. Half of a surrogate pair becomes U+FFFD. ValueError if the
        split pattern fails on the text, as GPT-2's does on a million spaces before a word."""
        return encode_ordinary(self._encoding, text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids. A stream needs them, because a character may end in a later token."""
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chars_per_token(self, text: str) -> float:
        """Characters of a text for each of its tokens. GPT-2 has about 4.4 on English."""
        return len(text) / max(1, len(self.encode(text)))

    def n_bytes(self) -> np.ndarray:
        """How many bytes of text each id stands for, 0 for a special one such as the end of text:
        (n_vocab,) int64."""
        sizes = np.zeros(self.n_vocab, np.int64)
        for rank, i in enumerate(self.ids):
            if i is not None:
                sizes[i] = len(self._encoding.decode_single_token_bytes(rank))
        return sizes

    def for_checkpoint(self) -> dict[str, str]:
        """What a checkpoint holds of the tokenizer, for `of_checkpoint`. The pattern is left out if
        it is PATTERN."""
        content = dict(tokenizer=self.ranks)
        if self.pattern != PATTERN:
            content["pattern"] = self.pattern
        return content


class ReleasedTokenizer(Tokenizer):
    """The tokenizer of a released model (data/llama.py), whose ids need not be its ranks.

    ranks    the content of a rank file, as Tokenizer takes it
    pattern  as Tokenizer takes it
    ids      the id of each rank, None for a byte that the model does not know
    bos      the id with which the model begins a document, None if it wants none
    ends     the ids that end a text. The first one ends the documents that are trained on
    n_vocab  the number of ids that the model has"""

    def __init__(
        self,
        ranks: str,
        pattern: str,
        ids: list[int | None],
        bos: int | None,
        ends: list[int],
        n_vocab: int,
    ):
        super().__init__(ranks, pattern)
        known = [i for i in ids if i is not None]
        if len(ids) != self.eot or len(set(known)) < len(known):
            raise ValueError("each token needs one id of its own")
        special = ends if bos is None else [bos, *ends]
        if not ends or not all(0 <= i < n_vocab for i in (*known, *special)):
            raise ValueError(f"an id is not below the {n_vocab} ids of the model")
        self.ids = ids
        self.rank_of = {i: rank for rank, i in enumerate(ids) if i is not None}
        self.bos = bos
        self.eot = ends[0]
        self.ends = set(ends)
        self._n_vocab = n_vocab

    @property
    def n_vocab(self) -> int:
        """The number of ids, of which some may stand for no text."""
        return self._n_vocab

    def encode(self, text: str) -> list[int]:
        """The ids of any text. What looks like a special token is ordinary text, and a byte that
        the model does not know is left out."""
        found = [self.ids[rank] for rank in super().encode(text)]
        return [i for i in found if i is not None]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids. Special tokens have none."""
        return super().decode_bytes(self.rank_of[int(i)] for i in ids if int(i) in self.rank_of)

    def for_checkpoint(self) -> dict:
        """What a checkpoint holds of the tokenizer, for `of_checkpoint`."""
        ends = [self.eot, *sorted(self.ends - {self.eot})]
        special = dict(ids=self.ids, bos=self.bos, ends=ends, n_vocab=self.n_vocab)
        return dict(tokenizer=self.ranks, pattern=self.pattern, released=special)


class IdsOnly:
    """Stands for GPT-2's tokenizer on a machine that does not have it: a model can be trained on a
    file of ids and measured, but it can neither read nor write a text."""

    n_vocab = 50257
    bos = None
    eot = 50256
    ends = {50256}

    def encode(self, text: str) -> list[int]:
        """Raises ValueError."""
        raise ValueError(
            "the model was trained on ids alone (--tokenizer ids), so it cannot read a text: "
            "train with --tokenizer gpt2 where tiktoken has GPT-2's encoding"
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The ids as numbers."""
        return "".join(f" {int(i)}" for i in ids).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as numbers."""
        return self.decode_bytes(ids).decode()

    def n_bytes(self) -> None:
        """None: it is not known how many bytes an id stands for."""
        return None

    def for_checkpoint(self) -> dict[str, str]:
        """What a checkpoint holds in place of a tokenizer."""
        return dict(tokenizer=IDS_ONLY)


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of a text. ValueError if the split pattern of the encoding fails on it."""
    try:
        return encoding.encode_ordinary(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no module offers this class of Rust's errors
            raise
        raise ValueError(
            f"the tokenizer cannot split a text of {len(text):,d} characters: shorten its long "
            "runs of white space"
        ) from None


def check_pattern(pattern: str) -> None:
    """ValueError unless a pattern is short, valid, and divides PROBE into pieces, of which none is
    empty and which leave nothing out."""
    if not isinstance(pattern, str):
        raise ValueError("the split pattern is not a text")
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"the split pattern is longer than {MAX_PATTERN} characters")
    ranks = {byte: rank for rank, byte in enumerate(BYTES)}
    ranks[b""] = len(BYTES)  # tiktoken would panic at an empty piece that is no token
    encoding = tiktoken.Encoding(
        name="probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    if encode_ordinary(encoding, PROBE) != list(PROBE.encode("utf-8")):
        raise ValueError("the split pattern leaves out characters or has empty pieces")


def parse_ranks(ranks: str) -> dict[bytes, int]:
    """From token to rank, of the content of a rank file. ValueError says what is wrong with it."""
    tokens: dict[bytes, int] = {}
    for rank, line in enumerate(ranks.split("\n")[:-1]):
        try:
            code, number = line.split()
            token = base64.b64decode(code, validate=True)
            is_valid = number == str(rank) and token not in tokens
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ValueError(f"line {rank + 1} is not a new token with rank {rank}: {line[:40]!r}")
        tokens[token] = rank
    n_missing = sum(byte not in tokens for byte in BYTES)
    if n_missing:
        raise ValueError(f"cut short or not a rank file, {n_missing} of the 256 bytes are missing")
    if not ranks.endswith("\n"):
        raise ValueError("cut short or not a rank file, the last line is not complete")
    return tokens


def format_ranks(tokens: list[bytes]) -> str:
    """The content of a rank file of tokens in the order of their ranks."""
    lines = []
    for rank, token in enumerate(tokens):
        code = base64.b64encode(token).decode()
        lines.append(f"{code} {rank}\n")
    return "".join(lines)


def load(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a rank file, None for the one beside this module.

    ValueError names a file that cannot be used."""
    if path is None:
        path = Path(__file__).with_name("bpe_2048.tiktoken")
    path = Path(path)
    try:
        return Tokenizer(path.read_text(encoding="ascii"))
    except OSError as error:
        raise ValueError(
            f"tokenizer {path}: {error.strerror}; make one with data/tokenizer.py"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(
            f"tokenizer {path}: not a text of base64 and numbers; make or copy it again"
        ) from None
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}; make or copy it again") from None


def gpt2_encoding(flag: str, mend: str) -> tiktoken.Encoding:
    """GPT-2's encoding, which tiktoken has in its cache or fetches.

    ValueError if it cannot. The message names the flag that asked for it, and the mend."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # without a network there are many kinds of errors
        raise ValueError(
            f"{flag} gpt2: tiktoken has no GPT-2 encoding here and cannot fetch it: {mend}"
        ) from None


def of_encoding(encoding: tiktoken.Encoding) -> Tokenizer:
    """The tokenizer that gives the ids of an encoding of tiktoken, whose last id has to be the end
    of text."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return Tokenizer(format_ranks(tokens), encoding._pat_str)


def choose(name: str, sources: Sequence[str] = ()) -> Tokenizer | IdsOnly:
    """The tokenizer that the flag --tokenizer names.

    sources  the texts of the run, as data.text.list_files takes them

    "shipped"  the one of 2,048 ids that lies beside this module
    "bytes"    an id for each byte and the end of text: 257 ids
    "gpt2"     that of GPT-2: 50,257 ids. tiktoken fetches it once
    "learned"  one of up to 2,048 ids that is learned from the texts of the run, which takes seconds
    "ids"      for files of GPT-2's ids on a machine without its tokenizer
    a path     that of a rank file, which this module's command has written

    ValueError for another name, for a file that cannot be used, or if GPT-2's cannot be fetched."""
    if name == "shipped":
        return load()
    if name == "bytes":
        return Tokenizer(format_ranks(BYTES))
    if name == "gpt2":
        mend = (
            "run it once with a network, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has "
            "kept it, or give --tokenizer shipped for texts, ids for files of ids"
        )
        return of_encoding(gpt2_encoding("--tokenizer", mend))
    if name == LEARNED:
        return learn(text_of_files(sources, "train"), LEARNED_SIZE)
    if name == IDS_ONLY:
        return IdsOnly()
    if not Path(name).is_file():
        raise ValueError(
            f"--tokenizer {name!r} is neither a file nor a known name: give {', '.join(CHOICES)}, "
            "or a file that python -m data.tokenizer has written"
        )
    return load(name)


def of_checkpoint(content: dict, path: str | Path) -> Tokenizer | IdsOnly:
    """The tokenizer whose ranks and split pattern a checkpoint holds, see `for_checkpoint`.

    ValueError names the file if it has none, or one that does not fit its model."""
    if "tokenizer" not in content:
        raise ValueError(f"{path} lacks 'tokenizer': name another checkpoint")
    try:
        if content["tokenizer"] == IDS_ONLY:
            tokenizer = IdsOnly()
        elif "released" in content:
            special = content["released"]
            tokenizer = ReleasedTokenizer(content["tokenizer"], content["pattern"], **special)
        else:
            tokenizer = Tokenizer(content["tokenizer"], content.get("pattern", PATTERN))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this code: {reason}") from None
    vocab_size = content["config"]["vocab_size"]
    if tokenizer.n_vocab != vocab_size:
        raise ValueError(
            f"{path} has a tokenizer of {tokenizer.n_vocab} tokens, a model of {vocab_size}: "
            "name another checkpoint"
        )
    return tokenizer


def was_trained_on_text(content: dict) -> bool:
    """Whether the model of a checkpoint was trained on text. Such a model has seen white space as
    it is, and an end of text before each document."""
    return (content.get("train") or {}).get("recipe") == "text"


def merge(parts: list[bytes], token: bytes) -> list[bytes]:
    """The parts after joining, from the left, every two neighbours that make up the token."""
    merged: list[bytes] = []
    for part in parts:
        if merged and merged[-1] + part == token:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def train(pieces: dict[str, int], words: Iterable[str], size: int) -> list[bytes]:
    """The tokens of a new tokenizer in the order of their ranks.

    pieces  the pieces of a text, and how often each occurs
    words   become tokens even if they are rare, each alone and behind a space
    size    the number of tokens, or fewer if the text does not give so many

    First come the 256 bytes, then the tokens that are learned, then the words. ValueError if size
    is too small for the words.

    Each step joins the two neighbours that occur most often; of equals, the first in byte order.
    Neighbours that join to the same bytes count as the same, since tiktoken merges by bytes, too.
    tiktoken looks up a whole piece before it merges anything. So a word needs no tokens for its
    beginnings, and pieces that are words teach nothing.

    A heap holds the neighbours, the best first. It may overstate how often they occur. An entry is
    put right when it comes first."""
    tokens = list(BYTES)
    given: dict[bytes, None] = {}  # the words that are still no token, in order
    for word in words:
        for form in (word, f" {word}"):
            if len(form) > 1:
                given[form.encode("utf-8")] = None
    if size < len(tokens) + len(given):
        raise ValueError(
            f"{size} tokens are too few: bytes and words are {len(tokens) + len(given)}"
        )

    parts_of: list[list[bytes]] = []  # of each piece, the tokens it consists of so far
    times: list[int] = []  # how often each piece occurs
    for piece, n in pieces.items():
        encoded = piece.encode("utf-8")
        if encoded not in given:
            parts_of.append([bytes([byte]) for byte in encoded])
            times.append(n)
    counts: Counter[bytes] = Counter()  # two neighbours joined -> how often they occur
    users: defaultdict[bytes, set[int]] = defaultdict(set)  # -> which pieces have or had them
    for i, parts in enumerate(parts_of):
        for left, right in pairwise(parts):
            counts[left + right] += times[i]
            users[left + right].add(i)
    heap = [(-n, token) for token, n in counts.items()]
    heapq.heapify(heap)

    while heap and len(tokens) + len(given) < size:
        n, best = heapq.heappop(heap)
        if -n != counts[best]:
            if counts[best] > 0:
                heapq.heappush(heap, (-counts[best], best))
            continue
        changed = set()  # the neighbours that may occur more often than before
        for i in users.pop(best):
            merged = merge(parts_of[i], best)
            for left, right in pairwise(parts_of[i]):
                counts[left + right] -= times[i]
            for left, right in pairwise(merged):
                counts[left + right] += times[i]
                users[left + right].add(i)
                changed.add(left + right)
            parts_of[i] = merged
        for token in changed:
            heapq.heappush(heap, (-counts[token], token))
        tokens.append(best)
        given.pop(best, None)  # a word that was learned is not given any more
    return tokens + list(given)


def learn(text: str, n_vocab: int, words: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer that packs texts like this one.

    n_vocab  the number of ids, the end of text included, or fewer, as in `train`
    words    as in `train`, which also tells the errors"""
    pieces = Counter(match[0] for match in re.finditer(PATTERN, text))
    return Tokenizer(format_ranks(train(pieces, words, n_vocab - 1)))


def texts_of_background(folder: str | None) -> dict[str, str]:
    """The background to learn from and to measure on, as "train" and "val"."""
    documents = background.documents(folder)
    texts = {}
    for part in ("train", "val"):
        runs = background.split(documents, part)
        texts[part] = "\n".join(" ".join(run) for run in runs)
    return texts


def text_of_files(sources: Sequence[str], part: str) -> str:
    """The texts of a part, "train" or "val", of files and folders.

    Files that are not UTF-8 are left out. ValueError for files that cannot be used."""
    from data import text  # not above, because that module needs this one

    return "\n".join(text.read_texts(sources, part, skip_bad=True))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.tokenizer", __doc__.split("\n")[0])
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=2048,
        help="The number of tokens, the end of text included (default %(default)s).",
    )
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="The files and folders of UTF-8 texts to learn from. Files that are not UTF-8 are "
        "left out (default: learn from --background).",
    )
    sources.add_argument(
        "--background",
        metavar="FOLDER",
        help="The folder of UTF-8 .txt files to learn from, with the words of bAbI as tokens "
        "(default: the documentation that ships with Python).",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="The rank file to write. Training takes it with --tokenizer, and without that flag "
        "it takes data/bpe_2048.tiktoken.",
    )
    args = parser.parse_args(argv)
    try:
        if args.text is None:
            words = WORDS
            texts = texts_of_background(args.background)
        else:
            words = []
            texts = {part: text_of_files(args.text, part) for part in ("train", "val")}
        tokenizer = learn(texts["train"], args.vocab_size, words)
        if tokenizer.n_vocab < args.vocab_size:
            raise ValueError(
                f"the text gives only {tokenizer.n_vocab} tokens: ask for less with --vocab_size"
            )
        with replacing(args.out) as partial:
            partial.write_text(tokenizer.ranks, encoding="ascii", newline="\n")
    except OSError as error:
        parser.error(f"cannot read or write {error.filename} ({error.strerror}): name another")
    except ValueError as error:
        parser.error(str(error))
    on_train = tokenizer.chars_per_token(texts["train"])
    on_val = tokenizer.chars_per_token(texts["val"])
    print(
        f"{args.out}: {tokenizer.n_vocab:,d} tokens, characters a token {on_train:.2f} on train, "
        f"{on_val:.2f} on val"
    )


if __name__ == "__main__":
    main()
