"""What assets/text.py measures of models of plain text, and what assets/pictures.py draws of it.

python -m pytest tests/test_text_figures.py -q
"""

import json
import math
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import pictures
import text
from data import tokenizer as tokenizers
from data.loss import Measured, measure, table
from data.text import read_documents, read_texts
from lm2 import LM2, LM2Config, load_checkpoint, save_checkpoint
from test_train import refused
from text import BEFORE_SEGMENT, IN_SEGMENT, NOWHERE

CURVES = Path(__file__).resolve().parent.parent / "assets" / "curves"
S = 16  # tokens of a segment
N_FILES = 80
SENTENCE = "the old ship goes under a bridge of stone over the new river and past a red house"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of short texts."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for i in range(N_FILES):
        content = " ".join(rng.choices(WORDS, k=50 + i))
        (folder / f"{i}.txt").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ckpts(texts, tmp_path_factory):
    """Checkpoints of random models: lm2 and llama have the shipped tokenizer, bytes and ids have
    others. Only lm2 was trained on these texts."""
    folder = tmp_path_factory.mktemp("models")
    sizes = dict(n_layer=1, n_embd=16, n_head=2, ffn_dim=32, n_slot=4, n_mem_head=2)
    paths = {}
    for seed, (name, tokenizer_name, more) in enumerate(
        [
            ("lm2", "shipped", dict(segment_len=S)),
            ("llama", "shipped", dict(segment_len=2 * S, n_mem_layer=0)),
            ("bytes", "bytes", dict(segment_len=4 * S)),
            ("ids", "ids", dict(segment_len=S)),
        ]
    ):
        tokenizer = tokenizers.choose(tokenizer_name)
        torch.manual_seed(seed)
        model = LM2(LM2Config(vocab_size=tokenizer.n_vocab, **sizes, **more))
        with torch.no_grad():
            for layer in model.layers:
                if layer.memory is not None:
                    layer.memory.wv.weight.mul_(20)
        train = dict(recipe="text", text=("gone",), skip_bad=False)
        if name == "lm2":
            train["text"] = (str(texts),)
        paths[name] = folder / f"{name}.pt"
        save_checkpoint(paths[name], model, **tokenizer.for_checkpoint(), train=train)
    return paths


def measured_of(nats, targets, segment_len=2, n_bytes=None):
    """One document whose losses are given by mode."""
    losses = {mode: [np.array(values, float)] for mode, values in nats.items()}
    sizes = None if n_bytes is None else [np.array(n_bytes)]
    return Measured(segment_len, [np.array(targets)], sizes, losses)


def token_files(folder, ids):
    """The folder, with both parts of these ids as nanoGPT writes them."""
    for part in ("train", "val"):
        np.array(ids, "<u2").tofile(folder / f"{part}.bin")
    return folder


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def run(capsys, tmp_path, *argv):
    """What the command prints, and what it writes."""
    out = tmp_path / "text.json"
    text.main([str(argument) for argument in (*argv, "--out", out)])
    return capsys.readouterr().out, json.loads(out.read_bytes(), parse_constant=no_constant)


# ---- where a token had occurred, and what it gains ----


@pytest.mark.parametrize("segment_len", [1, 4, 7])
def test_a_token_is_in_the_segment_if_its_segment_has_read_it_before(segment_len):
    rng = random.Random(segment_len)
    end_of_text = 99
    ids = [end_of_text, *(rng.randrange(12) for _ in range(60))]
    expected = []
    for i, target in enumerate(ids[1:]):
        read_in_segment = ids[i // segment_len * segment_len : i + 1]
        if target in read_in_segment:
            expected.append(IN_SEGMENT)
        elif target in ids[: i + 1]:
            expected.append(BEFORE_SEGMENT)
        else:
            expected.append(NOWHERE)
    assert set(expected) == {IN_SEGMENT, BEFORE_SEGMENT, NOWHERE}
    assert text.places_before(np.array(ids[1:]), segment_len).tolist() == expected


def test_the_gain_of_a_token_is_a_sum_over_its_occurrences_beyond_the_first_segment():
    tokenizer = tokenizers.choose("bytes")
    a, b, c = b"abc"
    targets = [a, b, c, a, a, b]
    on = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    off = [9.0, 9.0, 0.5, 1.5, 3.0, 1.25]  # the first segment's gains of 8 do not count
    measured = measured_of(dict(on=on, off=off), targets)
    gains = text.gains_of((measured, "on"), (measured, "off"), tokenizer)
    first, second = gains["tokens"]  # c loses, so it is not there
    assert first == dict(
        token="'a'", id=a, occurrences=2, gain=2.5, mean=1.25, before_segment=0.5
    )  # the first of the two had stood in the first segment, the second one directly before
    assert second["token"] == "'b'" and second["gain"] == 0.25 and second["before_segment"] == 1
    assert gains["n_tokens"] == 4 and gains["gain"] == 2.25
    found = {line["place"]: (line["tokens"], line["gain"]) for line in gains["places"]}
    assert found == {
        text.PLACES[BEFORE_SEGMENT]: (2, 0.75),
        text.PLACES[IN_SEGMENT]: (1, 2.0),
        text.PLACES[NOWHERE]: (1, -0.5),
    }
    printed = text.gain_table("on", "off", gains)
    assert (
        "'a'                                  2           2.5       1.250            50%" in printed
    )
    assert "in the document, not in segment     50%     33%  0.3750" in printed


def test_the_segments_of_the_first_column_say_which_tokens_count_and_what_a_segment_is():
    tokenizer = tokenizers.choose("bytes")
    targets = [7, 1, 2, 7, 3, 1, 2, 1]  # the last one is in the segment of long alone
    short = measured_of(dict(on=[0.0] * 8), targets, segment_len=1)
    long = measured_of(dict(on=[1.0] * 8), targets, segment_len=4)
    for first, second, n_tokens, n_in_segment in ((short, long, 7, 0), (long, short, 4, 1)):
        gains = text.gains_of((first, "on"), (second, "on"), tokenizer)
        assert gains["n_tokens"] == n_tokens
        assert gains["places"][IN_SEGMENT]["tokens"] == n_in_segment


def test_there_are_no_gains_where_no_document_is_longer_than_a_segment():
    tokenizer = tokenizers.choose("bytes")
    targets = [7, 1, 2, 7]
    for segment_len, is_there in ((3, True), (4, False)):
        measured = measured_of(dict(on=[0.0] * 4, off=[1.0] * 4), targets, segment_len)
        gains = text.gains_of((measured, "on"), (measured, "off"), tokenizer)
        assert (gains is not None) == is_there


def test_the_tokens_that_gain_most_come_first_and_shares_of_a_loss_are_not_shown():
    tokenizer = tokenizers.choose("bytes")
    targets = list(range(50, 80))
    on = [5.0] * 30
    off = [5.0, 5.0, *(5.0 + place for place in range(1, 28)), 0.0]
    measured = measured_of(dict(on=on, off=off), targets)
    gains = text.gains_of((measured, "on"), (measured, "off"), tokenizer)
    assert [line["id"] for line in gains["tokens"]] == list(range(78, 58, -1))
    assert "100%" in text.gain_table("on", "off", gains)
    gains = text.gains_of((measured, "off"), (measured, "on"), tokenizer)
    assert [line["id"] for line in gains["tokens"]] == [79]
    *_, nowhere, _ = text.gain_table("off", "on", gains).split("\n")
    assert nowhere.split("document")[1].split()[:2] == ["100%", "-"]


def test_a_token_is_shown_as_python_writes_it_and_cut_where_it_is_long():
    tokenizer = tokenizers.choose("bytes")
    assert text.token_text(tokenizer, 10) == "'\\n'"
    assert text.token_text(tokenizer, 0xC3) == "b'\\xc3'"
    line = dict(token="'" + " " * 60 + "'", occurrences=1, gain=1.0, mean=1.0, before_segment=0.0)
    printed = text.gain_table("a", "b", dict(n_tokens=1, gain=1.0, tokens=[line], places=[]))
    assert "...  " in printed and max(len(line) for line in printed.split("\n")) <= 79


# ---- different tokenizers ----


def test_models_with_different_tokenizers_have_a_table_each_over_the_same_bytes(
    capsys, tmp_path, ckpts, texts
):
    names = [f"{name}={ckpts[name]}" for name in ("lm2", "bytes", "llama")]
    printed, figures = run(capsys, tmp_path, "--ckpt", *names, "--memory", "off")
    heads = [
        line.split()[2:] for line in printed.split("\n") if line.strip().startswith("position")
    ]
    assert heads == [
        ["lm2", "on", "lm2", "off", "llama", "on"],
        ["bytes", "on", "bytes", "off"],
    ]
    assert [line["against"] for line in figures["gains"]] == ["lm2 off", "llama on"]
    # The texts are short, so all of their bytes count in both tables.
    n_bytes = {}
    for name in ("lm2", "bytes"):
        model, saved = load_checkpoint(ckpts[name])
        tokenizer = tokenizers.of_checkpoint(saved, name)
        measured = measure(model, tokenizer, read_documents([str(texts)], "val", tokenizer))
        n_bytes[name] = [int(sizes.sum()) for sizes in measured.n_bytes]
    assert n_bytes["lm2"] == n_bytes["bytes"]


def test_a_model_of_ids_alone_is_measured_in_nats_on_ids_and_not_on_texts(
    capsys, tmp_path, ckpts, texts
):
    rng = random.Random(0)
    ids = [50256, *(rng.randrange(40_000, 40_020) for _ in range(100)), 50256]
    flags = ["--ckpt", f"ids={ckpts['ids']}", "--text"]
    printed, figures = run(capsys, tmp_path, *flags, token_files(tmp_path, ids))
    (model,) = figures["models"]
    assert (model["unit"], model["tokens"]) == ("nats per token", 100)
    assert "nats per token, 1 documents of up to 100 tokens" in printed
    (gains,) = figures["gains"]
    assert gains["column"] == "ids on" and gains["against"] == "ids off"
    shown = [line["token"] for line in gains["tokens"]]
    assert shown == [f"' {line['id']}'" for line in gains["tokens"]] and shown
    assert "trained on ids alone" in refused(capsys, text.main, *flags, texts)


# ---- the command ----


def test_the_command_measures_what_the_first_model_validates_with_and_the_picture_draws_it(
    capsys, tmp_path, ckpts, texts
):
    names = [f"{name}={ckpts[name]}" for name in ("lm2", "llama")]
    printed, figures = run(capsys, tmp_path, "--ckpt", *names)
    widest = max(len(line) for line in printed.replace(str(texts), "texts").split("\n"))
    assert widest == 79
    tokenizer = tokenizers.load()
    documents = read_documents([str(texts)], "val", tokenizer)
    columns = {}
    for name in ("lm2", "llama"):
        model, _ = load_checkpoint(ckpts[name])
        measured = measure(model.eval(), tokenizer, documents)
        for mode in measured.nats:
            columns[f"{name} {mode}"] = (measured, mode)
    assert table(columns) in printed
    for other in ("lm2 off", "llama on"):
        gains = text.gains_of(columns["lm2 on"], columns[other], tokenizer)
        assert gains["tokens"] and text.gain_table("lm2 on", other, gains) in printed
    lm2, llama = figures["models"]
    assert lm2["documents"] == llama["documents"] == len(documents)
    assert list(lm2["modes"]) == ["on", "off", "other"] and list(llama["modes"]) == ["on"]

    fig = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    flags = Namespace(figures=str(tmp_path / "text.json"), curves=[])
    pictures.draw_text(fig, flags)
    (ax,) = fig.axes
    drawn = {line.get_label(): line for line in ax.get_lines()}
    for label, model, mode in (("lm2", lm2, "on"), ("lm2, memory off", lm2, "off")):
        losses = [entry["loss"] for entry in model["modes"][mode]["by_position"]]
        assert drawn[label].get_ydata() == pytest.approx(losses)
    assert drawn["lm2"].get_linestyle() == drawn["llama"].get_linestyle() == "-"
    assert drawn["lm2, memory off"].get_linestyle() == "--"
    x = drawn["lm2"].get_xdata()
    assert 128 < lm2["longest"] < 255
    assert x.tolist() == [32, 96, (128 + lm2["longest"]) / 2]
    assert ax.get_xscale() == "log"
    assert "tokens" in ax.get_xlabel() and "bits per byte" in ax.get_ylabel()


def test_flags_choose_the_texts_how_much_of_them_is_read_and_the_modes(
    capsys, tmp_path, ckpts, texts
):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(WORDS * 100), encoding="utf-8")
    flags = ["--ckpt", ckpts["bytes"], "--text", book, "--longest", "80"]
    printed, figures = run(capsys, tmp_path, *flags, "--n", "1")
    assert f"the documents for validation of --text {book}" in printed
    (model,) = figures["models"]
    assert model["longest"] == 80 and model["documents"] == 1
    assert list(model["modes"]) == ["on", "off"]  # nobody lends a memory
    assert "nan" not in printed
    _, figures = run(capsys, tmp_path, *flags)
    (content,) = read_texts([str(book)], "val")
    n_bytes = len(content.encode())
    (model,) = figures["models"]  # of one document all pieces of 80 bytes are read
    assert model["documents"] == math.ceil(n_bytes / 80) and model["tokens"] == n_bytes
    assert list(model["modes"]) == ["on", "off", "other"]
    _, figures = run(capsys, tmp_path, "--ckpt", ckpts["lm2"], "--memory", "on", "--n", "3")
    (model,) = figures["models"]
    assert model["documents"] == 3
    assert list(model["modes"]) == ["on"] and figures["gains"] == []


def test_texts_that_are_not_longer_than_a_segment_are_measured_without_gains(
    capsys, tmp_path, ckpts
):
    printed, figures = run(capsys, tmp_path, "--ckpt", f"lm2={ckpts['lm2']}", "--longest", S)
    assert f"no document is longer than a segment of {S} tokens" in printed
    assert figures["gains"] == [] and figures["models"][0]["modes"]["on"]["beyond"] is None
    text.load_losses(str(tmp_path / "text.json"))  # it can be drawn


def test_files_that_are_not_utf_8_are_left_out_if_they_were_in_training(
    capsys, tmp_path, ckpts, texts
):
    bad = tmp_path / "texts"
    bad.mkdir()
    for path in texts.iterdir():
        (bad / path.name).write_bytes(path.read_bytes() + b"\xff")
    for i in range(N_FILES):
        (bad / f"good{i}.txt").write_text(f"{i} " + " ".join(WORDS * 4), encoding="utf-8")
    flags = ["--ckpt", ckpts["lm2"], "--text", bad]
    assert "leave such files out with --skip_bad" in refused(capsys, text.main, *flags)
    _, figures = run(capsys, tmp_path, *flags, "--skip_bad")
    model, content = load_checkpoint(ckpts["lm2"])
    content["train"] |= dict(text=(str(bad),), skip_bad=True)
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=content["tokenizer"], train=content["train"])
    _, as_in_training = run(capsys, tmp_path, "--ckpt", path)
    assert as_in_training["models"][0]["modes"] == figures["models"][0]["modes"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--n", "0"], "--n 0 and --longest 16384 must be at least 1"),
        (["--text", "none"], "--text none does not exist"),
        (["--memory", "away"], "argument --memory: invalid choice: 'away'"),
        (["--skip_bad"], "--skip_bad is for the files of --text"),
        (["--ckpt", "none.pt"], "there is no checkpoint none.pt"),
        (["--out", "none/text.json"], "name a file in a folder that is there"),
        (["--out", "text.txt"], "--out text.txt: the name must end in .json"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, ckpts, argv, said):
    assert said in refused(capsys, text.main, "--ckpt", f"lm2={ckpts['lm2']}", *argv)


def test_ids_on_disk_are_not_given_to_a_model_with_another_tokenizer(capsys, tmp_path, ckpts):
    tokenizer = tokenizers.choose("bytes")
    ids = [tokenizer.eot, *tokenizer.encode(" ".join(WORDS * 9)), tokenizer.eot]
    token_files(tmp_path, ids)
    names = [f"{name}={ckpts[name]}" for name in ("bytes", "lm2")]
    err = refused(capsys, text.main, "--ckpt", *names, "--text", tmp_path)
    assert "holds ids of one tokenizer, but lm2 has another one" in err
    _, figures = run(capsys, tmp_path, "--ckpt", names[0], "--text", tmp_path)
    assert figures["models"][0]["tokens"] == len(ids) - 2


# ---- the picture ----


def write_log(path, losses, validations):
    """A metrics.jsonl with a line for each loss and each validation, given as (tokens, value)."""
    lines = [dict(step=1, tokens=tokens, loss=loss) for tokens, loss in losses]
    lines += [dict(step=1, tokens=tokens, validation=found) for tokens, found in validations]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_curves_of_runs_are_drawn_against_the_millions_of_tokens(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    validations = [(2_000_000, {"bits per byte": 1.5}), (4_000_000, {"bits per byte": 1.25})]
    first = write_log(
        tmp_path / "a" / "metrics.jsonl", [(1_000_000, 7), (3_000_000, 5)], validations
    )
    second = write_log(tmp_path / "b" / "metrics.jsonl", [(1_000_000, 8)], validations[:1])
    fig = figure(layout="constrained")
    pictures.draw_text(fig, Namespace(figures=None, curves=[str(first), f"other={second}"]))
    validation, training = fig.axes
    a, other = validation.get_lines()
    assert [a.get_label(), other.get_label()] == ["a", "other"]
    assert a.get_xydata().tolist() == [[2, 1.5], [4, 1.25]]
    assert other.get_xydata().tolist() == [[2, 1.5]]
    a, other = training.get_lines()
    assert a.get_xydata().tolist() == [[1, 7], [3, 5]]
    assert a.get_linewidth() < 1
    assert a.get_color() != other.get_color() and a.get_marker() != other.get_marker()
    assert "bits per byte" in validation.get_ylabel() and "nats per token" in training.get_ylabel()
    assert {text.get_text() for text in fig.legends[0].get_texts()} == {"a", "other"}


def test_figures_and_curves_of_a_model_share_a_style_in_one_picture(capsys, tmp_path, ckpts):
    pytest.importorskip("matplotlib")
    run(capsys, tmp_path, "--ckpt", f"lm2={ckpts['lm2']}")
    validations = [(1_000_000, {"bits per byte": 1.5})]
    log = write_log(tmp_path / "lm2" / "metrics.jsonl", [(1_000_000, 7)], validations)
    figures = tmp_path / "text.json"
    out = tmp_path / "text.png"
    argv = ["text", "--figures", figures, "--curves", log, "--out", out]
    pictures.main([str(argument) for argument in argv])
    assert out.read_bytes().startswith(b"\x89PNG")
    fig = pictures.figure(str(out))
    pictures.draw_text(fig, Namespace(figures=str(figures), curves=[str(log)]))
    positions, validation, training = fig.axes
    colors = {ax.get_lines()[0].get_color() for ax in (positions, validation, training)}
    assert len(colors) == 1
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["lm2", "lm2, memory off"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"models": []}', '{"models": [{"name": 3}]}'])
def test_a_file_of_another_kind_is_not_drawn(capsys, tmp_path, content):
    pytest.importorskip("matplotlib")
    path = tmp_path / "text.json"
    path.write_text(content, encoding="utf-8")
    out = tmp_path / "out.png"
    err = refused(capsys, pictures.main, "text", "--figures", path, "--out", out)
    assert "text.json holds no such figures: write it with assets/text.py --out" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("validation", "n_runs", "said"),
    [
        ({"qa1 0k": 0.5}, 1, "has no validation in bits per byte"),
        ("1.5", 1, "is no metrics.jsonl of train.py"),
        ({"bits per byte": 1.5}, 2, "--curves: two runs are called 'run', give NAME=PATH"),
        (None, 0, "nothing to draw: give --figures, --curves or both"),
    ],
)
def test_curves_that_cannot_be_drawn_are_named(capsys, tmp_path, validation, n_runs, said):
    pytest.importorskip("matplotlib")
    log = write_log(tmp_path / "run" / "metrics.jsonl", [(10, 7)], [(20, validation)])
    argv = ["--out", tmp_path / "out.png"]
    if n_runs > 0:
        argv += ["--curves", *[log] * n_runs]
    assert said in refused(capsys, pictures.main, "text", *argv)


@pytest.mark.parametrize("path", sorted(CURVES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_curves_that_are_kept_fall(path):
    name, curves = pictures.load_curves(f"{path.stem}={path}")
    assert name == path.stem
    for points in curves.values():
        tokens, losses = zip(*points, strict=True)
        assert list(tokens) == sorted(tokens)
        assert losses[-1] < losses[0]


def test_the_figures_that_are_kept_are_of_three_models_on_the_same_tokens():
    models = text.load_losses(CURVES.parent / "text.json")["models"]
    assert [model["name"] for model in models] == ["lm2", "llama", "rmt"]
    assert len({model["tokens"] for model in models}) == 1
