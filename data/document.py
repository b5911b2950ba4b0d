"""A document: sentences in a row, some of them facts, then a question and its answer, as ids of a tokenizer.

    from data.document import Document, from_text, parse_length

What data/babilong.py builds, training cuts batches of and the evaluation asks. Writes nothing.
"""
from typing import Callable, NamedTuple, Sequence

import numpy as np

from data import bm25
from data.background import BOUNDARY
from data.babi import Question
from data.tokenizer import Tokenizer


def parse_length(text: str) -> int:
    """"0k", "4k", "1M" or a plain number -> tokens, in thousands as the benchmark's names are."""
    unit = {"k": 1000, "m": 1000_000}.get(text[-1:].lower(), 1)
    try:
        value = unit * int(text.strip() if unit == 1 else text[:-1])
    except ValueError:
        value = -1
    if not 0 <= value <= 10**9:
        raise ValueError(f"length {text!r} is none: write 0k, 4k, 1M or a number of tokens, at most 1000M")
    return value


def length_name(length: int) -> str:
    """4000 -> "4k", 1000000 -> "1M", 96 -> "96"."""
    if length and length % 1_000_000 == 0:
        return f"{length // 1_000_000}M"
    return f"{length // 1000}k" if length % 1000 == 0 else str(length)


def read_lengths(texts: list[str], n: int) -> dict[int, int]:
    """{tokens: samples} of lengths such as 4k and 64k:25."""
    counts = {}
    for text in texts:
        length, colon, own = text.partition(":")
        if colon and not (own.isdecimal() and int(own)):
            raise ValueError(f"--lengths {text!r}: samples stand behind the colon, such as 64k:25")
        counts[parse_length(length)] = int(own or n)
    return counts


class Document(NamedTuple):
    """Token ids of a document with what is to be answered in it."""
    ids: np.ndarray                     # (T,) int64: context, (question, answer, end of text) once or more
    answers: list[tuple[int, int]]      # start and stop of each answer in ids, its end of text included
    questions: list[Question]
    places: list[int]                   # which sentences of the context are the facts
    texts: list[str]                    # the facts' sentences
    cuts: list[int]                     # where each sentence of the context starts in ids, and its end

    @property
    def facts(self) -> list[tuple[int, int]]:
        """Start and stop of each fact in ids."""
        return [(self.cuts[i], self.cuts[i + 1]) for i in self.places]

    @property
    def context_len(self) -> int:
        """Tokens of facts and background."""
        return self.cuts[-1]

    def prompt(self) -> np.ndarray:
        """What the model is given before it has to answer the first question."""
        return self.ids[:self.answers[0][0]]

    def outside(self, segment_len: int) -> bool | None:
        """Whether all facts that the first question needs lie before the segment in which it is answered;
        None where it is not known which they are."""
        last = (self.answers[0][0] - 1) // segment_len * segment_len
        need = [self.cuts[self.places[i] + 1] for i in self.questions[0].support]
        return all(stop <= last for stop in need) if need else None

    def retrieve(self, tokenizer: Tokenizer, k: int) -> tuple[np.ndarray, bool | None]:
        """The prompt with only the k sentences of the context that BM25 finds closest to the question, in
        their order, and whether all that it needs are among them (None where that is not known)."""
        spans = list(zip(self.cuts, self.cuts[1:]))
        chosen = bm25.best([tokenizer.decode(self.ids[a:b]) for a, b in spans], self.questions[0].text, k)
        pieces = [self.ids[slice(*spans[i])] for i in chosen]
        need = {self.places[i] for i in self.questions[0].support}
        return (np.concatenate(pieces + [self.ids[self.context_len:self.answers[0][0]]]),
                need <= set(chosen) if need else None)


def join(sentences: list[np.ndarray | Question], places: list[int], texts: list[str],
         questions: list[Question], encode: Callable[[str], Sequence[int]], eot: int) -> Document:
    """The context's sentences, then the questions. A question, there or in between, brings its answer and the
    end of text with it."""
    pieces, answers, cuts, asked = [], [], [0], []
    for piece in [*sentences, *questions]:
        if isinstance(piece, Question):
            text, answer = encode(piece.text), encode(piece.answer)
            answers.append((cuts[-1] + len(text), cuts[-1] + len(text) + len(answer) + 1))
            asked.append(piece)
            piece = np.concatenate([text, answer, [eot]])
        pieces.append(piece)
        cuts.append(cuts[-1] + len(piece))
    return Document(np.concatenate(pieces, dtype=np.int64), answers, asked, places, texts,
                    cuts[:len(sentences) + 1])


def from_text(tokenizer: Tokenizer, text: str, question: str, answer: str) -> Document:
    """A sample of the published benchmark, white space made single spaces: which sentences are facts, nobody
    tells."""
    def encode(sentence: str) -> list[int]:
        return tokenizer.encode(" " + sentence)

    sentences = BOUNDARY.sub(r"\1\n", " ".join(text.split())).split("\n")
    asked = Question(question.strip(), answer.strip(), ())
    return join([encode(s) for s in sentences if s], [], [], [asked], encode, tokenizer.eot)
