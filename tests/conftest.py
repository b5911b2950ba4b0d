"""What several test files share: a folder with a book, and the memory that README.md shows."""

from pathlib import Path

import pytest

import lm2
from test_babilong import book


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one book, as --background takes it."""
    path = tmp_path_factory.mktemp("books")
    (path / "book.txt").write_text(book(900), encoding="utf-8")
    return path


def memory_of_the_readme():
    """The class under "Write your own memory" in README.md, made of what stands there."""
    readme = Path(__file__).resolve().parent.parent / "README.md"
    code = readme.read_text(encoding="utf-8").partition("### Write your own memory")[2]
    code = code.partition("```python\n")[2].partition("```")[0]
    names = dict(vars(lm2))
    exec(code, names)
    return names["MovingAverages"]


# As the README says it, so that all tests know this kind of memory.
lm2.MEMORIES["averages"] = memory_of_the_readme()
