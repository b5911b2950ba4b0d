"""Tables and pictures show what was counted and computed, and a mistake costs no file.

python -m pytest tests/test_assets.py -q
"""

import json
import math
import random
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import heatmaps
import pictures
import tables
from babilong_eval import wilson
from data.babi import Question
from data.babilong import Builder
from data.document import join
from data.tokenizer import load
from lm2 import LM2, LM2Config, save_checkpoint
from test_train import refused

S, L, N, HM = 16, 2, 4, 2  # tokens a segment, blocks, slots, memory heads
TASKS = [f"qa{i}" for i in range(1, 11)]
PROSE = [
    "The sea was calm that night.",
    "Nobody had seen the old lamp for years.",
    "It rained on the hills.",
    "A ship came in with the tide.",
    "The bread was still warm.",
    "Two dogs slept by the mill of the town and three cats.",
]
FACTS = ["Mary went to the kitchen.", "John moved to the garden."]


def cell(column, task, length, hits, n=200, **other):
    model, memory = column.split()
    counts = dict(n=n, exact=hits, floor=n // 5, official=hits // 2, floor_official=n // 4)
    counts |= dict(outside_n=0, outside_exact=0, floor_outside=0)
    return dict(model=model, memory=memory, task=task, length=length, **counts) | other


def write_figures(path, cells):
    path.write_text(json.dumps(dict(cells=cells)), encoding="utf-8")
    return path


# ---- tables ----

OUTSIDE = dict(outside_n=100, outside_exact=50, floor_outside=40)
SEEDS = [
    cell("lm2-0 on", "qa1", 0, 196),
    cell("lm2-1 on", "qa1", 0, 180),
    cell("lm2-2 on", "qa1", 0, 190),
    cell("lm2-0 off", "qa1", 0, 40),
    cell("full on", "qa1", 0, 100),
    cell("lm2-0 on", "qa1", 16000, 150, **OUTSIDE),
]
FIVE = []  # two seeds, five tasks
for seed in (0, 10):
    for i in range(5):
        FIVE.append(cell(f"lm2-{seed} on", f"qa{i + 1}", 0, 100 + 20 * i + seed))
FEW = cell("rmt on", "qa1", 0, 30, n=40, floor=10)


def lines_of(table):
    """The lines of a table without the rule below its head."""
    head, _, *lines = table.split("\n")
    return [head, *lines]


def test_an_entry_is_the_median_seed_with_its_interval_and_then_every_seed_in_order():
    assert tables.table_of_columns(SEEDS).split("\n") == [
        "| task | length | n | floor | lm2 on | lm2 off | full on |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| qa1 | 0k | 200 | 20.0 | 95.0 [91, 97] (98.0 90.0 95.0) | 20.0 [15, 26] "
        "| 50.0 [43, 57] |",
        "| qa1 | 16k | 200 | 20.0 | 75.0 [69, 80] | - | - |",
    ]
    assert "| 95.0 [91, 97] (98.0 95.0) |" in tables.table_of_columns([SEEDS[0], SEEDS[2]])


def test_an_entry_with_another_number_of_samples_names_it_and_its_own_floor():
    table = tables.table_of_columns([SEEDS[0], FEW])
    assert "| 75.0 [60, 86], n = 40, floor 25.0 |" in table


@pytest.mark.parametrize(
    ("which", "line"),
    [
        ("outside", "| qa1 | 16k | 100 | 40.0 | 50.0 [40, 60] |"),
        ("official", "| qa1 | 16k | 200 | 25.0 | 37.5 [31, 44] |"),
    ],
)
def test_each_metric_has_counts_and_a_floor_of_its_own(which, line):
    assert tables.table_of_columns(SEEDS, ["lm2 on"], which).split("\n")[-1] == line


def test_a_mean_weighs_tasks_alike_and_stands_only_where_every_task_was_asked():
    lines = lines_of(tables.table_of_columns([*FIVE, cell("rmt on", "qa1", 0, 100)]))
    assert len(lines) == 1 + 5 + 1
    assert lines[1].endswith("| 50.0 [43, 57] |")
    assert lines[-1] == "| mean of qa1-5 | 0k | 1000 | 20.0 | 70.0 [67, 73] (70.0 75.0) | - |"


def test_with_the_lengths_side_by_side_every_task_column_and_seed_has_a_line():
    table = tables.table_of_seeds(SEEDS, ["lm2 on", "full on"], across="lengths")
    assert lines_of(table) == [
        "| task | column | 0k | 16k |",
        "| qa1 | lm2-0 on | 98.0 [95, 99] | 75.0 [69, 80] |",
        "| qa1 | lm2-1 on | 90.0 [85, 93] | - |",
        "| qa1 | lm2-2 on | 95.0 [91, 97] | - |",
        "| qa1 | full on | 50.0 [43, 57] | - |",
        "| qa1 | floor, n = 200 | 20.0 | 20.0 |",
    ]
    outside = tables.table_of_seeds(SEEDS, ["lm2 on"], "outside", "lengths")
    assert lines_of(outside)[1:] == [
        "| qa1 | lm2-0 on | - | 50.0 [40, 60] |",
        "| qa1 | floor, n = 100 | - | 40.0 |",
    ]


def test_with_the_tasks_side_by_side_every_length_column_and_seed_has_a_line():
    cells = [*FIVE, cell("rmt on", "qa1", 0, 200), cell("rmt on", "qa1", 1000, 30)]
    assert lines_of(tables.table_of_seeds(cells)) == [
        "| length | column | qa1 | qa2 | qa3 | qa4 | qa5 | qa1-5 |",
        "| 0k | lm2-0 on | 50.0 | 60.0 | 70.0 | 80.0 | 90.0 | 70.0 [67, 73] |",
        "| 0k | lm2-10 on | 55.0 | 65.0 | 75.0 | 85.0 | 95.0 | 75.0 [72, 77] |",
        "| 0k | rmt on | 100 | - | - | - | - | - |",
        "| 0k | floor, n = 200 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 |",
        "| 1k | rmt on | 15.0 | - | - | - | - | - |",
        "| 1k | floor, n = 200 | 20.0 | - | - | - | - | - |",
    ]


@pytest.mark.parametrize("cells", [[SEEDS[0], FEW], [FEW, SEEDS[0]]])
def test_the_floor_below_seeds_is_that_of_the_line_with_most_samples(cells):
    assert lines_of(tables.table_of_seeds(cells))[-1] == "| 0k | floor, n = 40 to 200 | 20.0 |"


def test_the_command_makes_one_table_of_several_files_and_shows_what_is_chosen(tmp_path, capsys):
    one = write_figures(tmp_path / "one.json", SEEDS)
    two = write_figures(tmp_path / "two.json", [cell("rmt-0 on", "qa1", 0, 100)])
    tables.main([str(one), str(two), "--columns", "rmt on", "lm2 off"])
    line = "| qa1 | 0k | 200 | 20.0 | 50.0 [43, 57] | 20.0 [15, 26] |"
    assert lines_of(capsys.readouterr().out)[1] == line
    tables.main([str(one), "--lengths", "16000", "--tasks", "qa1", "--across", "tasks"])
    assert lines_of(capsys.readouterr().out)[1] == "| 16k | lm2-0 on | 75.0 |"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--columns", "rmt on"], "'rmt on' is not in the file: choose from 'lm2 on', 'lm2 off'"),
        (["--lengths", "4k"], "'4k' is not in the file: choose from '0k', '16k'"),
        (["--tasks", "qa1-5"], "'qa1-5' is not in the file: choose from 'qa1'"),
        (["FILE"], "'lm2-0 on' has qa1 at 0k in two files"),
        (["none.json"], "No such file or directory: none.json"),
    ],
)
def test_what_a_table_cannot_show_ends_in_one_line(tmp_path, capsys, argv, said):
    file = write_figures(tmp_path / "figures.json", SEEDS)
    argv = [str(file) if word == "FILE" else word for word in argv]
    assert said in refused(capsys, tables.main, file, *argv)


@pytest.mark.parametrize(
    "change",
    [
        dict(exact=201),
        dict(official=-1),
        dict(n=0),
        dict(n="200"),
        dict(length=-1),
        dict(task="qa99"),
        dict(floor=None),
        dict(outside_exact=1),
        dict(outside_n=201),
    ],
)
def test_a_broken_cell_is_refused_by_its_number(tmp_path, change):
    cells = [SEEDS[0], SEEDS[0] | dict(memory="off") | change]
    path = write_figures(tmp_path / "figures.json", cells)
    with pytest.raises(ValueError, match="holds no figures, cell 2 is broken"):
        tables.load_figures(str(path))


def test_a_cell_that_occurs_twice_is_refused_by_its_number(tmp_path):
    path = write_figures(tmp_path / "figures.json", [SEEDS[0], SEEDS[1], SEEDS[0]])
    with pytest.raises(ValueError, match="holds no figures, cell 3 occurs twice"):
        tables.load_figures(str(path))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"cells": 3}', b'{"cells": []}', b"\xff"])
def test_a_file_without_cells_is_refused(tmp_path, text):
    path = tmp_path / "figures.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="figures.json holds no figures"):
        tables.load_figures(str(path))


# ---- pictures of figures ----

HITS = {"lm2 on": [200, 198, 150], "lm2 off": [190, 60, 0]}
CELLS = []
for name, row in HITS.items():
    for length, hits in zip([0, 4000, 16000], row, strict=True):
        CELLS.append(cell(name, "qa1", length, hits))
TEN = []  # all tasks at 4k
for i, task in enumerate(TASKS):
    TEN.append(cell("lm2 on", task, 4000, 10 * i + 10, n=110))
    TEN.append(cell("llama rag", task, 4000, 10 * i, n=110))


@pytest.fixture
def fig():
    return pytest.importorskip("matplotlib.figure").Figure(layout="constrained")


def heights(container):
    return container.lines[0].get_ydata()


def test_the_accuracy_draws_shares_intervals_and_the_floor_over_doublings_of_the_length(fig):
    pictures.draw_accuracy(fig, CELLS, list(HITS), ["qa1"])
    ax = fig.axes[0]
    *columns, floor = ax.containers
    for container, hits in zip(columns, HITS.values(), strict=True):
        assert heights(container) == pytest.approx([100 * h / 200 for h in hits])
        bars = [bar[:, 1] for bar in container.lines[2][0].get_segments()]
        ends = [[100 * end for end in wilson(h, 200)] for h in hits]
        np.testing.assert_allclose(bars, ends, atol=1e-9)
    assert heights(floor) == pytest.approx([20, 20, 20])
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["lm2", "lm2, memory off", "best constant answer"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0k", "4k", "16k"]
    assert np.diff(ax.get_xticks()) == pytest.approx([1, 2])  # 0k as if it was 2k
    assert fig.get_suptitle().endswith("n = 200 a task")


def test_of_several_seeds_the_line_is_the_median_and_each_has_a_dot(fig):
    shifts = [0, -20, -4]
    cells = list(CELLS)
    for seed, shift in enumerate(shifts):
        for length, hits in zip([0, 4000, 16000], HITS["lm2 on"], strict=True):
            cells.append(cell(f"rmt-{seed} on", "qa1", length, hits + shift))
    pictures.draw_accuracy(fig, cells, ["rmt on", "lm2 on"], ["qa1"])
    expected = [(hits - 4) / 2 for hits in HITS["lm2 on"]]
    assert heights(fig.axes[0].containers[0]) == pytest.approx(expected)
    (dots,) = [line for line in fig.axes[0].lines if line.get_markersize() == 3]
    expected = [(hits + shift) / 2 for hits in HITS["lm2 on"] for shift in shifts]
    assert dots.get_ydata() == pytest.approx(expected)


def test_a_column_has_no_point_where_it_was_not_asked_and_no_mean_of_a_part_of_the_tasks(fig):
    cells = [*CELLS, cell("llama rag", "qa1", 4000, 100, n=100)]
    pictures.draw_accuracy(fig, cells, ["lm2 on", "llama rag"], ["qa1"])
    assert [len(heights(x)) for x in fig.axes[0].containers] == [3, 1, 3]
    assert fig.get_suptitle().endswith("n = 100 to 200 a task")
    with pytest.raises(ValueError, match="'lm2 off' has no qa2: choose other columns"):
        pictures.draw_accuracy(fig, CELLS + TEN, ["lm2 off"], ["qa2"])
    seeds = [cell("rmt-0 on", "qa1", 0, 9), cell("rmt-1 on", "qa2", 0, 9)]
    with pytest.raises(ValueError, match="'rmt on' has no qa1 qa2 at 0k"):
        pictures.draw_accuracy(fig, seeds, ["rmt on"], ["qa1", "qa2"])


def test_several_tasks_are_drawn_as_their_mean(fig):
    pictures.draw_accuracy(fig, TEN, ["lm2 on"], TASKS)
    assert heights(fig.axes[0].containers[0]) == pytest.approx([100 * 55 / 110])
    assert "mean of qa1 qa2" in fig.get_suptitle()


def test_the_radar_draws_the_mean_of_each_group_of_the_paper(fig):
    pictures.draw_radar(fig, TEN, ["lm2 on", "llama rag"], 4000)
    lm2, llama, floor = fig.axes[0].lines
    group_hits = np.array([0, 15, 35, 60, 85, 0])  # the last point closes the polygon
    assert llama.get_ydata() == pytest.approx(100 * group_hits / 110)
    assert lm2.get_ydata() == pytest.approx(100 * (group_hits + 10) / 110)
    assert floor.get_ydata() == pytest.approx([20] * 6)
    assert lm2.get_xdata() == pytest.approx([2 * math.pi * i / 5 for i in range(6)])
    without_two = [c for c in TEN if c["task"] not in ("qa4", "qa9")]
    with pytest.raises(ValueError, match="'lm2 on' has no qa4 qa9 at 4k"):
        pictures.draw_radar(fig, without_two, ["lm2 on"], 4000)


# ---- the memory: what is computed ----


@pytest.fixture(scope="module")
def tok():
    return load()


@pytest.fixture(scope="module")
def model(tok):
    """A tiny random model whose reads and answers depend on what is in the bank."""
    torch.manual_seed(0)
    sizes = dict(n_layer=L, n_embd=16, n_head=2, n_kv_head=2, ffn_dim=32, segment_len=S, n_slot=N)
    model = LM2(LM2Config(vocab_size=tok.n_vocab, n_mem_head=HM, **sizes))
    with torch.no_grad():
        for layer in model.layers:
            layer.memory.wv.weight.mul_(6)
            layer.memory.wq.weight.mul_(3)
        model.output.weight.copy_(torch.randn_like(model.output.weight))
    return model.eval()


@pytest.fixture(scope="module")
def doc(tok):
    """Two facts in prose. The question needs the second one."""
    sentences = [*PROSE[:2], FACTS[0], *PROSE[2:4], FACTS[1], *PROSE[4:]]
    tokens = [tok.encode(" " + sentence) for sentence in sentences]
    question = Question("Where is John?", "garden", (1,))
    return join(tokens, [2, 5], FACTS, [question], lambda text: tok.encode(" " + text), tok.eot)


@pytest.fixture(scope="module")
def ids(doc):
    return torch.from_numpy(doc.prompt())[None]


@pytest.fixture(scope="module")
def notes(model, ids):
    """What each block recorded in one call on the document."""
    with torch.no_grad(), heatmaps.recording(model) as notes:
        model(ids)
    return notes


def test_before_reads_the_first_bank_and_after_the_bank_that_the_document_has_written(
    model, ids, notes
):
    before, after = heatmaps.reads(model, ids, "mean")
    start = ids.shape[1] // S * S
    n_last = ids.shape[1] - start
    assert 0 < n_last < S
    with torch.no_grad(), heatmaps.recording(model) as alone:
        model(ids[:, start:])
    for i in range(L):
        torch.testing.assert_close(before[i], alone[i]["A"][0, 0].mean(0))
        torch.testing.assert_close(after[i], notes[i]["A"][0, -1, :, :n_last].mean(0))
    assert (before - after).abs().max() > 0.05


def test_a_full_last_segment_is_read_from_the_bank_before_it_and_is_not_written(
    model, doc, ids, notes
):
    full = ids[:, : 3 * S]
    _, after = heatmaps.reads(model, full, "1")
    assert after.shape == (L, S, N)
    for i in range(L):
        torch.testing.assert_close(after[i], notes[i]["A"][0, 2, 1])  # segment 3, head 1
    assert len(heatmaps.writes(model, full, doc.cuts, "1")) == 2


@pytest.mark.parametrize("head", ["mean", "1"])
def test_a_write_is_r_summed_over_each_sentence_and_what_was_declined(model, doc, ids, notes, head):
    segments = heatmaps.writes(model, ids, doc.cuts, head)
    assert len(segments) == (ids.shape[1] - 1) // S
    for g, (starts, share) in enumerate(segments):
        first, stop = g * S, (g + 1) * S
        assert starts == [first] + [cut for cut in doc.cuts if first < cut < stop]
        torch.testing.assert_close(share.sum(-1), torch.ones(L, N))
        for i in range(L):
            R = notes[i]["R"][g][0]  # (HM, N, S+1)
            R = R.mean(0) if head == "mean" else R[1]
            for j, (a, b) in enumerate(zip(starts, [*starts[1:], stop], strict=True)):
                torch.testing.assert_close(share[i, :, j], R[:, a - first : b - first].sum(-1))
            torch.testing.assert_close(share[i, :, -1], R[:, S])


def texts(rows, *kinds):
    return [row.text for row in rows if row.kind in kinds]


def test_rows_follow_the_document_and_tell_facts_from_prose(model, tok, doc, ids):
    rows = heatmaps.rows(model, tok, doc, "mean")
    n_written = ids.shape[1] // S
    whole = "".join(texts(rows, "prose", "fact", "needed"))
    assert whole == tok.decode(doc.ids[: n_written * S])
    assert "".join(texts(rows, "fact")).strip() == FACTS[0]
    assert "".join(texts(rows, "needed")).strip() == FACTS[1]
    assert texts(rows, "declined") == [f"segment {g + 1}: declined" for g in range(n_written)]


def test_segments_without_room_show_together_what_was_declined_of_them(model, tok, doc, ids):
    segments = heatmaps.writes(model, ids, doc.cuts, "mean")
    rows = heatmaps.rows(model, tok, doc, "mean", most=1)
    assert texts(rows, "declined") == [
        "segments 1 to 4, not shown: declined",
        "segment 5: declined",  # the last one that holds a fact
        "segment 6, not shown: declined",
    ]
    declined = torch.stack([share[..., -1] for _, share in segments])
    torch.testing.assert_close(rows[0].share, declined[:4].mean(0))
    torch.testing.assert_close(rows[-1].share, declined[5])
    assert len(rows) == 1 + segments[4].share.shape[-1] + 1


@pytest.mark.parametrize(
    ("sizes", "holds_facts", "most", "chosen"),
    [
        ([3, 3, 3, 3], [0, 1, 0, 1], 1, {3}),
        ([3, 3, 3, 3], [0, 1, 0, 1], 8, {1, 3}),
        ([3, 3, 3, 3], [0, 1, 0, 0], 6, {1, 3}),
        ([3, 3, 3, 3], [0, 1, 0, 1], 12, {0, 1, 2, 3}),
        ([1, 5, 3], [0, 0, 0], 4, {2}),  # none before one that has no room
    ],
)
def test_room_goes_to_facts_first_and_then_to_the_latest_segments(sizes, holds_facts, most, chosen):
    assert heatmaps.shown(sizes, holds_facts, most) == chosen


@torch.no_grad()
def test_an_answer_with_memory_begins_behind_the_document_and_one_without_behind_its_last_segment(
    model, tok, doc, ids
):
    start = ids.shape[1] // S * S
    for memory, seen in ((True, ids), (False, ids[:, start:])):
        logits, _, _ = model(seen)
        first = tok.decode([logits[0, -1].argmax().item()]).strip()
        assert first
        assert heatmaps.said(model, tok, doc, memory).startswith(first)
    assert heatmaps.said(model, tok, doc, True) != heatmaps.said(model, tok, doc, False)


def test_a_label_is_one_short_line_without_mathematics():
    assert heatmaps.plain(" a\n b  $x$ ") == r"a b \$x\$"
    assert heatmaps.plain("\n") == "\u2423"
    assert heatmaps.plain("abc", 3) == "abc"
    assert heatmaps.plain("word " * 20, 12) == "word word w\u2026"


def test_the_document_is_the_text_with_its_last_sentence_as_the_question(tok):
    flags = Namespace(text="Mary went to the kitchen.\nIt rained.  Where is Mary?")
    doc = pictures.document(tok, flags)
    assert tok.decode(doc.prompt()) == " Mary went to the kitchen. It rained. Where is Mary?"
    assert doc.questions[0].text == "Where is Mary?"
    assert len(doc.cuts) == 3


def test_without_a_text_the_document_is_the_sample_of_task_length_and_seed(tok, tmp_path):
    book = [f"The captain saw ship {i} near the village before the rain." for i in range(1500)]
    (tmp_path / "book.txt").write_text(" ".join(book), encoding="utf-8")
    flags = Namespace(text=None, background=str(tmp_path), task="qa2", length="200", seed=7)
    doc = pictures.document(tok, flags)
    builder = Builder(tok, "val", str(tmp_path))
    assert doc.texts == builder.sample("qa2", 200, random.Random(7)).texts
    assert doc.texts != builder.sample("qa2", 200, random.Random(8)).texts


def test_a_model_without_memory_or_a_document_of_one_segment_is_refused(model, tok, doc):
    sizes = dict(n_layer=1, n_embd=16, n_head=2, n_kv_head=2, ffn_dim=32, n_mem_layer=0)
    bare = LM2(LM2Config(vocab_size=tok.n_vocab, **sizes))
    with pytest.raises(ValueError, match="the model has no memory"):
        heatmaps.prepare(bare, doc, None)
    question = Question("Where is John?", "", ())  # 4 tokens
    for n in (S, S + 1):
        tokens = [[5] * (n - 4)]
        short = join(tokens, [], [], [question], lambda text: tok.encode(" " + text), tok.eot)
        if n > S:
            assert heatmaps.prepare(model, short, None).shape == (1, n)
        else:
            with pytest.raises(ValueError, match=f"has {n} tokens, .* nothing was written"):
                heatmaps.prepare(model, short, None)


# ---- the memory: what is drawn ----


def test_the_read_picture_shows_the_last_tokens_of_a_block_and_a_head_on_one_scale(
    fig, monkeypatch, model, tok, doc, ids
):
    monkeypatch.setattr(heatmaps, "TOKENS", 6)
    heatmaps.draw_read(fig, model, tok, doc, 1, "0")
    left, right = fig.axes[:2]
    maps = heatmaps.reads(model, ids, "0")
    for ax, A, memory in ((left, maps[0], False), (right, maps[1], True)):
        np.testing.assert_allclose(ax.images[0].get_array(), A[1, -6:])
        reply = heatmaps.said(model, tok, doc, memory)
        assert f"answer: {heatmaps.plain(reply)}" in ax.get_title()
    assert left.images[0].get_clim() == right.images[0].get_clim()
    labels = left.get_yticklabels()
    shown = [heatmaps.plain(tok.decode([i])) for i in ids[0, -6:].tolist()]
    assert [text.get_text() for text in labels] == shown
    bold = [text.get_text() for text in labels if text.get_fontweight() == "bold"]
    assert bold == ["Where", "is", "John", "?"]
    assert "block 1, head 0" in fig.get_suptitle()
    assert "Where is John? Right: garden." in fig.get_suptitle()


def test_without_a_layer_the_read_picture_takes_the_block_that_reads_one_slot_most(
    fig, model, tok, doc, ids
):
    heatmaps.draw_read(fig, model, tok, doc, None, "mean")
    _, after = heatmaps.reads(model, ids, "mean")
    most = [float(A[-1].max()) for A in after]
    assert f"block {most.index(max(most))}," in fig.get_suptitle()


@pytest.mark.parametrize(("layer", "blocks"), [(None, [0, 1]), (1, [1])])
def test_the_write_picture_shows_every_row_of_each_block_and_marks_facts(
    fig, model, tok, doc, layer, blocks
):
    heatmaps.draw_write(fig, model, tok, doc, layer, "mean")
    rows = heatmaps.rows(model, tok, doc, "mean")
    *panels, _ = fig.axes  # the last one is the colour bar
    assert [ax.get_title() for ax in panels] == [f"block {i}" for i in blocks]
    for ax, i in zip(panels, blocks, strict=True):
        shown = np.ma.filled(ax.images[0].get_array(), np.nan)
        for row, values in zip(rows, shown, strict=True):
            expected = np.full(N, np.nan) if row.kind == "declined" else row.share[i]
            np.testing.assert_allclose(values, expected)
        declined = [f"{100 * row.share[i].mean():.0f} %" for row in rows if row.kind == "declined"]
        assert [text.get_text() for text in ax.texts] == declined
    for row, text in zip(rows, panels[0].get_yticklabels(), strict=True):
        assert (text.get_fontweight() == "bold") == (row.kind in ("fact", "needed"))
        assert text.get_text().startswith("\u25ba") == (row.kind == "needed")


def test_a_memory_in_the_last_block_alone_is_shown_under_its_number(fig, model, tok, doc):
    cfg = replace(model.cfg, n_mem_layer=None, mem_blocks=(L - 1,))
    last = LM2(cfg).eval()
    heatmaps.draw_read(fig, last, tok, doc, None, "mean")
    assert f"block {L - 1}," in fig.get_suptitle()
    fig.clear()
    heatmaps.draw_write(fig, last, tok, doc, None, "mean")
    *panels, _ = fig.axes
    assert [ax.get_title() for ax in panels] == [f"block {L - 1}"]
    with pytest.raises(ValueError, match=f"--layer 0 has no memory: give {L - 1}"):
        heatmaps.prepare(last, doc, 0)


# ---- the command ----


@pytest.fixture(scope="module")
def ckpt(model, tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=tok.ranks)
    return str(path)


@pytest.fixture
def old(tmp_path):
    """A picture that is already there."""
    path = tmp_path / "out.png"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize(
    ("picture", "name", "start"), [("accuracy", "a.png", b"\x89PNG"), ("radar", "a.pdf", b"%PDF")]
)
def test_the_command_draws_figures_and_needs_no_display(tmp_path, picture, name, start):
    pytest.importorskip("matplotlib")
    file = write_figures(tmp_path / "f.json", TEN)
    out = tmp_path / name
    pictures.main([picture, str(file), "--out", str(out), "--columns", "lm2 on"])
    assert out.read_bytes().startswith(start)
    assert "matplotlib.pyplot" not in sys.modules
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["f.json", name])


@pytest.mark.parametrize("picture", ["read", "write"])
def test_the_command_draws_the_memory_on_a_text_of_any_signs(recwarn, tmp_path, ckpt, picture):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.svg"
    text = " ".join([*PROSE, "Where is $5 \u4e2d?"])  # not mathematics, and not in the font
    pictures.main([picture, "--ckpt", ckpt, "--out", str(out), "--text", text])
    svg = out.read_text(encoding="utf-8")
    assert f"<!-- {picture.title()}, " in svg  # the title of the picture
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_without_matplotlib_one_line_says_how_to_install_it(monkeypatch, capsys, old):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    err = refused(capsys, pictures.main, "read", "--ckpt", "none.pt", "--out", old)
    assert 'matplotlib is missing: pip install -e ".[pictures]"' in err


ON_TEXT = ["--ckpt", "CKPT", "--text", " ".join(PROSE)]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["accuracy", "none.json"], "No such file or directory: none.json"),
        (["accuracy", "FILE", "--columns", "rmt on"], "'rmt on' is not in the file: choose from "),
        (["accuracy", "FILE", "--tasks", "qa2"], "--tasks 'qa2' is not in the file: choose from "),
        (["accuracy", "MANY"], "8 columns are too many to tell apart"),
        (["radar", "FILE", "--length", "8k"], "--length '8k' is not in the file: choose from '0k'"),
        (["radar", "FILE"], "'lm2 on' has no qa2 qa3 qa4 qa5 qa6 qa7 qa8 qa9 qa10 at 4k"),
        (["read", "--ckpt", "none.pt"], "there is no checkpoint none.pt"),
        (["read", "--ckpt", "CKPT", "--text", "Where is Mary?"], "nothing was written"),
        (["write", *ON_TEXT, "--layer", "2"], "--layer 2 has no memory: give 0 or 1"),
        (["read", *ON_TEXT, "--layer", "-1"], "--layer -1 has no memory"),
        (["write", *ON_TEXT, "--head", "2"], "--head '2' is not there: give mean or a number from"),
        (["read", *ON_TEXT, "--head", "-1"], "--head '-1' is not there"),
    ],
)
def test_a_mistake_ends_in_one_line_and_the_old_picture_stays(capsys, ckpt, old, argv, said):
    pytest.importorskip("matplotlib")
    many = [cell(f"m{i} on", "qa1", 0, 1) for i in "abcdefgh"]
    known = {
        "CKPT": ckpt,
        "FILE": write_figures(old.parent / "few.json", CELLS),
        "MANY": write_figures(old.parent / "many.json", many),
    }
    argv = [known.get(word, word) for word in argv]
    assert said in refused(capsys, pictures.main, *argv, "--out", old)
    assert old.read_bytes() == b"old"
    assert not list(old.parent.glob("*.tmp"))


@pytest.mark.parametrize("name", ["out.jpg", "out", "none/out.png", "."])
def test_a_name_that_no_picture_can_have_is_refused_before_any_work(capsys, tmp_path, name):
    pytest.importorskip("matplotlib")
    argv = ["read", "--ckpt", "none.pt", "--out", tmp_path / name]
    assert "--out" in refused(capsys, pictures.main, *argv)


def test_a_picture_that_fails_while_it_is_written_leaves_the_old_one(monkeypatch, capsys, old):
    figure = pytest.importorskip("matplotlib.figure").Figure

    def disk_is_full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(figure, "savefig", disk_is_full)
    file = write_figures(old.parent / "f.json", CELLS)
    assert "No space left" in refused(capsys, pictures.main, "accuracy", file, "--out", old)
    assert old.read_bytes() == b"old"
    assert sorted(path.name for path in old.parent.iterdir()) == ["f.json", "out.png"]
