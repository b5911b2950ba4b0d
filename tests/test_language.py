"""Training on plain text: from files to windows, the loss by position, and whole runs.

    python -m pytest tests/test_language.py -q

The models are tiny, and most texts are made here. One run learns for a few seconds, so that it
shows what the memory is for.
"""

import contextlib
import io
import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
import train
from data import loss, text
from data.document import batches
from data.lessons import Stage
from data.loss import Measured, measure, token_losses
from data.text import Windows, read_documents, read_tokens, to_documents, write_documents
from data.tokenizer import choose, of_checkpoint
from lm2 import LM2Config, State, build_model, load_checkpoint
from test_train import content, lines, refused, same_tensors, step_lines, weights_differ_by

torch.set_num_threads(1)

BYTES = choose("bytes")
EOT = BYTES.eot


def write_texts(folder, texts):
    """Write texts to files: name -> text, or bytes as they are -> the folder as --text takes it."""
    for name, written in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written if isinstance(written, bytes) else written.encode())
    return str(folder)


def split_of(*sources, **options):
    """The documents of sources: part -> texts."""
    return {part: list(text.read_texts(sources, part, **options)) for part in text.PARTS}


# From files to documents


def test_every_document_is_in_one_part_and_each_part_has_one(tmp_path):
    for n in range(2, 30):
        texts = {f"{i}.txt": f"text {i}" for i in range(n)}
        parts = split_of(write_texts(tmp_path / str(n), texts))
        assert parts["train"] and parts["val"]
        assert sorted(parts["train"] + parts["val"]) == sorted(texts.values())


def test_of_documents_that_are_all_for_validation_one_is_trained_on(tmp_path):
    texts = {f"{i}.txt": f"text {i}" for i in range(100)}
    for_validation = split_of(write_texts(tmp_path / "all", texts))["val"]
    assert len(for_validation) > 3
    some = {f"{i}.md": written for i, written in enumerate(for_validation)}
    source = write_texts(tmp_path / "some", some)
    parts = split_of(source)
    assert len(parts["train"]) == 1 and len(parts["val"]) == len(for_validation) - 1


def test_a_document_stays_in_its_part_whatever_else_is_there_and_what_it_is_called(tmp_path):
    texts = {f"{i}.txt": f"text {i}" for i in range(300)}
    with_more = split_of(write_texts(tmp_path / "a", texts))
    some = {f"book/{name}.md": written for name, written in list(texts.items())[:150]}
    alone = split_of(write_texts(tmp_path / "b", some))
    assert set(alone["val"]) == set(with_more["val"]) & set(some.values())
    assert 0.05 < len(with_more["val"]) / 300 < 0.15


def test_a_single_document_gives_its_last_tenth_to_validate(tmp_path):
    whole = "".join(f"{i} " for i in range(1000))
    source = write_texts(tmp_path, {"a.txt": whole, "empty.txt": ""})
    parts = split_of(source)
    (train_text,), (val_text,) = parts["train"], parts["val"]
    assert train_text + val_text == whole
    assert len(val_text) == pytest.approx(len(whole) / 10, abs=1)
    assert split_of(str(tmp_path / "a.txt")) == parts


def test_sub_folders_are_read_and_hidden_files_are_not(tmp_path):
    seen = {"a.txt": "a", "b/c/d.py": "b", "no_ending": "c"}
    unseen = {".hidden": "x", ".git/config": "y", "b/.cache/e.txt": "z", "b/train.bin": "u"}
    parts = split_of(write_texts(tmp_path, seen | unseen))
    assert sorted(parts["train"] + parts["val"]) == sorted(seen.values())


def test_texts_that_are_equal_are_one_document(tmp_path):
    texts = {"books/a.txt": "a", "books/b.txt": "b", "copy.txt": "a"}
    source = write_texts(tmp_path, texts)
    parts = split_of(source, f"{source}/books")
    assert sorted(parts["train"] + parts["val"]) == ["a", "b"]


def test_line_ends_become_those_of_unix_and_a_byte_order_mark_is_dropped(tmp_path):
    source = write_texts(tmp_path, {"a": b"\xef\xbb\xbfone\r\ntwo\n", "b": "ä\u2028ö\n"})
    parts = split_of(source)
    assert sorted(parts["train"] + parts["val"]) == ["one\ntwo\n", "ä\u2028ö\n"]


def test_texts_among_files_that_are_no_text_can_be_learned(tmp_path):
    pictures = {f"{i}.png": b"\x89PNG\xff" for i in range(30)}
    source = write_texts(tmp_path, {"a.txt": "a", "b.txt": "b", **pictures})
    with pytest.raises(ValueError, match=r"0\.png is not UTF-8 \(byte 0\)"):
        split_of(source)
    parts = split_of(source, skip_bad=True)
    assert len(parts["train"]) == len(parts["val"]) == 1


def test_without_a_source_the_documents_are_the_modules_of_pythons_library():
    names = {path.name for path in text.list_files(())}
    assert {"argparse.py", "decoder.py"} <= names
    assert not any(name.startswith("_sysconfigdata") for name in names)


# From documents to token ids


class WideTokenizer:
    """A pretended tokenizer of more than 65,536 ids: a character is its own id."""

    bos = None
    eot = 100_000
    n_vocab = 100_001

    def encode(self, written):
        return [ord(character) for character in written]

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    "tokenizer, n_bytes", [(choose("shipped"), 2), (WideTokenizer(), 4)], ids=["shipped", "wide"]
)
def test_what_is_written_to_disk_is_read_back(tmp_path, tokenizer, n_bytes):
    texts = {f"{i}.txt": f"Number {i}: 1 < 2, \U00010348 <|endoftext|>\n" * i for i in range(1, 9)}
    source = write_texts(tmp_path / "texts", texts)
    write_documents(tmp_path / "ids", [source], tokenizer)
    found = []
    for part in text.PARTS:
        path = tmp_path / "ids" / f"{part}.bin"
        documents = read_tokens(path, tokenizer)
        assert path.stat().st_size == n_bytes * len(documents.ids)
        in_memory = read_documents([source], part, tokenizer)
        assert np.array_equal(documents.ids, in_memory.ids)
        for i, size in enumerate(documents.sizes):
            first, *ids, last = documents[i].tolist()
            assert first == last == tokenizer.eot
            assert len(ids) == size - 2
            found.append(tokenizer.decode(ids))
    assert sorted(found) == sorted(texts.values())
    assert {path.name for path in (tmp_path / "ids").iterdir()} == {"train.bin", "val.bin"}


def test_a_source_that_cannot_be_used_leaves_the_token_files_as_they_are(tmp_path):
    write_texts(tmp_path / "ids", {"train.bin": "old", "val.bin": "old"})
    bad = write_texts(tmp_path / "bad", {"a.txt": "a text", "photo.jpg": b"\xff"})
    letter = write_texts(tmp_path / "letter", {"a.txt": "a"})  # too short for two parts
    for source, named in ((bad, "photo.jpg is not UTF-8"), (letter, "no text for train")):
        with pytest.raises(ValueError, match=named):
            write_documents(tmp_path / "ids", [source], BYTES)
    assert {path.read_text() for path in (tmp_path / "ids").iterdir()} == {"old"}


def nanogpt_files(folder, train_ids, val_ids):
    """The files that nanoGPT writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in (("train.bin", train_ids), ("val.bin", val_ids)):
        np.array(ids, dtype=np.uint16).tofile(folder / name)
    return folder


def test_the_token_files_of_nanogpt_are_read(tmp_path):
    folder = nanogpt_files(tmp_path, [1, 2, EOT, 3, EOT], [4, 5, 6])
    (tmp_path / "readme.md").write_text("not read")
    train_path, val_path = str(folder / "train.bin"), str(folder / "val.bin")
    for sources in ([str(folder)], [train_path], [val_path], [train_path, val_path]):
        documents = read_documents(sources, "train", BYTES)
        assert [documents[i].tolist() for i in range(2)] == [[1, 2, EOT], [EOT, 3, EOT]]
        documents = read_documents(sources, "val", BYTES)
        assert [documents[i].tolist() for i in range(len(documents))] == [[4, 5, 6]]
    with pytest.raises(ValueError, match="name it alone"):
        read_documents([train_path, str(folder / "readme.md"), str(tmp_path)], "train", BYTES)


# From token ids to windows

# Every id is its place, so that a window says where it comes from. One document is too short.
IDS = np.arange(60)
ENDS = [0, 21, 25, 59]
IDS[ENDS] = EOT
STAGE = Stage(facts=0, segments=2, segment_len=3)  # windows of 6 tokens


def places_of(windows, n_batches):
    """Where each window of some batches begins, and its document, once all else is checked."""
    found = Counter()
    for number in range(n_batches):
        key, batch = windows[STAGE, number]
        assert key == (STAGE, number)
        targets = batch.targets.view(batch.idx.shape)
        assert batch.at.tolist() == list(range(batch.idx.numel()))
        assert batch.is_word.all()
        for row, row_targets in zip(batch.idx.tolist(), targets.tolist(), strict=True):
            assert row[1:] == row_targets[:-1]
            start = row[1] - 1
            place = IDS[start : start + 7].tolist()
            assert [*row, row_targets[-1]] == place
            assert EOT not in place[1:-1]
            found[start] += 1
    return found


def test_the_first_tokens_of_a_document_are_in_no_fewer_windows_than_later_ones():
    windows = Windows(to_documents(IDS, EOT), batch_size=8, batch_tokens=1000, seed=3)
    found = places_of(windows, 600)
    assert sorted(found) == [*range(0, 21 - 5), *range(25, 59 - 5)]  # all places that fit
    # Each document has 5 more places before it. A window that is drawn there begins with it.
    n_places = (16 + 5) + (29 + 5)
    for start, n in found.items():
        expected = 4800 / n_places * (6 if start in (0, 25) else 1)
        assert abs(n - expected) < 5 * math.sqrt(expected)
    covered = np.zeros(60)
    for start, n in found.items():
        covered[start : start + 6] += n
    assert covered[:6].min() > 0.8 * covered[6:16].max()


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    documents = to_documents(IDS, EOT)
    first = Windows(documents, 8, 1000, seed=3)
    second = Windows(documents, 8, 1000, seed=3)
    forwards = [first[STAGE, number][1].idx for number in range(5)]
    backwards = [second[STAGE, number][1].idx for number in (4, 3, 2, 1, 0)]
    assert all(map(torch.equal, forwards, reversed(backwards)))
    for one, other in itertools.combinations(forwards, 2):
        assert not torch.equal(one, other)
    _, of_another_seed = Windows(documents, 8, 1000, seed=4)[STAGE, 0]
    assert not any(torch.equal(of_another_seed.idx, idx) for idx in forwards)


@pytest.mark.parametrize("batch_tokens, rows", [(1000, 8), (13, 2), (1, 1)])
def test_a_batch_has_as_many_windows_as_its_tokens_allow(batch_tokens, rows):
    windows = Windows(to_documents(IDS, EOT), 8, batch_tokens, seed=0)
    _, batch = windows[STAGE, 0]
    assert batch.idx.shape == (rows, 6)


def test_texts_that_are_all_too_short_are_told_with_the_longest():
    windows = Windows(to_documents(IDS, EOT), 8, 1000, seed=0)
    assert windows.places_up_to(34)[-1] == 34  # the longest document has 35 ids: one window fits
    with pytest.raises(ValueError, match="window of 35 tokens, the longest has 35"):
        windows.places_up_to(35)


# The loss

S = 5
KINDS = dict(
    lm2=dict(n_slot=6, n_mem_head=2, mem_blocks=(1,)),
    rmt=dict(n_mem_token=2),
    llama=dict(n_mem_layer=0),
)
SMALL = dict(vocab_size=19, n_layer=2, n_head=2, n_embd=16, ffn_dim=20, segment_len=S)
LENGTHS = (13, 23, 18)  # of documents: no multiple of a segment

every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, **sizes):
    """A model in float64 whose parameters are all away from their start."""
    torch.manual_seed(0)
    model = build_model(LM2Config(**SMALL | KINDS[kind] | sizes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def random_documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, SMALL["vocab_size"], n) for n in LENGTHS]


def losses_of(logits, ids):
    """The loss of each of the ids behind the first: logits (1, n, vocab), ids (n + 1,) -> (n,)."""
    return F.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="none")


def by_hand(model, ids, mode, lender=None):
    """The losses of a document, read in the plainest way."""
    idx = torch.tensor(ids)[None]
    if mode == "on":
        logits, _, _ = model(idx[:, :-1])
        return losses_of(logits, ids)
    pieces = []
    for start in range(0, len(ids) - 1, S):
        state = None
        if mode == "other" and start > 0:
            repeated = np.concatenate([lender] * 3)[: start + 1]
            _, _, found = model(torch.tensor(repeated)[None])  # its last segment has just begun
            state = State(found.carried, idx[:, :0], S)
        segment = ids[start : start + S + 1]
        stop = min(start + S, len(ids) - 1)
        logits, _, _ = model(idx[:, start:stop], state=state)
        pieces.append(losses_of(logits, segment))
    return torch.cat(pieces)


@every_kind
@pytest.mark.parametrize("mode", loss.MODES)
def test_the_losses_are_those_of_documents_read_one_by_one(kind, mode):
    model = build(kind)
    documents = random_documents()
    found = token_losses(model, documents, (mode,))[mode]
    with torch.no_grad():
        for i, ids in enumerate(documents):
            expected = by_hand(model, ids, mode, lender=documents[(i + 1) % 3])
            assert (found[i, : len(ids) - 1] - expected).abs().max() < 1e-9
            if mode != "on" and kind != "llama":
                distance = (expected - by_hand(model, ids, "on")).abs()
                assert distance[:S].max() < 1e-9 and distance[S:].min() > 0


@pytest.mark.parametrize("name", ["bytes", "shipped"])
def test_bits_per_byte_are_the_bits_of_all_tokens_over_the_bytes_of_the_text(name):
    tokenizer = choose(name)
    model = build("lm2", vocab_size=tokenizer.n_vocab)
    torch.nn.init.zeros_(model.output.weight)  # every id is equally likely
    written = "Mary went to the kitchen. Größe: 12 €\n"
    ids = tokenizer.encode(written)
    documents = to_documents(np.array([tokenizer.eot, *ids, tokenizer.eot]), tokenizer.eot)
    measured = measure(model, tokenizer, documents)
    assert measured.unit == "bits per byte"
    found, half = loss.ratio(*measured.sums("on"))
    assert found == pytest.approx(
        len(ids) * math.log2(tokenizer.n_vocab) / len(written.encode()), rel=1e-6
    )
    assert math.isnan(half)  # of one document
    assert set(measured.nats) == {"on", "off"}  # no other document lends a memory


def test_the_documents_that_are_measured_are_spread_over_all_and_cut():
    pieces = [np.array([EOT])]
    for i in range(40):
        pieces.append(np.array([*[i] * (i + 5), EOT, EOT]))  # an empty document behind each
    documents = to_documents(np.concatenate(pieces), EOT)
    model = build("lm2", vocab_size=BYTES.n_vocab)
    measured = measure(model, BYTES, documents, most=10, longest=20)
    assert [ids[0] for ids in measured.targets] == list(range(0, 40, 4))
    assert [len(ids) for ids in measured.targets] == [min(i + 5, 20) for i in range(0, 40, 4)]
    assert batches(10, loss.BATCH, pairs=True) == [range(0, 8), range(8, 10)]
    whole = token_losses(model, [documents[i][:-1][:21] for i in range(0, 80, 8)], ("off",))
    for i, nats in enumerate(measured.nats["off"]):
        assert np.abs(nats - whole["off"][i, : len(nats)].numpy()).max() < 1e-9
    assert [len(batch) for batch in batches(17, loss.BATCH, pairs=True)] == [8, 9]


def test_a_piece_has_the_same_bytes_with_every_tokenizer_and_long_documents_give_several():
    written = "".join(f"line {i} of a long document\n" for i in range(100))
    n_bytes = {}
    for name in ("bytes", "shipped"):
        tokenizer = choose(name)
        ids = np.array([tokenizer.eot, *tokenizer.encode(written), tokenizer.eot])
        pieces = loss.choose_pieces(
            to_documents(ids, tokenizer.eot), tokenizer.n_bytes(), most=4, longest=500
        )
        assert len(pieces) == 4
        together = np.concatenate([pieces[0], *[ids[1:] for ids in pieces[1:]]])
        assert written.startswith(tokenizer.decode(together[1:]))
        n_bytes[name] = [tokenizer.n_bytes()[ids[1:]].sum() for ids in pieces]
    assert n_bytes["bytes"] == [500] * 4
    assert all(480 < n <= 500 for n in n_bytes["shipped"])


def test_the_interval_holds_the_true_loss_in_about_95_of_100_cases():
    rng = np.random.default_rng(0)
    n_held = 0
    for _ in range(1000):
        sizes = rng.integers(0, 200, 40)
        level = rng.normal(1.5, 0.4, 40)  # of a document, in bits per byte
        value, half = loss.ratio(sizes * level, sizes)
        n_held += abs(value - 1.5) < half
    assert 0.92 < n_held / 1000 < 0.97
    for n in (9, 10):
        _, half = loss.ratio(np.array([*range(n), 0, 0]), np.array([2] * n + [0, 0]))
        assert math.isnan(half) == (n < 10)  # so few that have a byte


def measured_by_hand(seed):
    """Two documents of three bytes a token and random losses, with segments of 100 tokens."""
    rng = np.random.default_rng(seed)
    targets = [np.zeros(n, np.int64) for n in (130, 350)]
    n_bytes = [np.full(len(ids), 3) for ids in targets]
    nats = [rng.random(len(ids)) for ids in targets]
    return Measured(100, targets, n_bytes, dict(on=nats))


def bits(nats, n_tokens):
    return sum(nats) / math.log(2) / (3 * n_tokens)


def test_quarters_of_segments_add_up_to_all_beyond_the_first():
    measured = measured_by_hand(0)
    losses, sizes = measured.sums("on", low=100)
    for number in range(4):
        is_in = [loss.in_quarter(len(ids), 100, number) for ids in measured.targets]
        quarter_losses, quarter_sizes = measured.sums_at("on", is_in)
        losses = losses - quarter_losses
        sizes = sizes - quarter_sizes
    assert np.abs(losses).max() < 1e-9
    assert not sizes.any()


def test_the_table_has_the_losses_by_position_and_how_they_differ():
    one, other = measured_by_hand(0), measured_by_hand(1)
    printed = loss.table({"lm2": (one, "on"), "llama": (other, "on")})
    head, names, *rows = [line.split() for line in printed.splitlines()]
    assert head[:4] == ["bits", "per", "byte,", "2"]
    assert names == ["position", "tokens", "lm2", "llama"]
    ranges = [(0, 64), (64, 128), (128, 256), (256, 512)]
    for row, (low, high) in zip(rows, ranges, strict=False):
        cells = []
        for measured in (one, other):
            nats = [*measured.nats["on"][0][low:high], *measured.nats["on"][1][low:high]]
            cells.append(f"{bits(nats, len(nats)):.3f}")
        assert row == [str(low), "to", str(high - 1), str(len(nats)), *cells]
    assert rows[4][:2] == ["all", "480"]
    third = []  # the tokens of the third quarter: 50 to 74 of each segment
    for start in (150, 250):
        third += list(one.nats["on"][1][start : start + 25])
    assert rows[8][:4] == ["quarter", "3", "50", f"{bits(third, 50):.3f}"]
    values = []
    for measured in (one, other):
        later = [*measured.nats["on"][0][100:], *measured.nats["on"][1][100:]]
        values.append(bits(later, 280))
    by = f"{values[1] - values[0]:+.3f}"
    assert " ".join(rows[11]) == f"llama - lm2 = {by}"  # two documents give no interval


def test_columns_of_other_segments_are_compared_on_the_tokens_of_the_first_column():
    """Quarters and differences are over the same tokens in each column: those that the first one's
    segments say."""
    short = measured_by_hand(0)
    long = measured_by_hand(1)._replace(segment_len=200)
    rows = loss.table({"short": (short, "on"), "long": (long, "on")}).splitlines()
    same_rows = loss.table({"short": (short, "on"), "long": (long._replace(segment_len=100), "on")})
    assert rows == same_rows.splitlines()
    above, _ = loss.difference((short, "on"), (long, "on"))
    assert rows[-1] == f"long - short = {above:+.3f}"
    rows = loss.table({"long": (long, "on"), "short": (short, "on")}).splitlines()
    quarters = [row.split() for row in rows if row.strip().startswith("quarter ")]
    # Of 350 tokens, 150 lie beyond the first segment of 200.
    assert [int(cells[2]) for cells in quarters] == [50, 50, 50]
    fourth = [sum(measured.nats["on"][1][250:300]) for measured in (long, short)]
    assert quarters[1][3:] == [f"{bits([nats], 50):.3f}" for nats in fourth]
    beyond = [bits(measured.nats["on"][1][200:], 150) for measured in (long, short)]
    assert rows[-1] == f"short - long = {beyond[1] - beyond[0]:+.3f}"


def test_the_interval_of_a_difference_is_that_of_documents_compared_one_by_one():
    """Two models that differ by the same amount everywhere differ by exactly that."""
    rng = np.random.default_rng(0)
    nats = [rng.random(40) * level for level in range(1, 13)]
    targets = [np.zeros(40, np.int64)] * 12
    one = Measured(10, targets, None, dict(on=nats))
    other = Measured(10, targets, None, dict(on=[values + 0.5 for values in nats]))
    _, half = loss.ratio(*one.sums("on"))
    assert half > 0.5
    above, half = loss.difference((one, "on"), (other, "on"))
    assert above == pytest.approx(0.5) and half == pytest.approx(0, abs=1e-9)
    printed = loss.table({"one": (one, "on"), "other": (other, "on")})
    assert printed.splitlines()[-1] == "other - one = +0.500 [+0.500, +0.500]"


def test_where_no_document_is_longer_than_a_segment_the_table_and_the_file_say_so():
    measured = measured_by_hand(0)._replace(segment_len=400)
    printed = loss.table({"on": (measured, "on"), "off": (measured, "on")})
    assert printed.endswith("no document is longer than a segment of 400 tokens")
    assert loss.summary(measured)["modes"]["on"]["beyond"] is None
    assert "nan" not in printed + json.dumps(loss.summary(measured)).lower()


# Whole runs

FLAGS = (
    "--n_layer 2 --n_head 2 --n_embd 16 --ffn_dim 32 --n_slot 4 --n_mem_head 2 --mem_blocks 0 "
    "--segment_len 8 --batch_size 4 --batch_tokens 128 --accumulate 2 --threads 1 --processes 1 "
    "--device cpu --eval_every 100000"
)
TINY = FLAGS.split()
CONSTANTS = dict(LOG_EVERY=1, WARMUP_STEPS=20, SAMPLE_TOKENS=16)
SHORT = [*TINY, "--tokenizer", "bytes", "--stages", "text:16", "--tokens", "640"]


def fit(*argv):
    """Run train.py -> what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name, value in CONSTANTS.items():
            patch.setattr(train, name, value)
        train.main([str(argument) for argument in argv])
    return printed.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of documents. Each repeats a letter of its own, which a model with segments of 8
    bytes sees once in each, and digits."""
    texts = {}
    for i in range(200):
        letter = "abcdefghijklmnop"[i % 16]
        texts[f"{i}.txt"] = (letter + "1234567") * (12 + i // 16)
    return write_texts(tmp_path_factory.mktemp("texts"), texts)


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    """The folder of a short run in one go."""
    out = tmp_path_factory.mktemp("straight") / "run"
    fit(*SHORT, "--text", source, "--out_dir", out)
    return out


@pytest.fixture(scope="module")
def learned(source, tmp_path_factory):
    """A run that learns those documents: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("learned") / "run"
    sizes = "--n_embd 32 --ffn_dim 64 --n_mem_head 4 --batch_size 16 --batch_tokens 512"
    how = "--stages text:32 --tokens 160000 --accumulate 1 --lr 5e-3 --gate_lr 20"
    flags = [*TINY, *sizes.split(), *how.split(), "--tokenizer", "bytes", "--eval_every", "60000"]
    return out, fit(*flags, "--text", source, "--out_dir", out)


def test_a_run_learns_and_uses_its_memory_for_what_the_window_has_lost(learned):
    """Without a memory nobody knows the letter of a segment before it comes: 4 bits in 8 bytes."""
    modes = json.loads((learned[0] / "loss.json").read_text())["modes"]
    assert modes["on"]["beyond"] < 0.4
    assert modes["off"]["beyond"] > 0.48
    assert modes["other"]["beyond"] > 0.48
    assert modes["off"]["above_on"] - modes["off"]["above_half"] > 0


def test_a_run_prints_what_it_learns_its_validations_its_table_and_samples(learned, source):
    out, printed = learned
    model, saved = load_checkpoint(out / "ckpt.pt")
    tokenizer = of_checkpoint(saved, out)
    train_set, val_set = [read_tokens(out / "text" / name, tokenizer) for name in text.TOKEN_FILES]
    head, _ = printed.split("trained 0.2 M tokens")
    assert len(train_set) + len(val_set) == 200
    sizes = (f"{len(train_set)} documents", f"{len(val_set)} documents")
    for words in (source, *sizes, "a vocabulary of 257 tokens", "text in 4 x 8"):
        assert words in head
    measured = measure(model, tokenizer, val_set)
    assert loss.table({mode: (measured, mode) for mode in loss.MODES}) in printed
    samples = printed.split(" a sample ")[1:]
    assert len(samples) == 3
    assert all("123" in written for written in samples)
    validations = [row["validation"] for row in lines(out / "metrics.jsonl") if "validation" in row]
    found = [losses["bits per byte"] for losses in validations]
    assert len(found) == 3 and found[2] < found[1] < found[0] < 1  # the last one is at the end


def test_sample_goes_on_from_a_model_of_text_with_its_own_tokenizer(learned, capsys):
    sample.main(["--ckpt", str(learned[0] / "ckpt.pt"), "--prompt", "c1234567c12"])
    assert capsys.readouterr().out.startswith("34567")


def test_a_step_is_on_windows_of_the_text(straight):
    documents = read_tokens(straight / "text" / "train.bin", BYTES)
    windows = Windows(documents, batch_size=4, batch_tokens=128, seed=0)
    stage = Stage(facts=0, segments=2, segment_len=8)
    torch.manual_seed(0)
    model = build_model(LM2Config(**content(straight, "config")))
    losses = []
    for number in (0, 1):
        _, batch = windows[stage, number]
        logits, _, _ = model(batch.idx)
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch.targets).item())
    first = step_lines(straight)[0]
    assert first["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert first["tokens"] == 2 * 4 * 16
    assert len(step_lines(straight)) == 5


def test_the_gates_of_a_memory_learn_faster_with_gate_lr(source, tmp_path):
    moved = {}
    for gate_lr in (1, 5):
        out = tmp_path / str(gate_lr)
        fit(*SHORT, "--tokens", "1", "--gate_lr", gate_lr, "--text", source, "--out_dir", out)
        torch.manual_seed(0)
        before = build_model(LM2Config(**content(out, "config"))).state_dict()
        for name, weight in content(out, "model").items():
            moved[gate_lr, name] = (weight - before[name]).abs().max().item()
    for name in ("memory.w_out.bias", "memory.w_in.bias", "memory.wq.weight", "ffn_norm.weight"):
        times = 5 if "w_" in name else 1
        slower, faster = [moved[gate_lr, f"layers.0.{name}"] for gate_lr in (1, 5)]
        assert slower > 0 and faster == pytest.approx(times * slower, rel=0.05)


def test_interrupted_and_resumed_a_run_ends_bit_for_bit_as_in_one_go(source, straight, tmp_path):
    moved = write_texts(tmp_path / "texts", {"a.txt": "soon gone " * 30, "b.txt": "and this " * 30})
    fit(*SHORT, "--text", moved, "--out_dir", tmp_path / "other", "--minutes", "0")
    for path in (tmp_path / "texts").iterdir():
        path.unlink()
    fit("--resume", "--out_dir", tmp_path / "other")  # the ids of its texts are still there
    assert len(step_lines(tmp_path / "other")) == 5

    fit(*SHORT, "--text", source, "--out_dir", tmp_path / "run", "--minutes", "0")
    assert content(tmp_path / "run", "progress")["step"] == 1
    fit("--resume", "--out_dir", tmp_path / "run")
    for name in ("model", "optimizer", "curriculum"):
        assert same_tensors(content(tmp_path / "run", name), content(straight, name))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(source, straight, tmp_path):
    fit(*SHORT, "--processes", "2", "--text", source, "--out_dir", tmp_path)
    assert weights_differ_by(straight, tmp_path) < 1e-5


def test_a_run_without_a_checkpoint_is_begun_anew_with_the_texts_that_are_named_then(
    capsys, source, straight, tmp_path
):
    short = write_texts(tmp_path / "short", {"a": "short", "b": "text"})
    out = tmp_path / "run"
    refused(capsys, train.main, *SHORT, "--text", short, "--out_dir", out)
    fit(*SHORT, "--text", source, "--out_dir", out)
    assert same_tensors(content(out, "model"), content(straight, "model"))


def test_changed_texts_are_not_gone_on_with(capsys, source, tmp_path):
    fit(*SHORT, "--text", source, "--out_dir", tmp_path, "--minutes", "0")
    path = tmp_path / "text" / "train.bin"
    ids = np.fromfile(path, np.uint16)
    ids[7] += 1
    ids.tofile(path)
    assert "other texts than" in refused(capsys, train.main, "--resume", "--out_dir", tmp_path)


@pytest.mark.parametrize("tokenizer, unit", [("bytes", "bits per byte"), ("ids", "nats per token")])
def test_nanogpts_files_are_learned_where_they_lie(tmp_path, tokenizer, unit):
    ids = [*b"to be or not to be, that is it. " * 9]
    folder = nanogpt_files(tmp_path / "ids", ids, ids[:100])
    where = ["--text", folder / "train.bin", "--out_dir", tmp_path / "run"]
    printed = fit(*SHORT, "--tokenizer", tokenizer, "--eval_every", "512", *where)
    assert f"{unit}, 1 documents of up to 98 tokens" in printed
    found, _ = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "validation" in row]
    n_ids = choose(tokenizer).n_vocab
    guessing = math.log(n_ids) if tokenizer == "ids" else math.log2(n_ids)
    assert found["validation"][unit] == pytest.approx(guessing, rel=0.1)
    assert not (tmp_path / "run" / "text").exists()
    assert (folder / "train.bin").stat().st_size == 2 * len(ids)


def test_a_learned_tokenizer_packs_the_texts_of_the_run_and_is_in_the_checkpoint(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(800)]
    texts = {f"{i}.txt": " ".join(rng.choices(words, k=400)) for i in range(20)}
    where = ["--text", write_texts(tmp_path / "texts", texts), "--out_dir", tmp_path / "run"]
    fit(*SHORT, "--tokenizer", "learned", *where)
    model, saved = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    tokenizer = of_checkpoint(saved, tmp_path)
    assert model.cfg.vocab_size == tokenizer.n_vocab == 2048
    n_bytes = sum(len(written) for written in texts.values())
    n_tokens = 0
    for name in text.TOKEN_FILES:
        documents = read_tokens(tmp_path / "run" / "text" / name, tokenizer)
        n_tokens += len(documents.ids)
        assert tokenizer.decode(documents[0][1:-1]) in texts.values()
    assert n_tokens < n_bytes / 3


def test_from_a_model_of_text_a_run_without_text_goes_on_with_its_texts(straight, source, tmp_path):
    out = tmp_path / "run"
    start = ["--init", straight / "ckpt.pt", "--stages", "text:16", "--tokens", "1"]
    fit(*start, "--threads", "1", "--processes", "1", "--device", "cpu", "--out_dir", out)
    assert content(out, "train")["text"] == (source,)
    for name in text.TOKEN_FILES:
        assert (out / "text" / name).read_bytes() == (straight / "text" / name).read_bytes()
    assert 0 < weights_differ_by(straight, out) < 0.1


def test_a_second_run_in_a_busy_folder_is_refused_and_leaves_the_texts_of_the_first(
    capsys, source, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    other = write_texts(tmp_path / "other", {"a.txt": "other " * 40, "b.txt": "text " * 40})
    found = []

    def train_and_meet_another(*arguments):
        before = tree(out)
        found.append(refused(capsys, train.main, *SHORT, "--text", other, "--out_dir", out))
        assert tree(out) == before and (out / "text" / "train.bin") in before

    monkeypatch.setattr(train, "train", train_and_meet_another)
    fit(*SHORT, "--text", source, "--out_dir", out)
    assert len(found) == 1
    assert f"another run writes {out / 'metrics.jsonl'}: give another --out_dir" in found[0]


def test_a_model_of_text_can_go_on_to_stories(source, folder, tmp_path):
    flags = "--tokenizer shipped --segment_len 64 --stages text:128 --tokens 1"
    fit(*TINY, *flags.split(), "--text", source, "--out_dir", tmp_path / "text")
    start = ["--init", tmp_path / "text" / "ckpt.pt", "--recipe", "qa1", "--background", folder]
    how = "--stages 2:0 --tokens 1 --lr 1e-9 --table_lengths 0k --table_n 1 --threads 1"
    printed = fit(*start, *how.split(), "--processes", "1", "--out_dir", tmp_path / "qa1")
    assert "exact match" in printed
    assert 0 < weights_differ_by(tmp_path / "text", tmp_path / "qa1") < 1e-6


# Mistakes: one line, exit code 2


def tree(folder):
    """The files of a folder and their bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--text {}/empty", "empty holds no file"),
        ("--text {}/nowhere", "nowhere does not exist"),
        ("--text {}/good {}/nowhere", "nowhere does not exist"),
        ("--text {}/bad", "photo.jpg is not UTF-8 (byte 2)"),
        ("--text {}/bad/photo.jpg --skip_bad", "holds no text"),
        ("--text {}/good --stages text:8", "a window of 8 tokens is one segment"),
        ("--text {}/good --stages text:20", "give text:16"),
        ("--text {}/only_ends", "holds ends of text alone"),
        ("--text {}/letter", "letter is too short: no text for train"),
        ("--text {}/good --stages text:4000", "no document is longer than a window of 4000 tokens"),
        ("--text {}/odd", "train.bin has 7 bytes"),
        ("--text {}/beyond", "has the id 300, but the tokenizer has 257 tokens"),
        ("--text {}/no_ids", "val.bin holds no text"),
        ("--text {}/one_part", "has train.bin but no val.bin"),
        ("--text {}/good --tokenizer huge", "'huge' is neither a file nor a known name"),
        ("--text {}/good --tokenizer {}/good/a.txt", "a.txt"),
        ("--text {}/good --recipe qa1", "--recipe qa1"),
        ("--tokenizer bytes --recipe qa1", "--tokenizer bytes is for --recipe text"),
        ("--text {}/good --tasks qa1", "--tasks qa1 in a run on text"),
        ("--text {}/good --stages 2:0", "'2:0' is not for a run on text"),
        ("--text {}/good --segment_len 64 --stages echo", "'echo' is not for a run on text"),
        ("--text {}/good --stages text:0", "'text:0' is not a stage"),
        ("--text {}/good --stages text:16:8", "'text:16:8' is not a stage"),
        ("--recipe qa1 --stages text:16 --tokenizer shipped", "'text:16' is for a run on text"),
        ("--text {}/good --gate_lr 0.5", "gate_lr 0.5"),
        ("--init {}/old/ckpt.pt --text {}/good --tokenizer bytes", "a tokenizer of its own"),
        ("--init {}/old/ckpt.pt --recipe qa1 --stages 2:0", "another tokenizer than the shipped"),
        ("--resume --out_dir {}/old --tokenizer bytes", "--tokenizer from the checkpoint"),
    ],
)
def test_what_cannot_be_learned_is_told_in_one_line_and_harms_no_file(
    capsys, straight, tmp_path, flags, named
):
    texts = {"good/a.txt": "a text " * 20, "good/b.txt": "b text " * 20, "letter": "a"}
    texts |= {"bad/photo.jpg": b"\n\n\xff\xd8", "bad/a.txt": "a text", "odd/val.bin": b"1" * 8}
    texts |= {"odd/train.bin": b"1234567", "one_part/train.bin": b"12345678"}
    texts["old/ckpt.pt"] = (straight / "ckpt.pt").read_bytes()
    write_texts(tmp_path, texts)
    (tmp_path / "empty").mkdir()
    nanogpt_files(tmp_path / "only_ends", [1, 2, 3], [EOT, EOT, EOT])
    nanogpt_files(tmp_path / "beyond", [1, 2, 300, 3], [1, 2, 3])
    nanogpt_files(tmp_path / "no_ids", [1, 2, 3], [])
    before = tree(tmp_path)
    argv = flags.replace("{}", str(tmp_path)).split()
    base = [] if "--resume" in argv or "--init" in argv else SHORT
    if "--resume" not in argv:
        argv += ["--out_dir", str(tmp_path / "run")]
    err = refused(capsys, train.main, *base, *argv)
    assert named in err
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    new = {path.name for path in after.keys() - before.keys()}
    assert new <= {"train.bin", "val.bin"}  # windows are counted when the ids are there


def test_the_command_counts_the_documents_of_both_parts(capsys, tmp_path):
    source = write_texts(tmp_path, {"a.txt": "ä" * 50, "b.txt": "b" * 100})
    text.main(["--text", source, "--tokenizer", "bytes"])
    _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [["train", "1"], ["val", "1"]]
    assert [row[2:4] for row in rows] == [["100", "102"]] * 2
    folder = nanogpt_files(tmp_path / "ids", [1, 2, 3], [1, 2, 3])
    text.main(["--text", str(folder), "--tokenizer", "ids"])
    assert "unknown" in capsys.readouterr().out
