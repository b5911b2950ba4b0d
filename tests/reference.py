"""LM2 once more, one document in plain loops over tokens, heads and slots: the equations, slowly.

    from reference import document_logits  # used by test_model.py, writes nothing

It shares no code with lm2.py and knows vectors only: no matrix product, no batch, no cache. The
gradients come from autograd. `w` holds the parameters by name, `cfg` is the configuration, `ids` a
list of token ids.
"""

import math

import torch


def times(weight, x):
    """weight (out, in), x (in) -> (out), one row at a time."""
    return torch.stack([(row * x).sum() for row in weight])


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def softmax(scores):
    """A list of numbers -> a list of numbers that sum to one."""
    top = max(s.item() for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [s / total for s in e]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def frequency(cfg, i):
    """The angle by which a position turns the pair (2i, 2i+1); Llama 3's scaling as three cases of
    the wave length."""
    width = cfg.n_embd // cfg.n_head
    f = 1 / cfg.rope_theta ** (2 * i / width)
    if cfg.rope_scaling is None:
        return f
    context = cfg.rope_scaling["original_max_position_embeddings"]
    low = cfg.rope_scaling["low_freq_factor"]
    high = cfg.rope_scaling["high_freq_factor"]
    factor = cfg.rope_scaling["factor"]
    wave = 2 * math.pi / f
    if wave < context / high:
        return f
    if wave > context / low:
        return f / factor
    smooth = (context / wave - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


def turn(cfg, x, position):
    """RoPE on one head's vector: neighbours (2i, 2i+1) are a pair."""
    out = []
    for i in range(len(x) // 2):
        angle = position * frequency(cfg, i)
        a, b = x[2 * i], x[2 * i + 1]
        out.append(a * math.cos(angle) - b * math.sin(angle))
        out.append(a * math.sin(angle) + b * math.cos(angle))
    return torch.stack(out)


def self_attention(w, cfg, at, xs):
    """xs: the vectors of a segment. Query head h uses the key/value head h // (H / KV)."""
    width = cfg.n_embd // cfg.n_head
    share = cfg.n_head // cfg.n_kv_head

    def head(name, x, h):
        rows = w[at + f"attention.{name}.weight"][h * width : (h + 1) * width]
        return times(rows, x)

    queries = []
    keys = []
    values = []
    for position, x in enumerate(xs):
        x = rms_norm(x, w[at + "attention_norm.weight"], cfg.norm_eps)
        queries.append([turn(cfg, head("wq", x, h), position) for h in range(cfg.n_head)])
        keys.append([turn(cfg, head("wk", x, h), position) for h in range(cfg.n_kv_head)])
        values.append([head("wv", x, h) for h in range(cfg.n_kv_head)])
    out = []
    for i in range(len(xs)):
        heads = []
        for h in range(cfg.n_head):
            kv = h // share
            scores = [(queries[i][h] * keys[j][kv]).sum() / math.sqrt(width) for j in range(i + 1)]
            heads.append(sum(a * values[j][kv] for j, a in enumerate(softmax(scores))))
        out.append(times(w[at + "attention.wo.weight"], torch.cat(heads)))
    return out


def memory(w, cfg, at, xs, bank):
    """One segment: what each token reads from `bank`, a list of N vectors, and the bank that the
    segment leaves when it is written."""
    width = cfg.n_embd // cfg.n_mem_head
    cut = [slice(h * width, (h + 1) * width) for h in range(cfg.n_mem_head)]

    def project(name, x):
        return times(w[at + f"memory.{name}.weight"], x)

    def gate(name, x):
        return sigmoid(project(name, x) + w[at + f"memory.{name}.bias"])

    E = [rms_norm(x, w[at + "memory.token_norm.weight"], cfg.norm_eps) for x in xs]
    seen = [rms_norm(m, w[at + "memory.bank_norm.weight"], cfg.norm_eps) for m in bank]
    Q = [project("wq", e) for e in E]
    K = [project("wk", m) for m in seen]
    V = [project("wv", m) for m in seen]

    def score(i, n, h):
        return (Q[i][cut[h]] * K[n][cut[h]]).sum() / math.sqrt(width)

    read = []
    for i in range(len(xs)):
        heads = []
        for h in range(cfg.n_mem_head):
            A = softmax([score(i, n, h) for n in range(cfg.n_slot)])  # Eq. (1)
            heads.append(sum(a * V[n][cut[h]] for n, a in enumerate(A)))
        E_mem = torch.cat(heads)
        read.append(gate("w_out", E_mem) * E_mem)  # Eq. (2), (3)

    candidates = [gate("w_in", e) * torch.tanh(project("w_write", e)) for e in E]  # Eq. (4)
    after = []
    for n in range(cfg.n_slot):
        taken = []
        written = []
        for h in range(cfg.n_mem_head):
            scores = [score(i, n, h) for i in range(len(xs))]
            R = softmax([*scores, w[at + "memory.null"][h]])
            taken.append(sum(R[i] * candidates[i][cut[h]] for i in range(len(xs))))
            written += [1 - R[-1]] * width
        C = torch.cat(taken)
        g_forget = gate("w_forget", C)  # Eq. (5)
        after.append(C + (1 - torch.stack(written) * (1 - g_forget)) * bank[n])  # Eq. (6)
    return read, after


def neural_memory(w, cfg, at, xs, bank):
    """The same for the memory of Titans: `bank` has the maps W of all heads, and their momentum."""
    width = cfg.n_embd // cfg.n_mem_head

    def project(name, x, h):
        return times(w[at + f"memory.{name}.weight"][h * width : (h + 1) * width], x)

    def gate(name, x, h):
        row = w[at + f"memory.{name}.weight"][h]
        return sigmoid((row * x).sum() + w[at + f"memory.{name}.bias"][h])

    def unit(x):
        return x / torch.sqrt((x * x).sum())

    E = [rms_norm(x, w[at + "memory.token_norm.weight"], cfg.norm_eps) for x in xs]
    maps, momenta = bank
    read = []
    for e in E:
        heads = []
        for h in range(cfg.n_mem_head):
            found = times(maps[h], unit(project("wq", e, h)))
            heads.append(rms_norm(found, w[at + "memory.read_norm.weight"], cfg.norm_eps))
        let_through = times(w[at + "memory.w_gate.weight"], e) + w[at + "memory.w_gate.bias"]
        gated = sigmoid(let_through) * torch.cat(heads)
        read.append(times(w[at + "memory.wo.weight"], gated))

    mean = sum(E) / len(E)
    maps_after = []
    momenta_after = []
    for h in range(cfg.n_mem_head):
        rates = [gate("w_rate", e, h) for e in E]
        keys = [unit(project("wk", e, h)) for e in E]
        size = sum(r * key[:, None] * key[None] for r, key in zip(rates, keys, strict=True))
        longest = torch.sqrt((size * size).sum())
        if longest > 1:
            rates = [rate / longest for rate in rates]
        momentum = gate("w_momentum", mean, h) * momenta[h]  # Eq. (14)
        for e, key, rate in zip(E, keys, rates, strict=True):
            error = times(maps[h], key) - project("wv", e, h)
            momentum = momentum - rate * error[:, None] * key[None]  # the gradient of Eq. (12)
        momenta_after.append(momentum)
        maps_after.append((1 - gate("w_decay", mean, h)) * maps[h] + momentum)  # Eq. (13)
    return read, [torch.stack(maps_after), torch.stack(momenta_after)]


def mlp(w, cfg, at, x):
    e = rms_norm(x, w[at + "ffn_norm.weight"], cfg.norm_eps)
    a = times(w[at + "feed_forward.w1.weight"], e)
    b = times(w[at + "feed_forward.w3.weight"], e)
    return times(w[at + "feed_forward.w2.weight"], a * sigmoid(a) * b)


def document_logits(w, cfg, ids):
    """The logits of every token, a list of (V) vectors, and what the last segment found: for each
    block with a memory a bank, a list of tensors, or of an RMT one list of K memory vectors."""
    if cfg.memory_kind == "neural":
        width = cfg.n_embd // cfg.n_mem_head
        nothing = torch.zeros(cfg.n_mem_head, width, width, dtype=torch.float64)
        first_bank = [nothing, nothing]
        read_and_write = neural_memory
    else:
        first_bank = list(torch.eye(cfg.n_embd, dtype=torch.float64)[: cfg.n_slot])
        read_and_write = memory
    banks = [first_bank if layer in cfg.mem_blocks else None for layer in range(cfg.n_layer)]
    tokens = list(w["mem_tokens"]) if cfg.n_mem_token else []  # the memory of an RMT
    segments = [ids[i : i + cfg.segment_len] for i in range(0, len(ids), cfg.segment_len)]
    logits = []
    for g, segment in enumerate(segments):
        is_last = g + 1 == len(segments)  # it is written only when another segment begins
        xs = tokens + [w["tok_embeddings.weight"][t] for t in segment]
        if not is_last:
            xs = xs + tokens
        for layer in range(cfg.n_layer):
            at = f"layers.{layer}."
            xs = [x + h for x, h in zip(xs, self_attention(w, cfg, at, xs), strict=True)]
            if banks[layer] is not None:
                read, after = read_and_write(w, cfg, at, xs, banks[layer])
                xs = [x + r for x, r in zip(xs, read, strict=True)]
                if not is_last:
                    banks[layer] = after
            xs = [x + mlp(w, cfg, at, x) for x in xs]
        xs = [rms_norm(x, w["norm.weight"], cfg.norm_eps) for x in xs]
        head = w.get("output.weight", w["tok_embeddings.weight"])  # a tied model has no own head
        first = len(tokens)
        logits += [times(head, x) for x in xs[first : first + len(segment)]]
        if tokens and not is_last:
            tokens = xs[-len(tokens) :]
            if cfg.mem_projection:
                tokens = [times(w["mem_projection.weight"], x) for x in tokens]
    if tokens:
        return logits, [tokens]
    return logits, [bank for bank in banks if bank is not None]
