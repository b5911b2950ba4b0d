"""The models against their rules and against a slow reference in plain loops (reference.py).

    python -m pytest tests/test_model.py -q

The models are small and in float64, with two blocks and grouped heads. Every bias, norm and null
score is moved off its start, so that nothing holds only because something is zero.
"""

import copy
import hashlib
import io
import itertools
import math
import random
import shutil
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import bench
import lm2
import reference
from data.recipes import PRESETS
from data.tokenizer import load, of_checkpoint
from heatmaps import recording
from lm2 import (
    LM2,
    RMT,
    LM2Config,
    NeuralMemory,
    State,
    build_model,
    load_checkpoint,
    rotary_table,
    save_checkpoint,
)
from train import bfloat16_layers, compile_blocks, optimizer_groups

torch.set_num_threads(1)
# PyTorch's own warning, on compiling
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

SMALL = dict(
    vocab_size=19,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    ffn_dim=20,
    segment_len=5,
    n_slot=6,
    n_mem_head=2,
)
S = SMALL["segment_len"]
K = 2  # memory tokens of the RMT
LLAMA3 = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=100,
)
KINDS = {
    "lm2": {},
    "memory in one block": dict(mem_blocks=(1,)),
    "llama": dict(n_mem_layer=0),
    "rmt": dict(n_mem_token=K),
    "neural": dict(memory_kind="neural"),
    "rmt with a projection": dict(n_mem_token=K, mem_projection=True),
    "the readme's own": dict(memory_kind="averages"),
}

all_kinds = pytest.mark.parametrize("kind", KINDS)
every_kind = pytest.mark.parametrize("kind", ["lm2", "llama", *list(KINDS)[3:]])
with_memory = pytest.mark.parametrize("kind", ["lm2", *list(KINDS)[3:]])


def build(kind="lm2", seed=0, dtype=torch.float64, **changes):
    """A model with every parameter away from its start, and a head that is not nearly zero."""
    torch.manual_seed(seed)
    model = build_model(LM2Config(**{**SMALL, **KINDS[kind], **changes})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
        model.output.weight.normal_(std=0.3)
    return model


def text(rows, length, seed=1, vocab=SMALL["vocab_size"]):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def feed(model, idx, sizes, state=None, segment_len=None):
    """idx in calls of these sizes, the state handed on -> all logits, the last state"""
    out = []
    for piece in idx.split(sizes, dim=1):
        logits, _, state = model(
            piece, state=state, segment_len=segment_len if state is None else None
        )
        out.append(logits)
    return torch.cat(out, dim=1), state


def tensors(state):
    return [t for t in [*state.carried, state.open_ids] if t is not None]


def banks(state):
    return [t for t in state.carried if t is not None]


def copies(state):
    return [t.detach().clone() for t in tensors(state)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def near(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    assert difference <= tolerance, f"they differ by {difference:.3g}, allowed is {tolerance}"


def near_states(a, b, tolerance=1e-10):
    assert a.segment_len == b.segment_len
    assert torch.equal(a.open_ids, b.open_ids)
    for x, y in zip(banks(a), banks(b), strict=True):
        near(x, y, tolerance)


def gradients(model, value):
    return torch.autograd.grad(value, list(model.parameters()))


def all_gradients(model, value):
    """The same with zeros where nothing was used."""
    parameters = list(model.parameters())
    return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)


# Causality


@every_kind
@torch.no_grad()
def test_a_changed_token_leaves_every_earlier_logit_as_it_was_bit_for_bit(kind):
    model, idx = build(kind), text(2, 3 * S + 2)
    before = model(idx)[0]
    for j in range(idx.shape[1]):
        other = idx.clone()
        other[:, j] = (other[:, j] + 1) % 19
        after = model(other)[0]
        assert torch.equal(before[:, :j], after[:, :j]), f"token {j} changed a logit before it"
        assert not torch.equal(before[:, j], after[:, j])


@every_kind
@torch.no_grad()
def test_a_token_of_the_first_segment_reaches_later_ones_through_the_memory_alone(kind):
    model, idx = build(kind), text(1, 3 * S + 2)
    other = idx.clone()
    other[:, 2] = (other[:, 2] + 1) % 19
    change = model(idx)[0] - model(other)[0]
    sizes = [part.abs().max().item() for part in change.split(S, dim=1)]
    if kind == "llama":
        assert sizes[0] > 1e-5 and sizes[1:] == [0.0, 0.0, 0.0]
    else:
        assert min(sizes) > 1e-5
        _, _, state = model(idx[:, : S + 1])
        fresh = replace(state, carried=model.initial_state(1).carried)
        alone = feed(model, idx[:, S + 1 :], S, fresh)[0]
        without_first = model(idx[:, S:])[0][:, 1:]
        near(alone, without_first)  # what was carried is all that the first segment has left


@every_kind
@torch.no_grad()
def test_padding_on_the_right_changes_no_logit_of_the_real_tokens(kind):
    model, idx = build(kind), text(2, 2 * S + 2)
    for extra in (1, S - 2, S + 1):
        padded = torch.cat([idx, text(2, extra, seed=extra)], dim=1)
        near(model(padded)[0][:, : idx.shape[1]], model(idx)[0], 1e-12)


@torch.no_grad()
def test_the_zeros_that_make_narrow_heads_fast_in_long_segments_change_nothing():
    model, idx = build(segment_len=80), text(2, 70)
    assert model.cfg.n_embd // model.cfg.n_head < 16
    near(model(idx)[0][:, :60], model(idx[:, :60])[0], 1e-12)


# Whole = streamed


@all_kinds
@pytest.mark.parametrize("segment_len", [S, 3])
@torch.no_grad()
def test_calls_that_end_anywhere_give_the_logits_and_the_state_of_one_call(kind, segment_len):
    model = build(kind)
    draw = random.Random(3)
    for length in (1, S, S + 1, 3 * S, 3 * S + 2):
        idx = text(2, length)
        whole, _, end = model(idx, segment_len=segment_len)
        ways = [1, 2, segment_len, 2 * segment_len]
        for _ in range(3):
            cuts = sorted(draw.sample(range(1, length), min(length - 1, 4)))
            ways.append([b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)])
        for sizes in ways:
            logits, state = feed(model, idx, sizes, segment_len=segment_len)
            near(logits, whole)
            near_states(state, end)


@with_memory
def test_gradients_of_many_calls_are_those_of_one_call(kind):
    model, idx = build(kind), text(2, 3 * S + 2)
    weight = torch.randn(2, idx.shape[1], 19, dtype=torch.float64)
    whole = gradients(model, (model(idx)[0] * weight).sum())
    for sizes in (1, [3, 6, 1, 7]):
        pieces = gradients(model, (feed(model, idx, sizes)[0] * weight).sum())
        for a, b in zip(pieces, whole, strict=True):
            near(a, b)


@every_kind
@pytest.mark.parametrize("before", [0, 3, S])
@torch.no_grad()
def test_read_gives_the_state_of_one_call(kind, before):
    model = build(kind)
    for length in (1, S - 3, S, S + 1, 4 * S + 2):
        idx = text(2, before + length)
        end = model(idx)[2]
        for segments in (1, 2, None):
            state = model(idx[:, :before])[2] if before else None
            near_states(model.read(idx[:, before:], state, segments_per_call=segments), end)


@torch.no_grad()
def test_read_goes_through_a_document_in_calls_of_a_number_of_segments(monkeypatch):
    model, idx = build(), text(2, 10 * S + 2)
    seen = []
    forward = model.forward

    def watched(idx, **given):
        seen.append(idx.shape[1])
        return forward(idx, **given)

    monkeypatch.setattr(model, "forward", watched)
    model.read(idx, segments_per_call=3)
    assert seen == [3 * S] * 3 + [S + 2]
    seen.clear()
    model.read(idx[:, :S])  # nothing is to be written
    assert seen == []


@all_kinds
@pytest.mark.parametrize("segment_len", [S, 3])
@torch.no_grad()
def test_generated_tokens_are_the_likeliest_when_all_is_scored_in_one_pass(kind, segment_len):
    model = build(kind, seed=8)
    seen = set()
    for length in (1, S - 1, S, S + 1, 2 * S + 2):
        idx = text(3, length)
        state = model.initial_state(3, segment_len)
        out = model.generate(idx, 2 * S + 3, state=state)
        assert torch.equal(out[:, :length], idx) and out.shape[1] == length + 2 * S + 3
        scored = model(out, segment_len=segment_len)[0].argmax(dim=-1)
        assert torch.equal(out[:, length:], scored[:, length - 1 : -1])
        seen.update(out[:, length:].flatten().tolist())
    assert len(seen) > 3  # not one token again and again


@with_memory
@torch.no_grad()
def test_a_stream_goes_on_from_a_state_that_several_streams_share(kind):
    model, document = build(kind), text(3, 2 * S + 3)
    state = model.read(document)
    kept = copies(state)
    questions = [text(3, 4, seed=seed) for seed in (2, 3)]
    streams = [model.stream(question, 2 * S, state=state) for question in questions]
    answers = list(zip(*streams, strict=True))  # the two streams take turns
    for i, question in enumerate(questions):
        idx = torch.cat([document, question], dim=1)
        expected = model.generate(idx, 2 * S)[:, idx.shape[1] :]
        assert torch.equal(torch.stack([pair[i] for pair in answers], dim=1), expected)
    assert same(copies(state), kept)


@torch.no_grad()
def test_within_a_segment_a_stream_takes_a_new_token_through_the_blocks_alone():
    model, lengths, banks_read = build(), [], []
    for block in model.layers:
        block.feed_forward.register_forward_hook(lambda _, x, y: lengths.append(y.shape[-2]))
        block.memory.wk.register_forward_hook(lambda *_: banks_read.append(0))
    stream = model.stream(text(2, 2), 2 * S)
    next(stream)
    assert lengths == [2, 2]  # the prompt is in the open segment: nothing is read twice
    lengths.clear()
    for _ in range(S - 2):
        next(stream)
    assert lengths == [1] * 2 * (S - 2)
    assert len(banks_read) == 2  # one bank for each block, not for each token


@torch.no_grad()
def test_no_new_tokens_returns_the_prompt():
    idx = text(2, S + 2)
    assert torch.equal(build().generate(idx, 0), idx)


@torch.no_grad()
def test_sampling_follows_the_softmax_of_logits_over_temperature_and_its_generator():
    model, idx = build(), text(1, 2).repeat(2000, 1)

    def draw(temperature):
        generator = torch.Generator().manual_seed(7)
        return model.generate(idx, 1, temperature, generator)[:, -1]

    new = draw(2.0)
    expected = (model(idx[:1])[0][0, -1] / 2.0).softmax(dim=-1)
    # A standard deviation is below 0.012.
    near(new.bincount(minlength=19) / 2000, expected.float(), 0.04)
    assert torch.equal(new, draw(2.0))
    assert torch.equal(draw(1e-30), model.generate(idx, 1)[:, -1])  # nothing overflows


# A state is a value


@with_memory
@pytest.mark.parametrize("n_open", [S, 2])
def test_going_on_from_a_state_changes_neither_it_nor_one_made_from_it(kind, n_open):
    model, idx = build(kind), text(2, S + n_open)
    root = model(idx)[2]
    root_copy = copies(root)
    for seed in (11, 12):
        branch = text(2, 2 * S, seed=seed)
        expected = model(torch.cat([idx, branch], dim=1))[0][:, idx.shape[1] :]
        middle = model(branch[:, :2], state=root)[2]
        middle_copy = copies(middle)
        near(feed(model, branch[:, 2:], [1, 1, 5, 1], middle)[0], expected[:, 2:])
        near(feed(model, branch, [1, 2, 3, 4], root)[0], expected)
        assert same(copies(middle), middle_copy)
    assert same(copies(root), root_copy)


def test_a_state_can_be_gone_on_from_twice_and_both_ways_give_gradients():
    model, idx = build(), text(1, S + 2)
    branches = [text(1, S + 1, seed=seed) for seed in (11, 12)]
    state = model(idx)[2]
    shared = sum(feed(model, b, [1, 2, 3], state)[0].square().sum() for b in branches)
    apart = 0
    for b in branches:
        apart = apart + model(torch.cat([idx, b], dim=1))[0][:, S + 2 :].square().sum()
    for a, b in zip(gradients(model, shared), gradients(model, apart), strict=True):
        near(a, b, 1e-9)


@with_memory
def test_gradients_flow_from_the_third_segment_to_the_first_until_the_caller_detaches(kind):
    model, idx = build(kind), torch.arange(3 * S)[None]  # each token once: a row is a place
    for detach in (False, True):
        state = model(idx[:, : S + 1])[2]  # the first token of the second writes the first
        if detach:
            state = state.detach()
        model.zero_grad()
        model(idx[:, S + 1 :], state=state)[0][:, S - 1 :].square().sum().backward()
        size = model.tok_embeddings.weight.grad.abs().amax(dim=1)
        assert (size[S : 3 * S] > 0).all()
        assert (size[:S] == 0).all() if detach else (size[:S] > 0).all()


@every_kind
@torch.no_grad()
def test_nothing_of_a_document_stays_on_the_module(kind):
    model, first, second = build(kind), text(2, 2 * S + 3), text(2, 2 * S + 3, seed=2)
    fresh = copy.deepcopy(model)

    def inside():
        found = {}
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                found[name, key] = dict(value) if isinstance(value, dict) else value
        return found

    before = inside()
    model(first)
    model.generate(first, S)
    after = inside()
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, dict):
            assert value.keys() == after[key].keys(), key
            assert all(value[k] is after[key][k] for k in value), key
        else:
            assert value is after[key] or value == after[key], key
    assert not list(model.buffers())
    assert torch.equal(model(second)[0], fresh(second)[0])


@with_memory
@torch.no_grad()
def test_a_state_has_as_many_bytes_after_many_tokens_as_after_few(kind):
    sizes = dict(vocab_size=7, n_head=2, n_kv_head=1, n_embd=8, ffn_dim=8, n_slot=4)
    model = build(kind, dtype=torch.float32, segment_len=16, **sizes)
    idx = text(1, 16 * 1000 + 3, vocab=7)
    early = model.read(idx[:, :35])
    late = model.read(idx[:, 35:], early)

    def held(state):  # by the allocator, in case a small view keeps a large buffer alive
        storages = [t.untyped_storage() for t in tensors(state)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    assert late.open_ids.shape == (1, 3)
    assert held(early) == held(late) == sum(t.nbytes for t in tensors(late))
    assert all(t.isfinite().all() for t in banks(late))
    file = io.BytesIO()
    torch.save([late.carried, late.open_ids], file)
    assert file.tell() < held(late) + 8000


@with_memory
@torch.no_grad()
def test_a_state_of_a_float32_model_is_continued_by_the_same_model_in_bfloat16(kind):
    model, idx = build(kind, dtype=torch.float32), text(2, 2 * S + 2)
    rounded = copy.deepcopy(model).bfloat16()
    fresh, later = model.initial_state(2), model(idx)[2]
    for state in (fresh, later):
        logits = rounded(idx, state=state)[0].float()
        near(logits, model(idx, state=state)[0], 0.15)
        assert rounded.generate(idx[:, :2], S, state=state).shape == (2, S + 2)


@with_memory
@torch.no_grad()
def test_rows_of_a_state_do_not_share_memory(kind):
    model = build(kind)
    for state in (model.initial_state(2), model(text(2, 2 * S + 1))[2]):
        for i, tensor in enumerate(banks(state)):
            others = [t.clone() for t in [*banks(state)[:i], *banks(state)[i + 1 :]]]
            row = tensor[1].clone()
            tensor[0] += 1
            assert torch.equal(tensor[1], row)
            assert same([*banks(state)[:i], *banks(state)[i + 1 :]], others)


@torch.no_grad()
def test_a_state_can_be_mapped_to_other_rows():
    model, idx, more = build(), text(3, S + 2), text(3, S, seed=2)
    state = model(idx)[2]
    rows = [2, 0]
    part = state.map(lambda t: t[rows])
    near(model(more[rows], state=part)[0], model(more, state=state)[0][rows], 1e-12)


# The bank


@with_memory
@torch.no_grad()
def test_a_segment_is_written_when_the_next_one_begins_and_at_no_other_time(kind):
    model, idx = build(kind), text(2, 3 * S)
    start = banks(model.initial_state(2))
    for sizes in (1, S - 1, S, 2 * S - 1):
        state, seen = None, 0
        for piece in idx[:, : 2 * S].split(sizes, dim=1):
            state, seen = model(piece, state=state)[2], seen + piece.shape[1]
            if seen <= S:
                assert same(banks(state), start)
                assert torch.equal(state.open_ids, idx[:, :seen])
            else:
                assert torch.equal(state.open_ids, idx[:, S:seen])
                written = banks(model(idx[:, : S + 1])[2])
                for a, b, was in zip(banks(state), written, start, strict=True):
                    near(a, b, 1e-12)
                    assert (a - was).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, bank",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_bank_is_float32_under_bfloat16_and_float64_in_a_float64_model(dtype, bank):
    model = build(dtype=dtype)
    logits, loss, state = model(text(2, 2 * S + 1), text(2, 2 * S + 1))
    assert logits.dtype == dtype and loss.dtype == bank
    assert {b.dtype for b in banks(model.initial_state(2)) + banks(state)} == {bank}
    assert model.generate(text(2, S + 1), S).shape == (2, 2 * S + 1)


@torch.no_grad()
def test_every_bank_starts_as_rows_of_the_identity():
    for bank in build().initial_state(3).carried:
        assert torch.equal(bank, torch.eye(16, dtype=torch.float64)[:6].expand(3, 6, 16))


@torch.no_grad()
def test_a_slot_that_no_token_concerns_is_kept_exactly():
    model = build()
    for layer in model.layers:
        layer.memory.null.fill_(50.0)
    for bank in model(text(2, 3 * S))[2].carried:
        near(bank, torch.eye(16, dtype=torch.float64)[:6].expand(2, 6, 16), 1e-12)


@torch.no_grad()
def test_the_null_of_one_head_guards_the_content_of_that_head_only():
    model = build()
    for layer in model.layers:
        layer.memory.null.copy_(torch.tensor([50.0, 0.0]))
    for bank in model(text(2, S + 1))[2].carried:
        change = (bank - torch.eye(16, dtype=torch.float64)[:6]).abs()
        assert change[..., :8].max() < 1e-12 and change[..., 8:].max() > 1e-2


@torch.no_grad()
def test_a_little_forgetting_in_every_segment_is_not_rounded_away_under_bfloat16():
    model = build(dtype=torch.float32, n_layer=1)
    model.layers[0].memory.wq.weight.zero_()  # equal scores, w = 0.0015 in every segment
    model.layers[0].memory.null.fill_(math.log(S / 0.0015))
    idx = torch.full((1, 400 * S + 1), 5)
    plain = model(idx)[2].carried[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(idx)[2].carried[0]
    assert mixed.dtype == torch.float32
    assert (plain - torch.eye(16)[:6]).abs().max() > 0.1
    near(mixed, plain, 0.03)


@every_kind
@torch.no_grad()
def test_a_document_begun_under_bfloat16_is_read_on_without_it(kind):
    model, idx = build(kind, dtype=torch.float32), text(2, 3 * S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, state = model(idx[:, : S + 2])
    near(model(idx[:, S + 2 :], state=state)[0], model(idx)[0][:, S + 2 :], 0.05)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 64])
def test_with_equal_scores_a_slot_leaves_two_fifths_unwritten_at_any_segment_length(length):
    model = LM2(LM2Config(**{**SMALL, "segment_len": length}))
    near(model.layers[0].memory.null, torch.full((2,), math.log(length) - 0.5), 1e-6)
    for layer in model.layers:
        layer.memory.wq.weight.zero_()
    with recording(model) as notes:
        model(text(1, length + 1))
    for note in notes:
        declined = note["R"][0][..., -1]
        near(declined, torch.full_like(declined, 1 / (1 + math.exp(0.5))), 1e-5)  # 0.378


# Equations


@pytest.mark.parametrize("length", [2, 10])
@pytest.mark.parametrize(
    "kind", ["lm2", "memory in one block", "rmt", "neural", "rmt with a projection"]
)
def test_values_and_gradients_are_those_of_the_equations_in_plain_loops(kind, length):
    sizes = dict(vocab_size=11, n_head=2, n_kv_head=1, n_embd=8, ffn_dim=5, segment_len=3)
    model = build(kind, n_slot=5, **sizes)
    ids = [4, 0, 7, 2, 9, 1, 10, 3, 6, 5][:length]  # each once: a row of the table is an input
    w = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits, _, state = model(torch.tensor([ids]))
    slow_logits, slow_banks = reference.document_logits(w, model.cfg, ids)
    slow_logits = torch.stack(slow_logits)
    near(logits[0], slow_logits)
    for bank, slow_bank in zip(banks(state), slow_banks, strict=True):
        near(bank[0], torch.stack(slow_bank))
    weight = torch.randn(slow_logits.shape, dtype=torch.float64)
    fast = torch.autograd.grad(
        (logits[0] * weight).sum(), list(model.parameters()), allow_unused=True
    )
    slow = torch.autograd.grad((slow_logits * weight).sum(), list(w.values()), allow_unused=True)
    for name, a, b in zip(w, fast, slow, strict=True):
        if length > 3:
            assert b.abs().max() > 1e-6, name
        if a is not None:
            near(a, b)


def neural_memory(momentum=0.0, decay=0.0):
    """A memory of the kind "neural" with these biases of its gates, and a bank of two documents."""
    torch.manual_seed(3)
    memory = NeuralMemory(LM2Config(**SMALL | dict(memory_kind="neural"))).double()
    M = torch.randn(2, *memory.bank_shape, dtype=torch.float64)
    with torch.no_grad():
        memory.w_momentum.bias.fill_(momentum)
        memory.w_decay.bias.fill_(decay)
        memory.w_rate.bias.fill_(1.0)  # long steps, so that some are shortened
    return memory, M


def keys_values_and_rates(memory, x):
    """(B, HM, S, D/HM), the same, and (B, HM, S): written anew."""
    E = memory.token_norm(x)
    keys = F.normalize(memory.heads(memory.wk(E)), dim=-1)
    rates = torch.sigmoid(memory.w_rate(E)).mT
    for b, h in itertools.product(range(2), range(2)):
        outer = torch.einsum("s,si,sj->ij", rates[b, h], keys[b, h], keys[b, h])
        rates[b, h] /= max(1.0, outer.square().sum().sqrt().item())
    return keys, memory.heads(memory.wv(E)), rates


@torch.no_grad()
def test_a_neural_memory_takes_the_gradient_that_autograd_finds():
    memory, M = neural_memory(momentum=-100.0, decay=-100.0)  # neither momentum nor forgetting
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    keys, values, rates = keys_values_and_rates(memory, x)
    W = M[:, 0].clone().requires_grad_()
    with torch.enable_grad():
        squares = (keys @ W.mT - values).square().sum(dim=-1)  # (B, HM, S)
        (gradient,) = torch.autograd.grad((rates * squares / 2).sum(), W)
    near(memory.write_segment(x, M)[:, 0], W - gradient)


@torch.no_grad()
def test_without_momentum_and_forgetting_a_token_a_segment_is_the_delta_rule():
    memory, M = neural_memory(momentum=-100.0, decay=-100.0)
    x = torch.randn(2, 1, 16, dtype=torch.float64)
    keys, values, rates = keys_values_and_rates(memory, x)
    W = M[:, 0]
    key = keys[:, :, 0, :, None]  # (B, HM, D/HM, 1): a column
    value = values[:, :, 0, :, None]
    expected = W + rates[..., None] * (value - W @ key) @ key.mT
    near(memory.write_segment(x, M)[:, 0], expected)


@torch.no_grad()
def test_what_a_neural_memory_writes_first_is_linear_attention():
    memory, _ = neural_memory()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    keys, values, rates = keys_values_and_rates(memory, x)
    nothing = memory.first_bank().double().expand(2, -1, -1, -1, -1)
    W = memory.write_segment(x, nothing)[:, 0]
    query = torch.randn(8, dtype=torch.float64)
    weights = rates * (keys @ query)  # (B, HM, S): no softmax
    near(W @ query, (weights[..., None] * values).sum(dim=2))


@torch.no_grad()
def test_a_step_of_a_neural_memory_never_goes_beyond_the_values_however_alike_the_tokens_are():
    memory, M = neural_memory(momentum=-100.0, decay=-100.0)
    memory.w_rate.bias.fill_(100.0)  # every rate is 1
    x = torch.randn(2, 1, 16, dtype=torch.float64).expand(-1, 50, -1)  # one token 50 times
    keys, values, _ = keys_values_and_rates(memory, x)
    key = keys[:, :, 0, :, None]
    value = values[:, :, 0, :, None]
    before = (M[:, 0] @ key - value).norm(dim=2)
    after = (memory.write_segment(x, M)[:, 0] @ key - value).norm(dim=2)
    assert (after < 1e-6 * before).all()  # it goes all the way, and without a limit 50 times as far


@torch.no_grad()
def test_the_keys_of_a_neural_memory_do_not_start_alike():
    model = build_model(LM2Config(vocab_size=500, n_layer=1, n_embd=64, memory_kind="neural"))
    keys, *_ = model.layers[0].memory.step_inputs(model.tok_embeddings.weight[None, None])
    alike = keys[0, 0] @ keys[0, 0].mT  # (HM, 500, 500) cosines
    assert alike.mean().abs() < 0.05


@pytest.mark.parametrize("kind", lm2.MEMORIES)
@pytest.mark.slow
def test_every_kind_of_memory_can_be_compiled(kind):
    model = build(dtype=torch.float32, memory_kind=kind)
    fast = copy.deepcopy(model)
    compile_blocks(fast, backend="eager")
    idx = text(2, 3 * S + 2)
    near(fast(idx)[0], model(idx)[0], 1e-5)
    torch.compiler.reset()


def test_a_state_from_before_there_were_kinds_of_memory_is_still_that_of_its_model():
    """The digest of the sizes that there were then, and of the weights."""
    model = build(seed=4)
    sizes = asdict(model.cfg)
    del sizes["memory_kind"], sizes["mem_projection"]
    digest = hashlib.blake2b(str(sizes).encode(), digest_size=16)
    for weight in model.state_dict().values():
        digest.update(weight.flatten().view(torch.uint8).numpy())
    assert lm2.fingerprint(model) == digest.hexdigest()
    other = build(seed=4, memory_kind="averages")
    assert lm2.fingerprint(other) != lm2.fingerprint(model)


@torch.no_grad()
@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("tied", [False, True])
def test_without_memory_it_is_a_llama_whose_positions_restart_in_every_segment(scaling, tied):
    sizes = dict(n_embd=32, segment_len=9, tie_embeddings=tied, rope_scaling=scaling)
    model = build("llama", **sizes)
    ids = text(1, 21)
    w = dict(model.named_parameters())
    slow, _ = reference.document_logits(w, model.cfg, ids[0].tolist())
    near(model(ids)[0][0], torch.stack(slow))
    near(model(ids)[0][:, 9:18], model(ids[:, 9:18])[0], 1e-12)


def test_without_memory_it_gives_the_logits_of_transformers_llama():
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = build("llama", dtype=torch.float32, segment_len=40, n_embd=32, rope_scaling=LLAMA3)
    cfg = model.cfg
    theirs = bench.TransformersLlama(cfg).model.eval()
    width = cfg.n_embd // cfg.n_head
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    weights = {}
    for name, p in model.state_dict().items():
        _, number, rest = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
        rest = rest.removesuffix(".weight")
        if rest in ("attention.wq", "attention.wk"):  # halves there, neighbours here
            p = p.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)
        prefix = f"model.layers.{number}." if number else ""
        weights[f"{prefix}{names[rest]}.weight"] = p
    theirs.load_state_dict(weights, strict=True)
    idx = text(2, 40)
    with torch.no_grad():
        near(model(idx)[0], theirs(idx).logits, 1e-4)


def test_the_angles_keep_short_waves_slow_long_ones_and_are_exact_in_a_bfloat16_model():
    cfg = LM2Config(**{**SMALL, "n_embd": 32, "segment_len": 50, "rope_scaling": LLAMA3})
    ratio = [reference.frequency(cfg, i) * 10000.0 ** (i / 4) for i in range(4)]
    assert ratio[0] == pytest.approx(1) and 1 / 8 < ratio[1] < 0.99
    assert ratio[2:] == pytest.approx([1 / 8, 1 / 8])
    exact = torch.tensor(
        [[p * reference.frequency(cfg, i) for i in range(4)] for p in range(50)],
        dtype=torch.float64,
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16):  # bfloat16 would turn far wrongly
        cos, signed_sin = LM2(cfg).to(dtype).rope(0, 50)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        near(cos[:, 0::2].double(), exact.cos(), tolerance)
        near(cos[:, 1::2].double(), exact.cos(), tolerance)
        near(signed_sin[:, 0::2].double(), -exact.sin(), tolerance)
        near(signed_sin[:, 1::2].double(), exact.sin(), tolerance)


def test_a_table_of_angles_made_while_inferring_serves_for_training_too():
    model, idx = build(), text(1, S)
    rotary_table.cache_clear()
    with torch.inference_mode():
        model(idx)
    assert rotary_table.cache_info().currsize == 1
    model(idx)[0].sum().backward()
    assert rotary_table.cache_info().currsize == 1


# Rows, gradients


@every_kind
@torch.no_grad()
def test_rows_of_a_batch_do_not_touch_each_other(kind):
    model, idx = build(kind), text(3, 3 * S + 2)
    other = idx.clone()
    other[0] = (other[0] + 1) % 19
    for sizes in (idx.shape[1], S, 1):
        a, end_a = feed(model, idx, sizes)
        b, end_b = feed(model, other, sizes)
        assert (a[0] - b[0]).abs().max() > 1e-3
        assert torch.equal(a[1:], b[1:])
        for x, y in zip(banks(end_a), banks(end_b), strict=True):
            assert torch.equal(x[1:], y[1:])
    whole = model(idx)[0]
    near(model(idx[[2, 0, 1]])[0], whole[[2, 0, 1]], 1e-12)
    near(torch.cat([model(row[None])[0] for row in idx]), whole, 1e-12)


@with_memory
def test_three_full_segments_with_the_loss_in_the_third_give_every_entry_a_gradient(kind):
    model, idx = build(kind), text(2, 3 * S)
    model(idx)[0][:, 2 * S :].square().sum().backward()
    for name, p in model.named_parameters():
        grad = p.grad[idx.unique()] if name == "tok_embeddings.weight" else p.grad
        assert (grad != 0).all(), f"{name}: {(grad == 0).sum()} of {grad.numel()} have none"


def test_what_a_document_of_one_segment_leaves_unused_gets_no_gradient_at_all():
    """Not zeros: AdamW would let those weights decay, and the momentum of earlier steps go on."""
    model = build()
    model(text(8, S))[0].square().sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    parts = ["null", "w_write.weight"]
    parts += [f"{gate}.{part}" for gate in ("w_in", "w_forget") for part in ("weight", "bias")]
    assert without == {f"layers.{i}.memory.{part}" for i in range(2) for part in parts}


@every_kind
def test_recomputing_gives_the_same_loss_and_gradients_bit_for_bit_and_keeps_less(kind):
    model, idx, targets = build(kind), text(2, 6 * S + 2), text(2, 6 * S + 2, seed=2)
    own = {p.data_ptr() for p in model.parameters()}
    losses, found, kept = [], [], []
    for recompute in (False, True):
        model.recompute = recompute
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(idx, targets)[1]
        kept.append(sum(s.nbytes() for at, s in storages.items() if at not in own))
        found.append(gradients(model, loss))
        losses.append(loss)
    assert torch.equal(*losses) and same(*found)
    assert kept[1] < kept[0] / 3, kept


# Loss, less than all logits, options


@torch.no_grad()
def test_the_loss_is_the_mean_over_positions_whose_target_is_not_minus_one():
    model, idx, targets = build(), text(2, 2 * S + 2), text(2, 2 * S + 2, seed=2)
    targets[0, 3:8] = -1
    targets[1, 0] = -1
    logits, loss, _ = model(idx, targets)
    terms = []
    for b in range(2):
        for t in range(2 * S + 2):
            if targets[b, t] != -1:
                terms.append(-logits[b, t].log_softmax(dim=-1)[targets[b, t]])
    near(loss, sum(terms) / len(terms), 1e-12)
    assert model(idx)[1] is None


def test_where_nothing_is_asked_the_loss_is_zero():
    model, idx = build(), text(2, S)
    nothing = torch.zeros(0, dtype=torch.int64)
    for loss in (model(idx, torch.full_like(idx, -1))[1], model(idx, nothing, at=nothing)[1]):
        assert loss.item() == 0
        loss.backward()  # and can be added to another one


@every_kind
def test_at_positions_there_are_the_logits_loss_and_gradients_of_those_positions(kind):
    model, idx, targets = build(kind), text(2, 2 * S + 2), text(2, 2 * S + 2, seed=2)
    at = torch.tensor([2 * S + 4, 0, 7])  # the first is in the second row
    apart = torch.full_like(targets, -1).flatten()
    apart[at] = targets.flatten()[at]
    whole, whole_loss, end = model(idx, apart.view_as(targets))
    some, some_loss, state = model(idx, targets.flatten()[at], at=at)
    near(some, whole.flatten(0, 1)[at], 1e-12)
    near(some_loss, whole_loss, 1e-12)
    near_states(state, end, 1e-12)
    for a, b in zip(all_gradients(model, some_loss), all_gradients(model, whole_loss), strict=True):
        near(a, b, 1e-12)
    logits, loss, _ = model(idx[:, S:], at=at[1:], state=model(idx[:, :S])[2])
    near(logits, model(idx)[0][:, S:].flatten(0, 1)[at[1:]], 1e-12)
    assert loss is None


@torch.no_grad()
def test_memory_sits_on_the_blocks_that_are_named_or_on_the_first_n_mem_layer():
    cases = [
        (dict(), {0, 1, 2}),
        (dict(n_mem_layer=0), set()),
        (dict(n_mem_layer=1), {0}),
        (dict(n_mem_layer=2), {0, 1}),
        (dict(mem_blocks=()), set()),
        (dict(mem_blocks=(2,)), {2}),
        (dict(mem_blocks=[2, 0]), {0, 2}),
        (dict(mem_blocks=(-1,)), {2}),
        (dict(mem_blocks=(-1, -3)), {0, 2}),
    ]
    for sizes, expected in cases:
        model = build(n_layer=3, **sizes)
        assert model.cfg.n_mem_layer == len(expected)
        with recording(model) as notes:
            state = model(text(1, S))[2]
        assert {i for i, bank in enumerate(state.carried) if bank is not None} == expected
        names = [name for name in model.state_dict() if ".memory." in name]
        assert {int(name.split(".")[1]) for name in names} == expected
        assert {note["layer"] for note in notes if "A" in note} == expected
        a_memory = 7 * 16 * 16 + 3 * 16 + 2 * 16 + 2
        assert model.n_params()[1] == len(expected) * a_memory
    rmt = build("rmt")
    assert all(block.memory is None for block in rmt.layers)
    assert rmt.n_params()[1] == K * 16


@torch.no_grad()
def test_a_recording_holds_weights_that_sum_to_one_and_the_gates_and_ends_with_its_block():
    model, idx = build(), text(2, 3 * S + 2)
    with recording(model) as notes:
        logits = model(idx)[0]
    near(logits, model(idx)[0], 0)
    assert [note["layer"] for note in notes] == [0, 1]
    for note in notes:
        assert note["A"].shape == (2, 4, 2, S, 6) and (note["A"] > 0).all()
        near(note["A"].sum(dim=-1), torch.ones(2, 4, 2, S, dtype=torch.float64))
        assert note["g_out"].shape == (2, 4, S, 16)
        assert note["g_in"].shape == (2, 3, S, 16)  # of those that are written
        assert len(note["R"]) == len(note["g_forget"]) == 3
        for R, g_forget in zip(note["R"], note["g_forget"], strict=True):
            assert R.shape == (2, 2, 6, S + 1) and (R > 0).all()
            near(R.sum(dim=-1), torch.ones(2, 2, 6, dtype=torch.float64))
            assert g_forget.shape == (2, 6, 16)
        for gate in [note["g_in"], note["g_out"], *note["g_forget"]]:
            assert gate.min() > 0 and gate.max() < 1 and gate.std() > 0.01


@every_kind
@torch.no_grad()
def test_shorter_segments_on_request_are_those_of_a_model_made_for_them(kind):
    model, short = build(kind), build(kind, segment_len=3)
    short.load_state_dict(model.state_dict())
    idx = text(2, 11)
    logits, _, state = model(idx, segment_len=3)
    near(logits, short(idx)[0], 1e-12)
    assert state.segment_len == 3
    more = text(2, 4, seed=2)
    near(model(more, state=state)[0], short(torch.cat([idx, more], dim=1))[0][:, 11:])


@with_memory
def test_bfloat16_autocast_trains_through_segments_with_a_float32_bank(kind):
    model, idx = build(kind, dtype=torch.float32), text(2, 3 * S + 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss, state = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert kind.startswith("rmt") or {bank.dtype for bank in banks(state)} == {torch.float32}
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    near(loss, model(idx[:, :-1], idx[:, 1:])[1], 0.05)


def test_layers_that_multiply_in_bfloat16_leave_the_rest_in_float32_and_train_nearly_as_before():
    model, idx = build(dtype=torch.float32), text(2, 3 * S + 2)
    rounded = copy.deepcopy(model)
    bfloat16_layers(rounded)
    logits, loss, _ = model(idx[:, :-1], idx[:, 1:])
    rounded_logits, rounded_loss, state = rounded(idx[:, :-1], idx[:, 1:])
    assert {x.dtype for x in (rounded_logits, rounded_loss, *banks(state))} == {torch.float32}
    assert not torch.equal(logits, rounded_logits)
    near(rounded_logits, logits, 0.15)
    loss.backward()
    rounded_loss.backward()
    for (name, p), q in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert q.dtype == q.grad.dtype == torch.float32, name
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.98, name
    assert list(rounded.state_dict()) == list(model.state_dict())


# Compiled


@pytest.fixture(scope="module")
def compiled():
    """(a model, the same one compiled), in float32, by aot_eager: it makes graphs and gradients as
    inductor does, but no C++ of them, which would take minutes."""
    model = build(dtype=torch.float32, n_layer=1)
    fast = copy.deepcopy(model)
    counters.clear()
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch(**{limit: 2}):  # fewer than are needed: compile_blocks has to raise it
        compile_blocks(fast, backend="aot_eager")
        yield model, fast
    torch.compiler.reset()


def loss_of(model, segments, length):
    """logits, loss of a document of so many segments of so many tokens"""
    idx, targets = text(2, segments * length), text(2, segments * length, seed=2)
    return model(idx, targets, segment_len=length)[:2]


def near_gradients(loss, other_loss, model, other):
    for value, of in ((loss, model), (other_loss, other)):
        of.zero_grad()
        value.backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        zero = torch.zeros_like(p)
        near(zero if q.grad is None else q.grad, zero if p.grad is None else p.grad, 1e-5)


@pytest.mark.slow
def test_compiled_documents_have_the_losses_and_gradients_of_others_in_whole_graphs(compiled):
    model, fast = compiled
    blocks = [m.layers[0].attention._compiled_call_impl is not None for m in (fast, model)]
    assert blocks == [True, False]
    for segments in (1, 2, 4):
        logits, loss = loss_of(model, segments, S)
        fast_logits, fast_loss = loss_of(fast, segments, S)
        near(fast_logits, logits, 1e-5)
        near(fast_loss, loss, 1e-5)
        near_gradients(loss, fast_loss, model, fast)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 5 and not counters["graph_break"]
    for segments in (3, 7):  # no other graph: the loop over segments is outside
        loss_of(fast, segments, S)[1].backward()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_compiled_and_recomputed_a_document_has_the_same_gradients(compiled):
    model, fast = compiled
    fast.recompute = True
    near_gradients(loss_of(model, 3, S)[1], loss_of(fast, 3, S)[1], model, fast)
    fast.recompute = False


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_model_has_its_names_and_is_recorded_and_generates_as_before(compiled):
    model, fast = compiled
    assert list(fast.state_dict()) == list(model.state_dict())
    idx = text(2, 2 * S + 2)
    with recording(fast) as notes:
        near(fast(idx)[0], model(idx)[0], 1e-5)
    (note,) = notes
    assert note["layer"] == 0 and len(note["R"]) == 2
    prompt = text(2, S + 3)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(fast.generate(prompt, 2 * S), model.generate(prompt, 2 * S))


@pytest.mark.slow
def test_an_evaluation_makes_no_graphs_of_its_own(compiled):
    model, fast = compiled
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for length in (1, 3, 2 * S + 1):
            near(fast(text(3, length))[0], model(text(3, length))[0], 1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
    loss_of(fast, 2, S)[1].backward()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="on a CPU torch.compile needs a C++ compiler, and neither g++ nor clang++ is here",
)
@pytest.mark.slow
def test_compiled_to_machine_code_a_document_has_the_same_logits():
    torch.compiler.reset()
    model = build(dtype=torch.float32, n_layer=1).requires_grad_(False)  # no graphs for gradients
    fast, idx = copy.deepcopy(model), text(2, 2 * S)
    quick = {"compile_threads": 1, "cpp.simdlen": 1}  # no pool of processes, no vectors
    with torch._inductor.config.patch(quick):
        compile_blocks(fast)
        near(fast(idx)[0], model(idx)[0], 1e-5)
    torch.compiler.reset()


# Start, optimiser, presets, files


@pytest.mark.parametrize("n_mem_token", [0, 100])
def test_weights_start_with_the_stated_spread(n_mem_token):
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, n_head=8, n_kv_head=4, n_embd=128, ffn_dim=320, n_layer=4)
    model = build_model(LM2Config(**sizes, n_slot=8, n_mem_head=4, n_mem_token=n_mem_token))
    copier = ["tok_embeddings.weight", "output.weight"]  # see the next test
    copier += [f"layers.{i}.attention.wo.weight" for i in (1, 2, 3)]
    into_stream = ("attention.wo.weight", "feed_forward.w2.weight", "memory.wv.weight")
    for name, p in model.named_parameters():
        if name in copier:
            continue
        if p.ndim == 2:
            std = 1.0 if name == "mem_tokens" else p.shape[1] ** -0.5
            if name.endswith(into_stream):
                std /= math.sqrt(2 * 4)  # L = 4
            assert p.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(p.mean().item()) < 0.04 * std, name
        elif not name.endswith("null"):
            constant = 1.0 if name.endswith(("norm.weight", "w_forget.bias")) else 0.0
            assert (p == constant).all(), name


@pytest.mark.parametrize("n_kv_head", [8, 4, 1])
def test_a_model_starts_as_a_copier(n_kv_head):
    torch.manual_seed(0)
    sizes = dict(vocab_size=2048, n_head=8, n_kv_head=n_kv_head, n_embd=128, n_layer=3)
    model = LM2(LM2Config(**sizes))
    table = model.tok_embeddings.weight.detach()
    shared = table.mean(dim=0)
    assert shared.std().item() == pytest.approx(1, rel=0.2)
    assert (table - shared).std().item() == pytest.approx(1, rel=0.02)
    assert torch.equal(model.output.weight, 0.02 * table)
    # What a head brings of a token points to where the token does, but not in the first block.
    x = torch.randn(100, 128)
    for i, block in enumerate(model.layers):
        width, n_shared = 16, 8 // n_kv_head
        v = block.attention.wv(x).unflatten(-1, (-1, width)).repeat_interleave(n_shared, dim=-2)
        brought = block.attention.wo(v.flatten(-2))
        along = torch.cosine_similarity(x, brought, dim=-1).mean().item()
        assert along > 0.3 if i else abs(along) < 0.1


def test_a_tied_table_starts_as_a_head():
    model = LM2(LM2Config(vocab_size=512, tie_embeddings=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert model.output.weight.std().item() == pytest.approx(0.02 * 2**0.5, rel=0.1)


@pytest.mark.parametrize("kind, tied", [("lm2", True), ("rmt", False)])
@pytest.mark.parametrize("gate_lr", [1.0, 5.0])
def test_every_parameter_is_in_one_optimizer_group_and_only_matrices_decay(kind, tied, gate_lr):
    model = build(kind, tie_embeddings=tied)
    groups = optimizer_groups(model, gate_lr)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    multiple = {id(p): g["multiple"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        is_gate = any(f".memory.{gate}" in name for gate in ("w_in", "w_out", "w_forget", "null"))
        is_faster = is_gate and gate_lr > 1
        has_none = name.endswith(("norm.weight", "bias", "null")) or is_faster
        assert decay[id(p)] == (0.0 if has_none else 0.1), name
        assert multiple[id(p)] == (gate_lr if is_faster else 1.0), name


def test_the_papers_preset_has_the_papers_size():
    with torch.device("meta"):
        model = LM2(LM2Config(**PRESETS["lm2-1.7b"]))
    D, FFN, V, L, HM = 2048, 8192, 128256, 16, 32
    llama = V * D + L * (2 * D * D + 2 * D * D // 4 + 3 * D * FFN + 2 * D) + D
    memory = L * (7 * D * D + 3 * D + 2 * D + HM)
    assert model.n_params() == (llama + memory, memory)
    assert (llama, memory) == (1_235_814_400, 469_926_400)


@pytest.mark.parametrize(
    "name, equals",
    [
        ("cpu", ("rmt", "rmt-projection", "neural", "llama", "full")),
        ("cpu-hours", ("rmt", "llama")),
        ("text", ("rmt", "rmt-projection", "neural", "llama", "full")),
    ],
)
def test_the_presets_to_compare_have_as_many_parameters(name, equals):
    sizes = {}
    for preset in (name, *(f"{name}-{other}" for other in equals)):
        sizes[preset] = build_model(LM2Config(**PRESETS[preset])).n_params()[0]
    assert all(abs(n / sizes[name] - 1) < 0.001 for n in sizes.values()), sizes


@with_memory
@torch.no_grad()
def test_a_model_built_on_the_meta_device_and_filled_later_is_the_same_model(kind):
    cfg = LM2Config(**{**SMALL, **KINDS[kind]})
    with torch.device("meta"):
        model = build_model(cfg)
    assert {t.device.type for t in model.parameters()} == {"meta"}
    model, real = model.to_empty(device="cpu"), build_model(cfg)
    model.load_state_dict(real.state_dict())
    idx = text(1, 2 * S + 1)
    assert torch.equal(model(idx)[0], real(idx)[0])


@with_memory
@torch.no_grad()
def test_a_checkpoint_gives_the_same_model_back(tmp_path, kind):
    tokenizer = load()
    sizes = dict(rope_scaling=LLAMA3, vocab_size=tokenizer.n_vocab)
    model = build(kind, dtype=torch.float32, **sizes)
    path, idx = tmp_path / "model.pt", text(2, 3 * S + 2)
    save_checkpoint(path, model, tokenizer=tokenizer.ranks, step=7)
    again, content = load_checkpoint(path)
    assert type(again) is type(model) and again.cfg == model.cfg and content["step"] == 7
    assert torch.equal(again(idx)[0], model(idx)[0])
    assert of_checkpoint(content, path).ranks == tokenizer.ranks
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


# A user's mistakes


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(n_head=3), "n_head 3 .*n_embd 16"),
        (dict(n_head=16, n_kv_head=16), "n_head 16 .*n_embd 16"),
        (dict(n_kv_head=3), "n_kv_head 3 .*n_head 4"),
        (dict(n_mem_head=3), "n_mem_head 3 .*n_embd 16"),
        (dict(n_slot=17), "n_slot 17 .*n_embd 16"),
        (dict(n_mem_layer=3), "n_mem_layer 3 .*n_layer 2"),
        (dict(n_mem_layer=-1), "n_mem_layer -1"),
        (dict(mem_blocks=(2,)), "mem_blocks 2 names block 2: with n_layer 2 .* 0 to 1, or -1"),
        (dict(mem_blocks=(-3,)), "mem_blocks -3 names block -3"),
        (dict(mem_blocks=(1, -1)), "mem_blocks 1 -1 names a block twice"),
        (dict(mem_blocks=(0, 0)), "mem_blocks 0 0 names a block twice"),
        (dict(mem_blocks=(0, 1), n_mem_layer=1), "n_mem_layer 1 and mem_blocks 0 1 differ"),
        (dict(mem_blocks=(0,), n_mem_token=2), "n_mem_token 2 and n_mem_layer 1"),
        (dict(n_mem_token=-1), "n_mem_token -1"),
        (dict(n_mem_token=2, n_mem_layer=1), "n_mem_token 2 and n_mem_layer 1"),
        (dict(memory_kind="ema"), "no memory_kind ema: choose one of lm2, neural"),
        (dict(mem_projection=True), "mem_projection is for an RMT"),
        (dict(memory_kind="neural", n_mem_layer=0), "memory_kind neural without a block"),
        (dict(rope_theta=0.0), "rope_theta 0.0"),
        (dict(norm_eps=0.0), "norm_eps 0.0"),
        (
            dict(rope_scaling=LLAMA3 | dict(low_freq_factor=4.0)),
            "low_freq_factor 4.0 must be below",
        ),
        *[
            (dict(rope_scaling={k: v for k, v in LLAMA3.items() if k != key}), f"lacks {key}")
            for key in LLAMA3
        ],
        *[({name: 0}, f"{name} is 0") for name in SMALL],
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name_and_value(change, named):
    with pytest.raises(ValueError, match=named):
        LM2Config(**{**SMALL, **change})


def test_without_a_number_of_key_and_value_heads_there_are_as_many_as_heads():
    assert LM2Config(n_head=4).n_kv_head == 4


def test_a_class_refuses_the_sizes_of_the_other():
    with pytest.raises(ValueError, match="n_mem_token 2 makes an RMT"):
        LM2(LM2Config(**SMALL, n_mem_token=2))
    with pytest.raises(ValueError, match="n_mem_token 0"):
        RMT(LM2Config(**SMALL))


def other_model(model, **changes):
    """A model that differs in these sizes."""
    return build_model(replace(model.cfg, n_mem_layer=None, **changes))


def other_state(model, rows=2, **changes):
    """The state of a model that differs in these sizes."""
    return other_model(model, **changes).initial_state(rows)


NO_IDS = torch.zeros(2, 0, dtype=torch.int64)
BAD_CALLS = {
    "float": (lambda m: m(text(2, 4).float()), "float32"),
    "int32": (lambda m: m(text(2, 4).int()), "int32"),
    "one row": (lambda m: m(text(2, 4)[0]), r"\(4,\)"),
    "no token": (lambda m: m(text(2, 0)), r"\(2, 0\)"),
    "no row": (lambda m: m(text(2, S)[:0]), rf"\(0, {S}\)"),
    "targets turned": (lambda m: m(text(2, 4), text(4, 2)), r"\(4, 2\), but must be \(2, 4\)"),
    "at of two dimensions": (lambda m: m(text(2, 4), at=text(2, 2)), r"at must .* \(2, 2\)"),
    "at of floats": (lambda m: m(text(2, 4), at=torch.ones(2)), "at must .*float32"),
    "targets beside at": (
        lambda m: m(text(2, 4), text(2, 4), at=torch.arange(3)),
        r"\(2, 4\), but must be \(3,\)",
    ),
    "segment too long": (lambda m: m(text(2, 4), segment_len=S + 1), f"segment_len {S + 1}"),
    "segment of 0": (lambda m: m(text(2, 4), segment_len=0), "segment_len 0"),
    "read nothing": (lambda m: m.read(text(2, 0)), r"\(2, 0\)"),
    "generate from nothing": (lambda m: m.generate(text(2, 0), 3), r"\(2, 0\)"),
    "generate from a row": (lambda m: m.generate(text(1, 4)[0], 3), r"\(4,\)"),
    "state of another batch": (
        lambda m: m(text(3, 4), state=m(text(2, 4))[2]),
        r"\(2, .*a batch of 3 needs .*\(3, ",
    ),
    "state of segments too long": (
        lambda m: m(text(2, 4), state=other_state(m, segment_len=9)),
        "segments of 9 tokens, but this model allows 5",
    ),
    "another segment_len": (
        lambda m: m(text(2, 4), state=m(text(2, 4))[2], segment_len=3),
        "segment_len 3, but the document has 5",
    ),
    "state of more open ids": (
        lambda m: m(text(2, 4), state=replace(m.initial_state(2), open_ids=text(2, S + 1))),
        f"{S + 1} open ids in 2 rows",
    ),
    "state of fewer rows of ids": (
        lambda m: m(text(2, 4), state=replace(m.initial_state(2), open_ids=text(1, 2))),
        "2 open ids in 1 rows",
    ),
    "read on from another batch": (
        lambda m: m.read(text(3, 1), m.initial_state(2)),
        "a batch of 3 needs",
    ),
    "stream from another batch": (
        lambda m: m.generate(text(3, 1), 1, state=m.initial_state(2)),
        "a batch of 3 needs",
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_a_call_that_cannot_work_is_refused_by_value_in_one_line(kind, call):
    run, named = BAD_CALLS[call]
    with pytest.raises(ValueError, match=named) as error:
        run(build(kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_layer=3),
        dict(mem_blocks=(0,)),
        dict(mem_blocks=(1,)),
        dict(mem_blocks=()),
        dict(n_slot=5),
        dict(n_embd=32),
        dict(mem_blocks=(), n_mem_token=2),
    ],
)
def test_a_state_of_another_model_is_refused(changes):
    model = build()
    with pytest.raises(ValueError, match="the state carries .*, but this model"):
        model(text(2, 4), state=other_state(model, **changes))
    other = other_model(model, **changes)
    with pytest.raises(ValueError, match="the state carries .*, but this model"):
        other(text(2, 4), state=model.initial_state(2))


def test_a_state_is_made_of_its_three_parts():
    state = build().initial_state(2)
    assert isinstance(state, State)
    assert set(vars(state)) == {"carried", "open_ids", "segment_len"}
    assert torch.equal(state.open_ids, NO_IDS)
