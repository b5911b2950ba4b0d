"""LM2 once more, one document in plain loops over tokens, heads and slots: slow, written from the equations.

    from reference import document_logits       # used by test_model.py, writes nothing

It shares no code with lm2.py and works on vectors only (no matrix product, no batch, no cache); autograd
gives the gradients as well. `w`: parameters by name, `c`: the configuration, `ids`: a list of token ids.
"""
import math

import torch


def times(weight, x):
    """weight (out, in), x (in) -> (out): one row at a time."""
    return torch.stack([(row * x).sum() for row in weight])


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def softmax(scores):
    """list of scalars -> list of scalars that sum to one"""
    top = max(s.item() for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [s / total for s in e]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def frequency(c, i):
    """Angle per position of the pair (2i, 2i+1); Llama-3 scaling as its three cases of the wave length."""
    width = c.n_embd // c.n_head
    f = 1 / c.rope_theta ** (2 * i / width)
    if c.rope_scaling is None:
        return f
    s = c.rope_scaling
    context, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wave = 2 * math.pi / f
    if wave < context / high:
        return f
    if wave > context / low:
        return f / s["factor"]
    smooth = (context / wave - low) / (high - low)
    return (1 - smooth) * f / s["factor"] + smooth * f


def tables(c):
    """cos[position][pair], sin[position][pair] in double precision"""
    angles = [[p * frequency(c, i) for i in range(c.n_embd // c.n_head // 2)]
              for p in range(c.segment_len + 2 * c.n_mem_token)]
    return ([[math.cos(a) for a in row] for row in angles], [[math.sin(a) for a in row] for row in angles])


def turn(x, cos, sin):
    """RoPE on one head's vector: the pairs are neighbours (2i, 2i+1)."""
    out = []
    for i in range(len(x) // 2):
        a, b = x[2 * i], x[2 * i + 1]
        out += [a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]]
    return torch.stack(out)


def self_attention(w, c, at, xs, cos, sin):
    """xs: the segment's vectors. Query head h uses key/value head h // (H / KV)."""
    width, share = c.n_embd // c.n_head, c.n_head // c.n_kv_head

    def head(name, x, h):
        return times(w[at + f"attention.{name}.weight"][h * width:(h + 1) * width], x)

    queries, keys, values, out = [], [], [], []
    for i, x in enumerate(xs):
        x = rms_norm(x, w[at + "attention_norm.weight"], c.norm_eps)
        queries.append([turn(head("wq", x, h), cos[i], sin[i]) for h in range(c.n_head)])
        keys.append([turn(head("wk", x, h), cos[i], sin[i]) for h in range(c.n_kv_head)])
        values.append([head("wv", x, h) for h in range(c.n_kv_head)])
    for i in range(len(xs)):
        heads = []
        for h in range(c.n_head):
            k, v = [row[h // share] for row in keys], [row[h // share] for row in values]
            weights = softmax([(queries[i][h] * k[j]).sum() / math.sqrt(width) for j in range(i + 1)])
            heads.append(sum(a * v[j] for j, a in enumerate(weights)))
        out.append(times(w[at + "attention.wo.weight"], torch.cat(heads)))
    return out


def memory(w, c, at, xs, bank):
    """One segment: what each token reads from `bank` (a list of N vectors), and the bank that it leaves."""
    D, HM = c.n_embd, c.n_mem_head
    width = D // HM
    cut = [slice(h * width, (h + 1) * width) for h in range(HM)]

    def gate(name, x):
        return sigmoid(times(w[at + f"memory.{name}.weight"], x) + w[at + f"memory.{name}.bias"])

    def project(name, x):
        return times(w[at + f"memory.{name}.weight"], x)

    E = [rms_norm(x, w[at + "memory.token_norm.weight"], c.norm_eps) for x in xs]
    normed = [rms_norm(m, w[at + "memory.bank_norm.weight"], c.norm_eps) for m in bank]
    Q, K = [project("wq", e) for e in E], [project("wk", m) for m in normed]
    V = [project("wv", m) for m in normed]

    def score(i, n, h):
        return (Q[i][cut[h]] * K[n][cut[h]]).sum() / math.sqrt(width)

    read = []
    for i in range(len(xs)):
        E_mem = []
        for h in range(HM):
            A = softmax([score(i, n, h) for n in range(c.n_slot)])  # Eq. (1)
            E_mem.append(sum(a * V[n][cut[h]] for n, a in enumerate(A)))
        E_mem = torch.cat(E_mem)
        read.append(gate("w_out", E_mem) * E_mem)  # Eq. (2), (3)

    candidate = [gate("w_in", e) * torch.tanh(project("w_write", e)) for e in E]  # Eq. (4)
    after = []
    for n in range(c.n_slot):
        C, wrote = [], []
        for h in range(HM):
            R = softmax([score(i, n, h) for i in range(len(xs))] + [w[at + "memory.null"][h]])
            C.append(sum(R[i] * candidate[i][cut[h]] for i in range(len(xs))))
            wrote += [1 - R[-1]] * width
        C, wrote = torch.cat(C), torch.stack(wrote)
        g_forget = gate("w_forget", C)  # Eq. (5)
        after.append(C + (1 - wrote * (1 - g_forget)) * bank[n])  # Eq. (6)
    return read, after


def document_logits(w, c, ids, rope=None):
    """Logits of every token, a list of (V) vectors, and the banks left behind, N vectors a block with memory;
    of an RMT its K memory vectors.

    rope: (cos, sin) for the positions of one segment; None computes them here in double precision.
    """
    cos, sin = rope or tables(c)
    one_hot = torch.eye(c.n_embd, dtype=torch.float64)
    banks = [[one_hot[n] for n in range(c.n_slot)] for _ in range(c.n_mem_layer)]
    K, tokens = c.n_mem_token, list(w["mem_tokens"]) if c.n_mem_token else []      # an RMT's memory
    logits = []
    for start in range(0, len(ids), c.segment_len):
        segment = ids[start:start + c.segment_len]
        xs = tokens + [w["tok_embeddings.weight"][t] for t in segment]
        xs += tokens if len(segment) == c.segment_len else []
        for layer in range(c.n_layer):
            at = f"layers.{layer}."
            xs = [x + h for x, h in zip(xs, self_attention(w, c, at, xs, cos, sin))]
            if layer < c.n_mem_layer:
                read, after = memory(w, c, at, xs, banks[layer])
                xs = [x + r for x, r in zip(xs, read)]
                if len(segment) == c.segment_len:                       # an unfinished segment never writes
                    banks[layer] = after
            for i, x in enumerate(xs):
                e = rms_norm(x, w[at + "ffn_norm.weight"], c.norm_eps)
                a, b = times(w[at + "feed_forward.w1.weight"], e), times(w[at + "feed_forward.w3.weight"], e)
                xs[i] = x + times(w[at + "feed_forward.w2.weight"], a * sigmoid(a) * b)
        head = w.get("output.weight", w["tok_embeddings.weight"])       # absent when tied
        xs = [rms_norm(x, w["norm.weight"], c.norm_eps) for x in xs]
        logits += [times(head, x) for x in xs[K:K + len(segment)]]
        tokens = xs[-K:] if K and len(segment) == c.segment_len else tokens
    return logits, tokens if K else banks
