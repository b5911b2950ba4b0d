"""The background prose and the tokenizer: clean sentences, a split without leaks, ids that give it back.

    python -m pytest tests/test_text.py -q
"""

import base64
import random
import re
from collections import Counter
from itertools import islice

import pytest

from data import babi, background, tokenizer


@pytest.fixture(scope="module")
def documents():
    return background.documents()


@pytest.fixture(scope="module")
def tok():
    return tokenizer.load()


def flat(passages):
    return [sentence for passage in passages for sentence in passage]


def strange_strings(count, seed):
    """Strings of all planes of Unicode, white space, signs, digits, and bytes read as Latin-1."""
    rng = random.Random(seed)
    pools = [lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
             lambda: rng.choice(" \t\n\r\x0b\f\x1c\x85\xa0\u2028\u3000"), lambda: chr(rng.randrange(256)),
             lambda: rng.choice("'\".,!?-`[]{}^<|>012٣½"), lambda: rng.choice("abcXYZ the kitchen's")]
    return ["".join(rng.choice(pools)() for _ in range(rng.randrange(30))) for _ in range(count)]


# ---- background ----

def test_the_shipped_documentation_gives_five_thousand_sentences(documents):
    assert len(flat(documents)) >= 5000


def test_every_shipped_sentence_is_one_closed_line_of_plain_words(documents):
    for sentence in flat(documents):
        assert re.match(r"[\"']?[A-Z]", sentence) and re.search(r"[.!?][\"']?$", sentence), sentence
        assert len(sentence.split(" ")) >= background.MIN_WORDS, sentence
        assert sentence == " ".join(sentence.split()), sentence
        assert not re.search(r">>>|::|``|\*|_|=|\(\)|---", sentence), sentence
        assert sum(map(str.isalpha, sentence)) > 0.6 * len(sentence), sentence


def test_no_shipped_sentence_comes_twice(documents):
    assert max(Counter(flat(documents)).values()) == 1


def test_the_shipped_documents_are_the_same_at_every_call(documents, monkeypatch):
    texts = list(islice(background.shipped_texts(), 120))       # a part: to parse them all takes seconds
    monkeypatch.setattr(background, "shipped_texts", lambda: iter(texts))
    found = background.documents()
    assert len(found) > 50 and found == documents[:len(found)]


@pytest.mark.parametrize("text", [
    "Too short to be background.",
    "no capital letter begins this long line of words.",
    "This long line of words has no end at all",
    "Call the function os.path.join with all of its many arguments.",
    "The names in snake_case make this line a piece of code.",
    "Here is x = y + 1 in a line of some more words.",
    "A (parenthesis that is never closed runs to the end of it.",
    "The value 12 34 56 78 90 12 34 56 78 90 12 34 a b.",
    "ALL OF THESE WORDS ARE SHOUTED AT YOU ALL THE TIME."])
def test_what_is_no_sentence_of_prose_is_dropped(text):
    assert list(background.sentences(text)) == []


def test_abbreviations_and_initials_end_no_sentence():
    first = "Mr. Bennet and Dr. J. Watson met Mrs. Gardiner, i.e. Her sister, before they all went to dinner."
    second = "\"Is it not late, my dear old friend?\" asked the doctor."
    assert list(background.sentences(f"{first} {second}")) == [first, second]


def test_wrapped_lines_are_joined_and_blank_lines_end_a_paragraph():
    text = ("It was a cold\nand  rainy day in the\nlarge city.\n\n"
            "A heading with eight words and no full stop\n\nThe end.")
    assert list(background.sentences(text)) == ["It was a cold and rainy day in the large city."]


def test_lists_and_code_in_documentation_do_not_run_into_the_prose():
    text = ("Return the number of words in the given text:\n    text -- The text that is to be counted.\n"
            "* The *first* item of the list is\n  wrapped onto another line.\n"
            "It uses the :class:`Counter` of the standard library here.")
    assert list(background.sentences(text, markup=True)) == [
        "The first item of the list is wrapped onto another line.",
        "It uses the Counter of the standard library here."]


def test_a_book_is_read_without_its_licence_and_with_plain_quotes(tmp_path):
    (tmp_path / "a.txt").write_text(
        "\ufeffThis licence text before the book is not part of it.\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n"
        "“It’s a _very_ long way to the sea,” said\nthe old captain.\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
        "This licence text after the book is not part of it.\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("This file of other notes is not a book at all.", encoding="utf-8")
    assert background.documents(tmp_path) == [['"It\'s a very long way to the sea," said the old captain.']]


def test_a_book_with_a_byte_order_mark_keeps_its_first_sentence_and_repeats_none(tmp_path):
    first, second = "It is a very long way to the sea.", "He said it to the captain once again."
    (tmp_path / "a.txt").write_text(f"\ufeff{first} {second} {second} {first}", encoding="utf-8")
    assert background.documents(tmp_path) == [[first, second]]


def test_train_and_val_share_no_sentence_and_together_are_everything(documents):
    train, val = (flat(background.split(documents, part)) for part in ("train", "val"))
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(flat(documents))


def test_about_a_tenth_of_the_sentences_is_val(documents):
    assert 0.07 < len(flat(background.split(documents, "val"))) / len(flat(documents)) < 0.13


def test_passages_keep_the_order_of_their_document(documents):
    place = {s: (i, j) for i, document in enumerate(documents) for j, s in enumerate(document)}
    for passage in background.split(documents, "train") + background.split(documents, "val"):
        start, (i, j) = place[passage[0]], place[passage[-1]]
        assert start == (i, j - len(passage) + 1)


def test_another_book_moves_no_sentence_to_the_other_side(documents, tmp_path):
    sentences = flat(documents)
    (tmp_path / "m.txt").write_text("\n".join(sentences[:3000]), encoding="utf-8")
    sides = [set(flat(background.split(background.documents(tmp_path), part))) for part in ("train", "val")]
    # A book that is read earlier, and shares sentences with the first one.
    (tmp_path / "a.txt").write_text("\n".join(sentences[3000:4000] + sentences[:3000:97]), encoding="utf-8")
    more = [set(flat(background.split(background.documents(tmp_path), part))) for part in ("train", "val")]
    assert sides[1] and sides[1] <= more[1]
    assert sides[0] - more[0] <= set(sentences[:3000:97])  # only what both books say can have become val
    assert not more[0] & more[1]


def test_a_sentence_of_val_is_left_out_of_the_train_passages_of_another_book(documents):
    held_out = background.split(documents, "val")[0][0]
    for n in range(50):
        book = [f"This is the sentence with number {n} of another book.", held_out]
        if background.split([book], "train"):
            break
    assert background.split([book], "train") == [book]
    assert background.split([*documents, book], "train")[-1] == book[:1]


def test_a_part_that_does_not_exist_is_named(documents):
    with pytest.raises(ValueError, match="'test'"):
        background.split(documents, "test")


@pytest.mark.parametrize("name, content, words", [
    ("missing", None, "missing does not exist"), ("book.txt", b"x", "book.txt is not a folder"),
    ("empty/x.md", b"x", "empty holds no .txt file"),
    ("short/x.txt", b"Too short.", "short holds no English sentence"),
    ("latin/x.txt", "Ren\xe9e".encode("latin-1"), r"latin.x.txt is not UTF-8 \(byte 3\)")])
def test_a_folder_that_cannot_be_used_is_named_in_one_line(tmp_path, capsys, name, content, words):
    file = tmp_path / name
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    folder = file.parent if "/" in name else file
    with pytest.raises(ValueError, match=words) as caught:
        background.documents(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        background.main(["--background", str(folder)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- tokenizer ----

def slow_encode(text, ranks):
    """BPE by its definition: a piece that is a token stays whole; else join the first pair of lowest rank."""
    ids = []
    for piece in re.findall(tokenizer.PATTERN, text):
        piece = piece.encode("utf-8")
        parts = [piece] if piece in ranks else [bytes([b]) for b in piece]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def rank_text(tokens):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def test_the_shipped_vocabulary_has_2048_ids_and_the_end_of_text_is_the_last(tok):
    assert (tok.n_vocab, tok.eot) == (2048, 2047)
    assert tok.decode([tok.eot]) == "<|endoftext|>"


def test_any_string_comes_back_from_its_ids(tok):
    for text in ["", *strange_strings(2000, seed=1)]:
        assert tok.decode(tok.encode(text)) == text


def test_a_lone_surrogate_becomes_a_replacement_character(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"


def test_a_special_token_in_the_text_is_ordinary_text(tok):
    ids = tok.encode("a<|endoftext|>b")
    assert tok.eot not in ids and tok.decode(ids) == "a<|endoftext|>b"


def test_a_piece_is_a_word_signs_one_digit_or_white_space():
    pieces = ["Don", "'t", " say", " 1", "9", "8", "4", ",", " \"", "Renée", ".\"", "\n ", "x"]
    assert re.findall(tokenizer.PATTERN, "".join(pieces)) == pieces


def test_a_very_long_run_of_one_character_is_encoded(tok):
    for character in "a ^'\n1":
        assert tok.decode(tok.encode(character * 200_000)) == character * 200_000


def test_bytes_of_part_of_a_character_can_be_streamed(tok):
    ids = tok.encode("日本")
    assert b"".join(tok.decode_bytes([i]) for i in ids) == "日本".encode()
    assert tok.decode(ids[:1]) == "\ufffd"


def test_sentence_by_sentence_gives_the_ids_of_the_whole_passage(tok, documents):
    rng = random.Random(2)
    for _ in range(200):
        sentences = rng.sample(flat(documents), 10)
        sentences += [event.text for event in babi.TASKS["qa2"].story(rng).events]
        rng.shuffle(sentences)
        pieces = [i for n, s in enumerate(sentences) for i in tok.encode(" " * (n > 0) + s)]
        assert pieces == tok.encode(" ".join(sentences))


def test_encoding_equals_byte_pair_encoding_by_its_definition(tok, documents):
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(tok.ranks.splitlines())}
    for text in random.Random(3).sample(flat(documents), 300) + strange_strings(500, seed=4):
        assert tok.encode(text) == slow_encode(text, ranks), text


def test_every_word_of_the_stories_is_one_token_after_a_space_and_alone(tok):
    rng, words = random.Random(5), set()
    for task in babi.TASKS.values():
        for _ in range(60):
            made = task.story(rng)
            for text in [e.text for e in made.events] + [f"{q.text} {q.answer}" for _, q in made.questions]:
                words |= set(re.findall(r"[A-Za-z]+", text))
    assert {"Mary", "John", "Sandra", "Daniel", "kitchen", "football", "discarded", "Where"} <= words
    for word in words:
        assert len(tok.encode(word)) == len(tok.encode(f" {word}")) == 1, word


def test_every_word_of_all_twenty_tasks_is_one_token_after_a_space_and_alone(tok):
    for word in tokenizer.WORDS:
        assert len(tok.encode(word)) == len(tok.encode(f" {word}")) == 1, word


def test_a_word_of_a_story_is_the_same_token_before_a_full_stop(tok):
    assert tok.encode("Mary went to the kitchen.")[-2:] == tok.encode(" kitchen") + tok.encode(".")


def test_a_token_of_prose_holds_three_and_a_half_characters(tok, documents):
    text = " ".join(flat(background.split(documents, "val")))
    assert tok.chars_per_token(text) == len(text) / len(tok.encode(text)) > 3.5


def test_training_merges_what_is_most_frequent_and_of_equals_the_first_in_byte_order():
    # ab 3 + 3 + 1, bc 5, ba 3; with ab joined: bc 5, abab 3, abc 0; then abab 3; pq and xy 2 are equal.
    pieces = {"xy": 2, "pq": 2, "abab": 3, "ab": 1, "bc": 5}
    tokens = tokenizer.train(pieces, [], 256 + 5)
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    assert tokens[256:] == [b"ab", b"bc", b"abab", b"pq", b"xy"]


def test_training_joins_from_the_left_and_counts_what_is_left_over():
    # aaa holds "aa" twice; joined from the left it is aa + a, once.
    assert tokenizer.train({"aaa": 2, "bc": 3}, [], 259)[256:] == [b"aa", b"bc", b"aaa"]


def test_given_words_are_the_last_tokens_and_teach_nothing():
    assert tokenizer.train({"bc": 9, "bcd": 2, "xy": 3}, ["bc"], 259)[256:] == [b"xy", b"bc", b" bc"]
    assert tokenizer.train({"bcd": 2, " bcd": 1}, ["bc"], 259)[256:] == [b"bc", b"bcd", b" bc"]


def test_training_beyond_what_the_text_holds_is_refused():
    with pytest.raises(ValueError, match="only 257 of 300"):
        tokenizer.train({"ab": 1}, [], 300)
    with pytest.raises(ValueError, match="too few"):
        tokenizer.train({"ab": 1}, ["word"], 257)


def test_the_command_trains_a_file_that_loads_and_leaves_no_other(documents, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("\n".join(flat(documents)[:500]), encoding="utf-8")
    out = tmp_path / "out.tiktoken"
    tokenizer.main(["--background", str(tmp_path), "--vocab_size", "700", "--out", str(out)])
    assert tokenizer.load(out).n_vocab == 700 and "700 tokens" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.txt", "out.tiktoken"]


@pytest.mark.parametrize("arguments", [["--vocab_size", "300"], ["--out", "no/such/folder/x"],
                                       ["--out", "FOLDER"],
                                       ["--vocab", "700"], ["--background", "no/such/folder"]])
def test_a_mistake_on_the_command_line_ends_in_one_line(documents, tmp_path, capsys, arguments):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "book.txt").write_text("\n".join(flat(documents)[:500]), encoding="utf-8")
    arguments = [str(tmp_path / "in") if argument == "FOLDER" else argument for argument in arguments]
    given = ["--background", str(tmp_path / "in"), "--vocab_size", "620", "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit) as stop:
        tokenizer.main(given + arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_saved_string_makes_the_same_tokenizer(tok):
    again = tokenizer.Tokenizer(tok.ranks)
    assert type(tok.ranks) is str and again.ranks == tok.ranks
    assert again.encode("Sandra went to the bathroom.") == tok.encode("Sandra went to the bathroom.")


ALL_BYTES = rank_text(bytes([b]) for b in range(256))


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), (b"", "256 of the 256 bytes"), (b"not a rank file\n", "line 1 is no new token"),
    (b"\xff\xfe\x00", "not a text of base64"), (ALL_BYTES[:1000].encode(), "bytes are missing"),
    (ALL_BYTES[:-1].encode(), "1 of the 256 bytes"), ((ALL_BYTES + "YWI= 25").encode(), "not complete"),
    ((ALL_BYTES + "YWI= 257\n").encode(), "line 257"), ((ALL_BYTES + "YQ== 256\n").encode(), "line 257"),
    ((ALL_BYTES + "YW!I= 256\n").encode(), "line 257")])
def test_a_rank_file_that_is_none_is_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "ranks.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
