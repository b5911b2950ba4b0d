"""LM2, a Llama-style decoder with a gated memory bank in every block (Large Memory Models, arXiv 2502.06049).

    python train.py                    # train the small default model (CPU, minutes), writes out/
    python sample.py --prompt "..."    # read a prompt of any length with it, answer

This file is the whole model; it writes nothing. A document is read one *segment* at a time by an ordinary
Llama whose self-attention sees that segment only. Beside it every block keeps a bank of N memory slots:
tokens READ what earlier segments left, a complete segment WRITES once: a token costs the same at any length.

    code               paper              meaning
    B, T, S, G         -, T, -, -         batch, tokens of input and segment (`segment_len`), whole segments
    D, H, KV, L        d, -, -, -         model width, query heads, key/value heads (GQA), blocks
    N, HM              N, -               memory slots of a block, heads of the memory cross-attention
    E                  E_t                normalised tokens entering the memory module, (B, T, D)
    M                  M_t                the bank of one block, (B, N, D); t counts segments
    wq wk wv           W^Q W^K W^V        cross-attention of tokens and slots, D x D
    w_out w_in w_forget  same             output, input and forget gate, D x D + bias
    w_write            -                  candidate content, D x D: the paper has none
    null               -                  score of "this segment is nothing to this slot", one a head: ours
Where the paper is silent or its shapes do not fit, a comment says `paper silent:` or `differs from paper:`.
"""
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LM2Config:
    vocab_size: int = 2048              # tokens in the vocabulary
    n_layer: int = 4                    # L, blocks
    n_head: int = 8                     # H, query heads of self-attention
    n_kv_head: int = 8                  # KV, key/value heads; fewer than n_head is GQA
    n_embd: int = 64                    # D, model width
    ffn_dim: int = 176                  # inner width of the SwiGLU MLP
    segment_len: int = 128              # S, tokens in a segment: the attention window
    n_slot: int = 16                    # N, memory slots of a block
    n_mem_head: int = 8                 # HM, heads of the memory cross-attention
    n_mem_layer: int | None = None      # first n blocks with memory (paper Fig. 5); None: all, 0: plain Llama
    n_mem_token: int = 0                # K, memory tokens of an RMT (arXiv 2207.06881), which has no banks
    rope_theta: float = 10000.0         # base of the rotary angles
    rope_scaling: dict | None = None    # Llama-3.x: slower long waves; its four keys as in data/recipes.py
    norm_eps: float = 1e-5              # added to the mean square in RMSNorm
    tie_embeddings: bool = False        # output head = token embedding

    @property
    def kind(self) -> str:
        """What it is a model of: "lm2", "rmt" or "llama"."""
        return "lm2" if self.n_mem_layer else "rmt" if self.n_mem_token else "llama"

    def __post_init__(self):
        if self.n_mem_layer is None:
            object.__setattr__(self, "n_mem_layer", 0 if self.n_mem_token else self.n_layer)
        for key in "vocab_size n_layer n_head n_kv_head n_embd ffn_dim segment_len n_slot n_mem_head".split():
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be at least 1")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd} into heads of even "
                             "width (RoPE turns pairs): choose n_embd a multiple of 2 * n_head")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if not 0 <= self.n_mem_layer <= self.n_layer:
            raise ValueError(f"n_mem_layer {self.n_mem_layer} must lie between 0 and n_layer {self.n_layer}")
        if self.n_mem_token < 0 or self.n_mem_token and self.n_mem_layer:
            raise ValueError(f"n_mem_token {self.n_mem_token} must be at least 0, and 0 where n_mem_layer is "
                             f"{self.n_mem_layer}: a model has banks or memory tokens")
        if self.n_mem_layer and self.n_embd % self.n_mem_head:
            raise ValueError(f"n_mem_head {self.n_mem_head} does not divide n_embd {self.n_embd}")
        if self.n_mem_layer and self.n_slot > self.n_embd:
            raise ValueError(f"n_slot {self.n_slot} is more than n_embd {self.n_embd}: the identity has no "
                             "more rows, and slots that start alike stay alike")
        if not (self.rope_theta > 0 < self.norm_eps):
            raise ValueError(f"rope_theta {self.rope_theta} and norm_eps {self.norm_eps} must be above 0")
        want = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        if self.rope_scaling is not None and (missing := want - set(self.rope_scaling)):
            raise ValueError(f"rope_scaling lacks {', '.join(sorted(missing))}")


@dataclass
class BlockState:
    """What one block carries. Of the open (unfinished) segment the first `fill` rows count (RMT: K more)."""
    k: Tensor                   # (B, S, KV, D/H) keys of the open segment, already rotated; RMT: S + 2 K rows
    v: Tensor                   # (B, S, KV, D/H)
    bank: Tensor | None = None  # (B, N, D) its M, or None; differs from paper: t counts segments, not blocks
    bank_k: Tensor | None = None  # (B, N, D) keys and values of M, made when a segment opens token by token
    bank_v: Tensor | None = None  # (B, N, D)
    q: Tensor | None = None     # (B, S, D) queries of the open segment, kept for its write
    c: Tensor | None = None     # (B, S, D) its gated candidates g_in * tanh(E w_write)


@dataclass
class LM2State:
    """All a document leaves behind after any number of tokens: a value of fixed size, passed in and out."""
    blocks: list[BlockState]
    segment_len: int            # S, that of this document
    mem: Tensor | None = None   # (B, K, D) the memory tokens of an RMT that the open segment began with
    fill: int = 0               # tokens in the open segment, 0 <= fill < S
    owned: bool = False         # True: nobody keeps an older state, so the buffers may be overwritten

    def map(self, f: Callable[[Tensor], Tensor]) -> "LM2State":
        """The same state with f of every tensor: cut off from the graph, or some rows of the batch."""
        cut = [BlockState(**{n: t if t is None else f(t) for n, t in vars(b).items()}) for b in self.blocks]
        return LM2State(cut, self.segment_len, self.mem if self.mem is None else f(self.mem), self.fill)

    def detach(self) -> "LM2State":
        """For truncated back-propagation, the caller's decision."""
        return self.map(Tensor.detach)


def rope_frequencies(cfg: LM2Config) -> tuple[float, ...]:
    """The angle a position turns each pair of channels by, D/H/2 of them, Llama-3.x scaling included."""
    width = cfg.n_embd // cfg.n_head
    freq = [cfg.rope_theta ** (-i / width) for i in range(0, width, 2)]
    if s := cfg.rope_scaling:  # long waves are slowed by `factor`, short ones kept, those between blended
        turns = [s["original_max_position_embeddings"] * f / (2 * math.pi) for f in freq]
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = [min(1.0, max(0.0, (t - low) / (high - low))) for t in turns]
        freq = [k * f + (1 - k) * f / s["factor"] for k, f in zip(keep, freq)]
    return tuple(freq)


@lru_cache(maxsize=None)
@torch.inference_mode(False)
def turn_table(freq: tuple[float, ...], length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos and sin of positions 0 .. length of a segment, (length, D/H/2, 2); made once, then read, by CUDA
    graphs where it lies: never thrown away."""
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(freq, dtype=torch.float64)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE, interleaved (Meta): angle i turns pair (2i, 2i+1). x (R, T, heads, width), turn (T, width/2, 2):
    cos and sin. One complex product is one pass over x; the compiler, which has none, fuses the real one."""
    pairs, turn = x.to(turn.dtype).unflatten(-1, (-1, 2)), turn[:, None]
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return pairs.flatten(-2).to(x.dtype)


def store(buffer: Tensor, new: Tensor, fill: int, owned: bool) -> Tensor:
    """`buffer` (B, S, ...) with `new` (B, n, ...) at fill .. fill + n; a copy unless the caller owns it."""
    buffer = buffer if owned else buffer.clone()
    buffer[:, fill:fill + new.shape[1]] = new
    return buffer


class Attention(nn.Module):
    """Causal self-attention inside one segment: RoPE, grouped key/value heads, no biases (Llama 3)."""
    def __init__(self, cfg: LM2Config):
        super().__init__()
        self.n_head, self.n_kv_head, self.width = cfg.n_head, cfg.n_kv_head, cfg.n_embd // cfg.n_head
        self.wq = nn.Linear(cfg.n_embd, cfg.n_head * self.width, bias=False)
        self.wk, self.wv = (nn.Linear(cfg.n_embd, cfg.n_kv_head * self.width, bias=False) for _ in range(2))
        self.wo = nn.Linear(cfg.n_head * self.width, cfg.n_embd, bias=False)

    def forward(self, x: Tensor, turn: Tensor, cache: tuple | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (R, T, D), rows independent -> output (R, T, D) and the keys and values, or with cache = (k, v,
        fill, owned) the buffers with them stored behind the `fill` tokens that the segment already has."""
        R, T, D = x.shape
        q, k, v = (layer(x).unflatten(-1, (-1, self.width)) for layer in (self.wq, self.wk, self.wv))
        q, k = rotate(q, turn), rotate(k, turn)                                 # (R, T, heads, D/H)
        mask, fill, keys, values = None, 0, k, v
        if cache is not None:
            old_k, old_v, fill, owned = cache
            k, v = store(old_k, k, fill, owned), store(old_v, v, fill, owned)
        if fill:  # one token sees all that is there
            keys, values = k[:, :fill + T], v[:, :fill + T]
            mask = torch.ones(T, fill + T, dtype=torch.bool, device=x.device).tril(fill) if T > 1 else None
        q, keys, values = (t.transpose(1, 2).to(q.dtype) for t in (q, keys, values))
        if x.device.type == "cpu" and self.width < 16 and T > 64:  # zeros that make narrow heads faster there
            q, keys, values = (F.pad(t, (0, 16 - self.width)) for t in (q, keys, values))
        y = F.scaled_dot_product_attention(                                     # (R, H, T, D/H)
            q, keys, values, attn_mask=mask, is_causal=fill == 0, scale=self.width ** -0.5,
            enable_gqa=self.n_head != self.n_kv_head)[..., :self.width]
        return self.wo(y.transpose(1, 2).reshape(R, T, D)), k, v


class Memory(nn.Module):
    """The memory of one block (paper section 2): read by cross-attention, gated, written once a segment."""
    def __init__(self, cfg: LM2Config):
        super().__init__()
        D = cfg.n_embd
        self.n_head, self.width = cfg.n_mem_head, D // cfg.n_mem_head
        self.token_norm, self.bank_norm = nn.RMSNorm(D, cfg.norm_eps), nn.RMSNorm(D, cfg.norm_eps)
        self.wq, self.wk, self.wv, self.w_write = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.w_out, self.w_in, self.w_forget = (nn.Linear(D, D, bias=True) for _ in range(3))
        # paper silent: a slot may decline a segment; with S equal scores about 0.4 of it stays unwritten.
        self.null = nn.Parameter(torch.full((cfg.n_mem_head,), math.log(cfg.segment_len) - 0.5))

    def record(self, **seen: Tensor) -> None:
        """Nothing: `recording` in data/heatmaps.py puts a function here that collects weights and gates."""

    def heads(self, x: Tensor) -> Tensor:
        """(R, n, D) -> (R, HM, n, D/HM)"""
        return x.unflatten(-1, (self.n_head, self.width)).transpose(1, 2)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The token side: x (R, T, D) -> queries and gated candidates, each (R, T, D)."""
        E = self.token_norm(x)                    # paper silent: the query is the stream after self-attention
        g_in = torch.sigmoid(self.w_in(E))                                      # Eq. (4), a token, a channel
        self.record(g_in=g_in)
        # differs from paper: tanh(E w_write), not tanh(E_mem), which only tells what slots they read
        return self.wq(E), g_in * torch.tanh(self.w_write(E))

    def read(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Q (R, T, D), K and V (R, N, D) of the bank carried INTO the segment -> E_gated (R, T, D)."""
        scores = self.heads(Q) @ self.heads(K).mT / math.sqrt(self.width)       # Eq. (1)   (R, HM, T, N)
        A = scores.softmax(dim=-1).to(V.dtype)  # differs from paper: no causal mask, slots hold only the past
        E_mem = (A @ self.heads(V)).transpose(1, 2).flatten(-2)                 # (R, T, D)
        g_out = torch.sigmoid(self.w_out(E_mem))                                # Eq. (2)
        self.record(A=A, g_out=g_out)
        return g_out * E_mem                                          # Eq. (3); differs from paper: g_out * M

    def write(self, M: Tensor, K: Tensor, Q: Tensor, c: Tensor) -> Tensor:
        """M and its keys K (B, N, D), queries Q and candidates c (B, S, D) of a whole segment -> next M."""
        scores = self.heads(K) @ self.heads(Q).mT / math.sqrt(self.width)       # (B, HM, N, S)
        null = self.null.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        R = torch.cat((scores, null), dim=-1).softmax(dim=-1, dtype=M.dtype)          # (B, HM, N, S+1)
        # differs from paper: Eq. (6) adds T x d to a bank of N x d; R, the read turned round, maps T to N
        C = (R[..., :-1].to(c.dtype) @ self.heads(c)).transpose(1, 2)           # (B, N, HM, D/HM)
        g_forget = torch.sigmoid(self.w_forget(C.flatten(-2))).view_as(C).to(M.dtype)  # Eq. (5), slot/channel
        w = 1 - R[..., -1:].transpose(1, 2).to(M.dtype)                         # (B, N, HM, 1) share written
        # differs from paper: forgetting in proportion to w, so what no segment concerns is kept exactly
        M = C.to(M.dtype) + (1 - w * (1 - g_forget)) * M.view_as(C)             # Eq. (6)
        self.record(R=R, g_forget=g_forget.flatten(-2))
        return M.flatten(-2)

    def step(self, M: Tensor, Q: Tensor, c: Tensor, write: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One segment: the bank carried into it -> norm(M), K (B, N, D) to read by, and the next bank."""
        g = self.bank_norm.weight.to(M.dtype)       # banks are float32 where the weights are bfloat16
        seen = F.rms_norm(M, g.shape, g, self.bank_norm.eps).to(self.wk.weight.dtype)
        K = self.wk(seen)
        return seen, K, self.write(M, K, Q, c) if write else M


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), (..., D) -> (..., D)."""
    def __init__(self, cfg: LM2Config):
        super().__init__()
        D, inner = cfg.n_embd, cfg.ffn_dim
        self.w1, self.w2, self.w3 = (nn.Linear(*x, bias=False) for x in ((D, inner), (inner, D), (D, inner)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder block: self-attention, memory, MLP, each behind a norm and added to the stream."""
    def __init__(self, cfg: LM2Config, has_memory: bool):
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(cfg.n_embd, cfg.norm_eps) for _ in range(2))
        self.attention, self.feed_forward = Attention(cfg), FeedForward(cfg)
        self.memory = Memory(cfg) if has_memory else None
        self.fast = None        # before, memory.step and after, compiled (data/device.py)

    def before(self, x: Tensor, turn: Tensor, cache: tuple | None) -> tuple:
        """x (R, T, D) -> x after self-attention, its keys and values, the memory's queries and candidates."""
        h, k, v = self.attention(self.attention_norm(x), turn, cache)
        x = x + h
        return x, k, v, *((None, None) if self.memory is None else self.memory.tokens(x))

    def after(self, x: Tensor, Q: Tensor | None, K: Tensor | None, V: Tensor | None) -> Tensor:
        """Read the bank by its keys and values, then the MLP."""
        if self.memory is not None:
            x = x + self.memory.read(Q, K, V)
        return x + self.feed_forward(self.ffn_norm(x))

    def forward(self, x: Tensor, st: BlockState, fill: int, owned: bool, turn: Tensor, write: bool
                ) -> tuple[Tensor, BlockState]:
        """x (B, T, D): either G whole segments (fill 0) or a piece that fits into the open segment. Only the
        slots' update runs segment by segment, all else in large products."""
        (B, T, D), S, mem = x.shape, st.k.shape[1], self.memory
        whole = fill == 0 and T % S == 0
        fast = self.fast and whole and torch.is_grad_enabled()
        before, step, after = self.fast if fast else (self.before, mem and mem.step, self.after)
        x = x.reshape(-1, S if whole else T, D)                                 # (B*G, S, D): a row a segment
        x, k, v, Q, c = before(x, turn, None if whole else (st.k, st.v, fill, owned))
        if mem is None:
            K, V, st = None, None, st if whole else replace(st, k=k, v=v)       # whole ones leave no cache
        elif whole:
            M, seen, keys = st.bank, [], []                                     # norm(M), K: one a segment
            for q, cand in zip(*(t.unflatten(0, (B, -1)).unbind(1) for t in (Q, c))):       # (B, S, D)
                was, key, M = (step if write else mem.step)(M, q, cand, write)
                seen.append(was), keys.append(key)
            K = torch.stack(keys, dim=1).flatten(0, 1)                          # (B*G, N, D)
            V = mem.wv(torch.stack(seen, dim=1).flatten(0, 1))                  # (B*G, N, D)
            st = replace(st, bank=M)
        else:
            if fill == 0:
                seen, key, _ = mem.step(st.bank, Q, c, False)
                st = replace(st, bank_k=key.to(st.k.dtype), bank_v=mem.wv(seen).to(st.k.dtype))
            K, V, q, cand = st.bank_k, st.bank_v, store(st.q, Q, fill, owned), store(st.c, c, fill, owned)
            M = mem.write(st.bank, K, q, cand) if write and fill + T == S else st.bank
            st = replace(st, k=k, v=v, q=q, c=cand, bank=M)
        return after(x, Q, K, V).view(B, T, D), st


class LM2(nn.Module):
    """logits, loss, state = model(idx, targets, state); see `forward`. Parameter names as in Meta's Llama."""
    def __init__(self, cfg: LM2Config):
        super().__init__()
        self.cfg, self.freq = cfg, rope_frequencies(cfg)  # numbers: a buffer would be rounded in .bfloat16()
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg, i < cfg.n_mem_layer) for i in range(cfg.n_layer))
        self.mem_tokens = nn.Parameter(torch.empty(cfg.n_mem_token, cfg.n_embd)) if cfg.n_mem_token else None
        self.norm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.output = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.init_weights()

    @property
    def dtype(self) -> torch.dtype:
        """Of banks, angles and losses: the weights', but at least float32."""
        return torch.promote_types(self.norm.weight.dtype, torch.float32)

    @torch.no_grad()
    def init_weights(self):
        """Normal weights of deviation 1/sqrt(fan-in); what adds to the stream is scaled by 1/sqrt(2 L)."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_stream = name.endswith((".attention.wo.weight", ".w2.weight", ".memory.wv.weight"))
                p.normal_(std=p.shape[1] ** -0.5 * ((2 * self.cfg.n_layer) ** -0.5 if into_stream else 1))
            elif name.endswith("bias"):
                p.fill_(1.0 if "w_forget" in name else 0.0)            # forget gates start open at sigmoid(1)
        self.tok_embeddings.weight.normal_()  # an input of unit size keeps its identity in the first blocks
        if self.mem_tokens is not None:
            self.mem_tokens.normal_()  # of the size of what takes its place, behind the last norm
        self.output.weight.normal_(std=0.02)  # last: a tied table must start as a head

    def initial_state(self, batch: int, segment_len: int | None = None) -> LM2State:
        """The state before any token: empty caches, banks at M_0, rows of the identity, constant, in at least
        float32. Training may shorten `segment_len`; ValueError for one longer than the model's."""
        c, S = self.cfg, self.cfg.segment_len if segment_len is None else segment_len
        if not 1 <= S <= c.segment_len:
            raise ValueError(f"segment_len {S} must lie between 1 and the model's {c.segment_len}")
        new, K = self.norm.weight.new_zeros, c.n_mem_token
        kv = batch, S + 2 * K, c.n_kv_head, c.n_embd // c.n_head
        M = torch.eye(c.n_slot, c.n_embd, dtype=self.dtype, device=self.norm.weight.device)  # M_0 (N, D);
        blocks = [BlockState(k=new(kv), v=new(kv)) if b.memory is None else    # differs from paper: N x d x d
                  BlockState(new(kv), new(kv), M.repeat(batch, 1, 1), *(
                      new(batch, n, c.n_embd) for n in (c.n_slot, c.n_slot, S, S))) for b in self.layers]
        mem = None if self.mem_tokens is None else self.mem_tokens.expand(batch, -1, -1)
        return LM2State(blocks, S, mem)

    def check_state(self, state: LM2State, rows: int, segment_len: int | None) -> None:
        """ValueError for a state of another model, of another batch than `rows`, or of other segments."""
        c, S = self.cfg, state.segment_len
        kv = rows, S + 2 * c.n_mem_token, c.n_kv_head, c.n_embd // c.n_head
        bank = rows, c.n_slot, c.n_embd
        want = [len(self.layers), min(S, c.segment_len), *((kv, b.memory and bank) for b in self.layers)]
        have = [len(state.blocks), S]
        have += [(tuple(b.k.shape), None if b.bank is None else tuple(b.bank.shape)) for b in state.blocks]
        if want != have:
            has, needs = next(pair for pair in zip(have, want) if pair[0] != pair[1])
            raise ValueError(f"the state is not of this model and {rows} rows: {has}, not {needs}")
        if segment_len not in (None, S):
            raise ValueError(f"segment_len {segment_len} with a state of {S}: a document keeps its own")

    def forward(self, idx: Tensor, targets: Tensor | None = None, state: LM2State | None = None, *,
                keep: str | Tensor = "all", segment_len: int | None = None, write: bool = True,
                recompute: bool = False) -> tuple[Tensor, Tensor | None, LM2State]:
        """idx (B, T) int64, B, T >= 1 [, targets (B, T), shifted, -1 = ignored] -> logits, loss, state.
        state        what an earlier call returned for the tokens before these; None starts a document
        keep         "all": logits (B, T, V); "last": (B, 1, V); "targets": (n, V), positions with a target;
                     or the (n,) flat positions (row * T + column) themselves, which spares a GPU a wait
        segment_len  shorter segments than the model's for a document that starts here (the curriculum)
        write        False holds every bank at the value it came in with: the memory switched off
        recompute    activation checkpointing: keep each block's input only, run it again for the gradient
        Raises ValueError for an input of another shape or dtype, or of another batch than the state's."""
        if idx.ndim != 2 or idx.dtype != torch.int64 or idx.numel() < 1:
            raise ValueError(f"idx must be (B, T) int64 with B, T >= 1, not {tuple(idx.shape)} {idx.dtype}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets are {tuple(targets.shape)}, not {tuple(idx.shape)} as idx")
        if not isinstance(keep, Tensor) and keep not in ("all", "last", *["targets"] * (targets is not None)):
            raise ValueError(f"keep is {keep!r}: it must be 'all', 'last' or, with targets, 'targets'")
        state = state or self.initial_state(idx.shape[0], segment_len)  # paper silent: reset a document
        self.check_state(state, idx.shape[0], segment_len)
        S, T, fill, start, out = state.segment_len, idx.shape[1], state.fill, 0, []
        blocks, mem, x = list(state.blocks), state.mem, self.tok_embeddings(idx)            # (B, T, D)
        K = self.cfg.n_mem_token
        turns = turn_table(self.freq, self.cfg.segment_len + 2 * K, self.dtype, x.device)
        run = nn.Module.__call__ if not recompute else partial(  # nothing is random
            checkpoint, use_reentrant=False, preserve_rng_state=False)
        while start < T:  # pieces: the rest of the open segment, all whole segments at once, what is left
            n = min(T - start, S - fill) if fill or K else (T - start) // S * S or T - start
            piece, before, behind = x[:, start:start + n], K * (fill == 0), K * (write and fill + n == S)
            if K:  # an RMT's segment: memory, tokens, and the memory again, which ends up as the next one
                piece = torch.cat((mem[:, :before], piece, mem[:, :behind]), dim=1)
            at = fill + K if fill else 0
            turn = turns[at:at + min(piece.shape[1], S + 2 * K)]     # positions restart in every segment
            for i, block in enumerate(self.layers):
                piece, blocks[i] = run(block, piece, blocks[i], at, state.owned, turn, write)
            out.append(piece[:, before:before + n])
            mem = self.norm(piece[:, -behind:]) if behind else mem
            start, fill = start + n, (fill + n) % S
        x = out[0] if len(out) == 1 else torch.cat(out, dim=1)                  # (B, T, D)
        if keep == "last":
            x, targets = x[:, -1:], None if targets is None else targets[:, -1:]
        elif isinstance(keep, Tensor) or keep != "all":
            keep = keep if isinstance(keep, Tensor) else (targets.flatten() != -1).nonzero()[:, 0]
            x, targets = x.flatten(0, 1)[keep], None if targets is None else targets.flatten()[keep]  # (n, D)
        logits, loss = self.output(self.norm(x)), None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, -2).to(self.dtype), targets.flatten(), ignore_index=-1,
                                   reduction="sum") / (targets != -1).sum().clamp(min=1)
        return logits, loss, LM2State(blocks, S, mem, fill, state.owned)

    @torch.no_grad()
    def read(self, idx: Tensor, state: LM2State | None = None, write: bool = True,
             tokens_a_call: int | None = None) -> tuple[Tensor, LM2State]:
        """Read a document of any length at constant memory, by segments: idx (B, T) -> last logits (B, V)."""
        state = state or self.initial_state(idx.shape[0])
        tokens_a_call = tokens_a_call or (2**25 // self.cfg.n_embd if idx.is_cuda else 4096)  # GPUs want much
        step = max(1, tokens_a_call // (idx.shape[0] * state.segment_len)) * state.segment_len
        for at in range(-state.fill, max(1, idx.shape[-1]), step):  # once at least: it refuses an empty idx
            logits, _, state = self(idx[..., max(0, at):at + step], state=state, keep="last", write=write)
        return logits[:, -1], state

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 0.0,
               generator: torch.Generator | None = None, write: bool = True) -> Iterator[Tensor]:
        """Read idx (B, T), then yield max_new_tokens ids (B,) in turn; temperature 0 takes the likeliest."""
        logits, state = self.read(idx, write=write)
        for i in range(max_new_tokens):
            if temperature > 0:
                p = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).softmax(dim=-1)
                new = torch.multinomial(p, 1, generator=generator)[:, 0]
            else:
                new = logits.argmax(dim=-1)
            yield new
            if i + 1 < max_new_tokens:
                state.owned = True  # made here and seen by nobody else: no copy of the buffers for a token
                logits, state = self.read(new[:, None], state, write)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 0.0,
                 generator: torch.Generator | None = None) -> Tensor:
        """idx (B, T) -> (B, T + max_new_tokens)"""
        new = self.stream(idx, max_new_tokens, temperature, generator)
        return torch.cat([idx, *(ids[:, None] for ids in new)], dim=1)

    def n_params(self) -> tuple[int, int]:
        """(all parameters, those of the memory)"""
        count = {n: p.numel() for n, p in self.named_parameters()}
        return sum(count.values()), sum(k for n, k in count.items() if ".memory." in n or "mem_tokens" in n)

    def optimizer_groups(self, weight_decay: float) -> list[dict]:
        """Matrices decay; norms, biases and the null scores do not."""
        return [dict(params=[p for p in self.parameters() if p.ndim >= 2], weight_decay=weight_decay),
                dict(params=[p for p in self.parameters() if p.ndim < 2], weight_decay=0.0)]
