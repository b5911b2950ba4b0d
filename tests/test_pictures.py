"""Pictures: what is drawn is what was counted and computed, and a mistake costs no file.

    python -m pytest tests/test_pictures.py -q
"""
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import heatmaps  # noqa: E402
import pictures  # noqa: E402
from data.babi import Question  # noqa: E402
from data.babilong import Builder  # noqa: E402
from data.document import join  # noqa: E402
from data.metrics import percent, pooled, wilson  # noqa: E402
from data.tokenizer import load  # noqa: E402
from lm2 import LM2, LM2Config, save_checkpoint  # noqa: E402

torch.set_num_threads(1)

S, L, N, HM = 16, 2, 4, 2
TASKS = [f"qa{i}" for i in range(1, 11)]
PROSE = ["The sea was calm that night.", "Nobody had seen the old lamp for years.", "It rained on the hills.",
         "A ship came in with the tide.", "The bread was still warm.",
         "Two dogs slept by the mill of the town and three cats."]
FACTS = ["Mary went to the kitchen.", "John moved to the garden."]


def cell(column, task, length, hits, n=200, **other):
    model, memory = column.split()
    return dict(model=model, memory=memory, task=task, length=length, n=n, exact=hits, official=hits // 2,
                floor=n // 5, floor_official=n // 4, outside_n=n, outside_exact=hits,
                floor_outside=n // 5) | other


HITS = {"lm2 on": [200, 198, 150], "lm2 off": [190, 60, 0]}
CELLS = [cell(name, "qa1", length, hits) for name, row in HITS.items()
         for length, hits in zip([0, 4000, 16000], row)]
TEN = [cell(name, task, 4000, 10 * i + less, n=110) for name, less in (("lm2 on", 10), ("llama rag", 0))
       for i, task in enumerate(TASKS)]


@pytest.fixture(scope="module")
def tok():
    return load()


@pytest.fixture(scope="module")
def model(tok):
    """A tiny random model whose reads and answers hang on what is in the bank."""
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=tok.n_vocab, n_layer=L, n_embd=16, n_head=2, n_kv_head=2, ffn_dim=32,
                          segment_len=S, n_slot=N, n_mem_head=HM))
    with torch.no_grad():
        for layer in model.layers:
            layer.memory.wv.weight.mul_(6)
            layer.memory.wq.weight.mul_(3)
        model.output.weight.copy_(torch.randn_like(model.output.weight))
    return model.eval()


@pytest.fixture(scope="module")
def doc(tok):
    """Two facts in prose; the question needs the second."""
    sentences = PROSE[:2] + FACTS[:1] + PROSE[2:4] + FACTS[1:] + PROSE[4:]
    asked = Question("Where is John?", "garden", (1,))
    return join([tok.encode(" " + s) for s in sentences], [2, 5], FACTS, [asked],
                lambda text: tok.encode(" " + text), tok.eot)


@pytest.fixture(scope="module")
def recorded(model, doc):
    """The document, and of each block A (1, G, HM, S, N) and the list of R of one call on it."""
    ids = torch.from_numpy(doc.prompt())[None]
    with torch.no_grad(), heatmaps.recording(model) as notes:
        model(ids)
    return ids, notes


@pytest.fixture(scope="module")
def ckpt(model, tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=tok.ranks)
    return path


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A folder of background."""
    path, words = tmp_path_factory.mktemp("books"), "captain river lamp village storm letter bridge".split()
    text = [f"The old {a} was seen near the {b} and the {c} before the rain." for a in words for b in words
            for c in words]
    (path / "book.txt").write_text(" ".join(text), encoding="utf-8")
    return path


@pytest.fixture
def written(tmp_path):
    """A file of figures and a picture that is already there."""
    figures, out = tmp_path / "figures.json", tmp_path / "out.png"
    figures.write_text(json.dumps(dict(settings={}, cells=CELLS)), encoding="utf-8")
    out.write_bytes(b"old")
    return figures, out


def refused(capsys, *argv):
    """The one line on standard error with which the command ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        pictures.main([str(x) for x in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert len(err.splitlines()) == 1 and err.startswith("python assets/pictures.py"), err
    return err


def new_figure():
    return pytest.importorskip("matplotlib.figure").Figure(layout="constrained")


# ---- figures of the evaluation: computation ----

def test_a_mean_over_tasks_weighs_tasks_alike_and_its_interval_is_that_of_the_tables():
    cells = [cell("lm2 on", "qa1", 0, 90, n=100), cell("lm2 on", "qa2", 0, 20, n=50)]
    value, low, high = pictures.mean(cells, "lm2 on", ["qa1", "qa2"], 0, "exact")
    assert value == pytest.approx(100 * (0.9 + 0.4) / 2)
    assert f"{value:.1f} [{low:.0f},{high:.0f}]" == percent(*pooled(cells, "n", "exact"))
    reach = 196 * (0.9 * 0.1 / 100 + 0.4 * 0.6 / 50) ** 0.5 / 2
    assert (low, high) == pytest.approx((value - reach, value + reach), abs=1)


def test_a_mean_names_the_tasks_that_are_missing():
    with pytest.raises(ValueError, match="'lm2 on' has no qa2 qa3 at 4k"):
        pictures.mean(CELLS, "lm2 on", ["qa1", "qa2", "qa3"], 4000, "exact")


def test_the_radar_takes_the_mean_of_each_group_of_the_paper():
    means = pictures.group_means(TEN, "llama rag", 4000, "exact")
    assert means == pytest.approx([100 * x / 110 for x in (0, 15, 35, 60, 85)])


def test_the_radar_names_every_task_that_is_missing():
    with pytest.raises(ValueError, match="'lm2 on' has no qa4 qa9 at 4k"):
        pictures.group_means([c for c in TEN if c["task"] not in ("qa4", "qa9")], "lm2 on", 4000, "exact")


def test_a_choice_keeps_its_order_and_without_one_all_are_taken_once():
    assert pictures.choose("--columns", ["b", "a", "b"], ["a", "b", "c"]) == ["b", "a"]
    assert pictures.choose("--columns", None, ["a", "b", "a"]) == ["a", "b"]


def test_a_choice_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="--tasks 'qa3' is not in the file: choose from 'qa1', 'qa2'$"):
        pictures.choose("--tasks", ["qa1", "qa3"], ["qa1", "qa2", "qa1"])


@pytest.mark.parametrize("change", [dict(exact=201), dict(official=-1), dict(n=0), dict(length=-1),
                                    dict(n="200"), dict(task=None), dict(floor=None), dict(length=0)])
def test_a_broken_cell_is_refused_by_its_number(tmp_path, change):
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(dict(cells=CELLS[:1] + [CELLS[1] | change])), encoding="utf-8")
    with pytest.raises(ValueError, match="holds no figures, cell 2 is broken or there twice: write it with"):
        pictures.load_figures(str(path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": 3}', '{"cells": []}', "\xff"])
def test_a_file_that_holds_no_cells_is_refused(tmp_path, text):
    path = tmp_path / "figures.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="figures.json holds no figures"):
        pictures.load_figures(str(path))


# ---- the memory: computation ----

def test_before_reads_the_bank_at_m0_and_after_the_bank_that_the_document_has_written(
    model, recorded
):
    ids, notes = recorded
    before, after = heatmaps.reads(model, ids, "mean")
    start = ids.shape[1] // S * S
    n_last = ids.shape[1] - start
    assert 0 < n_last < S
    with torch.no_grad(), heatmaps.recording(model) as alone:
        model(ids[:, start:])
    assert [note["layer"] for note in notes] == list(range(L))
    for i in range(L):
        assert before[i].shape == (n_last, N)
        torch.testing.assert_close(before[i], alone[i]["A"][0, 0].mean(0))
        of_last_segment = notes[i]["A"][0, -1, :, :n_last]  # it is filled up behind
        torch.testing.assert_close(after[i], of_last_segment.mean(0))
    assert (before - after).abs().max() > 0.05


def test_a_full_last_segment_is_read_from_the_bank_before_it_and_not_written(model, doc, recorded):
    ids, notes = recorded
    full = ids[:, : 3 * S]
    before, after = heatmaps.reads(model, full, "1")
    assert before.shape == after.shape == (L, S, N)
    for i in range(L):
        torch.testing.assert_close(after[i], notes[i]["A"][0, 2, 1])  # segment 3, head 1
    assert len(heatmaps.writes(model, full, doc.cuts, "1")) == 2


@pytest.mark.parametrize("head", ["mean", "1"])
def test_writes_are_r_summed_over_the_tokens_of_each_sentence(model, doc, recorded, head):
    ids, notes = recorded
    segments = heatmaps.writes(model, ids, doc.cuts, head)
    assert len(segments) == (ids.shape[1] - 1) // S
    for g, (starts, share) in enumerate(segments):
        assert starts == [g * S] + [c for c in doc.cuts if g * S < c < (g + 1) * S]
        for i in range(L):
            R = notes[i]["R"][g][0]                                  # (HM, N, S+1)
            R = R.mean(0) if head == "mean" else R[1]
            for j, (a, b) in enumerate(zip(starts, starts[1:] + [(g + 1) * S])):
                want = sum(R[:, t - g * S] for t in range(a, b))
                torch.testing.assert_close(share[i, :, j], want)
            torch.testing.assert_close(share[i, :, -1], R[:, S])


def test_what_a_slot_takes_and_declines_sums_to_one(model, doc, recorded):
    for _, share in heatmaps.writes(model, recorded[0], doc.cuts, "mean"):
        torch.testing.assert_close(share.sum(-1), torch.ones(L, N))
        assert 0 < share[..., -1].min() and share[..., -1].max() < 1


def test_rows_follow_the_document_and_know_facts_from_prose(model, tok, doc):
    found = heatmaps.rows(model, tok, doc, "mean")
    n = len(doc.prompt()) // S
    whole = doc.ids[:n * S]
    assert "".join(r.text for r in found if r.kind != "declined") == tok.decode(whole)
    assert "".join(r.text for r in found if r.kind == "fact").strip() == FACTS[0]
    assert "".join(r.text for r in found if r.kind == "needed").strip() == FACTS[1]
    assert [r.text for r in found if r.kind == "declined"] == [f"segment {g + 1}: declined" for g in range(n)]


def test_segments_that_do_not_fit_show_what_was_declined_of_them_together(model, tok, doc):
    segments = heatmaps.writes(model, torch.from_numpy(doc.prompt())[None], doc.cuts, "mean")
    g = (doc.facts[1][1] - 1) // S                                   # the last segment that holds a fact
    found = heatmaps.rows(model, tok, doc, "mean", most=1)
    assert (g, len(segments)) == (4, 6)
    assert [r.text for r in found if r.kind == "declined"] == [
        "segments 1 to 4, not shown: declined", "segment 5: declined", "segment 6, not shown: declined"]
    torch.testing.assert_close(found[0].share, torch.stack([x[..., -1] for _, x in segments[:4]]).mean(0))
    torch.testing.assert_close(found[-1].share, segments[5][1][..., -1])
    assert len(found) == 1 + segments[4][1].shape[-1] + 1


@pytest.mark.parametrize("most,want", [(1, {3}), (6, {1, 3}), (8, {1, 3}), (9, {1, 3, 4}),
                                       (15, {0, 1, 2, 3, 4})])
def test_room_goes_to_facts_first_then_to_the_latest_segments(most, want):
    assert heatmaps.shown([3, 3, 3, 3, 3], [False, True, False, True, False], most) == want


def test_no_earlier_segment_is_shown_where_a_later_one_had_no_room():
    assert heatmaps.shown([1, 5, 3], [False] * 3, 4) == {2}


@torch.no_grad()
def answer_of(model, tok, ids, memory):
    """The greedy answer to ids, with everything read again for every token."""
    new_ids = []
    while len(new_ids) < 12:
        seen = ids + new_ids
        if not memory:  # a token is predicted from its own segment alone
            while len(seen) > S:
                seen = seen[S:]
        logits, _, _ = model(torch.tensor([seen]))
        new = logits[0, -1].argmax().item()
        if new == tok.eot:
            break
        new_ids.append(new)
    return tok.decode(new_ids).strip()


def test_the_answers_are_those_with_and_without_what_was_written(model, tok, doc):
    ids = doc.prompt().tolist()
    on = heatmaps.said(model, tok, doc, memory=True)
    off = heatmaps.said(model, tok, doc, memory=False)
    assert on == answer_of(model, tok, ids, memory=True)
    assert off == answer_of(model, tok, ids, memory=False)
    assert on != off


def test_an_answer_ends_at_the_end_of_text(model, tok, doc, monkeypatch):
    says = [*tok.encode(" garden"), tok.eot, *tok.encode(" office")]
    tokens = iter(says)

    def forward(idx, state, at):
        logits = torch.zeros(1, tok.n_vocab)
        logits[0, next(tokens)] = 1.0
        return logits, None, state

    monkeypatch.setattr(model, "forward", forward)
    assert heatmaps.said(model, tok, doc, memory=False) == "garden"


def test_a_label_is_one_short_line_without_mathematics():
    assert heatmaps.plain(" a\n b  $x$ ") == r"a b \$x\$"
    assert heatmaps.plain("\n") == "\u2423"
    assert heatmaps.plain("word " * 20, 12) == "word word w\u2026" and heatmaps.plain("abc", 3) == "abc"


@pytest.mark.parametrize("head", ["2", "-1", "all", "1.0", ""])
def test_a_head_that_is_none_is_refused(model, recorded, head):
    with pytest.raises(ValueError, match="give mean or a number from 0 to 1"):
        heatmaps.reads(model, recorded[0], head)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_block_without_memory_is_refused(model, doc, layer):
    with pytest.raises(ValueError, match=f"--layer {layer} has no memory: give a number from 0 to 1"):
        heatmaps.prepare(model, doc, layer)


def test_a_model_without_memory_is_refused(tok, doc):
    bare = LM2(LM2Config(vocab_size=tok.n_vocab, n_layer=1, n_embd=16, n_head=2, n_kv_head=2, ffn_dim=32,
                         n_mem_layer=0))
    with pytest.raises(ValueError, match="the model has no memory"):
        heatmaps.prepare(bare, doc, None)


def test_a_document_of_one_segment_is_refused_as_nothing_was_written(model, tok):
    for n, fits in ((S, False), (S + 1, True)):
        short = join([[5] * (n - 4)], [], [], [Question("Where is John?", "", ())],
                     lambda text: tok.encode(" " + text), tok.eot)
        assert len(short.prompt()) == n
        if fits:
            assert heatmaps.prepare(model, short, None).shape == (1, n)
        else:
            with pytest.raises(ValueError, match=f"the document has {n} tokens, .* nothing was written"):
                heatmaps.prepare(model, short, None)


def test_the_last_sentence_of_a_text_is_its_question(tok):
    class Flags:
        text = "Mary went to the kitchen.\nIt rained.  Where is Mary?"
    doc = pictures.document(tok, Flags)
    assert tok.decode(doc.prompt()) == " Mary went to the kitchen. It rained. Where is Mary?"
    assert doc.questions[0].text == "Where is Mary?" and len(doc.cuts) == 3


def test_without_a_text_the_document_is_the_sample_of_task_length_and_seed(tok, books):
    class Flags:
        text, background, task, length, seed = None, str(books), "qa1", "200", 7
    doc, builder = pictures.document(tok, Flags), Builder(tok, "val", str(books))
    assert doc.context_len == 200
    for seed, same in ((7, True), (8, False)):
        assert (doc.texts == builder.sample("qa1", 200, random.Random(seed)).texts) == same


# ---- drawn ----

def test_lines_and_bars_of_the_accuracy_are_the_cells_shares_and_intervals():
    fig = new_figure()
    pictures.draw_accuracy(fig, CELLS, list(HITS), ["qa1"], "exact")
    first, second, floor = fig.axes[0].containers
    for container, hits in ((first, HITS["lm2 on"]), (second, HITS["lm2 off"])):
        assert container.lines[0].get_ydata() == pytest.approx([h / 2 for h in hits])
        bars = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
        np.testing.assert_allclose(bars, [[100 * x for x in wilson(h, 200)] for h in hits], atol=1e-9)
    assert floor.lines[0].get_ydata() == pytest.approx([20, 20, 20])
    legend = [t.get_text() for t in fig.legends[0].get_texts()]
    assert legend == ["lm2", "lm2, memory off", "best constant answer"]


def test_seeds_are_one_line_of_the_middle_one_and_a_dot_each():
    cells = [c | dict(model=f"rmt-{seed}") for seed, shift in ((0, 0), (1, -20), (2, -4))
             for c in (c | dict(exact=c["exact"] + shift) for c in CELLS if c["memory"] == "on")]
    fig = new_figure()
    pictures.draw_accuracy(fig, cells + CELLS, ["rmt on", "lm2 on"], ["qa1"], "exact")
    for container, shift in zip(fig.axes[0].containers, (-4, 0)):
        assert container.lines[0].get_ydata() == pytest.approx([(h + shift) / 2 for h in HITS["lm2 on"]])
    (dots,) = [line for line in fig.axes[0].lines if line.get_markersize() == 3]
    assert sorted(dots.get_ydata()) == pytest.approx(
        sorted((h + shift) / 2 for h in HITS["lm2 on"] for shift in (0, -20, -4)))


def test_the_official_metric_has_its_own_counts_and_floor():
    fig = new_figure()
    pictures.draw_accuracy(fig, CELLS, ["lm2 off"], ["qa1"], "official")
    line, floor = (c.lines[0].get_ydata() for c in fig.axes[0].containers)
    assert line == pytest.approx([47.5, 15, 0]) and floor == pytest.approx([25, 25, 25])
    assert "the benchmark's own metric" in fig.get_suptitle()


def test_the_axis_has_a_tick_a_length_with_0k_one_doubling_before_the_next():
    fig = new_figure()
    pictures.draw_accuracy(fig, CELLS, list(HITS), ["qa1"], "exact")
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0k", "4k", "16k"]
    assert np.diff(ax.get_xticks()) == pytest.approx([1, 2])
    assert ax.get_xlabel() == "tokens of facts + background" and "%" in ax.get_ylabel()


def test_a_column_has_no_point_where_it_was_not_asked():
    fig = new_figure()
    cells = CELLS[:3] + [cell("llama rag", "qa1", 4000, 100)]
    pictures.draw_accuracy(fig, cells, ["lm2 on", "llama rag"], ["qa1"], "exact")
    assert [len(c.lines[0].get_xdata()) for c in fig.axes[0].containers] == [3, 1, 3]


def test_several_tasks_are_drawn_as_their_mean_and_an_incomplete_one_is_refused():
    fig = new_figure()
    pictures.draw_accuracy(fig, TEN, ["lm2 on"], TASKS, "exact")
    assert fig.axes[0].containers[0].lines[0].get_ydata() == pytest.approx([100 * 55 / 110])
    with pytest.raises(ValueError, match="'llama rag' has no qa7 at 4k"):
        pictures.draw_accuracy(new_figure(), [c for c in TEN if (c["model"], c["task"]) != ("llama", "qa7")],
                               ["llama rag"], TASKS, "exact")
    with pytest.raises(ValueError, match="'lm2 off' has no qa2: choose"):
        pictures.draw_accuracy(new_figure(), CELLS + TEN, ["lm2 off"], ["qa2"], "exact")


def test_the_polygons_of_the_radar_are_the_means_of_the_groups():
    fig = new_figure()
    pictures.draw_radar(fig, TEN, ["lm2 on", "llama rag"], 4000, "exact")
    lines = fig.axes[0].lines
    for line, less in zip(lines, (10, 0)):
        want = [100 * (x + less) / 110 for x in (0, 15, 35, 60, 85)]
        assert line.get_ydata() == pytest.approx(want + want[:1])
        assert line.get_xdata() == pytest.approx([2 * math.pi * i / 5 for i in range(6)])
    assert lines[2].get_ydata() == pytest.approx([20] * 6)
    assert fig.axes[0].get_ylim() == (0, 100)


def test_no_two_columns_share_a_marker_or_a_colour():
    for key in ("marker", "color"):
        assert len({style[key] for style in pictures.STYLES}) == len(pictures.STYLES)


def test_the_read_picture_shows_the_block_and_head_asked_for_on_one_scale(model, tok, doc):
    fig = new_figure()
    heatmaps.draw_read(fig, model, tok, doc, 1, "0")
    ids = torch.from_numpy(doc.prompt())[None]
    images = [ax.images[0] for ax in fig.axes[:2]]
    for image, A in zip(images, heatmaps.reads(model, ids, "0")):
        np.testing.assert_allclose(image.get_array(), A[1])
    assert images[0].get_clim() == images[1].get_clim()
    texts = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert texts == [heatmaps.plain(tok.decode([i])) for i in ids[0, -len(texts):].tolist()]
    assert "block 1, head 0" in fig.get_suptitle() and "Where is John? Right: garden." in fig.get_suptitle()
    for ax, memory in zip(fig.axes[:2], (False, True), strict=True):
        reply = heatmaps.said(model, tok, doc, memory)
        assert f"answer: {heatmaps.plain(reply)}" in ax.get_title()


def test_of_a_long_segment_the_last_tokens_are_shown_those_of_the_question_bold(monkeypatch, model, tok, doc):
    monkeypatch.setattr(heatmaps, "TOKENS", 6)
    fig, ids = new_figure(), torch.from_numpy(doc.prompt())[None]
    heatmaps.draw_read(fig, model, tok, doc, 0, "mean")
    after = heatmaps.reads(model, ids, "mean")[1][0]
    assert len(after) > 6
    np.testing.assert_allclose(fig.axes[1].images[0].get_array(), after[-6:])
    bold = [t.get_text() for t in fig.axes[0].get_yticklabels() if t.get_fontweight() == "bold"]
    assert bold == ["Where", "is", "John", "?"]


def test_the_read_picture_takes_the_block_whose_last_token_reads_one_slot_most(model, tok, doc, recorded):
    fig = new_figure()
    heatmaps.draw_read(fig, model, tok, doc, None, "mean")
    most = [A[-1].max() for A in heatmaps.reads(model, recorded[0], "mean")[1]]
    assert f"block {most.index(max(most))}," in fig.get_suptitle()


def test_the_write_picture_shows_every_row_of_every_block_and_facts_in_bold(model, tok, doc):
    fig = new_figure()
    heatmaps.draw_write(fig, model, tok, doc, None, "mean")
    found = heatmaps.rows(model, tok, doc, "mean")
    for i in range(L):
        shown = np.ma.filled(fig.axes[i].images[0].get_array(), np.nan)
        for row, values in zip(found, shown, strict=True):
            want = np.full(N, np.nan) if row.kind == "declined" else row.share[i]
            np.testing.assert_allclose(values, want)
        declined = [f"{100 * r.share[i].mean():.0f} %" for r in found if r.kind == "declined"]
        assert [t.get_text() for t in fig.axes[i].texts] == declined
    for row, text in zip(found, fig.axes[0].get_yticklabels(), strict=True):
        assert (text.get_fontweight() == "bold") == (row.kind in ("fact", "needed"))
        assert text.get_text().startswith("\u25ba") == (row.kind == "needed")


def test_the_write_picture_shows_one_block_if_one_is_asked_for(model, tok, doc):
    fig = new_figure()
    heatmaps.draw_write(fig, model, tok, doc, 1, "mean")
    assert [ax.get_title() for ax in fig.axes] == ["block 1", ""]    # the second is the colour bar


# ---- the command ----

@pytest.mark.parametrize("picture,kind", [("accuracy", b"\x89PNG"), ("radar", b"%PDF")])
def test_the_command_draws_figures_and_needs_no_pyplot(tmp_path, picture, kind):
    pytest.importorskip("matplotlib")
    (tmp_path / "f.json").write_text(json.dumps(dict(cells=TEN)), encoding="utf-8")
    out = tmp_path / ("out.png" if kind == b"\x89PNG" else "out.pdf")
    pictures.main([picture, str(tmp_path / "f.json"), "--out", str(out), "--columns", "lm2 on"])
    assert out.read_bytes().startswith(kind) and "matplotlib.pyplot" not in sys.modules
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["f.json", out.name])


@pytest.mark.parametrize("picture", ["read", "write"])
def test_the_command_draws_the_memory_on_a_text(monkeypatch, recwarn, tmp_path, ckpt, picture):
    pytest.importorskip("matplotlib")
    out, drawn, save = tmp_path / "out.svg", [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda fig, path: drawn.append(fig) or save(fig, path))
    text = " ".join(PROSE + ["Where is $5 \u4e2d?"])                # neither mathematics nor in the font
    pictures.main([picture, "--ckpt", str(ckpt), "--out", str(out), "--text", text])
    assert "<svg" in out.read_text(encoding="utf-8")
    assert drawn[0].get_suptitle().startswith(f"{picture.title()}, ")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_without_matplotlib_one_line_names_it_and_how_to_install_it(monkeypatch, capsys, written):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for argv in (["accuracy", written[0]], ["radar", written[0]], ["read"], ["write"]):
        err = refused(capsys, *argv, "--out", written[1])
        assert 'matplotlib is missing: pip install -e ".[pictures]"' in err
    assert written[1].read_bytes() == b"old"


@pytest.mark.parametrize("argv,said", [
    (["accuracy", "none.json"], "No such file or directory: none.json"),
    (["accuracy", "FILE", "--columns", "rmt on"], "'rmt on' is not in the file: choose from 'lm2 on', "),
    (["accuracy", "FILE", "--tasks", "qa2"], "--tasks 'qa2' is not in the file: choose from 'qa1'"),
    (["radar", "FILE", "--length", "8k"], "--length '8k' is not in the file: choose from '0k', '4k', '16k'"),
    (["radar", "FILE", "--length", "x"], "length 'x' is none"),
    (["radar", "FILE"], "'lm2 on' has no qa2 qa3 qa4 qa5 qa6 qa7 qa8 qa9 qa10 at 4k"),
    (["accuracy", "FILE", "--metric", "f1"], "invalid choice: 'f1'"),
    (["read", "--ckpt", "none.pt"], "there is no checkpoint none.pt"),
    (["read", "--ckpt", "CKPT", "--text", "Where is Mary?"], "nothing was written"),
    (["write", "--ckpt", "CKPT", "--text", "TEXT", "--layer", "2"], "--layer 2 has no memory"),
    (["write", "--ckpt", "CKPT", "--text", "TEXT", "--head", "7"], "--head '7' is not there"),
    (["write", "--ckpt", "CKPT", "--task", "qa77", "--background", "BOOKS"], "task 'qa77' is unknown"),
])
def test_a_mistake_ends_in_one_line_and_the_old_picture_survives(capsys, written, ckpt, books, argv, said):
    pytest.importorskip("matplotlib")
    known = {"FILE": written[0], "CKPT": ckpt, "TEXT": " ".join(PROSE), "BOOKS": books}
    err = refused(capsys, *[known.get(x, x) for x in argv], "--out", written[1])
    assert said in err
    assert written[1].read_bytes() == b"old" and not list(written[1].parent.glob("*.tmp"))


@pytest.mark.parametrize("name", ["out.jpg", "out", "none/out.png", "."])
def test_a_name_that_no_picture_can_have_is_refused_before_any_work(capsys, tmp_path, name):
    pytest.importorskip("matplotlib")
    assert "--out" in refused(capsys, "read", "--ckpt", "none.pt", "--out", tmp_path / name)


def test_more_columns_than_can_be_told_apart_are_refused(capsys, written):
    pytest.importorskip("matplotlib")
    cells = [cell(f"m{i} on", "qa1", 0, 1) for i in range(8)]
    written[0].write_text(json.dumps(dict(cells=cells)), encoding="utf-8")
    assert "8 columns are too many" in refused(capsys, "accuracy", written[0], "--out", written[1])


def test_a_picture_that_fails_while_it_is_written_leaves_the_old_one(monkeypatch, capsys, written):
    figure = pytest.importorskip("matplotlib.figure").Figure

    def full(self, path, **known):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(figure, "savefig", full)
    assert "No space left" in refused(capsys, "accuracy", written[0], "--out", written[1])
    assert written[1].read_bytes() == b"old"
    assert [p.name for p in written[1].parent.glob("out*")] == ["out.png"]
