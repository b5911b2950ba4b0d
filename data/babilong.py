"""BABILong samples: bAbI facts hidden between sentences of real prose, a question at the end, at any length.

    python -m data.babilong --task qa1 --length 1k        # print a sample and its numbers

Writes nothing. Lengths are tokens of facts + background (the question is not counted), as the benchmark does;
0 means no background. The background is consecutive sentences from a random start, the last one cut so that
the length is exact; each fact goes to a random gap between two sentences, in the story's order.
Train and validation share no story (by a hash of its sentences) and no passage of background.
"""
import hashlib
import random
from typing import NamedTuple, Sequence

import numpy as np

from data import babi, background
from data.cli import Parser, one_line
from data.tokenizer import Tokenizer, load

VAL_SHARE = 10  # one story in ten is kept for validation


class Document(NamedTuple):
    """Token ids of a document with what is to be answered in it."""
    ids: np.ndarray                     # (T,) int64: context, (question, answer, end of text) once or more
    answers: list[tuple[int, int]]      # start and stop of each answer in ids, its end of text included
    questions: list[babi.Question]
    facts: list[tuple[int, int]]        # start and stop of each fact in ids
    texts: list[str]                    # the facts' sentences
    context_len: int                    # tokens of facts and background

    def prompt(self) -> np.ndarray:
        """What the model is given before it has to answer the first question."""
        return self.ids[:self.answers[0][0]]

    def outside(self, segment_len: int) -> bool:
        """Whether all facts that the first question needs lie before the segment in which it is answered."""
        last = (self.answers[0][0] - 1) // segment_len * segment_len
        return all(self.facts[i][1] <= last for i in self.questions[0].support)


def parse_length(text: str) -> int:
    """"0k", "4k", "1M" or a plain number -> tokens, in thousands as the benchmark's names are."""
    unit = {"k": 1000, "m": 1000_000}.get(text[-1:].lower(), 1)
    try:
        value = int(text.strip() if unit == 1 else text[:-1])
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"length {text!r} is none: write 0k, 4k, 1M or a number of tokens")
    return value * unit


def length_name(length: int) -> str:
    """4000 -> "4k", 1000000 -> "1M", 96 -> "96"."""
    if length and length % 1_000_000 == 0:
        return f"{length // 1_000_000}M"
    return f"{length // 1000}k" if length % 1000 == 0 else str(length)


def story_part(texts: Sequence[str]) -> str:
    """"train" or "val", by a hash of the facts."""
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=4).digest()
    return "val" if int.from_bytes(digest, "little") % VAL_SHARE == 0 else "train"


class Builder:
    """Builds documents of one part ("train" or "val") from generated stories and tokenised background."""

    def __init__(self, tokenizer: Tokenizer, part: str, folder: str | None = None,
                 documents: list | None = None):
        self.tokenizer, self.part, self.cache = tokenizer, part, {}
        documents = background.documents(folder) if documents is None else documents
        sentences = [s for passage in background.split(documents, part) for s in passage]
        if not sentences:
            raise ValueError(f"the background {folder or 'shipped with Python'} has no sentence for {part}: "
                             "give a folder with more text")
        coded = [tokenizer.encode(" " + s) for s in sentences]
        self.prose = np.array([t for c in coded for t in c], dtype=np.int64)        # all sentences, one run
        self.starts = np.cumsum([0] + [len(c) for c in coded])                      # where each begins
        self.chars_per_token = sum(len(s) + 1 for s in sentences) / len(self.prose)

    def encode(self, sentence: str) -> np.ndarray:
        """A sentence of a story with the space before it; few differ, so they are kept."""
        if sentence not in self.cache:
            self.cache[sentence] = np.array(self.tokenizer.encode(" " + sentence), dtype=np.int64)
        return self.cache[sentence]

    def story(self, task: str, n_facts: int | None, rng: random.Random
              ) -> tuple[list[str], list[babi.Question]]:
        """Facts of a story of this part and questions on them: as bAbI asks (n_facts None), one; else
        everything that can be asked after n_facts facts, or after more where so few allow no question."""
        rules, silent = babi.TASKS[task], 0
        while True:
            if n_facts is None:
                story = babi.story(rules, rng)
                n, question = story.questions[int(rng.random() * len(story.questions))]
                events, questions = story.events[:n], [question]
            else:
                events = list(babi.simulate(rules, rng, n_facts + silent // 100))
                questions = babi.all_questions(rules, events, rng)
            texts = [e.text for e in events]
            silent += not questions
            if questions and story_part(texts) == self.part:
                return texts, questions

    def background(self, length: int, rng: random.Random) -> list[np.ndarray]:
        """Consecutive sentences from a random start, `length` tokens in all; goes round at the text's end."""
        first = int(rng.random() * (len(self.starts) - 1))
        sentences = []
        while length > 0:
            sentence = self.prose[self.starts[first]:self.starts[first + 1]][:length]
            sentences.append(sentence)
            length, first = length - len(sentence), (first + 1) % (len(self.starts) - 1)
        return sentences

    def assemble(self, texts: list[str], questions: list[babi.Question], length: int, rng: random.Random
                 ) -> Document:
        """Hide the facts in background: `length` tokens together, or the facts alone if length is 0."""
        facts = [self.encode(t) for t in texts]
        noise = self.background(length - sum(map(len, facts)), rng)
        gaps = sorted(int(rng.random() * (len(noise) + 1)) for _ in facts)
        pieces, spans, at, used = [], [], 0, 0
        for fact, gap in zip(facts, gaps):
            between = noise[used:gap]
            at, used = at + sum(map(len, between)), gap
            pieces += between + [fact]
            spans.append((at, at + len(fact)))
            at += len(fact)
        pieces += noise[used:]
        context_len = at = at + sum(map(len, noise[used:]))
        answers = []
        for q in questions:
            asked, answer = self.encode(q.text), self.encode(q.answer)
            pieces += [asked, answer, np.array([self.tokenizer.eot])]
            answers.append((at + len(asked), at + len(asked) + len(answer) + 1))
            at = answers[-1][1]
        return Document(np.concatenate(pieces), answers, questions, spans, texts, context_len)

    def sample(self, task: str, length: int, rng: random.Random, tries: int = 1000) -> Document:
        """One question at the end of `length` tokens, as the benchmark asks it. Stories that do not fit are
        passed over; ValueError if none fits, or for an unknown task."""
        if task not in babi.TASKS:
            raise ValueError(f"task {task!r} is unknown: choose from {' '.join(babi.TASKS)}")
        for _ in range(tries):
            texts, questions = self.story(task, None, rng)
            if length == 0 or sum(len(self.encode(t)) for t in texts) <= length:
                return self.assemble(texts, questions, length, rng)
        raise ValueError(f"length {length} is too short for the facts of {task}: give more tokens, "
                         "or 0 for no background")

    def lesson(self, tasks: Sequence[str], n_facts: int, room: tuple[int, int], rng: random.Random,
               max_questions: int = 8) -> Document:
        """A training document: n_facts facts and every question on them (max_questions at most), its length
        drawn from room = (least, most) tokens; without background if most is 0 or the facts leave no room."""
        texts, questions = self.story(tasks[int(rng.random() * len(tasks))], n_facts, rng)
        questions = questions[:max_questions]
        facts = sum(len(self.encode(t)) for t in texts)
        tail = sum(len(self.encode(q.text)) + len(self.encode(q.answer)) + 1 for q in questions)
        least = max(room[0] - tail, facts)
        most = room[1] - tail
        length = least + int(rng.random() * (most - least + 1)) if most > facts else 0
        return self.assemble(texts, questions, length, rng)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.babilong", __doc__.split("\n")[0])
    parser.add_argument("--task", default="qa1", help="bAbI task (default qa1)")
    parser.add_argument("--length", default="1k",
                        help="tokens of facts + background: 0k, 4k, 1M, ... (default 1k)")
    parser.add_argument("--part", default="val", choices=("train", "val"),
                        help="which stories and prose (default val)")
    parser.add_argument("--background", default=None,
                        help="folder of .txt files (default: Python's documentation)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    args = parser.parse_args(argv)
    with one_line("python -m data.babilong"):
        builder = Builder(load(), args.part, args.background)
        doc = builder.sample(args.task, parse_length(args.length), random.Random(args.seed))
        text, question = builder.tokenizer.decode(doc.prompt()).strip(), doc.questions[0]
        print(text, f"answer: {question.answer}",
              f"{len(doc.facts)} facts, needed: {' '.join(doc.texts[i] for i in question.support)}",
              f"{doc.context_len} tokens, {len(text) / len(doc.prompt()):.2f} characters a token here, "
              f"{builder.chars_per_token:.2f} in all the background", sep="\n")


if __name__ == "__main__":
    main()
