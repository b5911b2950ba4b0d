"""The background prose and the tokenizer: clean sentences, a split without leaks, ids of any text.

python -m pytest tests/test_text.py -q
"""

import base64
import random
import re
import sysconfig
from itertools import islice, pairwise

import pytest

from data import babi, background, tokenizer


@pytest.fixture(scope="module")
def documents():
    """A part of Python's documentation. To parse all of it takes seconds."""
    texts = list(islice(background.shipped_texts(), 150))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "shipped_texts", lambda: iter(texts))
        return background.documents()


@pytest.fixture(scope="module")
def tok():
    return tokenizer.load()


def flat(runs):
    return [sentence for run in runs for sentence in run]


def strange_texts(n, seed):
    """Texts of characters from all of Unicode, white space, signs and words."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        plane = chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        choices = [*" \t\n\r\x0b\f\x1c\x85\xa0\u2028", *"'\".,!?[]{}<|>012٣½", *"abcX", "the's"]
        choices += [plane, chr(rng.randrange(256))]
        texts.append("".join(rng.choices(choices, k=rng.randrange(30))))
    return texts


# Background


def test_every_shipped_sentence_is_plain_prose_on_one_line_and_comes_once(documents):
    sentences = flat(documents)
    assert len(sentences) > 2000
    assert len(set(sentences)) == len(sentences)
    for sentence in sentences:
        assert re.fullmatch(r"[\"']?[A-Z].*[.!?][\"']?", sentence), sentence
        assert len(sentence.split(" ")) >= background.MIN_WORDS, sentence
        assert sentence == " ".join(sentence.split()), sentence
        assert not re.search(r">>>|::|``|\*|_|=|\(\)|---", sentence), sentence


def test_the_library_is_read_without_its_tests_and_installed_packages(tmp_path, monkeypatch):
    wanted = ["a.py", "package/b.py", "package/deep/c.py"]
    for name in [*wanted, "test/d.py", "package/tests/e.py", "site-packages/f.py", "notes.txt"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'"""{name}"""\nclass C:\n    "inner"\n    def f(self):\n        "last"\n')
    (tmp_path / "broken.py").write_text("def (:")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    texts = list(background.shipped_texts())[-len(wanted) :]
    assert texts == [f"{name}\n\ninner\n\nlast" for name in wanted]


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be background, by one.",
        "no capital letter begins this long line of words.",
        "This long line of words has no end at all",
        "Call the function os.path.join with all of its many arguments.",
        "The names in snake_case make this line a piece of code.",
        "The name camelCase makes this long line a piece of code.",
        "A (parenthesis that is never closed runs to the end of it.",
        "The value 12 34 56 78 90 12 34 56 78 90 12 34 a b.",
        "ALL OF THESE WORDS ARE SHOUTED AT YOU ALL THE TIME.",
    ],
)
def test_what_is_not_a_sentence_of_prose_is_dropped(text):
    assert list(background.sentences(text)) == []


def test_prose_is_cut_at_its_sentences_and_paragraphs_alone():
    first = (
        "Mr. Bennet and Dr. J. Watson met McGregor, i.e. Her brother, long before they all dined."
    )
    second = '"Is it not late, my dear old friend?" asked the doctor.'
    third = "It was a cold and rainy day there."
    wrapped = (
        "It was a cold\nand  rainy day there.\n\nA heading of eight words without its stop\n\n"
    )
    text = f"{first} {second}\n{wrapped}The end."
    assert list(background.sentences(text)) == [first, second, third]


def test_lists_and_code_in_documentation_do_not_run_into_the_prose():
    text = (
        "Return the number of words in the given text:\n    text -- The text to be counted now.\n"
        "* The *first* item of the list is\n  wrapped onto another line.\n"
        "It uses the :class:`Counter` of the standard library here."
    )
    assert list(background.sentences(text, is_documentation=True)) == [
        "The first item of the list is wrapped onto another line.",
        "It uses the Counter of the standard library here.",
    ]


def test_a_book_is_read_without_its_licence_with_plain_quotes_and_each_sentence_once(tmp_path):
    (tmp_path / "a.txt").write_text(
        "\ufeffThis licence text before the book is not part of it.\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n"
        "“It’s a _very_ long way to the sea,” said\nthe old captain. "
        "He said it to the captain once again. He said it to the captain once again.\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
        "This licence text after the book is not part of it.\n",
        encoding="utf-8",
    )
    (tmp_path / "b.txt").write_text("\ufeffA byte order mark is no part of a sentence.", "utf-8")
    (tmp_path / "notes.md").write_text("This file of other notes is not a book at all.")
    assert background.documents(tmp_path) == [
        [
            '"It\'s a very long way to the sea," said the old captain.',
            "He said it to the captain once again.",
        ],
        ["A byte order mark is no part of a sentence."],
    ]


def test_text_files_are_known_by_their_ends_and_all_that_are_not_utf8_are_named(tmp_path):
    sentence = "The old captain watched the wet lamp all night long. "
    names = ["a.txt", "B.TXT", "pg345.txt.utf-8", "c.md", "d.txt.zip"]
    for number, name in enumerate(names):
        (tmp_path / name).write_text(sentence.replace("old", f"old{'er' * number}"))
    assert len(background.documents(tmp_path)) == 3
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_bytes(b"Ren\xe9e")
    with pytest.raises(ValueError, match=r"x\.txt \(byte 3\), y\.txt \(byte 3\)"):
        background.documents(tmp_path)


def test_train_and_val_share_no_sentence_and_are_everything_in_order(documents):
    train = background.split(documents, "train")
    val = background.split(documents, "val")
    assert not set(flat(train)) & set(flat(val))
    assert sorted(flat(train + val)) == sorted(flat(documents))
    following = set()
    for document in documents:
        following.update(pairwise(document))
    for runs in (train, val):
        for run in runs:
            assert following.issuperset(pairwise(run))
        for run, later in pairwise(runs):  # neighbouring passages are one run
            assert (run[-1], later[0]) not in following


def test_a_tenth_of_a_text_is_val():
    sentences = [f"This is sentence {i}." for i in range(30_000)]
    assert 0.08 < len(flat(background.split([sentences], "val"))) / 30_000 < 0.12


def test_another_book_moves_no_sentence_to_the_other_part(documents):
    old = flat(documents)[:1500]
    shared = old[::97]
    new = flat(documents)[1500:1800] + shared
    train, val = (set(flat(background.split([old], part))) for part in ("train", "val"))
    more_train, more_val = (
        set(flat(background.split([new, old], part))) for part in ("train", "val")
    )
    assert val and val <= more_val
    assert train - more_train <= set(shared)  # only what both books say can become val
    assert not more_train & more_val


def test_a_part_that_does_not_exist_is_named(documents):
    with pytest.raises(ValueError, match="'test'"):
        background.split(documents, "test")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing", None, "missing does not exist"),
        ("book.txt", b"x", "book.txt is not a folder"),
        ("empty/x.md", b"x", "empty holds no .txt file"),
        ("short/x.txt", b"Too short.", "short holds no English sentence"),
        (
            "latin/x.txt",
            "Ren\xe9e".encode("latin-1"),
            r"latin holds files that are not UTF-8: x.txt \(byte 3\)",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_in_one_line(tmp_path, capsys, name, content, words):
    folder = tmp_path / name
    if content is not None:
        folder.parent.mkdir(exist_ok=True)
        folder.write_bytes(content)
    if "/" in name:
        folder = folder.parent
    with pytest.raises(SystemExit) as stop:
        background.main(["--background", str(folder)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert re.search(words, message)


def test_the_command_prints_numbers_and_some_sentences(documents, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(flat(documents)[:400]), encoding="utf-8")
    background.main(["--background", str(tmp_path)])
    every, train, val, *shown = capsys.readouterr().out.splitlines()
    (book,) = background.documents(tmp_path)
    n_train, n_val = (len(flat(background.split([book], part))) for part in ("train", "val"))
    n_characters = len("\n".join(book)) + 1
    assert every.split()[:2] == ["all", str(len(book))]
    assert f" {n_characters:,} characters in 1 documents" in every
    assert train.split()[:2] == ["train", str(n_train)]
    assert val.split()[:2] == ["val", str(n_val)]
    assert len(shown) == 5 and {line.strip() for line in shown} <= set(book)


# Tokenizer


def slow_encode(text, ranks):
    """BPE by definition: a piece that is a token stays whole, others join pairs by lowest rank."""
    ids = []
    for piece in re.findall(tokenizer.PATTERN, text):
        piece = piece.encode("utf-8")
        parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
        while True:
            joined = [left + right for left, right in pairwise(parts)]
            candidates = [(ranks[token], i) for i, token in enumerate(joined) if token in ranks]
            if not candidates:
                break
            i = min(candidates)[1]
            parts[i : i + 2] = [joined[i]]
        ids += [ranks[part] for part in parts]
    return ids


def test_the_shipped_vocabulary_has_2048_ids_and_the_end_of_text_is_the_last(tok):
    assert (tok.n_vocab, tok.eot) == (2048, 2047)
    assert tok.decode([tok.eot]) == "<|endoftext|>"


def test_encoding_is_byte_pair_encoding_and_any_text_comes_back(tok, documents):
    lines = tok.ranks.splitlines()
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(lines)}
    prose = random.Random(3).sample(flat(documents), 200)
    for text in ["", "a<|endoftext|>b", *prose, *strange_texts(800, seed=4)]:
        ids = tok.encode(text)
        assert ids == slow_encode(text, ranks), text
        assert tok.decode(ids) == text
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"  # half of a surrogate pair


def test_a_piece_is_a_word_signs_one_digit_or_white_space():
    pieces = ["Don", "'t", " say", " 1", "9", "8", "4", ",", ' "', "Renée", '."', "\n ", "x"]
    assert re.findall(tokenizer.PATTERN, "".join(pieces)) == pieces


@pytest.mark.parametrize("character", "a ^'\n1")
def test_a_very_long_run_of_one_character_is_encoded(tok, character):
    assert tok.decode(tok.encode(character * 200_000)) == character * 200_000


def test_bytes_of_part_of_a_character_can_be_streamed(tok):
    ids = tok.encode("日本")
    assert b"".join(tok.decode_bytes([i]) for i in ids) == "日本".encode()
    assert tok.decode(ids[:1]) == "\ufffd"


def test_the_ids_of_sentences_are_those_of_the_whole_text(tok, documents):
    rng = random.Random(2)
    for _ in range(100):
        sentences = rng.sample(flat(documents), 10)
        sentences += [event.text for event in babi.TASKS["qa2"].story(rng).events]
        rng.shuffle(sentences)
        ids = []
        for sentence in sentences:
            ids += tok.encode(" " + sentence)
        assert ids == tok.encode(" " + " ".join(sentences))


def test_every_word_of_the_stories_is_one_token_alone_and_behind_a_space(tok):
    rng = random.Random(5)
    words = set(tokenizer.WORDS)
    for task in babi.TASKS.values():
        for _ in range(30):
            story = task.story(rng)
            texts = [event.text for event in story.events]
            texts += [f"{question.text} {question.answer}" for _, question in story.questions]
            words.update(re.findall("[A-Za-z]+", " ".join(texts)))
    for word in words:
        assert len(tok.encode(word)) == len(tok.encode(f" {word}")) == 1, word


def test_a_token_of_prose_holds_three_and_a_half_characters(tok, documents):
    text = " ".join(flat(background.split(documents, "val")))
    assert tok.chars_per_token(text) == len(text) / len(tok.encode(text)) > 3.5


@pytest.mark.parametrize(
    "pieces, words, learned",
    [
        # ab 7, bc 5, ba 3. With ab joined: bc 5, abab 3. xy and pq are equal: byte order decides.
        ({"xy": 2, "pq": 2, "abab": 3, "ab": 1, "bc": 5}, [], "ab bc abab pq xy"),
        # aaa holds aa twice. Joined from the left it is aa and a.
        ({"aaa": 2, "bc": 3}, [], "aa bc aaa"),
        # A piece that is a given word teaches nothing. A given word may be learned elsewhere.
        ({"bc": 9, "bcd": 2, "xy": 3}, ["bc"], "xy bc _bc"),
        ({"bcd": 2, " bcd": 1}, ["bc"], "bc bcd _bc"),
    ],
)
def test_training_merges_what_is_most_frequent_and_puts_given_words_last(pieces, words, learned):
    expected = [bytes([byte]) for byte in range(256)]
    expected += [token.replace("_", " ").encode() for token in learned.split()]
    assert tokenizer.train(pieces, words, len(expected)) == expected


def test_training_beyond_what_the_text_holds_gives_fewer_tokens():
    assert tokenizer.train({"ab": 3}, [], 300) == [*tokenizer.BYTES, b"ab"]
    with pytest.raises(ValueError, match="too few"):
        tokenizer.train({"ab": 1}, ["word"], 257)


@pytest.fixture
def books(documents, tmp_path):
    (tmp_path / "in").mkdir()
    text = "\n".join(flat(documents)[:300])
    (tmp_path / "in" / "book.txt").write_text(text, encoding="utf-8")
    return tmp_path / "in"


def test_the_command_trains_a_file_that_loads_and_leaves_no_other(books, tmp_path, capsys):
    out = tmp_path / "out.tiktoken"
    tokenizer.main(["--background", str(books), "--vocab_size", "650", "--out", str(out)])
    made = tokenizer.load(out)
    assert made.n_vocab == 650
    assert len(made.encode(" kitchen")) == 1
    prose = background.split(background.documents(books), "train")
    text = "\n".join(" ".join(passage) for passage in prose)
    assert f"650 tokens, characters a token {made.chars_per_token(text):.2f} on train" in (
        capsys.readouterr().out
    )
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.tiktoken"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--vocab_size", "300"],
        ["--out", "no/such/folder/x"],
        ["--out", "."],
        ["--vocab", "700"],
        ["--background", "no/such/folder"],
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line(books, tmp_path, capsys, flags):
    given = ["--background", str(books), "--vocab_size", "600", "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit) as stop:
        tokenizer.main(given + flags)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [books]


ALL_BYTES = tokenizer.format_ranks([bytes([byte]) for byte in range(256)])


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file"),
        ("", "256 of the 256 bytes"),
        ("not a rank file\n", "line 1 is not a new token"),
        ("\xff", "not a text of base64"),
        (ALL_BYTES[:-1], "1 of the 256 bytes"),
        (ALL_BYTES + "YWI= 25", "not complete"),
        (ALL_BYTES + "YWI= 257\n", "line 257"),  # the rank is 256
        (ALL_BYTES + "YQ== 256\n", "line 257"),  # the token is there already
        (ALL_BYTES + "YW!I= 256\n", "line 257"),
    ],
)
def test_a_file_that_is_not_a_rank_file_is_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "ranks.tiktoken"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=words) as caught:
        tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_string_of_a_checkpoint_makes_the_same_tokenizer(tok):
    content = {"tokenizer": tok.ranks, "config": {"vocab_size": 2048}}
    again = tokenizer.of_checkpoint(content, "ckpt.pt")
    assert again.ranks == tok.ranks
    assert again.encode("Sandra went to the bathroom.") == tok.encode(
        "Sandra went to the bathroom."
    )
    content["config"]["vocab_size"] = 5
    with pytest.raises(ValueError, match="^ckpt.pt has a tokenizer of 2048 tokens, a model of 5"):
        tokenizer.of_checkpoint(content, "ckpt.pt")
