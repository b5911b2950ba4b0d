"""Every row of the ablation is a model that leaks nothing from the future, streams, and is not the default.

    python -m pytest tests/test_ablation.py -q
"""
import json
import shlex

import pytest
import torch

import ablation
import lm2
from test_scripts import folder, refused  # noqa: F401

SIZES = dict(vocab_size=50, n_layer=3, n_head=2, n_kv_head=2, n_embd=64, ffn_dim=32, segment_len=6, n_slot=16,
             n_mem_head=2)


def model(name):
    row, flags = ablation.ROWS[name], shlex.split(ablation.ROWS[name].flags)
    own = {k[2:]: int(v) for k, v in zip(flags[::2], flags[1::2]) if k != "--stages"}
    torch.manual_seed(0)
    with ablation.changed(row):
        made = lm2.LM2(lm2.LM2Config(**SIZES | own)).double()
    if row.start:
        row.start(made)
    return made


def logits(made, idx, pieces=None):
    state, out = None, []
    for piece in idx.split(pieces or idx.shape[1], dim=1):
        y, _, state = made(piece, state=state)
        out.append(y)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("name", ablation.ROWS)
@torch.no_grad()
def test_a_variant_sees_the_past_alone_and_whole_is_streamed(name):
    made, idx = model(name), torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(1))
    was = logits(made, idx)
    for pieces in (1, 4, 6):
        assert (logits(made, idx, pieces) - was).abs().max() < 1e-10
    for j in (3, 8, 14):
        other = idx.clone()
        other[:, j] = (idx[:, j] + 1) % 50
        now = logits(made, other)
        assert torch.equal(now[:, :j], was[:, :j]) and not torch.equal(now[:, 18:], was[:, 18:])


@torch.no_grad()
def test_every_variant_but_those_of_the_curriculum_gives_other_logits_than_the_default():
    idx = torch.randint(50, (1, 24), generator=torch.Generator().manual_seed(1))
    default = logits(model("default"), idx)
    same = [name for name in ablation.ROWS if torch.allclose(logits(model(name), idx), default)]
    assert same == ["default", "up to 16 segments", "up to 64 segments"]
    assert lm2.Memory is ablation.Row().memory and lm2.Block is ablation.Row().block


def test_a_run_is_written_and_shown_and_not_made_twice(folder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "a.jsonl"
    flags = ("--tokens 1500 --stages 4:2:32 --batch_size 4 --processes 1 --eval_every 1000000 "
             f"--background {folder}")
    argv = ["--rows", "no null", "--seeds", "3", "--flags", flags, "--n", "2", "--lengths", "0k", "200",
            "--out", str(out)]
    ablation.main(argv)
    assert "no null" in capsys.readouterr().out.splitlines()[-1]
    (line,) = out.read_text(encoding="utf-8").splitlines()
    ran = json.loads(line)
    assert (ran["row"], ran["seed"], ran["n"], list(ran["accuracy"])) == ("no null", 3, 2, ["0k", "200"])
    ablation.main(argv)
    assert out.read_text(encoding="utf-8").splitlines() == [line]
    assert all(len(x) <= 80 for x in capsys.readouterr().out.splitlines())


def test_the_table_has_the_medians_of_the_seeds():
    runs = [dict(row=row, seed=s, minutes=s + 1, accuracy={"0k": a, "4k": a / 2})
            for row, of in (("default", (90, 100, 80)), ("no null", (50,))) for s, a in enumerate(of)]
    head, first, second = ablation.show(runs).splitlines()
    assert head.split() == ["min", "0k", "4k", "seeds", "at", "4k"]
    assert first.split() == ["default", "2.0", "90.0", "45.0", "45.0", "50.0", "40.0"]
    assert second.split() == ["no", "null", "1.0", "50.0", "25.0", "25.0"]


def test_a_table_without_figures_and_an_unknown_row_end_in_one_line(tmp_path, capsys):
    assert "none.jsonl" in refused(capsys, ablation.main, "--show", "--out", tmp_path / "none.jsonl")
    assert "no such row" in refused(capsys, ablation.main, "--rows", "no such row")
