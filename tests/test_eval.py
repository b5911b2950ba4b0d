"""Scores, tables, the file of answers and the evaluation, against independent re-computations.

    python -m pytest tests/test_eval.py -q

The scores are a table made by hand from the benchmark's published rules, and the same rules written down once
more, slowly. Answers are compared with those of reading everything again for every token.
"""
import io
import json
import math
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import babilong_eval
from babilong_eval import answer, ask, batches, evaluate, forecast, of_rows, read_before_last
from data import babi
from data.babilong import Builder
from data.document import from_text
from data.metrics import (LABELS, cells, compare, exact_match, floor, mcnemar, official_score, percent,
                          pooled, table, wilson)
from data.predictions import Predictions, load, save
from data.published import published_table
from data.babilong import generated
from data.tokenizer import Tokenizer
from data.tokenizer import load as load_tokenizer
from lm2 import LM2Config, build_model, save_checkpoint
from test_babilong import book
from test_train import refused

torch.set_num_threads(1)

S = 32  # tokens of a segment
TINY = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, segment_len=S, n_slot=4, n_mem_head=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("books")
    (path / "book.txt").write_text(book(900), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


@pytest.fixture(scope="module")
def val_set(tok, folder):
    return Builder(tok, "val", folder)


def loud(tok, seed=0, **sizes):
    """Random weights that answer with few words, and now and then with the end of text."""
    torch.manual_seed(seed)
    model = build_model(LM2Config(vocab_size=tok.n_vocab, **TINY | sizes)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
        for layer in model.layers:
            if layer.memory:
                layer.memory.wv.weight.mul_(6)      # the memory has a say
        model.output.weight[:] = 0
        model.output.weight[-60:] = 0.5 * torch.randn(60, 16, dtype=torch.float64)
        model.output.weight[-1] *= 2
    return model


@pytest.fixture(scope="module")
def model(tok):
    return loud(tok)


# Scores

WHERE, BEFORE = "Where is Mary? ", "Where was the apple before the kitchen? "
IS, HOW, WHAT = "Is Mary in the office? ", "How many objects is Mary carrying? ", "What is Mary carrying? "
PATH = "How do you go from the office to the kitchen? "
SCORES = [  # task, target, output, question, score
    ("qa1", "kitchen", "kitchen", WHERE, True),
    ("qa1", "kitchen", "Mary is in the kitchen.", WHERE, True),
    ("qa1", "Kitchen", "KITCHEN", WHERE, True),                             # case is ignored on both sides
    ("qa1", "KITCHEN", "kitchen", WHERE, True),
    ("qa1", "kitchen", "bedroom", WHERE, False),
    ("qa1", "kitchen", "", WHERE, False),
    ("qa1", "kitchen", "", "", False),
    ("qa1", "", "", WHERE, False),                                          # no label is no answer either
    ("qa1", "kitchen", "cellar", WHERE, False),                             # no label at all
    ("qa1", "cellar", "cellar", WHERE, False),                              # right, but no label
    ("qa1", "kitchen", "kitchen or bedroom", WHERE, False),                 # two labels
    ("qa1", "kitchen", "kitchen kitchen", WHERE, True),                     # a label counts once
    ("qa1", "kitchen", "thekitchenette", WHERE, True),                      # a substring is enough
    ("qa1", "kitchen", "kit chen", WHERE, False),
    ("qa1", " kitchen", "kitchen", WHERE, False),                           # the target keeps its space
    ("qa1", "kitchen", "kitchen\nbedroom", WHERE, False),                   # a line end cuts nothing
    ("qa1", "kitchen", "\tkitchen\r\n", WHERE, True),
    ("qa1", "kitchen", "kitchen! Not the bedroom", WHERE, False),           # nor another end of a sentence
    ("qa1", "kitchen", "kitchen. Before that the bedroom.", WHERE, True),   # the first sentence only
    ("qa1", "kitchen", "I think so. kitchen", WHERE, False),
    ("qa1", "kitchen", ".kitchen", WHERE, False),
    ("qa1", "kitchen", "kitchen<context>bedroom", WHERE, True),
    ("qa1", "kitchen", "kitchen <CONTEXT> bedroom", WHERE, True),           # cut after lower-casing
    ("qa1", "kitchen", "<context>kitchen", WHERE, False),
    ("qa1", "kitchen", "kitchen <context bedroom", WHERE, False),
    ("qa1", "kitchen", "kitchen <example> bedroom", WHERE, True),
    ("qa1", "kitchen", "<Example> kitchen", WHERE, False),
    ("qa1", "kitchen", "kitchen <example> garden <context> bedroom", WHERE, True),
    ("qa1", "kitchen", "kitchen <context> garden <example> bedroom. office", WHERE, True),
    ("qa1", "kitchen", "garden <example> <context>. kitchen", WHERE, False),
    ("qa1", "kitchen", "kitchen Question: is it the bedroom", WHERE, False),    # the cut there never fires
    ("qa1", "kitchen", "kitchen question bedroom", WHERE, False),
    ("qa1", "kitchen", "in der Küche: kitchen ☕", WHERE, True),
    ("qa1", "kitchen", "ＫＩＴＣＨＥＮ", WHERE, False),
    ("qa1", "kitchen", "\u212aitchen", WHERE, True),                        # small, the Kelvin sign is k
    ("qa1", "kitchen", "K\u0130TCHEN", WHERE, False),                       # a dotted capital I is not i
    ("qa2", "garden", "The apple is in the garden", "Where is the apple? ", True),
    ("qa2", "garden", "hallway", "Where is the apple? ", False),
    ("qa3", "bedroom", "bedroom before the kitchen", BEFORE, True),         # not the question's labels
    ("qa3", "bedroom", "The Bedroom, before the KITCHEN", BEFORE.upper(), True),
    ("qa3", "kitchen", "kitchen", BEFORE, False),
    ("qa4", "office", "office", "What is north of the kitchen? ", True),
    ("qa4", "office", "kitchen", "What is north of the kitchen? ", False),
    ("qa4", "office", "The office is north of the kitchen", "What is the kitchen south of? ", True),
    ("qa5", "Bill", "Bill gave the apple to Jeff", "Who gave the apple to Jeff? ", True),
    ("qa5", "Bill", "Bill gave the milk to Jeff", "Who gave the apple to Jeff? ", False),
    ("qa5", "football", "FOOTBALL", "What did Fred give to Bill? ", True),
    ("qa5", "Fred", "Freddy", "Who received the milk? ", True),
    ("qa6", "no", "no", IS, True),
    ("qa6", "no", "I do not know", IS, True),                               # fault: "no" in "not" and "know"
    ("qa6", "yes", "yes, I know", IS, False),                               # the same fault
    ("qa6", "no", "none", IS, True),
    ("qa6", "yes", "yes", IS, True),
    ("qa6", "yes", "eyes", IS, True),
    ("qa7", "none", "none", HOW, False),                                    # fault: "one" inside "none"
    ("qa7", "one", "none", HOW, False),
    ("qa7", "one", "one", HOW, True),
    ("qa7", "one", "someone", HOW, True),
    ("qa7", "two", "two or three", HOW, False),
    ("qa7", "three", "three objects", HOW, True),
    ("qa8", "apple,milk", "apple,milk", WHAT, True),
    ("qa8", "Apple,Milk", "MILK, APPLE", WHAT, True),
    ("qa8", "apple,milk", "the milk and the apple", WHAT, True),            # in any order
    ("qa8", "apple,milk", "apple", WHAT, False),
    ("qa8", "apple,milk", "apple, football and milk", WHAT, False),
    ("qa8", "apple,milk", "apple. milk", WHAT, False),
    ("qa8", "apple,football,milk", "milk football apple", WHAT, True),
    ("qa8", "apple", "apple,milk", WHAT, False),
    ("qa8", "nothing", "nothing", WHAT, True),
    ("qa8", "nothing", "nothing but milk", WHAT, False),
    ("qa8", "apple,apple", "apple", WHAT, False),                           # parts count as they are written
    ("qa8", "apple,apple", "apple milk", WHAT, True),                       # ... so this is two for two
    ("qa8", "apple, milk", "apple, milk", WHAT, False),                     # " milk" is no label
    ("qa8", "apple,", "apple", WHAT, False),
    ("qa8", "apple,milk", "apple,milk", "Is the milk there? ", False),
    ("qa9", "no", "He is no longer there", IS, True),
    ("qa9", "no", "no", "Is Mary north of here? ", False),                  # "no" is in the question
    ("qa10", "maybe", "maybe", IS, True),
    ("qa10", "maybe", "maybe not", IS, False),
    ("qa10", "no", "not maybe", IS, False),
    ("qa11", "hallway", "hallway", WHERE, True),
    ("qa12", "bathroom", "bathroom", WHERE, True),
    ("qa13", "garden", "the garden, after the bathroom", WHERE, False),
    ("qa14", "cinema", "the cinema, before the park", "Where was Mary before the park? ", True),
    ("qa14", "cinema", "garden", "Where was Mary before the park? ", False),
    ("qa14", "cinema", "cinema garden", "Where was Mary before the park? ", True),    # not a label there
    ("qa15", "wolf", "wolf", "What is Gertrude afraid of? ", True),
    ("qa15", "wolf", "wolves", "What is Gertrude afraid of? ", False),
    ("qa15", "cat", "cattle", "What is Gertrude afraid of? ", True),
    ("qa16", "gray", "Brian is gray.", "What color is Brian? ", True),
    ("qa16", "gray", "grey", "What color is Brian? ", False),
    ("qa17", "yes", "yes", "Is the pink rectangle above the red square? ", True),
    ("qa17", "no", "yes", "Is the pink rectangle above the red square? ", False),
    ("qa18", "no", "no", "Does the chest fit in the box? ", True),
    ("qa19", "s,e", "s,e", PATH, True),                                     # a comma, but only 3 characters
    ("qa19", "S,E", "S,E", PATH, True),
    ("qa19", "s,e", "s, e", PATH, False),
    ("qa19", "s,e", "e,s", PATH, False),
    ("qa19", "s,e", "n,s,e", PATH, True),                                   # n,s is no label
    ("qa19", "s,e", "s,e,n", PATH, False),
    ("qa19", "n,s", "n,s", PATH, False),
    ("qa20", "thirsty", "thirsty", "Why did yann go to the kitchen? ", True),
    ("qa20", "kitchen", "kitchen", "Where will jason go? ", True),
    ("qa20", "hungry", "hungry and tired", "Why did yann get the apple? ", False),
]


@pytest.mark.parametrize("task, target, output, question, score", SCORES)
def test_the_official_score_is_the_benchmarks_faults_included(task, target, output, question, score):
    assert official_score(task, target, output, question) is score


def test_the_table_of_scores_has_every_task_and_all_cases_differ():
    assert {row[0] for row in SCORES} == {f"qa{i}" for i in range(1, 21)}
    assert len({row[:4] for row in SCORES}) == len(SCORES)


def slow_labels(task):
    """The labels of a task, once more, by their number."""
    n = int(task[2:])
    if n in (1, 2, 3, 4, 11, 12, 13):
        return ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
    if n == 19:
        steps = ["n", "e", "s", "w"]
        return [f"{a},{b}" for i, a in enumerate(steps) for j, b in enumerate(steps) if abs(i - j) != 2]
    if n in (6, 9, 17, 18):
        return ["yes", "no"]
    return {5: ["bill", "fred", "jeff", "mary", "apple", "football", "milk"],
            7: ["none", "one", "two", "three"], 8: ["apple", "football", "milk", "nothing"],
            10: ["yes", "no", "maybe"], 14: ["bedroom", "cinema", "kitchen", "office", "park", "school"],
            15: ["cat", "mouse", "sheep", "wolf"], 16: ["gray", "green", "white", "yellow"],
            20: ["bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"]}[n]


def slow_official(task, target, output, question):
    """The benchmark's metric from its description, a character and a label at a time."""
    text, target, question = output.lower(), target.lower(), question.lower()
    for mark in (".", "<context>", "<example>", "Question"):
        for i in range(len(text)):
            if text[i:i + len(mark)] == mark:
                text = text[:i]
                break
    present = []
    for label in slow_labels(task):
        if re.search(re.escape(label), text) and not re.search(re.escape(label), question):
            present.append(label)
    if "," in target and len(target) > 3:
        parts = target.split(",")
        return len(present) == len(parts) and not [part for part in parts if part not in present]
    return present == [target]


def test_the_official_score_is_that_of_its_description_for_3000_random_outputs():
    rng, right = random.Random(0), 0
    marks = [".", "<context>", "<example>", "Question", "know", "noone", ",", "", "the", "\n", "nothing"]
    for i in range(3000):
        task = f"qa{i % 20 + 1}"
        words = slow_labels(task)
        target = ",".join(rng.choices(words, k=rng.choice([1, 1, 1, 2, 3])))
        said = rng.choices([*words, *marks], k=rng.randint(0, 3)) + [target] * (rng.random() < 0.6)
        rng.shuffle(said)
        output = rng.choice([" ", "", ","]).join(w.upper() if rng.random() < 0.2 else w for w in said)
        question = f"{rng.choice(['Where is he', 'Who', 'north'])} {rng.choice(['', *words])}? "
        expected = slow_official(task, target, output, question)
        assert official_score(task, target, output, question) is expected, (task, target, output, question)
        right += expected
    assert 400 < right < 2000


def test_the_labels_are_those_of_the_benchmark_for_all_twenty_tasks():
    assert {task: sorted(map(str.lower, labels)) for task, labels in LABELS.items()} == {
        f"qa{i}": sorted(slow_labels(f"qa{i}")) for i in range(1, 21)}
    sizes = [6, 6, 6, 6, 7, 2, 4, 4, 2, 3, 6, 6, 6, 6, 4, 4, 2, 2, 12, 7]
    assert [len(set(LABELS[f"qa{i}"])) for i in range(1, 21)] == sizes


@pytest.mark.parametrize("target, output, same", [
    ("kitchen", "kitchen", True), ("kitchen", " Kitchen. ", True), ("Kitchen", "kitchen", True),
    ("kitchen ", "kitchen", True), ("kitchen", "kitchen .", True),
    ("kitchen", "", False), ("kitchen", "the kitchen", False), ("kitchen", "kitchens", False),
    ("kitchen", "kitchen bedroom", False), ("kitchen", ".kitchen", False), ("kitchen", "kitchen!", False),
    ("kitchen", "kitchen..", False), ("none", "none", True), ("none", "one", False),
    ("apple,milk", "apple,milk", True), ("apple,milk", "milk,apple", False), ("s,e", "s, e", False)])
def test_exact_match_ignores_case_surrounding_space_and_a_final_full_stop_alone(target, output, same):
    assert exact_match(target, output) is same


@pytest.mark.parametrize("hits, n, low, high", [
    (95, 100, 0.8882, 0.9785), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0),
    (1, 2, 0.0945, 0.9055), (500, 1000, 0.4691, 0.5309), (1, 1, 0.2065, 1.0), (2.5, 10, 0.0809, 0.5578)])
def test_the_interval_is_wilsons(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_wilsons_ends_are_the_shares_that_are_196_deviations_away():
    for n in (1, 7, 200, 1000):
        for hits in range(0, n + 1, max(1, n // 9)):
            for end in wilson(hits, n):
                if 0 < end < 1:
                    assert abs(hits / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.96)


@pytest.mark.parametrize("a, b, p", [
    (0, 0, 1), (1, 0, 1), (5, 0, Fraction(1, 16)), (6, 0, Fraction(1, 32)), (9, 1, Fraction(22, 1024)),
    (8, 2, Fraction(112, 1024)), (3, 3, 1), (4, 3, 1), (10, 3, Fraction(2 * (1 + 13 + 78 + 286), 2 ** 13)),
    (5, 2, Fraction(2 * (1 + 7 + 21), 2 ** 7))])
def test_mcnemars_p_is_twice_the_binomial_tail_at_most_one(a, b, p):
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(float(p), rel=1e-12)


def test_mcnemars_p_of_large_counts_is_that_of_the_normal_curve():
    z = (1060 - 940 - 1) / math.sqrt(2000)      # with the correction for continuity
    assert mcnemar(1060, 940) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


# Tables

def prediction(memory="on", target="garden", output="garden", outside=False, task="qa1", length=4000, i=0,
               model="lm2", found=None, **more):
    return dict(model=model, task=task, length=length, i=i, memory=memory, question="Where is Mary?",
                target=target, output=output, outside=outside, found=found, seconds=0.1) | more


def test_the_floor_is_what_the_best_constant_answer_gets():
    rows = [prediction(target=t, output="x") for t in ("garden", "Garden", "office", "garden", "kitchen")]
    assert floor("exact", rows) == floor("official", rows) == 3 and floor("exact", rows[2:3]) == 1
    assert floor("exact", []) == floor("official", []) == 0


def test_the_floor_of_the_official_metric_knows_its_faults():
    rows = [prediction(target=t, task="qa7") for t in ("none", "none", "none", "one", "two", "two")]
    assert (floor("exact", rows), floor("official", rows)) == (3, 2)
    rows = [prediction(target="kitchen", question=BEFORE) for _ in range(3)] + [prediction(target="office")]
    assert (floor("exact", rows), floor("official", rows)) == (3, 1)
    rows = [prediction(target=t, task="qa8") for t in ("apple,milk", "milk,apple", "apple")]
    assert (floor("exact", rows), floor("official", rows)) == (1, 2)
    rows = [prediction(target=t, task="qa6") for t in ("yes", "no", "no")]      # nobody has said so
    assert (floor("exact", rows), floor("official", rows)) == (2, 2)


def test_the_counts_of_a_cell():
    rows = [prediction("on", "kitchen", "kitchen", True, found=True),
            prediction("on", "kitchen", "the kitchen", True, found=False),
            prediction("on", "garden", "garden", None, found=None),
            prediction("on", "office", "garden", False),
            prediction("on", "kitchen", "I know", True, found=True),
            prediction("on", "garden", "garden", length=0)]
    first, second = cells(rows)
    assert first == dict(model="lm2", memory="on", task="qa1", length=4000, n=5, exact=2, floor=3, official=3,
                         floor_official=3, outside_n=3, outside_exact=1, floor_outside=3, found_n=3, found=2)
    assert second == dict(model="lm2", memory="on", task="qa1", length=0, n=1, exact=1, floor=1, official=1,
                          floor_official=1, outside_n=0, outside_exact=0, floor_outside=0)


def test_models_modes_tasks_and_lengths_each_make_a_cell():
    rows = [prediction(m, model=name, task=t, length=n) for m in ("on", "off") for name in ("a", "b")
            for t in ("qa1", "qa2") for n in (0, 9) for _ in range(2)]
    assert [c["n"] for c in cells(rows)] == [2] * 16
    assert len({(c["memory"], c["model"], c["task"], c["length"]) for c in cells(rows)}) == 16


def cell(hits=50, n=100, model="lm2", memory="on", task="qa1", length=0, **more):
    return dict(model=model, memory=memory, task=task, length=length, n=n, exact=hits, floor=n // 4,
                official=hits, floor_official=n // 5, outside_n=0, outside_exact=0, floor_outside=0) | more


def lines_of(text, title):
    """The cells of each line of a table's block, by its first two words."""
    block = text.split(title + "\n")[1].split("\n\n")[0].split("\n[ , ]")[0].splitlines()
    return {tuple(line.split()[:2]): re.sub(r" \[ *", "[", line).split()[2:] for line in block[1:]}


EXACT, OUTSIDE = "exact match in %", "exact match in %, facts outside the window"
OFFICIAL, FOUND = "the benchmark's own metric in %", "retrieval has all needed facts, in %"


def test_the_table_shows_exact_and_official_answers_the_floor_and_the_samples_outside():
    on = [prediction("on", "kitchen", "kitchen", True), prediction("on", "kitchen", "the kitchen", True),
          prediction("on", "garden", "garden"), prediction("on", "office", "garden", True)]
    off = [dict(r, memory="off", output="garden") for r in on]
    text = table(cells(on + off))
    assert lines_of(text, EXACT) == {("qa1", "4k"): ["4", "50.0", "50.0[15,85]", "25.0[5,70]"]}
    assert lines_of(text, OUTSIDE) == {("qa1", "4k"): ["3", "66.7", "33.3[6,79]", "0.0[0,56]"]}
    assert lines_of(text, OFFICIAL) == {("qa1", "4k"): ["4", "50.0", "75.0[30,95]", "25.0[5,70]"]}
    assert FOUND not in text


def test_the_share_that_retrieval_has_found_stands_under_the_column_that_retrieves():
    rows = [prediction("on"), *(prediction("rag", found=found) for found in (True, True, True, False))]
    text = table(cells(rows))
    assert lines_of(text, FOUND) == {("qa1", "4k"): ["4", "75.0[30,95]"]}
    head = text.split(FOUND + "\n")[1].splitlines()[0]
    assert head.split() == ["task", "length", "n", "floor", "lm2", "rag"]


def test_tasks_and_lengths_stand_in_their_order_whatever_the_order_of_the_rows():
    figures = [cell(task=t, length=n) for t in ("qa10", "qa2", "qa1") for n in (1_000_000, 0, 16_000, 150)]
    assert list(lines_of(table(figures), EXACT)) == [(t, n) for t in ("qa1", "qa2", "qa10")
                                                     for n in ("0k", "150", "16k", "1M")]


@pytest.mark.parametrize("n_tasks, groups", [
    (4, []), (5, ["qa1-5"]), (9, ["qa1-5"]), (10, ["qa1-5", "qa1-10"])])
def test_means_over_tasks_appear_only_where_all_of_them_are_there(n_tasks, groups):
    figures = [cell(hits=10 * i, task=f"qa{i}", memory=m, length=n) for i in range(1, n_tasks + 1)
               for m in ("on", "off") for n in (0, 1000) if (n, m, i) != (1000, "off", 3)]
    found = lines_of(table(figures), EXACT)
    means = [key for key in found if key[0].startswith("qa1-")]
    assert means == [(g, n) for g in groups for n in ("0k", "1k")]
    for group in groups:
        size = int(group[4:])
        mean = sum(10 * i for i in range(1, size + 1)) / size
        low, high = wilson(mean / 100 * 100 * size, 100 * size)
        shown = f"{mean:.1f}[{100 * low:.0f},{100 * high:.0f}]"
        assert found[group, "0k"] == [str(100 * size), "25.0", shown, shown]
        assert found[group, "1k"] == [str(100 * size), "25.0", shown, "-"]      # off lacks qa3 there


def test_a_mean_weighs_tasks_alike_however_many_samples_they_have():
    sizes = (10, 10, 400, 10, 70)
    figures = [cell(hits=n if i < 3 else 0, n=n, task=f"qa{i}") for i, n in enumerate(sizes, 1)]
    floors = [2 / 10, 2 / 10, 100 / 400, 2 / 10, 17 / 70]
    likely = [(n * (i < 3) + 1) / (n + 2) for i, n in enumerate(sizes, 1)]      # not 0 and 1 for sure
    reach = 1.96 * sum(p * (1 - p) / n for p, n in zip(likely, sizes)) ** 0.5 / 5
    assert lines_of(table(figures), EXACT)["qa1-5", "0k"] == [
        "500", f"{100 * sum(floors) / 5:.1f}", f"40.0[{40 - 100 * reach:.0f},{40 + 100 * reach:.0f}]"]


def test_a_mean_of_tasks_that_differ_is_more_certain_than_one_share_of_all_their_samples():
    apart, alike = ([cell(hits=h, n=100, task=f"qa{i}") for i, h in enumerate(hits, 1)]
                    for hits in ((10, 10, 50, 90, 90), (50, 50, 50, 50, 50)))
    assert pooled(alike, "n", "exact")[1] == pytest.approx(500)
    assert pooled(apart, "n", "exact")[1] > 900
    assert pooled(apart[:1], "n", "exact") == pytest.approx((10, 100))


def test_columns_of_other_numbers_of_samples_have_lines_of_their_own():
    figures = [cell(10, n, memory=m, task=f"qa{i}", floor=base) for i in range(1, 6)
               for m, n, base in (("on", 100, 20), ("off", 50, 15), ("other", 100, 20))]
    lines = table(figures, ["exact"]).splitlines()
    shown = [re.sub(r" \[[^]]*\]", "", x).split() for x in lines if x.split()[0] in ("qa3", "qa1-5")]
    assert shown == [["qa3", "0k", "100", "20.0", "10.0", "-", "10.0"],
                     ["qa3", "0k", "50", "30.0", "-", "20.0", "-"],
                     ["qa1-5", "0k", "500", "20.0", "10.0", "-", "10.0"],
                     ["qa1-5", "0k", "250", "30.0", "-", "20.0", "-"]]


def test_of_a_long_name_the_end_is_shown_and_the_mode():
    figures = [cell(model=name, memory=m) for name in ("a-long-name-seed1", "a-long-name-seed2", "b")
               for m in ("on", "other")]
    heads = [line for line in table(figures, ["exact"]).splitlines() if line.startswith("  task")]
    assert [head[24:].split() for head in heads] == [
        ["name-seed1", "on", "e-seed1", "other", "name-seed2", "on", "e-seed2", "other"],
        ["b", "on", "b", "other"]]


@pytest.mark.parametrize("metrics, titles", [
    (("exact", "official"), [EXACT, OUTSIDE, FOUND, OFFICIAL]), (("official",), [OFFICIAL]),
    (("exact",), [EXACT, OUTSIDE, FOUND]), (("official", "exact"), [OFFICIAL, EXACT, OUTSIDE, FOUND])])
def test_the_metrics_asked_for_are_shown_in_that_order(metrics, titles):
    text = table([cell(outside_n=3, found_n=5, found=2)], metrics)
    assert [line for line in text.splitlines() if line in (EXACT, OUTSIDE, FOUND, OFFICIAL)] == titles


def test_more_than_four_columns_stand_in_parts_and_each_column_in_one():
    names = [(f"model{i}", mode) for i in range(3) for mode in ("on", "off", "other")]
    text = table([cell(hits=i, model=m, memory=mode) for i, (m, mode) in enumerate(names)], ["exact"])
    heads = [re.findall(r"model\d \w+", line) for line in text.splitlines() if line.startswith("  task")]
    assert heads == [[" ".join(name) for name in names[i:i + 4]] for i in (0, 4, 8)]
    shown = [re.findall(r"(\d+\.\d) \[", line) for line in text.splitlines() if line.startswith("   qa1")]
    assert shown == [[f"{i}.0" for i in range(a, b)] for a, b in ((0, 4), (4, 8), (8, 9))]


def test_no_line_of_the_table_is_wider_than_80_columns_whatever_the_figures():
    rng, names = random.Random(0), ["a-model-with-a-name-of-many-words", "b", "c" * 40, "model number four"]
    for n in (1, 7, 200, 1000):
        shares = [0, 1, n - 1, n]
        figures = [cell(rng.choice(shares), n, name, memory, f"qa{i}", length, floor=rng.choice(shares),
                        outside_n=n, outside_exact=rng.choice(shares), found_n=n, found=rng.choice(shares))
                   for name in names for memory in ("off", "other") for i in range(1, 21)
                   for length in (0, 15_699, 127_695, 10_000_000)]
        text = table(figures)
        assert sorted(line for line in text.splitlines() if len(line) > 80) == []
        assert text.count("outh") == 0 and text.count("qa1-10") >= 4 * 2


@pytest.mark.parametrize("wrong", [1, 2, 5])
def test_a_mean_of_thousands_that_is_almost_right_is_no_wider_than_others(wrong):
    figures = [cell(1000 - wrong * (i == 1), 1000, memory=m, task=f"qa{i}", floor=1000)
               for m in ("on", "off", "other", "rag") for i in range(1, 11)]
    assert sorted(line for line in table(figures).splitlines() if len(line) > 80) == []


@pytest.mark.parametrize("hits, n, shown", [
    (0, 0, "-"), (1, 3, "33.3 [6,79]"), (3, 3, "100 [44,100]"), (0, 200, "0.0 [0,2]"),
    (199, 200, "99.5 [97,100]"), (198, 200, "99.0 [96,100]")])
def test_a_share_is_shown_with_its_interval(hits, n, shown):
    assert percent(hits, n) == shown and len(shown) <= 13


def pairs(**columns):
    """Rows of columns: of each a string, r for a right answer, w for a wrong one, - for none."""
    return [prediction(name, output="garden" if mark == "r" else "office", i=i)
            for name, marks in columns.items() for i, mark in enumerate(marks) if mark != "-"]


def test_two_columns_are_compared_on_the_questions_that_both_have_answered():
    rows = pairs(on="rrrrrrrw-r", off="wwwwwrwwrr")
    random.Random(0).shuffle(rows)
    line, = [x for x in compare(rows, "lm2 on", "lm2 off").splitlines() if x.lstrip().startswith("qa1")]
    assert line.split() == ["qa1", "4k", "9", "88.9", "22.2", "6", "0", f"{2 / 64:.4f}"]
    back, = [x for x in compare(rows, "lm2 off", "lm2 on").splitlines() if x.lstrip().startswith("qa1")]
    assert back.split() == ["qa1", "4k", "9", "22.2", "88.9", "0", "6", f"{2 / 64:.4f}"]


def test_a_comparison_pairs_by_task_and_length_and_adds_them_up():
    rows = [prediction(m, task=t, length=n, i=i, output=o) for t, n, i, on, off in (
        ("qa1", 0, 0, "garden", "x"), ("qa1", 1000, 0, "x", "garden"), ("qa2", 0, 0, "garden", "x"),
        ("qa2", 0, 1, "garden", "garden")) for m, o in (("on", on), ("off", off))]
    found = [x.split() for x in compare(rows, "lm2 on", "lm2 off").splitlines()[2:-2]]
    assert found == [["qa1", "0k", "1", "100.0", "0.0", "1", "0", "1.0000"],
                     ["qa1", "1k", "1", "0.0", "100.0", "0", "1", "1.0000"],
                     ["qa2", "0k", "2", "100.0", "50.0", "1", "0", "1.0000"],
                     ["all", "4", "75.0", "50.0", "2", "1", "1.0000"]]


def test_answers_to_other_questions_are_no_pair_and_are_counted():
    asked = [dict(question="Where is Mary?"), dict(question="Where is Bill?"), dict(target="office"), {}]
    rows = [prediction("on", i=i) for i in range(4)] + [prediction("off", i=7)]
    rows += [prediction("off", i=i) | change for i, change in enumerate(asked)]
    lines = compare(rows, "lm2 on", "lm2 off").splitlines()
    assert lines[2].split()[2] == "2" and lines[-1].startswith("5 answers have no partner")
    assert "no partner" not in compare(rows, "lm2 on", "lm2 on")
    with pytest.raises(ValueError, match="'lm2 on' and 'lm2 off' have answered no question in common"):
        compare(rows[1:3] + rows[6:8], "lm2 on", "lm2 off")


def test_a_comparison_uses_the_metric_and_names_both_columns_and_small_ps():
    rows = [prediction(m, output=o, i=i, model=name) for i in range(20)
            for name, m, o in (("a b", "on", "the garden"), ("c", "rag", "office"))]
    exact, official = (compare(rows, "a b on", "c rag", m).splitlines() for m in ("exact", "official"))
    assert exact[0] == "exact: A = a b on, B = c rag" and exact[2].split()[-3:] == ["0", "0", "1.0000"]
    assert official[0] == "official: A = a b on, B = c rag"
    assert official[2].split()[-4:] == ["20", "0", "<", ".0001"]
    assert max(map(len, exact + official)) <= 80


@pytest.mark.parametrize("names", [("lm2 on", "lm2 of"), ("on", "lm2 on"), ("LM2 on", "lm2 on")])
def test_a_column_that_is_not_there_is_named_with_those_that_are(names):
    wrong = next(n for n in names if n != "lm2 on")
    with pytest.raises(ValueError) as error:
        compare(pairs(on="rw", off="rr"), *names)
    assert repr(wrong) in str(error.value) and "'lm2 on', 'lm2 off'" in str(error.value)


# Reading and answering


def prompts(tok, *lengths):
    """Prompts of random tokens."""
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, tok.n_vocab, n) for n in lengths]


def start_of_last_segment(n_tokens, segment_len):
    """Where the segment of the last token begins."""
    start = 0
    while start + segment_len < n_tokens:
        start += segment_len
    return start


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
            seen = seen[start_of_last_segment(len(seen), model.cfg.segment_len) :]
        logits, _, _ = model(torch.tensor([seen]), state=state)
        new = logits[0, -1].argmax().item()
        if new == tok.eot:
            break
        new_ids.append(new)
    return tok.decode(new_ids).strip()


@torch.no_grad()
def found_by_last_segment(model, prompt):
    """What the last segment of a prompt (T,) finds when the whole prompt is read in one call."""
    _, _, state = model(torch.from_numpy(prompt)[None])
    return state.carried


def documents(tok, rows):
    """Documents that ask with these prompts."""
    document = from_text(tok, "", "?", "garden")
    found = []
    for prompt in rows:
        place = (len(prompt), len(prompt) + 2)
        found.append(document._replace(ids=np.append(prompt, [0, 0]), answers=[place]))
    return found


def outputs_of(model, tok, rows, mode):
    """The answers of `ask` to these prompts in one mode."""
    outputs, _, _ = ask(model, tok, documents(tok, rows), [mode], 1)[mode]
    return outputs


def watch_calls(monkeypatch, model):
    """A list that gets the ids and the state of every call of the model."""
    calls = []
    forward = model.forward

    def watched(idx, *args, state=None, **options):
        calls.append((idx, state))
        return forward(idx, *args, state=state, **options)

    monkeypatch.setattr(model, "forward", watched)
    return calls


def refuse_to_read(monkeypatch, model):
    """From now on the test fails if the model reads a document."""
    monkeypatch.setattr(model, "read", lambda *_, **__: pytest.fail("a document was read"))


MIXED = (S - 1, S, S + 1, 2 * S, 5, 2 * S + 1, 3 * S - 1, 3 * S, 1, 6 * S + 7, S + 1, 3 * S + 20)


@pytest.mark.parametrize(
    "lengths", [MIXED, MIXED[::-1], (5, 5, 5), (S,), (1, 9 * S), (4 * S + 1, 2)]
)
def test_prompts_of_any_lengths_in_one_batch_get_the_answers_of_reading_each_in_one_call(
    model, tok, lengths
):
    rows = prompts(tok, *lengths)
    together = answer(model, tok, rows, read_before_last(model, rows))
    assert together == [greedy(model, tok, row) for row in rows]
    alone = []
    for row in rows:
        alone += answer(model, tok, [row], read_before_last(model, [row]))
    assert together == alone


def test_memory_off_predicts_each_token_from_its_own_segment_alone(model, tok):
    rows = prompts(tok, *MIXED)
    expected = [greedy(model, tok, row, memory=False) for row in rows]
    assert outputs_of(model, tok, rows, "off") == expected
    assert answer(model, tok, rows, None) == expected


def test_memory_on_and_off_differ_and_answers_end_at_different_places(model, tok):
    rows = prompts(tok, *range(80, 92))
    on = outputs_of(model, tok, rows, "on")
    off = outputs_of(model, tok, rows, "off")
    n_different = sum(a != b for a, b in zip(on, off, strict=True))
    assert n_different > 6
    assert len({len(tok.encode(text)) for text in on}) > 2


def test_what_is_read_before_the_last_segment_is_what_it_finds_in_one_call(model, tok):
    rows = prompts(tok, *MIXED)
    state = read_before_last(model, rows)
    assert state.open_ids.shape == (len(rows), 0)
    assert state.segment_len == S
    for j, row in enumerate(rows):
        expected = found_by_last_segment(model, row)
        for have, want in zip(state.carried, expected, strict=True):
            assert (have[j] - want[0]).abs().max() < 1e-12


def test_each_prompt_is_read_once_up_to_the_first_token_of_its_last_segment(
    model, tok, monkeypatch
):
    rows = prompts(tok, *MIXED)
    calls = watch_calls(monkeypatch, model)
    read_before_last(model, rows)
    read = []
    for idx, _ in calls:
        read += idx.tolist()
    expected = []
    for row in rows:
        start = start_of_last_segment(len(row), S)
        if start > 0:
            expected.append(row[: start + 1].tolist())
    assert sorted(read) == sorted(expected)


def test_prompts_of_equally_many_segments_are_read_in_one_call(model, tok, monkeypatch):
    rows = prompts(tok, S + 1, 2 * S, 2 * S + 1, S + 5, 3)
    calls = watch_calls(monkeypatch, model)
    read_before_last(model, rows)
    assert sorted(tuple(idx.shape) for idx, _ in calls) == [(1, 2 * S + 1), (3, S + 1)]


@pytest.mark.parametrize(
    "lengths", [(100, 40, 200, 70), (100, 40, 200), (30, 200), (64, 65, 66, 67, 68, 69, 300)]
)
def test_other_answers_from_the_memory_of_the_neighbour(model, tok, lengths):
    rows = prompts(tok, *lengths)
    expected = []
    for j, row in enumerate(rows):
        lender = j + 1 if j % 2 == 0 else j - 1
        if lender == len(rows):
            lender = j - 1
        state = model.initial_state(1)
        state.carried = found_by_last_segment(model, rows[lender])
        last = row[start_of_last_segment(len(row), S) :]
        expected.append(greedy(model, tok, last, state=state))
    found = outputs_of(model, tok, rows, "other")
    assert found == expected
    own = [greedy(model, tok, row) for row in rows]
    n_different = sum(a != b for a, b in zip(found, own, strict=True))
    assert n_different >= len(rows) // 2


def test_an_answer_that_goes_on_in_the_next_segment_sees_what_the_full_one_has_written(model, tok):
    rows = prompts(tok, *[n_segments * S - k for n_segments in (1, 2) for k in range(6)])
    on = outputs_of(model, tok, rows, "on")
    off = outputs_of(model, tok, rows, "off")
    assert on == [greedy(model, tok, row) for row in rows]
    assert off == [greedy(model, tok, row, memory=False) for row in rows]
    crosses = [len(tok.encode(text)) > 6 for text in on]
    assert sum(crosses) > 4
    # It matters: behind a single segment, the next one alone goes on differently.
    n_different = 0
    for i in range(6):
        if crosses[i] and on[i] != off[i]:
            n_different += 1
    assert n_different > 0


def test_memory_off_gives_the_model_nothing_before_the_last_segment(model, tok, monkeypatch):
    rows = prompts(tok, 9 * S + 4, 5 * S, 40)
    calls = watch_calls(monkeypatch, model)
    refuse_to_read(monkeypatch, model)
    outputs_of(model, tok, rows, "off")
    first, _ = calls[0]
    assert first.shape == (3, S)  # the longest of 4, 32 and 8 tokens
    for given, row, n in zip(first, rows, (4, 32, 8), strict=True):
        assert given[:n].tolist() == row[-n:].tolist()
    assert len(calls) > 1
    for idx, state in calls:
        assert idx.shape[1] <= S
        assert state is None


def test_a_model_without_memory_reads_the_last_segment_alone_and_on_is_off(tok, monkeypatch):
    llama = loud(tok, n_mem_layer=0)
    rows = prompts(tok, *MIXED)
    refuse_to_read(monkeypatch, llama)
    expected = [greedy(llama, tok, row) for row in rows]
    assert expected == [greedy(llama, tok, row, memory=False) for row in rows]
    for mode in ("on", "off", "other"):
        assert outputs_of(llama, tok, rows, mode) == expected
    assert len(set(expected)) > 4


@pytest.mark.parametrize(
    "sizes",
    [dict(n_layer=3, n_mem_layer=1), dict(n_layer=3, n_mem_layer=2), dict(n_mem_token=3)],
)
def test_a_model_with_memory_in_some_blocks_or_with_memory_tokens_is_asked_as_any_other(tok, sizes):
    some = loud(tok, **sizes)
    rows = prompts(tok, *MIXED)
    on = outputs_of(some, tok, rows, "on")
    off = outputs_of(some, tok, rows, "off")
    assert on == [greedy(some, tok, row) for row in rows]
    assert off == [greedy(some, tok, row, memory=False) for row in rows]
    assert on != off
    borrowed = some.initial_state(1)
    borrowed.carried = found_by_last_segment(some, rows[1])
    first = greedy(some, tok, rows[0], state=borrowed)  # it has a single segment
    assert outputs_of(some, tok, rows, "other")[0] == first


@pytest.mark.parametrize("size", [1, 3])
def test_a_question_longer_than_a_segment_is_answered(tok, val_set, size):
    small = loud(tok, segment_len=size, n_slot=3)
    samples = generated(val_set, 0)
    docs = [samples("qa1", n, 0) for n in (0, 30, 31)]
    assert len(tok.encode(" " + docs[0].questions[0].text)) > size
    outputs = ask(small, tok, docs, ["on", "off"], 1)
    for mode, memory in (("on", True), ("off", False)):
        expected = [greedy(small, tok, doc.prompt(), memory) for doc in docs]
        assert outputs[mode][0] == expected
    assert [doc.outside(size) for doc in docs] == [True] * 3


def test_rag_answers_from_the_question_behind_the_retrieved_sentences_read_with_memory(
    model, tok, val_set
):
    docs = [generated(val_set, 0)("qa1", 400, i) for i in range(5)]
    outputs, found, _ = ask(model, tok, docs, ["rag"], 8)["rag"]
    short = [doc.retrieve(tok, 8) for doc in docs]
    assert min(len(ids) for ids, _ in short) > 2 * S
    assert outputs == [greedy(model, tok, ids) for ids, _ in short]
    assert found == [is_there for _, is_there in short]


def test_the_seconds_are_a_documents_and_reading_counts_in_each_mode_that_needs_it(
    tok, monkeypatch
):
    now = [0.0]

    def taking(seconds, result):
        def run(*_, **__):
            now[0] += seconds
            return result

        return run

    monkeypatch.setattr(babilong_eval.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(babilong_eval, "read_before_last", taking(8, None))
    monkeypatch.setattr(babilong_eval, "answer", taking(2, ["x"] * 4))
    monkeypatch.setattr(babilong_eval, "of_rows", lambda *_: None)
    model = loud(tok)
    docs = documents(tok, prompts(tok, 5, 6, 7, 8))
    modes = ["on", "off", "other", "rag"]
    found = ask(model, tok, docs, modes, 1)
    assert [found[mode][2] for mode in modes] == [2.5, 0.5, 2.5, 2.5]
    assert now[0] == 8 + 3 * 2 + 8 + 2
    found = ask(model, tok, docs, ["off"], 1)
    assert found["off"][2] == 0.5
    assert now[0] == 8 + 3 * 2 + 8 + 2 + 2


def test_rows_of_a_state_are_those_of_its_tensors_in_the_asked_order(model, tok):
    idx = torch.from_numpy(np.stack(prompts(tok, S + 9, S + 9, S + 9)))
    state = model.read(idx)
    part = of_rows(state, [2, 0])
    assert torch.equal(part.open_ids, idx[[2, 0], S:])
    assert part.segment_len == S
    for all_rows, two_rows in zip(state.carried, part.carried, strict=True):
        assert torch.equal(two_rows, all_rows[[2, 0]])


@pytest.mark.parametrize("n, size, in_pairs, sizes", [
    (5, 2, False, [2, 2, 1]), (5, 2, True, [2, 3]), (4, 2, True, [2, 2]), (5, 0, False, [1] * 5),
    (5, 1, True, [2, 3]), (7, 3, True, [2, 2, 3]), (7, 5, True, [4, 3]), (3, 100, True, [3]),
    (9, 4, True, [4, 5]), (1, 2, True, [1]), (2, 2, True, [2]), (6, 4, False, [4, 2])])
def test_batches_hold_every_sample_once_in_order_and_pairs_stay_together(n, size, in_pairs, sizes):
    found = batches(n, size, in_pairs)
    assert [i for batch in found for i in batch] == list(range(n)) and [len(b) for b in found] == sizes


# Evaluating

def by_key(rows, *fields):
    rows = [r for batch in rows for r in batch] if rows and not isinstance(rows[0], dict) else rows
    found = {tuple(r[k] for k in ("model", "task", "length", "i", "memory")): tuple(r[f] for f in fields)
             for r in rows}
    assert len(found) == len(rows)
    return found


FIELDS = ("question", "target", "output", "outside", "found")


def test_samples_and_answers_depend_on_seed_task_length_and_i_alone(model, tok, val_set):
    def found(work, seed=3, **more):
        return by_key(list(evaluate(model, tok, generated(val_set, seed), work, **more)), *FIELDS)
    modes = ("on", "off", "other", "rag")
    every = found([(t, n, 6) for t in ("qa2", "qa1") for n in (0, 150)], modes=modes, rag=3)
    assert len(every) == 2 * 2 * 6 * 4
    few = found([("qa1", 150, 3), ("qa1", 0, 2)], modes=("off", "rag"), rag=3, max_tokens=1)
    assert len(few) == 10 and few.items() <= every.items()
    many = found([("qa1", 150, 9)], modes=("on",), max_tokens=9000)
    assert len(many) == 9 and len(many.keys() & every.keys()) == 6
    assert all(many[k] == every[k] for k in many.keys() & every.keys())
    others = found([("qa1", 150, 6)], seed=4, modes=("on",))
    assert all(others[k][:2] != every[k][:2] or others[k][2] != every[k][2] for k in others)


def test_every_sample_of_a_cell_is_another_one(tok, val_set):
    samples = generated(val_set, 0)
    made = [samples(t, n, i).ids.tolist() for t in ("qa1", "qa2") for n in (150, 151) for i in range(5)]
    assert len({tuple(ids[:60]) for ids in made}) == 20
    assert samples("qa2", 151, 4).ids.tolist() == made[-1]      # again, in another order
    assert samples("qa1", 150, 0).ids.tolist() == made[0]


def test_a_prediction_belongs_to_its_sample(model, tok, val_set):
    samples = generated(val_set, 3)
    rows = sum(evaluate(model, tok, samples, [("qa1", 150, 5)], ("on", "rag"), rag=2, name="tiny"), [])
    assert sorted((r["i"], r["memory"]) for r in rows) == [(i, m) for i in range(5) for m in ("on", "rag")]
    for r in rows:
        doc = samples("qa1", 150, r["i"])
        ids, found = (doc.prompt(), None) if r["memory"] == "on" else doc.retrieve(tok, 2)
        assert r == dict(model="tiny", task="qa1", length=150, i=r["i"], memory=r["memory"],
                         question=doc.questions[0].text, target=doc.questions[0].answer,
                         output=greedy(model, tok, ids), outside=doc.outside(S), found=found,
                         seconds=r["seconds"])
        assert 0 < r["seconds"] < 5
    assert {r["outside"] for r in rows} == {True, False}


def test_answers_with_another_documents_bank_do_not_hang_on_the_batches(model, tok, val_set):
    samples = generated(val_set, 3)
    docs = [samples("qa1", 150, i) for i in range(5)]
    expected = ask(model, tok, docs, ["other"], 1)["other"][0]
    for max_tokens in (1, 6000, 12_000, 200_000):
        made = evaluate(model, tok, samples, [("qa1", 150, 5)], ("other", "on"), max_tokens=max_tokens)
        rows = sum(made, [])
        assert [r["output"] for r in rows if r["memory"] == "other"] == expected


def counted(monkeypatch):
    """A list that gets the number of documents and the modes of every batch that is asked."""
    asked = []

    def watched(model, tokenizer, docs, modes, rag):
        asked.append((len(docs), list(modes)))
        return ask(model, tokenizer, docs, modes, rag)
    monkeypatch.setattr(babilong_eval, "ask", watched)
    return asked


def test_what_is_done_is_not_asked_again_and_the_rest_of_its_batch_is(model, tok, val_set, monkeypatch):
    asked = counted(monkeypatch)
    done = {("lm2", "qa1", 0, i, mode) for i in range(4) for mode in ("on", "off") if (i, mode) != (1, "off")}
    done |= {("twin", "qa1", 0, 1, "off"), ("lm2", "qa2", 0, 1, "off"), ("lm2", "qa1", 9, 1, "off")}
    rows = sum(evaluate(model, tok, generated(val_set, 3), [("qa1", 0, 5)], max_tokens=6000, done=done), [])
    assert asked == [(2, ["off"]), (1, ["on", "off"])]
    assert sorted((r["i"], r["memory"]) for r in rows) == [(1, "off"), (4, "off"), (4, "on")]


def test_a_batch_holds_as_many_samples_as_the_tokens_allow(model, tok, val_set, monkeypatch):
    asked = counted(monkeypatch)
    for max_tokens, sizes in ((12_500, [2, 2, 1]), (6_000, [1] * 5), (1, [1] * 5), (40_000, [5])):
        list(evaluate(model, tok, generated(val_set, 0), [("qa1", 6000, 5)], ("off",), max_tokens=max_tokens))
        assert asked == [(n, ["off"]) for n in sizes]
        asked.clear()


@pytest.mark.parametrize("mode", [True, False])
def test_evaluating_is_done_in_evaluation_mode_and_leaves_the_model_as_it_was(model, tok, val_set, mode):
    model.train(mode)
    for _ in evaluate(model, tok, generated(val_set, 0), [("qa1", 0, 2)], max_tokens=1):
        assert not model.training
    assert model.training is mode


# The forecast

def clocked(monkeypatch, val_set):
    """forecast(work) where a token of a prompt takes a millisecond; the lengths that were asked."""
    now, asked, samples = [0.0], [], generated(val_set, 0)

    def slow(model, tokenizer, docs, modes, rag):
        asked.extend(d.context_len for d in docs)
        now[0] += sum(len(d.prompt()) for d in docs) / 1000
    monkeypatch.setattr(babilong_eval, "ask", slow)
    monkeypatch.setattr(babilong_eval.time, "perf_counter", lambda: now[0])
    return lambda work: forecast(None, None, samples, work, ["on"], 0), asked


def test_the_forecast_is_the_time_of_a_few_samples_times_their_number(monkeypatch, val_set):
    predict, asked = clocked(monkeypatch, val_set)
    work = [("qa1", 1000, 100), ("qa2", 1000, 50), ("qa1", 4000, 10)]
    assert predict(work) == pytest.approx((150 * 1006 + 10 * 4006) / 1000, rel=0.01)
    assert {n: asked.count(n) for n in set(asked)}.keys() == {1000, 4000} and len(asked) < 20


@pytest.mark.parametrize("n, max_tokens, mode, size", [
    (400, 200_000, "on", 40), (400, 30_000, "off", 10), (30, 200_000, "on", 3), (1, 200_000, "on", 2),
    (400, 1, "on", 2), (400, 1, "other", 2)])
def test_the_forecast_tries_a_batch_like_those_of_the_run_with_all_tasks_in_turn(
        monkeypatch, n, max_tokens, mode, size):
    tried = []
    monkeypatch.setattr(babilong_eval, "ask", lambda model, tokenizer, docs, modes, rag: tried.append(docs))
    forecast(None, None, lambda *cell: cell, [("qa1", 900, n), ("qa2", 900, n)], [mode], 0, max_tokens)
    assert len(tried) == 2 and tried[0] == tried[1] and len(tried[1]) == size    # the first call is slow
    assert all(length == 900 and i < n for _, length, i in tried[1])
    assert [task for task, *_ in tried[1]] == (["qa1", "qa2"] * size)[:size]


def test_the_forecast_of_a_single_sample_is_its_time(monkeypatch, val_set):
    predict, _ = clocked(monkeypatch, val_set)
    assert predict([("qa1", 1000, 1)]) == pytest.approx(1.006, rel=0.01)


def test_the_forecast_beyond_64k_grows_with_the_length_and_tries_none_of_it(monkeypatch, val_set):
    predict, asked = clocked(monkeypatch, val_set)
    seconds = predict([("qa1", 1000, 10), ("qa1", 64_000, 5), ("qa1", 1_000_000, 3)])
    assert seconds == pytest.approx((10 * 1006 + 5 * 64_006 + 3 * 1_000_000) / 1000, rel=0.01)
    assert max(asked) == 64_000


def test_a_million_tokens_alone_are_not_read_for_the_sake_of_a_forecast(monkeypatch, val_set):
    predict, asked = clocked(monkeypatch, val_set)
    assert predict([("qa1", 1_000_000, 2)]) == pytest.approx(2000, rel=0.01)
    assert sum(asked) < 500_000


def test_nothing_left_takes_no_time_and_asks_nothing(monkeypatch, val_set):
    predict, asked = clocked(monkeypatch, val_set)
    assert predict([]) == 0 and asked == []


def test_the_cost_is_the_mean_of_each_model_length_and_mode():
    rows = [prediction(m, model=name, length=n, seconds=s) for name, m, n, s in (
        ("a", "on", 4000, 0.5), ("a", "on", 4000, 1.5), ("a", "off", 4000, 0.25), ("a", "on", 0, 0.125),
        ("b", "rag", 4000, 2.0))]
    assert babilong_eval.report_cost(rows).splitlines() == [
        "seconds a sample", "a 4k: on 1.000, off 0.250; 4,000 tokens/s", "a 0k: on 0.125", "b 4k: rag 2.000"]


# The file of answers

@pytest.fixture(scope="module")
def ckpt(model, tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ckpt.pt"
    save_checkpoint(path, model, tokenizer=tok.ranks)
    return path


@pytest.fixture(scope="module")
def cli(ckpt, folder):
    """cli(*flags) runs the evaluation of the tiny model on the tiny background -> what it printed."""
    def run(*flags):
        flags = [str(x) for x in flags]
        base = [] if "--ckpt" in flags else ["--ckpt", str(ckpt)]
        base += [] if "--background" in flags else ["--background", str(folder)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            babilong_eval.main(base + flags)
            return sys.stdout.getvalue()
    return run


@pytest.fixture
def denied(capsys, ckpt, folder):
    """denied(*flags): the one line with which the same ends."""
    def run(*flags):
        base = [] if "--ckpt" in flags else ["--ckpt", ckpt]
        return refused(capsys, babilong_eval.main, *base, "--background", folder, *flags)
    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "p.jsonl"


@pytest.fixture
def no_forecast(monkeypatch):
    monkeypatch.setattr(babilong_eval, "forecast", lambda *_: 0.0)


def answers(path):
    """The rows of a file without the seconds, by what they answer; none is there twice."""
    return by_key(load(path), *FIELDS)


FULL = ["--tasks", "qa1", "--lengths", "0k", "100", "--n", "4", "--memory", "on", "off", "other",
        "--rag", "2", "--max_tokens", "6000"]


@pytest.fixture(scope="module")
def whole(cli, tmp_path_factory):
    """The file of a run in one go: batches of two, four modes."""
    path = tmp_path_factory.mktemp("whole") / "predictions.jsonl"
    cli(*FULL, "--out", path)
    assert len(answers(path)) == 2 * 4 * 4
    return path


@pytest.mark.parametrize("kept, partial", [
    (0, 0), (0, 9), (1, 0), (1, 40), (2, 150), (4, 0), (9, 1), (20, 60), (30, 0), (32, 150), (33, 0)])
def test_a_run_cut_short_anywhere_goes_on_and_ends_as_one_in_one_go(
        cli, whole, tmp_path, monkeypatch, no_forecast, kept, partial):
    lines, asked = whole.read_bytes().splitlines(keepends=True), counted(monkeypatch)
    assert len(lines) == 33     # settings first
    path = tmp_path / "cut.jsonl"
    path.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept:kept + 1])[:partial])
    printed = cli(*FULL, "--out", path)
    assert answers(path) == answers(whole)
    rows = max(0, kept - 1)
    # two rows are a batch in a mode: a half one is asked again
    assert sum(n * len(modes) for n, modes in asked) == 32 - rows // 2 * 2
    assert (f"has {rows} of 32 answers already" in printed) == (rows > 0) == ("answers already" in printed)
    assert path.read_bytes().endswith(b"\n") and path.read_bytes().count(b"settings") == 1


def test_a_disk_that_is_full_harms_no_answer(whole, out, monkeypatch):
    cut = whole.read_bytes()[:-5]
    out.write_bytes(cut)

    def full(path, data, real=Path.write_bytes):
        real(path, data[:7])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    for again in (False, True):
        with pytest.raises(OSError):
            Predictions(out, [], again)
        assert out.read_bytes() == cut


def test_an_interrupted_run_keeps_its_answers_and_goes_on(
        cli, whole, tmp_path, monkeypatch, no_forecast, capsys):
    path, calls = tmp_path / "p.jsonl", []

    def stopped(*given):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*given)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(babilong_eval, "ask", stopped)
        cli(*FULL, "--out", path)
    assert stop.value.code == 130 and len(answers(path)) == 16
    kept = path.read_bytes()
    cli(*FULL, "--out", path)
    assert path.read_bytes().startswith(kept) and answers(path) == answers(whole)


def test_answers_are_in_the_file_as_soon_as_their_batch_is_through(cli, out, monkeypatch, no_forecast):
    sizes = []

    def watched(*given):
        sizes.append(out.read_bytes().count(b'"output"'))
        return ask(*given)
    monkeypatch.setattr(babilong_eval, "ask", watched)
    cli("--lengths", "0k", "--n", "6", "--max_tokens", "6000", "--out", out)
    assert sizes == [0, 4, 8]


def test_a_finished_run_asks_nothing_and_prints_its_table_again(cli, whole, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_bytes(whole.read_bytes())
    monkeypatch.setattr(babilong_eval, "ask", lambda *_: pytest.fail("something was asked"))
    printed = cli(*FULL, "--out", path)
    assert path.read_bytes() == whole.read_bytes() and "has 32 of 32 answers already" in printed
    assert table(cells(load(whole))) in printed


def test_lengths_tasks_modes_models_samples_and_retrieval_may_be_added(cli, ckpt, tmp_path, no_forecast):
    steps = [["--lengths", "0k", "--n", "2", "--memory", "on"],
             ["--lengths", "0k", "--n", "3", "--memory", "on"],
             ["--lengths", "100", "0k", "--n", "3", "--memory", "off", "on"],
             ["--lengths", "100", "0k", "--n", "3", "--tasks", "qa2", "qa1"],
             ["--lengths", "100", "0k", "--n", "3", "--tasks", "qa2", "qa1", "--rag", "2"]]
    for flags in steps:
        cli(*flags, "--out", tmp_path / "steps.jsonl")
    models = ["--ckpt", f"lm2={ckpt}", f"twin={ckpt}"]
    cli(*steps[-1], *models, "--out", tmp_path / "steps.jsonl")
    cli(*steps[-1], *models, "--out", tmp_path / "once.jsonl")
    assert len(answers(tmp_path / "once.jsonl")) == 2 * 2 * 2 * 3 * 3
    assert answers(tmp_path / "steps.jsonl") == answers(tmp_path / "once.jsonl")


def test_of_a_file_with_more_answers_the_table_shows_those_that_are_asked_for(cli, whole, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(whole.read_bytes())
    printed = cli("--tasks", "qa1", "--lengths", "100", "--n", "2", "--memory", "off", "--out", path)
    wanted = [r for r in load(whole) if r["length"] == 100 and r["i"] < 2 and r["memory"] == "off"]
    assert len(wanted) == 2 and table(cells(wanted)) in printed and path.read_bytes() == whole.read_bytes()


@pytest.fixture(scope="module")
def another(tok, tmp_path_factory):
    """Another checkpoint, another background, and a folder of original stories."""
    path = tmp_path_factory.mktemp("another")
    save_checkpoint(path / "ckpt.pt", loud(tok, seed=1), tokenizer=tok.ranks)
    (path / "books").mkdir()
    (path / "books" / "book.txt").write_text(book(900, seed=7), encoding="utf-8")
    task = babi.TASKS["qa1"]
    text = "".join(babi.format_story(task.story(random.Random(i)), task) for i in range(9))
    (path / f"qa1_{task.stem}_test.txt").write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("setting, flags", [
    ("seed", ["--seed", "1"]), ("count", ["--count", "chars"]), ("background", ["--background", "{}/books"]),
    ("checkpoint", ["--ckpt", "{}/ckpt.pt"]), ("rag", ["--rag", "3"]),
    ("source", ["--source", "babi", "--path", "{}"])])
def test_other_settings_are_refused_with_their_name_and_a_mend_and_the_file_stays(
        denied, cli, whole, another, tmp_path, setting, flags):
    path = tmp_path / "p.jsonl"
    path.write_bytes(whole.read_bytes())
    flags = [x.format(another) for x in flags]
    err = denied(*FULL, "--lengths", "0k", *flags, "--out", path)
    assert f" {setting} " in err or setting == "source" and " path " in err
    assert str(path) in err and "--out" in err and "--again" in err
    assert path.read_bytes() == whole.read_bytes() and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_file_without_retrieval_takes_any_number_of_sentences_and_then_no_other(
        denied, cli, tmp_path, no_forecast):
    path, base = tmp_path / "p.jsonl", ["--lengths", "0k", "--n", "2"]
    cli(*base, "--out", path)
    cli(*base, "--rag", "2", "--out", path)
    cli(*base, "--out", path)       # without it, none is asked and none can clash
    before = path.read_bytes()
    err = denied(*base, "--rag", "4", "--out", path)
    assert " rag 2" in err and "4" in err and path.read_bytes() == before


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--background", "{}/books"]])
def test_models_that_answer_other_questions_do_not_share_a_file(
        denied, ckpt, whole, another, tmp_path, flags):
    path = tmp_path / "p.jsonl"
    path.write_bytes(whole.read_bytes())
    err = denied("--ckpt", f"twin={ckpt}", "--lengths", "0k", "--n", "2",
                 *[x.format(another) for x in flags], "--out", path)
    assert flags[0][2:] in err and path.read_bytes() == whole.read_bytes()


def test_again_replaces_the_answers_of_other_settings(cli, whole, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(whole.read_bytes())
    cli("--lengths", "0k", "--n", "2", "--memory", "on", "--seed", "1", "--again", "--out", path)
    assert len(answers(path)) == 2
    cli("--lengths", "0k", "--n", "2", "--memory", "on", "--seed", "1", "--out", tmp_path / "new.jsonl")
    assert answers(path) == answers(tmp_path / "new.jsonl")


FOREIGN = [b"My only copy.\n", b"My only copy, without a line end", b'{"a": 1}', b'[1, 2]\n{"settings": 1}\n',
           b"\xff\xfe\x00\x01\n\n", b'{"settings": {"model": 3}}\n', b"\n", b"\x00" * 50]


@pytest.mark.parametrize("again", [[], ["--again"]])
@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_that_is_none_of_predictions_is_refused_and_stays(denied, tmp_path, text, again):
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    err = denied("--lengths", "0k", "--n", "2", "--out", path, *again)
    assert str(path) in err and path.read_bytes() == text


def test_a_file_with_an_answer_twice_is_refused_and_its_line_is_named(out):
    rows = [prediction(i=0), prediction(i=1), prediction(i=0, output="office")]
    save(rows, out)
    for read in (load, lambda path: Predictions(path, [])):
        with pytest.raises(ValueError, match="line 3 answers .*again"):
            read(out)
    rows[2] = prediction(i=0, model="twin")
    save(rows, out)
    assert load(out) == rows


def test_two_runs_of_other_settings_pasted_into_one_file_are_refused(out):
    runs = ["".join(json.dumps(line) + "\n" for line in (dict(settings=dict(model=name, seed=seed)),
                                                         prediction(model=name)))
            for name, seed in (("a", 0), ("b", 1), ("b", 0))]
    out.write_text(runs[0] + runs[1], encoding="utf-8")
    for read in (load, lambda path: Predictions(path, [])):
        with pytest.raises(ValueError, match="answers of a with seed 0, not 1"):
            read(out)
    out.write_text(runs[0] + runs[2], encoding="utf-8")
    assert [r["model"] for r in load(out)] == ["a", "b"]


def test_answers_without_settings_are_not_gone_on_from(denied, tmp_path):
    path = tmp_path / "table.jsonl"
    save([prediction(length=0)], path)
    before = path.read_bytes()
    err = denied("--lengths", "0k", "--n", "2", "--out", path)
    assert str(path) in err and "settings" in err and path.read_bytes() == before


def test_predictions_are_replaced_only_when_the_new_ones_are_complete(tmp_path):
    path = tmp_path / "predictions.jsonl"
    save([prediction("on", "garden", "gärten\u2028")], path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save([prediction("on", "garden", "garden"), {"not": {"json"}}], path)
    assert path.read_bytes() == before
    assert load(path) == [prediction("on", "garden", "gärten\u2028")]


def test_rows_written_before_there_were_several_models_are_those_of_lm2(out):
    row = prediction(found=True)
    del row["model"]
    out.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert load(out) == [prediction(found=True)]


def test_a_last_line_that_was_cut_off_is_no_answer_and_no_mistake(out):
    text = f"{json.dumps(prediction())}\n{json.dumps(prediction(i=1))}"
    out.write_text(text[:-9], encoding="utf-8")
    assert load(out) == Predictions(out, []).rows == [prediction()]


@pytest.mark.parametrize("change", [
    dict(i=None), dict(i="0"), dict(i=-1), dict(i=True), dict(length=-1), dict(seconds="fast"),
    dict(outside=1), dict(memory="maybe"), dict(task="qa21"), dict(found="yes"), dict(model=7)])
def test_a_row_with_a_field_that_cannot_be_is_named_by_its_line(out, change):
    row = prediction() | change
    for text in (row, {k: v for k, v in row.items() if k not in change}):
        if list(change) in (["model"], ["found"], ["seconds"]) and text is not row:
            continue        # may be missing
        out.write_text(f"{json.dumps(prediction())}\n{json.dumps(text)}\n", encoding="utf-8")
        for read in (load, lambda path: Predictions(path, [])):
            with pytest.raises(ValueError, match="line 2 is no prediction"):
                read(out)


# The command line

@pytest.fixture(scope="module")
def evaluated(model, tok, folder, tmp_path_factory):
    """A folder with out/ckpt.pt, evaluated in place with the default paths; and what was printed."""
    path = tmp_path_factory.mktemp("evaluated")
    (path / "out").mkdir()
    content = dict(tokenizer=tok.ranks, train=dict(tasks="qa2 qa1"))
    save_checkpoint(path / "out" / "ckpt.pt", model, **content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "stdout", io.StringIO())
        babilong_eval.main(["--background", str(folder), "--lengths", "0k", "200", "--n", "4"])
        return path, sys.stdout.getvalue().splitlines()


def test_the_table_of_the_saved_predictions_is_the_printed_one(evaluated, capsys):
    path, lines = evaluated
    saved = path / "out" / "predictions.jsonl"
    babilong_eval.main(["--from_predictions", str(saved), "--ckpt", "no/such.pt"])
    again = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(again) >= 10 and "\n".join(again) in "\n".join(lines)


def test_an_evaluation_prints_no_line_wider_than_80_columns(evaluated):
    assert [x for x in evaluated[1] if len(x) > 80 and "predictions.jsonl" not in x] == []


def test_an_evaluation_uses_the_val_part_and_the_tasks_of_the_training_and_writes_a_line_an_answer(
        evaluated, tok, model, val_set):
    path, _ = evaluated
    assert sorted(p.name for p in (path / "out").iterdir()) == ["ckpt.pt", "predictions.jsonl"]
    work = [(task, length, 4) for task in ("qa2", "qa1") for length in (0, 200)]
    expected = by_key(list(evaluate(model.eval(), tok, generated(val_set, 0), work)), *FIELDS)
    found = answers(path / "out" / "predictions.jsonl")
    assert list(found) == list(expected) and len(found) == 2 * 2 * 4 * 2
    assert {k: v[:2] + v[3:] for k, v in found.items()} == {k: v[:2] + v[3:] for k, v in expected.items()}
    assert sum(found[k] == expected[k] for k in found) > 28        # float32 there, float64 here


def test_what_is_evaluated_is_printed_first(evaluated, model, val_set):
    total, _ = model.n_params()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert evaluated[1][0] == f"lm2: {total:,} parameters, segments of 32, {device}"
    assert evaluated[1][1] == (f"background of {len(val_set.prose):,} tokens, {val_set.chars_per_token:.2f} "
                               "characters each")


def test_the_forecast_is_printed_before_the_first_answer(cli, out, monkeypatch):
    seen = []

    def watched(*given, **options):
        seen.append(sys.stdout.getvalue())
        yield from evaluate(*given, **options)
    monkeypatch.setattr(babilong_eval, "evaluate", watched)
    printed = cli("--lengths", "0k", "100", "--n", "3", "--out", out)
    minutes = re.findall(r"^this will take about ([\d.]+) minutes$", seen[0], re.MULTILINE)
    assert len(minutes) == 1 and 0 <= float(minutes[0]) < 10
    assert re.search(r"^it took \d+\.\d minutes$", printed, re.MULTILINE)


def test_prose_other_than_that_of_the_training_is_told(cli, model, tok, folder, tmp_path):
    flags = ["--ckpt", str(tmp_path / "a.pt"), "--lengths", "0k", "--n", "1", "--memory", "on"]
    for prose, told in ((f"elsewhere/{folder.name}", False), ("novels", True), (None, True)):
        content = dict(tokenizer=tok.ranks, train=dict(background=prose))
        save_checkpoint(tmp_path / "a.pt", model, **content)
        printed = cli(*flags, "--again", "--out", str(tmp_path / "out.jsonl"))
        assert (f"was trained on the prose of {prose or 'Python'}: --background" in printed) == told


def test_a_length_beyond_the_background_says_how_often_it_goes_round(cli, val_set, out, no_forecast):
    total = len(val_set.prose)
    longer = total * 4 // 3
    printed = cli("--lengths", longer, "0k", "--n", "1", "--memory", "off", "--out", out)
    assert f"a sample of {longer} goes round it {longer / total:.1f} times" in printed
    printed = cli("--lengths", total, "--n", "1", "--memory", "off", "--out", out, "--again")
    assert "goes round" not in printed


def test_samples_of_a_length_stand_behind_a_colon(cli, out, no_forecast):
    cli("--lengths", "0k:3", "100", "1k:1", "--n", "2", "--memory", "off", "--out", out)
    counts = [c["length"] for c in cells(load(out)) for _ in range(c["n"])]
    assert counts == [0, 0, 0, 100, 100, 1000]


@pytest.mark.parametrize("flags, named", [
    (["--lengths", "64k:"], "'64k:'"), (["--lengths", "64k:x"], "'64k:x'"),
    (["--lengths", "64k:0"], "'64k:0'"), (["--lengths", "64k:-1"], "'64k:-1'"),
    (["--lengths", "64k:1.5"], "'64k:1.5'"), (["--lengths", ":5"], "''"), (["--lengths", "4q:3"], "'4q'"),
    (["--lengths", "4k:1:2"], "'4k:1:2'"), (["--lengths", "4k:²"], "'4k:²'"), (["--metric", "f1"], "f1"),
    (["--metric"], "--metric"), (["--memory", "rag"], "rag"), (["--memory", "none"], "--memory none"),
    (["--rag", "-1"], "--rag -1"), (["--rag", "few"], "few"), (["--source", "books"], "books"),
    (["--source", "babi"], "--source babi"), (["--count", "words"], "words"),
    (["--source", "babilong"], "--source babilong"), (["--path", "x"], "--path x"),
    (["--source", "babi", "--path", "no/babi"], "no/babi"),
    (["--source", "babilong", "--path", "no/long"], "no/long"), (["--tasks", "qa21"], "qa21"),
    (["--compare", "lm2 on"], "--compare"), (["--seed", "x"], "'x'"),
    (["--ckpt", "a=no/ckpt.pt"], "no/ckpt.pt"), (["--figures"], "--figures"),
    (["--from_predictions", "no.jsonl"], "no.jsonl"),
])
def test_a_flag_that_cannot_be_is_named_before_anything_is_written(denied, tmp_path, out, flags, named):
    err = denied("--n", "2", "--lengths", "0k", "--out", out, *flags)
    assert named in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["--from_predictions", "{out}"]])
@pytest.mark.parametrize("place", [
    "{out}", "{ckpt}", "{tmp}", "{tmp}/no/f.json", "{tmp}/../{tmp.name}/p.jsonl", "{tmp}/other.pt"])
def test_figures_replace_neither_answers_nor_checkpoints(denied, ckpt, whole, out, tmp_path, place, flags):
    out.write_bytes(whole.read_bytes())
    place, before = place.format(out=out, ckpt=ckpt, tmp=tmp_path), ckpt.read_bytes()
    err = denied(*FULL, "--out", out, *[x.format(out=out) for x in flags], "--figures", place)
    assert f"--figures {place}" in err
    assert out.read_bytes() == whole.read_bytes() and ckpt.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("flags, named", [
    (["--compare", "lm2 on", "lm2 of"], "'lm2 of'"), (["--figures", "no/such/f.json"], "no/such"),
    (["--memory", "other", "--n", "1"], "other"),
    (["--memory", "on", "other", "--lengths", "0k", "100:1"], "other")])
def test_what_cannot_be_shown_or_asked_is_named_before_the_first_answer(
        denied, out, monkeypatch, flags, named):
    monkeypatch.setattr(babilong_eval, "ask", lambda *_: pytest.fail("something was asked"))
    err = denied("--lengths", "0k", "--n", "2", "--out", out, *flags)
    assert named in err


def test_gpt2s_tokens_that_cannot_be_fetched_are_one_line(denied, tmp_path, out, monkeypatch):
    def unreachable(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    err = denied("--count", "gpt2", "--out", out)
    assert "--count chars" in err and not list(tmp_path.iterdir())


def test_a_length_may_count_characters(cli, tok, folder, out, no_forecast):
    cli("--lengths", "700", "--n", "3", "--count", "chars", "--memory", "off", "--out", out)
    samples = generated(Builder(tok, "val", folder, count="chars"), 0)
    docs = [samples("qa1", 700, i) for i in range(3)]
    found = [(r["question"], r["outside"]) for r in load(out)]
    assert found == [(d.questions[0].text, d.outside(S)) for d in docs]


def test_the_seed_chooses_the_samples(cli, out, val_set, no_forecast):
    cli("--lengths", "0k", "--n", "4", "--seed", "5", "--memory", "off", "--out", out)
    docs = [generated(val_set, 5)("qa1", 0, i) for i in range(4)]
    assert [(r["question"], r["target"]) for r in load(out)] == [d.questions[0][:2] for d in docs]


def test_retrieval_may_be_asked_alone(cli, out, no_forecast):
    printed = cli("--lengths", "200", "--n", "3", "--memory", "none", "--rag", "3", "--out", out)
    rows = load(out)
    assert [r["memory"] for r in rows] == ["rag"] * 3 and all(isinstance(r["found"], bool) for r in rows)
    assert FOUND in printed


def test_the_figures_are_the_counts_of_every_cell(cli, whole, tmp_path):
    cli("--from_predictions", whole, "--figures", tmp_path / "f.json")
    figures = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert figures == dict(cells=cells(load(whole))) and len(figures["cells"]) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_an_evaluation_writes_figures_compares_and_shows_one_metric_and_the_papers_rows(
        cli, tmp_path, out, no_forecast):
    printed = cli("--lengths", "0k", "200", "--n", "4", "--figures", tmp_path / "f.json", "--published",
                  "--metric", "official", "--compare", "lm2 on", "lm2 off", "--out", out)
    rows = load(out)
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == dict(cells=cells(rows))
    assert table(cells(rows), ["official"]) in printed and EXACT not in printed
    assert compare(rows, "lm2 on", "lm2 off", "official") in printed and "\nexact:" not in printed
    assert published_table() in printed


def test_without_their_flags_nothing_is_compared_and_no_paper_is_quoted(evaluated):
    assert not [x for x in evaluated[1] if "McNemar" in x or "not measured here" in x]


def test_a_file_of_answers_is_compared_by_both_metrics(cli, whole):
    printed = cli("--from_predictions", whole, "--compare", "lm2 rag", "lm2 other")
    for metric in ("exact", "official"):
        assert compare(load(whole), "lm2 rag", "lm2 other", metric) in printed


# Several models

@pytest.fixture(scope="module")
def second(tok, tmp_path_factory):
    """A model without memory whose tokenizer has 700 tokens, in a folder of its own."""
    small = Tokenizer("".join(line + "\n" for line in tok.ranks.split("\n")[:700]))
    path = tmp_path_factory.mktemp("two") / "plain" / "ckpt.pt"
    path.parent.mkdir()
    save_checkpoint(path, loud(small, n_mem_layer=0), tokenizer=small.ranks)
    return path, small


def test_two_models_with_other_tokenizers_stand_in_one_table(cli, ckpt, second, folder, out, no_forecast):
    path, small = second
    printed = cli("--ckpt", f"big={ckpt}", path, "--lengths", "0k", "150", "--n", "3", "--out", out)
    rows = load(out)
    assert {r["model"] for r in rows} == {"big", "plain"} and len(rows) == 2 * 2 * 3 * 2
    head, = {x for x in printed.splitlines() if x.startswith("  task") and "plain" in x and "big" in x}
    assert re.findall(r"(\w+ (?:on|off))\b", head) == ["big on", "big off", "plain on", "plain off"]
    docs = [generated(Builder(small, "val", folder), 0)("qa1", 150, i) for i in range(3)]
    mine = [r for r in rows if (r["model"], r["length"], r["memory"]) == ("plain", 150, "on")]
    found = [(r["question"], r["outside"]) for r in mine]
    assert found == [(d.questions[0].text, d.outside(S)) for d in docs]
    assert printed.count("background of ") == 2 and "each model's own tokens" in printed
    assert {r["output"] for r in rows if r["model"] == "plain" and r["memory"] == "on"} == {
        r["output"] for r in rows if r["model"] == "plain" and r["memory"] == "off"}


def test_models_of_one_tokenizer_share_their_samples_and_read_the_background_once(
        cli, ckpt, another, out, no_forecast):
    models = ["--ckpt", f"a={ckpt}", f"b={another / 'ckpt.pt'}"]
    printed = cli(*models, "--lengths", "100", "--n", "4", "--memory", "on", "--out", out)
    found = by_key(load(out), "question", "target", "outside")
    assert all(found[("a", *key)] == found[("b", *key)] for _, *key in found)
    assert printed.count("background of ") == 1 and "each model's own tokens" not in printed


def test_counted_in_characters_models_of_any_tokenizer_are_asked_the_same_texts(
        cli, ckpt, second, out, no_forecast):
    printed = cli("--ckpt", f"a={ckpt}", f"b={second[0]}", "--lengths", "700", "--n", "6", "--count", "chars",
                  "--memory", "off", "--out", out)
    found = by_key(load(out), "question", "target")
    assert len(found) == 12 and all(found[("a", *key)] == found[("b", *key)] for _, *key in found)
    assert "each model's own tokens" not in printed


def test_the_name_of_a_model_is_its_kind_or_its_folder_or_what_is_given(cli, ckpt, second, out, no_forecast):
    def names(*models):
        out.unlink(missing_ok=True)
        cli("--ckpt", *models, "--lengths", "0k", "--n", "1", "--memory", "off", "--out", out)
        return list(dict.fromkeys(r["model"] for r in load(out)))
    assert names(ckpt) == ["lm2"] and names(second[0]) == ["llama"] and names(f"my one={ckpt}") == ["my one"]
    assert names(ckpt, second[0]) == [ckpt.parent.name, "plain"]


def test_a_path_with_an_equals_sign_is_a_path(cli, ckpt, tmp_path, no_forecast):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(ckpt.read_bytes())
    for given, name in ((folder / "ckpt.pt", "lm2"), (f"mine={folder / 'ckpt.pt'}", "mine")):
        cli("--ckpt", given, "--lengths", "0k", "--n", "1", "--memory", "off", "--again")
        assert {r["model"] for r in load(folder / "predictions.jsonl")} == {name}


def test_two_models_of_one_name_are_refused(denied, ckpt, second, tmp_path, out):
    for models in ((f"a={ckpt}", f"a={second[0]}"), (ckpt, ckpt), (ckpt, f"{ckpt.parent.name}={second[0]}")):
        err = denied("--ckpt", *models, "--out", out)
        assert "two models are called" in err and "NAME=PATH" in err
    assert not list(tmp_path.iterdir())


def test_the_answers_never_go_over_a_checkpoint(denied, ckpt, second):
    for out in (ckpt, second[0]):
        before = out.read_bytes()
        err = denied("--ckpt", f"a={ckpt}", f"b={second[0]}", "--out", out, "--again")
        assert f"--out {out} is the checkpoint" in err and out.read_bytes() == before


# Sources

def published(folder, cells, form="{}/{}.json"):
    """Files as published: {(task, length name): samples}."""
    for (task, length), samples in cells.items():
        file = folder / form.format(task, length)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return folder


def made(n, text="Mary went to the {}. It rained\n all  day. John moved to the café."):
    rooms = ["garden", "kitchen", "office"]
    return [dict(input=text.format(rooms[i % 3]), question=f"Where is Mary {i}? ", target=rooms[i % 3])
            for i in range(n)]


@pytest.mark.parametrize("form", ["{}/{}.json", "data/{}/{}.json"])
def test_the_published_samples_are_asked_as_they_stand_in_their_files(
        cli, model, tok, tmp_path, out, no_forecast, form):
    files = {("qa1", "0k"): made(5), ("qa1", "1k"): made(2), ("qa2", "0k"): made(7), ("qa2", "1k"): made(4)}
    path = published(tmp_path / "set", files, form)
    printed = cli("--source", "babilong", "--path", path, "--tasks", "qa1", "qa2", "--lengths", "0k", "1k",
                  "--n", "4", "--rag", "1", "--memory", "on", "--out", out)
    found = answers(out)
    assert len(found) == (4 + 2 + 4 + 4) * 2
    assert "qa1 1k: 2 samples published, not 4\n" in printed and printed.count("samples published") == 1
    for (_, task, length, i, mode), (question, target, output, outside, ok) in found.items():
        row = files[task, "1k" if length else "0k"][i]
        assert (question, target, outside, ok) == (row["question"].strip(), row["target"], None, None)
        doc = from_text(tok, row["input"], row["question"], row["target"])
        ids = doc.prompt() if mode == "on" else doc.retrieve(tok, 1)[0]
        assert tok.decode(ids).endswith("? ".strip()) and output == greedy(model, tok, ids)
    assert OUTSIDE not in printed and FOUND not in printed


def test_a_published_file_of_a_single_sample_is_asked(cli, tmp_path):
    path = published(tmp_path / "set", {("qa1", "0k"): made(1)})
    cli("--source", "babilong", "--path", path, "--lengths", "0k", "--n", "4", "--out", tmp_path / "p.jsonl")
    assert len(load(tmp_path / "p.jsonl")) == 2


def test_a_long_published_file_needs_no_shorter_one_beside_it(cli, out, tmp_path):
    path = published(tmp_path / "set", {("qa1", "128k"): made(3)})
    cli("--source", "babilong", "--path", path, "--lengths", "128k", "--memory", "on", "--out", out)
    assert len(load(out)) == 3


@pytest.mark.parametrize("raw, says", [
    (json.dumps([dict(input="x", question="y")]).encode(), "'target'"), (b"[]", "empty"),
    (json.dumps([dict(input=1, question="y", target="z")]).encode(), "'input'"), (b"{}", "no list"),
    ('[{"input": "café"}]'.encode("latin-1"), "UTF-8"), ("[]".encode("utf-16"), "UTF-8"), (b"[{", "JSON")])
def test_a_published_file_that_is_not_what_it_should_be_is_named(denied, tmp_path, out, raw, says):
    file = tmp_path / "set" / "qa1" / "1k.json"
    published(tmp_path / "set", {("qa1", "0k"): made(3)})
    file.write_bytes(raw)
    err = denied("--source", "babilong", "--path", tmp_path / "set", "--lengths", "0k", "1k", "--out", out)
    assert str(file) in err and says in err and not out.exists()


def test_published_files_may_move_but_not_change_under_a_run(cli, denied, out, tmp_path, no_forecast):
    changed = made(4)
    changed[3]["input"] += " Sandra left."
    sets = [published(tmp_path / name, {("qa1", "0k"): first, ("qa1", "1k"): made(4)})
            for name, first in (("one", made(4)), ("two", made(4)), ("three", changed))]
    flags = ["--source", "babilong", "--out", out, "--path"]
    cli(*flags, sets[0], "--lengths", "0k", "--n", "2")
    cli(*flags, sets[1], "--lengths", "0k", "1k", "--n", "4")
    assert len(load(out)) == 16
    before = out.read_bytes()
    err = denied(*flags, sets[2], "--lengths", "0k", "--n", "4")
    assert "samples of qa1 0k" in err and "--again" in err and out.read_bytes() == before
    cli(*flags, sets[2], "--lengths", "1k", "--n", "4")     # of that length they are the same


@pytest.mark.parametrize("flags", [["--tasks", "qa1", "qa2", "--lengths", "0k"], ["--lengths", "0k", "1k"]])
def test_one_published_file_is_not_taken_for_several_cells(denied, out, tmp_path, flags):
    file = published(tmp_path / "set", {("qa1", "0k"): made(4)}) / "qa1" / "0k.json"
    err = denied("--source", "babilong", "--path", file, *flags, "--n", "2", "--out", out)
    assert f"--path {file}" in err and "folder" in err and not out.exists()


def test_one_published_file_is_asked(cli, out, tmp_path, no_forecast):
    file = published(tmp_path / "set", {("qa1", "0k"): made(4)}) / "qa1" / "0k.json"
    cli("--source", "babilong", "--path", file, "--lengths", "4k", "--n", "2", "--memory", "on", "--out", out)
    assert [(r["length"], r["target"]) for r in load(out)] == [(4000, "garden"), (4000, "kitchen")]


def test_one_file_of_stories_is_taken_for_one_task(cli, denied, another, out, no_forecast):
    file = next(another.glob("qa1_*"))
    flags = ["--source", "babi", "--path", file, "--lengths", "0k", "200", "--n", "2", "--memory", "on"]
    err = denied(*flags, "--tasks", "qa1", "qa2", "--out", out)
    assert f"--path {file}" in err and not out.exists()
    cli(*flags, "--out", out)
    assert len(load(out)) == 4


def test_a_published_file_that_is_missing_is_named_with_the_command_that_fetches_it(denied, tmp_path, out):
    published(tmp_path / "set", {("qa1", "0k"): made(3)})
    err = denied("--source", "babilong", "--path", tmp_path / "set", "--lengths", "0k", "4k", "--out", out)
    assert "4k.json" in err and "data.download" in err and not out.exists()


def test_an_unknown_task_is_named_whatever_the_source(denied, another, tmp_path, out, no_forecast):
    path = published(tmp_path / "set", {("qa99", "0k"): made(3)})
    story = next(another.glob("qa1_*"))
    for source in (["--source", "babilong", "--path", path], ["--source", "babi", "--path", story], [],
                   ["--source", "babilong", "--path", path / "qa99" / "0k.json"]):
        err = denied("--lengths", "0k", "--n", "2", "--tasks", "qa99", *source, "--out", out)
        assert "'qa99'" in err or "qa99" in err and not source
        assert not out.exists()


def test_original_stories_are_a_source(cli, another, out, tok, folder, no_forecast):
    cli("--source", "babi", "--path", another, "--lengths", "0k", "200", "--n", "5", "--memory", "off",
        "--out", out)
    samples = generated(Builder(tok, "val", folder, stories=another), 0)
    rows = load(out)
    assert len(rows) == 10
    made = babi.read_stories(another, "qa1", "val")
    in_files = {(q.text, q.answer) for story in made for _, q in story.questions}
    for r in rows:
        question = samples("qa1", r["length"], r["i"]).questions[0]
        assert (r["question"], r["target"]) == question[:2] and question[:2] in in_files
