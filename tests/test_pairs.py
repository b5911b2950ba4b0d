"""How many pairs a memory holds: the documents, the questions, and that a memory is what counts.

python -m pytest tests/test_pairs.py -q
"""

import json

import pytest
import torch

import pairs
import pictures
from lm2 import LM2Config, build_model

torch.set_num_threads(1)


def test_each_key_stands_once_and_is_asked_for_the_value_behind_it():
    ids, answers = pairs.documents(16, 8, 50, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 2 * 16 + pairs.SEGMENT)
    for document, values in zip(ids.tolist(), answers.tolist(), strict=True):
        told = list(zip(document[:32:2], document[1:32:2], strict=True))
        asked = list(zip(document[32::2], values, strict=True))
        assert len(dict(told)) == 16
        assert len(set(asked)) == 8
        assert set(asked) <= set(told)
        assert all(key < pairs.N_KEYS <= value < pairs.BLANK for key, value in told)
        assert set(document[33::2]) == {pairs.BLANK}  # no answer is told


def test_answers_are_counted_at_the_keys_of_the_last_segment():
    ids, answers = pairs.documents(8, 8, 5, torch.Generator().manual_seed(0))
    places = []

    def knows_all(ids, at, segment_len):
        """A model that looks up the value behind the key at each place."""
        places.extend(at.tolist())
        logits = torch.zeros(len(at), pairs.BLANK)
        for row, place in enumerate(at.tolist()):
            document = ids[place // ids.shape[1]].tolist()
            key = document[place % ids.shape[1]]
            logits[row, document[document.index(key) + 1]] = 9
        return logits, None, None

    _, right = pairs.ask(knows_all, ids, answers, 16)
    assert right == 1
    assert all(place % 32 in range(16, 32, 2) for place in places)
    answers[:, 3] = (answers[:, 3] - pairs.N_KEYS + 1) % pairs.N_VALUES + pairs.N_KEYS
    _, right = pairs.ask(knows_all, ids, answers, 16)
    assert right == 7 / 8


def test_the_models_have_as_many_parameters_and_their_memories_as_many_numbers():
    parameters = []
    for name, sizes in pairs.MODELS.items():
        model = build_model(LM2Config(**pairs.SIZES | sizes))
        parameters.append(model.n_params()[0])
        assert pairs.state_numbers(model) == (0 if name == "none" else 2048)
    assert max(parameters) < 1.005 * min(parameters)


@pytest.mark.parametrize("name", pairs.MODELS)
@torch.no_grad()
def test_what_was_told_reaches_the_answers_through_a_memory_alone(name):
    torch.manual_seed(0)
    model = build_model(LM2Config(**pairs.SIZES | pairs.MODELS[name]))
    ids, answers = pairs.documents(8, 8, 5, torch.Generator().manual_seed(0))
    told_otherwise = ids.clone()
    told_otherwise[:, 1] = pairs.N_KEYS  # the first value of each document
    loss, _ = pairs.ask(model, ids, answers, 16)
    other_loss, _ = pairs.ask(model, told_otherwise, answers, 16)
    assert (loss == other_loss) == (name == "none")


def test_a_level_ends_when_enough_of_its_latest_answers_are_right(monkeypatch):
    asked = []

    def answered(model, ids, answers, segment_len):
        """Right from the third batch of a level on."""
        level = (ids.shape[1] // 2 - answers.shape[1], segment_len)
        asked.append(level)
        right = 1.0 if asked.count(level) > 2 else 0.0
        return model.norm.weight.sum() * 0, torch.tensor(right)

    monkeypatch.setattr(pairs, "ask", answered)
    monkeypatch.setattr(pairs, "LEAVE_AFTER", 4)
    monkeypatch.setattr(pairs, "LEVELS", pairs.LEVELS[:3])
    model = build_model(LM2Config(**pairs.SIZES | pairs.MODELS["none"]))
    assert pairs.train(model, 1e-3, 3, seed=0) == 0
    asked.clear()
    assert pairs.train(model, 1e-3, 60, seed=0) == 2
    first = [asked.index(level) for level in pairs.LEVELS]
    assert first == sorted(first)
    # 0, 0 and then 1, 1, 1 and 1: of the last four answers 80 % are right with the sixth.
    assert asked[: first[1]].count(pairs.LEVELS[0]) == 6


def test_a_run_prints_its_table_and_writes_it_and_it_can_be_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "BATCH_TOKENS", 512)
    monkeypatch.setattr(pairs, "N_TESTED", 20)
    out = tmp_path / "pairs.json"
    flags = ["--memories", "neural", "rmt", "--steps", "2", "--lr", "1e-3", "2e-3"]
    pairs.main([*flags, "--out", str(out)])
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["memory"] for row in rows] == ["neural", "neural", "rmt", "rmt"]
    assert [row["lr"] for row in rows] == [1e-3, 2e-3, 1e-3, 2e-3]
    assert pairs.table(rows) in printed
    assert max(len(line) for line in printed.splitlines()) <= 80
    pytest.importorskip("matplotlib")
    pictures.main(["pairs", str(out), "--out", str(tmp_path / "pairs.png")])
    assert (tmp_path / "pairs.png").stat().st_size > 1000


@pytest.mark.parametrize("content", ["[]", "{}", '[{"memory": "lm2"}]', "no"])
def test_a_file_that_cannot_be_drawn_is_named(tmp_path, capsys, content):
    pytest.importorskip("matplotlib")
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as end:
        pictures.main(["pairs", str(path), "--out", str(tmp_path / "pairs.png")])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "other.json" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--steps 0", "--steps 0"),
        ("--lr 0", "--lr 0"),
        ("--out nowhere/a.json", "nowhere"),
        ("--memories ema", "ema"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(flags, named, capsys):
    with pytest.raises(SystemExit) as end:
        pairs.main(flags.split())
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
