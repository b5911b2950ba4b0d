"""The Recurrent Memory Transformer (arXiv 2207.06881), a field of the same model: n_mem_token.

    python -m pytest tests/test_rmt.py -q

That it is causal, and that segments meet in its memory alone, is tested with LM2 in test_model.py.
"""
import pytest
import torch

import reference
from data.recipes import PRESETS
from lm2 import LM2, LM2Config
from test_model import S, build as build_lm2, feed, nbytes, near, near_gradients, tensors, text

K = 2


def build(**changes):
    return build_lm2(n_mem_token=K, **changes)


def near_states(a, b):
    assert a.fill == b.fill and a.segment_len == b.segment_len == S
    near(a.mem, b.mem)
    for x, y in zip(a.blocks, b.blocks):
        near(x.k[:, :a.fill + K], y.k[:, :a.fill + K]) if a.fill else None


@pytest.mark.parametrize("length", [3, 3 * 3, 10])
def test_values_and_gradients_are_those_of_plain_loops(length):
    model = build(vocab_size=11, n_head=2, n_kv_head=1, n_embd=8, ffn_dim=5, segment_len=3)
    ids = [4, 0, 7, 2, 9, 1, 10, 3, 6, 5][:length]
    w = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits, _, state = model(torch.tensor([ids]))
    slow, tokens = reference.document_logits(w, model.cfg, ids)
    slow = torch.stack(slow)
    near(logits[0], slow)
    near(state.mem[0], torch.stack(tokens))
    near_gradients(model, logits[0], slow, w)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, S, S + 2, 3 * S, 3 * S + 2])
def test_whole_by_segments_by_tokens_and_in_any_pieces_it_is_the_same(length):
    model, idx = build(), text(2, length)
    whole, _, end = model(idx)
    for sizes in (S, 1, 2, 4, 2 * S):
        logits, state = feed(model, idx, sizes)
        near(logits, whole)
        near_states(state, end)
    last, state = model.read(idx, tokens_a_call=2 * S)
    near(last, whole[:, -1])
    near_states(state, end)


@torch.no_grad()
def test_every_generated_token_is_the_likeliest_when_the_whole_is_scored_in_one_pass():
    model, idx = build(), text(3, S + 2)
    out = model.generate(idx, 3 * S)
    assert torch.equal(out[:, S + 2:], model(out)[0].argmax(dim=-1)[:, S + 1:-1])


def test_the_state_is_a_value_and_gradients_flow_through_it_until_it_is_detached():
    model, idx = build(), text(2, 2 * S)
    _, _, state = model(idx[:, :S])
    kept = [t.detach().clone() for t in tensors(state)]
    loss = model(idx[:, S:], state=state)[0].square().sum()
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(state)))
    assert torch.autograd.grad(loss, model.mem_tokens)[0].abs().max() > 0
    loss = model(idx[:, S:], state=state.detach())[0].square().sum()
    assert torch.autograd.grad(loss, model.mem_tokens, allow_unused=True)[0] is None
    assert nbytes(state) == nbytes(model(idx)[2]) == nbytes(model.initial_state(2))


def test_recomputing_gives_the_same_gradients():
    model, idx = build(), text(2, 3 * S)
    grads = [torch.autograd.grad(model(idx, recompute=r)[0].square().sum(), list(model.parameters()))
             for r in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("changes", [dict(n_mem_token=-1), dict(n_mem_token=2, n_mem_layer=1)])
def test_banks_and_memory_tokens_exclude_each_other(changes):
    with pytest.raises(ValueError, match=f"n_mem_token {changes['n_mem_token']}"):
        build_lm2(**changes)


def test_it_has_no_banks_and_counts_its_memory_tokens_as_memory():
    model = build()
    assert all(block.memory is None for block in model.layers)
    assert model.n_params()[1] == K * model.cfg.n_embd


@pytest.mark.parametrize("name, equals", [("cpu", ("rmt", "llama", "full")), ("cpu-hours", ("rmt", "llama"))])
def test_the_presets_to_compare_have_as_many_parameters(name, equals):
    sizes = {x: LM2(LM2Config(**PRESETS[x])).n_params()[0] for x in (name, *(f"{name}-{e}" for e in equals))}
    assert all(abs(n / sizes[name] - 1) < 0.001 for n in sizes.values()), sizes
