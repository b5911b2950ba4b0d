"""A fixture that several test files share. A file that needs another folder defines its own."""

import pytest

from test_babilong import book


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one book, as --background takes it."""
    path = tmp_path_factory.mktemp("books")
    (path / "book.txt").write_text(book(900), encoding="utf-8")
    return path
