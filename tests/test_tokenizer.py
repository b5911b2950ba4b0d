"""Tokenizers for any text: how they are chosen, learned, counted in bytes and kept in checkpoints.

python -m pytest tests/test_tokenizer.py -q
"""

import base64
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tiktoken

from data import text, tokenizer

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
STRANGE = [
    "",
    "plain words, 1984 and <|endoftext|>",
    "tabs\tand\r\n\n        indentation \n",
    "Größe ist's, łódź, ﬁ, \u2028\u00a0\x00\x1c",
    "日本語 עברית हिन्दी \U0001f469\u200d\U0001f680 e\u0301",
]


def fake_gpt2():
    """A stand-in for GPT-2's encoding: its bytes are in another order, and it has few tokens."""
    tokens = [bytes([255 - byte]) for byte in range(256)]
    tokens += [b"in", b" x", b"  ", b"19", "ß".encode()]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(tokens)},
    )


@pytest.fixture
def gpt2(monkeypatch):
    encoding = fake_gpt2()
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    return encoding


def code(name, n=60):
    """Lines of a program that uses one name again and again."""
    lines = []
    for i in range(n):
        lines.append(f"def {name}_{i}(self):\n        return self.{name}.get({i})\n")
    return "".join(lines)


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


@pytest.fixture
def program(tmp_path):
    """A folder of two texts to learn from, one that is held out, and files that do not count.

    Each has a name of its own."""
    folder = tmp_path / "program"
    write(
        folder,
        {
            "lantern.py": code("lantern"),
            "deep/harbour.md": code("harbour"),
            "deep/orchard": code("orchard"),
            ".git/hidden.py": code("hidden"),
            "deep/.secret": code("secret"),
            "binary.bin": b"\xff\xfe" + code("binary").encode("utf-8"),
        },
    )
    return folder


def learn(paths, out, n_vocab, capsys):
    """The tokenizer that the command learns, and the line that it prints."""
    sources = [str(path) for path in paths]
    flags = ["--vocab_size", str(n_vocab), "--out", str(out)]
    tokenizer.main(["--text", *sources, *flags])
    return tokenizer.choose(str(out)), capsys.readouterr().out


# Choosing a tokenizer


@pytest.mark.parametrize("name", ["shipped", "bytes", "gpt2"])
def test_any_text_comes_back_and_the_sizes_of_its_ids_add_up_to_its_bytes(gpt2, name):
    tok = tokenizer.choose(name)
    sizes = tok.n_bytes()
    assert sizes.dtype == np.int64 and sizes.shape == (tok.n_vocab,)
    assert sizes[tok.eot] == 0 and sizes[: tok.eot].min() == 1
    for strange in STRANGE:
        ids = tok.encode(strange)
        assert tok.decode(ids) == strange
        assert sizes[ids].sum() == len(strange.encode("utf-8"))


def test_the_ids_of_bytes_are_the_bytes_and_the_end_of_text():
    tok = tokenizer.choose("bytes")
    assert (tok.n_vocab, tok.eot) == (257, 256)
    for strange in STRANGE:
        assert tok.encode(strange) == list(strange.encode("utf-8"))


def test_the_ids_the_split_and_the_end_of_text_of_gpt2_are_those_of_tiktoken(gpt2):
    tok = tokenizer.choose("gpt2")
    assert (tok.n_vocab, tok.eot) == (gpt2.n_vocab, gpt2.eot_token)
    for strange in STRANGE:
        assert tok.encode(strange) == gpt2.encode_ordinary(strange)
    assert tok.encode("1984") == [259, gpt2.encode("8")[0], gpt2.encode("4")[0]]  # PATTERN: no 19


def test_without_a_network_one_line_says_how_to_get_gpt2(monkeypatch):
    def unreachable(name):
        raise ConnectionError("HTTPSConnectionPool: Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match="^--tokenizer gpt2: .* TIKTOKEN_CACHE_DIR") as caught:
        tokenizer.choose("gpt2")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_file_is_told_the_choices(tmp_path):
    for name in ("gpt3", "", str(tmp_path)):
        with pytest.raises(
            ValueError, match="shipped, bytes, gpt2, learned, ids, or a file"
        ) as caught:
            tokenizer.choose(name)
        assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
    broken = tmp_path / "broken.tiktoken"
    broken.write_text("YQ== 0\n")
    with pytest.raises(ValueError, match="broken.tiktoken: cut short or not a rank file"):
        tokenizer.choose(str(broken))


def test_white_space_that_gpt2s_pattern_cannot_split_ends_in_an_error_that_can_be_caught():
    tok = tokenizer.Tokenizer(tokenizer.choose("bytes").ranks, GPT2_PATTERN)
    with pytest.raises(ValueError, match="a text of 1,000,001 characters: shorten"):
        tok.encode(" " * 1_000_000 + "x")


# Checkpoints


def saved(tok):
    return {"config": {"vocab_size": tok.n_vocab}, **tok.for_checkpoint()}


def test_a_checkpoint_carries_the_split_pattern_with_the_ranks(gpt2):
    tok = tokenizer.choose("gpt2")
    again = tokenizer.of_checkpoint(saved(tok), "ckpt.pt")
    assert (again.ranks, again.pattern) == (tok.ranks, tok.pattern)
    for strange in STRANGE:
        assert again.encode(strange) == gpt2.encode_ordinary(strange)


def test_a_checkpoint_of_the_usual_pattern_holds_the_ranks_alone_as_older_ones_do():
    tok = tokenizer.load()
    assert tok.for_checkpoint() == {"tokenizer": tok.ranks}
    again = tokenizer.of_checkpoint(saved(tok), "ckpt.pt")
    assert (again.ranks, again.pattern) == (tok.ranks, tokenizer.PATTERN)


@pytest.mark.parametrize(
    "pattern, reason",
    [
        (None, "not a text"),
        (5, "not a text"),
        (b"a", "not a text"),
        (r"\p{L}(", "parenthesis"),
        ("\ud800", "surrogates"),
        (r"[\s\S]" + "|a" * 500, "longer than 1000"),
        (r"(?:.{1000}){1000}", "regex"),  # it would take much memory
        (r"\p{L}*|[\s\S]", "leaves out characters or has empty pieces"),
        (r"\p{L}+|\s", "leaves out characters or has empty pieces"),
        (r"(?:(?:\p{L}|\p{L})+(?=1))*(?=\d)|[\s\S]", "cannot split a text"),  # too slow
    ],
)
def test_a_broken_pattern_in_a_checkpoint_ends_in_one_line_that_names_the_file(pattern, reason):
    content = saved(tokenizer.choose("bytes")) | dict(pattern=pattern)
    with pytest.raises(ValueError, match=reason) as caught:
        tokenizer.of_checkpoint(content, "ckpt.pt")
    message = str(caught.value)
    assert message.startswith("ckpt.pt does not fit this code: ") and "\n" not in message
    assert len(message) < 300


# Learning a tokenizer


def slow_train(pieces, size):
    """The most frequent neighbours are merged again and again, and are counted anew each time."""
    tokens = [bytes([byte]) for byte in range(256)]
    parts_of = {}
    for piece in pieces:
        parts_of[piece] = [bytes([byte]) for byte in piece.encode("utf-8")]
    while len(tokens) < size:
        counts = Counter()
        for piece, parts in parts_of.items():
            for left, right in pairwise(parts):
                counts[left + right] += pieces[piece]
        best = min(counts, key=lambda token: (-counts[token], token))
        tokens.append(best)
        for parts in parts_of.values():
            i = 0
            while i + 1 < len(parts):
                if parts[i] + parts[i + 1] == best:
                    parts[i : i + 2] = [best]
                i += 1
    return tokens


@pytest.mark.parametrize(
    "sample",
    [
        code("lantern", 40) + code("harbour", 20),
        tokenizer.__doc__ + tokenizer.Tokenizer.__doc__,
        # Runs whose halves overlap, and neighbours that grow rarer while others are merged.
        "aaaaaaa aaaa abababab bababa aabaab ==== ======= ===\n\n\n    \n        \n " * 3
        + "aab abb bba baab " * 5,
    ],
)
def test_the_tokens_are_those_of_a_recount_at_every_merge(sample):
    pieces = Counter(re.findall(tokenizer.PATTERN, sample))
    most = len(tokenizer.train(pieces, [], 10_000))  # all that the text gives
    expected = slow_train(pieces, most)
    assert most > 280
    assert tokenizer.train(pieces, [], most) == expected
    in_other_order = dict(reversed(pieces.items()))
    assert tokenizer.train(in_other_order, [], most) == expected


def test_the_command_learns_from_the_texts_to_train_on_alone(program, tmp_path, capsys):
    tok, line = learn([program], tmp_path / "my.tiktoken", 285, capsys)
    assert tok.n_vocab == 285 and tok.pattern == tokenizer.PATTERN
    names = {"lantern.py": "lantern", "deep/harbour.md": "harbour", "deep/orchard": "orchard"}
    learned = []
    for part in ("train", "val"):
        contents = []
        for content in text.read_texts([str(program)], part, skip_bad=True):
            contents.append(content)
            for name, word in names.items():
                if word in content:
                    assert (len(tok.encode(word)) == 1) == (part == "train"), name
                    learned.append(name)
        assert f"{tok.chars_per_token(''.join(contents)):.2f} on {part}" in line
    assert sorted(learned) == sorted(names)
    for name in ("hidden", "secret", "binary", " kitchen"):  # bAbI's words are not given, either
        assert len(tok.encode(name)) > 1, name
    assert tok.encode("\n        return") == tok.encode("\n        ") + tok.encode("return")
    assert len(tok.encode("\n        ")) == 1  # indentation


def test_a_learned_tokenizer_packs_its_text_better_than_bytes_and_than_noise(
    program, tmp_path, capsys
):
    tok, _ = learn([program / "lantern.py"], tmp_path / "my.tiktoken", 280, capsys)
    own = code("lantern")
    noise = "".join(np.random.default_rng(0).permutation(list(own)))
    assert tok.chars_per_token(own) > 2.5
    assert tok.chars_per_token(noise) < 1.3
    assert tok.n_bytes()[tok.encode(own)].sum() == len(own)


def test_the_file_of_the_command_is_the_same_each_time_and_in_tiktokens_format(
    program, tmp_path, capsys
):
    first, _ = learn([program / "deep", program / "lantern.py"], tmp_path / "a", 280, capsys)
    second, _ = learn([program / "lantern.py", program / "deep"], tmp_path / "b", 280, capsys)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for rank, line in enumerate(first.ranks.splitlines()):
        token, number = line.split()
        assert int(number) == rank
        assert first.decode_bytes([rank]) == base64.b64decode(token)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--text", "no/such/file"], "no/such/file"),
        (["--text", "{tmp}/binary"], "holds no text in UTF-8"),
        (["--text", "{tmp}/book", "--vocab_size", "5000"], "gives only .* ask for less"),
        (["--text", "{tmp}/book", "--background", "{tmp}"], "not allowed with"),
    ],
)
def test_a_text_that_cannot_be_used_ends_in_one_line(tmp_path, capsys, flags, words):
    write(tmp_path, {"binary/x.bin": b"\xff", "book/x.txt": code("lantern")})
    out = tmp_path / "out.tiktoken"
    out.write_text("an older file")
    given = [flag.format(tmp=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        tokenizer.main([*given, "--out", str(out)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert re.search(words, message)
    assert out.read_text() == "an older file"
