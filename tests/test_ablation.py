"""Every row of the ablation is a model that leaks nothing from the future, streams, and is not the default.

    python -m pytest tests/test_ablation.py -q
"""
import json
import shlex

import pytest
import torch

import ablation
import lm2
from data.recipes import PRESETS
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
    flags = ("--tokens 1500 --final_tokens 1500 --stages 4:2:32 --batch_size 4 --processes 1 "
             f"--eval_every 1000000 --background {folder}")
    argv = ["--rows", "no null", "--seeds", "3", "--flags", flags, "--n", "2", "--lengths", "0k", "200",
            "--out", str(out)]
    ablation.main(argv)
    assert "no null" in capsys.readouterr().out
    (line,) = out.read_text(encoding="utf-8").splitlines()
    ran = json.loads(line)
    assert (ran["row"], ran["seed"], ran["n"], list(ran["exact"])) == ("no null", 3, 2, ["0k", "200"])
    assert 1500 <= ran["tokens"] < 3500 and ran["flags"] == flags
    ablation.main(argv)
    assert out.read_text(encoding="utf-8").splitlines() == [line]
    for other in ["--n", "3"], ["--lengths", "0k"], ["--flags", ""]:      # are not these figures
        assert "a.jsonl" in refused(capsys, ablation.main, *argv, *other, "--show")
    ablation.main(argv)
    assert all(len(x) <= 80 for x in capsys.readouterr().out.splitlines())


def test_the_table_has_the_medians_of_the_seeds_the_floor_and_what_an_interval_is():
    runs = [dict(row=row, seed=s, n=200, exact={"0k": a, "4k": a // 2}, floor={"0k": 40, "4k": 44})
            for row, of in (("default", (90, 100, 80)), ("no null", (50,))) for s, a in enumerate(of)]
    head, first, second, floor, note = ablation.show(runs).splitlines()
    assert head.split() == ["%", "right", "0k", "4k", "seeds", "at", "4k"]
    assert first.split() == ["default", "45.0", "22.5", "22.5", "25.0", "20.0"]
    assert second.split() == ["no", "null", "25.0", "12.5", "12.5"]
    assert floor.split() == ["floor", "20.0", "22.0"]
    assert note == "n = 200; a figure's 95 % interval is 6.9 at 50 and 4.2 at 90 % to each side"


def test_every_row_but_those_of_slots_has_the_defaults_parameters():
    def count(name):
        t = shlex.split(ablation.ROWS[name].flags)
        sizes = PRESETS["cpu"] | {k[2:]: int(v) for k, v in zip(t[::2], t[1::2]) if k != "--stages"}
        with ablation.changed(ablation.ROWS[name]):
            return lm2.LM2(lm2.LM2Config(**sizes)).n_params()[0]
    counts = {name: count(name) / count("default") for name in ablation.ROWS if not name.endswith("slots")}
    assert all(abs(x - 1) < 0.003 for x in counts.values()), counts


def test_the_papers_update_is_that_of_plain_loops():
    torch.manual_seed(0)
    made = model("paper Eqs. (4) to (6)").layers[0].memory
    M, x = torch.randn(1, 16, 64).double(), torch.randn(1, 6, 64).double()
    Q, g_in = made.tokens(x)
    seen = made.bank_norm(M)
    K, V, new = made.wk(seen), made.wv(seen), torch.zeros(16, 64).double()
    of = slice(0, 32), slice(32, 64)
    scores = [Q[0, :, h] @ K[0, :, h].T / 32 ** 0.5 for h in of]                        # (S, N)
    E_mem = torch.cat([s.softmax(-1) @ V[0, :, h] for s, h in zip(scores, of)], dim=-1)         # (S, D)
    for h in (0, 1):
        for slot in range(16):
            R = scores[h][:, slot].softmax(-1)
            for d in range(32 * h, 32 * h + 32):
                forget = torch.sigmoid(made.w_forget(E_mem))[:, d]
                new[slot, d] = sum(R[t] * (g_in[0, t, d] * E_mem[t, d].tanh() + forget[t] * M[0, slot, d])
                                   for t in range(6))
    assert (made.write(M, K, Q, g_in)[0] - new).abs().max() < 1e-12


def test_a_table_without_figures_and_an_unknown_row_end_in_one_line(tmp_path, capsys):
    assert "none.jsonl" in refused(capsys, ablation.main, "--show", "--out", tmp_path / "none.jsonl")
    assert "no such row" in refused(capsys, ablation.main, "--rows", "no such row")
    assert "--n 0" in refused(capsys, ablation.main, "--n", "0")
    assert str(tmp_path) in refused(capsys, ablation.main, "--out", tmp_path)
    other = tmp_path / "metrics.jsonl"
    for text in '{"step": 1}\n', '{"row": "def':
        other.write_text(text)
        assert "metrics.jsonl holds no figures" in refused(capsys, ablation.main, "--show", "--out", other)
