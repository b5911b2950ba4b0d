"""BABILong documents, the benchmark's metric and the evaluation, against independent re-computations.

    python -m pytest tests/test_babilong.py -q

Facts and background are found again from the token ids, answers from the sentences; the scores are a table
made by hand from the benchmark's published rules.
"""
import io
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import babilong_eval  # noqa: E402
import train  # noqa: E402
from babilong_eval import (LABELS, answer, evaluate, exact_match, load_predictions, official_score,
                            # noqa: E402
                           save_predictions, table, wilson)
from data import background  # noqa: E402
from data.babi import Question  # noqa: E402
from data.babilong import Builder, Document, length_name, parse_length  # noqa: E402
from data.checkpoint import save_checkpoint  # noqa: E402
from data.tokenizer import load  # noqa: E402
from lm2 import LM2, LM2Config  # noqa: E402

torch.set_num_threads(1)

MOVED = re.compile(r"(Mary|John|Sandra|Daniel) (?:went back|went|moved|journeyed|travelled) to the (\w+)\.")
TAKEN = re.compile(r"(?:got|took|grabbed|picked up|dropped|left|discarded|put down) the (\w+)")
TINY = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, segment_len=32, n_slot=4, n_mem_head=2)


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
    (64, [(28, 32)], (0,), True),
                  # the answer is due after the last token of segment 2: that is the last one
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
    doc = Document(np.arange(prompt + 2), [(prompt, prompt + 2)],
                   [Question("Where is Mary?", "garden", support)], facts,
                   ["..."] * len(facts), prompt - 4)
    assert doc.outside(32) is outside


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


@pytest.mark.parametrize("text", ["", "k", "4x", "-1", "-2k", "4.5k", "1e3", "four", "4k4"])
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
    assert all(room[0] <= len(train_set.lesson(["qa1"], 4, room, rng).ids) <= room[1] for _ in range(60))


def test_a_lesson_has_every_length_of_its_room(train_set):
    rng = random.Random(0)
    lengths = [len(train_set.lesson(["qa1"], 3, (200, 203), rng).ids) for _ in range(200)]
    assert all(30 <= lengths.count(n) <= 70 for n in range(200, 204))


@pytest.mark.parametrize("room", [(0, 0), (1, 32)])
def test_a_lesson_without_room_is_its_facts_alone(tok, train_set, room):
    doc = train_set.lesson(["qa1"], 8, room, random.Random(0))
    assert len(doc.texts) == 8
    assert tok.decode(doc.ids[:doc.context_len]) == "".join(" " + t for t in doc.texts)


def test_a_lesson_of_qa1_asks_once_for_each_actor_named_and_the_answers_are_right(tok, train_set):
    rng, later_first = random.Random(0), 0
    for _ in range(100):
        doc = train_set.lesson(["qa1"], 6, (1, 512), rng)
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


def test_a_lesson_asks_no_more_than_it_may(train_set):
    doc = train_set.lesson(["qa1"], 8, (1, 512), random.Random(0), max_questions=2)
    assert len(doc.questions) == len(doc.answers) == 2


def test_a_lesson_draws_from_all_tasks(train_set):
    rng = random.Random(0)
    texts = {train_set.lesson(["qa1", "qa3"], 10, (0, 0), rng).questions[0].text[:9] for _ in range(40)}
    assert texts == {"Where is ", "Where was"}


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_a_lesson_of_any_task_ends_even_with_the_two_facts_of_the_first_stage(train_set, task):
    class Patience(random.Random):
        left = 100_000

        def random(self):
            self.left -= 1
            assert self.left > 0, "no question can be asked on two facts, and the search for one never ends"
            return super().random()
    assert train_set.lesson([task], 2, (0, 0), Patience(0)).questions


def batch(builder, stage, rng, plain=0.0, **changes):
    return train.make_batch(builder, ["qa1"], stage, train.TrainConfig(plain=plain, **changes), rng)


def test_targets_are_the_answers_and_ends_of_text_behind_the_questions_and_nothing_else(tok, train_set):
    rng = random.Random(0)
    for stage in (train.Stage(4, 0, 64), train.Stage(6, 3, 64)):
        for _ in range(5):
            idx, targets, _ = batch(train_set, stage, rng, batch_size=8)
            for row, wanted in zip(idx.tolist(), targets.tolist()):
                end = max(i for i, t in enumerate(row) if t == tok.eot) + 1
                text = tok.decode([t for t in row[:end] if t != tok.eot])
                rooms = last_rooms(text)
                answers = [f" {rooms[actor]}" for actor in re.findall(r"Where is (\w+)\?", text)]
                places = [i for i, t in enumerate(wanted) if t != -1]
                assert all(wanted[i] == row[i + 1] for i in places), "the target is not the next token"
                parts, part = [], []
                for i in places:
                    if wanted[i] == tok.eot:
                        parts, part = parts + [tok.decode(part)], []
                    else:
                        part.append(wanted[i])
                assert parts == answers and not part
                assert not any(row[end:]) and max(places) + 2 == end


def test_a_batch_has_two_facts_to_the_most_and_one_segment_to_the_most_and_says_how_many(tok, train_set):
    rng, segments, facts = random.Random(0), [], set()
    for _ in range(60):
        idx, _, n = batch(train_set, train.Stage(4, 3, 64), rng, batch_size=4)
        segments.append(n)
        for row in idx.tolist():
            end = max(i for i, t in enumerate(row) if t == tok.eot) + 1
            assert (n - 1) * 64 < end <= n * 64
            facts.add(len(MOVED.findall(tok.decode(row))))
    assert set(segments) == {1, 2, 3} and facts == {2, 3, 4}
    assert 30 <= segments.count(3) <= 50        # half of them, and a third of the other half


def test_long_documents_come_in_smaller_batches(train_set):
    rng, rows = random.Random(0), {}
    for _ in range(40):
        idx, _, n = batch(train_set, train.Stage(3, 4, 64), rng, batch_size=6, batch_tokens=512)
        rows[n] = len(idx)
    assert rows == {1: 6, 2: 4, 3: 2, 4: 2}
    assert len(batch(train_set, train.Stage(3, 1, 64), rng, batch_tokens=1)[0]) == 1


def test_a_share_of_the_batches_is_plain_and_counts_no_segments(tok, train_set):
    def plain(stage, share, batches):
        rng = random.Random(0)
        made = [batch(train_set, stage, rng, plain=share, batch_size=2) for _ in range(batches)]
        assert all(("The " in tok.decode(idx[0])) == (n > 0) for idx, _, n in made if n != 1)
        return sum(n == 0 for _, _, n in made)
    assert plain(train.Stage(2, 0, 64), 0.0, 5) == 5 and plain(train.Stage(2, 4, 64), 0.0, 20) == 0
    assert 120 <= plain(train.Stage(2, 4, 64), 0.4, 400) <= 200


# Scores

WHERE, BEFORE = "Where is Mary? ", "Where was the apple before the kitchen? "
SCORES = [  # task, target, output, question, score
    ("qa1", "kitchen", "kitchen", WHERE, True),
    ("qa1", "kitchen", "Mary is in the kitchen.", WHERE, True),
    ("qa1", "Kitchen", "KITCHEN", WHERE, True),                             # case is ignored on both sides
    ("qa1", "kitchen", "bedroom", WHERE, False),
    ("qa1", "kitchen", "", WHERE, False),
    ("qa1", "kitchen", "cellar", WHERE, False),                             # no label at all
    ("qa1", "kitchen", "kitchen or bedroom", WHERE, False),                 # two labels
    ("qa1", "kitchen", "kitchen kitchen", WHERE, True),                     # a label counts once
    ("qa1", "kitchen", "thekitchenette", WHERE, True),                      # a substring is enough
    ("qa1", "kitchen", "kitchen. Before that the bedroom.", WHERE, True),   # the first sentence only
    ("qa1", "kitchen", "I think so. kitchen", WHERE, False),
    ("qa1", "kitchen", ".kitchen", WHERE, False),
    ("qa1", "kitchen", "kitchen<context>bedroom", WHERE, True),
    ("qa1", "kitchen", "kitchen <CONTEXT> bedroom", WHERE, True),           # cut after lower-casing
    ("qa1", "kitchen", "<context>kitchen", WHERE, False),
    ("qa1", "kitchen", "kitchen <example> bedroom", WHERE, True),
    ("qa1", "kitchen", "kitchen Question: is it the bedroom", WHERE, False),
      # fault: the cut at "Question" never fires
    ("qa3", "bedroom", "bedroom before the kitchen", BEFORE, True),
            # labels of the question do not count
    ("qa3", "bedroom", "The Bedroom, before the KITCHEN", BEFORE.upper(), True),
    ("qa3", "kitchen", "kitchen", BEFORE, False),
    ("qa5", "Bill", "Bill gave the apple to Jeff", "Who gave the apple to Jeff? ", True),
    ("qa5", "Bill", "Bill gave the milk to Jeff", "Who gave the apple to Jeff? ", False),
    ("qa6", "no", "no", "Is Mary in the office? ", True),
    ("qa6", "no", "I do not know", "Is Mary in the office? ", True),
           # fault: "no" inside "not" and "know"
    ("qa6", "yes", "yes, I know", "Is Mary in the office? ", False),        # the same fault
    ("qa6", "no", "none", "Is Mary in the office? ", True),
    ("qa6", "yes", "yes", "Is Mary in the office? ", True),
    ("qa7", "none", "none", "How many objects is Mary carrying? ", False),  # fault: "one" inside "none"
    ("qa7", "one", "none", "How many objects is Mary carrying? ", False),
    ("qa7", "one", "one", "How many objects is Mary carrying? ", True),
    ("qa7", "three", "three objects", "How many objects is Mary carrying? ", True),
    ("qa8", "apple,milk", "apple,milk", "What is Mary carrying? ", True),
    ("qa8", "apple,milk", "the milk and the apple", "What is Mary carrying? ", True),
    ("qa8", "apple,milk", "apple", "What is Mary carrying? ", False),
    ("qa8", "apple,milk", "apple, football and milk", "What is Mary carrying? ", False),
    ("qa8", "apple", "apple,milk", "What is Mary carrying? ", False),
    ("qa8", "nothing", "nothing", "What is Mary carrying? ", True),
    ("qa10", "maybe", "maybe", "Is Mary in the office? ", True),
    ("qa10", "maybe", "maybe not", "Is Mary in the office? ", False),
    ("qa15", "wolf", "wolves", "What is Gertrude afraid of? ", False),
    ("qa16", "gray", "Brian is gray.", "What color is Brian? ", True),
    ("qa19", "s,e", "s,e", "How do you go from the office to the kitchen? ", True),
        # a comma, but only 3 characters
    ("qa19", "s,e", "s, e", "How do you go from the office to the kitchen? ", False),
    ("qa19", "s,e", "n,s,e", "How do you go from the office to the kitchen? ", True),   # n,s is no label
    ("qa19", "s,e", "s,e,n", "How do you go from the office to the kitchen? ", False),
    ("qa20", "thirsty", "thirsty", "Why did yann go to the kitchen? ", True),
]


@pytest.mark.parametrize("task, target, output, question, score", SCORES)
def test_the_official_score_is_the_benchmarks_faults_included(task, target, output, question, score):
    assert official_score(task, target, output, question) is score


def test_the_labels_are_those_of_the_benchmark_for_all_twenty_tasks():
    assert set(LABELS) == {f"qa{i}" for i in range(1, 21)}
    assert sorted(LABELS["qa19"]) == ["e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n",
                                      "w,s", "w,w"]
    sizes = [6, 6, 6, 6, 7, 2, 4, 4, 2, 3, 6, 6, 6, 6, 4, 4, 2, 2, 12, 7]
    assert [len(set(LABELS[f"qa{i}"])) for i in range(1, 21)] == sizes


@pytest.mark.parametrize("target, output, same", [
    ("kitchen", "kitchen", True), ("kitchen", " Kitchen. ", True), ("Kitchen", "kitchen", True),
    ("kitchen", "kitchen .", True),
    ("kitchen", "", False), ("kitchen", "the kitchen", False), ("kitchen", "kitchens", False),
    ("kitchen", "kitchen bedroom", False),
    ("kitchen", "kitchen..", False), ("none", "none", True), ("none", "one", False),
    ("apple,milk", "apple,milk", True),
    ("apple,milk", "milk,apple", False), ("s,e", "s, e", False)])
def test_exact_match_ignores_case_surrounding_space_and_a_final_full_stop_alone(target, output, same):
    assert exact_match(target, output) is same


@pytest.mark.parametrize("hits, n, low, high", [
    (95, 100, 0.8882, 0.9785), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0),
    (1, 2, 0.0945, 0.9055),
    (500, 1000, 0.4691, 0.5309)])
def test_the_interval_is_wilsons(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


# Evaluation

@pytest.fixture(scope="module")
def model(tok):
    """Random weights that answer with few words, and now and then with the end of text."""
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=tok.n_vocab, **TINY)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
        for layer in model.layers:
            layer.memory.wv.weight.mul_(6)      # the memory has a say
        model.output.weight[:] = 0
        model.output.weight[-60:] = 0.5 * torch.randn(60, 16, dtype=torch.float64)
        model.output.weight[-1] *= 2
    return model


def greedy(model, tok, prompt, write):
    """The answer by reading the whole again for every token, in one call."""
    ids = prompt[None]
    for _ in range(12):
        new = model(ids, write=write)[0][:, -1].argmax(-1)
        if new.item() == tok.eot:
            break
        ids = torch.cat([ids, new[:, None]], dim=1)
    return tok.decode(ids[0, len(prompt):].tolist())


def prompts(tok, rows, length):
    return torch.randint(tok.n_vocab, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [5, 32, 33, 64, 86, 95, 96])
def test_an_answer_without_memory_is_that_of_reading_everything_and_never_writing(model, tok, length):
    rows = prompts(tok, 6, length)
    assert answer(model, tok, rows, memory=False) == [greedy(model, tok, row, write=False) for row in rows]


@pytest.mark.parametrize("length", [5, 64, 90])
def test_an_answer_with_memory_is_that_of_reading_everything_in_one_call(model, tok, length):
    rows = prompts(tok, 6, length)
    assert answer(model, tok, rows, memory=True) == [greedy(model, tok, row, write=True) for row in rows]


def test_the_two_ways_of_answering_differ_and_answers_end_at_different_places(model, tok):
    rows = prompts(tok, 12, 90)
    on, off = answer(model, tok, rows, True), answer(model, tok, rows, False)
    assert sum(a != b for a, b in zip(on, off)) > 6
    assert len({len(tok.encode(text)) for text in on}) > 2


@pytest.mark.parametrize("memory", [True, False])
def test_a_batch_gets_the_answers_of_its_rows_one_at_a_time(model, tok, memory):
    rows = prompts(tok, 8, 70)
    assert answer(model, tok, rows, memory) == [answer(model, tok, row[None], memory)[0] for row in rows]


def by_sample(rows, *keys):
    return {(r["task"], r["length"], r["i"], r["memory"]): tuple(r[k] for k in keys) for r in rows}


def test_samples_and_answers_depend_on_the_seed_not_on_modes_batches_or_other_tasks(model, tok, val_set):
    both = by_sample(evaluate(model, tok, val_set, ["qa2", "qa1"], [0, 150], 6, seed=3), "question", "target",
                     "output", "outside")
    alone = by_sample(evaluate(model, tok, val_set, ["qa1"], [150, 0], 6, seed=3, modes=("off",),
                               max_tokens=1),
                      "question", "target", "output", "outside")
    other = by_sample(evaluate(model, tok, val_set, ["qa1"], [150, 0], 6, seed=4, modes=("off",)), "question",
                      "target")
    assert len(both) == 2 * 2 * 6 * 2 and len(alone) == len(other) == 2 * 6
    assert all(both[key] == row for key, row in alone.items())
    assert other != by_sample([dict(task=t, length=n, i=i, memory=m, question=q, target=a)
                               for (t, n, i, m), (q, a, *_) in alone.items()], "question", "target")


def test_a_prediction_belongs_to_its_sample(model, tok, val_set):
    rows = list(evaluate(model, tok, val_set, ["qa1"], [150], 6, seed=3, modes=("on",)))
    rng = random.Random("3 qa1 150")
    docs = [val_set.sample("qa1", 150, rng) for _ in range(6)]
    assert sorted(r["i"] for r in rows) == list(range(6))
    for r in rows:
        doc = docs[r["i"]]
        assert (r["question"], r["target"]) == doc.questions[0][:2] and r["outside"] == doc.outside(32)
        assert r["output"] == greedy(model, tok, torch.from_numpy(doc.prompt()), write=True).strip()


def test_evaluating_leaves_the_model_in_the_mode_it_was_in(model, tok, val_set):
    for mode in (True, False):
        model.train(mode)
        list(evaluate(model, tok, val_set, ["qa1"], [0], 1))
        assert model.training is mode


def prediction(memory, target, output, outside=False, task="qa1", length=4000):
    return dict(task=task, length=length, i=0, memory=memory, question="Where is Mary?", target=target,
                output=output,
                seconds=0.1, outside=outside)


def numbers(line):
    return [float(x) for x in re.findall(r"\d+\.\d+|\d+", line)]


def test_the_table_counts_exact_and_official_answers_the_floor_and_the_samples_outside():
    on = [prediction("on", "kitchen", "kitchen", True), prediction("on", "kitchen", "the kitchen", True),
          prediction("on", "garden", "garden"), prediction("on", "office", "garden", True)]
    off = [dict(r, memory="off", output="garden") for r in on]
    line = next(x for x in table(on + off).splitlines() if "qa1" in x)
    left, right = line.split("qa1")[1].split("|")
    assert numbers(left) == [4, 4, 50.0, 15, 85, 75.0,
                             50.0]    # length, n, exact, its interval, official, floor
    assert numbers(right) == [3, 33.3, 6, 79, 0.0, 0, 56]       # n, on and off with their intervals


def test_the_table_has_a_line_for_each_task_and_length():
    rows = [prediction(m, "garden", "garden", task=t, length=n) for t in ("qa1", "qa2") for n in (0, 1000)
            for m in ("on", "off")]
    lines = [x.split()[:2] for x in table(rows).splitlines() if x.split()[0].startswith("qa")]
    assert lines == [["qa1", "0k"], ["qa1", "1k"], ["qa2", "0k"], ["qa2", "1k"]]


@pytest.mark.parametrize("modes", [("on", "off"), ("on",), ("off",)])
def test_no_line_of_the_table_is_wider_than_80_columns(modes):
    rows = [prediction(m, "garden", "garden", o, "qa10", n) for n in (0, 15_699, 127_695, 10_000_000)
            for o in (True, False) for m in modes for _ in range(600)]
    assert {len(x) for x in table(rows).splitlines() if len(x) > 80} == set()


@pytest.fixture(scope="module")
def evaluated(model, tok, folder, tmp_path_factory):
    """A folder with out/ckpt.pt, evaluated in place with the default paths; and what was printed."""
    path = tmp_path_factory.mktemp("evaluated")
    (path / "out").mkdir()
    save_checkpoint(path / "out" / "ckpt.pt", model, tok)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "stdout", io.StringIO())
        babilong_eval.main(["--background", str(folder), "--lengths", "0k", "200", "--n", "4"])
        return path, sys.stdout.getvalue().splitlines()


def test_the_table_of_the_saved_predictions_is_the_printed_one(evaluated, capsys):
    path, lines = evaluated
    babilong_eval.main(["--from_predictions", str(path / "out" / "predictions.jsonl")])
    again = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(again) >= 4 and "\n".join(again) in "\n".join(lines)


def test_an_evaluation_prints_no_line_wider_than_80_columns(evaluated):
    assert [x for x in evaluated[1] if len(x) > 80] == []


def test_an_evaluation_uses_the_val_part_and_writes_a_line_for_each_answer(evaluated, tok, model, val_set):
    path, _ = evaluated
    saved = [json.loads(x) for x in (path / "out" / "predictions.jsonl").read_bytes().splitlines()]
    expected = evaluate(model, tok, val_set, ["qa1"], [0, 200], 4)
    assert len(saved) == 2 * 4 * 2
    keys = ("question", "target", "outside")
    assert by_sample(saved, *keys) == by_sample(expected, *keys)


def test_predictions_are_replaced_only_when_the_new_ones_are_complete(tmp_path):
    path = tmp_path / "predictions.jsonl"
    save_predictions([prediction("on", "garden", "gärten")], path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_predictions([prediction("on", "garden", "garden"), {"not": {"json"}}], path)
    assert path.read_bytes() == before
    assert load_predictions(path) == [prediction("on", "garden", "gärten")]
