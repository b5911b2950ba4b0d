"""The variants of tests/ablation.py are sound models, and its runs make a table.

python -m pytest tests/test_ablation.py -q
"""

import json

import pytest
import torch

import ablation
import lm2
from data.recipes import PRESETS
from test_train import folder, refused  # noqa: F401

SIZES = dict(
    vocab_size=50,
    n_layer=3,
    n_head=2,
    n_kv_head=2,
    n_embd=64,
    ffn_dim=32,
    segment_len=6,
    n_slot=16,
    n_mem_head=2,
    mem_blocks=(2,),
)


def new_model(name, sizes):
    """A model of a row, with what the row's flags change in `sizes`."""
    row = ablation.ROWS[name]
    sizes = dict(sizes)
    for flag in row.flags.split("--")[1:]:
        name, *values = flag.split()
        if name == "mem_blocks":
            sizes[name] = [int(value) for value in values]
        elif name != "stages":
            sizes[name] = int(values[0])
    torch.manual_seed(0)
    with ablation.changed(row):
        return lm2.LM2(lm2.LM2Config(**sizes))


def tiny_model(name):
    return new_model(name, SIZES).double()


def random_ids(rows, length):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


# The rows that change the computation. The others have other sizes, or start from other values.
VARIANTS = [
    "default",
    "paper Eqs. (4) to (6)",
    "candidate tanh(E_mem)",
    "g_forget * M always",
    "no null",
    "one forget gate a slot",
    "write: query projected",
    "memory behind the MLP",
    "tokens before attention",
]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_variant_sees_the_past_alone_and_streams_and_generates(name):
    model = tiny_model(name)
    idx = random_ids(2, 21)
    logits, _, _ = model(idx)

    state = None
    for piece, expected in zip(idx.split(4, dim=1), logits.split(4, dim=1), strict=True):
        found, _, state = model(piece, state=state)
        assert (found - expected).abs().max() < 1e-10

    other = idx.clone()
    other[:, 8] = (idx[:, 8] + 1) % 50
    after, _, _ = model(other)
    assert torch.equal(after[:, :8], logits[:, :8])
    assert not torch.equal(after[:, 18:], logits[:, 18:])  # the memory carries it to the end

    ids = model.generate(idx[:, :5], 15)  # beyond the ends of three segments
    logits, _, _ = model(ids)
    assert torch.equal(ids[:, 5:], logits[:, 4:-1].argmax(dim=-1))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_uses_all_its_parameters(name):
    model = tiny_model(name)
    _, loss, _ = model(random_ids(2, 21), random_ids(2, 21))
    loss.backward()
    unused = set()
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            unused.add(parameter_name.split(".", 2)[-1])  # without the number of the block
    if name in ("paper Eqs. (4) to (6)", "no null"):
        assert unused == {"memory.null"}
    else:
        assert unused == set()


@torch.no_grad()
def test_every_variant_but_those_of_the_curriculum_gives_other_logits_than_the_default():
    idx = random_ids(1, 24)
    of_default, _, _ = tiny_model("default")(idx)
    same = []
    for name in ablation.ROWS:
        logits, _, _ = tiny_model(name)(idx)
        if torch.allclose(logits, of_default):
            same.append(name)
    assert same == ["default", "up to 16 segments", "up to 64 segments"]
    assert lm2.MEMORIES["lm2"] is ablation.Row().memory
    assert lm2.Block is ablation.Row().block
    assert lm2.LM2.__name__ == "LM2"


def test_a_run_is_written_and_shown_and_not_made_twice(folder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "a.jsonl"
    flags = (
        "--tokens 1500 --final_tokens 1500 --stages 4:2:32 --batch_size 4 --eval_every 1000000 "
        f"--threads 1 --background {folder}"
    )
    argv = ["--rows", "no null", "--seeds", "3", "--flags", flags, "--n", "2"]
    argv += ["--lengths", "0k", "200", "--out", str(out)]
    ablation.main(argv)
    (line,) = out.read_text(encoding="utf-8").splitlines()
    run = json.loads(line)
    assert (run["row"], run["seed"], run["n"]) == ("no null", 3, 2)
    assert list(run["exact"]) == list(run["floor"]) == ["0k", "200"]
    assert 1500 <= run["tokens"] < 3500
    assert run["flags"] == flags
    ablation.main(argv)
    assert out.read_text(encoding="utf-8").splitlines() == [line]
    assert "no null" in capsys.readouterr().out
    for other in ["--n", "3"], ["--lengths", "0k"], ["--flags", ""]:
        # The file has no figures of these runs.
        assert "a.jsonl" in refused(capsys, ablation.main, *argv, *other, "--show")


def test_the_table_has_the_medians_of_the_seeds_the_floor_and_what_an_interval_is():
    runs = []
    for row, seed, right in (
        ("default", 0, 90),
        ("default", 1, 100),
        ("default", 2, 80),
        ("no null", 0, 60),
        ("no null", 1, 50),
    ):
        exact = {"0k": right, "4k": right // 2}
        runs.append(dict(row=row, seed=seed, n=200, exact=exact, floor={"0k": 40, "4k": 44}))
    head, first, second, floor, note = ablation.show(runs).splitlines()
    assert head.split() == ["%", "right", "0k", "4k", "seeds", "at", "4k"]
    assert first.split() == ["default", "45.0", "22.5", "22.5", "25.0", "20.0"]
    assert second.split() == ["no", "null", "25.0", "12.5", "15.0", "12.5"]
    assert floor.split() == ["floor", "20.0", "22.0"]
    assert note == "n = 200; a figure's 95 % interval is 6.9 at 50 and 4.2 at 90 % to each side"


def test_every_row_but_those_of_slots_has_the_defaults_parameters():
    of_default, _ = new_model("default", PRESETS["cpu"]).n_params()
    for name in ablation.ROWS:
        of_row, _ = new_model(name, PRESETS["cpu"]).n_params()
        if not name.endswith("slots"):
            assert abs(of_row / of_default - 1) < 0.003, name


def test_the_papers_update_is_that_of_plain_loops():
    memory = tiny_model("paper Eqs. (4) to (6)").layers[-1].memory
    M = torch.randn(16, 64, dtype=torch.float64)
    E = torch.randn(6, 64, dtype=torch.float64)
    Q = memory.wq(E)  # (S, D)
    g_in = torch.sigmoid(memory.w_in(E))  # Eq. (4)
    seen = memory.bank_norm(M)
    K = memory.wk(seen)  # (N, D)
    V = memory.wv(seen)
    channels_of_heads = slice(0, 32), slice(32, 64)
    scores = [Q[:, head] @ K[:, head].T / 32**0.5 for head in channels_of_heads]  # (S, N) each
    read = []
    for head, scores_of_head in zip(channels_of_heads, scores, strict=True):
        read.append(scores_of_head.softmax(dim=-1) @ V[:, head])
    E_mem = torch.cat(read, dim=-1)  # (S, D)
    g_forget = torch.sigmoid(memory.w_forget(E_mem))  # Eq. (5)
    expected = torch.zeros(16, 64, dtype=torch.float64)
    for head, scores_of_head in zip(channels_of_heads, scores, strict=True):
        for slot in range(16):
            R = scores_of_head[:, slot].softmax(dim=-1)  # over the tokens
            for d in range(head.start, head.stop):
                for t in range(6):
                    added = g_in[t, d] * E_mem[t, d].tanh()
                    kept = g_forget[t, d] * M[slot, d]
                    expected[slot, d] += R[t] * (added + kept)  # Eq. (6)
    queries = memory.queries(E[None])
    written = memory.write(M[None], queries, memory.candidates(E[None]))
    assert (written[0] - expected).abs().max() < 1e-12


@torch.no_grad()
def test_where_forgetting_needs_no_writing_an_open_gate_keeps_the_bank_and_a_closed_one_clears_it():
    memory = tiny_model("g_forget * M always").layers[-1].memory
    M = torch.randn(1, 16, 64, dtype=torch.float64)
    E = torch.randn(1, 6, 64, dtype=torch.float64)
    written = []
    for bias in (100.0, -100.0):
        memory.w_forget.bias.fill_(bias)
        written.append(memory.write(M, memory.queries(E), memory.candidates(E)))
    with_open_gate, with_closed_gate = written
    assert torch.allclose(with_open_gate - with_closed_gate, M)


def test_a_table_without_figures_and_an_unknown_row_end_in_one_line(tmp_path, capsys):
    missing = tmp_path / "none.jsonl"
    assert "none.jsonl" in refused(capsys, ablation.main, "--show", "--out", missing)
    assert "no such row" in refused(capsys, ablation.main, "--rows", "no such row")
    assert "--n 0" in refused(capsys, ablation.main, "--n", "0")
    assert str(tmp_path) in refused(capsys, ablation.main, "--out", tmp_path)
    other = tmp_path / "metrics.jsonl"
    other.write_text('{"step": 1}\n', encoding="utf-8")
    message = refused(capsys, ablation.main, "--show", "--out", other)
    assert "metrics.jsonl holds no figures" in message
