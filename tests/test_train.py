"""train.py on a tiny model: the loop, its processes, how a run stops and goes on, its flags.

    python -m pytest tests/test_train.py -q

Most tests call train.main and read what it has written.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from data import babi, background, predictions
from data.babilong import Builder
from data.common import JsonLines, interrupts_kept
from data.lessons import Batches, Lessons, parse_stages
from data.metrics import cells, table
from data.recipes import PRESETS, RECIPE_OF, RECIPES
from data.tokenizer import load, of_checkpoint
from lm2 import LM2, Block, LM2Config, Memory, load_checkpoint
from test_babilong import asked_in, book

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

SIZES = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, n_slot=4, n_mem_head=2)
MODEL = []
for size_name, size in dict(SIZES, segment_len=64).items():
    MODEL += [f"--{size_name}", str(size)]
QUICK = (
    "--batch_size 4 --accumulate 1 --threads 1 --device cpu "
    "--table_lengths 0k --table_n 2 --eval_n 2"
)
TINY = [*MODEL, *QUICK.split()]
CONSTANTS = dict(LOG_EVERY=1, WARMUP_STEPS=5)


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


def content(out, *names):
    """Some parts of the checkpoint in a folder."""
    saved = torch.load(Path(out) / "ckpt.pt", weights_only=True)
    return {name: saved[name] for name in names}


def end_of(out):
    """All that decides how the run in a folder goes on."""
    end = content(out, "model", "optimizer", "curriculum", "progress", "config", "tokenizer")
    del end["progress"]["seconds"]
    return end


def weights_differ_by(a, b):
    """The largest difference between the weights of the checkpoints in two folders."""
    first = content(a, "model")["model"]
    second = content(b, "model")["model"]
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
        "2 blocks of width 16, 4 slots in 2 of them",
        "segments of 64 tokens",
        "qa1, with the preset cpu",
        "2, from 2:0 to 3:2",
        "cpu (asked for), float32, 1 thread",
    ):
        assert words in head
    assert max(len(line) for line in head.splitlines()) <= 80 or "books" in head


def test_a_run_ends_with_the_table_of_its_predictions(trained):
    rows = predictions.load(trained[0] / "table.jsonl")
    assert len(rows) == 2 * 3 * 2
    assert trained[1].rstrip().endswith(table(cells(rows)).rstrip())


def test_every_line_of_the_log_is_json_with_the_step_and_the_tokens_so_far(trained):
    rows = lines(trained[0] / "metrics.jsonl")
    steps = step_lines(trained[0])
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    names = {"tokens", "seconds", "accuracy", "lr", "stage", "grad_norm", "tokens_per_second"}
    assert all(names <= set(row) for row in steps)
    tokens = [row["tokens"] for row in steps]
    assert tokens == sorted(set(tokens))
    assert tokens[-2] < 12000 <= tokens[-1]
    validations = [row for row in rows if "validation" in row]
    due = []
    for before, after in itertools.pairwise(steps):
        if after["tokens"] // 5000 > before["tokens"] // 5000:
            due.append(after["step"])
    assert [row["step"] for row in validations] == due
    assert len(due) >= 2
    assert all(set(row["validation"]) == {"qa1 0k", "qa1 150"} for row in validations)


def test_a_line_has_the_mean_loss_since_the_line_before_and_the_other_numbers_of_its_step(
    fit, tmp_path
):
    flags = "--tokens 1100 --stages 2:0"
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
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-6)
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
    flags = "--tokens 1100 --stages 2:0 --eval_every 400"
    printed = fit(tmp_path, flags, LOG_EVERY=2)
    assert sum("validation" in row for row in lines(tmp_path / "metrics.jsonl")) == 2
    before = dict(step=0, tokens=0)
    rates = []
    for row in step_lines(tmp_path):
        seconds = 10 * (row["step"] - before["step"])
        rates.append((row["tokens"] - before["tokens"]) / seconds)
        assert row["tokens_per_second"] == round(rates[-1])
        before = row
    assert f"({statistics.median(rates):,.0f} tokens/s)" in printed


def test_a_checkpoint_gives_back_weights_sizes_settings_and_tokenizer(trained):
    model, saved = load_checkpoint(trained[0] / "ckpt.pt")
    assert model.cfg == LM2Config(vocab_size=2048, segment_len=64, rope_theta=1000.0, **SIZES)
    assert of_checkpoint(saved, trained[0]).ranks == load().ranks
    cfg = train.TrainConfig(**saved["train"])
    assert (cfg.stages, cfg.lr, cfg.tasks) == (("2:0", "3:2"), 1e-2, ("qa1",))


# A step


def first_batches(folder, out, n):
    """The first micro-batches of the run in a folder, and how long its segments are in each."""
    cfg = train.TrainConfig(**content(out, "train")["train"])
    lessons = train.make_lessons(cfg, Builder(load(), "train", str(folder)))
    (stage,) = parse_stages(cfg.stages, 64, cfg.tasks, whole=False)
    found = []
    for number in range(n):
        _, batch = lessons[stage, number]
        found.append((batch, min(stage.segment_len, batch.idx.shape[1])))
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_first_step_is_the_one_that_plain_autograd_makes(fit, folder, tmp_path, accumulate):
    """The mean of the micro-batches' losses, the norm of its gradient, and the share of words that
    are right, which leaves the end of text out."""
    flags = "--tokens 1 --stages 3:2:32 --plain 0 --lr 1e-9 --accumulate"
    fit(tmp_path, flags, str(accumulate))
    torch.manual_seed(0)
    sizes = dict(SIZES, segment_len=64, rope_theta=1000.0)
    model = LM2(LM2Config(vocab_size=2048, **sizes))
    losses = []
    n_right = 0
    n_words = 0
    eot = load().eot
    for batch, segment_len in first_batches(folder, tmp_path, accumulate):
        logits, _, _ = model(batch.idx, segment_len=segment_len)
        logits = logits.flatten(0, 1)[batch.at]
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets))
        is_word = batch.targets != eot
        n_words += is_word.sum().item()
        n_right += (logits.argmax(-1) == batch.targets)[is_word].sum().item()
    loss = torch.stack(losses).mean()
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    (row,) = step_lines(tmp_path)
    assert row["loss"] == pytest.approx(loss.item(), abs=2e-6)
    assert row["grad_norm"] == pytest.approx(torch.stack(norms).norm().item(), abs=2e-5)
    assert row["accuracy"] == pytest.approx(n_right / n_words, abs=1e-6)


def test_the_accuracy_counts_words_and_not_the_end_of_text(fit, tmp_path, monkeypatch):
    """After some steps most ends of text are right and few words are."""
    seen = []
    forward = LM2.forward

    def watched(self, idx, targets=None, *args, **options):
        result = forward(self, idx, targets, *args, **options)
        if targets is not None:
            seen.append((result[0].detach().argmax(-1), targets))
        return result

    monkeypatch.setattr(LM2, "forward", watched)
    fit(tmp_path, "--tokens 3000 --stages 2:0 --lr 2e-2")
    eot = load().eot
    shares_with_ends = []
    for row, (guesses, targets) in zip(step_lines(tmp_path), seen, strict=True):
        is_right = guesses == targets
        share = is_right[targets != eot].float().mean().item()
        assert row["accuracy"] == pytest.approx(share, abs=1e-5)
        shares_with_ends.append(is_right.float().mean().item() - share)
    assert max(shares_with_ends) > 0.1


def test_a_long_gradient_is_cut_and_logged_as_it_was(fit, tmp_path, monkeypatch):
    norms = []
    real = torch.optim.AdamW.step

    def step(self, *args, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    fit(tmp_path, "--tokens 300 --stages 2:0", CLIP=0.01)
    rows = step_lines(tmp_path)
    assert len(rows) == len(norms) >= 2
    assert min(row["grad_norm"] for row in rows) > 0.1
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_the_optimiser_decays_matrices_alone_and_steps_at_the_logged_rate(
    fit, tmp_path, monkeypatch
):
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *args, **options):
        seen.append([(g["lr"], g["weight_decay"], g["betas"]) for g in self.param_groups])
        assert all(p.ndim >= 2 for p in self.param_groups[0]["params"])
        assert all(p.ndim < 2 for p in self.param_groups[1]["params"])
        n_parameters = sum(len(group["params"]) for group in self.param_groups)
        assert n_parameters == len(content_of_model)
        return real(self, *args, **options)

    content_of_model = LM2(LM2Config(vocab_size=8, segment_len=64, **SIZES)).state_dict()
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    fit(tmp_path, "--tokens 300 --stages 2:0 --lr 0.02", WARMUP_STEPS=10)
    logged = [row["lr"] for row in step_lines(tmp_path)]
    assert logged[0] == pytest.approx(0.002)
    for groups, lr in zip(seen, logged, strict=True):
        assert groups == [(lr, 0.1, (0.9, 0.98)), (lr, 0.0, (0.9, 0.98))]


def test_nothing_is_fetched_from_the_device_within_a_step(fit, tmp_path, monkeypatch):
    fetched = []
    in_step = [False]
    real_next = Batches.__next__

    def next_batch(self):
        batch = real_next(self)
        in_step[0] = True
        return batch

    def watch(name):
        real = getattr(torch.Tensor, name)

        def watched(self, *args, **options):
            if in_step[0]:
                fetched.append(name)
            return real(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, watched)

    real_fetch = train.fetch

    def fetch(*args):
        in_step[0] = False
        return real_fetch(*args)

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero"):
        watch(name)
    monkeypatch.setattr(Batches, "__next__", next_batch)
    monkeypatch.setattr(train, "fetch", fetch)
    fit(tmp_path, "--tokens 4000 --stages 3:2:32 --accumulate 2", LOG_EVERY=4)
    assert len(step_lines(tmp_path)) >= 2
    assert fetched == []


def test_a_document_shorter_than_a_segment_is_one_segment_and_the_last_is_not_written(
    fit, tmp_path, monkeypatch
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
    fit(tmp_path / "a", "--stages 2:0 --tokens 1")
    ((n_tokens, segment_len),) = calls
    assert n_tokens == segment_len < 64
    assert writes == []

    calls.clear()
    fit(tmp_path / "b", "--stages 12:2:32 --plain 0 --tokens 1")
    ((n_tokens, segment_len),) = calls
    assert n_tokens > 32 and n_tokens % 32 == 0
    assert segment_len == 32
    assert len(writes) == (n_tokens // 32 - 1) * SIZES["n_layer"]


def test_a_batch_seen_again_and_again_is_learned_by_heart(fit, tmp_path, monkeypatch):
    first = []
    real_next = Batches.__next__

    def same_batch(self):
        if not first:
            first.append(real_next(self))
        return first[0]

    monkeypatch.setattr(Batches, "__next__", same_batch)
    flags = "--tokens 8000 --stages 2:0 --lr 2e-2 --n_embd 32 --decay 0.01"
    fit(tmp_path, flags)
    last = step_lines(tmp_path)[-1]
    assert last["loss"] < 0.1
    assert last["accuracy"] == 1.0


def test_the_loss_falls_from_that_of_guessing_to_that_of_knowing_the_rooms(trained):
    losses = [row["loss"] for row in step_lines(trained[0])]
    assert abs(losses[0] - math.log(2048)) < 0.3
    assert sum(losses[-10:]) / 10 < 2.2


@pytest.mark.parametrize("log_every", [1, 4, 100])
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


# The schedule


@pytest.mark.parametrize(
    "step, share_done, rate",
    [
        (0, 0.0, 0.1),
        (4, 0.0, 0.5),
        (9, 0.01, 1.0),
        (100, 0.5, 1.0),
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
    cfg = train.TrainConfig(**content(trained[0], "train")["train"])
    tokens = 0
    with constants():
        for step, row in enumerate(step_lines(trained[0])):
            expected = train.learning_rate(cfg, step, tokens / 12000)
            assert row["lr"] == pytest.approx(expected, abs=1e-8)
            tokens = row["tokens"]


def test_a_run_ends_so_many_tokens_into_its_last_stage_with_a_rate_of_zero(fit, tmp_path):
    flags = "--tokens 1000000 --final_tokens 3000 --stages 2:0 3:0 4:0 --stage_steps 5"
    fit(tmp_path, flags)
    rows = step_lines(tmp_path)
    assert [row["stage"] for row in rows[:12]] == [0] * 5 + [1] * 5 + [2] * 2
    end = rows[9]["tokens"] + 3000  # after two stages of five steps
    assert rows[-2]["tokens"] < end <= rows[-1]["tokens"]
    share_left = 1 - rows[-2]["tokens"] / end
    assert rows[-1]["lr"] == pytest.approx(2e-3 * share_left / 0.25, abs=1e-8)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_ends_after_its_minutes_with_a_rate_of_zero_and_resuming_counts_those_before(
    fit, tmp_path, monkeypatch, processes
):
    clock = itertools.count()  # a second passes at each look at it
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    flags = "--tokens 1000000 --stages 2:0 --total_minutes 1 --decay 0.5 --accumulate 2"
    fit(tmp_path, flags, "--minutes", "0.5", "--processes", processes)
    half = content(tmp_path, "progress")["progress"]["seconds"]
    fit(tmp_path, "--resume", "--processes", processes)
    seconds = content(tmp_path, "progress")["progress"]["seconds"]
    assert 30 <= half < 34
    assert 60 <= seconds < 66
    rates = {row["seconds"]: row["lr"] for row in step_lines(tmp_path)}
    assert max(rates.values()) == pytest.approx(2e-3)
    assert min(rates.values()) < 2e-4
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
    accuracies = content(tmp_path, "curriculum")["curriculum"]["recent"]
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
    flags = "--stages 2:0 4:2:32 6:3 --leave_plain_at 0 --leave_at 1.0 --tokens 9000 --plain 0"
    printed = fit(tmp_path, flags, LEAVE_WINDOW=3, LOG_EVERY=2)
    stages = [row["stage"] for row in step_lines(tmp_path)]
    assert stages.index(1) == 2  # lines of steps 2 and 4: the window of 3 was full at 4
    assert max(stages) == 1  # 4:2:32 is never learned to 100 %
    assert max(seen[:4]) <= 64
    assert set(seen[4:]) == {32}
    assert "2 facts" in printed and "now 4 facts in 2 x 32" in printed


# Several processes

TWO = "--accumulate 2 --processes 2"


@pytest.mark.parametrize(
    "stages, accumulate, processes",
    [
        ("2:0", "2", "2"),
        ("3:2:32", "2", "2"),
        ("3:4:16", "6", "3"),
        ("2:0 3:2:32 3:3", "2", "2"),
    ],
)
def test_however_many_processes_share_a_step_it_is_the_same_step(
    fit, tmp_path, stages, accumulate, processes
):
    """In the second case, some steps have documents of one segment, which write nothing, and in the
    third, one process may have them and the others not."""
    flags = f"--tokens 8000 --stages {stages} --stage_steps 3 --plain 0.3 --accumulate {accumulate}"
    fit(tmp_path / "one", flags, "--processes", "1")
    fit(tmp_path / "many", flags, "--processes", processes)
    one = step_lines(tmp_path / "one")
    many = step_lines(tmp_path / "many")
    assert len(one) == len(many) >= 5
    for a, b in zip(one, many, strict=True):
        for name in ("loss", "accuracy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5)
        for name in ("tokens", "stage", "lr"):
            assert a[name] == b[name]
    assert weights_differ_by(tmp_path / "one", tmp_path / "many") < 1e-5


def set_gradients(processes, meet_at, answers):
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
    total = processes.sum(processes.rank)
    answers.put((processes.rank, gradients, numbers.tolist(), told, total))
    processes.leave()


def test_a_gradient_that_only_one_process_has_reaches_all_and_one_that_none_has_stays_none(
    tmp_path,
):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answers = context.SimpleQueue()
    others = []
    for rank in (0, 1):
        processes = train.Processes(rank=rank, n=2)
        arguments = (processes, f"file://{tmp_path}/meet", answers)
        others.append(context.Process(target=set_gradients, args=arguments))
        others[-1].start()
    found = [answers.get(), answers.get()]
    for other in others:
        other.join(10)
    expected = [[[3.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0], None]
    assert sorted(rank for rank, *_ in found) == [0, 1]
    for _, *answer in found:
        assert answer == [expected, [2.0, 10.0], [7.0, 0.1], 1]


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


def test_a_run_leaves_the_threads_and_the_processes_of_its_caller_as_they_were(fit, tmp_path):
    before = torch.get_num_threads()
    fit(tmp_path, "--tokens 300 --stages 2:0 --threads 2 --accumulate 2")
    assert torch.get_num_threads() == before
    assert not multiprocessing.active_children()


def test_an_evaluation_has_all_threads_and_training_one_for_each_process(
    fit, tmp_path, monkeypatch
):
    seen = []
    evaluate = train.evaluate

    def watched(*args, **options):
        seen.append(torch.get_num_threads())
        return evaluate(*args, **options)

    monkeypatch.setattr(train, "evaluate", watched)
    before_step(monkeypatch, lambda i: seen.append(-torch.get_num_threads()))
    flags = "--tokens 600 --stages 2:0 --threads 2 --eval_every 200"
    fit(tmp_path, flags, TWO)
    assert {n for n in seen if n < 0} == {-1}
    assert {n for n in seen if n > 0} == {2}
    assert sum(n > 0 for n in seen) >= 3


@pytest.mark.parametrize("where", ["fresh", "resumed"])
def test_processes_must_divide_the_micro_batches(capsys, folder, fit, tmp_path, where):
    flags = [*TINY, "--background", folder, "--out_dir", tmp_path, "--accumulate", "3"]
    if where == "resumed":
        fit(tmp_path, "--tokens 1 --accumulate 3")
        flags = ["--resume", "--out_dir", tmp_path]
    err = refused(capsys, train.main, *flags, "--processes", "2")
    assert "--processes 2 must divide --accumulate 3" in err


def test_several_processes_on_a_gpu_are_those_of_torchrun(monkeypatch):
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    assert train.choose_processes(train.TrainConfig(threads=2)).n == 1
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        train.choose_processes(train.TrainConfig(processes=2))


def test_a_process_that_is_killed_ends_the_run_in_one_line_and_the_checkpoint_is_whole(
    capfd, folder, tmp_path, monkeypatch
):
    def kill_the_other(i):
        if i == 12:
            (other,) = multiprocessing.active_children()
            os.kill(other.pid, signal.SIGKILL)

    before_step(monkeypatch, kill_the_other)
    flags = "--tokens 100000 --stages 2:0 --eval_every 500"
    where = ["--background", str(folder), "--out_dir", str(tmp_path)]
    began = time.monotonic()
    with constants(), pytest.raises(SystemExit) as stop:
        train.main([*TINY, *TWO.split(), *flags.split(), *where])
    assert time.monotonic() - began < 10
    assert stop.value.code == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "has ended (exit code -9)" in err and "--resume" in err
    assert not multiprocessing.active_children()
    assert 0 < content(tmp_path, "progress")["progress"]["step"] <= 13


BROKEN = """
import sys
import train
from data.lessons import Lessons

real = Lessons.__getitem__

def broken(self, key):
    if key[1] == 3:  # the second process's, in the second step
        raise ValueError("a story of odd number")
    return real(self, key)

Lessons.__getitem__ = broken
if __name__ == "__main__":
    train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("where", ["before the start", "in a step"])
def test_a_mistake_that_shows_in_another_process_is_told_once(folder, tmp_path, where):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    books = tmp_path / "no books" if where == "before the start" else folder
    flags = ["--tokens", "100000", "--stages", "2:0", "--device", "cpu"]
    paths = ["--background", str(books), "--out_dir", str(tmp_path / "run")]
    command = [sys.executable, str(script), *TINY, *TWO.split(), *flags, *paths]
    run = subprocess.run(
        command, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert "no books" in run.stderr or "process 1: a story of odd number" in run.stderr


def test_the_other_processes_end_when_the_first_one_is_killed(folder, tmp_path):
    where = ["--background", str(folder), "--out_dir", str(tmp_path)]
    flags = "--tokens 10000000 --stages 2:0"
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *TWO.split(), *flags.split(), *where]
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(tmp_path, first)
    pids = children_of(first.pid)
    assert len(pids) == 1
    first.kill()
    first.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert first.stderr.read() == ""


def test_a_run_of_two_processes_that_each_load_a_checkpoint_goes_on(folder, tmp_path):
    """On a true command line, with PyTorch's own number of threads. Large tensors are copied by
    several threads, which a fork does not have."""
    where = ["--background", str(folder), "--out_dir", str(tmp_path)]
    flags = "--tokens 1 --stages 2:0 --table_lengths 0k --table_n 1 --accumulate 2 --device cpu"
    for argv in ([*flags.split(), *where], ["--resume", "--out_dir", str(tmp_path)]):
        command = [sys.executable, str(ROOT / "train.py"), *argv, "--processes", "2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def wait_for_steps(out, process):
    """Wait until a run has logged steps."""
    log = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.stat().st_size > 0):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(pid):
    """The pids of the training processes that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (folder / "stat").read_text(encoding="utf-8")
            if "spawn_main" not in (folder / "cmdline").read_text(encoding="utf-8"):
                continue  # multiprocessing's own resource tracker
            if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def is_alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def test_under_torchrun_ctrl_c_saves_once_and_any_number_of_processes_goes_on(
    fit, folder, tmp_path
):
    where = ["--background", str(folder), "--out_dir", str(tmp_path / "cut")]
    flags = "--tokens 30000 --stages 2:0 3:2:32 --stage_steps 40 --accumulate 2"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "train.py"), *TINY, *flags.split(), *where]
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_steps(tmp_path / "cut", run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the launcher and to its processes
    _, err = run.communicate(timeout=60)
    assert err.count("train.py: interrupted") == 1
    step = content(tmp_path / "cut", "progress")["progress"]["step"]
    assert step_lines(tmp_path / "cut")[-1]["step"] == step
    assert content(tmp_path / "cut", "progress")["progress"]["tokens"] < 30000
    fit(tmp_path / "cut", "--resume", LOG_EVERY=10, WARMUP_STEPS=100)
    fit(tmp_path / "straight", flags, LOG_EVERY=10, WARMUP_STEPS=100)
    assert weights_differ_by(tmp_path / "cut", tmp_path / "straight") < 1e-4


# Stopping and going on


def press_ctrl_c(monkeypatch, steps):
    """At these steps Ctrl-C comes, which a terminal sends to all processes."""

    def press(i):
        if i in steps:
            for other in multiprocessing.active_children():
                os.kill(other.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before_step(monkeypatch, press)


@pytest.mark.parametrize(
    "flags",
    [
        "--processes 1",
        "--processes 1 --workers 1",
        "--processes 2",
        "--processes 1 --accumulate 1",
        "--processes 1 --eval_every 900",
    ],
)
def test_interrupted_and_resumed_a_run_ends_bit_for_bit_as_in_one_go(
    capsys, fit, tmp_path, monkeypatch, flags
):
    stages = "--stages 2:0 3:1 3:2 --stage_steps 4 --plain 0.2 --tokens 8000 --accumulate 2"
    argv = f"{stages} {flags}"
    fit(tmp_path / "straight", argv, LOG_EVERY=2)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, steps=[9])
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path / "cut", argv, LOG_EVERY=2)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"
    saved = content(tmp_path / "cut", "curriculum", "progress")
    assert saved["progress"]["step"] == 10
    assert saved["curriculum"]["number"] == 2
    again = "--resume " + flags.replace("--accumulate 1", "")
    fit(tmp_path / "cut", again, LOG_EVERY=2)
    assert same_tensors(end_of(tmp_path / "straight"), end_of(tmp_path / "cut"))
    for file in ("metrics.jsonl", "table.jsonl"):
        rows = []
        for run in ("straight", "cut"):
            kept = []
            for row in lines(tmp_path / run / file):
                for name in ("seconds", "tokens_per_second"):
                    row.pop(name, None)
                if row.get("step") != 10:  # which ends a line in the cut run alone
                    kept.append(row)
            rows.append(kept)
        assert rows[0] == rows[1]


def test_stopped_between_two_lines_a_run_keeps_what_counts_towards_the_end_of_a_stage(
    fit, tmp_path, monkeypatch
):
    flags = "--stages 3:2 --plain 0 --tokens 100000"
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, steps=[6])
        with pytest.raises(SystemExit):
            fit(tmp_path, flags, LOG_EVERY=10)
    assert 1 < len(content(tmp_path, "curriculum")["curriculum"]["recent"]) <= 7
    assert [row["step"] for row in step_lines(tmp_path)] == [7]


@pytest.mark.parametrize("first, second", [("1", "2"), ("2", "1")])
def test_a_run_may_go_on_with_another_number_of_processes(
    fit, tmp_path, monkeypatch, first, second
):
    flags = "--stages 2:0 3:2:32 --stage_steps 4 --tokens 4000 --accumulate 2"
    fit(tmp_path / "straight", flags, "--processes", "1")
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, steps=[5])
        with pytest.raises(SystemExit):
            fit(tmp_path / "cut", flags, "--processes", first)
    fit(tmp_path / "cut", "--resume", "--processes", second)
    assert weights_differ_by(tmp_path / "straight", tmp_path / "cut") < 1e-5


def test_stopped_by_the_clock_a_run_evaluates_and_goes_on_later(fit, tmp_path, monkeypatch):
    flags = "--tokens 2500 --stages 2:0 3:2 --stage_steps 6"
    fit(tmp_path / "straight", flags)
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    printed = fit(tmp_path / "cut", flags, "--minutes", "0.1")
    assert "exact match" in printed
    once = content(tmp_path / "cut", "progress")["progress"]["tokens"]
    assert 0 < once < 2500
    fit(tmp_path / "cut", "--resume", "--minutes", "0.1")
    assert once < content(tmp_path / "cut", "progress")["progress"]["tokens"] < 2500
    fit(tmp_path / "cut", "--resume")  # the limit of an earlier call does not count
    assert same_tensors(end_of(tmp_path / "straight"), end_of(tmp_path / "cut"))


def test_a_finished_run_that_is_resumed_takes_no_step_and_evaluates_again(fit, tmp_path):
    fit(tmp_path, "--tokens 300 --stages 2:0")
    before = end_of(tmp_path)
    printed = fit(tmp_path, "--resume", "--table_n", "4")
    assert same_tensors(end_of(tmp_path), before)
    assert len(predictions.load(tmp_path / "table.jsonl")) == 2 * 4
    assert "exact match" in printed


def test_interrupted_before_a_validation_a_run_saves_and_does_not_validate(
    fit, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: pytest.fail("it validated first"))
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, steps=[0])
        with pytest.raises(SystemExit):
            fit(tmp_path, "--tokens 100000 --stages 2:0 --eval_every 1")
    assert content(tmp_path, "progress")["progress"]["step"] == 1


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


@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_at_any_moment_a_run_goes_on_from_its_last_checkpoint(
    fit, folder, tmp_path, processes
):
    flags = "--tokens 16000 --stages 2:0 3:2:32 --stage_steps 20 --eval_every 3000 --accumulate 2"
    flags += f" --processes {processes}"
    where = ["--background", str(folder), "--out_dir", str(tmp_path / "cut")]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *flags.split(), *where]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "ckpt.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() / 4)
    run.kill()
    run.wait()
    time.sleep(0.5)  # the other process has the lock of the log until it ends
    true_constants = dict(LOG_EVERY=10, WARMUP_STEPS=100)
    fit(tmp_path / "cut", "--resume", "--processes", processes, **true_constants)
    fit(tmp_path / "straight", flags, **true_constants)
    steps = [row["step"] for row in step_lines(tmp_path / "cut")]
    assert steps == sorted(set(steps))
    assert same_tensors(end_of(tmp_path / "straight"), end_of(tmp_path / "cut"))


def half_written(content, file, *_, **__):
    file.write(b"half of it")
    raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")


def disk_full(content, file, *_, **__):
    file.write(b"half of it")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failure", [half_written, disk_full, "a folder"])
def test_a_failed_save_leaves_the_old_checkpoint_byte_for_byte(
    capsys, fit, tmp_path, monkeypatch, failure
):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, steps=[1])
        with pytest.raises(SystemExit):
            fit(tmp_path, "--tokens 1000 --stages 2:0")
    before = (tmp_path / "ckpt.pt").read_bytes()
    if failure == "a folder":
        (tmp_path / "ckpt.pt.tmp").mkdir()
    else:
        monkeypatch.setattr(torch, "save", failure)
    err = refused(capsys, train.main, "--resume", "--out_dir", tmp_path)
    assert "ckpt.pt" in err
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert failure == "a folder" or not (tmp_path / "ckpt.pt.tmp").exists()


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


# What decides a run, and what does not


@pytest.mark.parametrize("flags", ["--eval_every 1000", "--eval_every 2", "--workers 1"])
def test_validation_and_workers_decide_nothing(fit, tmp_path, flags):
    run = "--tokens 700 --stages 2:0 3:2 --stage_steps 3"
    fit(tmp_path / "plain", run)
    fit(tmp_path / "other", run, flags)
    assert same_tensors(end_of(tmp_path / "plain"), end_of(tmp_path / "other"))


def test_the_seed_decides_the_weights_and_the_data(fit, tmp_path):
    for name, seed in zip("abc", "001", strict=True):
        fit(tmp_path / name, "--tokens 1 --stages 2:0 --lr 1e-9 --seed", seed)
    assert weights_differ_by(tmp_path / "a", tmp_path / "b") == 0
    assert weights_differ_by(tmp_path / "a", tmp_path / "c") > 0.1
    losses = [step_lines(tmp_path / name)[0]["loss"] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]


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
    rows = predictions.load(tmp_path / "run" / "table.jsonl")
    assert {(row["question"], row["target"]) for row in rows} <= asked


def test_how_it_is_computed_may_change_where_a_run_is_resumed(fit, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(train, "compile_blocks", lambda model, dynamic: compiled.append(model))
    calls = []
    forward = Block.forward

    def counted(self, *args):
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(train, "ask", lambda *args, **options: [])
    monkeypatch.setattr(train, "table", lambda rows: "")
    flags = "--tokens 4000 --stages 3:2"
    fit(tmp_path / "straight", flags)
    n_calls = len(calls)
    n_steps = len(step_lines(tmp_path / "straight"))
    assert n_calls == 2 * n_steps
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, steps=[0])
        with pytest.raises(SystemExit):
            fit(tmp_path / "cut", flags)
    calls.clear()
    fit(tmp_path / "cut", "--resume --recompute --compile --workers 1")
    assert len(calls) == 2 * 2 * (n_steps - 1)  # each block once more for the gradient
    assert len(compiled) == 1
    assert same_tensors(end_of(tmp_path / "straight"), end_of(tmp_path / "cut"))


def test_a_run_in_bfloat16_says_so_and_ends_near_the_one_in_float32(fit, tmp_path):
    flags = "--tokens 1000 --stages 2:0 --accumulate 2"
    printed = {}
    weights = {}
    for name, more in dict(plain="", one="--bfloat16", two="--bfloat16 --processes 2").items():
        printed[name] = fit(tmp_path / name, flags, more)
        model = content(tmp_path / name, "model")["model"]
        weights[name] = torch.cat([tensor.flatten() for tensor in model.values()])
        assert weights[name].dtype == torch.float32
    assert [", bfloat16, " in printed[name] for name in printed] == [False, True, True]
    assert torch.allclose(weights["one"], weights["two"], atol=1e-5)
    distance = (weights["one"] - weights["plain"]).norm() / weights["plain"].norm()
    assert 1e-6 < distance < 0.05


def test_an_evaluation_compiles_nothing(fit, tmp_path):
    from train import compile_blocks

    fit(tmp_path, "--tokens 1 --stages 2:0")
    model, saved = load_checkpoint(tmp_path / "ckpt.pt")
    builder = Builder(load(), "val", saved["train"]["background"])
    work = [("qa1", 0, 2), ("qa1", 150, 2)]
    before = train.ask(model, load(), builder, work, 0, ("on",), 1)
    compile_blocks(model, backend=lambda *_: pytest.fail("something was compiled"))
    after = train.ask(model, load(), builder, work, 0, ("on",), 1)
    assert [row["output"] for row in after] == [row["output"] for row in before]


def test_to_compile_without_a_compiler_is_refused_before_the_start(
    capsys, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", "")
    flags = ["--compile", "--background", folder, "--out_dir", tmp_path / "new"]
    assert "finds no compiler" in refused(capsys, train.main, *TINY, *flags)
    assert not (tmp_path / "new").exists()


# Recipes and --init


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"lm2-1.7b"}))
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_every_preset_and_flags_win_over_it(recipe, preset, tmp_path):
    argv = ["--recipe", recipe, "--preset", preset, "--lr", "0.5", "--out_dir", str(tmp_path / "x")]
    is_recurrent = not preset.endswith(("-full", "-llama"))
    if recipe == "qa1-10" and is_recurrent and not preset.startswith("gpu"):
        with pytest.raises(ValueError, match="segments of 512 tokens"):
            train.read_flags(argv)
        return
    flags = train.read_flags(argv)
    cfg = flags.cfg
    assert cfg.lr == 0.5
    assert flags.sizes == PRESETS[preset]
    known = {field.name for field in dataclasses.fields(train.TrainConfig)}
    settings = RECIPES[recipe]
    assert all(set(of_kind) <= known for of_kind in settings.values())
    kind = LM2Config(**flags.sizes).kind
    stages = parse_stages(cfg.stages, LM2Config(**flags.sizes).segment_len, cfg.tasks, cfg.whole)
    assert cfg.whole is preset.endswith("-full")
    if kind == "llama" and not cfg.whole:
        assert max(stage.segments for stage in stages) == 1  # it has nothing to carry
    if kind == "llama":
        assert cfg.final_tokens >= cfg.tokens  # its few stages do not end it early
    n_tokens = {
        "qa1": 8_000_000 if kind == "llama" else 16_000_000,
        "qa1-5": 90_000_000,
        "qa1-10-hours": 60_000_000,
        "qa1-10": 4_000_000_000,
    }
    assert cfg.tokens == n_tokens[recipe]


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
    ],
)
def test_a_recipe_follows_the_kind_of_model_however_it_is_asked_for(argv, kind, tmp_path):
    cfg = train.read_flags([*argv.split(), "--out_dir", str(tmp_path / "x")]).cfg
    assert cfg.stages == RECIPES["qa1"][kind]["stages"]
    assert cfg.whole is (kind == "full")


def test_a_run_can_start_from_the_weights_sizes_and_recipe_of_another(fit, tmp_path):
    fit(tmp_path / "a", "--tokens 600 --stages 2:0 --n_slot 3")
    init = ["--init", str(tmp_path / "a" / "ckpt.pt")]
    argv = [*init, "--out_dir", str(tmp_path / "b"), "--tokens", "1", "--lr", "1e-9"]
    background_of_a = content(tmp_path / "a", "train")["train"]["background"]
    with contextlib.redirect_stdout(io.StringIO()), constants():
        train.main([*argv, "--background", background_of_a, "--table_n", "1", "--threads", "1"])
    assert 0 < weights_differ_by(tmp_path / "a", tmp_path / "b") < 1e-6
    assert content(tmp_path / "b", "config")["config"]["n_slot"] == 3
    assert content(tmp_path / "b", "progress")["progress"]["step"] == 1
    shipped = ["--init", str(ROOT / "assets" / "five.pt"), "--out_dir", str(tmp_path / "c")]
    assert train.read_flags(shipped).cfg.recipe == "qa1-5"


@pytest.mark.parametrize("change", [dict(colour=1), dict(usual=None)])
def test_a_checkpoint_of_other_flags_is_not_gone_on_with(capsys, fit, tmp_path, change):
    fit(tmp_path, "--tokens 1 --stages 2:0")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    settings = saved["train"] | change
    settings = {name: value for name, value in settings.items() if name != "usual" or value}
    torch.save(saved | dict(train=settings), tmp_path / "ckpt.pt")
    (name,) = change
    assert name in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)


# Mistakes: one line, exit code 2


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--nope 1", "--nope"),
        ("--token 5", "--token"),
        ("--tokens many", "many"),
        ("--lr fast", "fast"),
        ("--tokens", "--tokens"),
        ("stray", "stray"),
        ("--tokens 0", "tokens 0"),
        ("--batch_size -1", "batch_size -1"),
        ("--tasks qa99", "qa99"),
        ("--tasks qa1 qa99", "qa99"),
        ("--tasks", "tasks"),
        ("--preset huge", "huge"),
        ("--recipe qa0", "qa0"),
        ("--whole --stages 2:0 4:2", "documents of 128 tokens"),
        ("--whole --stages 40:0 --usual 1", "--segment_len"),
        ("--decay 0", "decay 0"),
        ("--plain 1.5", "1.5"),
        ("--n_head 3 --n_kv_head 3", "n_head 3"),
        ("--n_mem_head 5", "n_mem_head 5"),
        ("--n_layer 0", "n_layer is 0"),
        ("--n_slot 99", "n_slot 99"),
        ("--stages 2", "'2'"),
        ("--stages 2:x", "2:x"),
        ("--stages 2:0 1:0", "1:0"),
        ("--stages 2:1:999", "2:1:999"),
        ("--stages 2:0@qa9", "qa9"),
        ("--stages 2:1:9:9", "2:1:9:9"),
        ("--table_lengths 4x", "4x"),
        ("--table_lengths 0k 7", "length 7 is too short"),
        ("--device gpu7", "gpu7"),
        ("--threads -1", "-1"),
        ("--workers -1", "workers -1"),
        ("--lr -1", "-1"),
        ("--lr nan", "nan"),
        ("--stories no/babi", "no/babi"),
        ("--init no/ckpt.pt", "--n_layer"),
        ("--total_minutes 0", "total_minutes 0"),
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
        if "ffn_dim" in named:
            base += ["--ffn_dim", "32"]
    argv = [*base, "--out_dir", tmp_path / "run", *flags.split()]
    assert named in refused(capsys, train.main, *argv)
    assert not (tmp_path / "run" / "ckpt.pt").exists()


@pytest.mark.parametrize("inside", ["", "run"])
def test_an_out_dir_where_a_file_stands_is_named(capsys, folder, tmp_path, inside):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = tmp_path / "file" / inside
    flags = [*TINY, "--tokens", "50", "--background", folder, "--out_dir", out]
    assert str(out) in refused(capsys, train.main, *flags)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_run_does_not_replace_a_checkpoint(capsys, fit, folder, tmp_path):
    fit(tmp_path, "--tokens 1 --stages 2:0")
    before = (tmp_path / "ckpt.pt").read_bytes()
    err = refused(capsys, train.main, *TINY, "--background", folder, "--out_dir", tmp_path)
    assert "is there already" in err and "--resume" in err
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_one_file_of_stories_is_not_both_trained_on_and_validated_with(capsys, tmp_path, folder):
    task = babi.TASKS["qa1"]
    file = tmp_path / "qa1_train.txt"
    story = task.story(random.Random(0))
    file.write_text(babi.format_story(story, task), encoding="utf-8")
    flags = ["--stories", file, "--background", folder, "--out_dir", tmp_path / "run"]
    err = refused(capsys, train.main, *TINY, "--tokens", "50", *flags)
    assert f"--stories {file} is no folder" in err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] not enough memory: you tried to allocate 9")],
)
def test_a_full_memory_is_told_in_one_line(capsys, folder, tmp_path, monkeypatch, error):
    def fail(i):
        raise error

    before_step(monkeypatch, fail)
    flags = ["--background", folder, "--out_dir", tmp_path / "run"]
    assert "not enough memory" in refused(capsys, train.main, *TINY, *flags)


@pytest.mark.parametrize("words", ["shapes do not match", "CUDA error: an illegal memory access"])
def test_an_error_of_our_own_is_not_hidden(folder, tmp_path, monkeypatch, words):
    def fail(i):
        raise RuntimeError(words)

    before_step(monkeypatch, fail)
    argv = [*TINY, "--background", str(folder), "--out_dir", str(tmp_path / "run")]
    with pytest.raises(RuntimeError, match=words):
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
    for field in dataclasses.fields(train.TrainConfig):
        text = field.metadata["help"]
        assert text[0].isupper() and text.endswith(".")
        assert text.replace(" ", "") in printed
    for text in train.SIZE_FLAGS.values():
        assert text.replace(" ", "") in printed
    assert "(default0.002)" in printed and "(default2:04:010:0" in printed
