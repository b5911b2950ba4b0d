"""train.py on a tiny model: what a run writes, its steps, its schedule, its processes, how it stops
and goes on, its flags.

    python -m pytest tests/test_train.py -q

Most tests call train.main and read what it has written. To start a process takes seconds, so few
tests do.
"""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import babilong_eval
import sample
import train
from data import babi, background, common
from data.babilong import Builder
from data.common import JsonLines, interrupts_kept
from data.lessons import Batches, Lessons, parse_stages
from data.recipes import PRESETS, RECIPE_OF, RECIPES
from data.tokenizer import load, of_checkpoint
from lm2 import LM2, LM2Config, Memory, load_checkpoint
from test_babilong import asked_in, book

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

SIZES = dict(
    n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, n_slot=4, n_mem_head=2, n_mem_layer=2
)
MODEL_CFG = LM2Config(vocab_size=2048, segment_len=64, rope_theta=1000.0, **SIZES)
MODEL = []
for size_name, size in dict(SIZES, segment_len=64).items():
    MODEL += [f"--{size_name}", str(size)]
QUICK = (
    "--batch_size 4 --accumulate 1 --threads 1 --device cpu "
    "--table_lengths 0k --table_n 2 --eval_n 2"
)
TINY = [*MODEL, *QUICK.split()]
CONSTANTS = dict(LOG_EVERY=1, WARMUP_STEPS=5)
TRUE_CONSTANTS = dict(LOG_EVERY=train.LOG_EVERY, WARMUP_STEPS=train.WARMUP_STEPS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a book."""
    path = tmp_path_factory.mktemp("books")
    (path / "book.txt").write_text(book(600), encoding="utf-8")
    return path


@contextlib.contextmanager
def constants(**changes):
    """Within it train.py has other constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (CONSTANTS | changes).items():
            patch.setattr(train, name, value)
        yield


@pytest.fixture(scope="session")
def fit(folder):
    """fit(out_dir, flags, more flags, **constants) trains the tiny model -> what it printed."""

    def run(out, *flags, **changes):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), constants(**changes):
            argv = ["--out_dir", str(out), *" ".join(flags).split()]
            if "--resume" not in argv:
                argv = [*TINY, "--background", str(folder), *argv]
            train.main(argv)
        return printed.getvalue()

    return run


@pytest.fixture(scope="session")
def interrupted(fit):
    """interrupted(out_dir, step, flags ...) trains until Ctrl-C is pressed in a step (from 0).

    by  another signal in its place"""

    def run(out, step, *flags, by=signal.SIGINT, **changes):
        def press(i):
            if i == step:  # a terminal sends it to all processes
                for other in multiprocessing.active_children():
                    os.kill(other.pid, by)
                os.kill(os.getpid(), by)

        with pytest.MonkeyPatch.context() as patch:
            before_step(patch, press)
            with pytest.raises(SystemExit) as stop:
                fit(out, *flags, **changes)
        assert stop.value.code == 130

    return run


@pytest.fixture(scope="session")
def trained(fit, tmp_path_factory):
    """A tiny model trained for a few seconds: its folder, and what train.py printed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = "--tokens 12000 --stages 2:0 3:2 --stage_steps 40 --lr 1e-2 --eval_every 5000"
    table_flags = "--table_lengths 0k 150 --table_n 3"
    return out, fit(out, flags, table_flags, LEAVE_WINDOW=6)


def lines(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def step_lines(out):
    """The lines of a log that belong to steps, not to validations."""
    return [row for row in lines(out / "metrics.jsonl") if "loss" in row]


def refused(capsys, main, *argv):
    """The one line on standard error with which main(argv) ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err and "usage" not in err and len(err) > 20
    return err


def same_tensors(a, b):
    """Whether two nests of tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def content(out, name):
    """A part of the checkpoint in a folder."""
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)[name]


def end_of(out):
    """All that decides how the run in a folder goes on."""
    names = ("model", "optimizer", "curriculum", "progress", "config", "tokenizer")
    end = {name: content(out, name) for name in names}
    del end["progress"]["seconds"]
    return end


def weights_differ_by(a, b):
    """The largest difference between the weights of the checkpoints in two folders."""
    first = content(a, "model")
    second = content(b, "model")
    return max((first[name] - second[name]).abs().max().item() for name in first)


def before_step(monkeypatch, action):
    """action(i) is called when the first process's optimiser takes its step i."""
    numbers = itertools.count()
    real = torch.optim.AdamW.step
    pid = os.getpid()

    def step(self, *args, **options):
        if os.getpid() == pid:
            action(next(numbers))
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


# What a run writes


def test_a_run_writes_a_checkpoint_a_log_and_a_table_and_no_other_file(trained):
    names = {path.name for path in trained[0].iterdir()}
    assert names == {"ckpt.pt", "metrics.jsonl", "table.jsonl"}


def test_before_the_first_step_a_table_says_what_is_trained_on_what(trained):
    model, _ = load_checkpoint(trained[0] / "ckpt.pt")
    total, memory = model.n_params()
    head = trained[1].split("validation")[0]
    for words in (
        f"lm2, {total:,} parameters, {memory:,} of them memory",
        "2 blocks of width 16, 4 slots in each of the blocks 0 1",
        "segments of 64 tokens",
        "qa1, with the preset cpu",
        "2, from 2:0 to 3:2",
        "cpu (asked for), float32, 1 thread",
    ):
        assert words in head


def test_a_run_ends_with_the_table_of_its_predictions(trained):
    rows = babilong_eval.load(trained[0] / "table.jsonl")
    assert len(rows) == 2 * 3 * 2  # lengths, questions, with the memory and without
    expected = babilong_eval.table(babilong_eval.to_cells(rows))
    assert trained[1].rstrip().endswith(expected.rstrip())


def test_a_checkpoint_gives_back_weights_sizes_settings_and_tokenizer(trained):
    model, saved = load_checkpoint(trained[0] / "ckpt.pt")
    assert model.cfg == MODEL_CFG
    assert of_checkpoint(saved, trained[0]).ranks == load().ranks
    cfg = train.TrainConfig(**saved["train"])
    assert (cfg.stages, cfg.lr, cfg.tasks) == (("2:0", "3:2"), 1e-2, ("qa1",))


def test_sample_answers_with_a_room_from_the_checkpoint(trained, capsys):
    argv = ["--ckpt", str(trained[0] / "ckpt.pt"), "--prompt"]
    sample.main([*argv, "Mary went to the garden. Where is Mary?"])
    rooms = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    assert capsys.readouterr().out.strip() in rooms


def test_every_line_of_the_log_has_the_step_and_the_tokens_so_far(trained):
    steps = step_lines(trained[0])
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    names = {"tokens", "seconds", "accuracy", "lr", "stage", "grad_norm", "tokens_per_second"}
    assert all(names <= set(row) for row in steps)
    tokens = [row["tokens"] for row in steps]
    assert tokens == sorted(set(tokens))
    assert tokens[-2] < 12000 <= tokens[-1]


def test_a_run_validates_each_time_when_so_many_tokens_have_passed(trained):
    due = []
    for before, after in itertools.pairwise(step_lines(trained[0])):
        if after["tokens"] // 5000 > before["tokens"] // 5000:
            due.append(after["step"])
    validations = [row for row in lines(trained[0] / "metrics.jsonl") if "validation" in row]
    assert [row["step"] for row in validations] == due
    assert len(due) == 2
    assert all(set(row["validation"]) == {"qa1 0k", "qa1 150"} for row in validations)


def test_a_line_has_the_mean_loss_since_the_line_before_and_the_other_numbers_of_its_step(
    fit, tmp_path
):
    flags = "--tokens 700 --stages 2:0"
    fit(tmp_path / "each", flags)
    fit(tmp_path / "third", flags, LOG_EVERY=3)
    each = step_lines(tmp_path / "each")
    third = step_lines(tmp_path / "third")
    last = len(each)
    assert last > 6
    assert [row["step"] for row in third] == sorted({*range(3, last + 1, 3), last})
    before = 0
    for row in third:
        losses = [line["loss"] for line in each[before : row["step"]]]
        now = each[row["step"] - 1]
        assert row["loss"] == pytest.approx(statistics.mean(losses), abs=2e-6)
        for name in ("tokens", "accuracy", "grad_norm", "lr", "stage"):
            assert row[name] == now[name]
        before = row["step"]


def test_the_rate_of_a_line_leaves_the_validation_out(fit, tmp_path, monkeypatch):
    now = [0.0]
    evaluate = train.evaluate

    def wait_ten_seconds(_):
        now[0] += 10.0

    def evaluate_slowly(*args, **options):
        now[0] += 1000.0
        return evaluate(*args, **options)

    before_step(monkeypatch, wait_ten_seconds)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "evaluate", evaluate_slowly)
    printed = fit(tmp_path, "--tokens 1100 --stages 2:0 --eval_every 400", LOG_EVERY=2)
    assert sum("validation" in row for row in lines(tmp_path / "metrics.jsonl")) == 2
    before = dict(step=0, tokens=0)
    rates = []
    for row in step_lines(tmp_path):
        seconds = 10 * (row["step"] - before["step"])
        rates.append((row["tokens"] - before["tokens"]) / seconds)
        assert row["tokens_per_second"] == round(rates[-1])
        before = row
    assert f"({statistics.median(rates):,.0f} tokens/s)" in printed


# A step


def test_the_steps_are_those_of_plain_pytorch(fit, folder, tmp_path):
    """The mean of the micro-batches' losses, its gradient, cut if it is long, and AdamW, which
    decays matrices alone. The accuracy leaves the end of text out, which is learned first."""
    fit(tmp_path, "--tokens 6000 --stages 3:2:32 --plain 0.3 --lr 1e-2 --accumulate 3", CLIP=0.5)
    cfg = train.TrainConfig(**content(tmp_path, "train"))
    lessons = train.make_story_data(cfg, load(), 128).batches
    (stage,) = parse_stages(cfg.stages, 64, cfg.tasks, whole=False)
    torch.manual_seed(0)
    model = LM2(MODEL_CFG)
    groups = []
    for is_matrix, decay in ((True, 0.1), (False, 0.0)):
        chosen = [p for p in model.parameters() if (p.ndim == 2) == is_matrix]
        groups.append(dict(params=chosen, weight_decay=decay))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    n_ends_right = 0
    n_cut = 0
    numbers = itertools.count()
    for row in step_lines(tmp_path):
        losses = []
        n_right = 0
        n_words = 0
        for number in itertools.islice(numbers, 3):
            _, batch = lessons[stage, number]
            segment_len = min(stage.segment_len, batch.idx.shape[1])
            logits, _, _ = model(batch.idx, segment_len=segment_len)
            logits = logits.flatten(0, 1)[batch.at]
            losses.append(F.cross_entropy(logits, batch.targets))
            is_right = logits.argmax(-1) == batch.targets
            is_word = batch.targets != load().eot
            n_words += is_word.sum().item()
            n_right += is_right[is_word].sum().item()
            n_ends_right += is_right[~is_word].sum().item()
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        n_cut += norm.item() > 0.5
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert row["accuracy"] == pytest.approx(n_right / n_words, abs=1e-6)
    assert row["step"] > 5
    assert n_ends_right > 0 and n_cut > 0
    for name, weight in content(tmp_path, "model").items():
        assert (weight - model.state_dict()[name]).abs().max() < 1e-4, name


def test_nothing_is_fetched_from_the_device_within_a_step(fit, tmp_path, monkeypatch):
    fetched = []
    in_step = [False]
    real_next = Batches.__next__
    real_fetch = train.fetch

    def next_batch(self):
        batch = real_next(self)
        in_step[0] = True
        return batch

    def fetch(*args):
        in_step[0] = False
        return real_fetch(*args)

    def watch(name):
        real = getattr(torch.Tensor, name)

        def watched(self, *args, **options):
            if in_step[0]:
                fetched.append(name)
            return real(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero"):
        watch(name)
    monkeypatch.setattr(Batches, "__next__", next_batch)
    monkeypatch.setattr(train, "fetch", fetch)
    fit(tmp_path, "--tokens 4000 --stages 3:2:32 --accumulate 2", LOG_EVERY=4)
    assert len(step_lines(tmp_path)) >= 2
    assert fetched == []


@pytest.mark.parametrize("stage, longest", [("2:0", 64), ("12:2:32", 32)])
def test_a_document_is_read_in_segments_of_its_stage_and_the_last_is_not_written(
    fit, tmp_path, monkeypatch, stage, longest
):
    calls = []
    writes = []
    forward = LM2.forward
    write = Memory.write

    def watched_forward(self, idx, *args, segment_len=None, **options):
        calls.append((idx.shape[1], segment_len))
        return forward(self, idx, *args, segment_len=segment_len, **options)

    def watched_write(self, *args):
        writes.append(self)
        return write(self, *args)

    monkeypatch.setattr(LM2, "forward", watched_forward)
    monkeypatch.setattr(Memory, "write", watched_write)
    monkeypatch.setattr(train, "ask", lambda *args, **options: [])
    monkeypatch.setattr(train, "table", lambda rows: "")
    fit(tmp_path, "--plain 0 --tokens 1 --stages", stage)
    ((n_tokens, segment_len),) = calls
    assert segment_len == min(longest, n_tokens)
    assert n_tokens % segment_len == 0
    n_segments = n_tokens // segment_len
    assert n_segments == 1 if stage == "2:0" else n_segments > 1
    assert len(writes) == (n_segments - 1) * SIZES["n_layer"]


def test_the_loss_falls_from_that_of_guessing_to_that_of_knowing_the_rooms(trained):
    losses = [row["loss"] for row in step_lines(trained[0])]
    assert abs(losses[0] - math.log(2048)) < 0.3
    assert sum(losses[-10:]) / 10 < 2.2


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_gradient_that_is_not_finite_ends_in_a_line_with_its_step_and_is_not_saved(
    capsys, folder, tmp_path, monkeypatch, log_every
):
    count = itertools.count()
    real = torch.nn.utils.clip_grad_norm_

    def spoiled(*args):
        norm = real(*args)
        return norm * math.inf if next(count) == 2 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    with constants(LOG_EVERY=log_every):
        flags = ["--tokens", "1500", "--background", folder, "--out_dir", tmp_path]
        err = refused(capsys, train.main, *TINY, *flags)
    assert "the gradient is inf at step 3: train anew with a lower --lr" in err
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("flags", ["--no-bfloat16", "--no-bfloat16 --recompute", "--compile", ""])
def test_steps_as_cuda_graphs_have_the_numbers_of_steps_without(fit, tmp_path, flags):
    run = "--tokens 20000 --stages 3:2 --device cuda"
    fit(tmp_path / "graphs", run, flags)
    fit(tmp_path / "plain", run, flags, "--no-graphs")
    rtol = 1e-3 if "--no-bfloat16" in flags else 0.05
    pairs = zip(step_lines(tmp_path / "graphs"), step_lines(tmp_path / "plain"), strict=True)
    for one, other in pairs:
        assert one["loss"] == pytest.approx(other["loss"], rel=rtol)


def test_a_graph_is_recorded_at_a_shapes_second_call_and_replayed_with_what_it_is_given(
    monkeypatch,
):
    """On any machine, with graphs that write down a call and make it when they are replayed."""
    recording = []  # the graph that is being recorded
    made = []

    def f(factor, x, y):
        if not recording:
            return torch.stack([factor * x.sum(), y.sum()])
        recording[0].call = (factor, x, y)
        recording[0].output = torch.full((2,), math.nan)
        return recording[0].output

    class Graph:
        def __init__(self):
            made.append(self)

        def replay(self):
            self.output.copy_(f(*self.call))

    @contextlib.contextmanager
    def record(graph, **_):
        recording.append(graph)
        yield
        recording.clear()

    fakes = dict(CUDAGraph=Graph, graph=record, graph_pool_handle=int, empty_cache=int)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    run = train.CudaGraphs(f)
    pairs = []  # kept: a later call must not change an earlier answer
    for n_calls in range(3):
        for factor, n in ((1, 3), (2, 3), (1, 5)):
            x = torch.rand(n)
            y = torch.rand(2)
            pairs.append((run(factor, x, y), f(factor, x, y)))
        assert len(made) == (3 if n_calls else 0)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_in_bfloat16_says_so_and_ends_near_the_one_in_float32(fit, tmp_path):
    printed = {}
    weights = {}
    for flag in ("--no-bfloat16", "--bfloat16"):
        printed[flag] = fit(tmp_path / flag, "--tokens 600 --stages 2:0", flag)
        model = content(tmp_path / flag, "model")
        weights[flag] = torch.cat([tensor.flatten() for tensor in model.values()])
    assert ", float32, " in printed["--no-bfloat16"]
    assert ", bfloat16, " in printed["--bfloat16"]
    assert weights["--bfloat16"].dtype == torch.float32
    distance = (weights["--bfloat16"] - weights["--no-bfloat16"]).norm()
    assert 1e-6 < distance / weights["--no-bfloat16"].norm() < 0.05


# The schedule


@pytest.mark.parametrize(
    "step, share_done, rate",
    [
        (0, 0.0, 0.1),
        (4, 0.0, 0.5),
        (9, 0.01, 1.0),
        (100, 0.8, 1.0),
        (100, 0.9, 0.5),
        (100, 1.0, 0.0),
        (100, 1.1, 0.0),
    ],
)
def test_the_learning_rate_warms_up_and_ends_at_zero(step, share_done, rate):
    cfg = train.TrainConfig(lr=1.0, decay=0.2)
    with constants(WARMUP_STEPS=10):
        assert train.learning_rate(cfg, step, share_done) == pytest.approx(rate, abs=1e-6)


def test_the_learning_rate_of_every_step_is_that_of_the_schedule(trained):
    cfg = train.TrainConfig(**content(trained[0], "train"))
    tokens = 0
    with constants():
        for step, row in enumerate(step_lines(trained[0])):
            expected = train.learning_rate(cfg, step, tokens / 12000)
            assert row["lr"] == pytest.approx(expected, abs=1e-8)
            tokens = row["tokens"]


def test_a_run_ends_so_many_tokens_into_its_last_stage_with_a_rate_of_zero(fit, tmp_path):
    flags = "--tokens 20000 --final_tokens 1000 --stages 2:0 3:0 4:0 --stage_steps 3"
    fit(tmp_path, flags)
    rows = step_lines(tmp_path)
    assert [row["stage"] for row in rows[:8]] == [0] * 3 + [1] * 3 + [2] * 2
    end = rows[5]["tokens"] + 1000  # after two stages of three steps
    assert rows[-2]["tokens"] < end <= rows[-1]["tokens"]
    share_left = 1 - rows[-2]["tokens"] / end
    assert rows[-1]["lr"] == pytest.approx(2e-3 * share_left / 0.25, abs=1e-8)


def test_a_call_ends_after_its_minutes_and_a_run_after_those_of_all_calls_with_a_rate_of_zero(
    fit, tmp_path, monkeypatch
):
    clock = itertools.count()  # a second passes at each look at it
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    flags = "--tokens 1000000 --stages 2:0 --total_minutes 1 --decay 0.5"
    printed = fit(tmp_path, flags, "--minutes 0.25")
    assert "exact match" in printed
    assert 15 <= content(tmp_path, "progress")["seconds"] < 20
    fit(tmp_path, "--resume")  # the limit of an earlier call does not count
    assert 60 <= content(tmp_path, "progress")["seconds"] < 66
    rates = {row["seconds"]: row["lr"] for row in step_lines(tmp_path)}
    assert max(rates.values()) == pytest.approx(2e-3)
    assert min(rates.values()) < 3e-4
    for at, rate in rates.items():
        if 20 < at < 30:
            assert rate == pytest.approx(2e-3)


def test_only_steps_with_the_stages_longest_documents_count_towards_its_end(
    fit, tmp_path, monkeypatch
):
    longest = []
    real_next = Batches.__next__

    def watched(self):
        batch = real_next(self)
        longest.append(batch.idx.shape[1] == 3 * 64)
        return batch

    monkeypatch.setattr(Batches, "__next__", watched)
    fit(tmp_path, "--stages 3:3 --tokens 6000", LOG_EVERY=3)
    assert 0 < sum(longest) < len(longest)
    accuracies = content(tmp_path, "curriculum")["recent"]
    assert len(accuracies) == min(sum(longest), train.LEAVE_WINDOW)


def test_a_stage_ends_when_its_answers_are_right_and_the_next_one_has_other_documents(
    fit, tmp_path, monkeypatch
):
    seen = []
    forward = LM2.forward

    def watched(self, idx, targets=None, *args, segment_len=None, **options):
        if targets is not None:
            seen.append(segment_len)
        return forward(self, idx, targets, *args, segment_len=segment_len, **options)

    monkeypatch.setattr(LM2, "forward", watched)
    flags = "--stages 2:0 4:2:32 6:3 --leave_plain_at 0 --leave_at 1.0 --tokens 4000 --plain 0"
    printed = fit(tmp_path, flags, LEAVE_WINDOW=3, LOG_EVERY=2)
    stages = [row["stage"] for row in step_lines(tmp_path)]
    assert stages.index(1) == 2  # lines of steps 2 and 4: the window of 3 was full at 4
    assert max(stages) == 1  # 4:2:32 is never learned to 100 %
    assert max(seen[:4]) <= 64
    assert set(seen[4:]) == {32}
    assert "2 facts" in printed and "now 4 facts in 2 x 32" in printed


# Stopping and going on

SHORT_RUN = "--stages 2:0 4:3:16 3:2 --stage_steps 4 --plain 0.3 --tokens 6000 --accumulate 2"
SHORT_RUN_CONSTANTS = dict(LOG_EVERY=2, LEAVE_WINDOW=64)  # the window holds all of the last stage


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """The folder of a run of three stages in one go, with validations."""
    out = tmp_path_factory.mktemp("straight") / "run"
    fit(out, SHORT_RUN, "--eval_every 1500", **SHORT_RUN_CONSTANTS)
    return out


@pytest.fixture(scope="module")
def cut(interrupted, tmp_path_factory):
    """The folder of the same run, interrupted between two lines of the log, in its third stage."""
    out = tmp_path_factory.mktemp("cut") / "run"
    interrupted(out, 10, SHORT_RUN, "--eval_every 1500", **SHORT_RUN_CONSTANTS)
    return out


def logged(out):
    """The lines of a log but those around the cut, without what the clock decides."""
    rows = []
    for row in lines(out / "metrics.jsonl"):
        for name in ("seconds", "tokens_per_second"):
            row.pop(name, None)
        if row["step"] not in (11, 12):
            rows.append(row)
    return rows


def answers(out):
    return [row["output"] for row in lines(out / "table.jsonl")]


def test_interrupted_and_resumed_a_run_ends_bit_for_bit_as_in_one_go(fit, straight, cut, tmp_path):
    assert content(cut, "progress")["step"] == 11
    assert content(cut, "curriculum")["number"] == 2
    assert not (cut / "table.jsonl").exists()
    out = shutil.copytree(cut, tmp_path / "run")
    fit(out, "--resume", **SHORT_RUN_CONSTANTS)
    assert same_tensors(end_of(out), end_of(straight))
    assert answers(out) == answers(straight)
    assert logged(out) == logged(straight)


def test_workers_validations_the_signal_and_how_it_is_computed_decide_nothing(
    fit, interrupted, straight, tmp_path, monkeypatch
):
    compiled = []
    monkeypatch.setattr(train, "compile_blocks", lambda model, dynamic: compiled.append(model))
    flags = (SHORT_RUN, "--workers 1")
    interrupted(tmp_path, 10, *flags, by=signal.SIGTERM, **SHORT_RUN_CONSTANTS)
    fit(tmp_path, "--resume --workers 0 --recompute --compile --eval_n 1", **SHORT_RUN_CONSTANTS)
    (model,) = compiled
    assert model.recompute
    assert same_tensors(end_of(tmp_path), end_of(straight))
    assert answers(tmp_path) == answers(straight)


def test_a_finished_run_that_is_resumed_takes_no_step_and_evaluates_again(fit, straight, tmp_path):
    out = shutil.copytree(straight, tmp_path / "run")
    printed = fit(out, "--resume", "--table_n", "4")
    assert same_tensors(end_of(out), end_of(straight))
    assert len(babilong_eval.load(out / "table.jsonl")) == 2 * 4
    assert "exact match" in printed


def test_interrupted_before_a_validation_a_run_saves_and_does_not_validate(
    capsys, interrupted, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: pytest.fail("it validated first"))
    interrupted(tmp_path, 0, "--tokens 100000 --stages 2:0 --eval_every 1")
    assert content(tmp_path, "progress")["step"] == 1
    assert capsys.readouterr().err == "train.py: interrupted\n"


def test_a_second_ctrl_c_ends_at_once_unless_it_is_an_echo_of_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interrupts = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_kept(interrupts):
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1.5
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts == [100.0]
        now[0] += 1.0
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")
    assert signal.getsignal(signal.SIGINT) is before


def fill_the_disk(content, file, *_, **__):
    file.write(b"half of it")
    try:
        raise OSError(28, "No space left on device")
    finally:  # as torch does
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")


def test_on_a_full_disk_the_old_checkpoint_stays_byte_for_byte(capsys, cut, tmp_path, monkeypatch):
    out = shutil.copytree(cut, tmp_path / "run")
    before = (out / "ckpt.pt").read_bytes()
    monkeypatch.setattr(torch, "save", fill_the_disk)
    err = refused(capsys, train.main, "--resume", "--out_dir", out)
    assert f"{out / 'ckpt.pt'}: No space left on device" in err
    assert (out / "ckpt.pt").read_bytes() == before
    assert not (out / "ckpt.pt.tmp").exists()


def test_a_checkpoint_that_cannot_be_written_is_named(capsys, cut, tmp_path):
    out = shutil.copytree(cut, tmp_path / "run")
    (out / "ckpt.pt.tmp").mkdir()  # where the new one would be written
    assert "ckpt.pt" in refused(capsys, train.main, "--resume", "--out_dir", out)
    assert (out / "ckpt.pt").read_bytes() == (cut / "ckpt.pt").read_bytes()


@pytest.mark.parametrize("rest", ['{"step": 3}\n{"step": 4}\n', '{"step"', "\0\0"])
def test_a_log_goes_on_behind_the_step_of_the_checkpoint(tmp_path, rest):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + rest, encoding="utf-8")
    with JsonLines(path, 2) as log:
        log.write(step=3)
    assert [row["step"] for row in lines(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["x}", "5", "{}"])
def test_a_log_that_cannot_be_read_is_left_as_it_was(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"m\.jsonl: line 2 is not a line of a run"):
        JsonLines(path, 1)
    assert path.read_text(encoding="utf-8") == f'{{"step": 1}}\n{line}\n'


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_two_runs_at_once_in_one_folder_are_refused(capsys, folder, tmp_path):
    with JsonLines(tmp_path / "metrics.jsonl", None) as log:
        log.write(step=0)
        flags = [*TINY, "--background", folder, "--out_dir", tmp_path]
        err = refused(capsys, train.main, *flags)
        assert "another run writes" in err and str(tmp_path) in err
        assert lines(tmp_path / "metrics.jsonl") == [dict(step=0)]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_on_a_file_system_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "flock", no_locks)
    with JsonLines(tmp_path / "metrics.jsonl", None) as log:
        log.write(step=0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_where_the_prose_has_moved_a_run_goes_on_with_the_same_but_not_with_another(
    capsys, fit, folder, tmp_path
):
    books = tmp_path / "books"
    shutil.copytree(folder, books)
    fit(tmp_path / "run", f"--background {books} --tokens 400 --stages 2:0 --minutes 0")
    moved = books.rename(tmp_path / "moved")
    err = refused(capsys, train.main, "--resume", "--out_dir", tmp_path / "run")
    assert str(books) in err
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text(book(700), encoding="utf-8")
    argv = ["--resume", "--out_dir", tmp_path / "run", "--background"]
    assert "other texts than" in refused(capsys, train.main, *argv, other)
    fit(tmp_path / "run", f"--resume --background {moved}")
    assert content(tmp_path / "run", "progress")["tokens"] >= 400


def test_a_copied_run_goes_on_where_it_lies_and_leaves_the_original_alone(fit, tmp_path):
    fit(tmp_path / "run", "--tokens 400 --stages 2:0 --minutes 0")
    original = (tmp_path / "run" / "ckpt.pt").read_bytes()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    fit(tmp_path / "copy", "--resume")
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == original
    assert content(tmp_path / "copy", "train")["out_dir"] == str(tmp_path / "copy")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="the system has no process groups")
@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_run_saves_it_also_with_workers(folder, tmp_path):
    where = ["--background", str(folder), "--out_dir", str(tmp_path)]
    flags = ["--tokens", "10000000", "--stages", "2:0", "--workers", "1", "--processes", "1"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *flags, *where]
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() or log.stat().st_size == 0:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "saved" in printed and (tmp_path / "ckpt.pt").is_file()


def test_the_bar_ends_where_the_last_stage_ends_the_run(fit, tmp_path, monkeypatch):
    totals = []
    update = train.tqdm.update

    def watched(bar, n):
        if bar.total:  # not the bar of the table, which has documents of no prose
            totals.append(bar.total)
        return update(bar, n)

    monkeypatch.setattr(train.tqdm, "update", watched)
    flags = "--tokens 90000 --final_tokens 500 --stages 2:0 3:0 --stage_steps 2"
    fit(tmp_path, flags, LOG_EVERY=1)
    end = content(tmp_path, "progress")["end"]
    assert totals[0] == 90000 and totals[-1] == end < 3000


# Several processes

TWO = "--accumulate 2 --processes 2"


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_also_interrupted_and_resumed(
    interrupted, fit, straight, tmp_path, monkeypatch
):
    training_threads = set()
    evaluation_threads = set()
    evaluate = train.evaluate

    def watched(*args, **options):
        evaluation_threads.add(torch.get_num_threads())
        return evaluate(*args, **options)

    monkeypatch.setattr(train, "evaluate", watched)
    before_step(monkeypatch, lambda i: training_threads.add(torch.get_num_threads()))
    flags = "--eval_every 1500 --threads 2 --processes 2"
    interrupted(tmp_path, 9, SHORT_RUN, flags, **SHORT_RUN_CONSTANTS)
    fit(tmp_path, "--resume --processes 2", **SHORT_RUN_CONSTANTS)
    one = step_lines(straight)
    two = step_lines(tmp_path)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "accuracy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5)
        for name in ("step", "tokens", "stage", "lr"):
            assert a[name] == b[name]
    assert weights_differ_by(straight, tmp_path) < 1e-5
    assert training_threads == {1}
    assert evaluation_threads == {2}
    assert torch.get_num_threads() == 1
    assert not multiprocessing.active_children()


def sum_some_gradients(processes, meet_at, found):
    """Sum up gradients that only some processes have."""
    processes.join(meet_at, "cpu")
    everywhere = torch.zeros(2, 3, requires_grad=True)
    in_second = torch.zeros(4, requires_grad=True)
    nowhere = torch.zeros(2, requires_grad=True)
    everywhere.grad = torch.full((2, 3), 1.0 + processes.rank)
    if processes.rank == 1:
        in_second.grad = torch.arange(4.0)
    parameters = [everywhere, in_second, nowhere]
    numbers = processes.sum_gradients(parameters, torch.tensor([1.0, 10.0 * processes.rank]))
    told = processes.told_by_first(7.0 + processes.rank, 0.1)
    gradients = [None if p.grad is None else p.grad.tolist() for p in parameters]
    found.put((processes.rank, gradients, numbers.tolist(), told))
    processes.leave()


def test_a_gradient_that_only_one_process_has_reaches_all_and_one_that_none_has_stays_none(
    tmp_path,
):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    found = context.SimpleQueue()
    others = []
    for rank in (0, 1):
        processes = train.Processes(rank=rank, n=2)
        arguments = (processes, f"file://{tmp_path}/meet", found)
        others.append(context.Process(target=sum_some_gradients, args=arguments))
        others[-1].start()
    results = [found.get(), found.get()]
    for other in others:
        other.join(10)
    expected = [[[3.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0], None]
    assert sorted(rank for rank, *_ in results) == [0, 1]
    for _, *result in results:
        assert result == [expected, [2.0, 10.0], [7.0, 0.1]]


@pytest.mark.parametrize(
    "threads, accumulate, processes",
    [(1, 2, 1), (2, 2, 2), (2, 4, 2), (4, 4, 4), (3, 4, 1), (8, 2, 1)],
)
def test_by_default_there_is_a_process_for_each_thread_or_one_with_them_all(
    threads, accumulate, processes
):
    cfg = train.TrainConfig(threads=threads, accumulate=accumulate, device="cpu")
    chosen = train.choose_processes(cfg)
    assert chosen.n == processes
    assert chosen.eval_threads == threads
    assert chosen.train_threads == (1 if processes > 1 else threads)


def test_processes_must_divide_the_micro_batches(capsys, folder, cut, tmp_path):
    where = ["--background", folder, "--out_dir", tmp_path]
    err = refused(capsys, train.main, *TINY, *where, "--accumulate", "3", "--processes", "2")
    assert "--processes 2 must divide --accumulate 3" in err
    err = refused(capsys, train.main, "--resume", "--out_dir", cut, "--processes", "3")
    assert "--processes 3 must divide --accumulate 2" in err


def test_several_processes_on_a_gpu_are_those_of_torchrun(monkeypatch):
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    assert train.choose_processes(train.TrainConfig(threads=2)).n == 1
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        train.choose_processes(train.TrainConfig(processes=2))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_in_one_line_and_the_checkpoint_is_whole(
    capfd, folder, tmp_path, monkeypatch
):
    killed_at = []

    def kill_the_other(i):
        if i == 6:
            (other,) = multiprocessing.active_children()
            os.kill(other.pid, signal.SIGKILL)
            killed_at.append(time.monotonic())

    before_step(monkeypatch, kill_the_other)
    flags = "--tokens 100000 --stages 2:0 --eval_every 500"
    where = ["--background", folder, "--out_dir", tmp_path]
    with constants():
        err = refused(capfd, train.main, *TINY, *TWO.split(), *flags.split(), *where)
    assert time.monotonic() - killed_at[0] < 15
    assert "has ended (exit code -9)" in err and "--resume" in err
    assert not multiprocessing.active_children()
    assert 0 < content(tmp_path, "progress")["step"] <= 7


def help_with_a_broken_story(*args):
    """In place of train.help_to_train: the fourth micro-batch cannot be made."""
    real = Lessons.__getitem__

    def broken(self, key):
        if key[1] == 3:  # the second process's, in the second step
            raise ValueError("a story of odd number")
        return real(self, key)

    Lessons.__getitem__ = broken
    train.help_to_train(*args)


@pytest.mark.slow
def test_a_mistake_in_a_step_of_another_process_is_told_once(capfd, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "help_to_train", help_with_a_broken_story)
    where = ["--background", folder, "--out_dir", tmp_path]
    err = refused(capfd, train.main, *TINY, *TWO.split(), *where)
    assert "train.py: process 1: a story of odd number" in err


@pytest.mark.slow
def test_a_mistake_that_all_processes_see_is_told_once(capfd, tmp_path):
    where = ["--background", tmp_path / "no books", "--out_dir", tmp_path]
    assert "no books" in refused(capfd, train.main, *TINY, *TWO.split(), *where)


# Processes of their own


def wait_for(is_there, process):
    """Wait until a program has come so far."""
    deadline = time.monotonic() + 100
    while not is_there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


TRUE_RUN = "--tokens 12000 --stages 2:0 3:2:32 --stage_steps 20 --accumulate 2"


@pytest.fixture(scope="module")
def true_run(fit, tmp_path_factory):
    """The folder of a run in one go with the constants of train.py."""
    out = tmp_path_factory.mktemp("true") / "run"
    fit(out, TRUE_RUN, **TRUE_CONSTANTS)
    return out


@pytest.mark.slow
def test_killed_a_run_takes_its_other_process_along_and_goes_on_from_its_last_checkpoint(
    fit, true_run, folder, tmp_path
):
    out = tmp_path / "run"
    where = ["--background", str(folder), "--out_dir", str(out)]
    flags = [*TRUE_RUN.split(), "--eval_every", "2000", "--processes", "2"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *flags, *where]
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for((out / "ckpt.pt").exists, run)
    run.kill()
    _, err = run.communicate(timeout=30)  # returns when the other process has ended, too
    assert err == ""
    fit(out, "--resume", "--processes", "1", **TRUE_CONSTANTS)
    steps = [row["step"] for row in step_lines(out)]
    assert steps == sorted(set(steps))
    assert weights_differ_by(true_run, out) < 1e-5


@pytest.mark.slow
def test_under_torchrun_ctrl_c_saves_once_and_another_number_of_processes_goes_on(
    fit, true_run, folder, tmp_path
):
    out = tmp_path / "run"
    where = ["--background", str(folder), "--out_dir", str(out)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "train.py"), *TINY, *TRUE_RUN.split(), *where]
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = out / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.stat().st_size > 0, run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the launcher and to its processes
    _, err = run.communicate(timeout=100)
    assert err.count("train.py: interrupted") == 1
    progress = content(out, "progress")
    assert step_lines(out)[-1]["step"] == progress["step"]
    assert progress["tokens"] < 12000
    fit(out, "--resume", **TRUE_CONSTANTS)
    assert weights_differ_by(true_run, out) < 1e-4


# What is trained on, and what is asked


def test_the_seed_decides_the_weights_and_the_data(fit, tmp_path):
    for seed in "01":
        fit(tmp_path / seed, "--tokens 1 --stages 2:0 --lr 1e-9 --seed", seed)
    assert weights_differ_by(tmp_path / "0", tmp_path / "1") > 0.1
    (first,) = step_lines(tmp_path / "0")
    (second,) = step_lines(tmp_path / "1")
    assert abs(first["loss"] - second["loss"]) > 1e-4


def test_validation_asks_the_same_every_time_of_stories_and_prose_not_trained_on(
    fit, folder, tmp_path, monkeypatch
):
    asked = []
    evaluate = train.evaluate

    def watched(model, tokenizer, samples, work, *args, **options):
        (task, length, n) = work[-1]
        asked.append([samples(task, length, i).ids.tolist() for i in range(n)])
        return evaluate(model, tokenizer, samples, work, *args, **options)

    monkeypatch.setattr(train, "evaluate", watched)
    flags = "--tokens 700 --stages 2:0 --eval_every 300 --table_lengths 0k 150 --table_n 2"
    fit(tmp_path, flags)
    *validations, of_table = asked
    assert len(validations) == 2
    assert validations[0] == validations[1] != of_table
    text = load().decode(of_table[0])
    prose = set(re.findall(r"The [^.]*\.", text))
    sentences = {}
    for part in ("train", "val"):
        passages = background.split(background.documents(folder), part)
        sentences[part] = {sentence for passage in passages for sentence in passage}
    assert len(prose & sentences["val"]) > 3
    assert not prose & sentences["train"]


def test_original_stories_are_trained_on_and_their_test_file_is_evaluated(
    fit, tmp_path, monkeypatch
):
    task = babi.TASKS["qa1"]
    made = {}
    for seed, part in enumerate(("train", "test")):
        made[part] = [task.story(random.Random(seed)) for _ in range(6)]
        text = "".join(babi.format_story(story, task) for story in made[part])
        (tmp_path / f"qa1_{task.stem}_{part}.txt").write_text(text, encoding="utf-8")
    documents = []
    real = Lessons.documents

    def watched(self, *args):
        found = real(self, *args)
        documents.extend(found)
        return found

    monkeypatch.setattr(Lessons, "documents", watched)
    fit(tmp_path / "run", "--tokens 700 --stages 2:0 3:2 --stories", str(tmp_path))
    assert len(documents) > 10
    assert {(tuple(d.texts), *d.questions) for d in documents} <= asked_in(made["train"])
    asked = {(q.text, q.answer) for _, q in asked_in(made["test"])}
    rows = babilong_eval.load(tmp_path / "run" / "table.jsonl")
    assert {(row["question"], row["target"]) for row in rows} <= asked


def test_an_evaluation_compiles_nothing(trained):
    model, saved = load_checkpoint(trained[0] / "ckpt.pt")
    builder = Builder(load(), "val", saved["train"]["background"])
    work = [("qa1", 0, 2), ("qa1", 150, 2)]
    before = train.ask(model, load(), builder, work, 0, ("on",), 1)
    train.compile_blocks(model, backend=lambda *_: pytest.fail("something was compiled"))
    after = train.ask(model, load(), builder, work, 0, ("on",), 1)
    assert [row["output"] for row in after] == [row["output"] for row in before]


# Recipes and --init


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_every_preset_and_flags_win_over_it(recipe, tmp_path):
    for preset in sorted(set(PRESETS) - {"lm2-1.7b"}):
        if (RECIPE_OF[preset] == "text") != (recipe == "text"):
            continue  # the sizes for plain text are too small for stories
        argv = ["--recipe", recipe, "--preset", preset, "--lr", "0.5"]
        argv += ["--out_dir", str(tmp_path / "x")]
        sizes = LM2Config(**PRESETS[preset])
        if recipe == "qa1-10" and sizes.kind != "llama" and sizes.segment_len < 512:
            with pytest.raises(ValueError, match="segments of 512 tokens"):
                train.read_flags(argv)
            continue
        flags = train.read_flags(argv)
        cfg = flags.cfg
        assert cfg.lr == 0.5
        assert flags.sizes == PRESETS[preset]
        if recipe == "text":
            continue  # all kinds of models read the same windows
        assert cfg.whole is preset.endswith("-full")
        if sizes.kind == "llama":
            assert cfg.final_tokens >= cfg.tokens  # its few stages do not end it early
            if not cfg.whole:
                stages = parse_stages(cfg.stages, sizes.segment_len, cfg.tasks, cfg.whole)
                assert max(stage.segments for stage in stages) == 1  # it has nothing to carry


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_a_recipe_and_a_recipe_a_preset(preset):
    cfg = train.TrainConfig(**train.settings_of(None, preset, {}))
    assert (cfg.recipe, cfg.preset) == (RECIPE_OF[preset], preset)
    made_with = train.settings_of(cfg.recipe, None, {})["preset"]
    assert RECIPE_OF[made_with] == cfg.recipe


@pytest.mark.parametrize(
    "argv, kind",
    [
        ("", "lm2"),
        ("--n_mem_layer 0", "llama"),
        ("--n_mem_token 8", "rmt"),
        ("--preset cpu-llama", "llama"),
        ("--n_mem_layer 0 --segment_len 4096", "full"),
        ("--mem_blocks 0", "lm2"),
        ("--preset cpu-llama --n_mem_token 0", "llama"),
        ("--preset cpu-llama --mem_blocks 1 2", "lm2"),
    ],
)
def test_a_recipe_follows_the_kind_of_model_however_it_is_asked_for(argv, kind, tmp_path):
    cfg = train.read_flags([*argv.split(), "--out_dir", str(tmp_path / "x")]).cfg
    assert cfg.stages == RECIPES["qa1"][kind]["stages"]
    assert cfg.whole is (kind == "full")


def test_where_the_memory_sits_can_be_given_in_place_of_the_presets_answer(tmp_path):
    for preset in ("cpu", "cpu-hours"):
        for flags, blocks in (("--mem_blocks 2 0", (0, 2)), ("--n_mem_layer 2", (0, 1))):
            argv = ["--preset", preset, *flags.split(), "--out_dir", str(tmp_path / "x")]
            sizes = train.read_flags(argv).sizes
            assert LM2Config(**sizes).mem_blocks == blocks


def test_a_run_can_start_from_the_weights_sizes_and_recipe_of_another(straight, tmp_path):
    argv = ["--init", str(straight / "ckpt.pt"), "--out_dir", str(tmp_path / "new")]
    argv += ["--background", content(straight, "train")["background"], "--threads", "1"]
    argv += ["--tokens", "1", "--lr", "1e-9", "--table_lengths", "0k", "--table_n", "1"]
    with contextlib.redirect_stdout(io.StringIO()), constants():
        train.main(argv)
    assert 0 < weights_differ_by(straight, tmp_path / "new") < 1e-6
    assert content(tmp_path / "new", "config") == content(straight, "config")
    assert content(tmp_path / "new", "progress")["step"] == 1
    shipped = ["--init", str(ROOT / "assets" / "five.pt"), "--out_dir", str(tmp_path / "c")]
    assert train.read_flags(shipped).cfg.recipe == "qa1-5"


# Mistakes: one line, exit code 2


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--nope 1", "--nope"),
        ("--token 5", "--token"),  # no prefixes
        ("--tokens many", "many"),
        ("--tokens", "--tokens"),
        ("stray", "stray"),
        ("--tokens 0", "tokens 0"),
        ("--batch_size -1", "batch_size -1"),
        ("--lr nan", "lr nan"),
        ("--decay 0", "decay 0"),
        ("--plain 1.5", "plain 1.5"),
        ("--total_minutes 0", "total_minutes 0"),
        ("--tasks qa1 qa99", "qa99"),
        ("--preset huge", "huge"),
        ("--recipe qa0", "qa0"),
        ("--whole --stages 2:0 4:2", "documents of 128 tokens"),
        ("--whole --stages 40:0 --usual 1", "--segment_len"),
        ("--n_head 3 --n_kv_head 3", "n_head 3"),
        ("--stages 2:0 1:0", "1:0"),
        ("--stages 2:0@qa9", "qa9"),
        ("--table_lengths 4x", "4x"),
        ("--table_lengths 0k 7", "length 7 is too short"),
        ("--device gpu7", "gpu7"),
        ("--stories no/babi", "no/babi is no folder"),
        ("--init no/ckpt.pt", "--n_layer"),
        ("--background no/books", "no/books"),
        ("--resume --n_embd 32", "--n_embd"),
        ("--resume --tokens 99", "--tokens"),
        ("--resume", "ckpt.pt"),
    ],
)
def test_a_flag_that_cannot_be_is_named(capsys, tmp_path, folder, flags, named):
    base = []
    if "--resume" not in flags:
        base = [*MODEL, "--background", folder, "--tokens", "50", "--table_n", "1"]
        base += ["--threads", "1"]
    argv = [*base, "--out_dir", tmp_path / "run", *flags.split()]
    assert named in refused(capsys, train.main, *argv)
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_to_compile_without_a_compiler_is_refused_before_the_start(
    capsys, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", "")
    flags = ["--compile", "--background", folder, "--out_dir", tmp_path / "new"]
    assert "finds no compiler" in refused(capsys, train.main, *TINY, *flags)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("inside", ["", "run"])
def test_an_out_dir_where_a_file_stands_is_named(capsys, folder, tmp_path, inside):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = tmp_path / "file" / inside
    flags = [*TINY, "--tokens", "50", "--background", folder, "--out_dir", out]
    assert str(out) in refused(capsys, train.main, *flags)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_run_does_not_replace_a_checkpoint(capsys, cut, folder):
    before = (cut / "ckpt.pt").read_bytes()
    err = refused(capsys, train.main, *TINY, "--background", folder, "--out_dir", cut)
    assert "is there already" in err and "--resume" in err
    assert (cut / "ckpt.pt").read_bytes() == before


def test_a_checkpoint_of_other_flags_is_not_gone_on_with(capsys, cut, tmp_path):
    saved = torch.load(cut / "ckpt.pt", weights_only=True)
    del saved["train"]["usual"]
    saved["train"]["colour"] = 1
    torch.save(saved, tmp_path / "ckpt.pt")
    err = refused(capsys, train.main, "--resume", "--out_dir", tmp_path)
    assert "other flags (colour, usual)" in err


def test_a_checkpoint_from_before_other_names_goes_on_with_babis_own(cut, tmp_path):
    saved = torch.load(cut / "ckpt.pt", weights_only=True)
    assert saved["train"].pop("names") == "own"
    torch.save(saved, tmp_path / "ckpt.pt")
    cfg = train.settings_to_resume(dict(out_dir=str(tmp_path)))
    anew = dict(names="own", out_dir=str(tmp_path), minutes=None)
    assert cfg == train.TrainConfig(**saved["train"] | anew)


def test_a_full_memory_is_told_in_one_line(capsys, folder, tmp_path, monkeypatch):
    def fail(i):
        raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 9")

    before_step(monkeypatch, fail)
    flags = ["--background", folder, "--out_dir", tmp_path / "run"]
    assert "not enough memory" in refused(capsys, train.main, *TINY, *flags)


def test_an_error_of_our_own_is_not_hidden(folder, tmp_path, monkeypatch):
    def fail(i):
        raise RuntimeError("CUDA error: an illegal memory access")

    before_step(monkeypatch, fail)
    argv = [*TINY, "--background", str(folder), "--out_dir", str(tmp_path / "run")]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train.main(argv)


def test_words_of_a_flag_may_stand_in_quotes_or_not(tmp_path):
    out = ["--out_dir", str(tmp_path / "x")]
    one = train.read_flags([*out, "--tasks", "qa1", "qa2", "qa1", "--table_lengths", "0k", "0"])
    other = train.read_flags([*out, "--tasks", "qa1 qa2", "--table_lengths", "0k 0"])
    assert one.cfg == other.cfg
    assert one.cfg.tasks == ("qa1", "qa2")
    assert one.cfg.lengths == [0]


def test_the_help_of_every_flag_is_sentences_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = "".join(capsys.readouterr().out.split())  # lines may end behind a hyphen
    helps = [field.metadata["help"] for field in dataclasses.fields(train.TrainConfig)]
    for text in [*helps, *train.SIZE_FLAGS.values()]:
        assert text[0].isupper() and text.endswith(".")
        assert text.replace(" ", "") in printed
    assert "(default0.002)" in printed and "(defaultecho2:04:010:0" in printed
