"""The model against its rules and against a slow reference in plain loops (reference.py), float64, CPU.

    python -m pytest tests/test_model.py -q

The models are small, with two blocks, grouped heads, and every bias, norm and null score moved off its start,
so that nothing holds only because something is zero.
"""
import copy
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import reference  # noqa: E402
from data.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from data.device import bfloat16_layers, compile_blocks  # noqa: E402
from data.heatmaps import recording  # noqa: E402
from data.tokenizer import load  # noqa: E402
from data.recipes import PRESETS  # noqa: E402
from lm2 import LM2, LM2Config, turn_table  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own, on compiling

SMALL = dict(vocab_size=19, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, ffn_dim=20, segment_len=5, n_slot=6,
             n_mem_head=2)
S = SMALL["segment_len"]
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=100)
LENGTHS = [1, 3, S, S + 2, 3 * S, 3 * S + 2]


def build(seed=0, dtype=torch.float64, **changes):
    """A model with every parameter away from its start, and a head that is not nearly zero."""
    torch.manual_seed(seed)
    model = LM2(LM2Config(**{**SMALL, **changes})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
        model.output.weight.normal_(std=0.3)
    return model


def text(rows, length, seed=1, vocab=SMALL["vocab_size"]):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def feed(model, idx, sizes, state=None, **options):
    """idx in calls of the given sizes, the state handed on -> all logits, the last state"""
    out = []
    for piece in idx.split(sizes, dim=1):
        logits, _, state = model(piece, state=state, **options)
        out.append(logits)
    return torch.cat(out, dim=1), state


def tensors(state):
    found = []
    state.map(lambda t: found.append(t) or t)
    return found


def nbytes(state):
    return sum(t.numel() * t.element_size() for t in tensors(state))


def copies(state):
    return [t.detach().clone() for t in tensors(state)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def near(a, b, tolerance=1e-10):
    assert a.shape == b.shape and a.numel()
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"they differ by {difference:.3g}, allowed is {tolerance}"


def near_states(a, b, tolerance=1e-10):
    assert a.fill == b.fill
    for x, y in zip(a.blocks, b.blocks):
        near(x.bank, y.bank, tolerance)
        for name in ("k", "v", "q", "c") if a.fill else ():
            near(getattr(x, name)[:, :a.fill], getattr(y, name)[:, :a.fill], tolerance)


def near_gradients(model, fast, slow, w, tolerance=1e-10):
    """By all parameters, of the model's own and of the reference's weights w, of a weighted sum of logits."""
    weight = torch.randn(slow.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    fast_grad = torch.autograd.grad((fast * weight).sum(), list(model.parameters()))
    slow_grad = torch.autograd.grad((slow * weight).sum(), list(w.values()))
    for name, a, b in zip(w, fast_grad, slow_grad):
        assert b.abs().max() > 1e-6, name
        near(a, b, tolerance)


# Causality

@torch.no_grad()
@pytest.mark.parametrize("n_mem_token", [0, 2])         # an RMT's memory leaks no more than LM2's
def test_a_changed_token_leaves_every_earlier_logit_as_it_was_bit_for_bit(n_mem_token):
    model, idx = build(n_mem_token=n_mem_token), text(2, 3 * S + 2)
    before = model(idx)[0]
    for j in range(idx.shape[1]):
        other = idx.clone()
        other[:, j] = (other[:, j] + 1) % 19
        after = model(other)[0]
        assert torch.equal(before[:, :j], after[:, :j]), f"token {j} changed a logit before it"
        assert not torch.equal(before[:, j], after[:, j])


@torch.no_grad()
@pytest.mark.parametrize("n_mem_token", [0, 2])
def test_a_token_of_the_first_segment_reaches_later_segments_through_the_memory_and_no_other_way(n_mem_token):
    model, idx = build(n_mem_token=n_mem_token), text(1, 3 * S + 2)
    other = idx.clone()
    other[:, 2] = (other[:, 2] + 1) % 19

    def difference(**options):
        change = model(idx, **options)[0] - model(other, **options)[0]
        return [part.abs().max().item() for part in change.split(S, dim=1)]

    assert min(difference()) > 1e-5
    assert difference(write=False)[0] > 1e-5 and difference(write=False)[1:] == [0.0, 0.0, 0.0]
    model = build(n_mem_layer=0)
    assert difference()[0] > 1e-5 and difference()[1:] == [0.0, 0.0, 0.0]


@torch.no_grad()
def test_padding_on_the_right_changes_no_logit_of_the_real_tokens():
    model, idx = build(), text(2, 2 * S + 2)
    for extra in (1, S - 2, S + 1):
        padded = torch.cat([idx, text(2, extra, seed=extra)], dim=1)
        near(model(padded)[0][:, :idx.shape[1]], model(idx)[0], 1e-12)


# Whole = streamed

@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_a_call_for_each_segment_gives_the_logits_and_the_state_of_one_call(length):
    model, idx = build(), text(2, length)
    whole, _, end = model(idx)
    logits, state = feed(model, idx, S)
    near(logits, whole)
    near_states(state, end)


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_token_by_token_gives_the_logits_and_the_state_of_one_call(length):
    model, idx = build(), text(2, length)
    whole, _, end = model(idx)
    logits, state = feed(model, idx, 1)
    near(logits, whole)
    near_states(state, end)


@torch.no_grad()
def test_calls_that_end_anywhere_give_the_logits_and_the_state_of_one_call():
    model, draw = build(), random.Random(3)
    for length in (4 * S, 4 * S + 3):
        idx = text(2, length)
        whole, _, end = model(idx)
        for _ in range(12):
            cuts = sorted(draw.sample(range(1, length), draw.randint(1, 5)))
            logits, state = feed(model, idx, [b - a for a, b in zip([0] + cuts, cuts + [length])])
            near(logits, whole)
            near_states(state, end)


def test_gradients_of_many_calls_are_those_of_one_call():
    model, idx = build(), text(2, 3 * S + 2)
    weight = torch.randn(2, idx.shape[1], 19, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def gradients(sizes):
        return torch.autograd.grad((feed(model, idx, sizes)[0] * weight).sum(), list(model.parameters()))

    whole = gradients(idx.shape[1])
    for sizes in (1, S, [3, 6, 1, 7]):
        for a, b in zip(gradients(sizes), whole):
            near(a, b)


@torch.no_grad()
@pytest.mark.parametrize("before", [0, 3, S])
def test_read_gives_the_last_logits_and_the_state_of_one_call(before):
    model, idx = build(), text(2, before + 6 * S + 2)
    whole, _, end = model(idx)
    for segments in (1, 2, 4, 100):
        state = model(idx[:, :before])[2] if before else None
        last, state = model.read(idx[:, before:], state, tokens_a_call=segments * 2 * S)
        near(last, whole[:, -1])
        near_states(state, end)


@torch.no_grad()
def test_read_without_writing_gives_the_last_logits_of_a_call_without_writing():
    model, idx = build(), text(2, 3 * S + 2)
    last = model.read(idx, write=False)[0]
    near(last, model(idx, write=False)[0][:, -1])
    assert (last - model(idx)[0][:, -1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_every_generated_token_is_the_likeliest_when_the_whole_is_scored_in_one_pass(length):
    model, idx = build(), text(3, length)
    out = model.generate(idx, 3 * S)
    assert torch.equal(out[:, :length], idx) and out.shape[1] == length + 3 * S
    assert torch.equal(out[:, length:], model(out)[0].argmax(dim=-1)[:, length - 1:-1])
    assert len(out[:, length:].unique()) > 2                            # not one token again and again


@torch.no_grad()
def test_streams_side_by_side_without_writing_give_the_likeliest_tokens_without_writing():
    model, prompts = build(), [text(3, S + 3), text(3, S + 3, seed=2)]
    pairs = list(zip(*(model.stream(p, 3 * S, write=False) for p in prompts)))
    for prompt, new in zip(prompts, zip(*pairs)):
        out = torch.cat([prompt, torch.stack(new, dim=1)], dim=1)
        assert torch.equal(out[:, S + 3:], model(out, write=False)[0].argmax(dim=-1)[:, S + 2:-1])
        assert not torch.equal(out, model.generate(prompt, 3 * S))      # the memory has a say in this model


@torch.no_grad()
def test_no_new_tokens_returns_the_prompt():
    idx = text(2, S + 2)
    assert torch.equal(build().generate(idx, 0), idx)


@torch.no_grad()
def test_sampling_follows_the_softmax_of_logits_over_temperature_and_its_generator():
    model, idx = build(), text(1, 2).repeat(4000, 1)
    new = model.generate(idx, 1, temperature=2.0, generator=torch.Generator().manual_seed(7))[:, -1]
    expected = (model(idx[:1])[0][0, -1] / 2.0).softmax(dim=-1)
    near(new.bincount(minlength=19) / 4000, expected.float(), 0.03)  # a standard deviation is below 0.008
    again = model.generate(idx, 1, temperature=2.0, generator=torch.Generator().manual_seed(7))[:, -1]
    assert torch.equal(new, again)


# A state is a value

@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fill", [0, 2])
def test_continuing_from_a_state_changes_neither_it_nor_a_state_made_from_it(fill, grad):
    with torch.set_grad_enabled(grad):
        model, idx = build(), text(2, S + fill)
        root = model(idx)[2]
        at_root = copies(root)
        branches = [text(2, 2 * S, seed=seed) for seed in (11, 12)]
        expected = [model(torch.cat([idx, b], dim=1))[0][:, idx.shape[1]:] for b in branches]
        middle = [model(b[:, :2], state=root)[2] for b in branches]  # both stand in the middle of a segment
        at_middle = [copies(m) for m in middle]
        for again in range(2):
            for m, b, e in zip(middle, branches, expected):
                near(feed(model, b[:, 2:], [1, 1, 5, 1], m)[0], e[:, 2:])
                near(feed(model, b, [1, 2, 3, 4], root)[0], e)
        near(model.read(branches[1][:, :1], root)[0], expected[1][:, 0])
        assert same(copies(root), at_root) and root.fill == fill
        assert all(same(copies(m), a) for m, a in zip(middle, at_middle))


def test_a_state_can_be_continued_twice_and_both_give_gradients():
    model, idx = build(), text(1, S + 2)
    branches = [text(1, S + 1, seed=seed) for seed in (11, 12)]
    state = model(idx)[2]
    loss = sum(feed(model, b, [1, 2, 3], state)[0].square().sum() for b in branches)
    shared = torch.autograd.grad(loss, list(model.parameters()))
    loss = sum(model(torch.cat([idx, b], dim=1))[0][:, S + 2:].square().sum() for b in branches)
    for a, b in zip(shared, torch.autograd.grad(loss, list(model.parameters()))):
        near(a, b, 1e-9)


@torch.no_grad()
def test_nothing_of_a_document_stays_on_the_module():
    model, first, second = build(), text(2, 2 * S + 3), text(2, 2 * S + 3, seed=2)
    fresh = copy.deepcopy(model)

    def inside():
        return [(name, key, dict(value) if isinstance(value, dict) else value)
                for name, module in model.named_modules() for key, value in vars(module).items()]

    before, buffers = inside(), {n: b.clone() for n, b in model.named_buffers()}
    model(first)
    model.generate(first, S)
    after = inside()
    assert [entry[:2] for entry in before] == [entry[:2] for entry in after]
    for (name, key, a), (_, _, b) in zip(before, after):
        if isinstance(a, dict):
            kept = a.keys() == b.keys() and all(a[k] is b[k] for k in a)
        else:
            kept = a is b or a == b
        assert kept, f"{name}.{key} has changed"
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(model(second)[0], fresh(second)[0])


def test_gradients_flow_from_the_third_segment_to_the_first_until_the_caller_detaches():
    model, idx = build(), torch.arange(3 * S)[None]  # every token once: a row of the table is a place
    for detach in (False, True):
        state = model(idx[:, :S])[2]
        state = model(idx[:, S:2 * S], state=state.detach() if detach else state)[2]
        model.zero_grad()
        model(idx[:, 2 * S:], state=state)[0].square().sum().backward()
        size = model.tok_embeddings.weight.grad.abs().amax(dim=1)
        assert (size[S:3 * S] > 0).all()
        assert (size[:S] == 0).all() if detach else (size[:S] > 0).all()


@torch.no_grad()
def test_the_state_has_the_same_bytes_after_a_thousand_and_after_two_hundred_thousand_tokens():
    model = build(dtype=torch.float32, vocab_size=7, n_head=2, n_kv_head=1, n_embd=8, ffn_dim=8,
                  segment_len=128, n_slot=4)
    idx = text(1, 200_064, vocab=7)

    def held(state):  # what the allocator holds, should a small view keep a large buffer alive
        storages = [t.untyped_storage() for t in tensors(state)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    start = model.initial_state(1)
    _, early = model.read(idx[:, :1001], tokens_a_call=2048)
    _, late = model.read(idx[:, 1001:], early, tokens_a_call=2048)
    assert nbytes(start) == nbytes(early) == nbytes(late) == held(early) == held(late)
    assert early.fill == 1001 % 128 and late.fill == 0 and all(b.bank.isfinite().all() for b in late.blocks)


# The bank

@torch.no_grad()
def test_the_write_happens_when_the_last_token_of_a_segment_is_fed_and_never_before():
    model, idx = build(), text(2, 2 * S)
    start = [b.bank for b in model.initial_state(2).blocks]
    for sizes in (1, S - 1, S):
        state, seen = None, 0
        for piece in idx[:, :S].split(sizes, dim=1):
            state, seen = model(piece, state=state)[2], seen + piece.shape[1]
            banks = [b.bank for b in state.blocks]
            if seen < S:
                assert same(banks, start) and state.fill == seen
            else:
                assert state.fill == 0
                assert all((a - b).abs().max() > 1e-3 for a, b in zip(banks, start))
    for extra in range(1, S):
        longer = model(idx[:, :S + extra])[2]
        assert longer.fill == extra
        for a, b in zip(longer.blocks, banks):
            near(a.bank, b, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype, bank", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                                         (torch.float64, torch.float64)])
def test_the_bank_is_float32_under_bfloat16_and_float64_in_a_float64_model(dtype, bank):
    model = build(dtype=dtype)
    logits, loss, state = model(text(2, 2 * S + 1), text(2, 2 * S + 1))
    assert logits.dtype == dtype and loss.dtype == bank
    assert {b.bank.dtype for b in model.initial_state(2).blocks + state.blocks} == {bank}


@torch.no_grad()
def test_every_bank_starts_as_rows_of_the_identity():
    for block in build().initial_state(3).blocks:
        assert torch.equal(block.bank, torch.eye(16, dtype=torch.float64)[:6].expand(3, 6, 16))


@torch.no_grad()
def test_a_slot_that_no_token_concerns_is_kept_exactly():
    model = build()
    for layer in model.layers:
        layer.memory.null.fill_(50.0)
    for block in model(text(2, 3 * S))[2].blocks:
        near(block.bank, torch.eye(16, dtype=torch.float64)[:6].expand(2, 6, 16), 1e-12)


@torch.no_grad()
def test_the_null_of_one_head_guards_the_content_of_that_head_only():
    model = build()
    for layer in model.layers:
        layer.memory.null.copy_(torch.tensor([50.0, 0.0]))
    for block in model(text(2, S))[2].blocks:
        change = (block.bank - torch.eye(16, dtype=torch.float64)[:6]).abs()
        assert change[..., :8].max() < 1e-12 and change[..., 8:].max() > 1e-2


@torch.no_grad()
def test_a_little_forgetting_in_every_segment_is_not_rounded_away_under_bfloat16():
    model = build(dtype=torch.float32, n_layer=1)
    model.layers[0].memory.wq.weight.zero_()  # equal scores, w = 0.0015 in every segment
    model.layers[0].memory.null.fill_(math.log(S / 0.0015))
    idx = torch.full((1, 400 * S), 5)
    plain = model(idx)[2].blocks[0].bank
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(idx)[2].blocks[0].bank
    assert (plain - torch.eye(16)[:6]).abs().max() > 0.1
    near(mixed, plain, 0.03)


@torch.no_grad()
def test_a_segment_opened_under_bfloat16_is_read_on_without_it():
    model, idx = build(dtype=torch.float32), text(2, 2 * S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, state = model(idx[:, :S + 2])
    near(model(idx[:, S + 2:], state=state)[0], model(idx)[0][:, S + 2:], 0.05)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 64])
def test_with_equal_scores_a_slot_leaves_two_fifths_unwritten_whatever_the_segment_length(length):
    model = LM2(LM2Config(**{**SMALL, "segment_len": length}))
    near(model.layers[0].memory.null, torch.full((2,), math.log(length) - 0.5), 1e-6)
    for layer in model.layers:
        layer.memory.wq.weight.zero_()
    with recording(model) as notes:
        model(text(1, length))
    for note in notes:
        declined = note["R"][0][..., -1]
        near(declined, torch.full_like(declined, 1 / (1 + math.exp(0.5))), 1e-5)  # 0.378


@torch.no_grad()
def test_token_by_token_a_bank_gives_its_keys_and_values_once_a_segment():
    model, made = build(), []
    for layer in model.layers:
        for part in (layer.memory.wk, layer.memory.wv):
            part.register_forward_hook(lambda part, *_: made.append(part))
    feed(model, text(2, 3 * S + 2), 1)
    assert len(made) == 2 * 2 * 4               # blocks, keys and values, segments opened: not one a token


@torch.no_grad()
@pytest.mark.parametrize("sizes", [1, S, 2 * S])
def test_a_bank_put_into_a_state_between_two_segments_is_the_one_that_is_read(sizes):
    model, idx = build(), text(2, S + 2, seed=3)
    own, other = (feed(model, text(2, 2 * S, seed=seed), sizes)[1] for seed in (1, 2))
    before, expected = model(idx, state=own)[0], model(idx, state=other)[0]
    assert (before - expected).abs().max() > 1e-3
    for to, have in zip(own.blocks, other.blocks):
        to.bank = have.bank
    for pieces in (1, 3, S + 2):
        near(feed(model, idx, pieces, own)[0], expected)


# Equations

@pytest.mark.parametrize("n_mem_layer", [1, 2])
def test_values_and_gradients_are_those_of_the_equations_in_plain_loops(n_mem_layer):
    model = build(vocab_size=11, n_head=2, n_kv_head=1, n_embd=8, ffn_dim=5, segment_len=3, n_slot=5,
                  n_mem_layer=n_mem_layer)
    ids = [4, 0, 7, 2, 9, 1, 10, 3, 6, 5]  # each once: a row of the table is an input
    w = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits, _, state = model(torch.tensor([ids]))
    slow, banks = reference.document_logits(w, model.cfg, ids)
    slow = torch.stack(slow)
    near(logits[0], slow)
    for block, bank in zip(state.blocks, banks):
        near(block.bank[0], torch.stack(bank))
    near_gradients(model, logits[0], slow, w)


@torch.no_grad()
@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("tied", [False, True])
def test_without_memory_it_is_a_llama_whose_positions_restart_in_every_segment(scaling, tied):
    model = build(n_mem_layer=0, n_embd=32, segment_len=9, tie_embeddings=tied, rope_scaling=scaling)
    ids = text(1, 21)
    slow = reference.document_logits(dict(model.named_parameters()), model.cfg, ids[0].tolist())[0]
    near(model(ids)[0][0], torch.stack(slow))
    near(model(ids)[0][:, 9:18], model(ids[:, 9:18])[0], 1e-12)


def test_the_angles_keep_short_waves_slow_long_ones_and_are_as_exact_in_a_bfloat16_model():
    cfg = LM2Config(**{**SMALL, "n_embd": 32, "segment_len": 50, "rope_scaling": LLAMA3})
    ratio = [reference.frequency(cfg, i) * 10000.0 ** (i / 4) for i in range(4)]
    assert ratio[0] == pytest.approx(1) and 1 / 8 < ratio[1] < 0.99
    assert ratio[2:] == pytest.approx([1 / 8, 1 / 8])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):  # bfloat16 would turn far tokens wrongly
        model = LM2(cfg).to(dtype)
        turn = turn_table(model.freq, 50, model.dtype, torch.device("cpu"))
        for ours, exact in zip(turn.unbind(-1), reference.tables(cfg)):
            near(ours.double(), torch.tensor(exact, dtype=torch.float64),
                 1e-12 if dtype == torch.float64 else 1e-6)


# Rows, gradients

@torch.no_grad()
def test_rows_of_a_batch_do_not_touch_each_other():
    model, idx = build(), text(3, 3 * S + 2)
    other = idx.clone()
    other[0] = (other[0] + 1) % 19
    for sizes in (idx.shape[1], S, 1):
        (a, end_a), (b, end_b) = feed(model, idx, sizes), feed(model, other, sizes)
        assert (a[0] - b[0]).abs().max() > 1e-3
        assert torch.equal(a[1:], b[1:])
        for x, y in zip(end_a.blocks, end_b.blocks):
            assert torch.equal(x.bank[1:], y.bank[1:])


@torch.no_grad()
def test_a_row_has_the_logits_it_has_alone_wherever_it_stands():
    model, idx = build(), text(3, 3 * S + 2)
    whole = model(idx)[0]
    near(model(idx[[2, 0, 1]])[0], whole[[2, 0, 1]], 1e-12)
    near(torch.cat([model(row[None])[0] for row in idx]), whole, 1e-12)


def test_two_full_segments_with_the_loss_in_the_second_give_every_tensor_a_gradient():
    model, idx = build(), text(2, 2 * S)
    model(idx)[0][:, S:].square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-9, name


def test_three_full_segments_with_the_loss_in_the_third_give_every_entry_a_gradient():
    model, idx = build(), text(2, 3 * S)
    model(idx)[0][:, 2 * S:].square().sum().backward()
    for name, p in model.named_parameters():
        grad = p.grad[idx.unique()] if name == "tok_embeddings.weight" else p.grad
        assert (grad != 0).all(), f"{name}: {(grad == 0).sum()} of {grad.numel()} entries have none"


def test_what_an_open_segment_leaves_unused_gets_no_gradient_at_all():
    """Not zeros: for those AdamW would let the weights decay, and the momentum of earlier steps go on."""
    model = build()
    model(text(8, S - 1))[0].square().sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {f"layers.{i}.memory.{part}" for i in range(2) for part in
                       ("null", "w_in.weight", "w_in.bias", "w_write.weight", "w_forget.weight",
                        "w_forget.bias")}


def test_recomputing_gives_the_same_loss_and_gradients_bit_for_bit_and_keeps_less_for_them():
    model, idx, targets = build(), text(2, 6 * S + 2), text(2, 6 * S + 2, seed=2)
    own, losses, gradients, kept = {p.data_ptr() for p in model.parameters()}, [], [], []
    for recompute in (False, True):
        storages = {}

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(idx, targets, recompute=recompute)[1]
        kept.append(sum(s.nbytes() for at, s in storages.items() if at not in own))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss)
    assert torch.equal(*losses) and same(*gradients)
    assert kept[1] < kept[0] / 4, kept


def test_a_table_of_angles_made_while_inferring_serves_for_training_too():
    model, idx = build(), text(1, S)
    turn_table.cache_clear()
    with torch.inference_mode():
        model(idx)
    assert turn_table.cache_info().currsize == 1
    assert not turn_table(model.freq, S, model.dtype, idx.device).is_inference()
    model(idx)[0].sum().backward()
    assert turn_table.cache_info().currsize == 1


# Loss, less than all logits, options

@torch.no_grad()
def test_the_loss_is_the_mean_over_positions_whose_target_is_not_minus_one():
    model, idx, targets = build(), text(2, 2 * S + 2), text(2, 2 * S + 2, seed=2)
    targets[0, 3:8] = targets[1, 0] = -1
    logits, loss, _ = model(idx, targets)
    terms = [-logits[b, t].log_softmax(dim=-1)[targets[b, t]] for b in range(2) for t in range(2 * S + 2)
             if targets[b, t] != -1]
    near(loss, sum(terms) / len(terms), 1e-12)
    assert model(idx)[1] is None


@torch.no_grad()
def test_fewer_logits_are_the_same_logits_and_the_loss_at_the_targets_is_the_same_loss():
    model, idx, targets = build(), text(2, 2 * S + 2), text(2, 2 * S + 2, seed=2)
    targets[0, 3:8] = targets[1, 0] = -1
    logits, loss, end = model(idx, targets)
    last, last_loss, _ = model(idx, targets, keep="last")
    near(last, logits[:, -1:], 1e-12)
    near(last_loss, F.cross_entropy(logits[:, -1], targets[:, -1]), 1e-12)
    some, some_loss, state = model(idx, targets, keep="targets")
    near(some, logits[targets != -1], 1e-12)
    near(some_loss, loss, 1e-12)
    near_states(state, end, 1e-12)


def test_positions_to_keep_give_the_logits_loss_and_gradients_of_keeping_the_targets():
    model, idx, targets = build(), text(2, 2 * S + 2), text(2, 2 * S + 2, seed=2)
    targets[0, 3:8] = targets[1, 0] = -1
    keep = torch.tensor([i for i, t in enumerate(targets.flatten().tolist()) if t != -1])
    (a, loss_a, _), (b, loss_b, _) = model(idx, targets, keep="targets"), model(idx, targets, keep=keep)
    assert torch.equal(a, b) and torch.equal(loss_a, loss_b)
    assert same(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (loss_a, loss_b)))


@torch.no_grad()
def test_positions_to_keep_without_targets_give_their_logits_in_the_order_asked_and_no_loss():
    model, idx = build(), text(2, 2 * S + 2)
    keep = torch.tensor([2 * S + 4, 0, 7])      # the first is in the second row
    logits, loss, state = model(idx, keep=keep)
    whole, _, end = model(idx)
    near(logits, whole.flatten(0, 1)[keep], 1e-12)
    assert loss is None
    near_states(state, end, 1e-12)


@torch.no_grad()
def test_memory_sits_on_the_first_n_mem_layer_blocks():
    for n in (0, 1, 2, None):
        model = build(n_mem_layer=n)
        with recording(model) as notes:
            state = model(text(1, S))[2]
        with_memory = set(range(2 if n is None else n))
        assert {i for i, b in enumerate(state.blocks) if b.bank is not None} == with_memory
        assert {int(name.split(".")[1]) for name in model.state_dict() if ".memory." in name} == with_memory
        assert {note["layer"] for note in notes if "A" in note} == with_memory
        assert model.n_params()[1] == len(with_memory) * (7 * 16 * 16 + 3 * 16 + 2 * 16 + 2)


@torch.no_grad()
def test_a_recording_holds_weights_that_sum_to_one_and_the_gates_and_ends_with_its_block():
    model, idx = build(), text(2, 3 * S + 2)
    with recording(model) as notes:
        logits = model(idx)[0]
    near(logits, model(idx)[0], 0)
    assert [note["layer"] for note in notes] == [0, 1, 0, 1]
    for note, rows, length in zip(notes, (6, 6, 2, 2), (S, S, 2, 2)):
        assert note["A"].shape == (rows, 2, length, 6) and (note["A"] > 0).all()
        near(note["A"].sum(dim=-1), torch.ones(rows, 2, length, dtype=torch.float64))
        assert note["g_in"].shape == note["g_out"].shape == (rows, length, 16)
        assert len(note["R"]) == len(note["g_forget"]) == (3 if length == S else 0)
        for R, g_forget in zip(note["R"], note["g_forget"]):
            assert R.shape == (2, 2, 6, S + 1) and (R > 0).all()
            near(R.sum(dim=-1), torch.ones(2, 2, 6, dtype=torch.float64))
            assert g_forget.shape == (2, 6, 16)
        gates = [note["g_in"], note["g_out"], *note["g_forget"]]
        assert all(0 < g.min() and g.max() < 1 and g.std() > 0.01 for g in gates)


@torch.no_grad()
def test_shorter_segments_on_request_are_those_of_a_model_made_for_them():
    model = build()
    short = build(segment_len=3)
    short.load_state_dict(model.state_dict())
    idx = text(2, 11)
    logits, _, state = model(idx, segment_len=3)
    near(logits, short(idx)[0], 1e-12)
    assert state.segment_len == 3 and nbytes(state) == nbytes(short.initial_state(2))
    near(model(idx[:, :4], state=state)[0], short(torch.cat([idx, idx[:, :4]], dim=1))[0][:, 11:])


def test_bfloat16_autocast_trains_through_segments_with_a_float32_bank():
    model, idx = build(dtype=torch.float32), text(2, 3 * S + 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss, state = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert logits.dtype == torch.bfloat16 and {b.bank.dtype for b in state.blocks} == {torch.float32}
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    near(loss, model(idx[:, :-1], idx[:, 1:])[1], 0.05)


def test_layers_that_multiply_in_bfloat16_leave_the_rest_in_float32_and_train_nearly_as_they_did():
    model, idx = build(dtype=torch.float32), text(2, 3 * S + 2)
    rounded = copy.deepcopy(model)
    bfloat16_layers(rounded)
    (logits, loss, _), (others, other, state) = (m(idx[:, :-1], idx[:, 1:]) for m in (model, rounded))
    assert {x.dtype for x in (others, other, *tensors(state))} == {torch.float32}
    assert not torch.equal(logits, others)
    near(others, logits, 0.15)
    loss.backward(), other.backward()
    for (name, p), q in zip(model.named_parameters(), rounded.parameters()):
        assert q.dtype == q.grad.dtype == torch.float32, name
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.98, name
    assert list(rounded.state_dict()) == list(model.state_dict())


# Compiled

@pytest.fixture(scope="module")
def compiled():
    """(a model, the same one compiled): float32, by aot_eager, which takes graphs and gradients as inductor
    does, but makes no C++ of them: 15 seconds for what inductor takes minutes for."""
    model = build(dtype=torch.float32)
    fast = copy.deepcopy(model)
    counters.clear()
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch(**{limit: 2}):        # fewer than are needed: compile_blocks has to raise it
        compile_blocks(fast, backend="aot_eager")
        yield model, fast
    torch.compiler.reset()


def loss_of(model, segments, length, **options):
    """logits, loss of a document of so many segments of so many tokens"""
    idx, targets = (text(2, segments * length, seed=seed) for seed in (1, 2))
    return model(idx, targets, segment_len=length, **options)[:2]


def test_compiled_documents_have_the_logits_losses_and_gradients_of_others_in_graphs_without_breaks(compiled):
    for segments in (1, 2, 4):
        (logits, loss), (others, other) = (loss_of(model, segments, S) for model in compiled)
        near(others, logits, 1e-5)
        near(other, loss, 1e-5)
        for a, b in zip(*(torch.autograd.grad(x, list(model.parameters()), allow_unused=True,
                                              materialize_grads=True)
                          for x, model in zip((loss, other), compiled))):
            near(a, b, 1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 3 and not counters["graph_break"]
    for segments in (3, 7):                     # no other graph: the loop over segments is outside
        loss_of(compiled[1], segments, S)[1].backward()
    assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_and_recomputed_a_document_has_the_same_gradients(compiled):
    plain, both = (torch.autograd.grad(loss_of(model, 3, S, recompute=recompute)[1], list(model.parameters()))
                   for model, recompute in zip(compiled, (False, True)))
    for a, b in zip(plain, both):
        near(a, b, 1e-5)


def test_compiled_what_nothing_has_used_gets_no_gradient_or_one_of_zeros(compiled):
    for model in compiled:
        model.zero_grad()
        loss_of(model, 1, S)[1].backward()
    plain, fast = (dict(model.named_parameters()) for model in compiled)
    unused = [name for name, p in plain.items() if p.grad is None]
    assert unused                                       # the write of a document's only segment
    assert not any(fast[name].grad is not None and fast[name].grad.any() for name in unused)


@torch.no_grad()
def test_a_compiled_model_has_its_names_and_decodes_token_by_token_and_recorded(compiled):
    model, fast = compiled
    assert list(fast.state_dict()) == list(model.state_dict())
    idx = text(2, 2 * S + 2)
    near(feed(fast, idx, 1)[0], model(idx)[0], 1e-5)
    with recording(fast) as notes:
        near(fast(idx)[0], model(idx)[0], 1e-5)
    assert [note["layer"] for note in notes] == [0, 1, 0, 1] and all("A" in note for note in notes)
    with torch.enable_grad(), recording(fast) as notes, recording(fast) as inner:
        loss_of(fast, 2, S)
    assert not notes and len(inner) == 2 and all(len(note["R"]) == 2 for note in inner)
    assert all(layer.fast for layer in fast.layers)         # compiled again, and nothing is left behind
    prompt = text(2, S + 3)
    assert torch.equal(fast.generate(prompt, 2 * S), model.generate(prompt, 2 * S))


def test_what_wants_no_gradient_makes_no_graphs_of_its_own(compiled, monkeypatch):
    model, fast = compiled
    for block in fast.layers:
        monkeypatch.setattr(block, "fast", [None, None, None])      # nothing that could be called
    with torch.no_grad():
        near(fast(text(2, 2 * S))[0], model(text(2, 2 * S))[0], 1e-5)
    with pytest.raises(TypeError):
        fast(text(2, 2 * S))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="on a CPU torch.compile needs a C++ compiler, and neither g++ nor clang++ is here")
def test_compiled_to_machine_code_a_document_has_the_same_logits():
    torch.compiler.reset()
    model = build(dtype=torch.float32, n_layer=1).requires_grad_(False)     # no graphs for gradients
    fast, idx = copy.deepcopy(model), text(2, 2 * S)
    quick = {"compile_threads": 1, "cpp.simdlen": 1}    # no pool of processes, no vectors: half of that
    with torch._inductor.config.patch(quick):
        compile_blocks(fast)
        near(fast(idx)[0], model(idx)[0], 1e-5)
    torch.compiler.reset()


# Start, optimiser, presets, files

def test_weights_start_with_the_stated_spread():
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=512, n_head=8, n_kv_head=4, n_embd=128, ffn_dim=320, n_layer=4, n_slot=8,
                          n_mem_head=4))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = p.shape[1] ** -0.5
            if name.endswith(("attention.wo.weight", "feed_forward.w2.weight", "memory.wv.weight")):
                std /= math.sqrt(2 * 4)  # what adds to the stream, L = 4
            std = {"tok_embeddings.weight": 1.0, "output.weight": 0.02}.get(name, std)
            assert p.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(p.mean().item()) < 0.04 * std, name
        elif not name.endswith("null"):
            constant = 1.0 if name.endswith(("norm.weight", "w_forget.bias")) else 0.0
            assert (p == constant).all(), name


def test_a_tied_table_starts_as_a_head():
    model = LM2(LM2Config(vocab_size=512, tie_embeddings=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert model.output.weight.std().item() == pytest.approx(0.02, rel=0.04)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_optimizer_group_and_norms_biases_and_nulls_do_not_decay(tied):
    model = build(tie_embeddings=tied)
    groups = model.optimizer_groups(0.1)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith(("norm.weight", "bias", "null")) else 0.1), name


def test_the_papers_preset_has_the_papers_size():
    with torch.device("meta"):
        model = LM2(LM2Config(**PRESETS["lm2-1.7b"]))
    D, FFN, V, L, HM = 2048, 8192, 128256, 16, 32
    llama = V * D + L * (2 * D * D + 2 * D * D // 4 + 3 * D * FFN + 2 * D) + D
    memory = L * (7 * D * D + 3 * D + 2 * D + HM)
    assert model.n_params() == (llama + memory, memory)
    assert (llama, memory) == (1_235_814_400, 469_926_400)


@torch.no_grad()
def test_a_model_built_on_the_meta_device_and_filled_later_is_the_same_model():
    with torch.device("meta"):
        model = LM2(LM2Config(**SMALL))
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    model, real = model.to_empty(device="cpu"), LM2(LM2Config(**SMALL))
    model.load_state_dict(real.state_dict())
    idx = text(1, 2 * S + 1)
    assert torch.equal(model(idx)[0], real(idx)[0])


@torch.no_grad()
def test_a_checkpoint_gives_the_same_model_back_and_a_broken_one_a_single_line(tmp_path):
    tokenizer = load()
    model = build(dtype=torch.float32, rope_scaling=LLAMA3, vocab_size=tokenizer.n_vocab)
    path, idx = tmp_path / "model.pt", text(2, 3 * S + 2)
    save_checkpoint(path, model, tokenizer, step=7)
    again, words, content = load_checkpoint(path)
    assert torch.equal(again(idx)[0], model(idx)[0]) and again.cfg == model.cfg and content["step"] == 7
    assert words.ranks == tokenizer.ranks
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    path.write_bytes(path.read_bytes()[:1000])
    for broken in (path, tmp_path / "none.pt"):
        with pytest.raises(ValueError, match=broken.name) as error:
            load_checkpoint(broken)
        assert "\n" not in str(error.value)


# A user's mistakes

@pytest.mark.parametrize("change, named", [
    (dict(n_head=3), "n_head 3 .*n_embd 16"),
    (dict(n_head=16, n_kv_head=16), "n_head 16 .*n_embd 16"),
    (dict(n_kv_head=3), "n_kv_head 3 .*n_head 4"),
    (dict(n_mem_head=3), "n_mem_head 3 .*n_embd 16"),
    (dict(n_slot=17), "n_slot 17 .*n_embd 16"),
    (dict(n_mem_layer=3), "n_mem_layer 3 .*n_layer 2"),
    (dict(n_mem_layer=-1), "n_mem_layer -1"),
    (dict(rope_scaling={k: v for k, v in LLAMA3.items() if k != "factor"}), "rope_scaling lacks factor"),
    *[({name: 0}, f"{name} is 0") for name in SMALL],
])
def test_a_configuration_that_cannot_work_is_refused_by_name_and_value(change, named):
    with pytest.raises(ValueError, match=named):
        LM2Config(**{**SMALL, **change})


@pytest.mark.parametrize("call, named", [
    (lambda m: m(text(2, 4).float()), "float32"),
    (lambda m: m(text(2, 4).int()), "int32"),
    (lambda m: m(text(2, 4)[0]), r"\(4,\)"),
    (lambda m: m(text(2, 0)), r"\(2, 0\)"), (lambda m: m(text(2, S)[:0]), rf"\(0, {S}\)"),
    (lambda m: m(text(3, 4), state=m(text(2, 4))[2]), "3 rows.* 2"),
    (lambda m: m(text(2, 4), state=LM2(replace(m.cfg, n_mem_layer=1)).initial_state(2)), "None.*, not .*16"),
    (lambda m: m(text(2, 4), state=LM2(replace(m.cfg, n_layer=3)).initial_state(2)), "2 rows: 3, not 2"),
    (lambda m: m(text(2, 4), state=LM2(replace(m.cfg, segment_len=9)).initial_state(2)), "2 rows: 9, not 5"),
    (lambda m: m(text(2, 4), keep="first"), "first"),
    (lambda m: m(text(2, 4), keep=None), "None"),
    (lambda m: m(text(2, 4), keep="targets"), "targets"),
    (lambda m: m(text(2, 4), text(4, 2)), r"\(4, 2\)"),
    (lambda m: m(text(2, 4), segment_len=S + 1), f"segment_len {S + 1}"),
    (lambda m: m(text(2, 4), segment_len=0), "segment_len 0"),
    (lambda m: m.read(text(2, 0)), r"\(2, 0\)"),
    (lambda m: m.generate(text(2, 0), 3), r"\(2, 0\)"), (lambda m: m.generate(text(1, 4)[0], 3), r"\(4,\)"),
], ids=["float", "int32", "one_row", "no_token", "no_row", "other_batch", "less_memory", "more_blocks",
        "longer_segments", "keep", "keep_none", "keep_targets",
        "targets_turned", "segment_too_long", "segment_0", "read_nothing", "generate_nothing",
        "generate_one_row"])
def test_a_call_that_cannot_work_is_refused_by_value(call, named):
    with pytest.raises(ValueError, match=named):
        call(build())
