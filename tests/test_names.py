"""Stories with other names: which names they have, and that all else is as with bAbI's own.

    python -m pytest tests/test_names.py -q

A renamed story is compared with the same story under bAbI's own names, word by word.
"""

import functools
import random
import re

import pytest
import torch

import train
from babilong_eval import exact_match, official_score
from data import babi, babilong, background, lessons
from data.babi.names import KINDS, RENAMED, for_lessons, held_out
from data.babilong import Builder
from data.lessons import Lessons, Stage
from data.tokenizer import load
from test_train import refused

torch.set_num_threads(1)

BABI = """
    Mary Sandra Julie John Daniel Fred Bill Jeff apple football milk
    bathroom bedroom garden hallway kitchen office cinema park school
"""
OWN = set(BABI.split())
FOR_LESSONS = {word for _, others in KINDS for word in for_lessons(others)}
HELD_OUT = {word for _, others in KINDS for word in held_out(others)}
WOMEN, MEN = ({*own, *others} for own, others in KINDS[:2])


@pytest.fixture(scope="module")
def make(folder):
    """make(part, names): a builder of the stories of a part, with these names."""
    tokenizer = load()

    @functools.cache
    def builder(part, names):
        return Builder(tokenizer, part, str(folder), names=names)

    return builder


def words_of(texts):
    """The words of some texts, in order."""
    return re.findall(r"\w+", " ".join(texts))


def texts_of(document):
    """All that a document tells, asks and answers."""
    texts = list(document.texts)
    for question in document.questions:
        texts += [question.text, question.answer]
    return texts


# The lists


def test_no_word_is_a_part_of_another_one_or_of_a_word_of_the_tasks():
    said = set(OWN)
    for task in babi.TASKS.values():
        for seed in range(40):
            story = task.story(random.Random(seed))
            said.update(words_of([event.text for event in story.events]))
            for _, question in story.questions:
                said.update(words_of([question.text, question.answer]))
    said = {word.lower() for word in said}
    new = [word.lower() for _, others in KINDS for word in others]
    assert len(set(new)) == len(new) and said.isdisjoint(new)
    for word in new:
        assert not [other for other in said.union(new) if word in other and word != other]
        assert not [own for own in OWN if own.lower() in word]
    for name in (*WOMEN, *MEN, *KINDS[2][1]):
        assert "no" not in name.lower(), "a question that names it would seem to hold the answer"


def test_every_fifth_word_is_held_out():
    for own, others in KINDS:
        assert sorted([*for_lessons(others), *held_out(others)]) == sorted(others)
        assert others.index(held_out(others)[1]) == 5
        assert len(held_out(others)) >= len(own), "a story of unseen names needs them all"


# Stories


@pytest.mark.parametrize("names, part", [("many", "train"), ("unseen", "val")])
@pytest.mark.parametrize("task", RENAMED)
def test_a_renamed_story_is_the_same_story_with_one_new_name_for_each(make, task, names, part):
    """So the answers follow from it, as they do from a story with bAbI's own names."""
    new_of = {}  # (number of the story, own name) -> new name
    for seed in range(12):
        n_facts = None if part == "val" else 7
        told = []
        for builder in (make(part, "own"), make(part, names)):
            told.append(builder.story(task, n_facts, random.Random(seed), 3, RENAMED))
        (texts, questions, asides), (new_texts, new_questions, new_asides) = told
        assert [point for point, _ in new_asides] == [point for point, _ in asides]
        questions += [question for _, question in asides]
        new_questions += [question for _, question in new_asides]
        pairs = list(zip(texts, new_texts, strict=True))
        for question, new in zip(questions, new_questions, strict=True):
            assert new.support == question.support
            pairs += [(question.text, new.text), (question.answer, new.answer)]
        of_story = {}
        for text, new_text in pairs:
            assert re.sub(r"\w+", "", text) == re.sub(r"\w+", "", new_text)
            for word, new_word in zip(words_of([text]), words_of([new_text]), strict=True):
                if word in OWN:
                    assert of_story.setdefault(word, new_word) == new_word
                else:
                    assert new_word == word, "a word that is no name was changed"
        assert len(set(of_story.values())) == len(of_story), "two names became one"
        for word, new_word in of_story.items():
            (kind,) = [{*own, *others} for own, others in KINDS if word in own]
            assert new_word in kind
            new_of[seed, word] = new_word
    assert len(set(new_of.values())) > 0.15 * len(new_of), "all stories have the same names"


@pytest.mark.parametrize("names", ["many", "unseen"])
def test_the_room_of_a_person_follows_from_the_renamed_sentences(make, names):
    """For qa1 it is the last one. For qa2 it is where the thing was put down, or its holder is."""
    went = re.compile(r"(\w+) (?:went back|went|moved|journeyed|travelled) to the (\w+)\.")
    got = re.compile(r"(\w+) (?:got|took|grabbed|picked up) the (\w+)")
    put = re.compile(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)")
    for seed in range(40):
        for task in ("qa1", "qa2"):
            document = make("val", names).sample(task, 300 * (seed % 2), random.Random(seed), 9999)
            rooms = {}
            holder = {}
            lies = {}
            for text in document.texts:
                if match := went.match(text):
                    rooms[match[1]] = match[2]
                elif match := got.match(text):
                    holder[match[2]] = match[1]
                elif match := put.match(text):
                    del holder[match[2]]
                    lies[match[2]] = rooms.get(match[1])
            question = document.questions[0]
            asked = words_of([question.text])[-1]
            if task == "qa2":
                where = rooms.get(holder[asked]) if asked in holder else lies[asked]
            else:
                where = rooms[asked]
            assert question.answer == where


def test_he_and_she_stay_right(make):
    builder = make("train", "many")
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        texts, _, _ = builder.story("qa11", 6, rng)
        for told, again in zip(texts[::2], texts[1::2], strict=True):
            person = told.split()[0]
            assert person in (WOMEN if " she " in again else MEN)
            seen.add(person)
    assert len(seen) > 40


# Lessons and samples


def test_no_lesson_has_a_word_that_is_held_out_and_few_have_own_names(make):
    builder = make("train", "many")
    stages = [Stage(6, 0, 64), Stage(10, 3, 64)]
    many = Lessons(builder, RENAMED, 8, 4096, plain=0.2, n_asides=3, seed=0)
    words = []
    for stage in stages:
        for number in range(40):
            documents = many.documents(stage, number, stage.segments)
            for document in documents:
                words += words_of(texts_of(document))
                for (start, stop), question in zip(
                    document.answers, document.questions, strict=True
                ):
                    answer = builder.tokenizer.decode(document.ids[start : stop - 1])
                    assert answer == f" {question.answer}"
            if not stage.segments:
                _, batch = many[stage, number]
                for ids in batch.idx.tolist():  # without prose the ids tell the same words
                    words += words_of([builder.tokenizer.decode(ids)])
    assert HELD_OUT.isdisjoint(words)
    assert set(words) >= FOR_LESSONS | OWN, "a word for lessons never comes"
    n_own = sum(word in OWN for word in words)
    n_new = sum(word in FOR_LESSONS for word in words)
    n_words = len(OWN) + len(FOR_LESSONS)
    assert 0.6 < n_own / (n_own + n_new) / (len(OWN) / n_words) < 1.4


@pytest.mark.parametrize("task", RENAMED)
def test_an_unseen_sample_has_no_name_of_babi_or_of_a_lesson(make, task):
    builder = make("val", "unseen")
    for seed in range(20):
        document = builder.sample(task, 0, random.Random(seed))
        words = set(words_of(texts_of(document)))
        assert words & HELD_OUT
        assert words.isdisjoint(OWN) and words.isdisjoint(FOR_LESSONS)
        told = " ".join([*document.texts, document.questions[0].text])
        assert builder.tokenizer.decode(document.prompt()) == " " + told


def test_sentences_that_are_kept_are_limited_and_the_documents_stay_the_same(make, monkeypatch):
    def documents():
        builder = make("train", "many")
        builder.encoded.clear()
        many = Lessons(builder, ("qa2",), 8, 4096, plain=0.2, n_asides=3, seed=0)
        ids = [many[Stage(8, 0, 64), number][1].idx for number in range(20)]
        return ids, len(builder.encoded)

    all_kept, n_kept = documents()
    monkeypatch.setattr(babilong, "MAX_ENCODED", 50)
    few_kept, n_few = documents()
    assert n_kept > 500 and n_few <= 50
    assert all(torch.equal(one, other) for one, other in zip(all_kept, few_kept, strict=True))


# Scores


@pytest.mark.parametrize("names", ["many", "unseen"])
@pytest.mark.parametrize("task", [task for task in RENAMED if task != "qa7"])
def test_a_renamed_answer_is_right_by_both_metrics_and_a_wrong_one_by_neither(make, task, names):
    """In qa7 the benchmark's own metric has a fault under all names."""
    builder = make("val", names)
    for seed in range(30):
        question = builder.sample(task, 0, random.Random(seed)).questions[0]
        other = builder.sample(task, 0, random.Random(seed + 1)).questions[0]
        right = (task, question.answer, question.answer.upper() + ".", question.text, True)
        assert official_score(*right) and exact_match(*right[1:3])
        if other.answer != question.answer:
            wrong = (task, question.answer, other.answer, question.text, True)
            assert not official_score(*wrong)
        if names == "unseen" and question.answer in HELD_OUT:
            assert not official_score(*right[:-1]), "the benchmark's labels have changed"
            hedged = f"{question.answer} {babilong_label(question.answer)}"
            assert not official_score(task, question.answer, hedged, question.text, True)


def babilong_label(word):
    """A name of bAbI's own of the same kind."""
    (label,) = [own[0] for own, others in KINDS if word in others]
    return label


# Flags


def test_training_documents_have_many_names_and_the_evaluation_has_babis_own(folder):
    flags = ["--names", "many", "--background", str(folder), "--out_dir", "no/such"]
    cfg = train.read_flags(flags).cfg
    data = train.make_story_data(cfg, load(), 128)
    taught = []
    for document in data.batches.documents(Stage(4, 0, 64), 0, 0):
        taught += words_of(document.texts)
    assert len(set(taught) & FOR_LESSONS) > 20
    asked = words_of(data.val_set.sample("qa1", 0, random.Random(0)).texts)
    assert set(asked) & OWN and FOR_LESSONS.isdisjoint(asked)


@pytest.mark.parametrize(
    "main, flags, named",
    [
        (train.main, "--names unseen", "--names 'unseen' is unknown: choose own or many"),
        (train.main, "--names many --tasks qa1 qa20 --device cpu", "does not fit qa20"),
        (train.main, "--names many --stories {}", "leave --stories {} out"),
        (lessons.main, "--names many --tasks qa16", "does not fit qa16: choose tasks from qa1 "),
        (lessons.main, "--names unseen", "'unseen'"),
        (babilong.main, "--names unseen --stories {}", "leave --stories {} out"),
        (babilong.main, "--names unseen --task qa15", "does not fit qa15"),
    ],
)
def test_names_that_cannot_be_are_told_in_one_line(
    capsys, monkeypatch, folder, tmp_path, main, flags, named
):
    documents = background.documents(folder)
    monkeypatch.setattr(background, "documents", lambda _: documents)
    argv = flags.format(tmp_path).split()
    if main is train.main:
        argv += ["--out_dir", tmp_path / "run", "--threads", "1", "--tokens", "50"]
    assert named.format(tmp_path) in refused(capsys, main, *argv)


def test_the_command_prints_a_lesson_with_many_names(capsys, monkeypatch, folder):
    documents = background.documents(folder)
    monkeypatch.setattr(background, "documents", lambda _: documents)
    lessons.main(["--names", "many", "--stage", "8:0"])
    words = words_of([capsys.readouterr().out])
    assert set(words) & FOR_LESSONS and HELD_OUT.isdisjoint(words)
