"""The README's links to equations and its table of assumptions fit the code."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (ROOT / "lm2.py").read_text(encoding="utf-8").splitlines()


def test_every_equation_links_to_the_line_that_implements_it():
    rows = re.findall(r"^\| \((\d)\) \|.*\(lm2\.py#L(\d+)\)", README, flags=re.MULTILINE)
    assert [n for n, _ in rows] == list("123456")
    for number, line in rows:
        assert f"# Eq. ({number})" in CODE[int(line) - 1], (number, line)


def test_the_line_of_the_transposed_attention_is_linked():
    (line,) = re.findall(r"^\| \|.*\(lm2\.py#L(\d+)\)", README, flags=re.MULTILINE)
    assert "R = torch.cat(" in CODE[int(line) - 1]


def test_the_table_of_assumptions_has_a_row_for_each_tag_in_the_code():
    tags = sum(len(re.findall("differs from paper: |paper silent: ", x)) for x in CODE)
    section = README.split("## What the paper leaves open")[1].split("\n## ")[0]
    rows = [x for x in section.splitlines() if x.startswith("| ")][1:]
    assert tags == len(rows)
