"""sample.py beyond one prompt: top_k and samples, texts from nothing, saved states, conversations.

    python -m pytest tests/test_sample.py -q

tests/test_scripts.py has the tests of one prompt and its flags.
"""

import io
import os
import sys
from pathlib import Path

import pytest
import torch

import lm2
import sample
from data.tokenizer import load
from lm2 import (
    LM2Config,
    build_model,
    choose,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
)
from test_train import refused

torch.set_num_threads(1)

TOKENIZER = load()
S = 4  # segment_len of the models here
KINDS = {
    "lm2": dict(n_slot=4, n_mem_head=2, mem_blocks=(1,)),
    "rmt": dict(n_mem_token=2),
    "llama": dict(n_mem_layer=0),
}
# One token each, alone and behind a space.
WORDS = "Mary went to the kitchen John moved garden Sandra took milk office Daniel".split()  # noqa: SIM905


def wild_model(kind, seed=0, **sizes):
    """A model of random weights, whose answers hang on every word and on the memory. It may say
    the last 100 ids, one of which is the end of text."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, ffn_dim=32, segment_len=S) | KINDS[kind] | sizes
    model = build_model(LM2Config(vocab_size=TOKENIZER.n_vocab, **sizes)).eval()
    with torch.no_grad():
        for layer in model.layers:
            if layer.memory is not None:
                layer.memory.wv.weight.mul_(6)
        model.tok_embeddings.weight.normal_()
        model.output.weight[:] = 0
        model.output.weight[-100:] = torch.randn(100, model.cfg.n_embd)
        model.output.weight[-1] *= 1.5  # the end of text
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """From name to path: a checkpoint of each kind, one of text, and one of the same sizes as
    "lm2" with one weight that differs a little."""
    path_of = {}
    for name in [*KINDS, "text", "nearly"]:
        model = wild_model(name if name in KINDS else "lm2")
        content = dict(tokenizer=TOKENIZER.ranks)
        if name == "text":
            content["train"] = dict(recipe="text")
        if name == "nearly":
            with torch.no_grad():
                model.layers[1].memory.null[0] += 1e-6
        path_of[name] = tmp_path_factory.mktemp("ckpt") / f"{name}.pt"
        save_checkpoint(path_of[name], model, **content)
    return path_of


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def set_input(monkeypatch, text, stream=io.TextIOWrapper):
    """Let standard input hold a text."""
    monkeypatch.setattr(sys, "stdin", stream(io.BytesIO(text.encode()), encoding="utf-8"))


def say(capsys, *argv):
    """What sample.py prints."""
    capsys.readouterr()
    sample.main([str(argument) for argument in argv])
    return capsys.readouterr().out


def continuation(model, ids, n=16):
    """The ids that the model says behind these at temperature 0, in one call, up to an end of
    text."""
    said = model.generate(torch.tensor([ids]), n)[0, len(ids) :].tolist()
    if TOKENIZER.eot in said:
        said = said[: said.index(TOKENIZER.eot) + 1]
    return said


def printed(ids):
    """How sample.py prints a continuation."""
    return TOKENIZER.decode([i for i in ids if i != TOKENIZER.eot]) + "\n"


# States


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_a_saved_state_is_continued_as_the_document_is_in_one_call(
    checkpoints, kind, capsys, tmp_path
):
    ckpt = ["--ckpt", checkpoints[kind]]
    model, _ = load_checkpoint(checkpoints[kind])
    state = tmp_path / "book.state"
    book = tmp_path / "book.txt"
    question = TOKENIZER.encode(" Where is Mary?")
    seen = set()
    for n in (1, 3, 4, 5, 8, 9):  # around the ends of two segments
        book.write_text("\n ".join(WORDS[:n]) + " \n", encoding="utf-8")
        ids = TOKENIZER.encode(" " + " ".join(WORDS[:n]))
        assert len(ids) == n
        reading = ["--file", book, "--save_state", state, "--max_new_tokens", 0]
        assert say(capsys, *ckpt, *reading) == "\n"
        alone = printed(continuation(model, ids))
        asked = printed(continuation(model, ids + question))
        for document in (["--file", book], ["--load_state", state]):
            assert say(capsys, *ckpt, *document) == alone
            assert say(capsys, *ckpt, *document, "--prompt", "Where  is Mary?") == asked
        seen |= {alone, asked}
    assert len(seen) > 6  # the answers depend on what was read


def test_a_state_saved_behind_a_loaded_one_holds_both(checkpoints, capsys, tmp_path):
    ckpt = ["--ckpt", checkpoints["lm2"], "--max_new_tokens", 8]
    state = tmp_path / "state"
    for part in (WORDS[:5], WORDS[5:]):
        loaded = ["--load_state", state] if state.exists() else []
        said = say(capsys, *ckpt, *loaded, "--prompt", " ".join(part), "--save_state", state)
    assert said == say(capsys, *ckpt, "--prompt", " ".join(WORDS))
    assert said == say(capsys, *ckpt, "--load_state", state)


def test_a_loaded_state_without_a_prompt_leaves_standard_input_alone(
    checkpoints, capsys, monkeypatch, tmp_path
):
    state = tmp_path / "state"
    ckpt = ["--ckpt", checkpoints["lm2"]]
    said = say(capsys, *ckpt, "--prompt", "Mary went", "--save_state", state)
    set_input(monkeypatch, "John moved")
    assert say(capsys, *ckpt, "--load_state", state) == said
    assert sys.stdin.read() == "John moved"


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n_layer=3, n_embd=64, n_head=4, mem_blocks=(2,), n_slot=16, segment_len=64),
        dict(n_layer=24, mem_blocks=None, n_mem_layer=24),
    ],
)
def test_a_state_file_is_as_small_as_its_tensors_and_loads_as_it_was(sizes, tmp_path):
    model = wild_model("lm2", **sizes)
    length = 5 * model.cfg.segment_len
    ids = torch.randint(TOKENIZER.n_vocab, (8, length))
    both = model.read(ids)
    row = both.map(lambda tensor: tensor[2:3])  # views of larger tensors
    path = tmp_path / "state"
    save_state(path, model, row)
    banks = [bank for bank in row.carried if bank is not None]
    n_bytes = sum(tensor.nbytes for tensor in [*banks, row.open_ids])
    assert path.stat().st_size <= n_bytes + 4096
    loaded = load_state(path, model)
    assert torch.equal(loaded.open_ids, row.open_ids)
    assert loaded.segment_len == row.segment_len
    for bank, expected in zip(loaded.carried, row.carried, strict=True):
        assert (bank is None) == (expected is None)
        assert bank is None or torch.equal(bank, expected)
    with pytest.raises(ValueError, match="batch of 1"):
        save_state(path, model, both)


@pytest.fixture
def book(checkpoints, tmp_path):
    """A state file of the checkpoint "lm2"."""
    path = tmp_path / "book.state"
    model, _ = load_checkpoint(checkpoints["lm2"])
    save_state(path, model, model.read(torch.tensor([TOKENIZER.encode(" ".join(WORDS))])))
    return path


@pytest.mark.parametrize("other", ["nearly", "rmt", "llama"])
def test_the_state_of_another_model_is_refused(checkpoints, book, capsys, other):
    err = refused(capsys, sample.main, "--ckpt", checkpoints[other], "--load_state", book)
    assert f"{book} is no state of this model" in err and "other weights" in err


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("harmed",))


def with_value(tensor, value):
    """A copy whose last number is replaced."""
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def changes(saved):
    """From what is wrong with a state file to its content."""
    ids = saved["open_ids"]
    carried = saved["carried"]
    return {
        "an object": saved | dict(model=Hostile()),
        "a tensor": carried,
        "an older format": saved | dict(format="lm2-state-0"),
        "no ids": {name: saved[name] for name in saved if name != "open_ids"},
        "an id too large": saved | dict(open_ids=with_value(ids, TOKENIZER.n_vocab)),
        "an id below 0": saved | dict(open_ids=with_value(ids, -1)),
        "ids that are not whole": saved | dict(open_ids=ids.float()),
        "ids of a row": saved | dict(open_ids=ids[0]),
        "too many ids": saved | dict(open_ids=ids.new_zeros(1, S + 1)),
        "ids of two documents": saved | dict(open_ids=ids.expand(2, -1)),
        "not a number": saved | dict(carried=with_value(carried, float("nan"))),
        "an infinite number": saved | dict(carried=with_value(carried, float("inf"))),
        "another bank": saved | dict(carried=carried[..., :8]),
        "two banks": saved | dict(carried=torch.cat((carried, carried))),
        "half the precision": saved | dict(carried=carried.half()),
        "no bank": saved | dict(carried=None),
        "no tensor": saved | dict(carried=[1.0]),
        "no data": saved | dict(carried=carried.to("meta")),
        "long segments": saved | dict(segment_len=S + 1),
        "segments of a text": saved | dict(segment_len="4"),
        "segments of a fraction": saved | dict(segment_len=3.5),
    }


@pytest.mark.parametrize("change", changes(dict(open_ids=torch.zeros(1, 1), carried=torch.ones(1))))
def test_a_state_that_is_damaged_is_named(checkpoints, book, capsys, monkeypatch, tmp_path, change):
    monkeypatch.chdir(tmp_path)
    torch.save(changes(torch.load(book, weights_only=True))[change], book)
    err = refused(capsys, sample.main, "--ckpt", checkpoints["lm2"], "--load_state", book)
    assert str(book) in err
    assert not Path("harmed").exists()


def test_a_state_that_is_missing_cut_short_or_a_checkpoint_is_named(
    checkpoints, book, capsys, tmp_path
):
    ckpt = ["--ckpt", checkpoints["lm2"], "--load_state"]
    for path in (tmp_path, tmp_path / "no.state"):
        assert f"there is no state {path}" in refused(capsys, sample.main, *ckpt, path)
    assert "lm2-state-1" in refused(capsys, sample.main, *ckpt, checkpoints["lm2"])
    whole = book.read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        book.write_bytes(whole[:n])
        assert "cut short or no state" in refused(capsys, sample.main, *ckpt, book)


def test_an_error_leaves_the_older_state_as_it_was(
    checkpoints, book, capsys, monkeypatch, tmp_path
):
    before = book.read_bytes()
    argv = ["--ckpt", checkpoints["lm2"], "--save_state", book]
    refused(capsys, sample.main, *argv, "--prompt", "  ")
    refused(capsys, sample.main, *argv, "--load_state", tmp_path / "no.state")
    refused(capsys, sample.main, *argv, "--file", book)
    write = torch.save

    def disk_full(content, file):
        write(content, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lm2.torch, "save", disk_full)
    err = refused(capsys, sample.main, *argv, "--prompt", "Mary went")
    assert f"cannot write the state {book}" in err and "No space left" in err
    assert book.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["book.state"]


def test_a_state_that_could_not_be_written_is_refused_before_the_book_is_read(
    checkpoints, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(lm2.Decoder, "read", None)
    before = checkpoints["lm2"].read_bytes()
    for path in (tmp_path, tmp_path / "no" / "state", checkpoints["lm2"]):
        argv = ["--ckpt", checkpoints["lm2"], "--prompt", "Mary", "--save_state", path]
        assert f"--save_state {path}" in refused(capsys, sample.main, *argv)
    assert checkpoints["lm2"].read_bytes() == before


# Models that were trained on text


def test_a_model_of_text_reads_raw_text_behind_an_end_of_text(checkpoints, capsys, tmp_path):
    model, _ = load_checkpoint(checkpoints["text"])
    ckpt = ["--ckpt", checkpoints["text"]]
    text = "Mary  went\n\nto the kitchen.\n"
    ids = [TOKENIZER.eot, *TOKENIZER.encode(text)]
    book = tmp_path / "book.txt"
    book.write_text(text, encoding="utf-8", newline="")
    state = tmp_path / "state"
    assert say(capsys, *ckpt, "--prompt", text) == printed(continuation(model, ids))
    asked = printed(continuation(model, ids + TOKENIZER.encode(" John\nmoved")))
    say(capsys, *ckpt, "--file", book, "--save_state", state)
    for document in (["--file", book], ["--load_state", state]):
        assert say(capsys, *ckpt, *document, "--prompt", "John\nmoved") == asked
    new_line = [TOKENIZER.eot, *TOKENIZER.encode("\n")]
    assert say(capsys, *ckpt, "--prompt", "\n") == printed(continuation(model, new_line))


@pytest.mark.parametrize("stream", [Terminal, io.TextIOWrapper])
def test_only_a_model_of_text_starts_from_nothing(
    checkpoints, capsys, monkeypatch, tmp_path, stream
):
    set_input(monkeypatch, "", stream)
    model, _ = load_checkpoint(checkpoints["text"])
    state = tmp_path / "state"
    ckpt = ["--ckpt", checkpoints["text"]]
    said = say(capsys, *ckpt, "--save_state", state)
    assert said == printed(continuation(model, [TOKENIZER.eot]))
    # Behind such a state a prompt begins a document, too.
    prompt = ["--prompt", "Mary went"]
    assert say(capsys, *ckpt, "--load_state", state, *prompt) == say(capsys, *ckpt, *prompt)
    err = refused(capsys, sample.main, "--ckpt", checkpoints["lm2"])
    assert "there is no prompt" in err
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    assert "the prompt is empty" in refused(capsys, sample.main, *ckpt, "--file", empty)


# Draws


def test_top_k_draws_from_the_likeliest_ids_alone():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.9, 2.8], [9.0, 1.0, 9.0, 9.0, 0.0]])

    def draws(top_k, temperature=1.0):
        generator = torch.Generator().manual_seed(0)
        rows = [choose(logits, temperature, generator, top_k) for _ in range(200)]
        return torch.stack(rows)

    few = draws(3)
    assert set(few[:, 0].tolist()) == {1, 3, 4}
    assert set(few[:, 1].tolist()) == {0, 2, 3}
    assert len(set(draws(2)[:, 1].tolist())) == 2  # of three that are equally likely
    assert torch.equal(draws(1, temperature=50.0)[:, 0], draws(None, temperature=0)[:, 0])
    for top_k in (5, 1000):
        assert torch.equal(draws(top_k), draws(None))
    assert not torch.equal(few, draws(None))
    with pytest.raises(ValueError, match="top_k 0"):
        choose(logits, 0.0, None, 0)


@pytest.mark.parametrize("memory", ["on", "off"])
def test_sample_draws_from_the_top_k(checkpoints, capsys, memory):
    argv = ["--ckpt", checkpoints["lm2"], "--prompt", "Mary went", "--memory", memory]
    argv += ["--max_new_tokens", 40, "--temperature"]
    likeliest = say(capsys, *argv, 0)
    assert say(capsys, *argv, 5, "--top_k", 1) == likeliest
    assert len({likeliest, say(capsys, *argv, 5), say(capsys, *argv, 5, "--top_k", 2)}) == 3


@pytest.mark.parametrize("memory", ["on", "off"])
def test_samples_are_draws_of_one_prompt_that_a_seed_gives_again(checkpoints, capsys, memory):
    argv = ["--ckpt", checkpoints["lm2"], "--prompt", " ".join(WORDS), "--memory", memory]

    def draw(n, seed, temperature=3):
        flags = ["--samples", n, "--seed", seed, "--temperature", temperature]
        return say(capsys, *argv, *flags)

    samples = draw(5, 1).split("---------------\n")
    assert len(samples) == 5 and len(set(samples)) == 5
    assert samples[0] == draw(1, 1)
    assert draw(5, 1).split("---------------\n") == samples
    assert draw(5, 2).split("---------------\n") != samples
    # No continuation changes the state that the next one starts from.
    assert draw(3, 1, temperature=0).split("---------------\n") == [draw(1, 1, temperature=0)] * 3


def test_the_prompt_of_many_samples_is_read_once(checkpoints, capsys, monkeypatch):
    calls = []
    read = lm2.Decoder.read

    def counted(self, idx, *arguments):
        calls.append(idx.shape[1])
        return read(self, idx, *arguments)

    monkeypatch.setattr(lm2.Decoder, "read", counted)
    prompt = " ".join(WORDS)
    say(capsys, "--ckpt", checkpoints["lm2"], "--prompt", prompt, "--samples", 3)
    assert calls[0] == len(WORDS)
    assert set(calls[1:]) == {1}


# A conversation


@pytest.mark.parametrize("name", ["lm2", "rmt", "text"])
def test_a_conversation_is_one_document(checkpoints, capsys, monkeypatch, name):
    model, _ = load_checkpoint(checkpoints[name])
    lines = [f"{word} went  home" for word in WORDS]
    ids = [TOKENIZER.eot] if name == "text" else []
    answers = []
    ends = set()
    for line in lines:
        if name != "text":
            text = " " + " ".join(line.split())
        elif ids[-1] == TOKENIZER.eot:
            text = line
        else:
            text = " " + line
        ids += TOKENIZER.encode(text)
        answer = continuation(model, ids)
        answers.append(printed(answer))
        ends.add(answer[-1] == TOKENIZER.eot)
        ids += answer
    assert ends == {True, False}
    assert len(set(answers)) > 6
    ckpt = ["--ckpt", checkpoints[name], "--interactive"]
    set_input(monkeypatch, "\n".join(lines))
    assert say(capsys, *ckpt) == "".join(answers)
    # As the end of standard input does, an empty line ends it.
    set_input(monkeypatch, "\r\n".join([*lines[:3], "", *lines[3:]]))
    assert say(capsys, *ckpt) == "".join(answers[:3])


def test_a_conversation_goes_on_behind_a_prompt_or_a_state(
    checkpoints, capsys, monkeypatch, tmp_path
):
    ckpt = ["--ckpt", checkpoints["lm2"]]
    state = tmp_path / "state"
    prompt = ["--prompt", "Mary went to the kitchen"]
    say(capsys, *ckpt, *prompt, "--save_state", state)
    asked = say(capsys, *ckpt, "--prompt", "Mary went to the kitchen John moved")
    for before in (prompt, ["--load_state", state]):
        set_input(monkeypatch, "John moved\n", Terminal)
        sample.main([str(argument) for argument in [*ckpt, *before, "--interactive"]])
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == (asked, "> > ")


# Mistakes


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--top_k 0", "--top_k 0"),
        ("--top_k few", "few"),
        ("--samples 0", "--samples 0"),
        ("--memory off --save_state x", "--save_state needs the memory"),
        ("--memory off --load_state x", "--load_state needs the memory"),
        ("--memory off --interactive", "--interactive needs the memory"),
        ("--interactive --samples 2", "--samples 2 and --interactive"),
        ("--interactive --file -", "both read standard input"),
    ],
)
def test_flags_that_do_not_go_together_are_named(checkpoints, capsys, flags, named):
    argv = ["--ckpt", checkpoints["lm2"], "--prompt", "Mary", *flags.split()]
    assert named in refused(capsys, sample.main, *argv)
