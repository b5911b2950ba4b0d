"""The scripts end to end on a tiny model: training, resuming, sampling, and what they say to a mistake.

    python -m pytest tests/test_scripts.py -q

Everything runs in this process through main(argv), but for two true command lines.
"""
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import babilong_eval
import sample
import train
from data import babi, babilong, predictions
from data.batches import Batches, Stage
from data.cli import JsonLines
from data.device import CudaGraphs, compile_blocks, is_compiled, peak_memory
from data.helpers import add_gradients
from data.metrics import cells, table
from data.recipes import PRESETS, RECIPES
from data.tokenizer import load, of_checkpoint
from lm2 import LM2, Block, LM2Config, Memory, load_checkpoint, save_checkpoint
from test_babilong import MOVED, asked_in, book

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

SIZES = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, n_slot=4, n_mem_head=2)
MODEL = [x for name, value in dict(SIZES, segment_len=64).items() for x in (f"--{name}", str(value))]
TINY = MODEL + ["--batch_size", "4", "--warmup", "5", "--table_lengths", "0k", "--table_n", "2", "--eval_n",
                "2", "--log_every",
                "1", "--threads", "1", "--device", "cpu", "--accumulate", "1"]
ROOMS = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("books")
    (path / "book.txt").write_text(book(600), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_worker_left(monkeypatch):
    """Workers end with the test: those left to the garbage collector make it wait for five seconds each."""
    made, real = [], Batches.__init__
    monkeypatch.setattr(Batches, "__init__", lambda self, *a, **k: made.append(self) or real(self, *a, **k))
    yield
    for batches in made:
        batches.loader = None


@pytest.fixture(scope="session")
def fit(folder):
    """fit(out_dir, *flags) runs train.py on the tiny model -> what it printed."""
    def run(out, *flags):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            train.main([*TINY, "--background", str(folder), "--out_dir", str(out), *flags])
        return text.getvalue()
    return run


@pytest.fixture(scope="session")
def trained(fit, tmp_path_factory):
    """A tiny model trained for a few seconds: its folder, and what train.py printed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, fit(out, "--tokens", "12000", "--stages", "2:0 3:2", "--stage_steps", "40", "--leave_window",
                    "6", "--lr", "1e-2",
                    "--eval_every", "5000", "--table_lengths", "0k 150", "--table_n", "3")


@pytest.fixture(scope="session")
def wild(tmp_path_factory):
    """A checkpoint of random weights whose answers hang on every word of the prompt and on the memory."""
    torch.manual_seed(0)
    tokenizer = load()
    model = LM2(LM2Config(vocab_size=tokenizer.n_vocab, segment_len=32, **SIZES))
    with torch.no_grad():
        for layer in model.layers:
            layer.memory.wv.weight.mul_(6)
        model.output.weight[:] = 0
        model.output.weight[-100:-1] = torch.randn(99, 16)
    path = tmp_path_factory.mktemp("wild") / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=tokenizer.ranks)
    return path


SHORT = ["--tokens", "700", "--stages", "2:0 3:2", "--stage_steps", "3"]


@pytest.fixture(scope="module")
def short(fit, tmp_path_factory):
    """The folder of a run of a few steps, without validation."""
    out = tmp_path_factory.mktemp("short")
    fit(out, *SHORT, "--eval_every", "1000")
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refused(capsys, main, *argv):
    """The one line on standard error with which main(argv) ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(x) for x in argv])
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
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def content(out, *names):
    saved = torch.load(Path(out) / "ckpt.pt", weights_only=True)
    return {name: saved[name] for name in names}


# Training

def test_training_writes_a_checkpoint_metrics_and_predictions_and_no_other_file(trained):
    assert {p.name for p in trained[0].iterdir()} == {"ckpt.pt", "metrics.jsonl", "table.jsonl"}


def test_training_prints_configuration_parameters_device_and_threads_before_the_first_step(trained):
    model, _ = load_checkpoint(trained[0] / "ckpt.pt")
    total, memory = model.n_params()
    head = trained[1].split("validation")[0]
    for words in ("stage_steps=40", "n_embd=16", f"{total:,}", f"{memory:,}", "cpu (asked for)", "float32",
                  "1 threads"):
        assert words in head


def test_training_ends_with_the_table_of_its_predictions(trained):
    rows = predictions.load(trained[0] / "table.jsonl")
    assert len(rows) == 2 * 3 * 2
    assert trained[1].rstrip().endswith(table(cells(rows)).rstrip())


def test_every_line_of_the_metrics_is_json_with_the_step_and_the_tokens_so_far(trained):
    rows = lines(trained[0] / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert all({"tokens", "seconds", "accuracy", "lr", "stage", "grad_norm", "tokens_per_second"} <= set(r)
               for r in steps)
    tokens = [r["tokens"] for r in steps]
    assert tokens == sorted(set(tokens)) and tokens[-2] < 12000 <= tokens[-1]
    checks = [r for r in rows if "validation" in r]
    passed = [b["step"] for a, b in zip(steps, steps[1:]) if b["tokens"] // 5000 > a["tokens"] // 5000]
    assert [r["step"] for r in checks] == passed and len(passed) >= 2
    assert all(set(r["validation"]) == {"qa1 0k", "qa1 150"} for r in checks)


def test_the_learning_rate_of_every_step_is_that_of_the_schedule(trained):
    steps = [r for r in lines(trained[0] / "metrics.jsonl") if "loss" in r]
    c = train.TrainConfig(**content(trained[0], "train")["train"])
    before = [0] + [r["tokens"] for r in steps]
    rates = [round(train.learning_rate(c, i, tokens / 12000), 6) for i, tokens in enumerate(before[:-1])]
    assert [r["lr"] for r in steps] == rates


def test_an_evaluation_leaves_the_threads_as_they_were(folder, tmp_path):
    before, trainer = torch.get_num_threads(), make(folder, tmp_path, "--accumulate", "2", "--processes", "2")
    try:
        trainer.close()
        torch.set_num_threads(before + 1)
        trainer.evaluate([0], 2, 0, ("on",))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_an_evaluation_compiles_nothing(folder, tmp_path):
    trainer = make(folder, tmp_path, "--table_lengths", "0k 150")
    before = trainer.validate()
    compile_blocks(trainer.model, backend=lambda *_: pytest.fail("something was compiled"))
    assert trainer.validate() == before


def test_asked_to_end_before_a_validation_it_saves_and_does_not_validate(folder, tmp_path, monkeypatch):
    trainer = make(folder, tmp_path, "--tokens", "100000", "--eval_every", "1")
    monkeypatch.setattr(trainer, "validate", lambda: pytest.fail("it validated first"))
    real = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda: (real(), trainer.asked.append(True)))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert content(tmp_path, "progress")["progress"][0] == 1


def test_the_loss_falls_from_that_of_guessing_to_that_of_knowing_the_rooms(trained):
    losses = [r["loss"] for r in lines(trained[0] / "metrics.jsonl") if "loss" in r]
    assert abs(losses[0] - math.log(2048)) < 0.3
    assert sum(losses[-10:]) / 10 < 2.2, losses


def test_a_batch_seen_again_and_again_is_learned_by_heart(folder, tmp_path):
    trainer = make(folder, tmp_path, "--lr", "2e-2", "--n_embd", "32", "--tokens", "100000", "--decay",
                   "0.01")
    trainer.batches = itertools.repeat(next(trainer.batches))
    numbers = [step(trainer) for _ in range(60)]
    assert numbers[-1]["loss"] < 0.1 and numbers[-1]["accuracy"] == 1.0


def make(folder, out, *flags):
    """A Trainer of the tiny model that has not begun."""
    argv = [*TINY, "--background", str(folder), "--out_dir", str(out), *flags]
    return train.Trainer(*train.read_flags(argv))


def step(trainer):
    """One step -> its numbers."""
    trainer.train_step()
    return trainer.collect()


def advance(trainer, steps):
    for _ in range(steps):
        step(trainer)
        trainer.next_stage()
    return trainer


def snapshot(trainer):
    return dict(model=trainer.model.state_dict(), optimizer=trainer.optimizer.state_dict()["state"],
                step=trainer.step,
                tokens=trainer.tokens, stage=trainer.course.at, stage_step=trainer.course.steps,
                recent=list(trainer.course.recent), end=trainer.end, batch=trainer.batches.number,
                entered=trainer.batches.stage)


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_saved_and_resumed_half_way_it_ends_bit_for_bit_as_a_run_in_one_go(folder, tmp_path, workers,
                                                                           accumulate):
    flags = ["--tokens", "100000", "--stages", "2:0 3:1 3:2", "--stage_steps", "2", "--plain", "0",
             "--accumulate", accumulate, "--workers", workers]
    straight = advance(make(folder, tmp_path / "a", *flags), 8)
    first = advance(make(folder, tmp_path / "b", *flags), 5)
    assert first.course.at == 2 and first.course.steps == 1
    first.save()
    kept = snapshot(first)
    kept = dict(kept, model={k: v.clone() for k, v in kept["model"].items()})
    first.close()
    second = train.Trainer(*train.read_flags(["--resume", "--out_dir", str(tmp_path / "b")]))
    assert same_tensors(snapshot(second), kept)
    assert second.c == first.c and second.model.cfg == first.model.cfg
    assert same_tensors(snapshot(advance(second, 3)), snapshot(straight))


def test_stopped_by_the_clock_and_resumed_by_the_flag_it_ends_as_a_run_in_one_go(fit, tmp_path, monkeypatch):
    flags = ["--tokens", "2500", "--stages", "2:0 3:2", "--stage_steps", "6"]
    fit(tmp_path / "straight", *flags)
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))     # a second a look at it
    fit(tmp_path / "stopped", *flags, "--minutes", "0.1")
    once = content(tmp_path / "stopped", "progress")["progress"][1]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--resume", "--out_dir", str(tmp_path / "stopped"), "--minutes", "0.1"])
    assert 0 < once < content(tmp_path / "stopped", "progress")["progress"][1] < 2500
    before = (tmp_path / "stopped" / "metrics.jsonl").read_text(encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--resume", "--out_dir", str(tmp_path / "stopped"), "--minutes", "1000"])
    same = ("model", "optimizer", "recent", "config", "tokenizer")
    assert same_tensors(content(tmp_path / "straight", *same), content(tmp_path / "stopped", *same))
    assert (tmp_path / "stopped" / "metrics.jsonl").read_text(encoding="utf-8").startswith(before)
    for file in ("metrics.jsonl", "table.jsonl"):
        runs = [[{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")}
                 for r in lines(tmp_path / run / file)]
                for run in ("straight", "stopped")]
        assert runs[0] == runs[1]


def test_a_log_that_cannot_be_read_is_left_as_it_was(tmp_path):
    for line in ("x}", "5", "{}"):
        (tmp_path / "m.jsonl").write_text(f'{{"step": 1}}\n{line}\n', encoding="utf-8")
        with pytest.raises(ValueError, match="m.jsonl: line 2 is none of a run's"):
            JsonLines(tmp_path / "m.jsonl", 1)
        assert (tmp_path / "m.jsonl").read_text(encoding="utf-8") == f'{{"step": 1}}\n{line}\n'


@pytest.mark.parametrize("rest", ['{"step": 3}\n{"step": 4}\n', '{"step"', "\0\0"])
def test_a_log_goes_on_behind_the_step_of_the_checkpoint(tmp_path, rest):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + rest, encoding="utf-8")
    JsonLines(tmp_path / "m.jsonl", 2).write(step=3)
    assert [row["step"] for row in lines(tmp_path / "m.jsonl")] == [1, 2, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_two_runs_at_once_in_one_folder_are_refused(capsys, folder, tmp_path):
    first = make(folder, tmp_path)
    first.log(a=1)
    err = refused(capsys, train.main, *TINY, "--background", folder, "--out_dir", tmp_path)
    assert "another run writes" in err and str(tmp_path) in err
    assert lines(tmp_path / "metrics.jsonl") == [dict(step=0, tokens=0, seconds=0.0, a=1)]


def test_a_run_in_bfloat16_says_so_and_ends_near_the_one_in_float32_in_helpers_too(fit, tmp_path):
    flags = ["--tokens", "1000", "--stages", "2:0", "--accumulate", "2"]
    says, weights = {}, {}
    for name, more in dict(plain=[], one=["--bfloat16"], two=["--bfloat16", "--processes", "2"]).items():
        says[name] = fit(tmp_path / name, *flags, *more)
        model = content(tmp_path / name, "model")["model"]
        weights[name] = torch.cat([t.flatten() for t in model.values()])
        assert weights[name].dtype == torch.float32
    assert [", bfloat16, " in says[name] for name in says] == [False, True, True]
    assert torch.allclose(weights["one"], weights["two"], atol=1e-5)        # a helper in float32 is 1e-3 off
    assert 1e-6 < (weights["one"] - weights["plain"]).norm() / weights["plain"].norm() < 0.05


def test_what_is_evaluated_and_for_how_long_may_change_on_resuming(folder, tmp_path):
    advance(make(folder, tmp_path, "--tokens", "100000"), 1).save()
    flags = ["--resume", "--out_dir", str(tmp_path), "--table_n", "7", "--minutes", "3"]
    again = train.Trainer(*train.read_flags(flags))
    assert (again.c.table_n, again.c.minutes, again.c.tokens, again.step) == (7, 3.0, 100000, 1)


def test_how_it_is_computed_may_change_on_resuming(folder, tmp_path):
    flags = ["--tokens", "100000", "--stages", "3:2", "--plain", "0"]
    straight = advance(make(folder, tmp_path / "a", *flags), 3)
    trainer = advance(make(folder, tmp_path / "b", *flags), 1)
    trainer.save()
    again = ["--resume", "--out_dir", str(tmp_path / "b"), "--workers", "1"]
    for more in (["--recompute"], ["--compile"], ["--compile", "--recompute"]):
        trainer.close()
        trainer = train.Trainer(*train.read_flags([*again, *more]))
        assert trainer.c.recompute is ("--recompute" in more) and trainer.c.compile is ("--compile" in more)
        assert is_compiled(trainer.model) is trainer.c.compile
        assert trainer.model.recompute is trainer.c.recompute
        if not trainer.c.compile:               # that takes long, and the last bits differ
            assert same_tensors(snapshot(advance(trainer, 2)), snapshot(straight))


def test_recomputing_runs_each_block_a_second_time_for_the_gradient(folder, tmp_path, monkeypatch):
    calls = []
    forward = Block.forward

    def counted(self, *args):
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", counted)
    n_calls = []
    for flags in ([], ["--recompute"]):
        trainer = make(folder, tmp_path, *flags)
        calls.clear()
        trainer.train_step()
        n_calls.append(len(calls))
        trainer.close()
    n_blocks = len(trainer.model.layers)
    assert n_calls == [n_blocks, 2 * n_blocks]


@pytest.mark.parametrize("flags", [["--eval_every", "1000"], ["--eval_every", "2"], ["--workers", "1"]])
def test_validation_and_workers_decide_nothing(fit, short, tmp_path, flags):
    fit(tmp_path, *SHORT, *flags)
    for part in ("model", "optimizer"):
        assert same_tensors(content(short, part), content(tmp_path, part))


def test_the_seed_decides_the_weights_and_the_data(folder, tmp_path):
    first, again, other = (make(folder, tmp_path / name, "--seed", seed) for name, seed in zip("abc", "001"))
    weights = [t.model.state_dict() for t in (first, again, other)]
    assert same_tensors(weights[0], weights[1]) and not same_tensors(weights[0], weights[2])
    documents = [next(t.batches).idx for t in (first, again, other)]
    assert torch.equal(*documents[:2]) and not torch.equal(documents[0], documents[2])


def test_original_stories_are_trained_on_and_their_test_file_is_evaluated(fit, tmp_path, monkeypatch):
    task, made = babi.TASKS["qa1"], {}
    for seed, part in enumerate(("train", "test")):
        made[part] = [task.story(random.Random(seed)) for _ in range(6)]
        text = "".join(babi.format_story(story, task) for story in made[part])
        (tmp_path / f"qa1_{task.stem}_{part}.txt").write_text(text, encoding="utf-8")
    lessons, real = [], babilong.Builder.lesson
    monkeypatch.setattr(babilong.Builder, "lesson",
                        lambda *a, **k: lessons.append(real(*a, **k)) or lessons[-1])
    fit(tmp_path / "run", *SHORT, "--stories", str(tmp_path))
    assert len(lessons) > 10
    assert {(tuple(doc.texts), *doc.questions) for doc in lessons} <= asked_in(made["train"])
    asked = {(q.text, q.answer) for _, q in asked_in(made["test"])}
    table_rows = predictions.load(tmp_path / "run" / "table.jsonl")
    assert {(r["question"], r["target"]) for r in table_rows} <= asked
    assert content(tmp_path / "run", "train")["train"]["stories"] == str(tmp_path)


def test_training_and_validation_use_their_own_parts_of_the_data(folder, tmp_path):
    trainer = make(folder, tmp_path)
    assert (trainer.train_set.part, trainer.val_set.part) == ("train", "val")
    assert len(trainer.train_set.prose) > 4 * len(trainer.val_set.prose)


def test_validation_gives_the_same_numbers_every_time_and_leaves_training_mode_on(folder, tmp_path):
    trainer = make(folder, tmp_path, "--eval_n", "8", "--table_lengths", "0k 150")
    assert trainer.validate() == trainer.validate()
    assert set(trainer.validate()) == {"qa1 0k", "qa1 150"} and trainer.model.training


def test_the_flags_of_the_optimiser_reach_it(folder, tmp_path):
    groups = make(folder, tmp_path, "--weight_decay", "0.3", "--beta2", "0.7").optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0] and {g["betas"] for g in groups} == {(0.9, 0.7)}


def test_the_optimiser_steps_with_the_learning_rate_that_is_logged(folder, tmp_path):
    trainer = make(folder, tmp_path, "--lr", "0.02", "--warmup", "10", "--weight_decay", "0")
    before = trainer.model.norm.weight.clone()
    logged = step(trainer)["lr"]
    moved = (trainer.model.norm.weight - before).abs()
    assert logged == pytest.approx(0.002) and moved.max().item() == pytest.approx(0.002, rel=1e-2)


def test_the_accuracy_of_a_step_counts_answers_and_not_the_end_of_text(folder, tmp_path):
    trainer = make(folder, tmp_path, "--lr", "2e-2", "--warmup", "1")
    batch = next(trainer.batches)
    trainer.batches, idx, targets = itertools.repeat(batch), batch.idx, batch.targets
    eot, ends = trainer.tokenizer.eot, []
    for _ in range(12):
        right = trainer.model(idx)[0].argmax(-1) == targets
        words = right[(targets != -1) & (targets != eot)].float().mean().item()
        ends.append(right[targets == eot].float().mean().item() - words)
        assert step(trainer)["accuracy"] == pytest.approx(words)
    assert max(ends) > 0.2      # had they been counted, the accuracy would have been another


def test_long_gradients_are_cut_to_the_asked_length_and_logged_as_they_were(folder, tmp_path, monkeypatch):
    trainer, seen = make(folder, tmp_path, "--clip", "0.01"), []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: seen.extend(
        p.grad.norm() for p in trainer.model.parameters() if p.grad is not None))
    assert step(trainer)["grad_norm"] > 0.1
    assert torch.stack(seen).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_gradients_of_micro_batches_add_up_to_their_mean(folder, tmp_path):
    first = make(folder, tmp_path).batches
    batches = [next(first), next(first)]

    def norm(*order, accumulate):
        trainer = make(folder, tmp_path, "--accumulate", str(accumulate))
        trainer.batches = iter(order)
        return step(trainer)
    one, two = norm(batches[0], accumulate=1), norm(batches[0], batches[0], accumulate=2)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert two["loss"] == pytest.approx(one["loss"])
    other = norm(batches[1], accumulate=1)
    assert norm(*batches, accumulate=2)["loss"] == pytest.approx((one["loss"] + other["loss"]) / 2)



def test_no_number_is_fetched_within_a_step_and_all_of_them_at_once_behind_it(folder, tmp_path, monkeypatch):
    """On the meta device nothing has a value: whatever asks for one raises. AdamW waits for none, but its
    fused form has no meta; it is replaced."""
    trainer = make(folder, tmp_path, "--stages", "3:2", "--accumulate", "2")
    numbers = []
    for device in ("cpu", "meta"):
        trainer.model, trainer.device = trainer.model.to(device), torch.device(device)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        for _ in range(4):
            trainer.train_step()
        numbers.append([x for _, x in trainer.pending])
        if device == "cpu":
            fetched, real = [], torch.Tensor.tolist
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "tolist", lambda x: fetched.append(x) or real(x))
                for name in ("item", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero"):
                    patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("fetched one by one"))
                trainer.collect()
            assert len(fetched) == 1 and not trainer.pending
    assert [len(n) for n in numbers] == [4, 4]
    assert {x.device.type for x in numbers[1]} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("flags", [["--no-bfloat16"], ["--no-bfloat16", "--compile"], ["--compile"],
                                   ["--no-bfloat16", "--n_mem_token", "4"], ["--no-bfloat16", "--recompute"]])
def test_a_step_as_a_cuda_graph_has_the_gradient_and_the_numbers_of_one_without(folder, tmp_path, flags):
    trainer = make(folder, tmp_path, "--stages", "3:2", "--device", "cuda", *flags)
    ends, parameters = [], list(trainer.model.parameters())
    for run in trainer.add_gradient, train.add_gradient:
        trainer.batches.enter(trainer.course.stages[0])
        trainer.batches.number = trainer.batches.given = 0
        for _ in range(20):     # of few shapes: first seen, recorded, replayed
            torch._foreach_zero_([p.grad for p in parameters])
            numbers = add_gradients(trainer.model, trainer.batches, trainer.course.stage, 1, trainer.c,
                                          trainer.device, run)[-1]
            ends.append([numbers, *(p.grad.clone() for p in parameters)])
    assert any(trainer.add_gradient.graphs.values())
    for a, b in zip(itertools.chain(*ends[:20]), itertools.chain(*ends[20:])):
        assert torch.allclose(a, b, rtol=1e-3 if "--no-bfloat16" in flags else 0.05, atol=1e-4)


def test_a_graph_is_recorded_at_a_shapes_second_call_and_replayed_with_what_it_is_given(monkeypatch):
    """On any machine, with graphs that write down a call and make it when they are replayed."""
    recording, made = [], []

    def f(factor, x, y):
        if not recording:
            return torch.stack([factor * x.sum(), y.sum()])
        recording[0].call = factor, x, y, torch.full((2,), math.nan)
        return recording[0].call[-1]

    class Graph:
        def __init__(self):
            made.append(self)

        def replay(self):
            *call, output = self.call
            output.copy_(f(*call))

    @contextlib.contextmanager
    def record(graph, **_):
        recording.append(graph)
        yield
        recording.clear()

    for name, fake in dict(CUDAGraph=Graph, graph=record, graph_pool_handle=int, empty_cache=int).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    run, kept = CudaGraphs(f), []
    for calls in range(4):
        for factor, n in (1, 3), (2, 3), (1, 5):
            x, y = torch.rand(n), torch.rand(2)
            kept.append((run(factor, x, y), f(factor, x, y)))
        assert len(made) == (3 if calls else 0)
    assert all(torch.equal(a, b) for a, b in kept), "an answer is not of its call, or changed behind it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA can say that a step has waited for it")
def test_a_step_does_not_wait_for_the_gpu(folder, tmp_path):
    trainer = make(folder, tmp_path, "--stages", "3:2", "--device", "cuda", "--workers", "0", "--no-graphs")
    trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.collect()["loss"] > 0


def spoil(monkeypatch, at):
    """From now on the step of this number has a gradient that is not finite."""
    count, real = itertools.count(), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: real(*a) * (
        math.inf if next(count) == at else 1))


@pytest.mark.parametrize("log_every", ["1", "4", "100"])
def test_a_gradient_that_is_not_finite_ends_in_a_line_with_its_step_and_is_not_saved(
        capsys, folder, tmp_path, monkeypatch, log_every):
    spoil(monkeypatch, 2)
    err = refused(capsys, train.main, *TINY, "--tokens", "1500", "--background", folder,
                  "--out_dir", tmp_path, "--log_every", log_every)
    assert "the gradient is inf at step 2: train anew with a lower --lr" in err
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_run_ends_with_a_learning_rate_of_zero_so_many_tokens_into_its_last_stage(fit, tmp_path):
    fit(tmp_path, "--tokens", "1000000", "--final_tokens", "3000", "--stages", "2:0 3:0 4:0",
        "--stage_steps", "5", "--eval_every", "1000000")
    steps = [x for x in lines(tmp_path / "metrics.jsonl") if "loss" in x]
    entered = steps[9]["tokens"]                                    # two stages of five steps
    assert [x["stage"] for x in steps[:12]] == [0] * 5 + [1] * 5 + [2] * 2
    assert steps[-2]["tokens"] < entered + 3000 <= steps[-1]["tokens"]
    done, c = steps[-2]["tokens"] / (entered + 3000), train.TrainConfig(lr=2e-3, warmup=5)
    assert steps[-1]["lr"] == pytest.approx(2e-3 * (1 - done) / c.decay, abs=1e-6)


def test_a_run_ends_with_a_learning_rate_of_zero_at_so_many_minutes_those_before_resuming_included(
        fit, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))     # a second a look at it
    flags = ["--tokens", "1000000", "--stages", "2:0", "--eval_every", "1000000", "--table_n", "1"]
    fit(tmp_path, *flags, "--total_minutes", "1", "--decay", "0.5", "--minutes", "0.5")
    half = content(tmp_path, "progress")["progress"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--resume", "--out_dir", str(tmp_path)])
    *_, seconds = content(tmp_path, "progress")["progress"]
    assert 30 <= half[-1] < 34 and 60 <= seconds < 64
    rates = {x["seconds"]: x["lr"] for x in lines(tmp_path / "metrics.jsonl") if "loss" in x}
    assert min(rates.values()) < 0.1 * max(rates.values()) == pytest.approx(0.1 * train.TrainConfig.lr)
    assert all(rate == pytest.approx(train.TrainConfig.lr) for at, rate in rates.items() if 15 < at < 30)


def test_a_run_can_start_from_the_weights_of_another_and_of_its_sizes(folder, fit, tmp_path):
    fit(tmp_path / "a", "--tokens", "600", "--stages", "2:0", "--n_slot", "3")
    flags = ["--background", str(folder), "--tokens", "600", "--stages", "2:0", "--seed", "5"]
    began = train.Trainer(*train.read_flags(
        ["--init", str(tmp_path / "a" / "ckpt.pt"), "--out_dir", str(tmp_path / "b"), *flags]))
    kept = content(tmp_path / "a", "model", "config")
    assert same_tensors(began.model.state_dict(), kept["model"]) and began.model.cfg.n_slot == 3
    assert began.c.recipe == "qa1"
    assert train.read_flags(["--init", str(ROOT / "assets/five.pt")])[0].recipe == "qa1-5"
    assert (began.step, began.tokens) == (0, 0) and not began.optimizer.state_dict()["state"]


def test_a_run_that_starts_from_a_full_attention_llama_takes_its_recipe(fit, tmp_path):
    sizes = ["--n_mem_layer", "0", "--segment_len", "4096"]
    fit(tmp_path, "--preset", "cpu-full", "--tokens", "600", "--stages", "2:0", "--no-whole", *sizes)
    c, kept, _, _ = train.read_flags(["--init", str(tmp_path / "ckpt.pt")])
    assert (c.preset, c.whole, kept["segment_len"]) == ("cpu-full", True, 4096)
    assert train.read_flags(sizes)[0].whole and not train.read_flags(sizes[:2])[0].whole


def test_lengths_of_the_table_are_asked_once_however_they_are_written(capsys, folder, tmp_path):
    trainer = make(folder, tmp_path, "--table_lengths", "0k 0 200 00200")
    assert trainer.table_lengths == [0, 200]
    assert "--table_lengths" in refused(capsys, train.main, *TINY, "--background", folder, "--out_dir",
                                        tmp_path, "--table_lengths", "")


def test_a_document_longer_than_the_one_segment_of_full_attention_is_named(capsys, folder, tmp_path):
    err = refused(capsys, train.main, *TINY, "--background", folder, "--out_dir", tmp_path,
                  "--stages", "40:0", "--whole", "--usual", "1")
    assert "--whole" in err and "40 facts" in err and "--segment_len" in err


def test_what_is_shorter_than_a_segment_is_one_that_writes_nothing(folder, tmp_path, monkeypatch):
    calls = []
    writes = []
    forward = LM2.forward
    write = Memory.write

    def watched_forward(self, idx, *args, segment_len, **options):
        calls.append((idx.shape[1], segment_len))
        return forward(self, idx, *args, segment_len=segment_len, **options)

    def watched_write(self, *args):
        writes.append(self)
        return write(self, *args)

    monkeypatch.setattr(LM2, "forward", watched_forward)
    monkeypatch.setattr(Memory, "write", watched_write)

    make(folder, tmp_path / "a", "--stages", "2:0", "--plain", "0.5").train_step()
    ((n_tokens, segment_len),) = calls
    assert n_tokens < 64
    assert segment_len == n_tokens
    assert writes == []

    calls.clear()
    make(folder, tmp_path / "b", "--stages", "12:2:32", "--plain", "0.5").train_step()
    ((n_tokens, segment_len),) = calls
    assert n_tokens > 32 and n_tokens % 32 == 0
    assert segment_len == 32
    n_written = n_tokens // 32 - 1  # all segments but the last
    assert len(writes) == n_written * SIZES["n_layer"]


def test_a_run_that_is_interrupted_does_not_save_a_gradient_that_is_not_finite(folder, tmp_path, monkeypatch):
    trainer = make(folder, tmp_path)
    spoil(monkeypatch, 1)
    for _ in range(3):
        trainer.train_step()
    with pytest.raises(ValueError, match="inf at step 1"):
        trainer.save()
    assert not trainer.ckpt.exists()


def test_saving_between_two_lines_keeps_what_counts_towards_leaving_a_stage(folder, tmp_path):
    trainer = make(folder, tmp_path, "--stages", "3:2", "--plain", "0")
    for _ in range(6):
        trainer.train_step()
    trainer.save()
    kept = content(tmp_path, "recent")["recent"]
    assert len(kept) > 1 and kept == list(trainer.course.recent)


def test_a_line_has_the_mean_loss_since_the_line_before_and_the_other_numbers_of_its_step(fit, tmp_path):
    flags = ["--tokens", "1100", "--stages", "2:0"]
    fit(tmp_path / "each", *flags)
    fit(tmp_path / "third", *flags, "--log_every", "3")
    each, third = ([r for r in lines(tmp_path / run / "metrics.jsonl") if "loss" in r]
                   for run in ("each", "third"))
    last = len(each)
    assert last > 6 and [r["step"] for r in third] == sorted({*range(3, last + 1, 3), last})
    before = 0
    for row in third:
        losses, now = [r["loss"] for r in each[before:row["step"]]], each[row["step"] - 1]
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-6)
        assert all(row[k] == now[k] for k in ("tokens", "accuracy", "grad_norm", "lr", "stage"))
        before = row["step"]


def test_tokens_per_second_are_those_of_the_steps_since_the_line_before_without_validation(
        fit, tmp_path, monkeypatch):
    now, real, validate = [0.0], train.Trainer.train_step, train.Trainer.validate

    def slow(wait, do):
        def wrapped(self):
            now[0] += wait
            return do(self)
        return wrapped
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train.Trainer, "train_step", slow(10.0, real))
    monkeypatch.setattr(train.Trainer, "validate", slow(1000.0, validate))
    said = fit(tmp_path, "--tokens", "1100", "--stages", "2:0", "--log_every", "2", "--eval_every", "400")
    rows, before, rates = lines(tmp_path / "metrics.jsonl"), dict(step=0, tokens=0), []
    assert sum("validation" in r for r in rows) == 2
    for row in (r for r in rows if "loss" in r):
        steps, tokens = row["step"] - before["step"], row["tokens"] - before["tokens"]
        rates.append(tokens / (10 * steps))
        assert row["tokens_per_second"] == round(rates[-1])
        before = row
    assert f"({sorted(rates)[len(rates) // 2]:,.0f} tokens/s)" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux hands a child its parent's peak")
def test_the_peak_memory_of_a_child_of_a_large_parent_is_its_own():
    large = bytearray(b"x") * 2**30             # a gigabyte; torch takes a third of that
    done = subprocess.run([sys.executable, "-c", "from data.device import peak_memory; print(peak_memory())"],
                          cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert 2**26 < int(done.stdout) < len(large) // 2 and peak_memory() > len(large)


# Curriculum and learning rate

@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"lm2-1.7b"}))
def test_every_recipe_has_stages_that_every_preset_can_run_and_flags_win_over_it(preset):
    plain = {f.name for f in dataclasses.fields(train.TrainConfig)}
    for recipe, changes in RECIPES.items():
        assert all(set(knobs) <= plain for knobs in changes.values())
        c, sizes, _, _ = train.read_flags(["--recipe", recipe, "--preset", preset, "--lr", "0.5"])
        stages = [Stage.parse(s, LM2Config(**sizes).segment_len) for s in c.stages.split()]
        assert {task for s in stages for task in s.tasks} <= set(c.tasks.split()) and c.lr == 0.5
        llama = LM2Config(**sizes).kind == "llama"
        assert c.tokens == {"qa1": 8_000_000 if llama else 16_000_000, "qa1-5": 90_000_000,
                            "qa1-10-hours": 60_000_000, "qa1-10": 4_000_000_000}[recipe]
        assert c.final_tokens >= c.tokens or not llama          # its few stages do not end it early
        if llama and not c.whole:
            assert max(s.segments for s in stages) == 1         # it has nothing to carry
    made_for = "qa1-10" if preset.startswith("gpu") else "qa1-5" if "hours" in preset else "qa1"
    assert train.read_flags(["--preset", preset])[0].recipe == made_for
    c, sizes, _, _ = train.read_flags(["--recipe", made_for])
    assert preset.startswith(c.preset) and sizes == PRESETS[c.preset]


@pytest.mark.parametrize("flags, kind", [([], "lm2"), (["--n_mem_layer", "0"], "llama"),
                                         (["--n_mem_token", "8"], "rmt"),
                                         (["--preset", "cpu-llama"], "llama")])
def test_a_recipe_follows_the_kind_of_model_however_it_is_asked_for(flags, kind):
    c, sizes, _, _ = train.read_flags(flags)
    assert LM2Config(**sizes).kind == kind
    assert max(int(s.split(":")[1]) for s in c.stages.split()) == (1 if kind == "llama" else 32)
    assert c.tokens == (8_000_000 if kind == "llama" else 16_000_000)


def test_to_compile_without_a_compiler_is_refused_before_the_start(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    said = refused(capsys, train.main, *TINY, "--compile", "--out_dir", str(tmp_path / "new"))
    assert "finds no compiler" in said and not (tmp_path / "new").exists()


def test_only_batches_of_a_stages_most_segments_count_towards_leaving_it(folder, tmp_path, monkeypatch):
    trainer = make(folder, tmp_path, "--stages", "3:3", "--tokens", "100000")
    made, real = [], Batches.__next__
    monkeypatch.setattr(Batches, "__next__", lambda self: made.append(real(self)) or made[-1])
    for _ in range(12):
        step(trainer)
    longest = [batch.idx.shape[1] == 3 * 64 for batch in made]
    assert 0 < sum(longest) < 12 and len(trainer.course.recent) == sum(longest)


def test_the_stage_decides_facts_segments_and_their_length(folder, tmp_path, monkeypatch):
    trainer, seen = make(folder, tmp_path, "--stages", "2:0 4:2:32 6:3", "--stage_steps", "50"), []
    trainer.course.steps = 50
    trainer.next_stage()
    monkeypatch.setattr(trainer.model, "forward", lambda *a, segment_len, real=trainer.model.forward, **k:
                        seen.append(segment_len) or real(*a, segment_len=segment_len, **k))
    made, real = [], Batches.__next__
    monkeypatch.setattr(Batches, "__next__", lambda self: made.append(real(self)) or made[-1])
    for _ in range(6):
        trainer.train_step()
    assert trainer.course.stages == [Stage(2, 0, 64), Stage(4, 2, 32), Stage(6, 3, 64)]
    assert seen == [32] * 6
    rows = [row for batch in made for row in batch.idx.tolist()]
    facts = [len(MOVED.findall(trainer.tokenizer.decode(row))) for row in rows]
    assert set(facts) == {2, 3, 4}


@pytest.mark.parametrize("step, done, rate", [
    (0, 0.0, 0.1), (4, 0.0, 0.5), (9, 0.01, 1.0), (100, 0.5, 1.0), (100, 0.8, 1.0), (100, 0.9, 0.5),
    (100, 1.0, 0.0), (100, 1.1, 0.0)])
def test_the_learning_rate_warms_up_and_ends_at_zero(step, done, rate):
    c = train.TrainConfig(lr=1.0, warmup=10, decay=0.2)
    assert train.learning_rate(c, step, done) == pytest.approx(rate, abs=1e-6)


# Checkpoints

def shrink(argv):
    """Run assets/shrink.py, which is no module of the project."""
    spec = importlib.util.spec_from_file_location("shrink", ROOT / "assets" / "shrink.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(argv)


def test_a_small_copy_answers_as_the_checkpoint_does_and_replaces_nothing(fit, tmp_path, capsys):
    fit(tmp_path / "run", "--tokens", "100")
    whole = tmp_path / "run" / "ckpt.pt"
    small = tmp_path / "small.pt"
    shrink([str(whole), str(small)])
    model, _ = load_checkpoint(whole)
    copied, content = load_checkpoint(small)
    assert f"{small}: " in capsys.readouterr().out
    assert small.stat().st_size < whole.stat().st_size / 2
    assert {p.dtype for p in content["model"].values()} == {torch.bfloat16}
    for name, p in model.state_dict().items():
        q = copied.state_dict()[name]
        assert q.dtype == torch.float32
        assert (p - q).abs().max() <= 0.005 * p.abs().max(), name
    assert content["train"]["tasks"] == "qa1"
    assert of_checkpoint(content, small).ranks == load().ranks
    before = small.read_bytes()
    for flags in (
        [whole, small],
        [whole, tmp_path / "no" / "x.pt"],
        [tmp_path / "no.pt", tmp_path / "y.pt"],
    ):
        assert str(tmp_path) in refused(capsys, shrink, *flags)
    assert small.read_bytes() == before
    small.rename(whole)
    resume = ["--resume", "--out_dir", tmp_path / "run"]
    assert "no training to resume" in refused(capsys, train.main, *resume)


@pytest.mark.parametrize("change", [dict(colour=1), dict(usual=None)])
def test_a_checkpoint_of_other_knobs_is_not_gone_on_with(capsys, short, tmp_path, change):
    saved = torch.load(short / "ckpt.pt", weights_only=True)
    knobs = saved["train"] | change
    path = tmp_path / "ckpt.pt"
    torch.save(saved | dict(train={k: v for k, v in knobs.items() if k != "usual" or v}), path)
    assert list(change)[0] in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)


def test_a_checkpoint_gives_back_weights_sizes_and_tokenizer(folder, tmp_path):
    trainer = advance(make(folder, tmp_path), 1)
    trainer.save()
    model, saved = load_checkpoint(tmp_path / "ckpt.pt")
    assert model.cfg == trainer.model.cfg
    assert same_tensors(dict(model.state_dict()), dict(trainer.model.state_dict()))
    assert of_checkpoint(saved, tmp_path / "ckpt.pt").ranks == trainer.tokenizer.ranks


@torch.no_grad()
def read(model, idx, sizes):
    out, state = [], None
    for piece in idx.split(sizes, dim=1):
        logits, _, state = model(piece, state=state)
        out.append(logits)
    return torch.cat(out, dim=1), state


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """From a checkpoint: a model with segments of 128, the same in float64, 4,096 tokens, what they give."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("long") / "ckpt.pt"
    model = LM2(LM2Config(vocab_size=load().n_vocab, segment_len=128, **SIZES))
    with torch.no_grad():
        model.output.weight.normal_(std=0.5)
    save_checkpoint(path, model)
    model, _ = load_checkpoint(path)
    idx = torch.randint(64, (1, 4096), generator=torch.Generator().manual_seed(0))
    double = LM2(model.cfg).double()
    double.load_state_dict(model.state_dict())
    return model, double, idx, read(double, idx, [4096])


def pieces(way):
    """The sizes of calls that read 4,096 tokens."""
    sizes, rng = {"segments": [128] * 32, "tokens": [3072] + [1] * 1024, "odd": []}[way], random.Random(0)
    while sum(sizes) < 4096:
        sizes.append(min(4096 - sum(sizes), rng.choice([1, 3, 127, 128, 129, 300])))
    return sizes


@pytest.mark.parametrize("way", ["segments", "tokens", "odd"])
def test_4096_tokens_in_pieces_give_the_logits_banks_and_answer_of_one_call(long_model, way):
    model, double, idx, (whole, end) = long_model
    parts, last = read(double, idx, pieces(way))
    assert (whole - parts).abs().max() < 1e-9
    for a, b in zip(end.carried, last.carried, strict=True):
        assert (a - b).abs().max() < 1e-9
    assert torch.equal(end.open_ids, last.open_ids)

    answers = []    # greedy, in the float32 of the checkpoint
    for sizes in ([4096], pieces(way) if way != "tokens" else [4000] + [1] * 96):
        logits, state = read(model, idx, sizes)
        answers.append([logits[0, -1].argmax().item()])
        while len(answers[-1]) < 8:
            logits, _, state = model(torch.tensor([answers[-1][-1:]]), state=state)
            answers[-1].append(logits[0, -1].argmax().item())
    assert answers[0] == answers[1] == model.generate(idx, 8)[0, 4096:].tolist()


# Sampling

FIRST = "Mary went to the kitchen. John moved to the garden. " * 3
THEN = "Sandra took the milk. Where is Mary?"


def say(capsys, *argv):
    capsys.readouterr()
    sample.main([str(x) for x in argv])
    return capsys.readouterr().out


def text_on(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8")), encoding="utf-8"))


@torch.no_grad()
def expected(path, text, n, memory=True):
    """What the checkpoint says to a text, greedily, with everything read again for every token.

    With the memory off, a token is predicted from its own segment alone."""
    model, saved = load_checkpoint(path)
    tokenizer = of_checkpoint(saved, path)
    S = model.cfg.segment_len
    ids = tokenizer.encode(" " + " ".join(text.split()))
    for _ in range(n):
        seen = ids
        if not memory:
            while len(seen) > S:
                seen = seen[S:]
        logits, _, _ = model(torch.tensor([seen]))
        ids.append(logits[0, -1].argmax().item())
    return tokenizer.decode(ids[-n:]) + "\n"


def test_a_prompt_is_gone_on_from_greedily_with_the_asked_number_of_tokens(wild, capsys):
    for n in (1, 5):
        said = say(capsys, "--ckpt", wild, "--prompt", FIRST + THEN, "--max_new_tokens", n)
        assert said == expected(wild, FIRST + THEN, n)


def test_flag_file_standard_input_and_file_with_prompt_are_the_same_text(wild, capsys, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole.txt", tmp_path / "part.txt"
    whole.write_text(FIRST + "\n\n  " + THEN + "\n",
                     encoding="utf-8")      # line ends and runs of spaces are one space
    part.write_text(FIRST + "\n", encoding="utf-8")
    by_flag = say(capsys, "--ckpt", wild, "--prompt", FIRST + THEN)
    assert say(capsys, "--ckpt", wild, "--file", whole) == by_flag
    assert say(capsys, "--ckpt", wild, "--file", part, "--prompt", THEN) == by_flag
    if Path("/dev/fd").is_dir():
        here, there = os.pipe()
        os.write(there, (FIRST + THEN).encode()), os.close(there)
        assert say(capsys, "--ckpt", wild, "--file", f"/dev/fd/{here}") == by_flag      # a pipe
        os.close(here)
    text_on(monkeypatch, FIRST + THEN)
    assert say(capsys, "--ckpt", wild) == by_flag
    text_on(monkeypatch, FIRST)
    assert say(capsys, "--ckpt", wild, "--file", "-", "--prompt", THEN) == by_flag
    assert say(capsys, "--ckpt", wild, "--prompt", THEN + FIRST) != by_flag


def test_raw_keeps_the_white_space(wild, capsys):
    prompt = "Mary  went\n\nto the kitchen."
    model, saved = load_checkpoint(wild)
    tokenizer = of_checkpoint(saved, wild)
    ids = tokenizer.encode(prompt)
    assert say(capsys, "--ckpt", wild, "--raw", "--prompt", prompt) == tokenizer.decode(
        model.generate(torch.tensor([ids]), 16)[0, len(ids):].tolist()) + "\n"


def test_a_token_is_printed_before_the_next_and_nothing_after_the_end_of_text(wild, capsys, monkeypatch):
    tokenizer, seen = load(), []
    euro = tokenizer.encode("€")
    assert len(euro) > 1        # a character of several tokens appears when it is complete

    def stream(self, *_, **__):
        for token in [*tokenizer.encode(" garden"), *euro, tokenizer.eot, *tokenizer.encode(" never")]:
            yield torch.tensor([token])
            seen.append(capsys.readouterr().out)
    monkeypatch.setattr(LM2, "stream", stream)
    sample.main(["--ckpt", str(wild), "--prompt", "Where is Mary?"])
    assert seen[0] == " garden" and seen[1:] == [""] * (len(euro) - 1) + ["€"]
    assert capsys.readouterr().out == "\n"


def test_a_trained_model_answers_with_a_room_and_stops(trained, capsys):
    said = say(capsys, "--ckpt", trained[0] / "ckpt.pt", "--prompt",
               "Mary went to the garden. Where is Mary?")
    assert said.strip() in ROOMS and said.endswith("\n")


@pytest.mark.parametrize("memory", ["on", "off"])
def test_a_prompt_of_hundreds_of_segments_is_read_with_and_without_memory(wild, capsys, tmp_path, memory):
    (tmp_path / "long.txt").write_text(book(400), encoding="utf-8")
    text = (tmp_path / "long.txt").read_text(encoding="utf-8") + THEN
    said = say(capsys, "--ckpt", wild, "--file", tmp_path / "long.txt", "--prompt", THEN, "--memory", memory,
               "--max_new_tokens", 2)
    assert said == expected(wild, text, 2, memory == "on")


def test_without_memory_other_words_are_said(wild, capsys):
    flags = ["--ckpt", wild, "--prompt", FIRST + THEN, "--max_new_tokens", 12]
    on = say(capsys, *flags, "--memory", "on")
    off = say(capsys, *flags, "--memory", "off")
    assert on == expected(wild, FIRST + THEN, 12)
    assert off == expected(wild, FIRST + THEN, 12, memory=False)
    assert on != off


@pytest.mark.parametrize("memory", ["on", "off"])
@pytest.mark.parametrize("n_tokens", [1, 30, 31, 32, 33, 63, 64, 65])
def test_what_is_said_goes_on_through_several_segments(wild, capsys, n_tokens, memory):
    tokenizer = load()
    ids = tokenizer.encode(" " + FIRST * 3)[:n_tokens]
    prompt = tokenizer.decode(ids).strip()
    assert len(tokenizer.encode(" " + prompt)) == n_tokens
    flags = ["--ckpt", wild, "--prompt", prompt, "--max_new_tokens", 70, "--memory", memory]
    assert say(capsys, *flags) == expected(wild, prompt, 70, memory == "on")


def test_a_temperature_gives_the_same_words_for_the_same_seed_and_others_for_another(wild, capsys):
    one, again, other, cold = (say(capsys, "--ckpt", wild, "--prompt", THEN, "--temperature", t, "--seed", s)
                               for t, s in ((2, 1), (2, 1), (2, 2), (0, 1)))
    assert one == again and len({one, other, cold}) == 3


# Mistakes: one line, exit code 2

@pytest.mark.parametrize("flags, named", [
    (["--nope", "1"], "--nope"), (["--token", "5"], "--token"), (["--tokens", "many"], "many"),
    (["--lr", "fast"], "fast"),
    (["--tokens"], "--tokens"), (["stray"], "stray"), (["--tokens", "0"], "tokens 0"),
    (["--batch_size", "-1"], "batch_size -1"),
    (["--tasks", "qa99"], "qa99"), (["--tasks", ""], "tasks"), (["--preset", "huge"], "huge"),
    (["--recipe", "qa0"], "qa0"), (["--whole", "--stages", "2:0 4:2"], "documents of 128 tokens"),
    (["--decay", "0"], "decay 0"), (["--plain", "1.5"], "1.5"),
    (["--n_head", "3", "--n_kv_head", "3"], "n_head 3"),
    (["--n_mem_head", "5"], "n_mem_head 5"), (["--n_layer", "0"], "n_layer is 0"),
    (["--n_slot", "99"], "n_slot 99"),
    (["--stages", "2"], "'2'"), (["--stages", "2:x"], "2:x"), (["--stages", "2:0 1:0"], "1:0"),
    (["--stages", "2:1:999"], "2:1:999"), (["--stages", "2:0@qa9"], "qa9"),
    (["--stages", "2:1:9:9"], "2:1:9:9"), (["--stages", ""], "--stages"), (["--table_lengths", "4x"], "4x"),
    (["--device", "gpu7"], "gpu7"), (["--threads", "-1"], "-1"), (["--resume", "--n_embd", "32"], "--n_embd"),
    (["--resume", "--tokens", "99"], "--tokens"), (["--resume", "--log_every", "5"], "--log_every"),
    (["--workers", "-1"], "workers -1"), (["--clip", "-1"], "clip -1"), (["--lr", "-1"], "-1"),
    (["--stories", "no/babi"], "no/babi"), (["--init", "no/ckpt.pt"], "--ffn_dim"),
    (["--total_minutes", "0"], "total_minutes 0"),
    (["--lr", "nan"], "nan"),
])
def test_train_names_a_flag_that_cannot_be(capsys, tmp_path, folder, flags, named):
    base = [] if "--resume" in flags else [*MODEL, "--background", folder, "--tokens", "50", "--table_n", "1"]
    assert named in refused(capsys, train.main, *base, "--out_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_one_file_of_stories_is_not_both_trained_on_and_validated_with(capsys, tmp_path, folder):
    task, file = babi.TASKS["qa1"], tmp_path / "qa1_train.txt"
    file.write_text(babi.format_story(task.story(random.Random(0)), task), encoding="utf-8")
    err = refused(capsys, train.main, *TINY, "--tokens", "50", "--stories", file, "--background", folder,
                  "--out_dir", tmp_path / "run")
    assert f"--stories {file} is no folder" in err and not (tmp_path / "run").exists()


def test_train_names_a_length_too_short_for_the_facts_before_it_trains(capsys, tmp_path, folder):
    err = refused(capsys, train.main, *TINY, "--tokens", "50", "--table_lengths", "0k 7", "--background",
                  folder, "--out_dir",
                  tmp_path / "run")
    assert "length 7 is too short" in err
    assert not (tmp_path / "run" / "ckpt.pt").exists(), "hours of training would come before this line"


@pytest.mark.parametrize("flags, named", [
    (["--nope", "1"], "--nope"), (["--task", "qa1"], "--task"), (["--n", "few"], "few"),
    (["--n", "0"], "n 0"),
    (["--max_tokens", "0"], "max_tokens 0"), (["--tasks", "qa99"], "qa99"), (["--tasks"], "--tasks"),
    (["--lengths", "7"], "7"),
    (["--lengths", "4q"], "4q"), (["--memory", "maybe"], "maybe"), (["--device", "gpu7"], "gpu7"),
    (["--out", "no/such/folder/x.jsonl"], "no/such/folder"), (["--ckpt", "no/ckpt.pt"], "no/ckpt.pt"),
    (["--background", "no/books"], "no/books"), (["--from_predictions", "no/p.jsonl"], "no/p.jsonl"),
])
def test_babilong_eval_names_a_flag_that_cannot_be(capsys, wild, folder, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    base = ["--ckpt", wild, "--background", folder, "--n", "1"]
    assert named in refused(capsys, babilong_eval.main, *base, *flags)
    assert not list(tmp_path.iterdir()) and [p.name for p in wild.parent.iterdir()] == ["ckpt.pt"]


def test_babilong_eval_names_a_wrong_cell_before_the_first_answer(capsys, wild, folder, monkeypatch):
    monkeypatch.setattr(babilong_eval, "answer", lambda *_: pytest.fail("an answer was asked for"))
    for flags in (["--tasks", "qa1", "qa99"], ["--lengths", "0k", "7"]):
        err = refused(capsys, babilong_eval.main, "--ckpt", wild, "--background", folder, *flags)
        assert flags[-1] in err


@pytest.mark.parametrize("flags, named", [
    (["--nope", "1"], "--nope"), (["--temp", "1"], "--temp"), (["--max_new_tokens", "few"], "few"),
    (["--max_new_tokens", "-1"], "-1"), (["--temperature", "-0.5"], "-0.5"), (["--seed", "-1"], "--seed -1"),
    (["--seed", "9" * 20], "9" * 20),
    (["--temperature", "nan"], "nan"), (["--memory", "maybe"], "maybe"),
    (["--device", "gpu7"], "gpu7"), (["--device", "hpu"], "hpu"), (["--ckpt", "no/ckpt.pt"], "no/ckpt.pt"),
    (["--file", "no/book.txt"], "no/book.txt"),
    (["--prompt", "  \n "], "empty"),
])
def test_sample_names_a_flag_that_cannot_be(capsys, wild, flags, named):
    assert named in refused(capsys, sample.main, "--ckpt", wild, "--prompt", "Where is Mary?", *flags)


def test_sample_says_that_standard_input_or_a_file_is_empty(capsys, wild, tmp_path, monkeypatch):
    text_on(monkeypatch, " \n")
    assert "empty" in refused(capsys, sample.main, "--ckpt", wild)
    (tmp_path / "nothing.txt").write_bytes(b"")
    assert "empty" in refused(capsys, sample.main, "--ckpt", wild, "--file", tmp_path / "nothing.txt")


def test_sample_names_a_file_that_is_not_utf_8(capsys, wild, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Möbel".encode("latin-1"))
    err = refused(capsys, sample.main, "--ckpt", wild, "--file", tmp_path / "latin.txt")
    assert "latin.txt" in err and "UTF-8" in err and "byte 1" in err


@pytest.mark.parametrize("main", [babi.main, babilong.main])
@pytest.mark.parametrize("flags, named", [(["--task", "qa99"], "qa99"), (["--nope"], "--nope"),
                                          (["--see", "1"], "--see"), (["--seed", "x"], "'x'")])
def test_the_data_scripts_name_a_flag_that_cannot_be(capsys, folder, main, flags, named):
    base = ["--background", folder] if main is babilong.main else []
    assert named in refused(capsys, main, *base, *flags)


@pytest.mark.parametrize("length, named", [("7", "length 7 is too short"), ("4q", "4q")])
def test_a_sample_that_cannot_be_shown_is_named(capsys, folder, length, named):
    assert named in refused(capsys, babilong.main, "--background", folder, "--length", length)


@pytest.mark.parametrize("files, named", [
    (None, "does not exist"), ({}, "no .txt file"), ({"a.txt": b""}, "no English sentence"),
    ({"a.txt": b"The old captain watched the wet river near the lamp \xff."}, "a.txt is not UTF-8"),
    ({"a.md": b"The old captain watched the wet river near the old broken lamp."}, "no .txt file")])
def test_a_background_that_cannot_be_used_is_named_by_every_script(capsys, wild, tmp_path, files, named):
    books = tmp_path / "books"
    if files is not None:
        books.mkdir()
        for name, text in files.items():
            (books / name).write_bytes(text)
    for main, flags in ((train.main, [*TINY, "--out_dir", tmp_path / "run"]),
                        (babilong_eval.main, ["--ckpt", wild]), (babilong.main, [])):
        err = refused(capsys, main, *flags, "--background", books)
        assert "books" in err and named in err
    assert not (tmp_path / "run").exists()


def broken_checkpoints(wild, folder):
    """Files that are no checkpoint: (name, what the line says)."""
    whole = wild.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.7, 0.99, 1.0):
        (folder / f"cut{share}").write_bytes(whole[:min(int(share * len(whole)), len(whole) - 1)])
        yield f"cut{share}", "cut short or no checkpoint"
    (folder / "text").write_text("Mary went to the kitchen.\n" * 50, encoding="utf-8")
    yield "text", "cut short or no checkpoint"
    saved = torch.load(wild, weights_only=True)
    for name, value, says in (
            ("tensor", torch.zeros(3), "another format"), ("other", {"model": {}}, "another format"),
            ("older", dict(saved, format="lm2-checkpoint-0"), "another format"),
            ("object", {"path": Path("x")}, "no checkpoint"),
            ("sizes", dict(saved, config=dict(saved["config"], n_embd=32)), "size mismatch"),
            ("unknown", dict(saved, config=dict(saved["config"], colour=1)), "does not fit"),
            ("empty", dict(saved, model={}), "Missing key"),
            ("bare", {"format": saved["format"]}, "lacks 'config'")):
        torch.save(value, folder / name)
        yield name, says


def test_every_script_names_a_checkpoint_that_is_none(capsys, wild, folder, tmp_path):
    for name, says in broken_checkpoints(wild, tmp_path):
        err = refused(capsys, sample.main, "--ckpt", tmp_path / name, "--prompt", "Where is Mary?")
        assert str(tmp_path / name) in err and says in err, name
    cut = tmp_path / "cut0.3"
    assert str(cut) in refused(capsys, babilong_eval.main, "--ckpt", cut, "--background", folder)
    (tmp_path / "ckpt.pt").write_bytes(wild.read_bytes()[:5000])
    assert "cut short" in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)


@pytest.mark.parametrize("change, says", [
    (None, "lacks 'tokenizer'"), ("x y", "does not fit"), (5, "does not fit"),
    ("few", "a tokenizer of 701 tokens, a model of 2048")])
def test_a_model_without_a_tokenizer_of_its_own_is_named(capsys, folder, tmp_path, change, says):
    path = tmp_path / "ckpt.pt"
    model = LM2(LM2Config(vocab_size=load().n_vocab, segment_len=32, **SIZES))
    if change is None:
        save_checkpoint(path, model)
    elif change == "few":
        lines_of_ranks = load().ranks.splitlines(keepends=True)
        save_checkpoint(path, model, tokenizer="".join(lines_of_ranks[:700]))
    else:
        save_checkpoint(path, model, tokenizer=change)
    for main, flags in (
        (sample.main, ["--ckpt", path, "--prompt", THEN]),
        (babilong_eval.main, ["--ckpt", path, "--background", folder]),
        (train.main, ["--resume", "--out_dir", tmp_path]),
    ):
        err = refused(capsys, main, *flags)
        assert str(path) in err and says in err


def test_resuming_without_a_checkpoint_or_from_one_without_training_is_refused(capsys, wild, tmp_path):
    assert str(tmp_path / "ckpt.pt") in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(wild.read_bytes())
    assert "no training to resume" in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)


@pytest.mark.parametrize("inside", ["", "run"])
def test_an_out_dir_where_a_file_stands_is_named(capsys, folder, tmp_path, inside):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = tmp_path / "file" / inside
    flags = [*TINY, "--tokens", "50", "--background", folder, "--out_dir", out]
    assert str(out) in refused(capsys, train.main, *flags)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def half(content, file, *_, **__):
    file.write(b"half of it")
    raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")


def full(content, file, *_, **__):
    file.write(b"half of it")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failure", [half, full, "a folder"])
def test_a_failed_save_leaves_the_old_checkpoint_byte_for_byte(capsys, folder, fit, tmp_path, monkeypatch,
                                                               failure):
    out = tmp_path / "run"
    fit(out, "--tokens", "50")
    before = (out / "ckpt.pt").read_bytes()
    if failure == "a folder":
        (out / "ckpt.pt.tmp").mkdir()
    else:
        monkeypatch.setattr(torch, "save", failure)
    err = refused(capsys, train.main, *TINY, "--tokens", "100", "--background", folder, "--out_dir", out)
    assert "ckpt.pt" in err
    assert (out / "ckpt.pt").read_bytes() == before
    assert failure == "a folder" or not (out / "ckpt.pt.tmp").exists()


def prediction(**changes):
    return json.dumps(dict(task="qa1", length=0, i=0, memory="on", question="Where is Mary?", target="garden",
                           output="garden", seconds=0.1, outside=False) | changes)


@pytest.mark.parametrize("text, line", [
    (b"", None), (b"not json\n", 1), (prediction().encode()[:40], 1), (prediction().encode() + b"\n{}\n", 2),
    (prediction().encode() + b"\n\xff\xfe\n", 2), (b"[1, 2]\n", 1), (b"7\n", 1),
    (prediction(task="qa99").encode(), 1),
    (prediction(length="4k").encode(), 1), (prediction(target=5).encode(), 1),
    (prediction(output=None).encode(), 1),
    (b'["task", "length", "memory", "question", "target", "output", "outside"]\n', 1)])
def test_predictions_that_are_none_are_named_with_their_line(capsys, tmp_path, text, line):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(text)
    err = refused(capsys, babilong_eval.main, "--from_predictions", path)
    assert str(path) in err and (line is None or f"line {line} " in err)


# True command lines

def command_line(script, *argv, cwd, text=""):
    return subprocess.run([sys.executable, ROOT / script, *argv], input=text, cwd=cwd, capture_output=True,
                          timeout=120, encoding="utf-8")


def test_a_text_comes_by_a_pipe_and_from_any_folder(wild, tmp_path):
    done = command_line("sample.py", "--ckpt", wild, "--file", "-", cwd=tmp_path, text=THEN)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", expected(wild, THEN, 16))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] not enough memory: you tried to allocate 9 bytes")])
def test_a_full_memory_is_told_in_one_line(capsys, monkeypatch, tmp_path, folder, error):
    def full(self):
        raise error
    monkeypatch.setattr(train.Trainer, "train_step", full)
    err = refused(capsys, train.main, *TINY, "--background", folder, "--out_dir", tmp_path / "run")
    assert "not enough memory" in err


@pytest.mark.parametrize("words", ["shapes do not match", "CUDA error: an illegal memory access was met"])
def test_an_error_of_our_own_is_not_hidden(monkeypatch, tmp_path, folder, words):
    def broken(self):
        raise RuntimeError(words)
    monkeypatch.setattr(train.Trainer, "train_step", broken)
    with pytest.raises(RuntimeError, match=words):
        train.main([*TINY, "--background", str(folder), "--out_dir", str(tmp_path / "run")])


def test_a_mistake_on_a_true_command_line_is_one_line_and_exit_code_2(tmp_path):
    done = command_line("train.py", "--tasks", "qa99", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "'qa99'" in done.stderr
    assert not list(tmp_path.iterdir())


# The documentation

class Parsed(BaseException):
    """Every flag was understood: go no further."""


def commands(text):
    """The argument lists of all commands in a text, pipes and && taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        words.whitespace_split, words.commenters = True, "#"
        for is_break, command in itertools.groupby(words, lambda w: set(w) <= set("|&;")):
            command = list(itertools.takewhile(lambda w: not set(w) <= set("<>"), command))
            if not is_break and command and command[0] in ("python", "python3"):
                yield command[1:]


def understood(command, monkeypatch):
    """Parses `command` (without the word python) with its script's own parser; the script's name."""
    if command[0] == "-m":
        name, argv = command[1], command[2:]
    else:
        assert (ROOT / command[0]).is_file(), f"there is no {command[0]}"
        name, argv = command[0].removesuffix(".py").replace("/", "."), command[1:]
    if name in ("pytest", "pip", "venv"):
        return name
    module, parse = importlib.import_module(name), train.Parser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr("argparse.ArgumentParser.parse_args", stop)
        patch.setattr(sys, "argv", [name, *argv])
        module.main()
    if name == "train":
        c, sizes, _, _ = train.read_flags(argv)
        assert [Stage.parse(s, LM2Config(**sizes).segment_len) for s in c.stages.split()]
    return name


@pytest.mark.parametrize("name", ["README.md", "assets/results.md"])
def test_every_command_in_a_document_has_flags_that_its_script_knows(name, monkeypatch):
    text = (ROOT / name).read_text(encoding="utf-8")
    shown = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text,
                       re.DOTALL) + re.findall(r"`(python [^`]+)`", text)
    names = [understood(command, monkeypatch) for part in shown for command in commands(part)]
    assert {"train", "babilong_eval"} <= set(names)


@pytest.mark.parametrize("name", ["README.md", "assets/results.md"])
def test_every_file_heading_and_test_that_a_document_names_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link.split("#") for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    files = [(ROOT / name).parent / link[0] for link in links]
    assert files and [file for file in files if not file.exists()] == []
    for file, link in zip(files, links):
        if file.suffix == ".md" and link[1:]:
            headings = re.findall("^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert link[1] in [re.sub("[^a-z0-9 -]", "", x.lower()).replace(" ", "-") for x in headings]
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    assert [test for test in re.findall(r"`(test_\w+)`", text) if f"def {test}(" not in tests] == []


@pytest.mark.parametrize(
    "file",
    ["lm2", "train", "sample", "babilong_eval", "assets/shrink", "data/babi", "data/babi_world",
     "data/babi_puzzles", "data/babilong", "data/background", "data/download", "data/pictures",
     "data/published", "data/tokenizer"])
def test_every_command_at_the_head_of_a_script_has_flags_that_it_knows(file, monkeypatch):
    doc = importlib.import_module(file.replace("/", ".")).__doc__
    shown = "\n".join(line for line in doc.splitlines() if line.startswith("    ") and "python " in line)
    assert [understood(command, monkeypatch) for command in commands(shown)]


def test_an_unknown_flag_in_a_document_would_be_found(monkeypatch, capsys):
    (command,) = commands("cat a.txt | python sample.py --file - \\\n  --colour red > out.txt   # a remark")
    assert command == ["sample.py", "--file", "-", "--colour", "red"]
    with pytest.raises(SystemExit):
        understood(command, monkeypatch)
    assert "--colour" in capsys.readouterr().err
