"""BABILong documents, how they are built, retrieved from and trained on, against independent re-computations.

    python -m pytest tests/test_babilong.py -q

Facts and background are found again from the token ids, answers from the sentences.
"""
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import torch

from data import babi, babilong, background, bm25
from data.babi import Question
from data.babilong import Builder, story_part
from data.document import Document, from_text, length_name, parse_length
from data.lessons import lesson
from data.tokenizer import load

torch.set_num_threads(1)

MOVED = re.compile(r"(Mary|John|Sandra|Daniel) (?:went back|went|moved|journeyed|travelled) to the (\w+)\.")
TAKEN = re.compile(r"(?:got|took|grabbed|picked up|dropped|left|discarded|put down) the (\w+)")


def book(sentences, seed=0):
    """A text of so many different sentences, all of which the background keeps, and no fact of bAbI."""
    rng, text = random.Random(seed), {}
    adjectives = "old quiet tall wet grey honest narrow broken early distant careful pale".split()
    nouns = "captain river lamp village storm letter window horse clerk bridge winter neighbour".split()
    verbs = "watched followed remembered crossed carried forgot painted mended".split()
    ends = ["and didn't come back", "for 3 long days", "as nobody had foreseen", "(or so it seemed)",
            "without a word",
            "until the rain began again, late at night", "while everyone else was asleep"]
    while len(text) < sentences:
        a, b, n, m, o = (rng.choice(x) for x in (adjectives, adjectives, nouns, nouns, nouns))
        text[f"The {a} {n} {rng.choice(verbs)} the {b} {m} near the {o} {rng.choice(ends)}."] = None
    lines = list(text)
    return "\n\n".join(" ".join(lines[i:i + 6]) for i in range(0, len(lines), 6)) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("books")
    for i in range(3):
        (path / f"{i}.txt").write_text(book(1000, seed=i), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tok():
    return load()


@pytest.fixture(scope="module")
def val_set(tok, folder):
    return Builder(tok, "val", folder)


@pytest.fixture(scope="module")
def train_set(tok, folder):
    return Builder(tok, "train", folder)


def coded_sentences(tok, part, folder):
    """The sentences of a part as lists of ids, made without the builder."""
    texts = background.split(background.documents(folder), part)
    return [tok.encode(" " + s) for passage in texts for s in passage]


def noise(doc):
    """The context without the facts: ids, and for each fact how many of them stand before it."""
    ids, before, at = [], [], 0
    for start, stop in doc.facts:
        ids += doc.ids[at:start].tolist()
        before.append(len(ids))
        at = stop
    return ids + doc.ids[at:doc.context_len].tolist(), before


def sentence_run(ids, coded):
    """Ids that are consecutive sentences, the last one cut or not -> index of the first, the end of each."""
    for first, sentence in enumerate(coded):
        if sentence[:len(ids)] != ids[:len(sentence)]:
            continue
        ends = [0]
        while ends[-1] < len(ids):
            want = coded[(first + len(ends) - 1) % len(coded)]
            if ids[ends[-1]:ends[-1] + len(want)] != want[:len(ids) - ends[-1]]:
                break
            ends.append(min(len(ids), ends[-1] + len(want)))
        else:
            return first, ends
    raise AssertionError("the background is no run of consecutive sentences")


def last_rooms(text):
    """Where each actor went last, in order of first mention: qa1 answered from the text alone."""
    return dict(MOVED.findall(text))


# Documents

@pytest.mark.parametrize("task, length", [("qa1", 150), ("qa1", 1333), ("qa2", 600), ("qa3", 2000)])
def test_facts_and_background_have_exactly_the_asked_length_and_the_question_is_not_counted(tok, val_set,
                                                                                            task, length):
    for seed in range(10):
        doc = val_set.sample(task, length, random.Random(seed))
        assert doc.context_len == length
        assert len(doc.prompt()) == length + len(tok.encode(" " + doc.questions[0].text))


def test_the_facts_stand_in_the_order_of_the_story_and_intact_at_their_spans(tok, val_set):
    for seed in range(20):
        doc, story = (val_set.sample("qa2", length, random.Random(seed)) for length in (1500, 0))
        assert doc.texts == story.texts
        assert [tok.decode(doc.ids[a:b]) for a, b in doc.facts] == [" " + t for t in doc.texts]
        edges = [x for span in doc.facts for x in span]
        assert edges == sorted(edges) and edges[-1] <= doc.context_len


def test_the_background_is_consecutive_whole_sentences_and_only_the_last_is_cut(tok, val_set, folder):
    coded = coded_sentences(tok, "val", folder)
    for seed in range(20):
        doc = val_set.sample("qa1", 300 + seed, random.Random(seed))
        ids, before = noise(doc)
        _, ends = sentence_run(ids, coded)
        assert len(ends) > 8 and len(ids) + sum(b - a for a, b in doc.facts) == 300 + seed
        assert set(before) <= set(ends), "a fact stands inside a sentence"


def test_length_zero_is_the_bare_story(tok, val_set):
    for seed in range(10):
        doc = val_set.sample("qa1", 0, random.Random(seed))
        assert tok.decode(doc.ids[:doc.context_len]) == "".join(" " + t for t in doc.texts)


@pytest.mark.parametrize("length", [0, 400])
def test_the_prompt_ends_with_the_question_and_the_answer_and_the_end_of_text_follow(tok, val_set, length):
    for seed in range(10):
        doc = val_set.sample("qa1", length, random.Random(seed))
        question, ((start, stop),) = doc.questions[0], doc.answers
        assert tok.decode(doc.prompt()[doc.context_len:]) == " " + question.text
        assert tok.decode(doc.ids[start:stop - 1]) == " " + question.answer
        assert doc.ids[stop - 1] == tok.eot and stop == len(doc.ids)


def test_a_story_holds_the_statements_before_the_question_and_its_answer_follows_from_them(val_set):
    for seed in range(50):
        doc = val_set.sample("qa1", 0, random.Random(seed))
        actor = doc.questions[0].text.removeprefix("Where is ").removesuffix("?")
        assert doc.questions[0].answer == last_rooms(" ".join(doc.texts))[actor]


def test_questions_come_from_all_five_places_of_a_story(val_set):
    sizes = [len(val_set.sample("qa1", 0, random.Random(seed)).texts) for seed in range(200)]
    assert all(20 <= sizes.count(n) <= 65 for n in (2, 4, 6, 8, 10))


@pytest.mark.parametrize("length", [0, 500])
def test_support_of_qa1_is_the_last_sentence_about_the_actor_and_it_names_the_answer(tok, val_set, length):
    for seed in range(30):
        doc = val_set.sample("qa1", length, random.Random(seed))
        (i,), actor = doc.questions[0].support, doc.questions[0].text[9:-1]
        assert i == max(n for n, t in enumerate(doc.texts) if t.startswith(actor + " "))
        assert tok.decode(doc.ids[slice(*doc.facts[i])]).endswith(f"the {doc.questions[0].answer}.")


@pytest.mark.parametrize("task", ["qa2", "qa3"])
def test_support_of_qa2_and_qa3_names_the_object_and_the_answer(val_set, task):
    for seed in range(30):
        doc = val_set.sample(task, 900, random.Random(seed))
        question = doc.questions[0]
        obj = re.search(r"the (apple|football|milk)", question.text)[1]
        about, *moves = (doc.texts[i] for i in question.support)
        assert TAKEN.search(about)[1] == obj
        rooms = [MOVED.match(move)[2] for move in moves]
        assert rooms[-1] == question.answer
        assert task == "qa2" or question.text.endswith(f"before the {rooms[0]}?")


def test_a_fact_is_as_likely_in_every_gap_between_sentences_the_ends_included(tok, val_set, folder):
    coded, bins, rng = coded_sentences(tok, "val", folder), [0] * 8, random.Random(1)
    for _ in range(1200):
        ids, (before,) = noise(val_set.assemble(["Mary went to the garden."],
                                                [Question("Where is Mary?", "garden", (0,))], 130, rng))
        _, ends = sentence_run(ids, coded)
        bins[int(8 * (ends.index(before) + rng.random()) / len(ends))] += 1
    assert sum((n - 150) ** 2 / 150 for n in bins) < 24.3, bins    # chi square, 7 degrees, p = 0.001


def test_two_facts_share_a_gap_as_often_as_two_independent_draws(tok, val_set, folder):
    coded, rng, together, expected = coded_sentences(tok, "val", folder), random.Random(2), 0, 0.0
    facts = ["Mary went to the garden.", "John moved to the office."]
    for _ in range(800):
        ids, before = noise(val_set.assemble(facts, [Question("Where is Mary?", "garden", (0,))], 130, rng))
        together += before[0] == before[1]
        expected += 1 / len(sentence_run(ids, coded)[1])
    assert abs(together - expected) < 4 * math.sqrt(expected), (together, expected)


def test_the_background_starts_anywhere(tok, val_set, folder):
    coded = coded_sentences(tok, "val", folder)
    first = [sentence_run(noise(val_set.sample("qa1", 130, random.Random(seed)))[0],
                          coded)[0] for seed in range(300)]
    assert len(set(first)) > 0.5 * min(300, len(coded))
    assert min(first) < 0.05 * len(coded) and max(first) > 0.95 * len(coded)


def test_a_background_shorter_than_the_length_goes_round(tok):
    few = " ".join(book(96).split()).replace(". ", ".\n").split("\n")
    coded = [tok.encode(" " + s) for passage in background.split([few], "train") for s in passage]
    length = 3 * sum(map(len, coded))
    doc = Builder(tok, "train", documents=[few]).sample("qa1", length, random.Random(0))
    ids, _ = noise(doc)
    _, ends = sentence_run(ids, coded)
    assert doc.context_len == length and len(ends) > 2 * len(coded)


def test_the_text_files_of_a_folder_are_the_background(tok, val_set, folder):
    text = " ".join(" ".join(file.read_text(encoding="utf-8").split()) for file in folder.glob("*.txt"))
    for start in range(0, len(val_set.prose) - 50, 500):
        assert tok.decode(val_set.prose[start:start + 20]) in text


def test_every_story_belongs_to_one_part_and_about_a_tenth_to_val(train_set, val_set):
    stories = {}
    for builder in (train_set, val_set):  # one fact: so few stories that each part meets all of its own
        rng = random.Random(0)
        stories[builder.part] = {builder.story("qa1", 1, rng)[0][0] for _ in range(1500)}
    assert not stories["train"] & stories["val"]
    assert len(stories["train"] | stories["val"]) == 120            # 4 actors, 5 verbs, 6 rooms
    assert 4 <= len(stories["val"]) <= 24


def test_no_sample_of_train_is_a_sample_of_val(train_set, val_set):
    stories = [{tuple(b.sample("qa1", 0, rng).texts) for _ in range(1000)} for b, rng in
               ((train_set, random.Random(0)), (val_set, random.Random(1)))]
    assert all(any(len(s) == 2 for s in part) for part in stories)      # short enough to meet again by chance
    assert not stories[0] & stories[1]


def test_train_and_val_share_no_sentence_of_background(tok, train_set, val_set, folder):
    sentences = {}
    for builder in (train_set, val_set):
        text = tok.decode(builder.prose).strip()
        sentences[builder.part] = set(text.split(". "))
    assert len(sentences["train"]) > 5 * len(sentences["val"]) > 500
    assert not sentences["train"] & sentences["val"]


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(tok, val_set, folder):
    again = Builder(tok, "val", folder)
    one, same, other = (b.sample("qa2", 700, random.Random(seed))
                        for b, seed in ((val_set, 4), (again, 4), (again, 5)))
    assert one.ids.tolist() == same.ids.tolist() and one[1:] == same[1:]
    assert one.ids.tolist() != other.ids.tolist()


@pytest.mark.parametrize("prompt, facts, support, outside", [
    (40, [(28, 32)], (0,), True),               # the fact ends where the last segment begins
    (40, [(29, 33)], (0,), False),              # one token of it is inside
    (40, [(33, 37)], (0,), False),
    (64, [(28, 32)], (0,), True),               # due after the last token of segment 2: that is the last
    (64, [(40, 44)], (0,), False),
    (65, [(58, 64)], (0,), True),               # one token more opens segment 3
    (65, [(59, 65)], (0,), False),
    (32, [(0, 6)], (0,), False),                # a single segment: nothing is outside
    (40, [(0, 6), (33, 37)], (0,), True),       # a fact inside that is not needed
    (40, [(0, 6), (33, 37)], (1,), False),
    (40, [(0, 6), (33, 37)], (1, 0), False),    # one of two needed facts inside
    (40, [(0, 6), (20, 26)], (1, 0), True),
])
def test_outside_means_all_needed_facts_end_before_the_segment_of_the_last_prompt_token(prompt, facts,
                                                                                        support, outside):
    cuts = sorted({0, prompt, *(x for span in facts for x in span)})
    question = Question("Where is Mary?", "garden", support)
    doc = Document(np.arange(prompt + 2), [(prompt, prompt + 2)], [question],
                   [cuts.index(start) for start, _ in facts], ["..."] * len(facts), cuts)
    assert doc.facts == facts and doc.outside(32) is outside


def test_a_document_has_the_tokens_of_its_text(tok, val_set, train_set, folder):
    for builder, coded in ((b, coded_sentences(tok, b.part, folder)) for b in (val_set, train_set)):
        for seed in range(5):
            doc = builder.sample("qa3", 1000 + seed, random.Random(seed))
            ids, before = noise(doc)
            ends = sentence_run(ids, coded)[1]
            cut = ends[-1] - ends[-2]       # of the last sentence, where a cut word may have other tokens
            at = doc.context_len - cut - sum(b - a for (a, b), n in zip(doc.facts, before) if n == ends[-1])
            prompt = doc.prompt().tolist()
            whole = prompt[:at] + prompt[at + cut:]
            assert tok.encode(tok.decode(whole)) == whole


def test_a_length_too_short_for_the_facts_is_named(val_set):
    with pytest.raises(ValueError, match="length 7 is too short for the facts of qa1"):
        val_set.sample("qa1", 7, random.Random(0))


def test_stories_that_do_not_fit_are_passed_over(val_set):
    docs = [val_set.sample("qa1", 30, random.Random(seed)) for seed in range(20)]
    assert {doc.context_len for doc in docs} == {30}
    assert {len(doc.texts) for doc in docs} <= {2, 4}


def test_an_unknown_task_is_named(val_set):
    with pytest.raises(ValueError, match="'qa99'.*qa1"):
        val_set.sample("qa99", 0, random.Random(0))


@pytest.mark.parametrize("text, tokens", [("0k", 0), ("1k", 1000), ("4K", 4000), ("128k", 128_000),
                                          ("1M", 1_000_000),
                                          ("10m", 10_000_000), ("96", 96), ("0", 0), ("15699", 15_699)])
def test_lengths_are_read_in_thousands_and_millions(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "4x", "-1", "-2k", "4.5k", "1e3", "four", "4k4", "1001M",
                                  "9" * 30])
def test_a_length_that_is_none_is_named(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_length(text)


@pytest.mark.parametrize("tokens, name", [(0, "0k"), (1000, "1k"), (16_000, "16k"), (1_000_000, "1M"),
                                          (96, "96"),
                                          (15_699, "15699"), (1_500_000, "1500k")])
def test_lengths_are_named_as_the_benchmark_names_them_and_the_name_reads_back(tokens, name):
    assert length_name(tokens) == name and parse_length(name) == tokens


# Lessons

@pytest.mark.parametrize("room", [(1, 64), (65, 128), (129, 192), (961, 1024)])
def test_a_lesson_with_questions_and_answers_fits_into_its_room(train_set, room):
    rng = random.Random(0)
    assert all(room[0] <= len(lesson(train_set, ["qa1"], 4, room, rng).ids) <= room[1] for _ in range(60))


def test_a_lesson_has_every_length_of_its_room(train_set):
    rng = random.Random(0)
    lengths = [len(lesson(train_set, ["qa1"], 3, (200, 203), rng).ids) for _ in range(200)]
    assert all(30 <= lengths.count(n) <= 70 for n in range(200, 204))


@pytest.mark.parametrize("room", [(0, 0), (1, 32)])
def test_a_lesson_without_room_is_its_facts_alone(tok, train_set, room):
    doc = lesson(train_set, ["qa1"], 8, room, random.Random(0))
    assert len(doc.texts) == 8
    assert tok.decode(doc.ids[:doc.context_len]) == "".join(" " + t for t in doc.texts)


def test_a_lesson_of_qa1_asks_once_for_each_actor_named_and_the_answers_are_right(tok, train_set):
    rng, later_first = random.Random(0), 0
    for _ in range(100):
        doc = lesson(train_set, ["qa1"], 6, (1, 512), rng)
        rooms = last_rooms(" ".join(doc.texts))
        starts = [doc.context_len] + [stop for _, stop in doc.answers]
        texts = [tok.decode(doc.ids[a:b]) for a, (b, _) in zip(starts, doc.answers)]
        asked = [text.removeprefix(" Where is ").removesuffix("?") for text in texts]
        assert sorted(asked) == sorted(rooms)
        assert [tok.decode(doc.ids[a:b - 1]) for a,
                b in doc.answers] == [" " + rooms[actor] for actor in asked]
        assert all(doc.ids[b - 1] == tok.eot for _, b in doc.answers) and doc.answers[-1][1] == len(doc.ids)
        later_first += asked[0] != next(iter(rooms))
    assert 40 <= later_first <= 95      # in random order, and not in that of the story


@pytest.mark.parametrize("room", [(0, 0), (1, 512)])
def test_what_is_asked_along_the_way_is_answered_from_the_facts_before_it(tok, train_set, room):
    rng, early, prose = random.Random(0), 0, 0
    for _ in range(60):
        doc = lesson(train_set, ["qa1"], 6, room, rng, asides=3)
        assert room == (0, 0) or len(doc.ids) <= room[1]
        for (start, stop), question in zip(doc.answers, doc.questions, strict=True):
            before = re.sub(r"Where is \w+\? \w+<\|endoftext\|>", "", tok.decode(doc.ids[:start]))
            actor = re.search(r"Where is (\w+)\?$", before)[1]
            assert question.text == f"Where is {actor}?"
            assert tok.decode(doc.ids[start:stop]) == f" {last_rooms(before)[actor]}<|endoftext|>"
            early += stop < doc.facts[-1][0]
        assert [tok.decode(doc.ids[a:b]) for a, b in doc.facts] == [" " + t for t in doc.texts]
        last = doc.answers[-1][1]
        prose += "The " in tok.decode(doc.ids[doc.answers[0][1]:last])
    assert early > 100 and (prose > 40 or room == (0, 0))


def test_no_point_along_the_way_is_asked_twice_nor_where_the_story_so_far_is_one_of_validation(train_set):
    rng, points, share = random.Random(0), 0, [0, 0]
    for _ in range(400):
        texts, _, early = train_set.story("qa1", 4, rng, asides=3, tasks=["qa1"])
        counts = [n for n, _ in early]
        assert {story_part(texts[:n]) for n in counts} <= {"train"}
        for n in set(counts):       # every actor is asked for once at a point
            assert len({q.text for m, q in early if m == n}) == counts.count(n)
        points += len(set(counts))
        for n in range(1, len(texts)):
            share[story_part(texts[:n]) == "val"] += 1
    assert points > 500 and 0.05 < share[1] / sum(share) < 0.15      # there was something to leave out


def test_puzzles_are_asked_at_their_end_alone(train_set):
    for task in ("qa15", "qa17"):
        doc = lesson(train_set, [task], 6, (0, 0), random.Random(0), asides=3)
        assert all(a >= doc.facts[-1][1] for a, _ in doc.answers)


def test_a_lesson_has_no_more_facts_than_the_stories_of_its_task(train_set):
    rng, rare = random.Random(0), {}
    for task, least, most in (("qa1", 10, 10), ("qa2", 20, 40), ("qa3", 70, 150)):
        counts = {len(lesson(train_set, [task], 500, (0, 0), rng, share=s).texts) for s in (None, 0.999)}
        assert len(counts) == 1 and least <= (usual := counts.pop()) <= most
        rare[task] = len(lesson(train_set, [task], 500, (0, 0), rng, usual=1.0).texts) / usual
    assert rare["qa1"] == 1 < min(rare["qa2"], rare["qa3"])     # a larger share needs longer stories
    half = [len(lesson(train_set, ["qa1"], 500, (0, 0), rng, share=i / 90).texts) for i in range(90)]
    assert [half.count(n) for n in range(2, 11)] == [10] * 9


def test_a_lesson_asks_no_more_than_it_may(train_set):
    doc = lesson(train_set, ["qa1"], 8, (1, 512), random.Random(0), max_questions=2)
    assert len(doc.questions) == len(doc.answers) == 2


def test_a_lesson_draws_from_all_tasks(train_set):
    rng = random.Random(0)
    texts = {lesson(train_set, ["qa1", "qa3"], 10, (0, 0), rng).questions[0].text[:9] for _ in range(40)}
    assert texts == {"Where is ", "Where was"}


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_a_lesson_of_any_task_ends_even_with_the_two_facts_of_the_first_stage(train_set, task):
    class Patience(random.Random):
        left = 100_000

        def random(self):
            self.left -= 1
            assert self.left > 0, "no question can be asked on two facts, and the search for one never ends"
            return super().random()
    assert lesson(train_set, [task], 2, (0, 0), Patience(0)).questions


# What a length counts

class Fixed(random.Random):
    """Draws one number again and again."""
    value = 0.0

    def random(self):
        return self.value


@pytest.fixture(scope="module")
def few(tok):
    """A builder of a few sentences of background, and these."""
    lines = " ".join(book(40).split()).replace(". ", ".\n").split("\n")
    builder = Builder(tok, "train", documents=[lines])
    assert 5 < len(builder.sentences) <= 40
    return builder, builder.sentences


def test_the_background_is_read_on_from_its_start_round_after_round_and_cut_at_the_token(tok, few):
    builder, sentences = few
    coded, rng = [tok.encode(s) for s in sentences], Fixed()
    total = sum(map(len, coded))
    for first in range(len(coded)):
        rng.value = (first + 0.5) / len(coded)
        for length in [*range(0, 60), total - 1, total, total + 1, 2 * total, 3 * total + 17]:
            expected, left, i = [], length, first
            while left > 0:
                expected.append(coded[i % len(coded)][:left])
                left, i = left - len(expected[-1]), i + 1
            assert [piece.tolist() for piece in builder.background(length, rng)] == expected


def test_counted_in_characters_a_context_is_as_long_as_the_published_ones(tok, folder, val_set):
    builder = Builder(tok, "val", folder, count="chars")
    prose = "".join(val_set.sentences) * 2
    for seed in range(30):
        length = 900 + 97 * seed
        doc = builder.sample("qa2", length, random.Random(seed))
        assert abs(len(tok.decode(doc.ids[:doc.context_len])) - (length - 300) * 4.4) <= 1
        assert tok.decode(noise(doc)[0]) in prose
        assert [tok.decode(doc.ids[a:b]) for a, b in doc.facts] == [" " + text for text in doc.texts]


def test_counted_in_characters_the_background_goes_round_too(tok, few):
    builder = Builder(tok, "train", documents=[[s.strip() for s in few[1]]], count="chars")
    text, rng = "".join(builder.sentences), Fixed()
    for first in range(len(builder.sentences)):
        rng.value = (first + 0.5) / len(builder.sentences)
        start = sum(map(len, builder.sentences[:first]))
        for length in (1, 7.5, len(text) / 4.4, 2.3 * len(text)):
            made = tok.decode(np.concatenate(builder.background(length, rng)))
            assert abs(len(made) - 4.4 * length) <= 1 and (text * 13)[start:].startswith(made)


def words_as_tokens(texts):
    """A stand-in for GPT-2's encoding: every word of the texts is one token, everything else bytes."""
    words = {space + word for text in texts for word in re.findall(r"\w+", text) for space in ("", " ")}
    tokens = [bytes([b]) for b in range(256)] + sorted(w.encode() for w in words if len(w) > 1)
    return tiktoken.Encoding("gpt2", pat_str=r" ?\w+| ?[^\w\s]|\s",
                             mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})


def test_counted_in_gpt2s_tokens_a_context_is_exactly_300_shorter_than_its_name(tok, monkeypatch):
    lines = " ".join(book(400).split()).replace(". ", ".\n").split("\n")
    short = [f"The {word} watched the wet river near lamps." for word in ("captain", "clerk", "horse") * 3]
    enough = [s.replace("wet", "old wet") for s in short]
    documents = [lines, [*lines[:40], *short, *enough, *lines[40:60]]]
    encoding = words_as_tokens(lines + short)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])
    builder = Builder(tok, "train", documents=documents, count="gpt2")
    kept = [s for passage in background.split(documents, "train") for s in passage]
    # 8 words and a full stop are under the benchmark's 10 tokens, 9 words are not
    assert set(short) & set(kept) and {" " + s for s in enough} & set(builder.sentences)
    assert builder.sentences == [" " + s for s in kept if len(encoding.encode(s)) >= 10]
    assert not {" " + s for s in short} & set(builder.sentences)
    for seed in range(20):
        doc = builder.sample("qa1", 700 + seed, random.Random(seed))
        texts = [tok.decode(doc.ids[a:b]) for a, b in zip(doc.cuts, doc.cuts[1:])]
        assert sum(len(encoding.encode(text)) for text in texts) == 400 + seed
        assert tok.decode(noise(doc)[0]) in "".join(builder.sentences) * 2


def test_gpt2s_own_tokens_are_counted_where_tiktoken_has_them(tok, folder, monkeypatch):
    def no_network(path):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken.load, "read_file", no_network)     # its cache is not asked through this
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError:
        pytest.skip("tiktoken has no GPT-2 encoding in its cache here")
    doc = Builder(tok, "val", folder, count="gpt2").sample("qa1", 1000, random.Random(0))
    assert abs(len(encoding.encode(tok.decode(doc.ids[:doc.context_len]))) - 700) <= 2


def test_without_gpt2s_encoding_another_count_is_named(tok, folder, monkeypatch):
    def unreachable(name):
        raise ConnectionError("HTTPSConnectionPool: Max retries exceeded\nwith url")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match="^--count gpt2: .*give --count chars, 4.4 characters a token$"):
        Builder(tok, "val", folder, count="gpt2")


@pytest.mark.parametrize("length", [299, 310])
def test_a_length_counted_as_published_leaves_the_facts_300_less(tok, folder, length):
    with pytest.raises(ValueError, match=f"length {length} is too short for the facts of qa1"):
        Builder(tok, "val", folder, count="chars").sample("qa1", length, random.Random(0), tries=20)


def test_length_zero_is_the_bare_story_however_lengths_are_counted(tok, folder):
    doc = Builder(tok, "val", folder, count="chars").sample("qa1", 0, random.Random(0))
    assert tok.decode(doc.ids[:doc.context_len]) == "".join(" " + t for t in doc.texts)


# Stories of files

@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A folder of original files: {(task, part): its stories} beside it."""
    path, made = tmp_path_factory.mktemp("babi"), {}
    for task in ("qa1", "qa2", "qa5"):
        for n, part in enumerate(("train", "val")):
            rng = random.Random(n)
            made[task, part] = [babi.TASKS[task].story(rng) for _ in range(12)]
            file = path / f"{task}_{babi.TASKS[task].stem}_{'test' if part == 'val' else part}.txt"
            text = "".join(babi.format_story(s, babi.TASKS[task]) for s in made[task, part])
            file.write_text(text, encoding="utf-8")
    return path, made


def asked_in(made):
    """What can be asked of stories: (facts, question) of each question in them."""
    return {(tuple(e.text for e in story.events[:n]), q) for story in made for n, q in story.questions}


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa5"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_stories_and_questions_are_those_of_the_file_of_its_part(tok, folder, stories, task, part):
    path, made = stories
    builder, rng = Builder(tok, part, folder, stories=path), random.Random(0)
    found = set()
    for _ in range(500):
        doc = builder.sample(task, 0, rng)
        found.add((tuple(doc.texts), doc.questions[0]))
    assert found == asked_in(made[task, part])      # all of them, and nothing else


def test_questions_of_a_file_come_equally_often(tok, folder, stories):
    builder, rng = Builder(tok, "val", folder, stories=stories[0]), random.Random(0)
    counts = Counter((tuple(t), q[0]) for t, q, _ in (builder.story("qa1", None, rng) for _ in range(6000)))
    assert len(counts) == 60 and 55 < min(counts.values()) and max(counts.values()) < 150


def test_a_question_of_a_file_is_hidden_in_prose_with_its_facts_and_support(tok, folder, stories):
    doc = Builder(tok, "val", folder, stories=stories[0]).sample("qa2", 700, random.Random(0))
    assert doc.context_len == 700
    assert (tuple(doc.texts), doc.questions[0]) in asked_in(stories[1]["qa2", "val"])
    needed = [tok.decode(doc.ids[slice(*doc.facts[i])]) for i in doc.questions[0].support]
    assert needed == [" " + doc.texts[i] for i in doc.questions[0].support]


@pytest.mark.parametrize("most", [2, 5, 8, 99])
def test_a_lesson_of_a_file_has_no_more_facts_than_asked_and_comes_from_all_that_fit(tok, folder, stories,
                                                                                     most):
    builder, rng = Builder(tok, "train", folder, stories=stories[0]), random.Random(0)
    made = [lesson(builder, ["qa1"], most, (0, 0), rng) for _ in range(600)]
    found = {(tuple(doc.texts), *doc.questions) for doc in made}
    assert found == {x for x in asked_in(stories[1]["qa1", "train"]) if len(x[0]) <= most}


def test_where_no_story_of_a_file_is_so_short_all_of_the_shortest_are_taken(tok, folder, stories):
    builder, made = Builder(tok, "train", folder, stories=stories[0]), asked_in(stories[1]["qa1", "train"])
    least = min(len(facts) for facts, _ in made)
    shortest = {x for x in made if len(x[0]) == least}
    found = {(tuple(t), *q) for t, q, _ in (builder.story("qa1", 1, random.Random(i)) for i in range(300))}
    assert least > 1 and len(shortest) > 5 and found == shortest


def test_a_task_that_the_folder_does_not_have_is_named(tok, folder, stories):
    with pytest.raises(ValueError, match="qa3_"):
        Builder(tok, "val", folder, stories=stories[0]).sample("qa3", 0, random.Random(0))


# Documents from the inside

@pytest.mark.parametrize("task, length", [("qa1", 0), ("qa2", 800), ("qa8", 500), ("qa19", 400)])
def test_the_cuts_are_where_sentences_begin_and_the_places_are_those_of_the_facts(tok, val_set, task, length):
    sentences = set(val_set.sentences)
    for seed in range(5):
        doc = val_set.sample(task, length, random.Random(seed))
        texts = [tok.decode(doc.ids[a:b]) for a, b in zip(doc.cuts, doc.cuts[1:])]
        assert "".join(texts) + " " + doc.questions[0].text == tok.decode(doc.prompt())
        facts = [texts.pop(i) for i in reversed(doc.places)][::-1]
        assert facts == [" " + t for t in doc.texts]
        assert set(texts[:-1]) <= sentences and (not texts or any(s.startswith(texts[-1]) for s in sentences))
        asked = len(tok.encode(" " + doc.questions[0].text))
        assert doc.context_len == doc.cuts[-1] == doc.answers[0][0] - asked


@pytest.mark.parametrize("chosen", [[], [0], [3, 4], [1, 7, 20], "support", "support and more", "half"])
def test_retrieval_keeps_the_ids_of_the_chosen_sentences_and_knows_if_all_needed_are_there(
        tok, val_set, monkeypatch, chosen):
    for seed in range(8):
        doc = val_set.sample("qa2", 600, random.Random(seed))
        needed = sorted(doc.places[i] for i in doc.questions[0].support)
        which = chosen if isinstance(chosen, list) else sorted(
            {"support": set(needed), "support and more": {*needed, 0, 5}, "half": {needed[0], 5}}[chosen])
        seen = []
        monkeypatch.setattr(bm25, "best", lambda *given: seen.append(given) or which)
        ids, found = doc.retrieve(tok, 7)
        texts = [tok.decode(doc.ids[a:b]) for a, b in zip(doc.cuts, doc.cuts[1:])]
        assert seen == [(texts, doc.questions[0].text, 7)]
        expected = [t for i in which for t in doc.ids[doc.cuts[i]:doc.cuts[i + 1]].tolist()]
        assert ids.tolist() == expected + tok.encode(" " + doc.questions[0].text) and ids.dtype == np.int64
        assert found is (set(needed) <= set(which))


PUBLISHED = ("  Mary went to the  kitchen. Then it rained!\nMr. Smith said: \"No.\" "
             "John\xa0moved to\tthe garden. ", "Where is Mary? ", "kitchen")


def test_a_published_sample_is_cut_into_sentences_and_has_the_tokens_of_its_text_with_single_spaces(tok):
    doc = from_text(tok, *PUBLISHED)
    whole = ' Mary went to the kitchen. Then it rained! Mr. Smith said: "No." John moved to the garden.'
    assert doc.prompt().tolist() == tok.encode(whole + " Where is Mary?")
    assert [tok.decode(doc.ids[a:b]) for a, b in zip(doc.cuts, doc.cuts[1:])] == [
        " Mary went to the kitchen.", " Then it rained!", ' Mr. Smith said: "No."',
        " John moved to the garden."]
    assert doc.ids[doc.answers[0][0]:].tolist() == [*tok.encode(" kitchen"), tok.eot]
    assert doc.questions[0].text == "Where is Mary?" and doc.questions[0].answer == "kitchen"


def test_a_generated_document_read_as_a_published_one_has_the_same_tokens(tok, val_set):
    for seed in range(5):
        doc = val_set.sample("qa3", 900, random.Random(seed))
        # cut short within a word, the last sentence has other tokens: it ends at a space
        text = tok.decode(doc.ids[:doc.context_len]).rsplit(" ", 1)[0]
        again = from_text(tok, text, doc.questions[0].text + " ", doc.questions[0].answer)
        assert again.prompt().tolist() == tok.encode(text + " " + doc.questions[0].text)
        # facts behind the sentence that is cut short cannot be told from it
        assert set(again.cuts[:-1]) <= set(doc.cuts) and len(again.cuts) > len(doc.cuts) - 8


def test_of_a_published_sample_it_is_not_known_which_sentences_are_needed(tok):
    doc = from_text(tok, *PUBLISHED)
    ids, found = doc.retrieve(tok, 1)
    assert found is None and doc.outside(4) is None and doc.facts == []
    assert tok.decode(ids) == " Mary went to the kitchen. Where is Mary?"


@pytest.mark.parametrize("text", ["", " \n "])
def test_a_published_sample_without_any_text_is_its_question(tok, text):
    doc = from_text(tok, text, "Where is Mary? ", "kitchen")
    assert tok.decode(doc.prompt()) == " Where is Mary?" and doc.context_len == 0
    assert doc.retrieve(tok, 3)[0].tolist() == doc.prompt().tolist()


# Retrieval

def slow_scores(sentences, question, k1=1.5, b=0.75):
    """BM25 from its definition, a sentence and a word at a time."""
    def split(text):
        return re.sub(r"\W", " ", text.lower()).split()
    lengths = [len(split(s)) for s in sentences]
    mean, scores = max(1, sum(lengths) / len(sentences)), []
    for sentence, length in zip(sentences, lengths):
        score = 0.0
        for word in sorted(set(split(question))):
            n, times = sum(word in split(s) for s in sentences), split(sentence).count(word)
            weight = math.log((len(sentences) - n + 0.5) / (n + 0.5) + 1)
            score += weight * times * (k1 + 1) / (times + k1 * (1 - b + b * length / mean))
        scores.append(score)
    return scores


TOY = ["Mary went to the kitchen.", "It rained all day and all night in the long dark valley.",
       "John saw Mary.", "Mary, Mary, quite contrary!", "", "Sandra is in the garden."]


def test_the_scores_behind_the_choice_are_those_of_the_definition():
    # by hand: 6 sentences, 29 words; "mary" in 3, "is" in 1, "where" in none
    mean, mary = 29 / 6, math.log(1 + 3.5 / 3.5)

    def part(times, length):
        return times * 2.5 / (times + 1.5 * (0.25 + 0.75 * length / mean))
    expected = [mary * part(1, 5), 0, mary * part(1, 3), mary * part(2, 4), 0,
                math.log(1 + 5.5 / 1.5) * part(1, 5)]
    assert slow_scores(TOY, "Where is Mary?") == pytest.approx(expected)
    order = sorted(range(6), key=lambda i: -expected[i])
    assert order[:4] == [5, 3, 2, 0]
    for k in range(1, 5):
        assert bm25.best(TOY, "Where is Mary?", k) == sorted(order[:k])


def test_the_best_are_those_of_the_definition_in_any_corpus():
    rng, words = random.Random(0), "mary john went to the kitchen garden milk apple".split()
    for _ in range(300):
        n = rng.randint(1, 9)
        corpus = [" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(n)]
        question, k = " ".join(rng.choices(words + ["zebra"], k=3)), rng.randint(1, 10)
        scores = slow_scores(corpus, question)
        ranked = sorted(range(n), key=lambda i: (round(scores[i], 9), i), reverse=True)
        assert bm25.best(corpus, question, k) == sorted(ranked[:k])


def test_of_equals_the_later_sentence_is_taken():
    corpus = ["Mary went to the kitchen.", "John went to the garden.", "Mary went to the garden."]
    assert bm25.best(corpus, "Where is Mary?", 1) == [2]
    assert bm25.best(corpus, "Where is Mary?", 2) == [0, 2]
    assert bm25.best(["one", "two", "three"], "Where is nobody?", 2) == [1, 2]


def test_case_and_signs_do_not_matter():
    assert bm25.best(["A lamp fell.", "(MARY!)", "Maryland is far."], "mary?", 1) == [1]


@pytest.mark.parametrize("k", [3, 4, 1000])
def test_a_corpus_of_no_more_than_k_sentences_is_kept_whole(k):
    assert bm25.best(["", "b", "a"], "a", k) == [0, 1, 2]


def test_of_an_empty_corpus_nothing_is_taken():
    assert bm25.best([], "Where is Mary?", 3) == []


def test_retrieval_finds_the_needed_sentence_of_qa1_in_16k(tok, val_set):
    found = [val_set.sample("qa1", 16_000, random.Random(seed)).retrieve(tok, 10)[1] for seed in range(20)]
    assert sum(found) >= 18


# The command line

def test_a_sample_is_printed_with_its_answer_its_support_and_its_length(tok, folder, stories, capsys):
    flags = ["--task", "qa2", "--length", "900", "--part", "train", "--count", "chars", "--seed", "3"]
    babilong.main([*flags, "--background", str(folder), "--stories", str(stories[0])])
    text, answer, needed, numbers = capsys.readouterr().out.splitlines()
    builder = Builder(tok, "train", folder, stories=stories[0], count="chars")
    doc = builder.sample("qa2", 900, random.Random(3))
    assert " " + text == tok.decode(doc.prompt()) and answer == f"answer: {doc.questions[0].answer}"
    support = " ".join(doc.texts[i] for i in doc.questions[0].support)
    assert needed == f"{len(doc.texts)} facts, needed: {support}"
    each = len(text) / len(doc.prompt())
    assert numbers.startswith(f"{doc.context_len} tokens, {each:.2f} characters a token")
    assert f"{builder.chars_per_token:.2f} in all" in numbers
