"""Training batches: what is in them, and that workers, a new stage and a resumed run change none of it.

    python -m pytest tests/test_batches.py -q
"""
import itertools
import os
import pickle
import re
import signal

import pytest
import torch

from data import batches
from data.babilong import Builder
from data.batches import Batches, Curriculum, Maker, Stage
from data.tokenizer import load
from test_babilong import MOVED, book, last_rooms
from test_scripts import no_worker_left, refused  # noqa: F401: used by every test here

PLAIN, LONG = Stage(4, 0, 64), Stage(6, 3, 64)


@pytest.fixture(scope="module")
def tok():
    return load()


@pytest.fixture(scope="module")
def train_set(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "book.txt").write_text(book(1500), encoding="utf-8")
    return Builder(tok, "train", folder)


def maker(builder, **changes):
    return Maker(**dict(builder=builder, tasks=("qa1",), size=4, tokens=32768, plain=0.0, asides=0,
                      seed=0) | changes)


def made(builder, stage, numbers, **changes):
    """The batches of these numbers."""
    m = maker(builder, **changes)
    return [m[stage, n][1] for n in numbers]


def same(a, b):
    return a.longest == b.longest and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4]))


# What is in a batch

@pytest.mark.parametrize("stage", [PLAIN, LONG])
def test_targets_are_the_answers_and_ends_of_text_behind_the_questions_and_nothing_else(
        tok, train_set, stage):
    for batch in made(train_set, stage, range(5), size=8):
        for row, wanted in zip(batch.idx.tolist(), batch.targets.tolist()):
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


@pytest.mark.parametrize("stage", [PLAIN, LONG])
def test_kept_are_the_positions_of_all_targets_and_words_are_those_that_end_no_text(tok, train_set, stage):
    for batch in made(train_set, stage, range(5)):
        asked = [(row * batch.idx.shape[1] + column, target) for row, targets in
                 enumerate(batch.targets.tolist()) for column, target in enumerate(targets) if target != -1]
        assert batch.keep.tolist() == [place for place, _ in asked]
        assert batch.words.tolist() == [target != tok.eot for _, target in asked]
        assert 0 < batch.words.sum() < len(asked)


def test_a_batch_has_two_facts_to_the_most_and_one_segment_to_the_most_and_says_if_it_is_of_the_most(
        tok, train_set):
    segments, facts = [], set()
    for batch in made(train_set, Stage(4, 3, 64), range(60)):
        n = batch.idx.shape[1] // 64
        segments.append(n)
        assert batch.longest == (n == 3)
        for row in batch.idx.tolist():
            end = max(i for i, t in enumerate(row) if t == tok.eot) + 1
            assert (n - 1) * 64 < end <= n * 64
            facts.add(len(MOVED.findall(tok.decode(row))))
    assert set(segments) == {1, 2, 3} and facts == {2, 3, 4}
    assert 30 <= segments.count(3) <= 50        # half of them, and a third of the other half


def test_a_stage_may_have_tasks_of_its_own_as_often_as_they_are_named(tok, train_set):
    stage = Stage.parse("4:0@qa1,qa4,qa4,qa4", 64)
    assert str(stage) == "4 facts of qa1, qa4, qa4, qa4"
    texts = [tok.decode(row) for batch in made(train_set, stage, range(40)) for row in batch.idx.tolist()]
    share = sum(" of the " in text for text in texts) / len(texts)     # "... is north of the ..."
    assert 0.6 < share < 0.9 and all("Where is" in text or " of the " in text for text in texts)


def test_with_background_a_batch_is_whole_segments_and_without_as_long_as_its_longest_document(
        tok, train_set):
    widths = {len(batch.idx[0]) for batch in made(train_set, LONG, range(20))}
    assert widths == {64, 128, 192}
    for stage, plain in ((PLAIN, 0.0), (LONG, 1.0)):
        for batch in made(train_set, stage, range(10), plain=plain):
            ends = [max(i for i, t in enumerate(row) if t == tok.eot) + 1 for row in batch.idx.tolist()]
            assert batch.idx.shape[1] == max(ends) and batch.longest == (stage == PLAIN)


def test_long_documents_come_in_smaller_batches(train_set):
    stage, few = Stage(3, 4, 64), dict(size=6, tokens=512)
    rows = {b.idx.shape[1] // 64: len(b.idx) for b in made(train_set, stage, range(40), **few)}
    assert rows == {1: 6, 2: 4, 3: 2, 4: 2}


@pytest.mark.parametrize("stage, tokens", [
    (Stage(3, 4, 64), 1), (Stage(3, 4, 64), 300), (Stage(3, 4, 64), 512),
    (Stage(10, 2, 32), 512), (Stage(10, 0, 32), 512)])      # ten facts fill three segments of 32 alone
def test_a_batch_has_no_more_tokens_than_it_may_unless_that_is_a_single_document(train_set, stage, tokens):
    sizes = [tuple(b.idx.shape) for b in made(train_set, stage, range(20), size=20, tokens=tokens)]
    assert [(rows, width) for rows, width in sizes if rows > 1 and rows * width > tokens] == []
    assert tokens == 1 or max(rows for rows, _ in sizes) > 1


def test_a_batch_without_background_has_all_its_documents_however_long_a_segment_is(train_set):
    batch, = made(train_set, Stage(2, 0, 16384), [0], tokens=4096)
    assert batch.idx.shape[0] == 4


def test_a_share_of_the_batches_is_plain(tok, train_set):
    def plain(stage, share, count):
        batches = made(train_set, stage, range(count), plain=share, size=2)
        prose = [any("The " in tok.decode(row) for row in batch.idx.tolist()) for batch in batches]
        assert all(has for has, batch in zip(prose, batches) if batch.idx.shape[1] > 64)
        return prose.count(False)
    assert plain(Stage(2, 0, 64), 0.0, 5) == 5 and plain(Stage(2, 4, 64), 0.0, 20) == 0
    assert 120 <= plain(Stage(2, 4, 64), 0.4, 400) <= 200


def test_other_numbers_seeds_and_stages_give_other_documents(train_set):
    one, two = made(train_set, LONG, range(2))
    (other,), (stage,) = made(train_set, LONG, [0], seed=1), made(train_set, Stage(6, 3, 32), [0])
    assert len({tuple(batch.idx[0].tolist()) for batch in (one, two, other, stage)}) == 4


@pytest.mark.parametrize("stage, least, most", [(LONG, 0.3, 0.6), (Stage(12, 3, 64), 0.65, 0.9),
                                                (Stage(12, 0, 64), 0.65, 0.9)])
def test_half_of_the_documents_with_background_and_more_of_those_with_many_facts_are_asked_earlier_too(
        tok, train_set, stage, least, most):
    early = []
    for batch in made(train_set, stage, range(30), asides=3, tasks=("qa1",)):
        for row, targets in zip(batch.idx.tolist(), batch.targets.tolist()):
            ends = [i for i, target in enumerate(targets) if target == tok.eot]
            for end in ends:
                start = max(i for i in range(end) if targets[i] == -1) + 1      # where it is asked for
                before = tok.decode([t for t in row[:start + 1] if t != tok.eot])
                actor = re.search(r"Where is (\w+)\?$", before)[1]
                assert tok.decode(row[start + 1:end + 1]) == f" {last_rooms(before)[actor]}"
            early.append(bool(MOVED.search(tok.decode(row[ends[0]:]))))         # facts behind an answer
    assert least < sum(early) / len(early) < most
    assert all(map(same, made(train_set, PLAIN, range(3), asides=3), made(train_set, PLAIN, range(3))))


@pytest.mark.parametrize("stage", [PLAIN, LONG])
def test_a_padded_batch_asks_the_same_of_the_same_tokens(tok, train_set, stage):
    for batch in made(train_set, stage, range(5), size=8):
        rows, T = batch.idx.shape
        wide = batch.padded(T + 96, 64)
        assert wide.idx.shape == wide.targets.shape == (rows, T + 96) and len(wide.keep) % 64 == 0
        assert torch.equal(wide.idx[:, :T], batch.idx) and torch.equal(wide.targets[:, :T], batch.targets)
        assert not wide.idx[:, T:].any() and (wide.targets[:, T:] == -1).all()
        n, asked = len(batch.keep), wide.targets.flatten()[wide.keep]
        assert len(wide.keep) - n < 64 and wide.longest == batch.longest
        assert torch.equal(asked[:n], batch.targets.flatten()[batch.keep]) and (asked[n:] == -1).all()
        assert torch.equal(wide.words[:n], batch.words) and not wide.words[n:].any()
        assert same(batch.padded(T, 1), batch)


# In turn

def given(builder, workers, steps, start=0, stages=((0, LONG),)):
    """Batches start .. steps, entering each of stages = (number, stage) when it comes to that number."""
    stages = dict(stages)
    run = Batches(maker(builder, plain=0.2), stages[max(n for n in stages if n <= start)], start, workers)
    out = []
    for n in range(start, steps):
        if n > start and n in stages:
            run.enter(stages[n])
        out.append(next(run))
    return out


@pytest.fixture(scope="module")
def straight(train_set):
    return made(train_set, LONG, range(24), plain=0.2)


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_whatever_the_workers_and_wherever_a_run_begins_a_number_is_the_same_batch(
        train_set, straight, workers, start):
    batches = given(train_set, workers, 24, start)
    assert len(batches) == 24 - start and all(map(same, batches, straight[start:]))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stage_is_entered_at_once_though_batches_of_the_one_before_are_made_already(train_set, workers):
    stages = [(0, PLAIN), (5, LONG), (6, PLAIN), (20, Stage(3, 2, 32)), (22, PLAIN)]    # 4 and 8 are ahead
    expected = [made(train_set, stage, range(n, end), plain=0.2) for (n, stage), end in
                zip(stages, [n for n, _ in stages[1:]] + [40])]
    batches = given(train_set, workers, 40, stages=stages)
    assert all(map(same, batches, itertools.chain(*expected))) and len(batches) == 40


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stage_may_follow_upon_the_same_stage(train_set, straight, workers):
    batches = given(train_set, workers, 24, stages=[(0, LONG), (5, LONG)])
    assert all(map(same, batches, straight)) and len(batches) == 24


def test_a_maker_can_be_sent_to_a_worker_that_shares_no_memory(train_set, straight):
    assert same(pickle.loads(pickle.dumps(maker(train_set, plain=0.2)))[LONG, 3][1], straight[3])


def test_a_worker_leaves_ctrl_c_to_the_process_that_it_works_for(train_set):
    made = Batches(maker(train_set), Stage(2, 0, 32), workers=1)
    next(made)
    (worker,) = made.loader._workers
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(8):                          # more than are made ahead
        next(made)
    assert worker.is_alive()
    made.loader = None


# The command

@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_command_prints_how_fast_a_stage_is_made(train_set, monkeypatch, capsys, workers):
    monkeypatch.setattr(batches, "Builder", lambda *_: train_set)
    batches.main(["--stage", "4:2:32", "--n", "3", "--workers", workers])
    assert re.fullmatch(r"4 facts in 2 x 32: [\d.]+ ms a batch, [\d,]+ tokens/s\n", capsys.readouterr().out)


@pytest.mark.parametrize("flags, named", [
    (["--stage", "4"], "'4'"), (["--stage", "4:x"], "4:x"), (["--stage", "1:0"], "1:0"),
    (["--stage", "4:2:999"], "4:2:999"), (["--stage", "4:2:32:1"], "4:2:32:1"), (["--nope"], "--nope"),
    (["--workers", "few"], "few"), (["--tasks", "qa99"], "qa99"), (["--stage", "4:2@qa98"], "qa98"),
    (["--n", "0"], "--n 0")])
def test_the_command_names_a_flag_that_cannot_be(train_set, monkeypatch, capsys, flags, named):
    monkeypatch.setattr(batches, "Builder", lambda *_: train_set)
    assert named in refused(capsys, batches.main, *flags)


# The curriculum

def course(**changes):
    stages = [Stage.parse(text, 64) for text in ("2:0", "4:2:32", "6:3")]
    return Curriculum(**dict(stages=stages, leave_at=0.75, leave_plain_at=0.75, window=4, steps=50) | changes)


def test_a_stage_is_left_when_its_latest_steps_are_right_often_enough():
    c = course()
    c.recent.extend([0.5, 1.0, 0.5, 0.9])
    c.steps = 10
    assert c.advance() is None and c.at == 0
    c.recent.extend([1.0, 0.6])                 # the latest four are 0.5, 0.9, 1.0 and 0.6
    assert c.advance() == "2 facts 75% after 10 steps, now 4 facts in 2 x 32"
    assert (c.at, c.steps, list(c.recent), c.stage) == (1, 0, [], Stage(4, 2, 32))


def test_a_stage_without_background_has_a_share_of_its_own():
    c = course(leave_plain_at=0.9)
    c.recent.extend([0.8] * 4)
    assert c.advance() is None
    c.recent.extend([0.95] * 4)
    assert c.advance() and c.stage.segments
    c.recent.extend([0.8] * 4)
    assert c.advance() and c.last


def test_a_stage_is_not_left_before_its_window_of_steps_is_full():
    c = course()
    c.recent.extend([1.0] * 3)
    assert c.advance() is None and c.at == 0


def test_a_stage_is_left_when_its_steps_are_spent():
    c = course()
    c.steps = 49
    assert c.advance() is None
    c.steps = 50
    assert c.advance() and c.at == 1


def test_the_last_stage_is_never_left():
    c = course()
    c.at, c.steps = 2, 10_000
    c.recent.extend([1.0] * 4)
    assert c.last and c.advance() is None and c.at == 2
