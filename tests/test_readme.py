"""README.md fits the code: the lines that it links to, the rows of its table of differences."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (ROOT / "lm2.py").read_text(encoding="utf-8").splitlines()


def test_every_equation_links_to_the_line_that_implements_it():
    rows = re.findall(r"^\| \((\d)\) \|.*\(lm2\.py#L(\d+)\)", README, flags=re.MULTILINE)
    assert [number for number, _ in rows] == list("123456")
    for number, line in rows:
        assert f"# Eq. ({number})" in CODE[int(line) - 1], (number, line)


def test_the_line_of_the_transposed_attention_is_linked():
    (line,) = re.findall(r"^\| \|.*\(lm2\.py#L(\d+)\)", README, flags=re.MULTILINE)
    assert "R = torch.cat(" in CODE[int(line) - 1]


def test_the_table_of_differences_has_a_row_for_each_tag_in_the_code():
    code = "\n".join(CODE)
    of_titans = code[code.index("class NeuralMemory") : code.index("# The kinds of memory")]
    n_tags = 0
    for line in code.replace(of_titans, "").splitlines():
        n_tags += len(re.findall("differs from paper: |paper silent: ", line))
    section = README.split("## What differs from the paper")[1].split("\n##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + n_tags  # and the head of the table


def test_the_diff_of_a_worked_change_starts_from_lines_of_the_model():
    removed = re.findall(r"^-        (.*)$", README, flags=re.MULTILINE)
    assert len(removed) >= 5
    for line in removed:
        assert any(line.split("  #")[0] in code for code in CODE), line


def test_the_two_pictures_of_the_architecture_differ_in_their_colours_alone():
    light, dark = [
        re.sub(r"#[0-9a-f]{6}\b", "", (ROOT / "assets" / name).read_text(encoding="utf-8"))
        for name in ("lm2.svg", "lm2-dark.svg")
    ]
    assert light == dark
