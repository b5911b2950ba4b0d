"""sample.py, what all scripts say to a mistake, and the commands that the documentation shows.

    python -m pytest tests/test_scripts.py -q

Everything runs in this process through main(argv), but for one true command line.
"""

import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import babilong_eval
import sample
import shrink
import train
from data import babi, babilong
from data.common import peak_memory
from data.tokenizer import load, of_checkpoint
from lm2 import LM2, LM2Config, load_checkpoint, save_checkpoint
from test_babilong import book
from test_train import SIZES, TINY, folder, refused  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A checkpoint of random weights whose answers hang on every word of the prompt and on the
    memory."""
    torch.manual_seed(0)
    tokenizer = load()
    model = LM2(LM2Config(vocab_size=tokenizer.n_vocab, segment_len=32, **SIZES))
    with torch.no_grad():
        for layer in model.layers:
            layer.memory.wv.weight.mul_(6)
        model.tok_embeddings.weight.normal_()
        model.output.weight[:] = 0
        model.output.weight[-100:-1] = torch.randn(99, 16)
    path = tmp_path_factory.mktemp("wild") / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=tokenizer.ranks)
    return path


# sample.py

FIRST = "Mary went to the kitchen. John moved to the garden. " * 3
THEN = "Sandra took the milk. Where is Mary?"


def say(capsys, *argv):
    """What sample.py prints."""
    capsys.readouterr()
    sample.main([str(argument) for argument in argv])
    return capsys.readouterr().out


def text_on_standard_input(monkeypatch, text):
    stream = io.TextIOWrapper(io.BytesIO(text.encode("utf-8")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)


@torch.no_grad()
def expected(path, text, n, memory=True):
    """What the checkpoint says to a text, greedily, with everything read again for every token.

    With the memory off, a token is predicted from its own segment alone."""
    model, saved = load_checkpoint(path)
    tokenizer = of_checkpoint(saved, path)
    S = model.cfg.segment_len
    ids = tokenizer.encode(" " + " ".join(text.split()))
    for _ in range(n):
        seen = ids if memory else ids[(len(ids) - 1) // S * S :]
        logits, _, _ = model(torch.tensor([seen]))
        ids.append(logits[0, -1].argmax().item())
    return tokenizer.decode(ids[-n:]) + "\n"


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 65])
def test_a_prompt_is_gone_on_from_greedily_through_several_segments(wild, capsys, n_tokens):
    tokenizer = load()
    prompt = tokenizer.decode(tokenizer.encode(" " + FIRST * 3)[:n_tokens]).strip()
    assert len(tokenizer.encode(" " + prompt)) == n_tokens
    said = {}
    for memory in ("on", "off"):
        flags = ["--prompt", prompt, "--max_new_tokens", 40, "--memory", memory]
        said[memory] = say(capsys, "--ckpt", wild, *flags)
        assert said[memory] == expected(wild, prompt, 40, memory == "on")
    assert said["on"] != said["off"]


def test_a_prompt_of_many_segments_is_read(wild, capsys, tmp_path):
    text = book(150)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    flags = ["--file", tmp_path / "long.txt", "--prompt", THEN, "--max_new_tokens", 2]
    assert say(capsys, "--ckpt", wild, *flags) == expected(wild, text + THEN, 2)


def test_flag_file_standard_input_and_file_with_prompt_are_the_same_text(
    wild, capsys, tmp_path, monkeypatch
):
    whole = tmp_path / "whole.txt"
    part = tmp_path / "part.txt"
    # Line ends and runs of spaces are one space.
    whole.write_text(FIRST + "\n\n  " + THEN + "\n", encoding="utf-8")
    part.write_text(FIRST + "\n", encoding="utf-8")
    by_flag = say(capsys, "--ckpt", wild, "--prompt", FIRST + THEN)
    assert say(capsys, "--ckpt", wild, "--file", whole) == by_flag
    assert say(capsys, "--ckpt", wild, "--file", part, "--prompt", THEN) == by_flag
    text_on_standard_input(monkeypatch, FIRST + THEN)
    assert say(capsys, "--ckpt", wild) == by_flag
    text_on_standard_input(monkeypatch, FIRST)
    assert say(capsys, "--ckpt", wild, "--file", "-", "--prompt", THEN) == by_flag
    assert say(capsys, "--ckpt", wild, "--prompt", THEN + FIRST) != by_flag


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="has no /dev/fd")
def test_a_file_may_be_a_pipe(wild, capsys):
    here, there = os.pipe()
    os.write(there, (FIRST + THEN).encode())
    os.close(there)
    said = say(capsys, "--ckpt", wild, "--file", f"/dev/fd/{here}")
    os.close(here)
    assert said == expected(wild, FIRST + THEN, 16)


def test_a_text_comes_to_a_true_command_line_by_a_pipe_and_from_any_folder(wild, tmp_path):
    command = [sys.executable, ROOT / "sample.py", "--ckpt", wild, "--file", "-"]
    done = subprocess.run(command, input=THEN, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", expected(wild, THEN, 16))
    assert not list(tmp_path.iterdir())


def test_raw_keeps_the_white_space(wild, capsys):
    prompt = "Mary  went\n\nto the kitchen."
    model, saved = load_checkpoint(wild)
    tokenizer = of_checkpoint(saved, wild)
    ids = tokenizer.encode(prompt)
    out = model.generate(torch.tensor([ids]), 16)[0, len(ids) :]
    said = say(capsys, "--ckpt", wild, "--raw", "--prompt", prompt)
    assert said == tokenizer.decode(out.tolist()) + "\n"


def test_a_token_is_printed_before_the_next_and_nothing_after_the_end_of_text(
    wild, capsys, monkeypatch
):
    tokenizer = load()
    euro = tokenizer.encode("€")
    assert len(euro) > 1  # a character of several tokens appears when it is complete
    garden = tokenizer.encode(" garden")
    seen = []

    def stream(self, *_, **__):
        for token in [*garden, *euro, tokenizer.eot, *garden]:
            yield torch.tensor([token])
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(LM2, "stream", stream)
    sample.main(["--ckpt", str(wild), "--prompt", "Where is Mary?"])
    assert seen == [" garden"] + [""] * (len(euro) - 1) + ["€"]
    assert capsys.readouterr().out == "\n"


def test_a_temperature_gives_the_same_words_for_the_same_seed_and_others_for_another(wild, capsys):
    def draw(temperature, seed):
        flags = ["--prompt", THEN, "--temperature", temperature, "--seed", seed]
        return say(capsys, "--ckpt", wild, *flags)

    assert draw(2, 1) == draw(2, 1)
    assert len({draw(2, 1), draw(2, 2), draw(0, 1)}) == 3


# assets/shrink.py, data/common.py


def test_a_small_copy_answers_as_the_checkpoint_does_and_replaces_nothing(wild, tmp_path, capsys):
    whole = tmp_path / "whole.pt"
    small = tmp_path / "small.pt"
    model, _ = load_checkpoint(wild)
    training = dict(train=dict(tasks=("qa1",), lr=0.1), optimizer={}, progress={})
    save_checkpoint(whole, model, tokenizer=load().ranks, **training)
    shrink.main([str(whole), str(small)])
    assert f"{small}: " in capsys.readouterr().out
    copied, content = load_checkpoint(small)
    assert {p.dtype for p in content["model"].values()} == {torch.bfloat16}
    for name, p in model.state_dict().items():
        q = copied.state_dict()[name]
        assert q.dtype == torch.float32
        assert (p - q).abs().max() <= 0.005 * p.abs().max(), name
    assert content["train"] == dict(tasks=("qa1",))
    assert "optimizer" not in content
    assert of_checkpoint(content, small).ranks == load().ranks
    before = small.read_bytes()
    for source, target in ((whole, small), (whole, tmp_path / "no" / "x.pt"), ("no.pt", "y.pt")):
        refused(capsys, shrink.main, source, target)
    assert small.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands a child its parent's peak")
def test_the_peak_memory_of_a_child_of_a_large_parent_is_its_own():
    large = bytearray(b"x") * 2**29
    program = "from data.common import peak_memory; print(peak_memory())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert 2**26 < int(done.stdout) < peak_memory() - len(large) / 2


# Mistakes: one line, exit code 2


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--nope 1", "--nope"),
        ("--temp 1", "--temp"),  # no prefixes
        ("--max_new_tokens few", "few"),
        ("--max_new_tokens -1", "max_new_tokens -1"),
        ("--temperature -0.5", "temperature -0.5"),
        ("--temperature nan", "temperature nan"),
        ("--seed -1", "seed -1"),
        ("--memory maybe", "maybe"),
        ("--device gpu7", "gpu7"),
        ("--device hpu", "hpu"),
        ("--ckpt no/ckpt.pt", "no/ckpt.pt"),
        ("--file no/book.txt", "no/book.txt"),
        ("--file .", ". is a folder"),
    ],
)
def test_sample_names_a_flag_that_cannot_be(capsys, wild, flags, named):
    argv = ["--ckpt", wild, "--prompt", "Where is Mary?", *flags.split()]
    assert named in refused(capsys, sample.main, *argv)


def test_sample_says_that_there_is_no_prompt(capsys, wild, tmp_path, monkeypatch):
    (tmp_path / "nothing.txt").write_bytes(b"")
    text_on_standard_input(monkeypatch, " \n")
    for flags in ([], ["--prompt", "  \n "], ["--file", tmp_path / "nothing.txt"]):
        assert "the prompt is empty" in refused(capsys, sample.main, "--ckpt", wild, *flags)


def test_sample_names_a_file_that_is_not_utf_8(capsys, wild, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Möbel".encode("latin-1"))
    err = refused(capsys, sample.main, "--ckpt", wild, "--file", tmp_path / "latin.txt")
    assert "latin.txt" in err and "UTF-8" in err and "byte 1" in err


@pytest.mark.parametrize("main", [babi.main, babilong.main])
@pytest.mark.parametrize(
    "flags, named",
    [("--task qa99", "qa99"), ("--nope", "--nope"), ("--see 1", "--see"), ("--seed x", "'x'")],
)
def test_the_data_scripts_name_a_flag_that_cannot_be(
    capsys,
    folder,  # noqa: F811
    main,
    flags,
    named,
):
    where = ["--background", folder] if main is babilong.main else []
    assert named in refused(capsys, main, *where, *flags.split())


@pytest.mark.parametrize("length, named", [("7", "length 7 is too short"), ("4q", "4q")])
def test_a_sample_that_cannot_be_shown_is_named(capsys, folder, length, named):  # noqa: F811
    flags = ["--background", folder, "--length", length]
    assert named in refused(capsys, babilong.main, *flags)


@pytest.mark.parametrize(
    "files, named",
    [
        (None, "does not exist"),
        ({"a.md": b"The old captain watched the wet river near the lamp."}, "no .txt file"),
        ({"a.txt": b""}, "no English sentence"),
        ({"a.txt": b"The old captain watched the wet lamp \xff."}, "not UTF-8: a.txt (byte 37)"),
    ],
)
def test_a_background_that_cannot_be_used_is_named_by_every_script(
    capsys, wild, tmp_path, files, named
):
    books = tmp_path / "books"
    if files is not None:
        books.mkdir()
        for name, text in files.items():
            (books / name).write_bytes(text)
    for main, flags in (
        (train.main, [*TINY, "--out_dir", tmp_path / "run"]),
        (babilong_eval.main, ["--ckpt", wild]),
        (babilong.main, []),
    ):
        err = refused(capsys, main, *flags, "--background", books)
        assert "books" in err and named in err
    assert not (tmp_path / "run").exists()


def checkpoint_with(saved, path, change):
    """Write a checkpoint that something is wrong with."""
    config = saved["config"]
    changed = {
        "a tensor": torch.zeros(3),
        "another dict": {"model": {}},
        "an older format": saved | dict(format="lm2-checkpoint-0"),
        "an object": {"path": Path("x")},
        "another size": saved | dict(config=config | dict(n_embd=32)),
        "an unknown size": saved | dict(config=config | dict(colour=1)),
        "no weights": saved | dict(model={}),
        "no sizes": {"format": saved["format"]},
        "no tokenizer": {name: saved[name] for name in ("format", "config", "model")},
        "an odd tokenizer": saved | dict(tokenizer="x y"),
        "a number as tokenizer": saved | dict(tokenizer=5),
        "a small tokenizer": saved
        | dict(tokenizer="".join(saved["tokenizer"].splitlines(keepends=True)[:700])),
    }
    torch.save(changed[change], path)


@pytest.mark.parametrize(
    "change, says",
    [
        ("a tensor", "another format"),
        ("another dict", "another format"),
        ("an older format", "another format"),
        ("an object", "no checkpoint"),
        ("another size", "size mismatch"),
        ("an unknown size", "does not fit"),
        ("no weights", "Missing key"),
        ("no sizes", "lacks 'config'"),
        ("no tokenizer", "lacks 'tokenizer'"),
        ("an odd tokenizer", "does not fit"),
        ("a number as tokenizer", "does not fit"),
        ("a small tokenizer", "a tokenizer of 701 tokens"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(capsys, wild, tmp_path, change, says):
    path = tmp_path / "ckpt.pt"
    checkpoint_with(torch.load(wild, weights_only=True), path, change)
    err = refused(capsys, sample.main, "--ckpt", path, "--prompt", THEN)
    assert str(path) in err and says in err


def test_a_file_that_is_cut_short_is_named_by_every_script(
    capsys,
    wild,
    folder,  # noqa: F811
    tmp_path,
):
    path = tmp_path / "ckpt.pt"
    whole = wild.read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        for main, flags in (
            (sample.main, ["--ckpt", path, "--prompt", THEN]),
            (babilong_eval.main, ["--ckpt", path, "--background", folder]),
            (train.main, ["--resume", "--out_dir", tmp_path]),
        ):
            assert f"{path} is cut short or no checkpoint" in refused(capsys, main, *flags)


def test_a_checkpoint_without_training_is_not_gone_on_with(capsys, wild, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(wild.read_bytes())
    err = refused(capsys, train.main, "--resume", "--out_dir", tmp_path)
    assert "no training to resume" in err


# The documentation


class Parsed(BaseException):
    """Every flag was understood: go no further."""


def commands(text):
    """The arguments of all Python commands in a text, pipes and && taken apart."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        words.whitespace_split = True
        words.commenters = "#"
        for is_break, group in itertools.groupby(words, lambda word: set(word) <= set("|&;")):
            command = list(itertools.takewhile(lambda word: not set(word) <= set("<>"), group))
            if not is_break and command and command[0] in ("python", "python3"):
                found.append(command[1:])
    return found


def understood(command, monkeypatch):
    """Parse a command (without the word python) with its script's own parser -> its module."""
    if command[0] == "-m":
        name = command[1]
        argv = command[2:]
    else:
        assert (ROOT / command[0]).is_file(), f"there is no {command[0]}"
        name = command[0].removesuffix(".py").replace("/", ".")
        argv = command[1:]
    if name in ("pytest", "pip", "venv"):
        return name
    module = importlib.import_module(name)
    parse = train.Parser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr("argparse.ArgumentParser.parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [name, *argv])
        module.main()
    if name == "train" and "--resume" not in argv:
        train.read_flags([*argv, "--out_dir", "no/such/folder"])
    return name


@pytest.mark.parametrize("name", ["README.md", "assets/results.md"])
def test_every_command_in_a_document_has_flags_that_its_script_knows(name, monkeypatch):
    text = (ROOT / name).read_text(encoding="utf-8")
    shown = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
    shown += re.findall(r"`(python [^`]+)`", text)
    names = set()
    for part in shown:
        for command in commands(part):
            names.add(understood(command, monkeypatch))
    assert {"train", "babilong_eval"} <= names


@pytest.mark.parametrize("name", ["README.md", "assets/results.md"])
def test_every_file_heading_and_test_that_a_document_names_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        file_name, _, heading = link.partition("#")
        file = (ROOT / name).parent / file_name if file_name else ROOT / name
        assert file.exists(), link
        if heading and file.suffix == ".md":
            headings = re.findall("^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub("[^a-z0-9 -]", "", text.lower()) for text in headings]
            assert heading in [anchor.replace(" ", "-") for anchor in anchors], link
    tests = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests


SCRIPTS = []
for pattern in ("*.py", "data/**/*.py", "assets/*.py"):
    for path in sorted(ROOT.glob(pattern)):
        if "def main(" in path.read_text(encoding="utf-8"):
            SCRIPTS.append(path.relative_to(ROOT).with_suffix("").as_posix())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_at_the_head_of_a_script_has_flags_that_it_knows(script, monkeypatch):
    doc = importlib.import_module(script.replace("/", ".")).__doc__
    shown = re.findall("^    .*python .*$", doc, re.MULTILINE)
    found = commands("\n".join(shown))
    assert found
    for command in found:
        understood(command, monkeypatch)


def test_an_unknown_flag_in_a_document_would_be_found(monkeypatch, capsys):
    text = "cat a.txt | python sample.py --file - \\\n  --colour red > out.txt   # a remark"
    (command,) = commands(text)
    assert command == ["sample.py", "--file", "-", "--colour", "red"]
    with pytest.raises(SystemExit):
        understood(command, monkeypatch)
    assert "--colour" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample.py", "-m data.background"])
def test_on_a_console_that_lacks_a_sign_a_question_mark_stands_for_it(tmp_path, command):
    sentence = "The cart of Stanis\u0142aw stood before the old mill all winter long. "
    (tmp_path / "a.txt").write_text(sentence, encoding="utf-8")
    argv = [*command.split(), "--background", str(tmp_path)]
    if command == "sample.py":
        argv = ["sample.py", "--ckpt", "assets/five.pt", "--prompt", "Mary"]
        argv += ["--temperature", "50", "--max_new_tokens", "60"]
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=os.environ | dict(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout
