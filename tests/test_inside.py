"""What assets/inside.py measures is what the slots took from a fact and gave to a question.

python -m pytest tests/test_inside.py -q
"""

import json
from argparse import Namespace

import pytest
import torch

import inside
import pictures
from babilong_eval import wilson
from data.babi import Question
from data.document import join
from data.tokenizer import load
from heatmaps import recording
from inside import NEEDED, OTHER, PROSE
from lm2 import LM2, LM2Config, Memory, save_checkpoint
from test_assets import FACTS
from test_assets import PROSE as SENTENCES
from test_train import refused

S, N, D, HM = 16, 4, 16, 2  # tokens a segment, slots, width, memory heads
BLOCKS = (0, 2)  # those of three that have a memory


@pytest.fixture(scope="module")
def tok():
    return load()


@pytest.fixture
def model(tok):
    """A random model whose reads depend on what is in the banks."""
    torch.manual_seed(0)
    sizes = dict(n_layer=3, n_embd=D, n_head=2, ffn_dim=32, segment_len=S, n_slot=N, n_mem_head=HM)
    model = LM2(LM2Config(vocab_size=tok.n_vocab, mem_blocks=BLOCKS, **sizes))
    with torch.no_grad():
        for i in BLOCKS:
            model.layers[i].memory.wv.weight.mul_(6)
            model.layers[i].memory.wq.weight.mul_(3)
    return model.eval()


@pytest.fixture
def even(model):
    """The same model with slots that take evenly from all tokens and that are read evenly."""
    with torch.no_grad():
        for i in BLOCKS:
            memory = model.layers[i].memory
            memory.wk.weight.zero_()  # every score is 0
            memory.null.zero_()  # so R is 1 / (S + 1) everywhere
            memory.w_forget.weight.zero_()  # a slot keeps the same share in each segment
    return model


def document(tok, question="Where is John?", support=(1,), prose=SENTENCES, facts=tuple(FACTS)):
    """Facts in prose, in several segments."""
    first, *others = facts
    sentences = [*prose[:2], first, *prose[2:4], *others, *prose[4:], "That was all."]
    tokens = [tok.encode(" " + sentence) for sentence in sentences]
    questions = [Question(question, "garden", support)]
    places = [sentences.index(fact) for fact in facts]
    return join(tokens, places, facts, questions, lambda text: tok.encode(" " + text), tok.eot)


def asked(tok, text):
    return torch.tensor(tok.encode(" " + text)).numpy()


# ---- the parts of a bank, by hand ----


def test_a_write_adds_to_the_part_of_each_kind_and_all_parts_forget_alike():
    memory = Memory(LM2Config(n_layer=1, n_embd=2, n_head=1, n_slot=2, n_mem_head=1))
    R = torch.tensor([[1.0, 0, 0, 0], [0, 0.25, 0.25, 0.5]])  # 2 slots, 3 tokens and the null
    candidates = torch.tensor([[0.5, 0.0], [0.0, 0.4], [0.2, 0.2]])
    g_forget = torch.tensor([[0.3, 0.6], [0.5, 1.0]])
    note = dict(R=[R[None, None]], candidates=candidates[None, None], g_forget=[g_forget[None]])
    parts = torch.zeros(4, 2, 2)
    parts[-1] = torch.eye(2)
    kinds = torch.tensor([NEEDED, OTHER, PROSE])
    parts = inside.parts_after(memory, parts, note, kinds)
    torch.testing.assert_close(parts[NEEDED], torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(parts[OTHER], torch.tensor([[0.0, 0.0], [0.0, 0.1]]))
    torch.testing.assert_close(parts[PROSE], torch.tensor([[0.0, 0.0], [0.05, 0.05]]))
    # w is 1 and 0.5, so slot 0 keeps g_forget, and slot 1 keeps 1 - 0.5 (1 - g_forget).
    torch.testing.assert_close(parts[-1], torch.tensor([[0.3, 0.0], [0.0, 1.0]]))
    parts = inside.parts_after(memory, parts, note, kinds)
    torch.testing.assert_close(parts[NEEDED], torch.tensor([[0.5 + 0.3 * 0.5, 0.0], [0.0, 0.0]]))


def test_what_is_read_comes_from_the_slots_that_are_attended_to():
    memory = Memory(LM2Config(n_layer=1, n_embd=2, n_head=1, n_slot=2, n_mem_head=1))
    with torch.no_grad():
        memory.wv.weight.copy_(torch.eye(2))
    parts = torch.zeros(4, 2, 2)
    parts[NEEDED, 0] = torch.tensor([3.0, 0.0])
    parts[PROSE, 0] = torch.tensor([1.0, 0.0])
    parts[OTHER, 1] = torch.tensor([0.0, 2.0])
    for A, shares in (
        ([1.0, 0.0], [0.75, 0, 0.25, 0]),
        ([0.0, 1.0], [0, 1, 0, 0]),
        ([0.5, 0.5], [0.375, 0.5, 0.125, 0]),  # normed, both slots are of the same size
    ):
        A = torch.tensor([[A]])  # (HM, n, N)
        read = inside.read_by_part(memory, parts, A, torch.ones(1, 2))
        assert inside.shares_of(read) == pytest.approx(shares, abs=1e-4)
    # A gate that closes the channel of slot 1 leaves what slot 0 gives.
    read = inside.read_by_part(memory, parts, A, torch.tensor([[1.0, 0.0]]))
    assert inside.shares_of(read) == pytest.approx([0.75, 0, 0.25, 0], abs=1e-4)


# ---- a document ----


def reading_of(model, doc, erased_kind=-1):
    """The document in row 0, and in row 1 without the tokens of a kind (-1: of none)."""
    kinds = inside.kinds_of_tokens(doc, S)
    rows = torch.stack((torch.zeros_like(kinds, dtype=torch.bool), kinds == erased_kind))
    return kinds, inside.read_in_parts(model, doc, kinds, dict.fromkeys(BLOCKS, rows), 2)


@torch.no_grad()
def test_the_parts_add_up_to_the_bank_and_what_is_read_from_them_to_the_whole_read(model, tok):
    doc = document(tok)
    _, seen = reading_of(model, doc)
    ids = torch.from_numpy(doc.prompt())[None]
    given = {}  # what each memory adds to the stream
    for i in BLOCKS:
        keep = lambda module, args, result, i=i: given.update({i: result[0][0, -1]})  # noqa: E731
        model.layers[i].memory.register_forward_hook(keep)
    _, _, state = model(ids)
    n_last = state.open_ids.shape[1]
    for i in BLOCKS:
        parts = seen.parts[i]
        assert all(part.abs().max() > 0.01 for part in parts)
        torch.testing.assert_close(parts.sum(0), state.carried[i][0])
        A, g_out = inside.reads_of_tokens(seen.notes[i], 0, n_last)
        read = inside.read_by_part(model.layers[i].memory, parts, A, g_out)
        torch.testing.assert_close(read.sum(0), given[i][:n_last])
        assert sum(inside.shares_of(read)) == pytest.approx(1)


@torch.no_grad()
def test_without_a_fact_the_bank_is_what_the_other_parts_add_up_to(even, tok):
    doc = document(tok)
    kinds, seen = reading_of(even, doc, NEEDED)
    assert (kinds == NEEDED).sum() == len(tok.encode(" " + FACTS[1]))
    with inside.erasing(even, {0: (kinds == NEEDED)[None]}):
        _, _, state = even(torch.from_numpy(doc.prompt())[None])
    parts = seen.parts[0]  # R and g_forget of an even memory do not depend on what is offered
    torch.testing.assert_close(state.carried[0][0], parts.sum(0) - parts[NEEDED])
    assert parts[NEEDED].abs().max() > 0.01
    _, _, state = even(torch.from_numpy(doc.prompt())[None])  # nothing is erased any more
    torch.testing.assert_close(state.carried[0][0], parts.sum(0))


def test_an_even_memory_shows_no_preference_at_all(even, tok):
    doc = document(tok)
    _, figures = inside.measure(even, doc, asked(tok, "Where is Mary?"))
    assert list(figures) == list(BLOCKS)
    for of_block in figures.values():
        for key in inside.WEIGHTS:
            assert of_block[key] == pytest.approx(1)
        n_tokens = len(tok.encode(" " + FACTS[1]))
        assert of_block["write_share"] == pytest.approx(100 * n_tokens / (S + 1))
        assert of_block["read_needed"] == pytest.approx(of_block["read_evenly"], rel=1e-3)


def test_a_random_memory_shows_next_to_no_preference_for_the_needed_fact(model, tok):
    """Means over many random models, as one model may like some word by chance."""
    figures = []
    for seed in range(20):
        torch.manual_seed(seed)
        fresh = LM2(model.cfg).eval()
        _, of_blocks = inside.measure(fresh, document(tok), asked(tok, "Where is Mary?"))
        figures.append(of_blocks[0])
    means = inside.summary(figures)
    assert means["write_needed"][0] == pytest.approx(1, abs=0.1)
    assert means["read_needed"][0] == pytest.approx(means["read_evenly"][0], abs=1)
    assert means["read_needed"][0] == pytest.approx(means["read_other_question"][0], abs=1)


def test_the_shares_beside_the_needed_ones_are_those_of_the_other_question_and_fact(model, tok):
    john, mary = asked(tok, "Where is John?"), asked(tok, "Where is Mary?")
    _, figures = inside.measure(model, document(tok), mary)
    _, of_mary = inside.measure(model, document(tok, "Where is Mary?"), john)
    _, first_needed = inside.measure(model, document(tok, support=(0,)), mary)
    for i in BLOCKS:
        for ours, key, theirs in (
            (figures, "read_other_question", of_mary),
            (figures, "read_other_facts", first_needed),
        ):
            assert ours[i][key] == pytest.approx(theirs[i]["read_needed"], rel=1e-4)
            assert ours[i][key] != pytest.approx(ours[i]["read_needed"], rel=1e-2)
        assert figures[i]["write_other"] == pytest.approx(first_needed[i]["write_needed"])


def test_other_facts_stand_for_as_many_as_are_needed(model, tok):
    """Of three facts one or two are needed. A fact that stands twice is needed once."""
    facts = [*FACTS, "Mary went back to the office."]
    one_needed, two_needed = [
        inside.measure(model, document(tok, support=support, facts=facts), asked(tok, "Is Mary?"))
        for support in ((0,), (1, 2, 1))
    ]
    for i in BLOCKS:
        share_of_two = one_needed[1][i]["read_other_facts"] * 2
        assert share_of_two == pytest.approx(two_needed[1][i]["read_needed"], rel=1e-4)
        share_of_one = two_needed[1][i]["read_other_facts"] / 2
        assert share_of_one == pytest.approx(one_needed[1][i]["read_needed"], rel=1e-4)


@torch.no_grad()
def test_the_last_token_reads_from_what_is_needed(model, tok):
    doc = document(tok)
    _, figures = inside.measure(model, doc, asked(tok, "Where is Mary?"))
    _, seen = reading_of(model, doc)
    last = (len(doc.prompt()) - 1) % S
    for i in BLOCKS:
        A, g_out = inside.reads_of_tokens(seen.notes[i], last, 1)
        read = inside.read_by_part(model.layers[i].memory, seen.parts[i], A, g_out)
        share = 100 * inside.shares_of(read)[NEEDED]
        assert figures[i]["read_last_token"] == pytest.approx(share, rel=1e-4)
        assert figures[i]["read_last_token"] != pytest.approx(figures[i]["read_needed"], rel=1e-2)


def test_each_block_is_told_of_the_row_in_which_its_facts_are_erased(monkeypatch, model, tok):
    seen = []
    read_in_parts = inside.read_in_parts

    def answers_known(model, doc, kinds, erased, n_rows):
        for row in range(n_rows):
            in_row = {}
            for i, mask in erased.items():
                in_row[i] = [PROSE, *kinds[mask[row]].unique().tolist()][-1]
            seen.append([in_row[i] for i in BLOCKS])
        reading = read_in_parts(model, doc, kinds, erased, n_rows)
        wrong, right = 0, int(doc.ids[doc.answers[0][0]])
        return reading._replace(answers=[wrong, right, wrong, right, wrong])

    monkeypatch.setattr(inside, "read_in_parts", answers_known)
    of_document, figures = inside.measure(model, document(tok), asked(tok, "Where is Mary?"))
    nothing, first, second, needed, others = seen
    assert nothing == [PROSE, PROSE] and of_document["right"] == 0
    assert first == [NEEDED, PROSE] and figures[0]["right_without_needed"] == 1
    assert second == [PROSE, NEEDED] and figures[2]["right_without_needed"] == 0
    assert needed == [NEEDED, NEEDED] and of_document["right_without_needed"] == 1
    assert others == [OTHER, OTHER] and of_document["right_without_others"] == 0


@torch.no_grad()
def test_the_answer_is_the_likeliest_token_behind_the_question(model, tok):
    torch.manual_seed(0)
    model = LM2(model.cfg).eval()
    model.output.weight.copy_(model.tok_embeddings.weight)  # the last token is the likeliest
    doc = document(tok)
    ids = {"same": asked(tok, "Where is John?"), "other": asked(tok, "Where is Mary now")}
    answers = {}
    for name, question in ids.items():
        prompt = torch.tensor([*doc.ids[: doc.context_len], *question])
        logits, _, _ = model(prompt[None])
        answers[name] = int(logits[0, -1].argmax())
    assert answers["same"] != answers["other"]
    _, seen = reading_of(model, doc)
    assert seen.answers == [answers["same"]] * 2
    for name, question in ids.items():
        of_document, _ = inside.measure(model, doc, question)
        assert of_document["changed_by_question"] == (name == "other")


@torch.no_grad()
def test_the_model_is_as_before_when_facts_were_erased(model, tok):
    ids = torch.from_numpy(document(tok).prompt())[None]
    before, _, _ = model(ids)
    inside.measure(model, document(tok), asked(tok, "Where is Mary?"))
    with recording(model) as notes:
        after, _, _ = model(ids)
    assert torch.equal(before, after)
    assert "candidates" not in notes[0]


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (dict(), True),
        (dict(support=(0, 1)), False),  # no other fact
        (dict(support=()), False),
        (dict(prose=SENTENCES[:4]), False),  # the needed fact ends in the last segment
        (dict(prose=SENTENCES[:4], support=(0,)), False),  # the other one does
        (dict(question="Where is John? " * 5), False),  # the question begins before it
    ],
)
def test_a_sample_counts_if_its_facts_are_written_and_its_question_is_not(tok, change, counts):
    assert inside.is_measured(document(tok, **change), S) == counts


def test_a_fact_that_is_not_all_written_is_no_other_fact(tok):
    doc = document(tok, prose=SENTENCES[:4], support=(0,))
    kinds = inside.kinds_of_tokens(doc, S)
    assert NEEDED in kinds and OTHER not in kinds


# ---- many documents ----


class Asker:
    """Samples of one question each, all of them with the same facts."""

    def __init__(self, tok, questions):
        self.documents = [document(tok, text) for text in questions]

    def __call__(self, task, length, number):
        return self.documents[min(number, len(self.documents) - 1)]


def test_the_other_question_differs_is_about_the_facts_and_ends_in_the_same_segment(tok):
    builder = Namespace(ids=lambda text: asked(tok, text))
    long = "Where is Mary? " * 10
    for questions, chosen in (
        (["Where is John?", "Where is John?", "Where is Mary?"], "Where is Mary?"),
        (["Where is John?", "Where is Sandra?", "Where is Mary?"], "Where is Mary?"),
        (["Where is John?", long, "Where is Mary?"], "Where is Mary?"),
        (["Where is John?", "Where is Sandra?"], None),
    ):
        samples = Asker(tok, questions)
        ids = inside.another_question(samples("qa1", 0, 0), samples, "qa1", 0, builder, S)
        assert (ids is None) if chosen is None else (ids.tolist() == asked(tok, chosen).tolist())


def test_a_summary_has_means_with_intervals_and_shares_of_right_answers():
    samples = [dict(x=1.0, right=True, y=None), dict(x=3.0, right=False, y=None)]
    means = inside.summary(samples)
    assert means["x"] == pytest.approx([2, 2 - 1.96, 2 + 1.96])  # the standard error is 1
    low, high = wilson(1, 2)
    assert means["right"] == pytest.approx([50, 100 * low, 100 * high])
    assert means["y"] is None
    assert inside.summary(samples[:1])["x"] == [1, 1, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prose in a folder."""
    path = tmp_path_factory.mktemp("prose")
    book = [f"The captain saw ship {i} near the village before the rain." for i in range(1500)]
    (path / "book.txt").write_text(" ".join(book), encoding="utf-8")
    return path


@pytest.fixture
def ckpt(model, tok, tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=tok.ranks)
    return str(path)


def test_the_command_prints_tables_of_80_columns_and_saves_what_the_picture_draws(
    capsys, tmp_path, ckpt, folder
):
    out = tmp_path / "inside.json"
    flags = ["--length", "600", "--n", "8", "--background", str(folder), "--out", str(out)]
    inside.main(["--ckpt", ckpt, "--tasks", "qa1", "qa2", *flags])
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.split("\n")) <= 80
    figures = json.loads(out.read_bytes())
    qa1, qa2 = figures["cells"]
    assert qa1["task"] == "qa1" and qa2["task"] == "qa2" and qa1["length"] == 600
    assert 0 < qa1["n"] <= qa1["n_asked"] == 8
    assert f"qa1 at 600: {qa1['n']} of 8 samples count" in printed
    assert [block["block"] for block in qa1["blocks"]] == list(BLOCKS)
    mean, low, high = qa1["blocks"][0]["read_needed"]
    assert low <= mean <= high
    _, _, first_block, *_ = printed.split("read: ")[1].split("\n")
    assert first_block.startswith("0 ")
    assert f" {mean:.1f} [{round(low)}, {round(high)}] " in first_block

    fig = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    pictures.draw_inside(fig, inside.load_inside(str(out)))
    write, read, answer, *of_qa2 = fig.axes
    assert len(of_qa2) == 3
    for ax, columns in ((write, inside.WEIGHTS), (read, inside.READ)):
        assert len(ax.containers) == len(columns)
        for container, key in zip(ax.containers, columns, strict=True):
            means = [block[key][0] for block in qa1["blocks"]]
            assert container.lines[0].get_ydata() == pytest.approx(means)
    assert [text.get_text() for text in read.get_xticklabels()] == ["0", "2"]
    means = [block["right_without_needed"][0] for block in qa1["blocks"]]
    assert answer.containers[0].lines[0].get_ydata() == pytest.approx(means)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--n", "0"], "--n 0 must be at least 1"),
        (["--tasks", "qa99"], "--tasks 'qa99' is unknown: choose from qa1"),
        (["--length", "4q"], "length '4q' is not valid"),
        (["--length", "0k"], "qa1 at 0k: in none of 2 samples are all needed facts and another"),
        (["--out", "none/inside.json"], "--out none/inside.json: make its folder first"),
        (["--out", "."], "--out . is a folder"),
        (["--ckpt", "none.pt"], "there is no checkpoint none.pt"),
        (["--ckpt", "BARE"], "the model has no memory"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, tmp_path, ckpt, folder, tok, argv, said):
    sizes = dict(n_layer=1, n_embd=16, n_head=2, ffn_dim=32, n_mem_layer=0, segment_len=1024)
    bare = LM2(LM2Config(vocab_size=tok.n_vocab, **sizes))
    save_checkpoint(tmp_path / "bare.pt", bare, tokenizer=tok.ranks)
    argv = [str(tmp_path / "bare.pt") if word == "BARE" else word for word in argv]
    defaults = ["--ckpt", ckpt, "--n", "2", "--background", folder]
    assert said in refused(capsys, inside.main, *defaults, *argv)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ckpt": "a", "cells": []}', '{"cells": [3]}'])
def test_a_file_of_another_kind_is_not_drawn(capsys, tmp_path, text):
    pytest.importorskip("matplotlib")
    path = tmp_path / "inside.json"
    path.write_text(text, encoding="utf-8")
    out = tmp_path / "out.png"
    err = refused(capsys, pictures.main, "inside", path, "--out", out)
    assert "inside.json holds no such figures: write it with assets/inside.py --out" in err
    assert not out.exists()
