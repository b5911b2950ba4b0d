"""BABILong samples: facts of bAbI hidden in real prose, with a question at the end, at any length.

    python -m data.babilong --task qa1 --length 1k                # print a sample and its numbers
    python -m data.babilong --task qa3 --length 4k --count chars  # as long as a published 4k

Writes nothing.

The *context* of a sample is the facts of a story and the background around them. The *background*
is a run of consecutive sentences of prose from a random start. Its last sentence is cut so that the
context has exactly the asked length. The question is not counted, and a length of 0 stands for the
facts alone. Each fact goes into a random gap between two sentences. The facts keep their order.

Training and validation share no story, which a hash of its facts decides, and no background.
"""

import bisect
import hashlib
import random
from collections.abc import Callable, Sequence

import numpy as np

from data import babi, background
from data.babi import names as babi_names
from data.common import Parser, one_line
from data.document import Document, join, parse_length
from data.tokenizer import Tokenizer, gpt2_encoding, load

VAL_SHARE = 10  # one story in ten is kept for validation
COUNTS = ("own", "gpt2", "chars")  # the units in which a length is counted, see Builder
CHARS = 4.4  # a token of GPT-2 stands for about this many characters of English
# A published context has this many GPT-2 tokens less than its name says: "4k" has 3,700.
PUBLISHED_SHORTFALL = 300
MIN_GPT2_TOKENS = 10  # the benchmark drops shorter sentences of background
MAX_ENCODED = 20_000  # sentences whose ids a builder keeps: some megabytes

# Questions that are asked within the context, each with the number of facts before it.
Asides = Sequence[tuple[int, babi.Question]]


def story_part(texts: Sequence[str]) -> str:
    """The part that a story belongs to, "train" or "val", by a hash of the texts of its facts."""
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=4).digest()
    if int.from_bytes(digest, "little") % VAL_SHARE == 0:
        return "val"
    return "train"


def renamed(question: babi.Question, rename: Callable[[str], str]) -> babi.Question:
    """The question with other names in its text and in its answer."""
    return question._replace(text=rename(question.text), answer=rename(question.answer))


class Builder:
    """Makes the documents of one part, "train" or "val", from stories and background.

    tokenizer  the tokenizer of the model that reads the documents
    folder     the folder that holds the background as .txt files; None for Python's documentation
    documents  what background.documents(folder) returned, if it was called before
    stories    a file or folder of original bAbI files: their _train files for "train", their _test
               files for "val". None for generated stories
    count      the unit of a length: "own" for a token of the model, "gpt2" for a token of GPT-2,
               "chars" for 4.4 characters
    names      the names in generated stories, see data/babi/names.py: "own" for bAbI's own, "many"
               for those of lessons, "unseen" for those that no lesson has

    *Size* is measured in the unit of `count`. With "chars" it may be a fraction. With "gpt2" and
    "chars" a context of 4k has a size of 3,700, as in the published files.

    ValueError if the background cannot be used, if GPT-2's encoding is needed and missing, or if
    stories that are read are to have other names."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        part: str,
        folder: str | None = None,
        documents: list | None = None,
        stories: str | None = None,
        count: str = "own",
        names: str = "own",
    ):
        if names != "own" and stories is not None:
            raise ValueError(
                f"--names {names} is for generated stories alone: leave --stories {stories} out"
            )
        self.tokenizer = tokenizer
        self.part = part
        self.stories = stories
        self.count = count
        self.names = names
        self.gpt2 = None
        if count == "gpt2":
            self.gpt2 = gpt2_encoding("--count", f"give --count chars, {CHARS} characters a token")
        self.encoded = {}  # a sentence of a story -> its ids and its size
        self.questions_read = {}  # a task -> what `read_questions` returned for it

        if documents is None:
            documents = background.documents(folder)
        self.sentences = []  # the background, each sentence with a space before it
        for run in background.split(documents, part):
            for sentence in run:
                if self.gpt2 is None or self.is_long_enough(sentence):
                    self.sentences.append(" " + sentence)
        if not self.sentences:
            raise ValueError(
                f"the background {folder or 'shipped with Python'} has no sentence for {part}: "
                "give a folder with more text"
            )

        prose = []
        starts = [0]
        size_before = [0]
        for sentence in self.sentences:
            ids = tokenizer.encode(sentence)
            prose.extend(ids)
            starts.append(len(prose))
            size_before.append(size_before[-1] + self.size(sentence, ids))
        self.prose = np.array(prose, dtype=np.int64)  # the ids of all sentences, one after another
        self.starts = starts  # where each sentence starts in `prose`, and where the last one stops
        self.size_before = size_before  # size_before[i] is the size of the first i sentences
        n_characters = sum(len(sentence) for sentence in self.sentences)
        self.chars_per_token = n_characters / len(self.prose)

    def is_long_enough(self, sentence: str) -> bool:
        """Whether the benchmark would keep a sentence of background."""
        return len(self.gpt2.encode_ordinary(sentence.strip())) >= MIN_GPT2_TOKENS

    def size(self, text: str, ids: Sequence[int]) -> float:
        """The size of a text, whose ids in the model's own tokens are `ids`."""
        if self.count == "own":
            return len(ids)
        if self.count == "gpt2":
            return len(self.gpt2.encode_ordinary(text))
        return len(text) / CHARS

    def encode(self, sentence: str) -> tuple[np.ndarray, float]:
        """The ids and the size of a sentence of a story, with a space before it.

        Stories repeat few sentences again and again, so the results are kept. With many names
        there are more sentences than can be kept, so all are dropped when they are too many."""
        if sentence not in self.encoded:
            if len(self.encoded) >= MAX_ENCODED:
                self.encoded.clear()
            text = " " + sentence
            ids = np.array(self.tokenizer.encode(text), dtype=np.int64)
            self.encoded[sentence] = ids, self.size(text, ids)
        return self.encoded[sentence]

    def ids(self, sentence: str) -> np.ndarray:
        """The ids of a sentence of a story, with a space before it."""
        return self.encode(sentence)[0]

    def story(
        self,
        task: str,
        n_facts: int | None,
        rng: random.Random,
        n_asides: int = 0,
        tasks: Sequence[str] = (),
    ) -> tuple[list[str], list[babi.Question], Asides]:
        """The facts of a story of this part, the questions behind them, and the asides.

        n_facts   In generated stories None stands for a story with one question, as bAbI asks it.
                  A number is the number of facts, and everything is asked that they can answer.
                  If that is nothing, the story has more facts.
                  In stories that are read None stands for any number of facts. A number is the
                  most facts, see `story_read`. In both cases one question is asked.
        n_asides  the most points before the last fact at which questions are asked as well. In
                  stories that are read there are none
        tasks     other tasks that may ask about a generated story, too

        ValueError for a task whose stories cannot have the builder's names."""
        if self.names != "own" and task not in babi_names.RENAMED:
            raise ValueError(
                f"--names {self.names} does not fit {task}: choose tasks from "
                f"{' '.join(babi_names.RENAMED)}, or --names own"
            )
        if self.stories is not None:
            facts, question = self.story_read(task, n_facts, rng)
            return facts, [question], []
        rules = babi.TASKS[task]
        while True:
            if n_facts is None:
                story = rules.story(rng)
                n_before, question = story.questions[int(rng.random() * len(story.questions))]
                events = story.events[:n_before]
                questions = [question]
            else:
                events, questions = rules.lesson(n_facts, rng)
                questions = babi.with_others(task, events, questions, tasks, rng)
            texts = [event.text for event in events]
            if story_part(texts) == self.part:
                break

        points = set()  # numbers of facts after which questions are asked on the way
        if len(events) > 2:
            for _ in range(n_asides):
                points.add(1 + int(rng.random() * (len(events) - 1)))
        candidates = []  # what can be asked at each of the points
        for point in sorted(points):
            # The beginning of a story of training may be a story of validation.
            if story_part(texts[:point]) != self.part:
                continue
            beginning = events[:point]
            own = rules.everything(beginning, rng)
            possible = babi.with_others(task, beginning, own, tasks, rng)
            candidates.append((point, possible))
        # These are two loops, so that the draws keep their order.
        asides = []
        for point, possible in candidates:
            n_asked = 1 + int(rng.random() * len(possible))
            for question in possible[:n_asked]:
                asides.append((point, question))

        # The names come last, so that a story has the same plot under all names. A story's part
        # was decided by its own names.
        if self.names != "own":
            rename = babi_names.renamer(self.names, rng)
            texts = [rename(text) for text in texts]
            questions = [renamed(question, rename) for question in questions]
            asides = [(point, renamed(question, rename)) for point, question in asides]
        return texts, questions, asides

    def story_read(
        self, task: str, n_facts: int | None, rng: random.Random
    ) -> tuple[list[str], babi.Question]:
        """The facts before a random question of the original files, and that question.

        n_facts  the most facts, None for any number. If every question has more facts before it,
                 one of those with the fewest is taken"""
        if task not in self.questions_read:
            self.questions_read[task] = self.read_questions(task)
        candidates = self.questions_read[task]
        n_candidates = len(candidates)
        if n_facts is not None:
            fewest = candidates[0][0]
            most = max(n_facts, fewest)
            n_candidates = bisect.bisect_right(candidates, most, key=lambda entry: entry[0])
        n_before, story, question = candidates[int(rng.random() * n_candidates)]
        texts = [event.text for event in story.events[:n_before]]
        return texts, question

    def read_questions(self, task: str) -> list[tuple[int, babi.Story, babi.Question]]:
        """All questions of the original files of a task, the one with the fewest facts first.

        Each comes with the number of facts before it and with its story."""
        found = []
        for story in babi.read_stories(self.stories, task, self.part):
            for n_before, question in story.questions:
                found.append((n_before, story, question))
        found.sort(key=lambda entry: entry[0])
        return found

    def background(self, length: float, rng: random.Random) -> list[np.ndarray]:
        """The ids of consecutive sentences from a random start, whose sizes add up to `length`.

        The last sentence is cut where it is too long. Behind the last sentence of the text comes
        its first one again."""
        n_sentences = len(self.sentences)
        # The start is drawn even if there is no background, so that later draws stay the same.
        i = int(rng.random() * n_sentences)
        if length <= 0:
            return []
        stop = self.size_before[i] + length
        size_of_text = self.size_before[-1]
        pieces = []
        while self.size_before[i] < stop:
            pieces.append(self.prose[self.starts[i] : self.starts[i + 1]])
            i += 1
            if i == n_sentences and stop > size_of_text:
                i = 0  # the next round through the text
                stop -= size_of_text
        surplus = self.size_before[i] - stop
        if surplus > 0:
            pieces[-1] = self.cut(i - 1, surplus)
        return pieces

    def cut(self, i: int, surplus: float) -> np.ndarray:
        """The ids of sentence i of the background without the last `surplus` of its size."""
        if self.count == "own":
            return self.prose[self.starts[i] : self.starts[i + 1] - int(surplus)]
        text = self.sentences[i]
        if self.count == "gpt2":
            kept = self.gpt2.encode_ordinary(text)[: -int(surplus)]
            text = self.gpt2.decode(kept)
        else:
            text = text[: len(text) - round(surplus * CHARS)]
        return np.array(self.tokenizer.encode(text), dtype=np.int64)

    def assemble(
        self,
        texts: list[str],
        questions: list[babi.Question],
        length: float,
        rng: random.Random,
        asides: Asides = (),
    ) -> Document:
        """A document of facts with background around them.

        texts      the facts
        questions  the questions behind the context
        length     the size of the context. If the facts fill it, there is no background
        asides     the questions within the context, each with the number of facts before it; it is
                   asked at a random place before the next fact"""
        facts = [self.encode(text) for text in texts]
        size_of_facts = sum(size for _, size in facts)
        prose = self.background(length - size_of_facts, rng)
        # A gap is a place in the background. Its number is that of the sentences before it.
        gaps = sorted(int(rng.random() * (len(prose) + 1)) for _ in facts)
        inserts = []  # (gap, order within the gap, what is put in)
        for i, (ids, _) in enumerate(facts):
            inserts.append((gaps[i], i, ids))
        gaps.append(len(prose))  # after the last fact: the end of the prose
        for n_before, question in asides:
            low = gaps[n_before - 1]
            high = gaps[n_before]
            gap = low + int(rng.random() * (high - low + 1))
            inserts.append((gap, n_before - 0.5, question))  # between two facts of the same gap
        inserts.sort(key=lambda insert: insert[:2])

        sentences = []
        places = []
        n_used = 0  # sentences of background
        for gap, _, content in inserts:
            sentences.extend(prose[n_used:gap])
            n_used = gap
            if not isinstance(content, babi.Question):
                places.append(len(sentences))
            sentences.append(content)
        sentences.extend(prose[n_used:])
        tokenizer = self.tokenizer
        return join(sentences, places, texts, questions, self.ids, tokenizer.eot, tokenizer.bos)

    def sample(self, task: str, length: int, rng: random.Random, tries: int = 1000) -> Document:
        """A document with one question at its end, as the benchmark asks it.

        length  the length that the sample is named after, such as 4000 for "4k"; 0 for the facts
                alone
        tries   how many stories are drawn to find one whose facts fit into the length

        ValueError for a task that does not exist, and if no story fits."""
        if task not in babi.TASKS:
            raise ValueError(f"task {task!r} is unknown: choose from {' '.join(babi.TASKS)}")
        if length == 0:
            size = 0
        elif self.count == "own":
            size = length
        else:
            size = length - PUBLISHED_SHORTFALL
        for _ in range(tries):
            texts, questions, _ = self.story(task, None, rng)
            if length == 0 or sum(self.encode(text)[1] for text in texts) <= size:
                return self.assemble(texts, questions, size, rng)
        raise ValueError(
            f"length {length} is too short for the facts of {task}: give more tokens, "
            "or 0 for no background"
        )


# samples(task, length, i) is sample i of a task and a length, the same one at every call.
Samples = Callable[[str, int, int], Document]


def generated(builder: Builder, seed: int) -> Samples:
    """Samples of a builder that depend on the seed, task, length and number of a sample alone.

    So all models answer the same questions."""

    def sample(task: str, length: int, i: int) -> Document:
        return builder.sample(task, length, random.Random(f"{seed} {task} {length} {i}"))

    return sample


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.babilong", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", default="qa1", help="The bAbI task of the sample (default qa1).")
    add(
        "--length",
        default="1k",
        help="The tokens of facts and background together: 0k, 4k, 1M, ... (default 1k).",
    )
    add(
        "--part",
        default="val",
        choices=("train", "val"),
        help="The stories and prose to take: those of training or of validation (default val).",
    )
    add(
        "--background",
        default=None,
        help="The folder of .txt files to take the prose from (default: Python's documentation).",
    )
    add(
        "--stories",
        default=None,
        help="The file or folder of original bAbI files (default: generated stories).",
    )
    add(
        "--count",
        default="own",
        choices=COUNTS,
        help="What a length counts: the model's own tokens, those of GPT-2, or 4.4 characters "
        "for each token (default own).",
    )
    add(
        "--names",
        default="own",
        choices=babi_names.CHOICES,
        help="The names in a generated story: bAbI's own, those of lessons with many names, or "
        "those that no lesson has (default own).",
    )
    add("--seed", type=int, default=0, help="The seed of the sample (default 0).")
    args = parser.parse_args(argv)
    with one_line("python -m data.babilong"):
        builder = Builder(
            load(), args.part, args.background, None, args.stories, args.count, args.names
        )
        rng = random.Random(args.seed)
        document = builder.sample(args.task, parse_length(args.length), rng)
        prompt = document.prompt()
        text = builder.tokenizer.decode(prompt).strip()
        question = document.questions[0]
        needed = " ".join(document.texts[i] for i in question.support)
        print(text)
        print(f"answer: {question.answer}")
        print(f"{len(document.facts)} facts, needed: {needed}")
        print(
            f"{document.context_len} tokens, "
            f"{len(text) / len(prompt):.2f} characters a token here, "
            f"{builder.chars_per_token:.2f} in all the background"
        )


if __name__ == "__main__":
    main()
