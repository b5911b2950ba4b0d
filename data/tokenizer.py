"""A byte-level BPE tokenizer that needs no download: 2,048 tokens in data/bpe_2048.tiktoken.

    from data.tokenizer import load
    load().encode("Mary went to the kitchen.")

    python -m data.tokenizer --vocab_size 2048 --out data/bpe_2048.tiktoken  # made that file, 4 s

The command writes a rank file in tiktoken's format: every line has a token in base64, a space, and
the token's rank. The tokens are learned from the train part of the background
(data/background.py). The words of bAbI are given, one token each.
"""

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

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


class Tokenizer:
    """Turns a text into ids and back.

    ranks  the content of a rank file. A checkpoint carries it as a string

    ValueError, in one line, if that is not a complete rank file."""

    def __init__(self, ranks: str):
        tokens = parse_ranks(ranks)
        self.ranks = ranks
        self.eot = len(tokens)  # id of the end of a text, behind the last rank
        self._encoding = tiktoken.Encoding(
            name="lm2",
            pat_str=PATTERN,
            mergeable_ranks=tokens,
            special_tokens={"<|endoftext|>": self.eot},
        )

    @property
    def n_vocab(self) -> int:
        """The number of ids, the end of text included."""
        return self.eot + 1

    def encode(self, text: str) -> list[int]:
        """The ids of any text.

        "<|endoftext|>" is ordinary text. Half of a surrogate pair becomes U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids. A stream needs them, because a character may end in a later token."""
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chars_per_token(self, text: str) -> float:
        """Characters of a text for each of its tokens. GPT-2 has about 4.4 on English."""
        return len(text) / max(1, len(self.encode(text)))


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
    n_missing = sum(bytes([byte]) not in tokens for byte in range(256))
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


def of_checkpoint(content: dict, path: str | Path) -> Tokenizer:
    """The tokenizer whose ranks a checkpoint holds.

    ValueError names the file if it has none, or one that does not fit its model."""
    if "tokenizer" not in content:
        raise ValueError(f"{path} lacks 'tokenizer': name another checkpoint")
    try:
        tokenizer = Tokenizer(content["tokenizer"])
    except (AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this code: {reason}") from None
    vocab_size = content["config"]["vocab_size"]
    if tokenizer.n_vocab != vocab_size:
        raise ValueError(
            f"{path} has a tokenizer of {tokenizer.n_vocab} tokens, a model of {vocab_size}: "
            "name another checkpoint"
        )
    return tokenizer


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
    words   are tokens in any case, alone and behind a space
    size    the number of tokens

    First come the 256 bytes, then the tokens that are learned, then the words. ValueError if size
    is too small for the words, or if the text does not give so many tokens.

    Every step merges the neighbours that occur most often, and of equals the first in byte order.
    They are counted by the bytes that they make up and not by their halves, as tiktoken merges by
    bytes, too. tiktoken looks up a whole piece before it merges anything. So a word needs no tokens
    for its beginnings, and pieces that are words are not learned from."""
    tokens = [bytes([byte]) for byte in range(256)]
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

    def count(i: int, sign: int) -> None:
        """Add the neighbours of a piece to the counts, or take them out with the sign -1."""
        parts = parts_of[i]
        for left, right in pairwise(parts):
            counts[left + right] += sign * times[i]
            users[left + right].add(i)

    for i in range(len(parts_of)):
        count(i, 1)
    while len(tokens) + len(given) < size:
        most = max(counts.values(), default=0)
        if most < 1:
            raise ValueError(
                f"the text gives only {len(tokens) + len(given)} of {size} tokens: ask for less"
            )
        best = min(token for token, n in counts.items() if n == most)
        for i in users.pop(best):
            count(i, -1)
            parts_of[i] = merge(parts_of[i], best)
            count(i, 1)
        tokens.append(best)
        given.pop(best, None)  # a word that was learned is not given any more
    return tokens + list(given)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.tokenizer", __doc__.split("\n")[0])
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=2048,
        help="The number of tokens, the end of text included (default %(default)s).",
    )
    parser.add_argument(
        "--background",
        metavar="FOLDER",
        help="The folder of UTF-8 .txt files to learn from (default: the documentation that ships "
        "with Python).",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="The rank file to write. Training always takes data/bpe_2048.tiktoken.",
    )
    args = parser.parse_args(argv)
    try:
        documents = background.documents(args.background)
        texts = {}
        for part in ("train", "val"):
            runs = background.split(documents, part)
            texts[part] = "\n".join(" ".join(run) for run in runs)
        pieces = Counter(re.findall(PATTERN, texts["train"]))
        ranks = format_ranks(train(pieces, WORDS, args.vocab_size - 1))
        tokenizer = Tokenizer(ranks)
        with replacing(args.out) as partial:
            partial.write_text(ranks, encoding="ascii", newline="\n")
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
