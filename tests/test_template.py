"""The benchmark's template: what is around a document, and how an answer is cut.

    python -m pytest tests/test_template.py -q

A tiny untrained model is asked from the command line, too.
"""

import json
import random
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import babilong_eval
from babilong_eval import LABELS, exact_match, load, official_score
from data.babi import TASKS
from data.babilong import Builder, generated
from data.document import from_text
from data.template import PROMPTS, head_text, with_template
from data.tokenizer import BYTES, ReleasedTokenizer, Tokenizer, format_ranks
from data.tokenizer import load as load_tokenizer
from lm2 import LM2Config, build_model, save_checkpoint
from test_train import refused

torch.set_num_threads(1)

TINY = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, n_slot=4, n_mem_head=2)


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without a begin of text."""
    return load_tokenizer()


@pytest.fixture(scope="module")
def released(plain):
    """A tokenizer with a begin of text, whose ids are not its ranks."""
    n = plain.eot
    ids = list(range(n - 1, -1, -1))
    return ReleasedTokenizer(plain.ranks, plain.pattern, ids, bos=n, ends=[n + 1], n_vocab=n + 2)


@pytest.fixture(scope="module", params=["plain", "released"])
def tok(request):
    return request.getfixturevalue(request.param)


def tiny(tok):
    torch.manual_seed(0)
    return build_model(LM2Config(vocab_size=tok.n_vocab, segment_len=64, **TINY))


def published(tok):
    text = "Mary went to the office.\n It rained. Mary moved to the kitchen."
    return from_text(tok, text, "Where is Mary? ", "kitchen")


def make_generated(tok, folder):
    return generated(Builder(tok, "val", str(folder)), 0)("qa2", 400, 3)


@pytest.fixture(scope="module", params=["generated", "published"])
def document(request, tok, folder):
    if request.param == "published":
        return published(tok)
    return make_generated(tok, folder)


# Documents


def test_a_prompt_has_the_parts_of_the_benchmark_in_order(tok):
    document = with_template(published(tok), "qa1", tok)
    example = "<example>\nAlice went to the cellar. Hugo moved to the garage. Alice travelled to "
    example += "the library. Where is Alice?\nAnswer: library\n</example>\n<example>\n"
    prompt = tok.decode(document.prompt())
    instruction, rest = prompt.split("\n\n", 1)
    assert instruction == PROMPTS["qa1"].instruction
    assert rest.startswith(example)
    assert rest.endswith(
        "Answer: pantry\n</example>\n\n"
        "Answer with one word, the name of a place. Write nothing else.\n\n"
        "<context>\n Mary went to the office. It rained. Mary moved to the kitchen.\n</context>\n\n"
        "Question: Where is Mary?\nAnswer:"
    )


def test_context_and_answer_stay_and_the_places_move_with_them(document, tok):
    asked = with_template(document, "qa2", tok)
    before = [document.ids[start:stop].tolist() for start, stop in pairwise(document.cuts)]
    after = [asked.ids[start:stop].tolist() for start, stop in pairwise(asked.cuts)]
    assert after == before and len(before) > 2
    for (start, stop), text in zip(asked.facts, asked.texts, strict=True):
        assert tok.decode(asked.ids[start:stop]) == " " + text
    start, stop = asked.answers[0]
    assert stop == len(asked.ids)
    answer = [*tok.encode(" " + document.questions[0].answer), tok.eot]
    assert asked.ids[start:stop].tolist() == answer
    assert asked.questions == document.questions
    assert asked.ids.dtype == np.int64


def test_the_begin_of_text_comes_once_and_first(plain, released, folder):
    asked = with_template(make_generated(released, folder), "qa2", released)
    head = asked.ids[: asked.cuts[0]].tolist()
    assert head == [released.bos, *released.encode(head_text("qa2"))]
    assert asked.ids.tolist().count(released.bos) == 1
    asked = with_template(make_generated(plain, folder), "qa2", plain)
    assert asked.ids[: asked.cuts[0]].tolist() == plain.encode(head_text("qa2"))


def test_retrieval_keeps_head_and_question_and_finds_the_same_sentences(document, tok):
    asked = with_template(document, "qa2", tok)
    short, found = asked.retrieve(tok, 2)
    raw, raw_found = document.retrieve(tok, 2)
    kept = raw[document.cuts[0] : len(raw) - len(document.prompt()) + document.context_len]
    expected = [asked.ids[: asked.cuts[0]], kept, asked.prompt()[asked.context_len :]]
    np.testing.assert_array_equal(short, np.concatenate(expected))
    assert found is raw_found
    assert 0 < len(kept) < document.context_len


def test_the_last_segment_counts_from_the_start_of_the_whole_prompt(plain, folder):
    document = make_generated(plain, folder)
    asked = with_template(document, "qa2", plain)
    n_prompt = len(asked.prompt())
    last_fact = max(asked.facts[i][1] for i in asked.questions[0].support)
    assert not asked.outside(n_prompt)  # one segment holds everything
    assert asked.outside(last_fact)  # a segment begins right behind the last fact
    assert not asked.outside(last_fact - 1)
    # Without the head, the segments would end elsewhere.
    assert not document.outside(last_fact)


# Instructions and examples


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_two_examples_whose_answers_both_metrics_count(task):
    prompt = PROMPTS[task]
    assert prompt.instruction.endswith(".") and prompt.form.endswith(".")
    assert len(prompt.examples) == 2
    head = head_text(task)
    for facts, question, answer in prompt.examples:
        assert f"{facts} {question}\nAnswer: {answer}\n" in head
        assert exact_match(answer, f" {answer}")
        assert official_score(task, answer, f" {answer}", question, is_renamed=True)
    answers = {example.answer for example in prompt.examples}
    assert len(answers) == 2  # so that no model learns one constant answer


@pytest.mark.parametrize("task", TASKS)
def test_each_question_begins_as_one_in_the_stories_of_its_task(task):
    beginnings = set()
    for seed in range(40):
        for _, question in TASKS[task].story(random.Random(seed)).questions:
            beginnings.add(question.text.split()[0])
    for example in PROMPTS[task].examples:
        assert example.question.split()[0] in beginnings


@pytest.mark.parametrize("task", [f"qa{n}" for n in (1, 2, 3, 4, 5, 11, 12, 13, 14)])
def test_no_answer_of_a_task_stands_in_its_head(task):
    words = set(re.findall(r"[A-Za-z]+", head_text(task)))
    assert not words & set(LABELS[task])


# Answers


def answers_of_a_script(monkeypatch, texts, **options):
    """The answers of a model that goes on with these texts, and how many it was given at each step.

    A line end and a "Q" behind it are one token, as in some released tokenizers."""
    tok = Tokenizer(format_ranks([*BYTES, b"\nQ"]), "(?s:.+)")
    scripts = [tok.encode(text) for text in texts]
    prompts = [np.array(tok.encode(f"{row} Answer:")) for row in range(len(texts))]
    calls = []

    def next_tokens(model, seen, state):
        calls.append(len(seen))
        tokens = []
        for ids in seen:
            row = int(tok.decode(ids[:1]))
            tokens.append(scripts[row][len(ids) - len(prompts[row])])
        return tokens

    monkeypatch.setattr(babilong_eval, "next_tokens", next_tokens)
    model = SimpleNamespace(cfg=SimpleNamespace(segment_len=1000))
    return babilong_eval.answer(model, tok, prompts, None, **options), calls


def test_an_answer_stops_at_its_line_end(monkeypatch):
    texts = [" kitchen\nQuestion: Where is John?\nAnswer: office", " garden\n</example>"]
    outputs, calls = answers_of_a_script(monkeypatch, texts, most=20, to_line_end=True)
    assert outputs == ["kitchen", "garden"]
    n_tokens = len(" garden\n")
    assert calls == [2] * n_tokens + [1]  # the text that has a line end does not go on
    outputs, _ = answers_of_a_script(monkeypatch, texts, most=12)
    assert outputs == ["kitchen\nQues", "garden\n</ex"]


def test_only_with_the_template_an_answer_is_one_line_of_up_to_20_tokens(plain, monkeypatch):
    asked = []

    def answer(model, tokenizer, prompts, state, most=12, to_line_end=False):
        asked.append((most, to_line_end))
        return [""] * len(prompts)

    monkeypatch.setattr(babilong_eval, "answer", answer)
    document = published(plain)
    for template, expected in ((False, (12, False)), (True, (20, True))):
        asked.clear()
        babilong_eval.ask(tiny(plain), plain, [document] * 2, babilong_eval.MODES, 1, template)
        assert asked == [expected] * len(babilong_eval.MODES)


# The command line


@pytest.fixture(scope="module")
def flags(plain, folder, tmp_path_factory):
    """The flags of a short run of an untrained model."""
    path = tmp_path_factory.mktemp("model") / "ckpt.pt"
    save_checkpoint(path, tiny(plain), tokenizer=plain.ranks)
    usual = ["--ckpt", path, "--background", folder, "--tasks", "qa1", "--lengths", "0k"]
    return [*map(str, usual), "--n", "2", "--memory", "on", "--rag", "1"]


def run(flags, *more):
    babilong_eval.main([*flags, *map(str, more)])


def test_a_run_asks_with_the_template_and_keeps_its_answers_apart(
    flags, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "with.jsonl"
    seen = []
    ask = babilong_eval.ask

    def spied(model, tokenizer, documents, modes, n_sentences, template):
        assert template
        seen.extend(tokenizer.decode(document.prompt()) for document in documents)
        return ask(model, tokenizer, documents, modes, n_sentences, template)

    monkeypatch.setattr(babilong_eval, "ask", spied)
    run(flags, "--template", "--out", out)
    monkeypatch.undo()
    rows = load(out)
    assert len(rows) == 4
    for prompt, row in zip(seen, rows, strict=False):
        assert prompt.startswith(head_text("qa1"))
        assert prompt.endswith(f"\n</context>\n\nQuestion: {row['question']}\nAnswer:")
    settings = json.loads(out.read_text(encoding="utf-8").splitlines()[0])["settings"]
    assert settings["template"] is True

    run(flags, "--template", "--out", out)  # goes on, and finds all done
    assert load(out) == rows
    line = refused(capsys, babilong_eval.main, *flags, "--out", out)
    assert "with template True, not False" in line

    without = tmp_path / "without.jsonl"
    run(flags, "--out", without)
    assert "template" not in without.read_text(encoding="utf-8")  # as in older files
    line = refused(capsys, babilong_eval.main, *flags, "--out", without, "--template")
    assert "with template False, not True" in line


def test_the_template_cannot_change_answers_of_a_file(capsys, tmp_path):
    flags = ["--template", "--from_predictions", tmp_path / "p.jsonl"]
    line = refused(capsys, babilong_eval.main, *flags)
    assert "--template with --from_predictions" in line
