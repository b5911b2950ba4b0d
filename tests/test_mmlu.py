"""MMLU: its files, the prompt, how an option is scored, the tables and the flags.

    python -m pytest tests/test_mmlu.py -q

The made-up set has all 57 subjects and five questions of each. Which model is right where is known
by construction, and the figures of the tables are worked out by hand.
"""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

import babilong_eval
from babilong_eval import Loaded, wilson
from data import mmlu
from data.mmlu import Question, Subject, fit, log_likelihoods, mean_of_rows, prompt_of
from data.tokenizer import choose
from lm2 import LM2Config, build_model, save_checkpoint
from test_train import refused

torch.set_num_threads(1)

TOK = choose("shipped")
BYTES = choose("bytes")
TINY = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, ffn_dim=32, segment_len=32)
KINDS = {
    "lm2": dict(n_slot=4, n_mem_head=2),
    "rmt": dict(n_mem_token=3, n_mem_layer=0),
    "llama": dict(n_mem_layer=0),
}

# How many of a subject's five questions have the letter B, and how many of the others C.
N_B = {"STEM": 1, "Humanities": 2, "Social Sciences": 0, "Others": 3}
N_C = {"High School": 2, "College": 1, "Professional": 0, "General Knowledge": 2}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the made-up set."""
    folder = tmp_path_factory.mktemp("mmlu")
    for subject, category in mmlu.CATEGORY_OF.items():
        n_b = N_B[category]
        n_c = N_C[mmlu.level_of(subject)]
        letters = "B" * n_b + "C" * n_c + "A" * (5 - n_b - n_c)
        asked = [[f"What is {i}?", "a", "bb", "ccc", "dd", letters[i]] for i in range(5)]
        write(folder / "test" / f"{subject}_test.csv", asked)
        write(folder / "val" / f"{subject}_val.csv", asked[:2])
        write(folder / "dev" / f"{subject}_dev.csv", asked)
    return folder


class Fake:
    """A model that finds all ids equally likely, but for a favourite."""

    def __init__(self, tokenizer, favourite=None, kind="lm2", segment_len=10_000):
        self.cfg = SimpleNamespace(kind=kind, segment_len=segment_len)
        self.norm = SimpleNamespace(weight=torch.zeros(1))
        self.precise_dtype = torch.float64
        self.logits = torch.zeros(tokenizer.n_vocab)
        if favourite is not None:
            self.logits[tokenizer.encode(favourite)] = 5.0

    def float(self):
        return self

    def read(self, idx):
        return SimpleNamespace(map=lambda f: None)

    def __call__(self, idx, state):
        return self.logits.expand(*idx.shape, -1), None, None


@pytest.fixture
def evaluated(made, monkeypatch, capsys):
    """evaluated(models, *flags): what an evaluation of these models (by name) on the set prints."""

    def run(models, *flags, tokenizer=TOK):
        loaded = [Loaded(name, model, tokenizer, {}, "") for name, model in models.items()]
        monkeypatch.setattr(babilong_eval, "read_models", lambda texts, device: loaded)
        capsys.readouterr()
        babilong_eval.main(["--mmlu", str(made), "--device", "cpu", *map(str, flags)])
        return capsys.readouterr().out

    return run


def cells(line):
    """The n of a line of a table and, of each model, its right answers in % and the interval."""
    columns = [line[43:61], line[62:80]]
    return line[36:42].strip(), *[" ".join(column.split()) for column in columns]


def column(right, n):
    low, high = wilson(right, n)
    return f"{100 * right / n:.1f} [{100 * low:.1f},{100 * high:.1f}]"


# The tables


def test_every_row_of_every_table_is_right(evaluated):
    printed = evaluated({"b": Fake(TOK, " B"), "c": Fake(TOK, " C")})
    lines = {line[:35].strip(): line for line in printed.splitlines()}
    for subject, category in mmlu.CATEGORY_OF.items():
        n_c = N_C[mmlu.level_of(subject)]
        assert cells(lines[subject]) == ("5", column(N_B[category], 5), column(n_c, 5))
    expected = {  # n, and the right answers of both models
        "STEM": (90, 18, 31),
        "Humanities": (65, 26, 24),
        "Social Sciences": (60, 0, 22),
        "Others": (70, 42, 23),
        "High School": (70, 12, 28),
        "College": (30, 8, 6),
        "Professional": (20, 8, 0),
        "General Knowledge": (165, 58, 66),
        "all questions": (285, 86, 100),
    }
    for label, (n, right_b, right_c) in expected.items():
        assert cells(lines[label]) == (str(n), column(right_b, n), column(right_c, n))
    assert cells(lines["mean of these 8 rows"]) == ("", "29.9", "30.1")
    assert cells(lines["chance"]) == ("", "25.0", "25.0")
    assert max(map(len, printed.splitlines())) <= 80


def test_a_third_model_stands_below_and_no_line_is_wider_than_80_columns():
    answers = []
    for model in ("one", "two", "a-model-with-a-long-name"):
        for i in range(2000):
            row = dict(model=model, i=i, right="A", chosen="A")
            answers.append(dict(row, subject="high_school_government_and_politics"))
    printed = mmlu.table(answers, wilson).splitlines()
    assert max(map(len, printed)) == 80
    heads = [line.split()[5:] for line in printed if line.startswith("right answers in %")]
    assert heads == [["one", "two"], ["l-with-a-long-name"]]
    whole = [line.split()[1:] for line in printed if line.startswith("all questions")]
    assert whole == [["questions", "2,000", *["100.0", "[99.8,100.0]"] * n] for n in (2, 1)]
    assert sum("mean of these 2 rows" in line for line in printed) == 2


@pytest.mark.parametrize(
    "average, rows",
    [
        (28.0, (27.2, 28.7, 29.2, 27.7, 28.8, 27.1, 27.6, 27.6)),  # Llama
        (26.5, (25.7, 26.7, 27.0, 27.1, 26.5, 27.1, 26.6, 25.6)),  # RMT
        (29.4, (28.1, 32.2, 31.6, 28.0, 30.4, 29.0, 27.6, 28.5)),  # LM2
    ],
)
def test_the_papers_average_is_the_mean_of_its_eight_rows(average, rows):
    assert round(mean_of_rows(rows), 1) == average


def test_the_benchmark_has_57_subjects_in_four_categories_and_the_paper_four_levels():
    categories = list(mmlu.CATEGORY_OF.values())
    assert [categories.count(name) for name in N_B] == [18, 13, 12, 14]
    levels = [mmlu.level_of(subject) for subject in mmlu.CATEGORY_OF]
    assert [levels.count(name) for name in N_C] == [14, 6, 4, 33]


# The prompt


def question(text="Is 2 + 2 four?", right=1, subject="high_school_physics"):
    return Question(subject, text, ["no", "yes", "often", "ask me later"], right)


def test_a_prompt_is_a_line_on_the_subject_the_examples_and_the_question(tmp_path):
    path = tmp_path / "dev" / "abstract_algebra_dev.csv"
    rows = [
        ['He says "a, b"\r\nand what?', "1", "2", "3", "4, 5", "D"],
        ["Größe?", "NA", "", " x", "y", "A"],
    ]
    write(path, rows)
    examples = mmlu.read_questions(path, "abstract_algebra")
    asked = Question("abstract_algebra", "Last?", ["k", "l", "m", "n"], 2)
    head = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    last = "Last?\nA. k\nB. l\nC. m\nD. n\nAnswer:"
    assert prompt_of(asked, []) == head + last
    assert prompt_of(asked, examples) == (
        f'{head}He says "a, b"\r\nand what?\nA. 1\nB. 2\nC. 3\nD. 4, 5\nAnswer: D\n\n'
        f"Größe?\nA. NA\nB. \nC.  x\nD. y\nAnswer: A\n\n{last}"
    )


def test_the_examples_are_the_first_of_the_file_in_dev_and_the_part_is_the_one_asked(made):
    subjects = mmlu.read_subjects(made, "val", 3)
    assert len(subjects) == 57
    assert [asked.text for asked in subjects["virology"].questions] == ["What is 0?", "What is 1?"]
    assert subjects["virology"].examples == mmlu.read_subjects(made, "test", 5)["virology"][0][:3]


def test_a_prompt_that_is_too_long_loses_its_last_examples_and_no_more_than_it_has_to():
    examples = [question(f"Example {i}?") for i in range(3)]
    whole = TOK.encode(prompt_of(question(), examples))
    without_last = TOK.encode(prompt_of(question(), examples[:-1]))
    alone = TOK.encode(prompt_of(question(), []))
    assert fit(TOK, question(), examples, len(whole)) == (whole, 3)
    assert fit(TOK, question(), examples, len(whole) - 1) == (without_last, 2)
    assert fit(TOK, question(), examples, len(alone)) == (alone, 0)
    assert fit(TOK, question(), examples, len(alone) - 4) == (alone[4:], 0)
    assert fit(TOK, question(), examples, None) == (whole, 3)


def test_the_begin_of_text_stands_first_and_takes_room():
    released = SimpleNamespace(bos=7, encode=TOK.encode)
    ids = TOK.encode(prompt_of(question(), [question()]))
    alone = TOK.encode(prompt_of(question(), []))
    assert fit(released, question(), [question()], None) == ([7, *ids], 1)
    assert fit(released, question(), [question()], len(ids) + 1) == ([7, *ids], 1)
    assert fit(released, question(), [question()], len(ids)) == ([7, *alone], 0)
    assert fit(released, question(), [], len(alone)) == ([7, *alone[1:]], 0)


@pytest.mark.parametrize("by, longest", [("letters", " A"), ("answers", " ask me later")])
def test_only_a_model_without_memory_needs_the_prompt_and_an_option_in_one_segment(by, longest):
    subjects = {"virology": Subject([question()], [question()] * 5)}
    room = len(TOK.encode(prompt_of(question(), [question()] * 5))) + len(TOK.encode(longest))
    for kind, segment_len, shots in (("llama", room, 5), ("llama", room - 1, 4), ("rmt", 9, 5)):
        fake = Fake(TOK, kind=kind, segment_len=segment_len)
        (answer,) = mmlu.ask(fake, TOK, subjects, by, "fake")
        assert answer["shots"] == shots


# The scores


def slow_log_likelihood(model, prompt, option):
    """Every id of the option on its own, with the whole text before it read anew."""
    total = 0.0
    for i, wanted in enumerate(option):
        logits, _, _ = model(torch.tensor([prompt + option[:i]]))
        total += logits[0, -1].log_softmax(dim=-1)[wanted].item()
    return total


@pytest.fixture(params=KINDS)
def model(request):
    """A model of random weights and of each kind, for both tokenizers."""
    torch.manual_seed(0)
    sizes = TINY | KINDS[request.param]
    return build_model(LM2Config(vocab_size=TOK.n_vocab, **sizes)).double()


@pytest.mark.parametrize("n_prompt", [2, 31, 32, 33, 90, 96])
def test_options_are_scored_as_if_each_was_read_with_the_whole_prompt(model, n_prompt):
    """Prompts end within a segment and at its border, and options cross it."""
    prompt = TOK.encode(prompt_of(question(), [question("Why?")]))[:n_prompt]
    for texts in (mmlu.LETTERS, question().options, ["yes", "no", "yes and no", "yes"]):
        for tokenizer in (TOK, BYTES):  # in bytes, a letter behind its space is two ids
            options = [tokenizer.encode(f" {text}") for text in texts]
            expected = [slow_log_likelihood(model, prompt, option) for option in options]
            assert log_likelihoods(model, prompt, options) == pytest.approx(expected, abs=1e-9)


def test_letters_of_one_id_are_scored_in_one_row_and_one_pass(model, monkeypatch):
    shapes = []
    forward = model.forward

    def watched(idx, **kwargs):
        shapes.append(tuple(idx.shape))
        return forward(idx, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    letters = [TOK.encode(f" {letter}") for letter in mmlu.LETTERS]
    log_likelihoods(model, list(range(20)), letters)
    assert shapes == [(1, 1)]


def test_letters_are_scored_alone_and_answers_by_the_bytes_of_their_text(model):
    asked = Question("virology", "Which?", ["no", "größer als zwei", "", "yes " * 9], 0)
    examples = [question()]
    room = 32 - max(len(TOK.encode(f" {text}")) for text in asked.options)
    prompt, _ = fit(TOK, asked, examples, room if model.cfg.kind == "llama" else None)
    answers, _ = mmlu.scores_of(model, TOK, asked, examples, "answers")
    for text, found in zip(asked.options, answers, strict=True):
        nats = slow_log_likelihood(model, prompt, TOK.encode(f" {text}"))
        assert found == pytest.approx(nats / max(1, len(text.encode())), abs=1e-9)
    prompt, _ = fit(TOK, asked, examples, 31 if model.cfg.kind == "llama" else None)
    letters, _ = mmlu.scores_of(model, TOK, asked, examples, "letters")
    for letter, found in zip("ABCD", letters, strict=True):
        nats = slow_log_likelihood(model, prompt, TOK.encode(f" {letter}"))
        assert found == pytest.approx(nats, abs=1e-9)


def test_a_model_without_a_preference_takes_the_longest_answer_or_the_first_letter(evaluated):
    """By bytes: each byte costs the same, and the space before an option weighs least there."""
    printed = evaluated({"fake": Fake(BYTES)}, "--score", "answers", tokenizer=BYTES)
    lines = {line[:35].strip(): line for line in printed.splitlines()}
    assert cells(lines["all questions"])[1] == column(100, 285)  # C
    printed = evaluated({"fake": Fake(TOK)}, "--shots", 0)
    lines = {line[:35].strip(): line for line in printed.splitlines()}
    assert cells(lines["all questions"])[1] == column(285 - 100 - 86, 285)  # A


# The command line


def test_answers_are_written_to_out_and_an_older_file_is_replaced_only_with_again(
    evaluated, made, tmp_path, capsys
):
    out = tmp_path / "answers.jsonl"
    models = {"b": Fake(TOK, " B"), "short": Fake(TOK, " C", kind="llama", segment_len=60)}
    assert not list(tmp_path.iterdir())
    printed = evaluated(models, "--part", "val", "--shots", 2)
    assert "short got fewer than 2 examples in 114 of 114 prompts" in printed
    assert "b got fewer" not in printed
    assert not list(tmp_path.iterdir())
    printed = evaluated(models, "--part", "val", "--shots", 2, "--out", out)
    assert f"answers in {out}" in printed
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 2 * 57 * 2
    right = dict(
        model="b", subject="abstract_algebra", i=0, right="B", chosen="B", tied=False, shots=2
    )
    assert answers[0] == right
    last = dict(
        model="short", subject="world_religions", i=1, right="B", chosen="C", tied=False, shots=0
    )
    assert answers[-1] == last
    before = out.read_bytes()
    # This file stands for the checkpoint, too: no model is read.
    flags = ["--mmlu", made, "--out", out, "--ckpt", __file__]
    assert "--again" in refused(capsys, babilong_eval.main, *flags)
    assert out.read_bytes() == before
    evaluated(models, "--shots", 0, "--out", out, "--again", "--ckpt", __file__)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2 * 57 * 5


def test_a_checkpoint_is_asked_and_subjects_without_a_file_are_named_in_one_line(tmp_path, capsys):
    for subject in mmlu.CATEGORY_OF:
        if subject not in ("virology", "marketing"):
            write(tmp_path / "val" / f"{subject}_val.csv", [["Why?", *"wxyz", "A"]])
    model = build_model(LM2Config(vocab_size=TOK.n_vocab, **TINY, **KINDS["lm2"]))
    save_checkpoint(tmp_path / "ckpt.pt", model, **TOK.for_checkpoint())
    flags = ["--mmlu", tmp_path, "--part", "val", "--shots", "0", "--ckpt", tmp_path / "ckpt.pt"]
    babilong_eval.main([*map(str, flags), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"left out, as {tmp_path}/val has no file of them: marketing, virology\n" in printed
    assert "\nall questions                           55 " in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "val"]


GOOD = ["Why?", "w", "x", "y", "z", "A"]


@pytest.mark.parametrize(
    "files, flags, told",
    [
        ({}, [], "anatomy_test.csv"),
        ({"val/anatomy_val.csv": [GOOD]}, [], "anatomy_test.csv"),
        ({"test/anatomy_test.csv": [GOOD]}, [], "dev/anatomy_dev.csv"),
        ({"test/anatomy_test.csv": [GOOD], "dev/anatomy_dev.csv": [GOOD] * 4}, [], "--shots 4"),
        ({"test/anatomy_test.csv": [GOOD, GOOD[1:]]}, ["--shots", "0"], "row 2 has 5 columns"),
        ({"test/anatomy_test.csv": [[*GOOD[:5], "E"]]}, ["--shots", "0"], "'E'"),
        ({"test/anatomy_test.csv": []}, ["--shots", "0"], "no question"),
        ({"test/alchemy_test.csv": [GOOD]}, ["--shots", "0"], "'alchemy'"),
        ({}, ["--shots", "6"], "--shots: invalid choice: 6"),
        ({}, ["--part", "dev"], "--part"),
        ({}, ["--tasks", "qa1"], "--tasks belongs to BABILong"),
        ({}, ["--lengths", "0k"], "--lengths belongs to BABILong"),
        ({}, ["--rag", "3"], "--rag belongs to BABILong"),
        ({}, ["--memory", "none"], "--memory belongs to BABILong"),
        ({}, ["--compare", "a", "b"], "--compare belongs to BABILong"),
        ({}, ["--published"], "--published belongs to BABILong"),
        ({}, ["--from_predictions", "x.jsonl"], "--from_predictions belongs to BABILong"),
    ],
)
def test_what_cannot_be_asked_ends_in_one_line(tmp_path, capsys, files, flags, told):
    for name, rows in files.items():
        write(tmp_path / name, rows)
    assert told in refused(capsys, babilong_eval.main, "--mmlu", tmp_path, *flags)


def test_a_file_that_is_no_text_and_an_out_in_no_folder_end_in_one_line(made, tmp_path, capsys):
    broken = tmp_path / "test" / "anatomy_test.csv"
    broken.parent.mkdir()
    broken.write_bytes(b"\xff\xfe\x00why,a,b,c,d,A")
    told = refused(capsys, babilong_eval.main, "--mmlu", tmp_path, "--shots", 0)
    assert f"{broken} is no CSV file in UTF-8" in told
    model = build_model(LM2Config(vocab_size=TOK.n_vocab, **TINY, **KINDS["lm2"]))
    save_checkpoint(tmp_path / "ckpt.pt", model, **TOK.for_checkpoint())
    flags = ["--mmlu", made, "--ckpt", tmp_path / "ckpt.pt", "--out", tmp_path / "no" / "a.jsonl"]
    assert "--out" in refused(capsys, babilong_eval.main, *flags)


@pytest.mark.parametrize("flags", [["--shots", 2], ["--part", "val"], ["--score", "answers"]])
def test_a_flag_of_mmlu_without_mmlu_ends_in_one_line(capsys, flags):
    assert f"{flags[0]} belongs to MMLU" in refused(capsys, babilong_eval.main, *flags)
