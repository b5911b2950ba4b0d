"""BABILong samples: bAbI facts hidden between sentences of real prose, a question at the end, at any length.

    python -m data.babilong --task qa1 --length 1k                  # print a sample and its numbers
    python -m data.babilong --task qa3 --length 4k --count chars    # as long as the published 4k

Writes nothing. Lengths are tokens of facts + background (the question is not counted), as the benchmark does;
0 means no background. The background is consecutive sentences from a random start, the last one cut so that
the length is exact; each fact goes to a random gap between two sentences, in the story's order.
Train and validation share no story (by a hash of its sentences) and no passage of background.
"""
import bisect
import hashlib
import random
from collections.abc import Callable, Sequence

import numpy as np
import tiktoken

from data import babi, background
from data.common import Parser, one_line
from data.document import Document, join, parse_length
from data.tokenizer import Tokenizer, load

VAL_SHARE = 10  # one story in ten is kept for validation
CHARS = 4.4     # characters of an English GPT-2 token
LESS = 300      # so many tokens under its name is a published length: "4k" holds 3,700 GPT-2 tokens
Asides = Sequence[tuple[int, babi.Question]]  # questions within the context, with the facts before each
COUNTS = ("own", "gpt2", "chars")  # what a length counts: the model's tokens, GPT-2's, 4.4 characters


def story_part(texts: Sequence[str]) -> str:
    """"train" or "val", by a hash of the facts."""
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=4).digest()
    return "val" if int.from_bytes(digest, "little") % VAL_SHARE == 0 else "train"


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, as tiktoken has it in its cache or fetches it; ValueError where neither works."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # no network: requests has many ways to say so
        raise ValueError("--count gpt2: tiktoken has no GPT-2 encoding here and cannot fetch it: give "
                         f"--count chars, {CHARS} characters a token") from None


class Builder:
    """Builds documents of one part ("train" or "val") from stories and tokenised background.

    folder     .txt files for the background, None: Python's documentation; or documents, already read
    stories    file or folder of original bAbI files instead of generated stories; their _train or _test
    count      what a length counts, one of COUNTS; by "gpt2" and "chars" 4k is 3,700, as published"""

    def __init__(self, tokenizer: Tokenizer, part: str, folder: str | None = None,
                 documents: list | None = None, stories: str | None = None, count: str = "own"):
        self.tokenizer, self.part, self.stories, self.count = tokenizer, part, stories, count
        self.cache, self.pools = {}, {}
        self.gpt2 = gpt2_encoding() if count == "gpt2" else None
        documents = background.documents(folder) if documents is None else documents
        self.sentences = [" " + s for passage in background.split(documents, part) for s in passage]
        if self.gpt2:  # the benchmark's own filter, beside ours of 8 words
            self.sentences = [s for s in self.sentences if len(self.gpt2.encode_ordinary(s.strip())) >= 10]
        if not self.sentences:
            raise ValueError(f"the background {folder or 'shipped with Python'} has no sentence for {part}: "
                             "give a folder with more text")
        coded = [tokenizer.encode(s) for s in self.sentences]
        self.prose = np.array([t for c in coded for t in c], dtype=np.int64)        # all sentences, one run
        self.starts = np.cumsum([0] + [len(c) for c in coded])                      # where each begins
        self.sizes = np.cumsum([0] + [self.size(s, c) for s, c in zip(self.sentences, coded)])  # counted
        self.chars_per_token = sum(map(len, self.sentences)) / len(self.prose)

    def size(self, text: str, ids: Sequence[int]) -> float:
        """What a sentence with the space before it counts."""
        if self.count == "own":
            return len(ids)
        return len(self.gpt2.encode_ordinary(text)) if self.count == "gpt2" else len(text) / CHARS

    def encode(self, sentence: str) -> tuple[np.ndarray, float]:
        """Ids and size of a sentence of a story; few differ, so they are kept."""
        if sentence not in self.cache:
            ids = np.array(self.tokenizer.encode(" " + sentence), dtype=np.int64)
            self.cache[sentence] = ids, self.size(" " + sentence, ids)
        return self.cache[sentence]

    def ids(self, sentence: str) -> np.ndarray:
        """The ids of a sentence of a story."""
        return self.encode(sentence)[0]

    def story(self, task: str, n_facts: int | None, rng: random.Random, asides: int = 0,
              tasks: Sequence[str] = ()) -> tuple[list[str], list[babi.Question], Asides]:
        """Facts of a story of this part and questions on them: as bAbI asks (n_facts None), one; else
        everything that can be asked after n_facts facts, or after more where so few allow no question, also
        by other `tasks`, and at up to so many earlier points some of what can be asked there."""
        if self.stories is not None:
            return self.story_read(task, n_facts, rng)
        rules = babi.TASKS[task]
        while True:
            if n_facts is None:
                story = rules.story(rng)
                n, question = story.questions[int(rng.random() * len(story.questions))]
                events, questions = story.events[:n], [question]
            else:
                events, questions = rules.lesson(n_facts, rng)
                questions = babi.with_others(task, events, questions, tasks, rng)
            texts = [e.text for e in events]
            if story_part(texts) == self.part:
                break
        end = len(events)
        points = sorted({1 + int(rng.random() * (end - 1)) for _ in range(asides * (end > 2))})
        found = [(n, babi.with_others(task, events[:n], rules.everything(events[:n], rng), tasks, rng))
                 for n in points if story_part(texts[:n]) == self.part]     # so far it may be the other's
        return texts, questions, [(n, q) for n, qs in found for q in qs[:1 + int(rng.random() * len(qs))]]

    def story_read(self, task: str, n_facts: int | None, rng: random.Random
                   ) -> tuple[list[str], list[babi.Question], Asides]:
        """The same from original files: one of the questions that they ask, with n_facts facts before it or
        fewer, as far as there are such."""
        if task not in self.pools:
            read = babi.read_stories(self.stories, task, self.part)
            pool = sorted(((n, story, q) for story in read for n, q in story.questions), key=lambda x: x[0])
            self.pools[task] = pool, [n for n, _, _ in pool]
        pool, counts = self.pools[task]
        most = len(pool) if n_facts is None else bisect.bisect_right(counts, max(n_facts, counts[0]))
        n, story, question = pool[int(rng.random() * most)]
        return [e.text for e in story.events[:n]], [question], []

    def background(self, length: float, rng: random.Random) -> list[np.ndarray]:
        """Consecutive sentences from a random start, `length` in all; goes round at the text's end."""
        n, total = len(self.sentences), self.sizes[-1]
        first = int(rng.random() * n)
        if length <= 0:
            return []
        stop = self.sizes[first] + length                           # counted on round after round
        rounds, rest = divmod(stop, total)
        last = int(rounds) * n + int(np.searchsorted(self.sizes, rest)) - 1     # the sentence that is cut
        which = [i % n for i in range(first, last + 1)]
        pieces = [self.prose[self.starts[i]:self.starts[i + 1]] for i in which]
        over = (last + 1) // n * total + self.sizes[(last + 1) % n] - stop      # how much too long they are
        return pieces[:-1] + [self.cut(which[-1], over)] if over > 0 else pieces

    def cut(self, i: int, over: float) -> np.ndarray:
        """Sentence i without the last `over` that it counts."""
        text = self.sentences[i]
        if self.count == "own":
            return self.prose[self.starts[i]:self.starts[i + 1] - int(over)]
        if self.count == "chars":
            return np.array(self.tokenizer.encode(text[:len(text) - round(over * CHARS)]), dtype=np.int64)
        text = self.gpt2.decode(self.gpt2.encode_ordinary(text)[:-int(over)])
        return np.array(self.tokenizer.encode(text), dtype=np.int64)

    def assemble(self, texts: list[str], questions: list[babi.Question], length: float, rng: random.Random,
                 asides: Asides = ()) -> Document:
        """Hide the facts in background: `length` counted together, or the facts alone if length is 0. Each
        aside is asked and answered somewhere between the last fact that it knows and the next."""
        facts = [self.encode(t) for t in texts]
        noise = self.background(length - sum(size for _, size in facts), rng)
        gaps = sorted(int(rng.random() * (len(noise) + 1)) for _ in facts)
        marks = [(gap, i, ids) for i, (gap, (ids, _)) in enumerate(zip(gaps, facts))]
        ends = gaps + [len(noise)]
        marks += [(ends[n - 1] + int(rng.random() * (ends[n] - ends[n - 1] + 1)), n - 0.5, question)
                  for n, question in asides]                        # behind fact n - 1, before fact n
        sentences, places, used = [], [], 0
        for gap, order, what in sorted(marks, key=lambda mark: mark[:2]):
            sentences += noise[used:gap]
            if isinstance(order, int):
                places.append(len(sentences))
            sentences.append(what)
            used = gap
        return join(sentences + noise[used:], places, texts, questions, self.ids,
                    self.tokenizer.eot)

    def sample(self, task: str, length: int, rng: random.Random, tries: int = 1000) -> Document:
        """One question at the end of `length` tokens, as the benchmark asks it. Stories that do not fit are
        passed over; ValueError if none fits, or for an unknown task."""
        if task not in babi.TASKS:
            raise ValueError(f"task {task!r} is unknown: choose from {' '.join(babi.TASKS)}")
        room = length if self.count == "own" else length - LESS
        for _ in range(tries):
            texts, questions, _ = self.story(task, None, rng)
            if length == 0 or sum(self.encode(t)[1] for t in texts) <= room:
                return self.assemble(texts, questions, room if length else 0, rng)
        raise ValueError(f"length {length} is too short for the facts of {task}: give more tokens, "
                         "or 0 for no background")


Samples = Callable[[str, int, int], Document]  # (task, length, i) -> sample i of that cell, always the same


def generated(builder: Builder, seed: int) -> Samples:
    """Samples that depend on seed, task, length and i alone, so that models answer the same questions."""
    return lambda task, length, i: builder.sample(task, length, random.Random(f"{seed} {task} {length} {i}"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.babilong", __doc__.split("\n")[0])
    parser.add_argument("--task", default="qa1", help="bAbI task (default qa1)")
    parser.add_argument("--length", default="1k",
                        help="tokens of facts + background: 0k, 4k, 1M, ... (default 1k)")
    parser.add_argument("--part", default="val", choices=("train", "val"),
                        help="which stories and prose (default val)")
    parser.add_argument("--background", default=None,
                        help="folder of .txt files (default: Python's documentation)")
    parser.add_argument("--stories", default=None,
                        help="file or folder of original bAbI files (default: generated stories)")
    parser.add_argument("--count", default="own", choices=COUNTS,
                        help="what a length counts: own tokens, GPT-2's, or 4.4 characters (default own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    args = parser.parse_args(argv)
    with one_line("python -m data.babilong"):
        builder = Builder(load(), args.part, args.background, None, args.stories, args.count)
        doc = builder.sample(args.task, parse_length(args.length), random.Random(args.seed))
        text, question = builder.tokenizer.decode(doc.prompt()).strip(), doc.questions[0]
        print(text, f"answer: {question.answer}",
              f"{len(doc.facts)} facts, needed: {' '.join(doc.texts[i] for i in question.support)}",
              f"{doc.context_len} tokens, {len(text) / len(doc.prompt()):.2f} characters a token here, "
              f"{builder.chars_per_token:.2f} in all the background", sep="\n")


if __name__ == "__main__":
    main()
