"""Helper processes: what they add, what the micro-batches of a step share, and how they end.

    python -m pytest tests/test_helpers.py -q
"""
import dataclasses
import multiprocessing
import os
import signal
import time

import pytest
import torch

import train
from data import helpers as helpers_module
from data.batches import Maker
from data.device import compile_blocks
from data.helpers import Helpers, help_step
from test_scripts import (TINY, content, fit, folder, make, no_worker_left, refused,  # noqa: F401
                          same_tensors, step)

STAGES = ["--stages", "2:0 3:2", "--stage_steps", "2", "--tokens", "100000", "--plain", "0"]


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def weights(trainer, steps):
    """Those after so many steps, and the numbers of each."""
    numbers = []
    for _ in range(steps):
        numbers.append(step(trainer))
        trainer.next_stage()
    trainer.close()
    return trainer.model.state_dict(), [{k: v for k, v in n.items() if k != "stage"} for n in numbers]


@pytest.mark.parametrize("accumulate, processes", [("2", "2"), ("6", "3")])
def test_however_many_processes_share_a_step_it_is_the_same_step(
        folder, tmp_path, accumulate, processes):  # noqa: F811
    runs = [weights(make(folder, tmp_path / n, *STAGES, "--accumulate", accumulate, "--processes", n), 5)
            for n in ("1", processes)]
    for name, one in runs[0][0].items():
        assert torch.allclose(one, runs[1][0][name], atol=1e-5), name
    for one, many in zip(runs[0][1], runs[1][1]):
        assert many == pytest.approx(one, rel=1e-4)


def test_a_run_with_helpers_that_is_resumed_goes_on_as_it_would_have(folder, tmp_path):  # noqa: F811
    flags = [*STAGES, "--accumulate", "2", "--processes", "2"]
    straight, _ = weights(make(folder, tmp_path / "a", *flags), 5)
    first = make(folder, tmp_path / "b", *flags)
    weights(first, 3)
    first.save()
    again = ["--resume", "--out_dir", str(tmp_path / "b"), "--threads", "1"]
    second, _ = weights(train.Trainer(*train.read_flags(again)), 2)
    assert same_tensors(straight, second)


def test_a_weight_that_only_a_helper_used_gets_its_gradient():
    model = torch.nn.ModuleDict(dict(here=torch.nn.Linear(2, 2), there=torch.nn.Linear(2, 2, bias=False)))
    helpers = Helpers(model, 2, use, (3.0,))
    try:
        for scale in (1.0, 2.0):
            model.zero_grad(set_to_none=True)
            helpers.start(scale)
            assert helpers.finish() == [("rank", 1), ("rank", 2)]
            assert model.here.weight.grad is None
            assert torch.equal(model.there.weight.grad, torch.full((2, 2), 3 * scale * (1 + 2)))
    finally:
        helpers.close()


def use(rank, model, order, factor):
    (model.there.weight.sum() * order * factor * rank).backward()
    return "rank", rank


def test_a_helper_compiles_its_copy_of_the_model_once(folder, tmp_path, monkeypatch):  # noqa: F811
    trainer = make(folder, tmp_path)
    compiled = []

    def watched(model):
        compiled.append(model)
        compile_blocks(model)

    monkeypatch.setattr(helpers_module, "compile_blocks", watched)
    maker = Maker(trainer.train_set, ("qa1",), 2, 512, 0.0, 0, 0, 2, 0.9)

    def no_gradient(*_):
        return torch.zeros(3)

    for compile_flag, expected in ((False, []), (True, [trainer.model]), (True, [trainer.model])):
        c = dataclasses.replace(trainer.c, compile=compile_flag, accumulate=2)
        order = (trainer.course.stage, 0)
        help_step(1, trainer.model, order, maker, 2, c, no_gradient)
        assert compiled == expected


class Odd(Exception):
    """One that cannot be pickled as it is."""

    def __init__(self, a, b):
        super().__init__(lambda: a)


def fail(rank, model, order):
    if rank == 1 and order == "odd":
        raise Odd(1, 2)
    if rank == 1 and order != "good":
        raise ValueError(f"no {order}")
    return rank, order


def test_an_error_of_a_helper_is_raised_where_its_result_is_awaited_and_leaves_nothing_behind():
    helpers = Helpers(torch.nn.Linear(2, 2), 2, fail, ())
    try:
        for order, error in (("bread", ValueError), ("odd", RuntimeError), ("milk", ValueError)):
            helpers.start(order)
            with pytest.raises(error, match="Odd" if order == "odd" else f"^no {order}$"):
                helpers.finish()
            helpers.start("good")
            assert helpers.finish() == [(1, "good"), (2, "good")]
    finally:
        helpers.close()


def test_helpers_end_though_others_were_made_after_them():
    first, second = (Helpers(torch.nn.Linear(2, 2), 1, fail, ()) for _ in range(2))
    began = time.monotonic()
    first.close()
    assert time.monotonic() - began < 5
    second.start("good")
    assert second.finish() == [(1, "good")]
    second.close()


def test_memory_that_cannot_be_shared_is_told_in_a_line(monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)\nstack")
    monkeypatch.setattr(torch.nn.Module, "share_memory", full)
    with pytest.raises(ValueError, match=r"No space left on device \(28\)\): --processes 1 needs none$"):
        Helpers(torch.nn.Linear(2, 2), 1, fail, ())


@pytest.mark.parametrize("owner, name", [(torch.optim.AdamW, "step"), (train.Trainer, "collect")])
def test_interrupted_it_saves_behind_a_whole_step_and_goes_on_bit_for_bit(
        capsys, fit, tmp_path, monkeypatch, owner, name):  # noqa: F811
    """Ctrl-C, which a terminal sends to all processes, while the optimiser steps or numbers are fetched."""
    flags = [*STAGES, "--tokens", "20000", "--log_every", "2", "--accumulate", "2", "--processes", "2"]
    fit(tmp_path / "straight", *flags)
    calls, real = [], getattr(owner, name)

    def struck(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            for pid in [child.pid for child in multiprocessing.active_children()] + [os.getpid()]:
                os.kill(pid, signal.SIGINT)
        return real(*args, **options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(owner, name, struck)
        fit(tmp_path / "cut", *flags)
    assert end.value.code == 130 and len(capsys.readouterr().err.splitlines()) == 1
    assert 0 < content(tmp_path / "cut", "progress")["progress"][1] < 20000
    train.main(["--resume", "--out_dir", str(tmp_path / "cut")])
    ends = [content(tmp_path / run, "model", "optimizer", "recent") for run in ("straight", "cut")]
    assert same_tensors(*ends)


def test_the_micro_batches_of_a_step_are_of_one_length_but_not_of_the_same_documents(
        folder, tmp_path):  # noqa: F811
    trainer = make(folder, tmp_path, "--stages", "3:6:32", "--accumulate", "2", "--processes", "1")
    pairs = [(next(trainer.batches), next(trainer.batches)) for _ in range(8)]
    assert all(a.idx.shape[1] == b.idx.shape[1] for a, b in pairs if a.longest)
    assert all(a.longest == b.longest for a, b in pairs) and len({a.longest for a, _ in pairs}) == 2
    assert not any(torch.equal(a.idx, b.idx) for a, b in pairs)


def test_a_helper_that_dies_ends_the_run_in_one_line(capsys, folder, tmp_path, monkeypatch):  # noqa: F811
    real = train.Trainer.train_step

    def kill_then_step(self):
        if self.step == 2:
            os.kill(self.helpers.processes[0].pid, signal.SIGKILL)
            self.helpers.processes[0].join()
        real(self)
    monkeypatch.setattr(train.Trainer, "train_step", kill_then_step)
    err = refused(capsys, train.main, *TINY, *STAGES, "--accumulate", "2", "--processes", "2",
                  "--background", folder, "--out_dir", tmp_path)
    assert "has ended" in err and "--processes 1" in err
    assert not multiprocessing.active_children()


def test_helpers_end_with_the_run_and_with_the_process_they_help(folder, tmp_path):  # noqa: F811
    trainer = make(folder, tmp_path, *STAGES, "--accumulate", "3", "--processes", "3")
    trainer.train_step()
    assert len(multiprocessing.active_children()) == 2
    trainer.close()
    assert not multiprocessing.active_children()
    trainer.close()

    pids, parent = multiprocessing.Pipe()
    child = multiprocessing.Process(target=leave, args=(parent,))
    child.start()
    helpers = pids.recv()
    child.kill()
    child.join()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def leave(pipe):
    """A process with two helpers that never closes them."""
    helpers = Helpers(torch.nn.Linear(2, 2), 2, use, (1.0,))
    pipe.send([p.pid for p in helpers.processes])
    time.sleep(60)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("processes", ["0", "2"])
def test_processes_must_divide_the_micro_batches(capsys, folder, tmp_path, processes):  # noqa: F811
    err = refused(capsys, train.main, *TINY, "--accumulate", "3", "--processes", processes,
                  "--background", folder, "--out_dir", tmp_path)
    assert f"--processes {processes} must divide --accumulate 3" in err


def test_processes_given_on_resuming_must_divide_the_micro_batches_of_the_checkpoint(
        capsys, folder, tmp_path):  # noqa: F811
    trainer = make(folder, tmp_path, "--accumulate", "3")
    trainer.save(), trainer.close()
    again = ["--resume", "--out_dir", str(tmp_path), "--processes"]
    assert "--processes 2 must divide --accumulate 3" in refused(capsys, train.main, *again, "2")
    resumed = train.Trainer(*train.read_flags([*again, "3"]))
    assert resumed.processes == 3
    resumed.close()


@pytest.mark.parametrize("threads, accumulate, processes", [
    (1, 2, 1), (2, 2, 2), (2, 4, 2), (4, 4, 4), (3, 4, 1), (8, 2, 1)])
def test_by_default_a_process_for_each_thread_or_one_with_them_all(
        folder, tmp_path, threads, accumulate, processes):  # noqa: F811
    trainer = make(folder, tmp_path, "--threads", str(threads), "--accumulate", str(accumulate))
    trainer.close()
    assert trainer.processes == processes and trainer.threads == (threads, 1 if processes > 1 else threads)
    assert torch.get_num_threads() == threads       # as a run behind this one would find it
    torch.set_num_threads(1)
