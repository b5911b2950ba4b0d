"""A document: sentences, some of them facts, then a question and its answer, as token ids.

    from data.document import Document, from_text, parse_length
    document = from_text(tokenizer, "Mary went home. It rained.", "Where is Mary?", "home")

data/babilong.py builds documents, training joins them to batches, and the evaluation asks
their questions. This module also reads and writes lengths such as "4k". Writes nothing.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data import bm25
from data.babi import Question
from data.background import split_sentences
from data.tokenizer import Tokenizer


def parse_length(text: str) -> int:
    """The number of tokens that "0k", "4k", "1M" or a plain number stands for.

    As in the names of the benchmark, k stands for 1,000 and M for 1,000,000. ValueError for
    anything else, and above 1,000M."""
    number = text
    unit = 1
    if text.endswith(("k", "K")):
        number = text[:-1]
        unit = 1000
    elif text.endswith(("m", "M")):
        number = text[:-1]
        unit = 1_000_000
    try:
        length = unit * int(number)
    except ValueError:
        length = -1
    if not 0 <= length <= 10**9:
        raise ValueError(
            f"length {text!r} is not valid: write 0k, 4k, 1M or a number of tokens, at most 1000M"
        )
    return length


def length_name(length: int) -> str:
    """The shortest name of a length: 4000 is "4k", 1000000 is "1M", 96 is "96"."""
    if length > 0 and length % 1_000_000 == 0:
        return f"{length // 1_000_000}M"
    if length % 1000 == 0:
        return f"{length // 1000}k"
    return str(length)


def read_lengths(texts: list[str], n: int) -> dict[int, int]:
    """From length to number of samples, for lengths as --lengths takes them: "4k" or "64k:25".

    n  the number of samples of a length that does not name its own"""
    n_samples = {}
    for text in texts:
        length, colon, own = text.partition(":")
        if not colon:
            n_samples[parse_length(length)] = n
            continue
        if not own.isdecimal() or int(own) == 0:
            raise ValueError(
                f"--lengths {text!r}: a number of samples stands behind the colon, such as 64k:25"
            )
        n_samples[parse_length(length)] = int(own)
    return n_samples


def batches(n: int, size: int, pairs: bool) -> list[range]:
    """The numbers 0 to n - 1 in batches of `size`, in order.

    With `pairs` every batch has two or more, as each document lends its memory to another one."""
    size = max(2, size // 2 * 2) if pairs else max(1, size)
    starts = list(range(0, n, size))
    if pairs and len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()  # the batch before takes the one that would be left alone
    stops = [*starts[1:], n]
    return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]


class Document(NamedTuple):
    """The token ids of a document, and where its parts are.

    The context comes first: facts and background, in sentences. Before it there may be a head: the
    begin of text of a released model, and an instruction. Behind it come one or more
    questions, each with its answer and the end of text. A lesson may have questions within the
    context, too. A span is a pair (start, stop) of positions in `ids`."""

    ids: np.ndarray  # (T,) int64
    answers: list[tuple[int, int]]  # span of each answer, its end of text included, but in an echo
    questions: list[Question]  # in the order of `answers`
    places: list[int]  # which of the context's sentences are the facts
    texts: list[str]  # the text of each fact
    cuts: list[int]  # where each sentence of the context starts in `ids`, and where the last stops

    @property
    def facts(self) -> list[tuple[int, int]]:
        """The span of each fact."""
        return [(self.cuts[place], self.cuts[place + 1]) for place in self.places]

    @property
    def context_len(self) -> int:
        """The number of tokens of the context, and of what stands before it."""
        return self.cuts[-1]

    def prompt(self) -> np.ndarray:
        """The ids up to the end of the first question, which a model is given to answer."""
        first_answer = self.answers[0][0]
        return self.ids[:first_answer]

    def outside(self, segment_len: int) -> bool | None:
        """Whether all facts that the first question needs end before the segment of its answer.

        The answer is predicted from the prompt's last token, so that token's segment counts. None
        if it is not known which facts the question needs."""
        support = self.questions[0].support
        if not support:
            return None
        last_token = self.answers[0][0] - 1
        segment_start = last_token // segment_len * segment_len
        return all(self.facts[i][1] <= segment_start for i in support)

    def retrieve(self, tokenizer: Tokenizer, k: int) -> tuple[np.ndarray, bool | None]:
        """The prompt with only k sentences of its context, those that BM25 finds for the question.

        The second value says whether all facts that the question needs are among them. It is None
        if it is not known which facts these are."""
        question = self.questions[0]
        sentences = []
        for start, stop in pairwise(self.cuts):
            sentences.append(self.ids[start:stop])
        texts = [tokenizer.decode(sentence) for sentence in sentences]
        chosen = bm25.best(texts, question.text, k)
        kept = [sentences[i] for i in chosen]
        head = self.ids[: self.cuts[0]]
        asked = self.prompt()[self.context_len :]
        prompt = np.concatenate([head, *kept, asked])
        if not question.support:
            return prompt, None
        needed = {self.places[i] for i in question.support}
        return prompt, needed <= set(chosen)


def join(
    sentences: list[np.ndarray | Question],
    places: list[int],
    texts: list[str],
    questions: list[Question],
    encode: Callable[[str], Sequence[int]],
    eot: int,
    bos: int | None = None,
) -> Document:
    """A document of a context and the questions behind it.

    sentences  the context in order: the ids of a sentence, or a question that is asked there
    places     which of the sentences are facts
    texts      the text of each fact
    questions  what is asked behind the context
    encode     gives the ids of a text, with a space before it
    eot        the id of the end of text, which follows each answer
    bos        the id of the begin of text, None for a tokenizer without one"""
    pieces = [] if bos is None else [[bos]]
    answers = []
    asked = []
    cuts = [len(pieces)]
    for piece in [*sentences, *questions]:
        start = cuts[-1]
        if isinstance(piece, Question):
            asked.append(piece)
            question_ids = encode(piece.text)
            answer_ids = encode(piece.answer)
            piece = np.concatenate([question_ids, answer_ids, [eot]])
            answers.append((start + len(question_ids), start + len(piece)))
        pieces.append(piece)
        cuts.append(start + len(piece))
    ids = np.concatenate(pieces, dtype=np.int64)
    return Document(ids, answers, asked, places, texts, cuts[: len(sentences) + 1])


def from_text(tokenizer: Tokenizer, text: str, question: str, answer: str) -> Document:
    """A document of a published sample, whose white space becomes single spaces.

    A published sample does not tell which of its sentences are facts, so the document names no
    places and its question no support."""

    def encode(sentence: str) -> list[int]:
        return tokenizer.encode(" " + sentence)

    words = " ".join(text.split())
    sentences = [encode(sentence) for sentence in split_sentences(words) if sentence]
    asked = Question(question.strip(), answer.strip(), ())
    return join(sentences, [], [], [asked], encode, tokenizer.eot, tokenizer.bos)
