"""The evaluation: scores, tables, how documents are answered, the file of answers, the flags.

    python -m pytest tests/test_eval.py -q

Scores are compared with cases made by hand from the benchmark's published rules, answers with those
of a model that reads everything again for every token.
"""

import io
import itertools
import json
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import babilong_eval
from babilong_eval import (
    LABELS,
    Predictions,
    ask,
    batches,
    check_questions,
    compare,
    evaluate,
    exact_match,
    floor,
    load,
    mcnemar,
    official_score,
    percent,
    pooled,
    report_cost,
    save,
    table,
    to_cells,
    wilson,
)
from data import babi
from data.babilong import Builder, generated
from data.common import fcntl
from data.document import from_text
from data.published import published_table
from data.tokenizer import Tokenizer
from data.tokenizer import load as load_tokenizer
from lm2 import LM2Config, build_model, save_checkpoint
from test_babilong import book
from test_train import refused

torch.set_num_threads(1)

S = 32  # tokens of a segment
TINY = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, n_slot=4, n_mem_head=2)


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


@pytest.fixture(scope="module")
def val_set(tok, folder):
    return Builder(tok, "val", folder)


def loud(tok, seed=0, **sizes):
    """Random weights that answer with few words, and now and then with the end of text."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=tok.n_vocab, segment_len=S) | TINY | sizes
    model = build_model(LM2Config(**sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for layer in model.layers:
            if layer.memory:
                layer.memory.wv.weight.mul_(6)  # the memory has a say
        model.tok_embeddings.weight.normal_()  # and each token, too
        model.output.weight[:] = 0
        model.output.weight[-60:] = 0.5 * torch.randn(60, 16, dtype=torch.float64)
        model.output.weight[-1] *= 2
    return model


@pytest.fixture(scope="module")
def model(tok):
    return loud(tok)


# Scores

WHERE = "Where is Mary? "
BEFORE = "Where was the apple before the kitchen? "
IS = "Is Mary in the office? "
HOW = "How many objects is Mary carrying? "
WHAT = "What is Mary carrying? "
PATH = "How do you go from the office to the kitchen? "


@pytest.mark.parametrize(
    "task, target, output, question, is_right",
    [
        ("qa1", "Kitchen", "Mary is in the KITCHEN. Not in the garden.", WHERE, True),
        ("qa1", "kitchen", "I think so. kitchen", WHERE, False),
        ("qa1", "kitchen", "", WHERE, False),
        ("qa1", "cellar", "cellar", WHERE, False),  # right, but no label
        ("qa1", "kitchen", "kitchen or bedroom", WHERE, False),
        ("qa1", "kitchen", "thekitchenette", WHERE, True),  # a substring is enough
        ("qa1", "kitchen", "kitchen <CONTEXT> bedroom", WHERE, True),
        ("qa1", "kitchen", "<example> kitchen", WHERE, False),
        ("qa3", "bedroom", "bedroom before the kitchen", BEFORE.upper(), True),
        ("qa3", "kitchen", "kitchen", BEFORE, False),  # the question's labels do not count
        ("qa6", "no", "I do not know", IS, True),  # fault: "no" in "not" and in "know"
        ("qa7", "none", "none", HOW, False),  # fault: "one" inside "none"
        ("qa8", "Apple,Milk", "the milk and the APPLE", WHAT, True),  # in any order
        ("qa8", "apple,milk", "apple", WHAT, False),
        ("qa8", "apple,milk", "apple and football", WHAT, False),
        ("qa8", "apple,milk", "apple, football and milk", WHAT, False),
        ("qa8", "apple,apple", "apple milk", WHAT, True),  # fault: two parts, two labels
        ("qa19", "s,e", "s,e", PATH, True),  # of three characters the comma does not count
        ("qa19", "s,e", "e,s", PATH, False),
        ("qa19", "n,s", "n,s", PATH, False),  # no label: nobody walks back
    ],
)
def test_the_official_score_is_the_benchmarks_faults_included(
    task, target, output, question, is_right
):
    assert official_score(task, target, output, question) is is_right


def test_the_labels_are_the_answers_of_the_tasks():
    assert list(LABELS) == list(babi.TASKS)
    for name, task in babi.TASKS.items():
        answers = set()
        for seed in range(30):
            for _, question in task.story(random.Random(seed)).questions:
                parts = [question.answer] if name == "qa19" else question.answer.split(",")
                answers.update(parts)
        assert answers <= set(LABELS[name])
    sizes = [len(set(labels)) for labels in LABELS.values()]
    assert sizes == [6, 6, 6, 6, 7, 2, 4, 4, 2, 3, 6, 6, 6, 6, 4, 4, 2, 2, 12, 7]


def test_exact_match_ignores_case_surrounding_space_and_a_final_full_stop_alone():
    for output in ("kitchen", " Kitchen. ", "kitchen ."):
        assert exact_match("Kitchen ", output) and exact_match("Kitchen. ", output)
    for output in ("", "the kitchen", "kitchens", ".kitchen", "kitchen.."):
        assert not exact_match("kitchen", output)


def test_the_interval_is_wilsons():
    assert wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=6e-5)
    assert wilson(2.5, 10) == pytest.approx((0.0809, 0.5578), abs=6e-5)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=6e-5)
    assert wilson(0, 0) == (0, 1)


def test_mcnemars_p_is_twice_the_binomial_tail_and_at_most_one():
    assert mcnemar(0, 0) == mcnemar(1, 0) == mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 2**5
    assert mcnemar(5, 2) == 2 * (1 + 7 + 21) / 2**7


# Tables


def prediction(memory="on", target="garden", output="garden", **changes):
    row = dict(model="lm2", task="qa1", length=4000, i=0, memory=memory, question="Where is Mary?")
    row |= dict(target=target, output=output, outside=False, found=None, seconds=0.1)
    return row | changes


def test_the_floor_is_what_the_best_constant_answer_gets_by_each_metric():
    for task, targets, exact, official in (
        ("qa1", ["garden", "Garden", "office", "garden"], 3, 3),
        ("qa7", ["none", "none", "none", "one", "two", "two"], 3, 2),
        ("qa8", ["apple,milk", "milk,apple", "apple"], 1, 2),
        ("qa1", [], 0, 0),
    ):
        rows = [prediction(target=target, output="x", task=task) for target in targets]
        assert (floor("exact", rows), floor("official", rows)) == (exact, official)


def cell(hits=50, n=100, model="lm2", memory="on", task="qa1", length=0, **changes):
    counts = dict(model=model, memory=memory, task=task, length=length, n=n, exact=hits)
    counts |= dict(floor=n // 4, official=hits, floor_official=n // 5)
    return counts | dict(outside_n=0, outside_exact=0, floor_outside=0) | changes


EXACT = "exact match in %"
OUTSIDE = "exact match in %, facts outside the window"
OFFICIAL = "the benchmark's own metric in %"
FOUND = "retrieval has all needed facts, in %"


def lines_of(text, title):
    """The figures of each line of a table's block, by its task and length."""
    block = text.split(title + "\n")[1].split("\n\n")[0].split("\n[ , ]")[0]
    lines = {}
    for line in block.splitlines()[1:]:
        task, length, *figures = line.replace(" [", "[").split()
        lines[task, length] = figures
    return lines


def test_a_table_shows_samples_floor_and_every_column_with_its_interval():
    on = [
        prediction("on", "kitchen", "kitchen", outside=True),
        prediction("on", "kitchen", "the kitchen", outside=True),
        prediction("on", "garden", "garden"),
        prediction("on", "office", "garden", outside=True),
    ]
    rag = [row | dict(memory="rag", output="garden", found=row is not on[0]) for row in on]
    text = table(to_cells(on + rag))
    place = ("qa1", "4k")
    assert lines_of(text, EXACT) == {place: ["4", "50.0", "50.0[15,85]", "25.0[5,70]"]}
    assert lines_of(text, OUTSIDE) == {place: ["3", "66.7", "33.3[6,79]", "0.0[0,56]"]}
    assert lines_of(text, OFFICIAL) == {place: ["4", "50.0", "75.0[30,95]", "25.0[5,70]"]}
    assert lines_of(text, FOUND) == {place: ["4", "75.0[30,95]"]}
    assert f"{FOUND}\n  task length    n floor       lm2 rag\n" in text


def test_tasks_and_lengths_stand_in_their_order_and_means_where_all_of_their_tasks_are_there():
    figures = []
    for i in range(10, 0, -1):
        figures.append(cell(hits=10 * i, task=f"qa{i}", length=1_000_000))
        if i != 8:
            figures.append(cell(hits=10 * i, task=f"qa{i}", memory="off", length=1_000_000))
        if i < 5:
            figures.append(cell(task=f"qa{i}", length=150))
    lines = lines_of(table(figures, ["exact"]), EXACT)
    expected = [("qa1-5", "1M"), ("qa1-10", "1M")]
    for i in range(10, 0, -1):
        lengths = ["150", "1M"] if i < 5 else ["1M"]
        expected[:0] = [(f"qa{i}", length) for length in lengths]
    assert list(lines) == expected
    assert lines["qa1-5", "1M"] == ["500", "25.0", "30.0[26,34]", "30.0[26,34]"]
    assert lines["qa1-10", "1M"] == ["1000", "25.0", "55.0[52,58]", "-"]


def test_a_mean_weighs_tasks_alike_and_is_as_certain_as_its_cells():
    sizes = (10, 10, 400, 10, 70)
    figures = []
    variance = 0
    for i, n in enumerate(sizes, 1):
        hits = n if i < 3 else 0
        figures.append(cell(hits=hits, n=n, task=f"qa{i}"))
        likely = (hits + 1) / (n + 2)  # not 0 and 1 for sure
        variance += likely * (1 - likely) / n
    reach = 100 * 1.96 * variance**0.5 / 5
    _, _, shown = lines_of(table(figures), EXACT)["qa1-5", "0k"]
    assert shown == f"40.0[{40 - reach:.0f},{40 + reach:.0f}]"
    alike = [cell(50, task=f"qa{i}") for i in range(5)]
    assert pooled(alike, "n", "exact") == pytest.approx((250, 500))
    assert pooled(alike[:1], "n", "exact") == pytest.approx((50, 100))


def test_columns_of_other_numbers_of_samples_have_lines_of_their_own():
    figures = [
        cell(10, 100, memory="on", floor=20),
        cell(10, 50, memory="off", floor=15),
        cell(10, 100, memory="other", floor=20),
    ]
    lines = re.sub(r" \[[^]]*\]", "", table(figures, ["exact"])).splitlines()
    assert lines[2].split() == ["qa1", "0k", "100", "20.0", "10.0", "-", "10.0"]
    assert lines[3].split() == ["qa1", "0k", "50", "30.0", "-", "20.0", "-"]


def test_more_than_four_columns_stand_in_parts_and_long_names_lose_their_beginning():
    figures = []
    for model in ("a-long-name-seed1", "a-long-name-seed2", "b"):
        for memory in ("on", "other"):
            figures.append(cell(hits=len(figures), model=model, memory=memory))
    lines = table(figures, ["exact"]).splitlines()
    heads = [line[24:].split() for line in lines if line.startswith("  task")]
    assert heads == [
        ["name-seed1", "on", "e-seed1", "other", "name-seed2", "on", "e-seed2", "other"],
        ["b", "on", "b", "other"],
    ]
    shown = [re.findall(r"(\d)\.0 \[", line) for line in lines if line.startswith("   qa1")]
    assert shown == [["0", "1", "2", "3"], ["4", "5"]]


def test_no_line_of_the_table_is_wider_than_80_columns_whatever_the_figures():
    rng = random.Random(0)
    for n in (1, 200, 1000):
        figures = []
        for name in ("a-model-with-a-name-of-many-words", "b", "c" * 40):
            for memory in ("off", "other"):
                for length in (0, 15_699, 10_000_000):
                    for i in range(1, 11):
                        hits, found, base = rng.choices([0, 1, n - 1, n], k=3)
                        counts = dict(outside_n=n, outside_exact=found, found_n=n, found=found)
                        row = cell(hits, n, name, memory, f"qa{i}", length, floor=base, **counts)
                        figures.append(row)
        assert max(len(line) for line in table(figures).splitlines()) == 80


def test_a_share_is_shown_with_its_interval():
    assert percent(0, 0) == "-"
    assert percent(1, 3) == "33.3 [6,79]"
    assert percent(3, 3) == "100 [44,100]"
    assert percent(99_999, 100_000) == "99.9 [99,100]"  # 13 characters, as the columns are wide


def column_of(memory, marks, **place):
    """Answers to questions 0, 1, ...: r is a right one, w a wrong one, - none."""
    rows = []
    for i, mark in enumerate(marks):
        if mark != "-":
            output = "the garden" if mark == "r" else "office"
            rows.append(prediction(memory, output=output, i=i, **place))
    return rows


def test_a_comparison_counts_where_one_of_two_columns_alone_is_right():
    rows = column_of("on", "rrrrrrrw-r", length=0) + column_of("off", "wwwwwrwwrr", length=0)
    rows += column_of("on", "r" * 20, task="qa2") + column_of("off", "w" * 20, task="qa2")
    rows += [prediction("on", task="qa2", i=30), prediction("off", task="qa2", i=30, target="x")]
    lines = compare(rows, "lm2 on", "lm2 off", "official").splitlines()
    assert lines[0] == "official: A = lm2 on, B = lm2 off"
    assert [line.split() for line in lines[2:5]] == [
        ["qa1", "0k", "9", "88.9", "22.2", "6", "0", f"{2 / 64:.4f}"],
        ["qa2", "4k", "20", "100.0", "0.0", "20", "0", "<", ".0001"],
        ["all", "29", "96.6", "6.9", "26", "0", "<", ".0001"],
    ]
    assert lines[-1] == "3 answers have no partner to the same question and are left out."
    swapped = compare(rows, "lm2 off", "lm2 on", "official").splitlines()[2].split()
    assert swapped == ["qa1", "0k", "9", "22.2", "88.9", "0", "6", f"{2 / 64:.4f}"]
    assert "   0.0    0.0       0       0   1.0000" in compare(rows, "lm2 on", "lm2 off", "exact")
    with pytest.raises(ValueError, match="'lm2 on' and 'lm2 off' have answered no question in"):
        compare(rows[-2:], "lm2 on", "lm2 off")
    with pytest.raises(ValueError, match="'lm2 of' is not there: choose from 'lm2 on', 'lm2 off'"):
        compare(rows, "lm2 on", "lm2 of")


def test_the_cost_is_the_mean_of_each_model_length_and_mode():
    rows = [
        prediction("on", seconds=0.5),
        prediction("on", seconds=1.5),
        prediction("off", seconds=0.25),
        prediction("on", seconds=0.125, length=0),
        prediction("rag", seconds=2.0, model="rmt"),
    ]
    assert report_cost(rows).splitlines() == [
        "seconds a sample",
        "lm2 4k: on 1.000, off 0.250; 4,000 tokens/s",
        "lm2 0k: on 0.125",
        "rmt 4k: rag 2.000",
    ]


# Reading and answering


def prompts(tok, *lengths):
    """Prompts of random tokens."""
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, tok.n_vocab, n) for n in lengths]


def last_segment_of(ids, segment_len):
    while len(ids) > segment_len:
        ids = ids[segment_len:]
    return ids


@torch.no_grad()
def greedy(model, tok, prompt, memory=True, state=None):
    """The answer to a prompt (T,), with everything read again in one call for every token.

    With the memory off, a token is predicted from its own segment alone, as a document of its own.
    """
    ids = [int(i) for i in prompt]
    new_ids = []
    while len(new_ids) < 12:
        seen = ids + new_ids
        if not memory:
            seen = last_segment_of(seen, model.cfg.segment_len)
        logits, _, _ = model(torch.tensor([seen]), state=state)
        new = logits[0, -1].argmax().item()
        if new == tok.eot:
            break
        new_ids.append(new)
    return tok.decode(new_ids).strip()


@torch.no_grad()
def greedy_with_memory_of(model, tok, prompt, lender):
    """The answer to the last segment of a prompt with the memory that another prompt leaves."""
    _, _, state = model(torch.from_numpy(lender)[None])
    found = model.initial_state(1)
    found.carried = state.carried
    return greedy(model, tok, last_segment_of(prompt, model.cfg.segment_len), state=found)


def outputs_of(model, tok, rows, mode):
    """The answers of `ask` to these prompts in one mode."""
    document = from_text(tok, "", "?", "garden")
    documents = []
    for row in rows:
        place = (len(row), len(row) + 2)
        documents.append(document._replace(ids=np.append(row, [0, 0]), answers=[place]))
    return ask(model, tok, documents, [mode], 1)[mode].outputs


@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(n_mem_layer=1), dict(n_mem_token=3), dict(n_mem_layer=0), dict(segment_len=5)],
)
def test_answers_of_a_batch_are_those_of_reading_each_prompt_in_one_call(tok, sizes, monkeypatch):
    """For models with memory in all blocks, in one, with memory tokens, without memory, and with
    segments that are shorter than an answer."""
    model = loud(tok, **sizes)
    rows = prompts(tok, S - 1, S, S + 1, 2 * S, 2 * S + 1, 3 * S - 1, 5)
    on = [greedy(model, tok, row) for row in rows]
    off = [greedy(model, tok, row, memory=False) for row in rows]
    other = []
    for row, lender in zip(rows, [1, 0, 3, 2, 5, 4, 5], strict=True):
        other.append(greedy_with_memory_of(model, tok, row, rows[lender]))
    assert len({len(tok.encode(text)) for text in on}) > 2, "all answers are equally long"
    assert (on != off) == (model.cfg.kind != "llama")
    assert (on != other) == (model.cfg.kind != "llama")
    assert outputs_of(model, tok, rows, "on") == on
    assert outputs_of(model, tok, rows, "other") == other
    monkeypatch.setattr(model, "read", lambda *_: pytest.fail("a document was read"))
    assert outputs_of(model, tok, rows, "off") == off


def test_the_seconds_are_a_documents_and_reading_counts_in_each_mode_that_needs_it(
    model, tok, val_set, monkeypatch
):
    clock = itertools.count()  # a second passes from call to call
    monkeypatch.setattr(babilong_eval, "time", SimpleNamespace(perf_counter=clock.__next__))
    docs = [generated(val_set, 0)("qa1", 0, i) for i in range(4)]
    modes = ["on", "off", "other", "rag"]
    found = ask(model, tok, docs, modes, 1)
    assert [found[mode].seconds for mode in modes] == [0.5, 0.25, 0.5, 0.25]


def test_batches_hold_every_sample_once_in_order_and_pairs_stay_together():
    assert batches(5, 2, pairs=False) == [range(0, 2), range(2, 4), range(4, 5)]
    assert batches(2, 0, pairs=False) == [range(0, 1), range(1, 2)]
    assert batches(7, 5, pairs=True) == [range(0, 4), range(4, 7)]
    assert batches(5, 1, pairs=True) == [range(0, 2), range(2, 5)]
    assert batches(1, 2, pairs=True) == [range(0, 1)]


# Evaluating


def predictions_of(model, tok, samples, work, *modes, **options):
    rows = []
    for batch in evaluate(model, tok, samples, work, modes, **options):
        assert not model.training
        rows.extend(batch)
    return rows


def by_key(rows):
    """The rows without their seconds, by what they answer; none is there twice."""
    found = {}
    for row in rows:
        key = (row["model"], row["task"], row["length"], row["i"], row["memory"])
        assert key not in found
        found[key] = {name: value for name, value in row.items() if name != "seconds"}
    return found


@pytest.mark.parametrize("is_training", [True, False])
def test_a_prediction_belongs_to_its_sample(model, tok, val_set, is_training):
    samples = generated(val_set, 3)
    model.train(is_training)
    rows = predictions_of(model, tok, samples, [("qa1", 150, 4)], "on", "rag", rag=2, name="tiny")
    assert model.training is is_training
    assert len(by_key(rows)) == 8
    for row in rows:
        doc = samples("qa1", 150, row["i"])
        ids, found = doc.prompt(), None
        if row["memory"] == "rag":
            ids, found = doc.retrieve(tok, 2)
        expected = dict(model="tiny", task="qa1", length=150, i=row["i"], memory=row["memory"])
        expected |= dict(question=doc.questions[0].text, target=doc.questions[0].answer)
        expected |= dict(output=greedy(model, tok, ids), outside=doc.outside(S), found=found)
        assert row == expected | dict(seconds=row["seconds"])
        assert 0 < row["seconds"] < 5
    assert {row["outside"] for row in rows} == {True, False}


def test_samples_and_answers_depend_on_seed_task_length_and_i_alone(model, tok, val_set):
    samples = generated(val_set, 3)
    modes = ("on", "off", "other", "rag")
    work = [("qa2", 0, 6), ("qa1", 150, 6)]
    every = by_key(predictions_of(model, tok, samples, work, *modes, rag=3))
    assert len(every) == 2 * 6 * 4
    options = dict(rag=3, max_tokens=9000)  # batches of 3, and of 2 where memories are lent
    few = by_key(predictions_of(model, tok, samples, work[1:], "rag", "other", **options))
    assert len(few) == 12
    assert few.items() <= every.items()
    others = by_key(predictions_of(model, tok, generated(val_set, 4), work[1:], "on"))
    assert all(others[key] != every[key] for key in others)


def test_a_terminal_shows_a_bar_from_the_start(model, tok, val_set, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(babilong_eval, "ask", lambda *_: pytest.fail(terminal.getvalue()))
    options = dict(name="tiny", show=True)
    with pytest.raises(pytest.fail.Exception, match="tiny:   0%.*cell=qa1 150"):
        predictions_of(model, tok, generated(val_set, 0), [("qa1", 150, 2)], "off", **options)


# The file of answers


@pytest.fixture(scope="module")
def ckpt(model, tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=tok.ranks)
    return path


@pytest.fixture(scope="module")
def usual(ckpt, folder):
    """The flags for the tiny model and the tiny background, which later ones replace."""
    return ["--ckpt", str(ckpt), "--background", str(folder)]


@pytest.fixture(scope="module")
def cli(usual):
    """cli(*flags) runs an evaluation -> what it prints."""

    def run(*flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            babilong_eval.main([*usual, *map(str, flags)])
            return sys.stdout.getvalue()

    return run


@pytest.fixture
def denied(capsys, usual, monkeypatch):
    """denied(*flags): the one line with which an evaluation ends before any question is asked."""

    def run(*flags):
        monkeypatch.setattr(babilong_eval, "ask", lambda *_: pytest.fail("something was asked"))
        return refused(capsys, babilong_eval.main, *usual, *flags)

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "p.jsonl"


FULL = ["--tasks", "qa1", "--lengths", "0k", "100", "--n", "4", "--max_tokens", "6000"]
FULL += ["--memory", "on", "off", "other", "--rag", "2"]
SHORT = ["--lengths", "0k", "--n", "2", "--memory", "on"]


@pytest.fixture(scope="module")
def whole(cli, tmp_path_factory):
    """The file of a run in one go: settings, and 32 answers in batches of two in four modes."""
    path = tmp_path_factory.mktemp("whole") / "predictions.jsonl"
    cli(*FULL, "--out", path)
    assert len(by_key(load(path))) == 32
    return path


@pytest.fixture
def copy(whole, out):
    """A copy of that file at `out`."""
    out.write_bytes(whole.read_bytes())
    return out


@pytest.mark.parametrize(
    "kept, partial", [(0, 0), (1, 0), (1, 40), (2, 150), (9, 1), (20, 60), (32, 150), (33, 0)]
)
def test_a_run_cut_short_anywhere_goes_on_and_ends_as_one_in_one_go(
    cli, whole, out, monkeypatch, kept, partial
):
    lines = whole.read_bytes().splitlines(keepends=True)
    head = b"".join(lines[:kept])
    rest = b"".join(lines[kept:])
    out.write_bytes(head + rest[:partial])
    asked = []

    def watched(model, tokenizer, docs, modes, *options):
        asked.extend(modes * len(docs))
        return ask(model, tokenizer, docs, modes, *options)

    monkeypatch.setattr(babilong_eval, "ask", watched)
    printed = cli(*FULL, "--out", out)
    assert by_key(load(out)) == by_key(load(whole))
    n_done = max(0, kept - 1)
    assert len(asked) == 32 - n_done // 2 * 2  # two documents are a batch
    assert (f"has {n_done} of 32 answers already" in printed) == (n_done > 0)
    text = out.read_bytes()
    assert text.startswith(head) and text.endswith(b"\n") and text.count(b"settings") == 1


def test_the_answers_of_a_batch_are_in_the_file_before_the_next_is_asked(cli, out, monkeypatch):
    sizes = []

    def watched(*given):
        sizes.append(out.read_bytes().count(b'"output"'))
        return ask(*given)

    monkeypatch.setattr(babilong_eval, "ask", watched)
    cli(*FULL, "--out", out)
    assert sizes == [0, 8, 16, 24]


def test_a_finished_run_asks_nothing_and_prints_its_tables_again(cli, whole, copy, monkeypatch):
    monkeypatch.setattr(babilong_eval, "ask", lambda *_: pytest.fail("something was asked"))
    printed = cli(*FULL, "--out", copy)
    assert copy.read_bytes() == whole.read_bytes()
    assert "has 32 of 32 answers already" in printed
    assert table(to_cells(load(whole))) in printed
    printed = cli(*FULL, "--lengths", "100", "--n", "2", "--out", copy)
    wanted = [row for row in load(whole) if row["length"] == 100 and row["i"] < 2]
    assert table(to_cells(wanted)) in printed, "the table shows more or less than is asked for"


def test_samples_modes_lengths_tasks_and_models_may_be_added(cli, ckpt, tmp_path):
    models = ["--ckpt", f"lm2={ckpt}", f"twin={ckpt}"]
    last = ["--lengths", "100", "0k", "--n", "3", "--tasks", "qa2", "qa1", *models]
    in_steps = tmp_path / "steps.jsonl"
    for flags in (SHORT, [*SHORT, "--n", "3"], [*SHORT, "--memory", "off"], last):
        cli(*flags, "--out", in_steps)
    at_once = tmp_path / "once.jsonl"
    cli(*last, "--out", at_once)
    assert len(load(at_once)) == 2 * 2 * 2 * 3 * 2
    assert by_key(load(in_steps)) == by_key(load(at_once))
    cli(*SHORT, "--seed", "1", "--again", "--out", at_once)
    assert len(load(at_once)) == 2


@pytest.fixture(scope="module")
def another(tok, tmp_path_factory):
    """Another checkpoint, another background, and a folder of original stories."""
    path = tmp_path_factory.mktemp("another")
    save_checkpoint(path / "ckpt.pt", loud(tok, seed=1), tokenizer=tok.ranks)
    (path / "books").mkdir()
    (path / "books" / "book.txt").write_text(book(900, seed=7), encoding="utf-8")
    task = babi.TASKS["qa1"]
    stories = [babi.format_story(task.story(random.Random(i)), task) for i in range(9)]
    (path / f"qa1_{task.stem}_test.txt").write_text("".join(stories), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "setting, flags",
    [
        ("seed 0, not 1", ["--seed", "1"]),
        ("count own, not chars", ["--count", "chars", "--lengths", "0k"]),
        ("background ", ["--background", "{}/books"]),
        ("checkpoint ", ["--ckpt", "{}/ckpt.pt"]),
        ("rag 2, not 3", ["--rag", "3"]),
        ("source generated, not babi", ["--source", "babi", "--path", "{}"]),
        ("names own, not unseen", ["--names", "unseen"]),
        ("seed 0, not 1", ["--seed", "1", "--ckpt", "twin={}/ckpt.pt"]),  # no other questions
    ],
)
def test_a_run_of_other_settings_does_not_go_on(denied, whole, copy, another, setting, flags):
    flags = [flag.format(another) for flag in flags]
    err = denied(*FULL, *flags, "--out", copy)
    assert f"{copy} has answers of lm2 with {setting}" in err
    assert "another --out, or --again" in err
    assert copy.read_bytes() == whole.read_bytes()
    assert list(copy.parent.iterdir()) == [copy]


def test_a_file_that_lacks_a_setting_is_not_gone_on_from(denied, copy):
    copy.write_bytes(copy.read_bytes().replace(b'"count": "own", ', b"", 1))
    assert f"{copy} has answers of lm2 with count missing, not own" in denied(*FULL, "--out", copy)


def test_answers_to_unseen_names_are_scored_by_these_and_not_mixed_with_others(cli, denied, out):
    cli(*SHORT, "--n", "6", "--names", "unseen", "--out", out)
    rows = load(out)
    assert "with names unseen, not own" in denied(*SHORT, "--out", out)
    for row in rows:
        assert row["target"] not in LABELS["qa1"]
        row["output"] = row["target"]
    save(rows, out)
    (cell,) = to_cells(load(out))
    assert cell["n"] == cell["exact"] == cell["official"] == 6
    for row in rows:
        del row["names"]
    (cell,) = to_cells(rows)
    assert (cell["exact"], cell["official"]) == (6, 0), "under own names these are no labels"
    for row in rows:
        row["names"] = "unseen"
        row["output"] = "kitchen"
    (cell,) = to_cells(rows)
    assert cell["exact"] == cell["official"] == 0
    assert cell["floor"] == cell["floor_official"] > 0


def test_answers_without_settings_are_shown_and_not_gone_on_from(cli, denied, out):
    rows = [prediction(length=0), prediction(length=0, i=1, output="gärten\u2028")]
    save(rows, out)
    before = out.read_bytes()
    assert load(out) == rows
    assert table(to_cells(rows)) in cli("--from_predictions", out, "--ckpt", "no/such.pt")
    err = denied(*SHORT, "--out", out)
    assert f"{out} has answers of lm2 without their settings" in err
    assert out.read_bytes() == before


def test_a_file_of_an_older_version_is_still_shown_without_a_line_cut_off(out):
    old = prediction(found=True)
    lines = [
        dict(settings={"model": "lm2", "checkpoint": "ab", "samples of qa1 4k": "cd"}),
        dict(settings={"model": "lm2", "rag": 5}),
        {name: old[name] for name in old if name not in ("model", "found", "seconds")},
        old,
    ]
    text = "\ufeff" + "\n".join(json.dumps(line) for line in lines)  # an editor put a mark there
    out.write_text(text[:-9], encoding="utf-8")
    assert load(out) == [prediction(seconds=0.0)]


@pytest.mark.skipif(fcntl is None, reason="this system has no locks")
def test_one_run_at_a_time_writes_a_file(denied, copy):
    before = copy.read_bytes()
    settings = json.loads(before.splitlines()[0])["settings"]
    running = Predictions(copy, [settings])
    for again in ([], ["--again"]):
        err = denied(*FULL, "--out", copy, *again)
        assert f"another evaluation writes {copy}: give another --out" in err
    running.file.close()
    assert copy.read_bytes() == before


@pytest.mark.parametrize("again", [[], ["--again"]])
@pytest.mark.parametrize(
    "text", [b"My only copy", b'{"a": 1}\n', b"\xff\xfe\n\n", b"[" * 10_000, b"\n"]
)
def test_a_file_of_something_else_is_refused_and_stays(denied, out, text, again):
    out.write_bytes(text)
    err = denied(*SHORT, "--out", out, *again)
    assert f"{out} line 1 is no prediction" in err
    assert out.read_bytes() == text


def test_a_line_that_is_no_answer_or_one_given_before_is_named(out):
    changes = [dict(i=None), dict(i=-1), dict(i=True), dict(length=-1), dict(seconds="fast")]
    changes += [dict(outside=1), dict(memory="maybe"), dict(task="qa21"), dict(model=7)]
    for change in changes:
        save([prediction(i=5), prediction() | change], out)
        with pytest.raises(ValueError, match="line 2 is no prediction"):
            load(out)
    save([prediction(), prediction(model="twin"), prediction(output="office")], out)
    with pytest.raises(ValueError, match="line 3 answers .*again"):
        load(out)


# The command line


def test_an_evaluation_asks_and_prints_what_its_docstring_says(cli, model, tok, val_set, tmp_path):
    train = dict(tasks="qa2 qa1", background="novels")
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer=tok.ranks, train=train)
    longer = len(val_set.prose) * 4 // 3
    flags = ["--lengths", "0k:4", longer, "--n", "1"]
    printed = cli("--ckpt", tmp_path / "ckpt.pt", *flags)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt.pt", "predictions.jsonl"]
    rows = load(tmp_path / "predictions.jsonl")
    work = [(task, length, n) for task in ("qa2", "qa1") for length, n in ((0, 4), (longer, 1))]
    expected = by_key(predictions_of(model, tok, generated(val_set, 0), work, "on", "off"))
    for key, row in by_key(rows).items():  # float32 there, float64 here: outputs may differ
        assert row | dict(output="") == expected.pop(key) | dict(output="")
    assert not expected
    n_params, _ = model.n_params()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert re.sub(r"took [0-9.]+", "took 0.0", printed).startswith(
        f"lm2: {n_params:,} parameters, segments of 32, {device}\n"
        "lm2 was trained on the prose of novels: --background names another\n"
        f"background of {len(val_set.prose):,} tokens, {val_set.chars_per_token:.2f} characters "
        f"each\na sample of {longer} goes round it 1.3 times\n"
        f"it took 0.0 minutes\n\n{table(to_cells(rows))}\n\n{report_cost(rows)}\npeak resident set "
    )


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--memory", "none"], "--memory none"),
        (["--memory", "on", "other", "--lengths", "0k", "100:1"], "--memory other"),
        (["--rag", "-1"], "--rag -1"),
        (["--source", "babi"], "--source babi"),
        (["--source", "babi", "--path", "x", "--names", "many"], "--names many with --source babi"),
        (["--names", "unseen", "--tasks", "qa20"], "does not fit qa20"),
        (["--path", "x"], "--path x"),
        (["--source", "babi", "--path", "no/babi"], "no/babi"),
        (["--source", "babilong", "--path", "no/long"], "no/long"),
        (["--source", "babilong", "--path", "x", "--tasks", "qa21"], "qa21"),
        (["--compare", "lm2 on", "lm2 of"], "'lm2 of'"),
        (["--ckpt", "a={ckpt}", "a={ckpt}"], "two models are called 'a'"),
        (["--out", "{ckpt}", "--again"], "--out {ckpt} is the checkpoint"),
        (["--figures", "{ckpt}"], "--figures {ckpt}"),
        (["--figures", "no/such/f.json"], "--figures no/such/f.json"),
        (["--out", "new.json", "--figures", "./new.json"], "--figures new.json"),
        (["--from_predictions", "new.json", "--figures", "./new.json"], "--figures new.json"),
    ],
)
def test_a_flag_that_cannot_be_is_named_before_anything_is_asked_or_written(
    denied, ckpt, out, flags, named
):
    before = ckpt.read_bytes()
    flags = [flag.format(ckpt=ckpt) for flag in flags]
    err = denied(*SHORT, "--memory", "on", "off", "--out", out, *flags)
    assert named.format(ckpt=ckpt) in err
    assert not list(out.parent.iterdir())
    assert ckpt.read_bytes() == before


def test_the_flags_choose_the_samples_and_the_modes(cli, tok, folder, out):
    flags = ["--lengths", "700", "0k:1", "--n", "3", "--count", "chars", "--seed", "5"]
    cli(*flags, "--memory", "none", "--rag", "3", "--out", out)
    samples = generated(Builder(tok, "val", folder, count="chars"), 5)
    expected = []
    for length, i in ((700, 0), (700, 1), (700, 2), (0, 0)):
        doc = samples("qa1", length, i)
        expected.append(("rag", length, i, doc.questions[0].text, doc.outside(S)))
    names = ("memory", "length", "i", "question", "outside")
    assert [tuple(row[name] for name in names) for row in load(out)] == expected


@pytest.mark.parametrize("is_saved", [True, False])
def test_figures_comparisons_the_metric_and_the_papers_rows_are_shown_if_asked_for(
    cli, whole, copy, tmp_path, is_saved
):
    flags = ["--from_predictions", whole] if is_saved else [*FULL, "--out", copy]
    rows = load(whole)
    printed = cli(*flags)
    assert "McNemar" not in printed and published_table() not in printed
    flags += ["--figures", tmp_path / "f.json", "--published", "--metric", "official"]
    printed = cli(*flags, "--compare", "lm2 on", "lm2 rag")
    assert json.loads((tmp_path / "f.json").read_text()) == dict(cells=to_cells(rows))
    assert table(to_cells(rows), ["official"]) in printed and EXACT not in printed
    assert compare(rows, "lm2 on", "lm2 rag", "official") in printed and "exact:" not in printed
    assert published_table() in printed


# Several models


@pytest.fixture(scope="module")
def second(tok, tmp_path_factory):
    """A model without memory whose tokenizer has 700 tokens, in a folder of its own."""
    small = Tokenizer("".join(line + "\n" for line in tok.ranks.split("\n")[:700]))
    path = tmp_path_factory.mktemp("two") / "plain" / "ckpt.pt"
    path.parent.mkdir()
    save_checkpoint(path, loud(small, n_mem_layer=0), tokenizer=small.ranks)
    return path, small


@pytest.mark.parametrize("count", ["own", "chars"])
def test_models_of_other_tokenizers_stand_in_one_table(cli, ckpt, second, folder, out, count):
    path, small = second
    flags = ["--lengths", "700", "--n", "3", "--count", count, "--out", out]
    printed = cli("--ckpt", f"big={ckpt}", path, *flags)
    heads = [line.split() for line in printed.splitlines() if line.startswith("  task")]
    assert heads[0][4:] == ["big", "on", "big", "off", "plain", "on", "plain", "off"]
    texts = [(row["question"], row["target"]) for row in load(out)]  # big on, big off, plain on ...
    samples = generated(Builder(small, "val", folder, count=count), 0)
    docs = [samples("qa1", 700, i) for i in range(3)]
    assert texts[6:9] == texts[9:] == [doc.questions[0][:2] for doc in docs]
    if count == "chars":
        assert texts[:6] == texts[6:]
    assert ("each model's own tokens" in printed) == (count == "own")


def test_a_model_is_called_by_its_kind_its_folder_or_as_it_is_told(cli, ckpt, second, out):
    odd = out.parent / "lr=0.1.pt"  # no name, but a path
    odd.write_bytes(ckpt.read_bytes())
    plain, _ = second
    for models, names in (
        ([plain], ["llama"]),
        ([odd], ["lm2"]),
        ([f"my one={odd}", plain], ["my one", "plain"]),
    ):
        cli("--ckpt", *models, *SHORT, "--n", "1", "--again", "--out", out)
        assert [row["model"] for row in load(out)] == names


# Sources


def write_published(folder, task, length, n):
    """A published file of n samples -> its path and the samples."""
    samples = []
    for i in range(n):
        text = f"Mary went to the garden {i}. It rained\n all  day. John moved to the café."
        samples.append(dict(input=text, question=f"Where is Mary {i}? ", target=f"garden {i}"))
    file = folder / task / f"{length}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return file, samples


def test_the_published_samples_are_asked_as_they_stand_in_their_files(cli, model, tok, out):
    path = out.parent / "set"
    _, samples = write_published(path, "qa1", "0k", 5)
    write_published(path, "qa1", "1k", 1)
    flags = ["--source", "babilong", "--path", path, "--lengths", "0k", "1k", "--n", "4"]
    printed = cli(*flags, "--memory", "on", "--rag", "1", "--out", out)
    assert printed.count("samples published") == 1
    assert "qa1 1k: 1 samples published, not 4\n" in printed
    rows = load(out)
    assert len(rows) == (4 + 1) * 2
    for row in rows:
        sample = samples[row["i"]]
        doc = from_text(tok, sample["input"], sample["question"], sample["target"])
        ids = doc.prompt()
        if row["memory"] == "rag":
            ids, _ = doc.retrieve(tok, 1)
        assert (row["question"], row["target"]) == (sample["question"].strip(), sample["target"])
        assert row["output"] == greedy(model, tok, ids)
        assert row["outside"] is None and row["found"] is None  # nobody knows the facts
    assert OUTSIDE not in printed and FOUND not in printed


def test_one_published_file_is_asked_as_one_cell_and_not_as_several(cli, denied, out):
    file, _ = write_published(out.parent / "set", "qa1", "0k", 4)
    flags = ["--source", "babilong", "--path", file, "--n", "2", "--memory", "on", "--out", out]
    cli(*flags, "--lengths", "4k")
    found = [(row["length"], row["target"]) for row in load(out)]
    assert found == [(4000, "garden 0"), (4000, "garden 1")]
    for several in (["--tasks", "qa1", "qa2", "--lengths", "0k"], ["--lengths", "0k", "1k"]):
        assert f"--path {file} is one file" in denied(*flags, *several)


def test_original_stories_are_a_source_from_a_folder_or_a_file(cli, denied, another, out):
    (file,) = another.glob("qa1_*")
    stories = babi.read_stories(another, "qa1", "val")
    in_files = set()
    for story in stories:
        in_files.update((question.text, question.answer) for _, question in story.questions)
    for path in (another, file):
        flags = ["--source", "babi", "--path", path, "--lengths", "0k", "200", "--n", "5"]
        cli(*flags, "--memory", "off", "--out", out, "--again")
        rows = load(out)
        assert len(rows) == 10
        assert {(row["question"], row["target"]) for row in rows} <= in_files
    assert f"--path {file} is one file" in denied(*flags, "--tasks", "qa1", "qa2", "--out", out)


def test_a_last_answer_without_its_line_end_counts_and_the_next_one_begins_a_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    settings = [dict(model="lm2", seed=0)]
    rows = [prediction(i=i) for i in range(3)]
    first = Predictions(path, settings)
    first.add(rows[:2])
    first.file.close()
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert len(load(path)) == 2
    again = Predictions(path, settings)
    again.add(rows[2:])
    again.file.close()
    assert load(path) == rows


def test_answers_to_other_questions_are_refused_and_those_to_the_same_are_not(tmp_path):
    question = babi.Question("Where is Mary? ", "garden", ())
    document = SimpleNamespace(questions=[question])
    work = [("qa1", 0, 5), ("qa2", 0, 5)]
    same = prediction(i=0, task="qa1", length=0, question=question.text, target="garden")
    later = prediction(i=1, task="qa1", length=0, question="Where is John? ", target="office")
    for rows in ([], [later], [same, later]):
        check_questions(rows, lambda *cell: document, work, tmp_path)
    for changed in (dict(target="office"), dict(question="Where is John? ")):
        with pytest.raises(ValueError, match="answers to other questions of qa1 0k"):
            check_questions([same | changed], lambda *cell: document, work, tmp_path)
