"""MMLU (arXiv 2009.03300): questions with four options, on 57 subjects.

    python babilong_eval.py --mmlu data/mmlu --ckpt Llama-3.2-1B --shots 5

Reads the original files, such as test/anatomy_test.csv. They have no header line. Each row has a
question, four options and the letter of the right one. The examples in a prompt come from the
subject's file in dev, such as dev/anatomy_dev.csv. Writes nothing.

The model chooses the option that it finds most likely behind "Answer:". What counts is the
log-likelihood of the option's letter, or that of its text, divided by the bytes of the text.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.tokenizer import Tokenizer

LETTERS = ("A", "B", "C", "D")
CHANCE = 25.0  # right answers of a guess, in %
PARTS = ("test", "val")
SCORES = ("letters", "answers")
MOST_SHOTS = 5  # a file in dev has five examples

# The four categories of the benchmark, and their subjects.
CATEGORIES = {
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "Humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
    "Social Sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "Others": """anatomy business_ethics clinical_knowledge college_medicine global_facts
        human_aging management marketing medical_genetics miscellaneous nutrition
        professional_accounting professional_medicine virology""",
}
CATEGORY_OF = {}  # of each subject
for category, names in CATEGORIES.items():
    for name in names.split():
        CATEGORY_OF[name] = category
# The four levels of the LM2 paper's Table 2. The names of three begin the names of their subjects.
# paper silent: which subjects are general. Here all others are.
LEVELS = {"high_school": "High School", "college": "College", "professional": "Professional"}
GENERAL = "General Knowledge"


def level_of(subject: str) -> str:
    """The level of a subject, a row of the LM2 paper's Table 2."""
    for start, level in LEVELS.items():
        if subject.startswith(f"{start}_"):
            return level
    return GENERAL


# -------------------------------------------------------------------------------------------------
# The files


class Question(NamedTuple):
    """A question of MMLU."""

    subject: str
    text: str
    options: list[str]  # four
    right: int  # the index of the right option


def read_questions(path: Path, subject: str) -> list[Question]:
    """The questions of a file. ValueError if it is missing or not one of MMLU's."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: unpack all of MMLU's files there") from None
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is no CSV file in UTF-8: unpack MMLU's files again") from None
    questions = []
    for number, row in enumerate(rows, 1):
        if len(row) != 6:
            raise ValueError(
                f"{path}, row {number} has {len(row)} columns, but MMLU's files have 6: unpack "
                "them again"
            )
        text, *options, letter = row
        if letter not in LETTERS:
            raise ValueError(
                f"{path}, row {number} has the answer {letter!r}, which is not A, B, C or D: "
                "unpack MMLU's files again"
            )
        questions.append(Question(subject, text, options, LETTERS.index(letter)))
    if not questions:
        raise ValueError(f"{path} holds no question: unpack MMLU's files again")
    return questions


def find_subjects(folder: Path, part: str) -> list[str]:
    """The subjects that have a file in a part, sorted. ValueError for an unknown one, or if there
    is none."""
    ending = f"_{part}.csv"
    found = sorted(path.name.removesuffix(ending) for path in (folder / part).glob(f"*{ending}"))
    if not found:
        raise ValueError(
            f"--mmlu {folder}: {folder / part} has no file such as anatomy{ending}, name the "
            "folder that holds MMLU's dev, val and test"
        )
    for subject in found:
        if subject not in CATEGORY_OF:
            raise ValueError(
                f"{folder / part / (subject + ending)}: MMLU has no subject {subject!r}, move the "
                "file away"
            )
    return found


class Subject(NamedTuple):
    """What is asked of a subject."""

    questions: list[Question]
    examples: list[Question]  # which stand before each question


def read_subjects(folder: Path, part: str, shots: int) -> dict[str, Subject]:
    """All subjects that have a file in a part, "test" or "val", with the first `shots` examples of
    their files in dev. With 0 no file in dev is read. ValueError for files that cannot be used."""
    subjects = {}
    for name in find_subjects(folder, part):
        questions = read_questions(folder / part / f"{name}_{part}.csv", name)
        examples = []
        if shots > 0:
            path = folder / "dev" / f"{name}_dev.csv"
            examples = read_questions(path, name)[:shots]
            if len(examples) < shots:
                raise ValueError(
                    f"{path} has {len(examples)} examples: give --shots {len(examples)}, or unpack "
                    "MMLU's files again"
                )
        subjects[name] = Subject(questions, examples)
    return subjects


# -------------------------------------------------------------------------------------------------
# The prompt


def shown(question: Question) -> str:
    """A question as it stands in a prompt, up to "Answer:"."""
    lines = [question.text]
    for letter, option in zip(LETTERS, question.options, strict=True):
        lines.append(f"{letter}. {option}")
    lines.append("Answer:")
    return "\n".join(lines)


def prompt_of(question: Question, examples: list[Question]) -> str:
    """The prompt of the benchmark: a line that names the subject, the examples with their answers,
    and the question. Before the subject it has one space, where the benchmark has two."""
    subject = question.subject.replace("_", " ")
    prompt = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for example in examples:
        prompt += f"{shown(example)} {LETTERS[example.right]}\n\n"
    return prompt + shown(question)


def fit(
    tokenizer: Tokenizer, question: Question, examples: list[Question], room: int | None
) -> tuple[list[int], int]:
    """The ids of a prompt, and the number of examples in it.

    room  the most ids that a prompt may have. Examples are dropped, the last one first, until it
          fits. A question that does not fit alone loses its beginning. None keeps all"""
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = tokenizer.encode(prompt_of(question, examples))
    if room is None:
        return begin + ids, len(examples)
    room = max(2, room - len(begin))  # two ids are the least that can be asked
    while len(ids) > room and examples:
        examples = examples[:-1]
        ids = tokenizer.encode(prompt_of(question, examples))
    return begin + ids[-room:], len(examples)


# -------------------------------------------------------------------------------------------------
# The answers


@torch.no_grad()
def log_likelihoods(model: nn.Module, prompt: list[int], options: list[list[int]]) -> list[float]:
    """The log-likelihood in nats of each option behind a prompt. All are ids, and the prompt has
    two or more.

    The prompt but its last id is read once. To score an option, the model then gets a row: the
    prompt's last id, and the option's ids but the last. Options with the same row share it. So four
    letters of one id each need a single row."""
    device = model.norm.weight.device
    rows = []  # the different rows
    row_of = []  # the index of each option's row
    for option in options:
        row = [prompt[-1], *option[:-1]]
        if row not in rows:
            rows.append(row)
        row_of.append(rows.index(row))
    # Rows are padded on the right, where nothing sees the padding.
    idx = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
    for i, row in enumerate(rows):
        idx[i, : len(row)] = torch.tensor(row)
    state = model.read(torch.tensor([prompt[:-1]], device=device))
    state = state.map(lambda tensor: tensor.repeat_interleave(len(rows), dim=0))
    logits, _, _ = model(idx.to(device), state=state)  # (rows, T, V)
    found = []
    for option, i in zip(options, row_of, strict=True):
        of_option = logits[i, : len(option)].to(model.precise_dtype)
        targets = torch.tensor(option, device=device)
        found.append(-F.cross_entropy(of_option, targets, reduction="sum").item())
    return found


def scores_of(
    model: nn.Module, tokenizer: Tokenizer, question: Question, examples: list[Question], by: str
) -> tuple[list[float], int]:
    """The score of each option, the highest for the one that the model chooses, and the number of
    examples in the prompt.

    A model without memory sees nothing of an earlier segment. So its prompt has to fit in one, with
    the longest option behind it.

    by  "letters": the log-likelihood of the letter. "answers": that of the option's text, divided
        by the UTF-8 bytes of the text"""
    texts = LETTERS if by == "letters" else question.options
    options = [tokenizer.encode(f" {text}") for text in texts]
    room = None
    if model.cfg.kind == "llama":
        room = model.cfg.segment_len - max(len(option) for option in options)
    prompt, n_examples = fit(tokenizer, question, examples, room)
    scores = log_likelihoods(model, prompt, options)
    if by == "answers":
        for i, text in enumerate(texts):
            scores[i] /= max(1, len(text.encode("utf-8")))
    return scores, n_examples


def ask(
    model: nn.Module, tokenizer: Tokenizer, subjects: dict[str, Subject], by: str, name: str
) -> list[dict]:
    """The answers of a model to all questions. Of equal scores the first one is chosen.

    An answer has model, subject, i (the index of the question in its file), right and chosen (two
    letters), tied (whether another option has the same score) and shots (the number of examples in
    the prompt).

    by    as in `scores_of`
    name  what the model is called"""
    answers = []
    n_questions = sum(len(subject.questions) for subject in subjects.values())
    bar = tqdm(total=n_questions, desc=name, unit="question", disable=None, leave=False)
    for subject, (questions, examples) in subjects.items():
        for i, question in enumerate(questions):
            scores, n_examples = scores_of(model, tokenizer, question, examples, by)
            answer = dict(
                model=name,
                subject=subject,
                i=i,
                right=LETTERS[question.right],
                chosen=LETTERS[scores.index(max(scores))],
                tied=scores.count(max(scores)) > 1,
                shots=n_examples,
            )
            answers.append(answer)
            bar.update()
    bar.close()
    return answers


# -------------------------------------------------------------------------------------------------
# The table


class Counts(NamedTuple):
    """How many questions were asked, and how many answers are right."""

    n: int
    right: int

    @property
    def percent(self) -> float:
        """The right answers in %."""
        return 100 * self.right / self.n


def total(counts: list[Counts]) -> Counts:
    """The sum of counts: every question weighs the same."""
    return Counts(sum(each.n for each in counts), sum(each.right for each in counts))


def count(answers: list[dict]) -> dict[str, dict[str, Counts]]:
    """The counts of each model and subject."""
    counts = {}
    for answer in answers:
        of_model = counts.setdefault(answer["model"], {})
        n, right = of_model.get(answer["subject"], (0, 0))
        if answer["chosen"] == answer["right"]:
            right += 1
        of_model[answer["subject"]] = Counts(n + 1, right)
    return counts


def groups(subjects: list[str]) -> dict[str, list[str]]:
    """The rows of the LM2 paper's Table 2 and the subjects of each: four categories, four levels.
    A row without a subject is left out."""
    members = {name: [] for name in (*CATEGORIES, *LEVELS.values(), GENERAL)}
    for subject in subjects:
        members[CATEGORY_OF[subject]].append(subject)
        members[level_of(subject)].append(subject)
    return {name: found for name, found in members.items() if found}


def mean_of_rows(percents: list[float]) -> float:
    """What the LM2 paper calls the average: the mean of the rows of its Table 2, in which every
    question counts in two rows."""
    return sum(percents) / len(percents)


ACROSS = 2  # models that stand beside each other
NOTES = """\
[ , ]: Wilson's 95 % interval of the row. The mean is what the LM2 paper calls
the average. Chance is a guess among four options."""


def table(answers: list[dict], interval: Callable[[int, int], tuple[float, float]]) -> str:
    """All tables of these answers, at most 80 columns wide: by subject, by the rows of the LM2
    paper's Table 2, and over all questions. All models have answered the same questions.

    interval  from right answers and questions to two shares, such as babilong_eval.wilson"""
    counts = count(answers)
    models = list(counts)
    parts = []
    for start in range(0, len(models), ACROSS):
        beside = [counts[model] for model in models[start : start + ACROSS]]
        heads = "".join(f" {model[-18:]:<18}" for model in models[start : start + ACROSS])
        subjects = sorted(beside[0])
        by_subject = [line_of(name, [name], beside, interval) for name in subjects]
        rows = groups(subjects)
        by_group = [line_of(name, rows[name], beside, interval) for name in rows]
        means = []
        for of_model in beside:
            percents = []
            for members in rows.values():
                percents.append(total([of_model[subject] for subject in members]).percent)
            means.append(mean_of_rows(percents))
        lines = [
            f"{'right answers in %':<35} {'n':>6}{heads}",
            *by_subject,
            "",
            *by_group,
            plain_line(f"mean of these {len(rows)} rows", means),
            "",
            line_of("all questions", subjects, beside, interval),
            plain_line("chance", [CHANCE for _ in beside]),
        ]
        parts.append("\n".join(line.rstrip() for line in lines) + "\n")
    return "\n".join(parts) + NOTES


def line_of(
    label: str,
    subjects: list[str],
    beside: list[dict[str, Counts]],
    interval: Callable[[int, int], tuple[float, float]],
) -> str:
    """The line of some subjects: the number of questions, and what each model has right."""
    columns = []
    for of_model in beside:
        counts = total([of_model[subject] for subject in subjects])
        low, high = interval(counts.right, counts.n)
        columns.append(f"{counts.percent:5.1f} [{100 * low:.1f},{100 * high:.1f}]")
    shown_columns = "".join(f" {column:<18}" for column in columns)
    return f"{label:<35} {counts.n:>6,}{shown_columns}"


def plain_line(label: str, percents: list[float]) -> str:
    """A line of figures without an interval."""
    return f"{label:<42}" + "".join(f" {value:5.1f}{'':13}" for value in percents)
