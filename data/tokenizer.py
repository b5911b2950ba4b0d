"""A byte-level BPE tokenizer that needs no download: 2,048 tokens, in `bpe_2048.tiktoken` beside this file.

    python -m data.tokenizer --vocab_size 2048 --out data/bpe_2048.tiktoken   # how that file was made: 4 s

Writes a rank file in tiktoken's format: a token in base64, a space and its rank on every line. Learned from
the train part of the background (data/background.py); the words of bAbI are given, one token each.
"""

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from data import background
from data.common import Parser, replacing

# A token lies within one piece: a word or a run of signs, with the space before it; one digit; or white
# space. So the sentences of a text, each but the first with its space, give the tokens of the whole.
# Spelled out, without \p{L} and \s, as Python's `re` and tiktoken must agree; without look-ahead, so that a
# run of a million equal characters takes linear time. Beyond ASCII, U+0080-00BF and U+2000-206F count as
# signs, everything else as letters.
SPACE, SIGN = r"\t\n\x0b\f\r ", r"\x00-\x08\x0e-\x1f!-/:-@\[-`{-\xbf\u2000-\u206f"
PATTERN = f"'(?:ll|ve|re|[dmst])| ?[^{SPACE}{SIGN}0-9]+| ?[0-9]| ?[{SIGN}]+|[{SPACE}]+"

# The words of all twenty bAbI tasks are one token each, alone and after a space: a small model sees a name
# or a room as one symbol, and the tokenizer, which is fixed once a model is trained, already fits tasks
# that come later.
WORDS = """
Mary John Sandra Daniel Fred Bill Jeff Julie Gertrude Winona Jessica Emily Lily Bernhard Greg Julius Brian
Sumit Yann Jason Antoine gertrude winona jessica emily sumit yann jason antoine he she they you bathroom
bedroom garden hallway kitchen office school park cinema north south east west n s e w apple football milk
pajamas objects triangle rectangle square sphere box chocolate chocolates chest container suitcase mouse mice
sheep wolf wolves cat cats swan lion frog rhino green white gray yellow pink blue red color went back moved
journeyed travelled go got took grabbed picked up get dropped left discarded put down gave handed passed give
received carrying fit fits is are was did do does will the a and to of in from there not no longer either or
many before after that afterwards then following yesterday this morning afternoon evening above below right
inside bigger than afraid hungry thirsty bored tired yes maybe none one two three nothing The Where Who What
Why How Is Does After Afterwards Then Following Yesterday This Mice Sheep Wolves Cats
""".split()


class Tokenizer:
    """Text to ids and back. `ranks` is the text of a rank file; a checkpoint carries it as a plain string.

    Raises ValueError, in one line, if that text is not a complete rank file.
    """

    def __init__(self, ranks: str):
        tokens: dict[bytes, int] = {}
        for rank, line in enumerate(ranks.split("\n")[:-1]):
            try:
                code, number = line.split()
                token = base64.b64decode(code, validate=True)
                if number != str(rank) or tokens.setdefault(token, rank) != rank:
                    raise ValueError
            except ValueError:
                raise ValueError(f"line {rank + 1} is no new token with rank {rank}: {line[:40]!r}") from None
        missing = sum(bytes([b]) not in tokens for b in range(256))
        if missing or not ranks.endswith("\n"):
            what = f"{missing} of the 256 bytes are missing" if missing else "the last line is not complete"
            raise ValueError(f"cut short or no rank file, {what}")
        self.ranks = ranks
        self.eot = len(tokens)  # id of the end of a text, after the last rank
        self._encoding = tiktoken.Encoding(name="lm2", pat_str=PATTERN, mergeable_ranks=tokens,
                                           special_tokens={"<|endoftext|>": self.eot})

    @property
    def n_vocab(self) -> int:
        """How many ids there are, the end of text included."""
        return self.eot + 1

    def encode(self, text: str) -> list[int]:
        """The ids of any string: "<|endoftext|>" is ordinary text, half a surrogate pair becomes U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind the ids, for streams: a character may end in a later token."""
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chars_per_token(self, text: str) -> float:
        """Characters a token, to compare with lengths in other tokens (GPT-2: about 4.4 on English)."""
        return len(text) / max(1, len(self.encode(text)))


def load(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a rank file, by default the one beside this module; ValueError names a bad file."""
    path = Path(path or Path(__file__).with_name("bpe_2048.tiktoken"))
    try:
        return Tokenizer(path.read_text(encoding="ascii"))
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror}; make one with data/tokenizer.py") from None
    except ValueError as error:
        why = "not a text of base64 and numbers" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"tokenizer {path}: {why}; make or copy it again") from None


def of_checkpoint(content: dict, path: str | Path) -> Tokenizer:
    """The tokenizer whose ranks a checkpoint holds. ValueError names a file that has none, or one
    that does not fit its model."""
    if "tokenizer" not in content:
        raise ValueError(f"{path} lacks 'tokenizer': name another checkpoint")
    try:
        tokenizer = Tokenizer(content["tokenizer"])
    except (AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this code: {reason}") from None
    if tokenizer.n_vocab != content["config"]["vocab_size"]:
        raise ValueError(f"{path}: a tokenizer of {tokenizer.n_vocab} tokens, "
                         f"a model of {content['config']['vocab_size']}")
    return tokenizer


def merge(parts: list[bytes], token: bytes) -> list[bytes]:
    """The parts with neighbours that make up `token` joined, from the left."""
    out: list[bytes] = []
    for part in parts:
        if out and out[-1] + part == token:
            out[-1] = token
        else:
            out.append(part)
    return out


def train(pieces: dict[str, int], words: Iterable[str], size: int) -> list[bytes]:
    """`size` tokens by rank: the 256 bytes, merges learned from `pieces` and their counts, then the `words`.

    Merged is what neighbours make up most often, of equals the first in byte order. It is counted by bytes,
    not by its halves, as tiktoken merges by bytes. That looks up a whole piece before it merges anything, so
    a given word needs no tokens for its beginnings, and where it stands in the text it teaches nothing.
    """
    tokens = [bytes([b]) for b in range(256)]
    given = {form.encode("utf-8"): None for word in words for form in (word, f" {word}") if len(form) > 1}
    if size < len(tokens) + len(given):
        raise ValueError(f"{size} tokens are too few: bytes and words are {len(tokens) + len(given)}")
    texts = [([bytes([b]) for b in piece.encode("utf-8")], n) for piece, n in pieces.items()
             if piece.encode("utf-8") not in given]
    counts: Counter[bytes] = Counter()
    users: defaultdict[bytes, set[int]] = defaultdict(set)  # which texts have it, or had it once

    def count(i: int, sign: int) -> None:
        parts, n = texts[i]
        for left, right in zip(parts, parts[1:]):
            counts[left + right] += sign * n
            users[left + right].add(i)

    for i in range(len(texts)):
        count(i, 1)
    while len(tokens) + len(given) < size:
        most = max(counts.values(), default=0)
        if most < 1:
            raise ValueError(f"the text gives only {len(tokens) + len(given)} of {size} tokens: ask for less")
        best = min(token for token, n in counts.items() if n == most)
        for i in users.pop(best):
            count(i, -1)
            texts[i] = merge(texts[i][0], best), texts[i][1]
            count(i, 1)
        tokens.append(best)
        given.pop(best, None)  # learned before it had to be given
    return tokens + list(given)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.tokenizer", __doc__.split("\n")[0])
    parser.add_argument("--vocab_size", type=int, default=2048,
                        help="tokens, the end of text included (default: %(default)s)")
    parser.add_argument("--background", metavar="FOLDER",
                        help="folder of UTF-8 .txt files (default: the documentation that ships with Python)")
    parser.add_argument("--out", type=Path, required=True,
                        help="rank file to write; all training takes data/bpe_2048.tiktoken")
    args = parser.parse_args(argv)
    try:
        documents = background.documents(args.background)
        texts = {part: "\n".join(map(" ".join, background.split(documents, part)))
                 for part in ("train", "val")}
        tokens = train(Counter(re.findall(PATTERN, texts["train"])), WORDS, args.vocab_size - 1)
        ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
        tokenizer = Tokenizer(ranks)
        with replacing(args.out) as partial:
            partial.write_text(ranks, encoding="ascii", newline="\n")
    except OSError as error:
        parser.error(f"cannot read or write {error.filename} ({error.strerror}): name another")
    except ValueError as error:
        parser.error(str(error))
    measured = ", ".join(f"{tokenizer.chars_per_token(text):.2f} on {part}" for part, text in texts.items())
    print(f"{args.out}: {tokenizer.n_vocab:,d} tokens, characters a token {measured}")


if __name__ == "__main__":
    main()
