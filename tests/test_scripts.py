"""The scripts end to end on a tiny model: training, resuming, sampling, and what they say to a mistake.

    python -m pytest tests/test_scripts.py -q

Everything runs in this process through main(argv), but for two true command lines.
"""
import contextlib
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
from data import babi, babilong
from data.common import peak_memory
from train import CudaGraphs
from data.tokenizer import load, of_checkpoint
from lm2 import LM2, LM2Config, load_checkpoint, save_checkpoint
from test_babilong import book
from test_train import SIZES, TINY, fit, folder, refused, trained  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

ROOMS = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}


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


# Device

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux hands a child its parent's peak")
def test_the_peak_memory_of_a_child_of_a_large_parent_is_its_own():
    large = bytearray(b"x") * 2**30             # a gigabyte; torch takes a third of that
    done = subprocess.run([sys.executable, "-c", "from data.common import peak_memory; print(peak_memory())"],
                          cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert 2**26 < int(done.stdout) < len(large) // 2 and peak_memory() > len(large)


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
    assert content["train"]["tasks"] == ("qa1",)
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
    ):
        err = refused(capsys, main, *flags)
        assert str(path) in err and says in err


def test_resuming_without_a_checkpoint_or_from_one_without_training_is_refused(capsys, wild, tmp_path):
    assert str(tmp_path / "ckpt.pt") in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(wild.read_bytes())
    assert "no training to resume" in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)


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
        if "--resume" not in argv:      # no checkpoint is there to go on from
            train.read_flags([*argv, "--out_dir", "no/such/folder"])
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
    ["lm2", "train", "sample", "babilong_eval", "assets/shrink", "data/babi/files", "data/babi/worlds",
     "data/babi/puzzles", "data/babilong", "data/background", "data/download", "assets/pictures",
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
