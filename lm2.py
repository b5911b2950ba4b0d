"""LM2: a Llama whose blocks have a gated memory (Large Memory Models, arXiv 2502.06049).

    python train.py                    # train the small default model (CPU, minutes), writes out/
    python sample.py --prompt "..."    # let it read a prompt of any length and answer

A document is cut into *segments* of S tokens. Self-attention never crosses a segment's border. What
came before lives in a bank of N slots, and each block that has a memory has a bank of its own. The
tokens of a segment READ the bank that they find. When the next segment begins, the tokens of the
full one WRITE to the bank, once. So the cost of a token does not grow with the document.

The latest segment of a document is the *open* one: even when it is full, its tokens have not
written to the banks yet. Writing so late has three merits. The last segment of a document costs no
write. Padding after it cannot reach a bank. And a document may be read in one call or in many. A
new document begins with new banks. Gradients flow through all its segments.

    B, T          documents of a batch, tokens of a call
    G, S          segments of a call, tokens of a segment (`segment_len`)
    D, L, n       model width, blocks, any number of tokens
    H, KV         query heads, key/value heads of self-attention
    N, HM         memory slots of a block, heads of the memory's cross-attention
    M             the bank of one block, (B, N, D): the paper's M_t
    E             the normalised residual stream that enters a memory, (B, G, S, D): the paper's E_t
    Q, K, V       of a memory: queries of tokens, keys and values of slots (self-attention: q, k, v)
    A             how much each token reads from each slot, (B, G, HM, S, N)
    E_mem         what the tokens read, (B, G, S, D); E_gated is what the gate g_out lets through
    candidates    what each token offers to the slots, (B, G-1, HM, S, D/HM)
    null          a pretended token that offers nothing, with a learned score for each head: ours
    R             how much each slot takes from each token and from the null, (B, HM, N, S+1)
    C             what the slots take from the candidates of one segment, (B, N, D)
    g_out, g_in, g_forget    the paper's gates of output, input and forgetting

Where the paper is silent or its shapes do not fit, a comment begins with `paper silent:` or
`differs from paper:`. `RMT`, the baseline with memory tokens, shares all parts but the memory.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed


@dataclass
class LM2Config:
    """The sizes of a model. Raises ValueError for sizes that do not fit each other.

    The default run of train.py has other sizes than these defaults: see data/recipes.py."""

    vocab_size: int = 2048  # tokens in the vocabulary
    n_layer: int = 4  # L, decoder blocks
    n_head: int = 8  # H, query heads of self-attention
    n_kv_head: int | None = None  # KV, key/value heads: fewer are grouped-query; None: n_head
    n_embd: int = 64  # D, model width
    ffn_dim: int = 176  # inner width of the SwiGLU MLP
    segment_len: int = 128  # S, tokens in a segment, which are all that self-attention sees
    n_slot: int = 16  # N, memory slots of a block
    n_mem_head: int = 8  # HM, heads of the memory's cross-attention
    # One of these two says which blocks have a memory. If neither is set, all blocks have one, or
    # none in an RMT.
    n_mem_layer: int | None = None  # so many blocks, from the first on
    mem_blocks: tuple[int, ...] | None = None  # their numbers: 0 is the first, -1 the last, () none
    memory_kind: str = "lm2"  # the memory of these blocks, a name in MEMORIES
    n_mem_token: int = 0  # memory tokens of an RMT (arXiv 2207.06881), which has no banks
    mem_projection: bool = False  # of an RMT: what is carried goes through a matrix
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_scaling: dict | None = None  # as in Llama 3.1, with the four keys of its config
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = False  # the output head is the token embedding

    @property
    def kind(self) -> str:
        """What these sizes describe: "rmt", "llama", or "lm2" for banks of any `memory_kind`."""
        if self.n_mem_layer:
            return "lm2"
        return "rmt" if self.n_mem_token else "llama"

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        sizes = "vocab_size n_layer n_head n_kv_head n_embd ffn_dim segment_len n_slot n_mem_head"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.mem_blocks is not None:
            self.sort_mem_blocks()
            self.n_mem_layer = len(self.mem_blocks)
        if self.n_mem_layer is None:
            self.n_mem_layer = 0 if self.n_mem_token else self.n_layer
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_head {self.n_head} does not divide n_embd {self.n_embd} into heads of even "
                "width (RoPE turns pairs of channels): choose n_embd a multiple of 2 * n_head"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if not 0 <= self.n_mem_layer <= self.n_layer:
            raise ValueError(
                f"n_mem_layer {self.n_mem_layer} must lie between 0 and n_layer {self.n_layer}"
            )
        if self.mem_blocks is None:
            self.mem_blocks = tuple(range(self.n_mem_layer))
        if self.n_mem_token < 0:
            raise ValueError(f"n_mem_token {self.n_mem_token} must be at least 0")
        if self.n_mem_token and self.n_mem_layer:
            raise ValueError(
                f"n_mem_token {self.n_mem_token} and n_mem_layer {self.n_mem_layer}: "
                "a model has memory tokens or banks, set one of the two to 0"
            )
        if self.n_mem_layer and self.n_embd % self.n_mem_head:
            raise ValueError(f"n_mem_head {self.n_mem_head} does not divide n_embd {self.n_embd}")
        if self.memory_kind not in MEMORIES:
            raise ValueError(
                f"there is no memory_kind {self.memory_kind}: choose one of {', '.join(MEMORIES)}"
            )
        if self.memory_kind != "lm2" and not self.n_mem_layer:
            raise ValueError(
                f"memory_kind {self.memory_kind} without a block that has a memory: name the "
                "blocks with mem_blocks, or leave memory_kind out"
            )
        if self.mem_projection and not self.n_mem_token:
            raise ValueError("mem_projection is for an RMT: set n_mem_token, or leave it out")
        has_slots = self.n_mem_layer and self.memory_kind == "lm2"
        if has_slots and self.n_slot > self.n_embd:
            raise ValueError(
                f"n_slot {self.n_slot} is more than n_embd {self.n_embd}: slots start as rows of "
                "the identity, and slots that start alike stay alike"
            )
        if not 0 < self.rope_theta < 1e300 or not 0 < self.norm_eps < 1:
            raise ValueError(
                f"rope_theta {self.rope_theta} must be above 0, and norm_eps {self.norm_eps} "
                "between 0 and 1"
            )
        if self.rope_scaling is not None:
            needed = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
            for name in needed.split():
                if name not in self.rope_scaling:
                    raise ValueError(f"rope_scaling lacks {name}: it needs {needed}")
            low = self.rope_scaling["low_freq_factor"]
            high = self.rope_scaling["high_freq_factor"]
            if not self.rope_scaling["factor"] > 0:
                raise ValueError(f"rope_scaling: factor {self.rope_scaling['factor']} must be > 0")
            if not low < high:
                raise ValueError(
                    f"rope_scaling: low_freq_factor {low} must be below high_freq_factor {high}"
                )

    def sort_mem_blocks(self) -> None:
        """Replace mem_blocks by its sorted numbers, counted from 0.

        ValueError if a block is named twice, if a block does not exist, or if n_mem_layer is set to
        another number than that of the blocks."""
        given = " ".join(str(i) for i in self.mem_blocks)
        blocks = []
        for i in self.mem_blocks:
            if not -self.n_layer <= i < self.n_layer:
                raise ValueError(
                    f"mem_blocks {given} names block {i}: with n_layer {self.n_layer} give "
                    f"numbers from 0 to {self.n_layer - 1}, or -1 for the last"
                )
            blocks.append(i % self.n_layer)
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"mem_blocks {given} names a block twice")
        if self.n_mem_layer not in (None, len(blocks)):
            raise ValueError(
                f"n_mem_layer {self.n_mem_layer} and mem_blocks {given} differ: set one of the two"
            )
        self.mem_blocks = tuple(sorted(blocks))


@dataclass
class State:
    """What has to be kept between two calls on one document: a value that comes out of a call and
    goes into the next one. Its size does not grow with the document.

    Its tensors are never changed in place, so one state can be continued many times."""

    # What the open segment finds. For LM2: the bank of each block, (B, *bank_shape), None for one
    # without a memory. For RMT: a list of one tensor, its memory tokens (B, n_mem_token, D).
    # differs from paper: each block keeps a bank of its own; t in M_t counts segments, not blocks
    carried: list[Tensor | None]
    # The ids of the open segment, (B, n_open): none in a new state, later 1 to S. The next call of
    # `forward` runs these again, and then its own. If the segment has no room for all of them, it
    # is filled and then written.
    open_ids: Tensor
    segment_len: int  # S of this document

    def map(self, f: Callable[[Tensor], Tensor]) -> "State":
        """A new state with f of every tensor, to pick rows of the batch or to change the device."""
        carried = [None if tensor is None else f(tensor) for tensor in self.carried]
        return State(carried, f(self.open_ids), self.segment_len)

    def detach(self) -> "State":
        """The state cut off from the graph: back-propagation ends here."""
        return self.map(Tensor.detach)


def rope_frequencies(cfg: LM2Config) -> tuple[float, ...]:
    """The angle by which a position turns each of the D/H/2 pairs of channels.

    With `rope_scaling`, as in Llama 3.1: pairs that turn often within the original context keep
    their frequency, pairs that turn seldom are slowed down by `factor`, and those in between are
    blended."""
    width = cfg.n_embd // cfg.n_head
    frequencies = [cfg.rope_theta ** (-channel / width) for channel in range(0, width, 2)]
    if cfg.rope_scaling is None:
        return tuple(frequencies)
    low = cfg.rope_scaling["low_freq_factor"]
    high = cfg.rope_scaling["high_freq_factor"]
    scaled = []
    for frequency in frequencies:
        turns = cfg.rope_scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        slowed = frequency / cfg.rope_scaling["factor"]
        scaled.append(kept * frequency + (1 - kept) * slowed)
    return tuple(scaled)


@functools.cache
@torch.inference_mode(False)  # autograd would refuse a table that was made in inference mode
def rotary_table(
    frequencies: tuple[float, ...], length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin) for each pair of channels at the positions 0 .. length - 1 of a
    segment: two tensors of (length, D/H), as `rotate` takes them.

    A table is never freed, as a recorded CUDA graph of a training step reads it where it lies."""
    frequency = torch.tensor(frequencies, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    cos = torch.stack((angle.cos(), angle.cos()), dim=-1).flatten(-2)
    signed_sin = torch.stack((-angle.sin(), angle.sin()), dim=-1).flatten(-2)
    return cos.to(device, dtype), signed_sin.to(device, dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x (..., n, D/H). Neighbouring channels are a pair (a, b), as in Meta's Llama, and
    become (a cos - b sin, b cos + a sin)."""
    cos, signed_sin = rope  # (n, D/H)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (..., n, D/H), (b, a) for (a, b)
    return (x * cos + swapped * signed_sin).to(x.dtype)


@dataclass
class Cache:
    """What `stream` keeps for one block, so as not to run the open segment for each token."""

    # k and v of the open segment's tokens so far, (B, KV, n, D/H) each; None before the first.
    self_kv: tuple[Tensor, Tensor] | None
    # What `prepare` of the block's memory has made of the bank; None for a block without a memory.
    prepared: Tensor | tuple[Tensor, Tensor] | None


class Attention(nn.Module):
    """Causal self-attention inside a segment, as in Llama 3: RoPE, grouped heads, no biases."""

    def __init__(self, cfg: LM2Config):
        super().__init__()
        self.width = cfg.n_embd // cfg.n_head
        self.grouped = cfg.n_kv_head != cfg.n_head
        self.wq = nn.Linear(cfg.n_embd, cfg.n_head * self.width, bias=False)
        self.wk = nn.Linear(cfg.n_embd, cfg.n_kv_head * self.width, bias=False)
        self.wv = nn.Linear(cfg.n_embd, cfg.n_kv_head * self.width, bias=False)
        self.wo = nn.Linear(cfg.n_head * self.width, cfg.n_embd, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(rows, n, heads * D/H) -> (rows, heads, n, D/H)"""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (B*G, S, D), segments that do not see each other -> (B*G, S, D)."""
        q, k, v = self.project(x, rope)
        return self.attend(q, k, v, causal=True)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (rows, n, D) -> q (rows, H, n, D/H), k and v (rows, KV, n, D/H)."""
        q = rotate(self.heads(self.wq(x)), rope)
        k = rotate(self.heads(self.wk(x)), rope)
        v = self.heads(self.wv(x))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """q (rows, H, n, D/H), k and v (rows, KV, m, D/H) of all m tokens that may be seen ->
        (rows, n, D)."""
        width = self.width
        if width < 16 and q.shape[2] > 64 and q.device.type == "cpu":
            # On a CPU so narrow heads are faster with zeros added: a step takes 14 % less time.
            q = F.pad(q, (0, 16 - width))
            k = F.pad(k, (0, 16 - width))
            v = F.pad(v, (0, 16 - width))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=self.grouped, scale=width**-0.5
        )
        return self.wo(y[..., :width].transpose(1, 2).flatten(-2))

    def undo_values(self, scale: float) -> None:
        """Set wo to the transpose of wv, times a scale.

        A random wv keeps lengths and angles roughly. So wo(wv(x)) is scale * x and noise of about
        the same size, more where there are fewer value heads than query heads."""
        n_shared = self.wq.out_features // self.wv.out_features  # query heads to a value head
        by_head = self.wv.weight.unflatten(0, (-1, self.width)).repeat_interleave(n_shared, dim=0)
        self.wo.weight.copy_(scale * by_head.flatten(0, 1).T)  # (D, D)

    def next_tokens(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        """x (B, n, D) -> (B, n, D). Adds the k and v of x to the cache. If the cache is empty, x is
        all of the open segment; otherwise it is the one token after those in the cache."""
        q, k, v = self.project(x, rope)
        is_first = cache.self_kv is None
        if not is_first:
            assert x.shape[1] == 1, "the causal mask has no offset"
            earlier_k, earlier_v = cache.self_kv
            k = torch.cat((earlier_k, k), dim=2)
            v = torch.cat((earlier_v, v), dim=2)
        cache.self_kv = (k, v)
        return self.attend(q, k, v, causal=is_first)


class BlockMemory(nn.Module):
    """What every kind of memory is. A kind inherits this class, takes the sizes in `__init__(cfg)`,
    and has these four:

        bank_shape                the shape of the bank of one document
        first_bank()              the bank with which a document begins, of that shape
        read_segments(x, banks)   tokens x (B, G, S, D) and the bank that each segment finds,
                                  (B, G, *bank_shape) -> what is added to x
        write_segment(x, M)       the tokens x (B, S, D) of a full segment and the bank M that it
                                  finds, (B, *bank_shape) -> the bank that the next segment finds

    x is the residual stream after self-attention, as it is: most kinds take its norm first. The
    dtype of M is at least float32.

    There are two rules. In read_segments, the result of a token depends on that token and on the
    bank alone, because generation gives one token at a time. And write_segment returns a new bank
    and never changes M in place, because a state may be continued twice.

    The matrix whose result is added to x is called `wo`, or `into_stream` names it: it starts
    small. All parameters start as `Decoder.init_weights` tells.

    `forward`, `prepare` and `next_tokens` call read_segments and write_segment. A kind that
    overrides all three, as Memory does, needs neither of the two."""

    bank_shape: tuple[int, ...]
    into_stream: tuple[str, ...] = ("wo",)  # with zeros in these, the memory adds nothing
    gates: tuple[str, ...] = ()  # the parameters that --gate_lr of train.py is for
    parts: tuple[str, ...] = ("read_segments", "write_segment")  # what --compile compiles

    def forward(self, x: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, G, S, D) and the bank M that the first segment finds -> what is added to x, and the
        bank that the last segment finds. The last segment stays open: it does not write."""
        banks = [M]
        for full_segment in x[:, :-1].unbind(1):
            M = self.write_segment(full_segment, M).to(M.dtype)
            banks.append(M)
        return self.read_segments(x, torch.stack(banks, dim=1)), M

    def prepare(self, M: Tensor):
        """What `next_tokens` needs of the bank M. It is made once for all tokens of a segment."""
        return M

    def next_tokens(self, x: Tensor, prepared) -> Tensor:
        """Tokens x (B, n, D) of the open segment -> what is added to them."""
        return self.read_segments(x[:, None], prepared[:, None])[:, 0]

    def start(self, shared: Tensor) -> None:
        """Set the parameters that shall not start as `Decoder.init_weights` tells.

        shared  one random vector (D) that is part of every embedding, see `start_as_a_copier`"""

    def heads(self, x: Tensor) -> Tensor:
        """For a kind that has heads, n_head of them: (..., n, D) -> (..., HM, n, D/HM)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(-3, -2)

    def merge(self, x: Tensor) -> Tensor:
        """The other way: (..., HM, n, D/HM) -> (..., n, D)"""
        return x.transpose(-3, -2).flatten(-2)


class Memory(BlockMemory):
    """LM2's memory (paper, section 2): tokens read its slots, segments write them."""

    into_stream = ("wv",)  # E_gated is a mixture of its results, times a gate
    gates = ("w_in", "w_out", "w_forget", "null")
    parts = ("queries", "candidates", "write", "keys_and_values", "read")

    def __init__(self, cfg: LM2Config):
        super().__init__()
        D = cfg.n_embd
        self.n_head = cfg.n_mem_head
        self.bank_shape = (cfg.n_slot, D)
        self.token_norm = nn.RMSNorm(D, cfg.norm_eps)
        self.bank_norm = nn.RMSNorm(D, cfg.norm_eps)
        self.wq = nn.Linear(D, D, bias=False)  # W^Q in the paper
        self.wk = nn.Linear(D, D, bias=False)
        self.wv = nn.Linear(D, D, bias=False)
        self.w_write = nn.Linear(D, D, bias=False)  # ours
        self.w_out = nn.Linear(D, D)
        self.w_in = nn.Linear(D, D)
        self.w_forget = nn.Linear(D, D)
        # paper silent: a slot may decline a segment, by giving its weight to the null. At the start
        # the null gets 0.38 of the weight where all tokens of a segment score 0, whatever the
        # model's segment_len is. In shorter segments it gets more.
        self.null = nn.Parameter(torch.full((cfg.n_mem_head,), math.log(cfg.segment_len) - 0.5))

    def start(self, shared: Tensor) -> None:
        """A forget gate starts near sigmoid(1) = 0.73: it keeps most."""
        self.w_forget.bias.fill_(1.0)

    def first_bank(self) -> Tensor:
        """M_0 (N, D): rows of the identity, a constant."""
        # differs from paper: N x D, where the paper has N x d x d
        return torch.eye(*self.bank_shape)

    def forward(self, x: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, G, S, D) and the bank M (B, N, D) that the first segment finds -> E_gated
        (B, G, S, D), to be added to x, and the bank that the last segment finds, (B, N, D)."""
        E = self.token_norm(x)  # paper silent: E is the residual stream after self-attention
        Q = self.queries(E)  # (B, G, HM, S, D/HM)
        # The last segment stays open. With G = 1 nothing is written.
        candidates = self.candidates(E[:, :-1])  # (B, G-1, HM, S, D/HM)
        banks = [M]  # the bank that each segment finds
        # Only this loop is sequential. All else handles G segments at once.
        full_segments = zip(Q[:, :-1].unbind(1), candidates.unbind(1), strict=True)
        for Q_of_one, candidates_of_one in full_segments:
            M = self.write(M, Q_of_one, candidates_of_one)
            banks.append(M)
        K, V = self.keys_and_values(torch.stack(banks, dim=1))  # (B, G, HM, N, D/HM) each
        return self.read(Q, K, V), M

    def queries(self, E: Tensor) -> Tensor:
        """E (..., S, D) -> Q (..., HM, S, D/HM). The same Q serves both ways: tokens choose slots
        to read, and slots choose tokens to take from."""
        return self.heads(self.wq(E))

    def candidates(self, E: Tensor) -> Tensor:
        """What each token offers to the slots: E (..., S, D) -> (..., HM, S, D/HM)."""
        g_in = torch.sigmoid(self.w_in(E))  # Eq. (4)  (..., S, D)
        self.record(g_in=g_in)
        # differs from paper: it writes tanh(E_mem). But E_mem is a mixture of what the slots hold
        # already; all that it says about a token is which slots the token has read.
        return self.heads(g_in * torch.tanh(self.w_write(E)))

    def write(self, M: Tensor, Q: Tensor, candidates: Tensor) -> Tensor:
        """M (B, N, D), Q and candidates of one segment (B, HM, S, D/HM) -> the next M (B, N, D)."""
        K = self.heads(self.wk(self.normed(M)))  # (B, HM, N, D/HM)
        scores = K @ Q.mT / math.sqrt(Q.shape[-1])  # (B, HM, N, S): the read's, transposed
        null = self.null[:, None, None].expand(*scores.shape[:-1], 1)  # (B, HM, N, 1)
        # differs from paper: Eqs. (5), (6) have tokens (T x d) where the bank has slots (N x d). R
        # pools the S tokens of a segment into N slots, and both equations take the result, C. It is
        # a softmax over tokens and the null, where the read has one over slots.
        R = torch.cat((scores, null), dim=-1).softmax(dim=-1, dtype=M.dtype)  # (B, HM, N, S+1)
        taken = R[..., :-1].to(candidates.dtype) @ candidates  # (B, HM, N, D/HM)
        share = 1 - R[..., -1:]  # (B, HM, N, 1): the weight of all tokens together
        C = self.merge(taken)  # (B, N, D)
        w = self.merge(share.expand_as(taken))  # (B, N, D), the same for all channels of a head
        g_forget = torch.sigmoid(self.w_forget(C))  # Eq. (5)  (B, N, D), where 1 is to keep
        self.record(R=R, g_forget=g_forget)
        # differs from paper: a slot forgets in proportion to w, and nothing where w is 0
        return C + (1 - w * (1 - g_forget)) * M  # Eq. (6)  (B, N, D)

    def keys_and_values(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """M (..., N, D) -> K and V (..., HM, N, D/HM)."""
        normed = self.normed(M)
        return self.heads(self.wk(normed)), self.heads(self.wv(normed))

    def normed(self, M: Tensor) -> Tensor:
        """The bank, normalised, in the dtype of the weights; M itself is at least float32."""
        return self.bank_norm(M.to(self.bank_norm.weight.dtype))

    def read(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Q (..., HM, S, D/HM), K and V (..., HM, N, D/HM) -> E_gated (..., S, D)."""
        # differs from paper: no causal mask is needed, as slots hold earlier segments only
        scores = Q @ K.mT / math.sqrt(Q.shape[-1])  # (..., HM, S, N)
        A = scores.softmax(dim=-1).to(V.dtype)  # Eq. (1)  over slots (float32 under autocast)
        E_mem = self.merge(A @ V)  # (..., S, D)
        g_out = torch.sigmoid(self.w_out(E_mem))  # Eq. (2)  (..., S, D)
        self.record(A=A, g_out=g_out)
        # differs from paper: its g_out * M multiplies T x d by N x d
        return g_out * E_mem  # Eq. (3)  (..., S, D)

    def prepare(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """M (B, N, D) -> K and V (B, HM, N, D/HM)."""
        return self.keys_and_values(M)

    def next_tokens(self, x: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, n, D), tokens of the open segment -> E_gated (B, n, D). Nothing is written here."""
        K, V = prepared
        return self.read(self.queries(self.token_norm(x)), K, V)

    def record(self, **weights_and_gates: Tensor) -> None:
        """Does nothing. A plotting tool replaces it, to collect these weights and gates."""


class NeuralMemory(BlockMemory):
    """The long-term memory of Titans (arXiv 2501.00663, section 3). It learns while it reads.

    Each head has a matrix W that maps a token's key to its value. W is no parameter: it is part of
    the bank, and it is 0 where a document begins. Training learns what makes keys, values, queries
    and steps. A token with the query q reads W q.

    The loss of a token is |W k - v|^2 / 2. A full segment makes one step of gradient descent on the
    sum of these losses, each times the rate of its token, with momentum and forgetting (g_decay):

        step     = sum over tokens of rate * (W k - v) k^T, with the W that the segment finds
        momentum = g_momentum * momentum - step              Eq. (14), the paper's S_t
        W        = (1 - g_decay) * W + momentum              Eq. (13)

    Two rules are close relatives. Both have no momentum and forget nothing:

        delta rule        W + rate * (v - W k) k^T    this class, in segments of one token
        linear attention  W + rate * v k^T            nothing is corrected, as W k is left out

    Where W is 0, the two do the same."""

    gates = ("w_rate", "w_momentum", "w_decay", "w_gate")
    parts = ("step_inputs", "update", "read_segments")

    def __init__(self, cfg: LM2Config):
        super().__init__()
        D = cfg.n_embd
        self.n_head = cfg.n_mem_head
        width = D // self.n_head
        self.bank_shape = (2, self.n_head, width, width)  # W and its momentum
        self.token_norm = nn.RMSNorm(D, cfg.norm_eps)
        self.read_norm = nn.RMSNorm(width, cfg.norm_eps)
        self.wq = nn.Linear(D, D, bias=False)
        self.wk = nn.Linear(D, D, bias=False)
        self.wv = nn.Linear(D, D, bias=False)
        self.wo = nn.Linear(D, D, bias=False)
        self.w_gate = nn.Linear(D, D)
        self.w_rate = nn.Linear(D, self.n_head)
        self.w_momentum = nn.Linear(D, self.n_head)
        self.w_decay = nn.Linear(D, self.n_head)
        self.segment_len = cfg.segment_len

    def start(self, shared: Tensor) -> None:
        """Set where the gates start. Keys, values and queries start without what all embeddings
        share, because otherwise all keys would have nearly the same direction."""
        # paper silent: where the gates start. A token's rate starts near 1/S, so that the rates of
        # a segment add up to about 1. Momentum starts near 0.12 and forgetting near 0.02.
        self.w_rate.bias.fill_(-math.log(self.segment_len))
        self.w_momentum.bias.fill_(-2.0)
        self.w_decay.bias.fill_(-4.0)
        direction = shared / shared.norm()
        for matrix in (self.wq.weight, self.wk.weight, self.wv.weight):
            matrix.sub_(torch.outer(matrix @ direction, direction))

    def first_bank(self) -> Tensor:
        """Zeros: nothing is known, and nothing moves."""
        return torch.zeros(self.bank_shape)

    def forward(self, x: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        """As in BlockMemory. Keys, values and gates of all segments are made at once, and then one
        step after the other."""
        inputs = self.step_inputs(self.token_norm(x[:, :-1]))
        banks = [M]
        for g in range(x.shape[1] - 1):
            of_segment = [part[:, g] for part in inputs]
            M = self.update(M, *of_segment)
            banks.append(M)
        return self.read_segments(x, torch.stack(banks, dim=1)), M

    def step_inputs(self, E: Tensor) -> tuple[Tensor, ...]:
        """What the step of a segment needs, from its normalised tokens E (..., S, D): keys of
        length 1 and values (..., HM, S, D/HM), rates (..., HM, S, 1), g_momentum and g_decay
        (..., HM, 1, 1)."""
        precise = torch.promote_types(E.dtype, torch.float32)
        k = F.normalize(self.heads(self.wk(E)).to(precise), dim=-1)
        v = self.heads(self.wv(E)).to(precise)
        rate = torch.sigmoid(self.w_rate(E).to(precise)).mT[..., None]
        # A segment has one momentum and one forgetting, as in the paper's section 3.2.
        mean = E.mean(dim=-2)  # (B, G, D)
        g_momentum = torch.sigmoid(self.w_momentum(mean).to(precise))
        g_decay = torch.sigmoid(self.w_decay(mean).to(precise))
        return k, v, rate, g_momentum[..., None, None], g_decay[..., None, None]

    def update(
        self, M: Tensor, k: Tensor, v: Tensor, rate: Tensor, g_momentum: Tensor, g_decay: Tensor
    ) -> Tensor:
        """M (B, 2, HM, D/HM, D/HM) and the `step_inputs` of one segment -> the next M."""
        with torch.autocast(M.device.type, enabled=False):
            W, momentum = M.unbind(1)  # (B, HM, D/HM, D/HM) each
            # differs from paper: a step that could overshoot is shortened. Many keys that are alike
            # would add up to a large one. A step does not overshoot if the largest eigenvalue of
            # sum rate k k^T is at most 1. The Frobenius norm is never less than that, and cheap.
            bound = ((rate * k).mT @ k).norm(dim=(-2, -1), keepdim=True)  # (B, HM, 1, 1)
            rate = rate / bound.clamp(min=1)
            error = k @ W.mT - v  # (B, HM, S, D/HM)
            step = (rate * error).mT @ k
            momentum = g_momentum * momentum - step
            W = (1 - g_decay) * W + momentum
            return torch.stack((W, momentum), dim=1)

    def read_segments(self, x: Tensor, banks: Tensor) -> Tensor:
        """x (B, G, S, D), banks (B, G, 2, HM, D/HM, D/HM) -> (B, G, S, D)."""
        E = self.token_norm(x)
        q = F.normalize(self.heads(self.wq(E)), dim=-1)  # (B, G, HM, S, D/HM)
        W = banks[:, :, 0].to(q.dtype)
        # Norm, gate and projection of what is read are as in the paper's section 4.4.
        y = self.read_norm((q @ W.mT).to(self.read_norm.weight.dtype))
        return self.wo(torch.sigmoid(self.w_gate(E)) * self.merge(y))

    def write_segment(self, x: Tensor, M: Tensor) -> Tensor:
        """x (B, S, D), M (B, 2, HM, D/HM, D/HM) -> the next M. `forward` does the same for many
        segments."""
        return self.update(M, *self.step_inputs(self.token_norm(x)))


# The kinds of memory by name, for memory_kind.
MEMORIES: dict[str, type[BlockMemory]] = {"lm2": Memory, "neural": NeuralMemory}


class FeedForward(nn.Module):
    """The SwiGLU MLP: w2(silu(w1 x) * w3 x)."""

    def __init__(self, cfg: LM2Config):
        super().__init__()
        self.w1 = nn.Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.w2 = nn.Linear(cfg.ffn_dim, cfg.n_embd, bias=False)
        self.w3 = nn.Linear(cfg.n_embd, cfg.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder block: self-attention, memory and MLP, each added to the token stream."""

    def __init__(self, cfg: LM2Config, has_memory: bool):
        super().__init__()
        # Keep this order: it decides which random numbers each weight starts with.
        self.attention_norm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.ffn_norm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        self.memory = MEMORIES[cfg.memory_kind](cfg) if has_memory else None

    def forward(
        self, x: Tensor, M: Tensor | None, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, G, S, D) and the bank M that the first segment finds -> x (B, G, S, D) and the bank
        that the last segment finds."""
        rows = self.attention_norm(x).flatten(0, 1)  # (B*G, S, D)
        x = x + self.attention(rows, rope).view_as(x)
        if self.memory is not None:
            from_memory, M = self.memory(x, M)
            x = x + from_memory
        x = x + self.feed_forward(self.ffn_norm(x))
        return x, M

    def next_tokens(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        """As `forward`, for the next tokens of the open segment: x (B, n, D) -> (B, n, D). Nothing
        is written here. Whoever changes the order in `forward` has to change it here too."""
        x = x + self.attention.next_tokens(self.attention_norm(x), rope, cache)
        if self.memory is not None:
            x = x + self.memory.next_tokens(x, cache.prepared)
        return x + self.feed_forward(self.ffn_norm(x))

    def new_cache(self, M: Tensor | None) -> Cache:
        """A cache without tokens, for an open segment that finds the bank M."""
        prepared = None if self.memory is None else self.memory.prepare(M)
        return Cache(self_kv=None, prepared=prepared)


def choose(
    logits: Tensor,
    temperature: float,
    generator: torch.Generator | None,
    top_k: int | None = None,
) -> Tensor:
    """logits (B, vocab) -> ids (B,): the likeliest at temperature 0, otherwise drawn at random.

    top_k  how many of the likeliest ids can be drawn. None draws from all. ValueError below 1"""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1")
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        likeliest, ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)  # (B, top_k) each
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, likeliest)
    below_top = logits - logits.amax(dim=-1, keepdim=True)  # a tiny temperature cannot overflow
    probability = (below_top.double() / temperature).softmax(dim=-1)
    return torch.multinomial(probability, 1, generator=generator)[:, 0]


class Decoder(nn.Module):
    """What LM2 and RMT share. Parameters are named as in Meta's Llama.

    Each of the two adds `forward`, what is carried from segment to segment (`carried_shapes`,
    `first_carried`), and the first input of `stream` in a segment (`start_stream`)."""

    def __init__(self, cfg: LM2Config):
        super().__init__()
        self.cfg = cfg
        # Python floats, as .bfloat16() would round a buffer.
        self.frequencies = rope_frequencies(cfg)
        self.recompute = False  # activation checkpointing: less RAM, a third more work
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList()
        # differs from paper: any blocks can have a memory, where the paper has one in each
        for i in range(cfg.n_layer):
            self.layers.append(Block(cfg, has_memory=i in cfg.mem_blocks))
        self.norm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.output = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices are normal with standard deviation 1/sqrt(fan-in). It is divided by sqrt(2 L)
        where the result is added to the residual stream. Biases are 0. Parameters of a memory that
        are no `weight` or `bias` stay as they were made. At the end `start_as_a_copier` and the
        memories replace some of these values.

        A subclass calls it when all its parameters are there."""
        into_stream = ["attention.wo.weight", "feed_forward.w2.weight"]
        for name in MEMORIES[self.cfg.memory_kind].into_stream:
            into_stream.append(f"memory.{name}.weight")
        for name, p in self.named_parameters():
            if ".memory." in name and not name.endswith((".weight", ".bias")):
                continue
            if p.ndim == 2:
                deviation = p.shape[1] ** -0.5
                if name.endswith(tuple(into_stream)):
                    deviation *= (2 * self.cfg.n_layer) ** -0.5
                p.normal_(std=deviation)
            elif name.endswith(".bias"):
                p.zero_()
        # Unit size: a token is still visible in the residual stream after the first blocks.
        self.tok_embeddings.weight.normal_()
        if self.cfg.n_mem_token:
            self.mem_tokens.normal_()  # of an RMT: as large as the normed outputs that follow it
        self.start_as_a_copier()

    def start_as_a_copier(self) -> None:
        """Start the weights so that copying is nearly there.

        paper silent: to copy, a model has to note at each place the token before it, to find an
        earlier place that noted the present token, to bring the token that stands there, and to
        say it. None of the four helps alone, so training finds them late. This start makes the
        first easy, and gives the last two. In the default run the stage "echo" takes 700 to 800
        steps with it, and 1,100 to 1,400 without."""
        # One random vector is added to all embeddings. Where a query and a key come from it, their
        # score depends on the distance alone, by RoPE. So a head can learn to attend to the token
        # before, whichever token that is.
        shared = torch.randn_like(self.tok_embeddings.weight[0])
        self.tok_embeddings.weight.add_(shared)
        # In all blocks but the first, an attention head adds to the stream what it attends to.
        for block in self.layers[1:]:
            # Twice the usual size. Four times was no better.
            block.attention.undo_values(scale=2 * (2 * self.cfg.n_layer) ** -0.5)
        # The output layer is a small copy of the embedding. So a token that is brought raises its
        # own logit. Tied embeddings become as small as the head, and little of this holds.
        self.output.weight.copy_(0.02 * self.tok_embeddings.weight)
        for block in self.layers:
            if block.memory is not None:
                block.memory.start(shared)

    @property
    def precise_dtype(self) -> torch.dtype:
        """The dtype of banks, angles and losses: that of the weights, but at least float32."""
        return torch.promote_types(self.norm.weight.dtype, torch.float32)

    def n_params(self) -> tuple[int, int]:
        """(all parameters, those of the memory)"""
        total = 0
        memory = 0
        for name, p in self.named_parameters():
            total += p.numel()
            if ".memory." in name or name.startswith("mem_"):
                memory += p.numel()
        return total, memory

    def rope(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The rotary table of the positions start .. stop - 1 of a segment."""
        longest = self.cfg.segment_len + 2 * self.cfg.n_mem_token
        device = self.norm.weight.device
        cos, signed_sin = rotary_table(self.frequencies, longest, self.precise_dtype, device)
        return cos[start:stop], signed_sin[start:stop]

    def initial_state(self, batch: int, segment_len: int | None = None) -> State:
        """The state before any token. A document may have shorter segments than the model's, as in
        training; ValueError for longer ones."""
        if segment_len is None:
            segment_len = self.cfg.segment_len
        if not 1 <= segment_len <= self.cfg.segment_len:
            longest = self.cfg.segment_len
            raise ValueError(f"segment_len {segment_len} must lie between 1 and {longest}")
        no_ids = torch.zeros(batch, 0, dtype=torch.int64, device=self.norm.weight.device)
        return State(self.first_carried(batch), no_ids, segment_len)

    def check_call(self, idx: Tensor, targets: Tensor | None, at: Tensor | None) -> None:
        """ValueError for inputs of another shape or dtype than `forward` takes."""
        if idx.ndim != 2 or idx.dtype != torch.int64 or idx.numel() == 0:
            found = f"{tuple(idx.shape)} {idx.dtype}"
            raise ValueError(f"idx must be (B, T) int64 with B, T >= 1, not {found}")
        if at is not None and (at.ndim != 1 or at.dtype != torch.int64):
            raise ValueError(f"at must be (n,) int64, not {tuple(at.shape)} {at.dtype}")
        needed = idx.shape if at is None else at.shape
        if targets is not None and targets.shape != needed:
            raise ValueError(f"targets are {tuple(targets.shape)}, but must be {tuple(needed)}")

    def checked_state(self, batch: int, state: State | None, segment_len: int | None) -> State:
        """The state that a call goes on from, a new one for None. ValueError for one of another
        model, batch or segment length."""
        if state is None:
            # paper silent: when banks start anew. Here they do with every document.
            return self.initial_state(batch, segment_len)
        if segment_len is not None and segment_len != state.segment_len:
            raise ValueError(f"segment_len {segment_len}, but the document has {state.segment_len}")
        if not 1 <= state.segment_len <= self.cfg.segment_len:
            raise ValueError(
                f"the state has segments of {state.segment_len} tokens, but this model allows "
                f"{self.cfg.segment_len} at most"
            )
        found = [None if tensor is None else tuple(tensor.shape) for tensor in state.carried]
        needed = self.carried_shapes(batch)
        if found != needed:
            raise ValueError(
                f"the state carries {found}, but this model with a batch of {batch} needs {needed}"
            )
        rows, n_open = state.open_ids.shape
        if rows != batch or n_open > state.segment_len:
            raise ValueError(
                f"the state has {n_open} open ids in {rows} rows, but this batch has {batch} rows "
                f"and its segments have {state.segment_len} tokens"
            )
        return state

    def through_blocks(
        self, x: Tensor, banks: list[Tensor | None], rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """x (B, G, S, D) and the bank that its first segment finds in each block -> x after the
        last block, and the banks that the last segment finds."""
        last_banks = []
        for block, M in zip(self.layers, banks, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Keep only the block's input, and run the block again for the gradient.
                x, M = recomputed(block, x, M, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x, M = block(x, M, rope)
            last_banks.append(M)
        return x, last_banks

    def logits_and_loss(
        self, x: Tensor, targets: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> logits and loss, as `forward` returns them."""
        if at is not None:
            x = x.flatten(0, 1)[at]  # (n, D)
        logits = self.output(self.norm(x))
        if targets is None:
            return logits, None
        total = F.cross_entropy(
            logits.flatten(0, -2).to(self.precise_dtype),
            targets.flatten(),
            ignore_index=-1,
            reduction="sum",
        )
        n_targets = (targets != -1).sum()
        return logits, total / n_targets.clamp(min=1)  # 0 where no token is asked for

    @torch.no_grad()
    def read(
        self, idx: Tensor, state: State | None = None, segments_per_call: int | None = None
    ) -> State:
        """Read a document of any length in constant RAM: idx (B, T) -> the state after it.

        Each call of `forward` gets segments_per_call * segment_len tokens of each row. By default
        these are about 4,096 tokens in all rows together (more on a GPU), but at least 4 segments
        of each row, as each call runs the open segment again."""
        self.check_call(idx, None, None)
        state = self.checked_state(idx.shape[0], state, None)
        ids = torch.cat((state.open_ids, idx), dim=1)
        if self.cfg.kind == "llama":
            # Nothing is ever written. The state only has the ids of its last segment.
            last_segment = (ids.shape[1] - 1) // state.segment_len * state.segment_len
            ids = ids[:, last_segment:].clone()
        if ids.shape[1] <= state.segment_len:
            # Nothing is to be written: the state only gets more open ids, and no block has to run.
            return State(state.carried, ids, state.segment_len)
        if segments_per_call is None:
            tokens = 4096
            if idx.is_cuda:
                tokens = 2**25 // self.cfg.n_embd  # 2**25 numbers in one (tokens, D) tensor
            segments_per_call = max(4, tokens // (idx.shape[0] * state.segment_len))
        no_logits = idx.new_zeros(0)
        for piece in idx.split(segments_per_call * state.segment_len, dim=1):
            _, _, state = self(piece, state=state, at=no_logits)  # `forward` of LM2 or RMT
        return state

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        state: State | None = None,
        top_k: int | None = None,
    ) -> Iterator[Tensor]:
        """Read idx (B, T), then yield max_new_tokens ids, (B,) each, as they are made. `choose`
        says what temperature, generator and top_k do.

        Within a segment only the new token goes through the blocks: each block has a cache. At the
        segment's end the caches are dropped, and one ordinary call runs the full segment again and
        writes it: a write needs E of every token, and caches have none."""
        state = self.read(idx, state)
        x, caches = self.start_stream(state)
        position = 0  # of x[:, 0] in the open segment; an RMT counts its memory vectors too
        for i in range(max_new_tokens):
            rope = self.rope(position, position + x.shape[1])
            for block, cache in zip(self.layers, caches, strict=True):
                x = block.next_tokens(x, rope, cache)
            logits = self.output(self.norm(x[:, -1]))  # (B, vocab)
            new = choose(logits, temperature, generator, top_k)  # (B,)
            yield new
            if i + 1 == max_new_tokens:
                return  # nobody asks what comes after the last one
            segment_was_full = state.open_ids.shape[1] == state.segment_len
            state = self.read(new[:, None], state)
            if segment_was_full:  # `read` has written it, and the new token opens the next one
                x, caches = self.start_stream(state)
                position = 0
            else:
                position += x.shape[1]
                x = self.tok_embeddings(new[:, None])  # (B, 1, D)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        state: State | None = None,
        top_k: int | None = None,
    ) -> Tensor:
        """idx (B, T) -> (B, T + max_new_tokens): idx, and then the ids of `stream`."""
        pieces = [idx]
        for new in self.stream(idx, max_new_tokens, temperature, generator, state, top_k):
            pieces.append(new[:, None])
        return torch.cat(pieces, dim=1)


class LM2(Decoder):
    """logits, loss, state = model(idx, targets, state)

    With `n_mem_layer=0` it is a Llama whose attention never crosses a segment's border."""

    def __init__(self, cfg: LM2Config):
        super().__init__(cfg)
        if cfg.n_mem_token:
            raise ValueError(f"n_mem_token {cfg.n_mem_token} makes an RMT: use RMT(cfg)")
        self.init_weights()

    def carried_shapes(self, batch: int) -> list[tuple[int, ...] | None]:
        """(B, *bank_shape) for each block that has a memory."""
        shapes = []
        for block in self.layers:
            shapes.append(None if block.memory is None else (batch, *block.memory.bank_shape))
        return shapes

    def first_carried(self, batch: int) -> list[Tensor | None]:
        """The first bank of each block that has a memory, for each document."""
        banks = []
        for block in self.layers:
            if block.memory is None:
                banks.append(None)
                continue
            with self.norm.weight.device:  # nothing is copied from the CPU
                M = block.memory.first_bank().to(self.precise_dtype)
            banks.append(M.expand(batch, *M.shape).clone())
        return banks

    def start_stream(self, state: State) -> tuple[Tensor, list[Cache]]:
        """The embeddings of the open segment, (B, n, D), and one new cache per block."""
        caches = []
        for block, M in zip(self.layers, state.carried, strict=True):
            caches.append(block.new_cache(M))
        return self.tok_embeddings(state.open_ids), caches

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        state: State | None = None,
        at: Tensor | None = None,
        segment_len: int | None = None,
    ) -> tuple[Tensor, Tensor | None, State]:
        """idx (B, T) int64, any T >= 1 -> logits (B, T, vocab), loss, the state after these tokens.

        targets      (B, T) int64, already shifted, -1 where no token is asked for. The loss is the
                     mean over the others, 0 if there are none, and None without targets.
        state        what an earlier call returned for the tokens before these. None starts a
                     document. Going on token by token is right but slow, as each call runs the
                     open segment again: `stream` keeps a cache for that.
        at           (n,) int64, the flat positions row * T + column whose logits are wanted. Then
                     logits are (n, vocab), and targets (n,).
        segment_len  shorter segments than the model's, for a document that starts here.
        Raises ValueError for inputs and states that do not fit."""
        self.check_call(idx, targets, at)
        state = self.checked_state(idx.shape[0], state, segment_len)
        n_open = state.open_ids.shape[1]
        ids = torch.cat((state.open_ids, idx), dim=1)
        n_ids = ids.shape[1]  # n_open + T
        # A call of less than one segment makes a shorter one, which needs no padding.
        S = min(state.segment_len, n_ids)
        # Fill up the last segment. Nothing depends on the padding: self-attention is causal, and
        # the last segment is not written.
        n_padding = -n_ids % S
        x = self.tok_embeddings(F.pad(ids, (0, n_padding)))  # (B, G*S, D)
        x = x.unflatten(1, (-1, S))  # (B, G, S, D)
        x, banks = self.through_blocks(x, state.carried, self.rope(0, S))
        open_start = (n_ids - 1) // S * S
        # The ids are copied: a view would keep the whole document alive.
        after = State(banks, ids[:, open_start:].clone(), state.segment_len)
        x = x.flatten(1, 2)[:, n_open:n_ids]  # (B, T, D)
        logits, loss = self.logits_and_loss(x, targets, at)
        return logits, loss, after


class RMT(Decoder):
    """The Recurrent Memory Transformer (arXiv 2207.06881), a baseline.

    A memory of `n_mem_token` vectors stands before the tokens of each segment. A full segment has
    the same vectors after its tokens too: their outputs, normed, are the next segment's memory.
    With `mem_projection` a matrix turns these outputs into the memory, since what the last block
    gives need not look like what the first one takes. Attention is causal, so no token sees the
    vectors after it."""

    def __init__(self, cfg: LM2Config):
        super().__init__(cfg)
        if cfg.n_mem_token < 1:
            raise ValueError(f"n_mem_token {cfg.n_mem_token} must be at least 1 for an RMT")
        self.mem_tokens = nn.Parameter(torch.empty(cfg.n_mem_token, cfg.n_embd))
        self.mem_projection = None
        if cfg.mem_projection:
            self.mem_projection = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.init_weights()

    def carried_shapes(self, batch: int) -> list[tuple[int, ...] | None]:
        """(B, n_mem_token, D), once."""
        return [(batch, self.cfg.n_mem_token, self.cfg.n_embd)]

    def first_carried(self, batch: int) -> list[Tensor | None]:
        """The learned first memory, (B, n_mem_token, D)."""
        return [self.mem_tokens.repeat(batch, 1, 1)]

    def memory_of(self, state: State) -> Tensor:
        """(B, n_mem_token, D) in the dtype of this model, whatever model the state comes from."""
        (memory,) = state.carried
        return memory.to(self.mem_tokens.dtype)

    def start_stream(self, state: State) -> tuple[Tensor, list[Cache]]:
        """The memory and the embeddings of the open segment, (B, n_mem_token + n, D), and one new
        cache per block."""
        x = torch.cat((self.memory_of(state), self.tok_embeddings(state.open_ids)), dim=1)
        return x, [block.new_cache(None) for block in self.layers]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        state: State | None = None,
        at: Tensor | None = None,
        segment_len: int | None = None,
    ) -> tuple[Tensor, Tensor | None, State]:
        """As LM2's, but segments are read one after another."""
        self.check_call(idx, targets, at)
        state = self.checked_state(idx.shape[0], state, segment_len)
        memory = self.memory_of(state)
        n_memory = self.cfg.n_mem_token
        no_banks = [None] * len(self.layers)
        ids = torch.cat((state.open_ids, idx), dim=1)
        segments = ids.split(state.segment_len, dim=1)
        outputs = []
        for g, segment in enumerate(segments):
            tokens = self.tok_embeddings(segment)  # (B, n, D)
            is_last = g + 1 == len(segments)
            if is_last:  # it stays open: no memory is wanted from it
                x = torch.cat((memory, tokens), dim=1)
            else:
                x = torch.cat((memory, tokens, memory), dim=1)
            x = x[:, None]  # (B, 1, n_memory + n (+ n_memory), D): the blocks see one segment
            x, _ = self.through_blocks(x, no_banks, self.rope(0, x.shape[2]))
            x = x[:, 0]
            outputs.append(x[:, n_memory : n_memory + segment.shape[1]])
            if not is_last:
                memory = self.norm(x[:, -n_memory:])
                if self.mem_projection is not None:
                    memory = self.mem_projection(memory)
        after = State([memory], segments[-1].clone(), state.segment_len)
        x = torch.cat(outputs, dim=1)[:, state.open_ids.shape[1] :]  # (B, T, D)
        logits, loss = self.logits_and_loss(x, targets, at)
        return logits, loss, after


def build_model(cfg: LM2Config) -> LM2 | RMT:
    """The model of these sizes: an RMT if they have memory tokens, otherwise an LM2."""
    return RMT(cfg) if cfg.kind == "rmt" else LM2(cfg)


def write_file(path: str | Path, kind: str, content: dict) -> None:
    """Write tensors and plain values to one file.

    A file at `path` is replaced only when the new one is complete. Raises OSError if that fails,
    which names the file and its kind, such as "checkpoint"."""
    partial = Path(
        f"{path}.tmp"
    )  # as data.common.replacing does; lm2.py imports no other file of these
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        reason = error
        if isinstance(error.__context__, OSError):  # torch hides a full disk in its own error
            reason = error.__context__.strerror
        raise OSError(f"cannot write the {kind} {path}: {reason}") from None
    finally:
        if partial.is_file():
            partial.unlink()


def read_file(path: Path, kind: str, format: str) -> dict:
    """What a file of `write_file` holds, on the CPU. Loading never runs code from the file.

    Raises ValueError, with a message of one line, for a file that is cut short, or whose content
    has no such format under the name "format"."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception:  # a broken zip, pickle or tensor: torch has no common class for them
        raise ValueError(f"{path} is cut short or no {kind}: name another") from None
    if not isinstance(content, dict) or content.get("format") != format:
        raise ValueError(f"{path} is of another format than {format}: name another")
    return content


CHECKPOINT_FORMAT = "lm2-checkpoint-1"


def save_checkpoint(path: str | Path, model: LM2 | RMT, **content) -> None:
    """Write the model and `content` to one file: tensors and plain values, such as
    `tokenizer=tokenizer.ranks`.

    A file at `path` is replaced only when the new one is complete. Raises OSError if that fails."""
    everything = dict(
        format=CHECKPOINT_FORMAT, config=asdict(model.cfg), model=model.state_dict(), **content
    )
    write_file(path, "checkpoint", everything)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[LM2 | RMT, dict]:
    """The model of a file of `save_checkpoint`, on `device`, and everything that the file holds, on
    the CPU.

    Loading never runs code from the file. Raises ValueError, with a message of one line, for a file
    that is missing, cut short, or of another format."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the checkpoint in it, such as {path}/ckpt.pt")
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: name another, or run python train.py")
    content = read_file(path, "checkpoint", CHECKPOINT_FORMAT)
    try:
        model = build_model(LM2Config(**content["config"]))
        model.load_state_dict(content["model"], strict=True)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: name another checkpoint") from None
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this code: {reason}") from None
    return model.to(device), content


STATE_FORMAT = "lm2-state-1"
# Sizes that there were not when the first states were written, with the values that they had.
SIZES_MISSING_IN_OLDER = dict(memory_kind="lm2", mem_projection=False)


def fingerprint(model: LM2 | RMT) -> str:
    """32 hexadecimal digits that models with other sizes or weights do not share. The device does
    not matter."""
    sizes = asdict(model.cfg)
    for name, missing in SIZES_MISSING_IN_OLDER.items():
        if sizes[name] == missing:
            del sizes[name]  # so that states stay valid
    digest = hashlib.blake2b(str(sizes).encode(), digest_size=16)
    for weight in model.state_dict().values():
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def stacked(carried: list[Tensor | None]) -> Tensor:
    """What a state carries as one tensor, (number of tensors, B, ...). Without any it is (0,)."""
    tensors = [tensor for tensor in carried if tensor is not None]
    return torch.stack(tensors) if tensors else torch.zeros(0)


def restored(model: LM2 | RMT, carried: Tensor, open_ids: Tensor, segment_len: int) -> State:
    """The state of these parts, whose tensors are on the CPU.

    carried  as `stacked` returns it
    Raises ValueError, TypeError or RuntimeError for parts that are no state of the model."""
    if type(segment_len) is not int:
        raise ValueError(f"segment_len {segment_len!r} is not a whole number")
    first = model.initial_state(1)
    needed = stacked(first.carried)
    if carried.shape != needed.shape or carried.dtype != needed.dtype:
        raise ValueError(f"carried is {tuple(carried.shape)} {carried.dtype}")
    if not carried.isfinite().all():
        raise ValueError("carried holds numbers that are not finite")
    if (
        open_ids.ndim != 2
        or open_ids.dtype != torch.int64
        or open_ids.numel() > model.cfg.segment_len
    ):
        raise ValueError(f"open_ids are {tuple(open_ids.shape)} {open_ids.dtype}")
    vocab_size = model.cfg.vocab_size
    if ((open_ids < 0) | (open_ids >= vocab_size)).any():
        raise ValueError(f"open_ids must lie between 0 and {vocab_size - 1}")
    tensors = iter(carried)
    found = [None if tensor is None else next(tensors) for tensor in first.carried]
    return model.checked_state(1, State(found, open_ids, segment_len), None)


def save_state(path: str | Path, model: LM2 | RMT, state: State) -> None:
    """Write the state of one document, with a batch of 1, to a file of the size of its tensors and
    about 2 KiB.

    A file at `path` is replaced only when the new one is complete. Raises OSError if that fails,
    and ValueError for a state that does not fit the model."""
    state = model.checked_state(1, state, None)
    content = dict(
        format=STATE_FORMAT,
        model=fingerprint(model),
        segment_len=state.segment_len,
        # A copy: of a view, torch would write all that it is a view of.
        open_ids=state.open_ids.cpu().clone(),
        # One tensor for all blocks: each tensor in a file takes some 200 bytes more.
        carried=stacked(state.carried).detach().cpu(),
    )
    write_file(path, "state", content)


def load_state(path: str | Path, model: LM2 | RMT) -> State:
    """The state in a file of `save_state`, on the model's device.

    Loading never runs code from the file. Raises ValueError, with a message of one line, for a file
    that is missing, cut short, or of another format, and for a state of another model."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no state {path}: name a file that was saved as one")
    content = read_file(path, "state", STATE_FORMAT)
    try:
        if content["model"] != fingerprint(model):
            raise ValueError("it comes from a model with other weights")
        state = restored(model, content["carried"], content["open_ids"], content["segment_len"])
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no state of this model: {reason}") from None
    device = model.norm.weight.device
    return state.map(lambda tensor: tensor.to(device))


# -------------------------------------------------------------------------------------------------
# Released Llamas

SAFETENSORS_TYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16
)

MOST_HEADER = 100_000_000  # bytes, as in the format's own reader

# Hugging Face's names of weights, and Meta's, which are ours.
META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def parse_json(text: bytes, source: str) -> dict:
    """The object that a text in JSON holds. ValueError names the source of a broken one."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{source} is cut short or no object in JSON")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in the format safetensors: the size of a header in 8 bytes, the header
    in JSON, and the bytes of all tensors.

    The file is mapped into RAM: what is not used is not read, and only misaligned tensors are
    copied. ValueError names a file that is broken, and the tensor in it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # where the bytes of tensors begin
        if start > min(size, MOST_HEADER):
            raise ValueError(f"{path.name} is cut short or no safetensors file")
        header = parse_json(file.read(start - 8), f"the header of {path.name}")
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = SAFETENSORS_TYPES.get(about["dtype"])
            if dtype is None:
                raise ValueError(f"its dtype {about['dtype']} is unknown here")
            begin, end = about["data_offsets"]
            if not 0 <= begin <= end <= size - start:
                raise ValueError("its bytes lie outside the file")
            piece = content[start + begin : start + end]
            if piece.storage_offset() % dtype.itemsize:
                piece = piece.clone()  # torch cannot view it as this dtype where it lies
            tensors[name] = piece.view(dtype).view(about["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} in {path.name} is broken: {error}") from None
    return tensors


def read_hugging_face(folder: Path) -> tuple[LM2Config, dict[str, Tensor]]:
    """The sizes and the weights, by their names here, of a folder in Hugging Face's layout."""
    found = parse_json((folder / "config.json").read_bytes(), "config.json")
    heads = found["num_attention_heads"]
    expected = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
    for name, value in expected.items():
        if found.get(name, value) != value:
            raise ValueError(f"its {name} is {found[name]}, but only {value} is known here")
    if found.get("head_dim") and found["head_dim"] * heads != found["hidden_size"]:
        width = found["head_dim"]
        raise ValueError(f"its head_dim {width} times {heads} heads is not its hidden_size")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"its rope_type {kind} is unknown here")
    cfg = LM2Config(
        vocab_size=found["vocab_size"],
        n_layer=found["num_hidden_layers"],
        n_head=heads,
        n_kv_head=found.get("num_key_value_heads"),
        n_embd=found["hidden_size"],
        ffn_dim=found["intermediate_size"],
        segment_len=found["max_position_embeddings"],
        n_mem_layer=0,
        rope_theta=rope.get("rope_theta", found.get("rope_theta", 10000.0)),
        rope_scaling=rope if kind == "llama3" else None,
        norm_eps=found["rms_norm_eps"],
        tie_embeddings=found.get("tie_word_embeddings", False),
    )
    paths = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not paths[0].is_file():
        names = parse_json(index.read_bytes(), index.name)["weight_map"].values()
        paths = [folder / name for name in sorted(set(names))]
    weights = {}
    for path in paths:
        for their_name, tensor in read_safetensors(path).items():
            name = their_name
            for theirs, ours in META_NAMES.items():
                name = name.replace(f"{theirs}.", f"{ours}.")
            if name.endswith((".attention.wq.weight", ".attention.wk.weight")):
                # There all a of a head's RoPE pairs (a, b) come before all b. Here the two of a
                # pair are neighbours.
                halves = tensor.unflatten(0, (-1, 2, cfg.n_embd // cfg.n_head // 2))
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            weights[name] = tensor
    return cfg, weights


def read_meta(folder: Path) -> tuple[LM2Config, dict[str, Tensor]]:
    """The sizes and the weights of a folder in Meta's layout."""
    found = parse_json((folder / "params.json").read_bytes(), "params.json")
    path = folder / "consolidated.00.pth"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # a broken zip or pickle: torch has no common class for them
        raise ValueError(f"{path.name} is cut short or no file of weights") from None
    weights.pop("rope.freqs", None)
    scaling = None
    if found.get("use_scaled_rope"):
        # params.json does not hold the factor. Only the narrow models, 3.2 of 1 B and 3 B, have 32.
        scaling = dict(
            factor=32.0 if found["dim"] < 4096 else 8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    cfg = LM2Config(
        vocab_size=len(weights["tok_embeddings.weight"]),
        n_layer=found["n_layers"],
        n_head=found["n_heads"],
        n_kv_head=found.get("n_kv_heads"),
        n_embd=found["dim"],
        ffn_dim=len(weights["layers.0.feed_forward.w1.weight"]),
        segment_len=131072 if scaling else 8192,  # the context of Llama 3.1 and later, of Llama 3
        n_mem_layer=0,
        rope_theta=found.get("rope_theta", 10000.0),
        rope_scaling=scaling,
        norm_eps=found["norm_eps"],
        tie_embeddings="output.weight" not in weights,
    )
    return cfg, weights


def load_llama(folder: str | Path) -> LM2:
    """A released Llama as a model without memory: a folder in the layout of Hugging Face
    (config.json and safetensors) or of Meta (params.json and consolidated.00.pth).

    The weights keep their dtype and stay in the files, mapped into RAM. But Hugging Face's wq and
    wk are copied into Meta's order. The segment is as long as the model's context. ValueError, of
    one line, for a file that is missing or broken, and a tensor that is missing or left over."""
    folder = Path(folder)
    is_metas = any((folder / name).is_file() for name in ("params.json", "consolidated.00.pth"))
    read = read_meta if is_metas else read_hugging_face
    try:
        cfg, weights = read(folder)
        if cfg.tie_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        with torch.device("meta"):  # weights without storage, which the file's replace
            model = LM2(cfg)
        model.load_state_dict(weights, strict=True, assign=True)
        if cfg.tie_embeddings:
            model.output.weight = model.tok_embeddings.weight  # `assign` has untied the two
        return model
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    except KeyError as error:
        reason = f"{error} is missing"
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    raise ValueError(
        f"{folder} holds no Llama that can be read ({reason}): fetch its files again, or name "
        "another folder"
    )


def holds_llama(path: str | Path) -> bool:
    """Whether a path is a folder with a file of a released model."""
    files = ("config.json", "params.json", "model.safetensors", "consolidated.00.pth")
    return any((Path(path) / name).is_file() for name in files)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[LM2 | RMT, dict]:
    """The model of a checkpoint or of the folder of a released Llama, and what else the checkpoint
    holds, which is nothing for a folder. ValueError as `load_checkpoint` and `load_llama` tell."""
    if holds_llama(path):
        return load_llama(path).to(device), {}
    return load_checkpoint(path, device)


@torch.no_grad()
def graft(llama: LM2, cfg: LM2Config) -> LM2:
    """A model of these sizes in float32, with the weights of a Llama and a new memory.

    At first the memory adds nothing, as the last matrix before the stream is 0 (`into_stream`). So
    the logits are the Llama's for a text of up to a segment. What the memory adds is P y, with that
    matrix P. P has a gradient from the first step on, because y is not 0. What makes y has none
    until P is no longer 0, which is after that step.

    ValueError for a size besides the memory's and segment_len that is not the Llama's."""
    may_differ = "segment_len n_slot n_mem_head n_mem_layer mem_blocks memory_kind"
    for name, value in asdict(llama.cfg).items():
        found = getattr(cfg, name)
        if found != value and name not in may_differ.split():
            raise ValueError(f"{name} is {found}, but the Llama has {value}: leave it as it is")
    model = LM2(cfg)
    model.load_state_dict(llama.state_dict(), strict=False)  # all but the memory
    for block in model.layers:
        if block.memory is not None:
            for name in block.memory.into_stream:
                getattr(block.memory, name).weight.zero_()
    return model
