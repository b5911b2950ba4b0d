"""Training batches: what is in them, and that neither workers, strides, a new stage nor a resumed
run change any of it.

    python -m pytest tests/test_lessons.py -q

What is asked and where is found again from the text of the documents.
"""

import json
import os
import pickle
import re
import signal
from contextlib import closing
from itertools import islice

import pytest
import torch

from data.babilong import Builder
from data.lessons import Batches, Curriculum, Lessons, Stage, main, parse_stages, usual_facts
from data.tokenizer import load
from test_babilong import MOVED, book, last_rooms

torch.set_num_threads(1)

PLAIN = Stage(4, 0, 64)
LONG = Stage(6, 3, 64)
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tok():
    return load()


@pytest.fixture(scope="module")
def builder(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "book.txt").write_text(book(1500), encoding="utf-8")
    return Builder(tok, "train", folder)


def new_lessons(builder, **changes):
    settings = dict(
        builder=builder,
        tasks=("qa1",),
        batch_size=4,
        batch_tokens=32768,
        plain=0.0,
        n_asides=0,
        seed=0,
    )
    return Lessons(**(settings | changes))


def made(builder, stage, numbers, **changes):
    """The batches of these numbers."""
    lessons = new_lessons(builder, **changes)
    return [lessons[stage, number][1] for number in numbers]


def documents(builder, stage, count, **changes):
    """The documents of this number of batches, without prose."""
    lessons = new_lessons(builder, **changes)
    found = []
    for number in range(count):
        found.extend(lessons.documents(stage, number, 0))
    return found


def is_same(a, b):
    tensors_agree = all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    return tensors_agree and a.is_longest == b.is_longest


def rows(batch):
    """Each document of a batch: its ids with the padding, and {position asked: target}."""
    T = batch.idx.shape[1]
    found = [(ids, {}) for ids in batch.idx.tolist()]
    for at, target in zip(batch.at.tolist(), batch.targets.tolist(), strict=True):
        _, asked = found[at // T]
        asked[at % T] = target
    return found


def ends_of_text(ids, tok):
    """The positions of the ends of text. The last one is a document's last token."""
    return [position for position, token in enumerate(ids) if token == tok.eot]


# Stages


def test_a_stage_is_read_as_it_is_written():
    texts = ["echo", "2:0", "4:2:32", "10:8:64@qa1,qa2,qa2"]
    stages = parse_stages(texts, 64, ["qa1", "qa2"], whole=False)
    assert stages == [
        Stage(0, 0, 64),
        Stage(2, 0, 64),
        Stage(4, 2, 32),
        Stage(10, 8, 64, ("qa1", "qa2", "qa2")),
    ]
    assert [str(stage) for stage in stages] == [
        "echo",
        "2 facts",
        "4 facts in 2 x 32",
        "10 facts in 8 x 64 of qa1, qa2, qa2",
    ]


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "is not a stage"),
        ("4", "is not a stage"),
        ("echo@qa1", "is not a stage"),
        ("echo:32", "is not a stage"),
        ("4:x", "is not a stage"),
        ("4:-1", "is not a stage"),
        ("4:2:32:1", "is not a stage"),
        ("4:2@", "is not a stage"),
        ("1:0", "has 1 facts"),
        ("0:0", "has 0 facts"),
        ("4:2:0", "has segments of 0 tokens"),
        ("4:2:65", "has segments of 65 tokens"),
        ("4:2@qa1,qa3", "names 'qa3', which is not among --tasks: qa1 qa2"),
    ],
)
def test_what_is_no_stage_of_the_run_is_named_with_its_fault(text, fault):
    with pytest.raises(ValueError, match=f"^stage {text!r} {fault}"):
        parse_stages(["2:0@qa2", text], 64, ["qa1", "qa2"], whole=False)


def test_an_echo_must_fit_into_a_segment():
    assert parse_stages(["echo"], 50, ["qa1"], whole=True)
    with pytest.raises(ValueError, match="^stage 'echo' has up to 50 tokens, .* 49: leave it out"):
        parse_stages(["echo"], 49, ["qa1"], whole=False)


def test_short_stories_without_prose_are_asked_as_many_questions_as_the_run_says(builder):
    for most in (1, 2, 8):
        lessons = new_lessons(builder, short_questions=most)
        n_asked = {}
        for text in ("4:0", "5:0", "4:2:64"):
            (stage,) = parse_stages([text], 64, ["qa1"], whole=False)
            documents = []
            for number in range(20):
                n_segments = lessons.draw_n_segments(stage, number)
                documents += lessons.documents(stage, number, n_segments)
            n_asked[text] = max(len(document.answers) for document in documents)
        assert n_asked["4:0"] == min(most, 4)
        assert n_asked["5:0"] == n_asked["4:2:64"] == 4


def test_a_run_without_stages_is_refused():
    with pytest.raises(ValueError, match="^--stages is empty"):
        parse_stages([], 64, ["qa1"], whole=False)


def test_whole_documents_must_fit_into_a_segment_of_the_model():
    assert parse_stages(["4:2:32"], 64, ["qa1"], whole=True) == [Stage(4, 2, 32)]
    assert parse_stages(["4:3:32"], 64, ["qa1"], whole=False) == [Stage(4, 3, 32)]
    with pytest.raises(ValueError, match="^--whole: .*'4:3:32'.* give --segment_len 96$"):
        parse_stages(["4:2:32", "4:3:32"], 64, ["qa1"], whole=True)


# What is learned


@pytest.mark.parametrize("stage", [PLAIN, LONG, Stage(12, 0, 64)])
def test_asked_are_the_right_answers_and_their_ends_of_text_and_nothing_else(tok, builder, stage):
    for batch in made(builder, stage, range(5), batch_size=8, n_asides=3):
        assert batch.is_word.tolist() == [target != tok.eot for target in batch.targets.tolist()]
        for ids, asked in rows(batch):
            expected = {}
            ends = ends_of_text(ids, tok)
            for end in ends:
                before = tok.decode(ids[: end - 1])
                actor = re.search(r"Where is (\w+)\?$", before)[1]
                (answer,) = tok.encode(f" {last_rooms(before)[actor]}")
                expected[end - 2] = answer
                expected[end - 1] = tok.eot
            assert asked == expected
            assert all(ids[position + 1] == target for position, target in asked.items())
            assert not any(ids[ends[-1] + 1 :])  # padding


def test_an_echo_says_a_list_twice_and_asks_for_each_token_of_it_that_can_be_known(tok, builder):
    lengths = set()
    gaps = set()
    for number in range(40):
        lessons = new_lessons(builder)
        stage = Stage(0, 0, 64)
        documents = lessons.documents(stage, number, lessons.draw_n_segments(stage, number))
        for document in documents:
            ids = list(document.ids)
            ((start, stop),) = document.answers
            assert stop == len(ids)
            n_listed = stop - start + 1
            assert ids[-n_listed:] == ids[:n_listed]
            first = ids[:-n_listed]
            assert len(set(first)) == len(first)  # what stood behind a token is not in doubt
            assert min(ids) >= 256 and max(ids) < tok.eot
            lengths.add(n_listed)
            gaps.add(len(first) - n_listed)
    assert lengths == set(range(6, 21))
    assert gaps == set(range(11))
    _, batch = lessons[stage, 0]
    documents = lessons.documents(stage, 0, 0)
    assert batch.is_word.all() and batch.is_longest
    asked = [token for document in documents for token in document.ids[slice(*document.answers[0])]]
    assert batch.targets.tolist() == asked


@pytest.mark.parametrize(
    "stage, least, most",
    [(PLAIN, 0.0, 0.0), (LONG, 0.3, 0.6), (Stage(12, 3, 64), 0.65, 0.9)],
)
def test_half_of_the_documents_with_prose_and_most_of_those_with_many_facts_are_asked_earlier(
    tok, builder, stage, least, most
):
    is_early = []
    for batch in made(builder, stage, range(30), n_asides=3):
        for ids, _ in rows(batch):
            behind_first_answer = tok.decode(ids[ends_of_text(ids, tok)[0] :])
            is_early.append(MOVED.search(behind_first_answer) is not None)
    assert least <= sum(is_early) / len(is_early) <= most


@pytest.mark.parametrize("n_asides", [1, 3])
def test_a_document_is_asked_earlier_at_one_to_the_most_points(builder, n_asides):
    counts = []
    for document in documents(builder, Stage(12, 0, 64), 30, n_asides=n_asides):
        points = set()  # facts before a question
        for start, _ in document.answers:
            points.add(sum(stop <= start for _, stop in document.facts))
        counts.append(len(points - {len(document.texts)}))
    assert set(counts) == set(range(n_asides + 1))
    assert counts.count(1) > len(counts) / 5


# How hard it is


def test_half_of_the_documents_have_the_most_facts_and_the_others_two_or_more(builder):
    counts = [len(found.texts) for found in documents(builder, Stage(6, 0, 64), 60)]
    assert set(counts) == {2, 3, 4, 5, 6}
    assert 0.5 < counts.count(6) / len(counts) < 0.7  # half, and a fifth of the other half


def test_a_story_is_no_longer_than_a_share_of_its_tasks_own_questions_needs(builder):
    changes = dict(tasks=("qa2",), usual=0.3)
    counts = [len(found.texts) for found in documents(builder, Stage(99, 0, 64), 5, **changes)]
    assert max(counts) == usual_facts("qa2", 0.3) < usual_facts("qa2", 0.9)


@pytest.mark.parametrize(
    "text, least, most", [("4:0@qa1,qa4,qa4,qa4", 0.65, 0.85), ("4:0", 0.4, 0.6)]
)
def test_a_stage_has_the_tasks_that_it_names_as_often_as_it_names_them_or_else_all(
    tok, builder, text, least, most
):
    (stage,) = parse_stages([text], 64, ["qa1", "qa4"], whole=False)
    found = documents(builder, stage, 60, tasks=("qa1", "qa4"))
    is_of_qa4 = [" of the " in tok.decode(document.ids) for document in found]  # "north of the"
    assert least < sum(is_of_qa4) / len(found) < most


def test_half_of_the_batches_have_the_most_segments_and_short_ones_are_the_most_of_the_others(
    tok, builder
):
    counts = []
    for batch in made(builder, Stage(4, 3, 64), range(120)):
        count = batch.idx.shape[1] // 64
        counts.append(count)
        assert batch.is_longest == (count == 3)
        for ids, _ in rows(batch):
            assert (count - 1) * 64 <= ends_of_text(ids, tok)[-1] < count * 64
    assert set(counts) == {1, 2, 3}
    assert 65 <= counts.count(3) <= 85  # half of them, and a fifth of the other half
    assert counts.count(1) > 1.5 * counts.count(2)


def test_in_the_last_stage_a_share_of_its_own_has_the_most_segments(builder):
    last = Stage(4, 8, 8)
    other = Stage(4, 8, 16)
    lessons = new_lessons(builder, plain=0.0, last_stage=last, longest=0.0)
    n_longest = {last: 0, other: 0}
    for stage in n_longest:
        for number in range(400):
            n_longest[stage] += lessons.draw_n_segments(stage, number) == 8
    assert n_longest[last] < 50  # 1 - sqrt(7/8) = 6 % of those that draw a length
    assert 180 < n_longest[other] < 250


def test_a_share_of_the_batches_has_no_prose_and_is_not_of_the_longest(tok, builder):
    count = 0
    for batch in made(builder, Stage(2, 4, 64), range(200), plain=0.4, batch_size=1):
        if batch.idx.shape[1] < 64:
            count += 1
            assert "The " not in tok.decode(batch.idx[0].tolist())
            assert not batch.is_longest
    assert 55 <= count <= 105


def test_all_batches_of_a_stage_without_prose_are_of_the_longest(builder):
    assert all(batch.is_longest for batch in made(builder, PLAIN, range(5)))


def test_other_numbers_seeds_and_stages_give_other_documents(builder):
    batches = [
        *made(builder, LONG, [0, 1]),
        *made(builder, LONG, [0], seed=1),
        *made(builder, Stage(6, 3, 32), [0]),
    ]
    assert len({tuple(batch.idx[0].tolist()) for batch in batches}) == 4


# The shape of a batch


@pytest.mark.parametrize(
    "stage, plain, has_prose",
    [(LONG, 0.0, True), (LONG, 1.0, False), (Stage(10, 0, 32), 0.0, False)],
)
def test_a_batch_is_whole_segments_long_unless_it_has_no_prose_and_fits_into_one(
    tok, builder, stage, plain, has_prose
):
    S = stage.segment_len
    for batch in made(builder, stage, range(10), plain=plain):
        longest = 1 + max(ends_of_text(ids, tok)[-1] for ids, _ in rows(batch))
        if has_prose or longest > S:
            assert batch.idx.shape[1] % S == 0
            assert longest <= batch.idx.shape[1] < longest + S
        else:
            assert batch.idx.shape[1] == longest


def test_long_documents_come_in_smaller_batches_and_none_is_made_in_vain(builder):
    stage = Stage(3, 4, 64)
    lessons = new_lessons(builder, batch_size=6, batch_tokens=512)
    sizes = {}
    for number in range(40):
        _, batch = lessons[stage, number]
        n_segments = batch.idx.shape[1] // 64
        sizes[n_segments] = batch.idx.shape[0]
        assert len(lessons.documents(stage, number, n_segments)) == batch.idx.shape[0]
    assert sizes == {1: 6, 2: 4, 3: 2, 4: 2}


@pytest.mark.parametrize(
    "stage, batch_tokens, most",
    [
        (Stage(3, 4, 64), 1, 1),
        (Stage(3, 4, 64), 300, 4),
        (Stage(10, 2, 32), 512, 5),  # ten facts alone fill three segments of 32
        (Stage(2, 0, 16384), 4096, 20),  # without prose a segment's length does not matter
    ],
)
def test_a_batch_has_no_more_tokens_than_it_may_unless_it_is_a_single_document(
    builder, stage, batch_tokens, most
):
    sizes = []
    for batch in made(builder, stage, range(20), batch_size=20, batch_tokens=batch_tokens):
        assert batch.idx.shape[0] == 1 or batch.idx.numel() <= batch_tokens
        sizes.append(batch.idx.shape[0])
    assert max(sizes) == most


def test_the_batches_of_a_step_are_equally_long_but_have_other_documents(builder):
    lengths = set()
    batches = made(builder, Stage(3, 3, 64), range(60), plain=0.2, accumulate=2)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        length = first.idx.shape[1] // 64  # 0 without prose
        assert second.idx.shape[1] // 64 == length
        assert second.is_longest == first.is_longest
        assert second.idx[0].tolist() != first.idx[0].tolist()
        lengths.add(length)
    assert lengths == {0, 1, 2, 3}


@pytest.mark.parametrize("stage", [PLAIN, LONG])
def test_a_padded_batch_asks_the_same_of_the_same_tokens(builder, stage):
    (batch,) = made(builder, stage, [0], batch_size=8)
    T = batch.idx.shape[1]
    n = len(batch.at)
    padded = batch.padded(T + 96, 64)
    assert torch.equal(padded.idx[:, :T], batch.idx)
    assert padded.idx.shape[1] == T + 96
    assert not padded.idx[:, T:].any()
    assert len(padded.at) == len(padded.targets) == len(padded.is_word)
    assert len(padded.at) % 64 == 0 and n <= len(padded.at) < n + 64
    places = zip(batch.at // T, batch.at % T, strict=True)
    assert padded.at[:n].tolist() == [row * (T + 96) + column for row, column in places]
    assert torch.equal(padded.targets[:n], batch.targets)
    assert torch.equal(padded.is_word[:n], batch.is_word)
    assert (padded.targets[n:] == -1).all()
    assert not padded.is_word[n:].any()
    assert padded.is_longest == batch.is_longest
    assert is_same(batch.padded(T, 1), batch)


# One after the other

# A worker has up to four batches more ready when a stage ends.
CHANGING = [PLAIN] * 5 + [LONG] + [PLAIN] * 14 + [Stage(3, 2, 32)] * 2 + [PLAIN] * 10


@pytest.mark.parametrize(
    "number, stride, workers",
    [(0, 1, 0), (0, 1, 2), (7, 1, 1), (0, 2, 0), (1, 2, 1)],
)
def test_a_number_is_the_same_batch_whoever_makes_it_and_wherever_the_run_begins(
    builder, number, stride, workers
):
    lessons = new_lessons(builder, plain=0.2)
    taken = CHANGING[number::stride]
    numbers = range(number, len(CHANGING), stride)
    with closing(Batches(lessons, taken[0], number, stride, workers)) as batches:
        for stage, this_number in zip(taken, numbers, strict=True):
            batches.enter(stage)
            assert is_same(next(batches), lessons[stage, this_number][1])


def test_a_process_makes_no_batch_of_another(builder):
    with closing(Batches(new_lessons(builder), PLAIN, number=1, stride=2)) as batches:
        keys = [key for key, _ in islice(batches.loader, 3)]
    assert keys == [(PLAIN, 1), (PLAIN, 3), (PLAIN, 5)]


def test_a_batch_is_known_again_where_pinning_makes_lists_of_tuples(builder):
    """As older versions of torch do it. A batch that is not known again is thrown away."""
    lessons = new_lessons(builder)
    with closing(Batches(lessons, LONG)) as batches:
        key, batch = lessons[LONG, 0]
        batches.loader = iter([[list(key), batch]])
        assert next(batches) is batch


def test_lessons_can_be_sent_to_a_worker_that_shares_no_memory(builder):
    lessons = new_lessons(builder)
    sent = pickle.loads(pickle.dumps(lessons))
    assert is_same(sent[LONG, 3][1], lessons[LONG, 3][1])


def test_workers_leave_ctrl_c_to_the_process_that_they_work_for_and_end_with_it(builder):
    batches = Batches(new_lessons(builder), PLAIN, workers=1)
    next(batches)
    (worker,) = batches.loader._workers
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(8):  # more than are made ahead
        next(batches)
    assert worker.is_alive()
    batches.close()
    assert not worker.is_alive()


# The command


@pytest.fixture
def show(builder, monkeypatch, capsys):
    """show(*flags) runs the command -> what it prints, and the batch that it has made for it."""
    monkeypatch.setattr("data.lessons.Builder", lambda *_, **names: builder)
    batches = []
    look_up = Lessons.__getitem__

    def keep(lessons, key):
        key, batch = look_up(lessons, key)
        batches.append(batch)
        return key, batch

    def run(*flags):
        main(list(flags))
        return capsys.readouterr().out, batches[-1]

    monkeypatch.setattr(Lessons, "__getitem__", keep)
    return run


# The first document of the second example is asked earlier, too.
@pytest.mark.parametrize("flags", [[], ["--stage", "12:3:64", "--number", "6"]])
def test_the_command_prints_a_document_with_its_answers_in_brackets_and_where_it_is_asked(
    tok, show, flags
):
    out, batch = show(*flags)
    head, text, tail = out.split("\n\n")
    ids, asked = rows(batch)[0]
    length = ends_of_text(ids, tok)[-1] + 1
    n_rows, width = batch.idx.shape
    assert f": {n_rows} documents, padded to {width} tokens.\n" in head
    assert max(map(len, text.split("\n"))) < 80
    text = text.replace("\n", " ")
    assert " " + re.sub(r" \[(\w+)\|\]", rf" \1{END}", text) == tok.decode(ids[:length])
    positions = " ".join(map(str, asked))
    n_questions = text.count("[")
    assert n_questions > 1
    assert tail == (
        f"{length} tokens, {n_questions} questions.\n"
        f"The loss is taken at these positions: {positions}.\n"
    )


def test_the_command_prints_other_documents_for_other_numbers_seeds_and_tasks(show):
    found = set()
    for flags in ([], ["--number", "1"], ["--seed", "1"], ["--tasks", "qa2"]):
        out, _ = show(*flags)
        found.add(out.split("\n\n")[1])
    assert len(found) == 4


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--stage", "4:2:129"], "'4:2:129'"),
        (["--tasks", "qa1", "qa99"], "'qa99'"),
        (["--number", "few"], "'few'"),
        (["--nope"], "--nope"),
    ],
)
def test_the_command_names_a_flag_that_cannot_be_in_one_line(show, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("python -m data.lessons: ") and named in err


# The curriculum


def new_curriculum(**changes):
    stages = parse_stages(["2:0", "4:2:32", "6:3"], 64, ["qa1"], whole=False)
    settings = dict(stages=stages, leave_at=0.75, leave_plain_at=0.75, window=4, max_steps=50)
    return Curriculum(**(settings | changes))


@pytest.mark.parametrize(
    "recent, steps, number",
    [
        ([0.0, 0.0, 0.5, 0.9, 1.0, 0.6], 10, 1),  # the latest four are right often enough
        ([1.0, 1.0, 0.5, 0.8, 1.0, 0.6], 10, 0),
        ([1.0, 1.0, 1.0], 10, 0),  # the window is not full
        ([0.0, 0.0, 0.0, 0.0], 49, 0),
        ([], 50, 1),
    ],
)
def test_a_stage_is_left_when_its_window_is_full_and_right_or_its_steps_are_spent(
    recent, steps, number
):
    curriculum = new_curriculum()
    curriculum.recent.extend(recent)
    curriculum.steps = steps
    line = curriculum.advance()
    assert (line is None) == (number == 0)
    assert curriculum.number == number


def test_a_stage_that_is_left_is_reported_and_the_next_one_begins_anew():
    curriculum = new_curriculum()
    curriculum.recent.extend([0.5, 0.9, 1.0, 0.6])
    curriculum.steps = 10
    assert curriculum.advance() == "2 facts 75% after 10 steps, now 4 facts in 2 x 32"
    assert curriculum.stage == Stage(4, 2, 32)
    assert curriculum.steps == 0
    assert not curriculum.recent


def test_a_stage_without_prose_has_a_share_of_its_own_and_the_last_one_is_never_left():
    curriculum = new_curriculum(leave_plain_at=0.9)
    numbers = []
    for share in (0.8, 0.95, 0.8, 1.0):
        curriculum.recent.extend([share] * 4)
        curriculum.advance()
        numbers.append(curriculum.number)
    assert numbers == [0, 1, 2, 2]
    echo = Curriculum([Stage(0, 0, 64), Stage(2, 0, 64)], 0.7, 0.9, 4, 50)
    echo.recent.extend([0.8] * 4)
    assert echo.advance() == "echo 80% after 0 steps, now 2 facts"
    assert curriculum.is_last
    curriculum.steps = 10_000
    assert curriculum.advance() is None


def test_a_curriculum_goes_on_from_its_state_as_it_would_have():
    straight = new_curriculum()
    straight.number = 1
    straight.steps = 30
    straight.recent.extend([0.2, 0.9, 0.9, 0.9])
    resumed = new_curriculum()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    reports = set()
    for curriculum in (straight, resumed):
        curriculum.steps += 1
        curriculum.recent.append(0.9)  # in place of the 0.2
        reports.add(curriculum.advance())
    assert reports == {"4 facts in 2 x 32 90% after 31 steps, now 6 facts in 3 x 64"}
