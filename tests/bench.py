"""Speed and memory of this implementation, beside Llamas of the same sizes.

    # see in seconds that it runs; the figures of its tiny sizes mean nothing
    python tests/bench.py --quick --threads 1
    # measure everything, which takes minutes on two CPU cores
    python tests/bench.py
    # measure some of the parts, which are train, products, read, generate and data
    python tests/bench.py --parts train products
    # show where the time of a training step goes
    python tests/bench.py --profile
    # measure compiled training steps, which take minutes to compile on a CPU
    python tests/bench.py --compile --parts train

Writes the figures as JSON to --out, if that is given. pytest does not collect this file.

All contenders run in one process and take turns. Every round runs each of them once and starts with
another one, so that a machine that slows down slows all of them. A figure is the median of the
rounds. A ratio is taken within each round. The least and the greatest value are in brackets.
"""

import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tests/bench.py`

import train  # noqa: E402
from data.common import (  # noqa: E402
    Parser,
    keep_freed_memory,
    one_line,
    peak_memory,
    pick_device,
    save_json,
)
from data.document import length_name  # noqa: E402
from data.lessons import Batch, Stage, parse_stage  # noqa: E402
from data.recipes import PRESETS  # noqa: E402
from data.tokenizer import load  # noqa: E402
from lm2 import LM2, RMT, LM2Config, build_model  # noqa: E402
from train import compile_blocks  # noqa: E402

QUICK = dict(
    vocab_size=256,
    n_layer=2,
    n_head=2,
    n_kv_head=2,
    n_embd=64,
    ffn_dim=176,
    segment_len=32,
    n_slot=8,
    n_mem_head=2,
)
CPU = dict(
    vocab_size=2048,
    n_layer=4,
    n_head=8,
    n_kv_head=8,
    n_embd=512,
    ffn_dim=1408,
    n_slot=64,
    segment_len=256,
    n_mem_head=8,
)
CUDA = dict(  # Without its memory this model is as large as GPT-2 small.
    vocab_size=50304,
    n_layer=12,
    n_head=12,
    n_kv_head=12,
    n_embd=768,
    ffn_dim=2048,
    n_slot=64,
    segment_len=512,
    n_mem_head=12,
    tie_embeddings=True,
)
# A training step has the sizes of a model, B rows, and T tokens in each row.
STEPS: dict[str, tuple[dict, int, int]] = {
    "quick": (QUICK, 2, 128),
    "cpu": (CPU, 2, 1024),
    "cuda": (CUDA, 4, 4096),
}

Step = Callable[..., None]  # a training step; it takes the batch, unless that is always the same


@dataclass(frozen=True)
class Setup:
    """What all parts of the benchmark share."""

    device: torch.device
    cfg: LM2Config  # sizes of the model in training steps
    rows: int  # B, documents of a training step
    tokens: int  # T, tokens of each document
    rounds: int  # how often each measurement is made
    compile: bool  # training steps are compiled
    quick: bool  # sizes are tiny
    preset: str = "cpu"  # of the model that reads and generates on a CPU

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def clock(self) -> float:
        """The time in seconds, once the device has done all work that it was given."""
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, call: Callable) -> float:
        """How long a call takes."""
        start = self.clock()
        call()
        return self.clock() - start

    def alternate(self, calls: dict, rounds: int) -> dict:
        """Time the calls in turns: {name: call} -> {name: [the seconds of each round]}."""
        names = list(calls)
        times = {name: [] for name in names}
        for r in range(rounds):
            first = r % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self.seconds(calls[name]))
        return times

    def training_step(self, model: nn.Module, loss_of: Callable[..., Tensor]) -> Step:
        """A step as in train.py: forward, backward, clipping and AdamW. It computes in float32, on
        CUDA in bfloat16 by autocast."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(*batch):
            with torch.autocast("cuda", torch.bfloat16, enabled=self.on_cuda):
                loss = loss_of(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def reader(self) -> LM2 | RMT:
        """The model that reads and generates: on a CPU that of the preset, on CUDA that of the
        training steps."""
        torch.manual_seed(0)
        if self.on_cuda:
            model = LM2(self.cfg).to(self.device, torch.bfloat16)
        else:
            model = build_model(LM2Config(**PRESETS[self.preset])).to(self.device)
        return model.eval()

    def document(self, length: int) -> Tensor:
        """Random ids (1, length). They are in the vocabulary of every model here."""
        return torch.randint(256, (1, length), device=self.device)


Spread = tuple[float, float, float]  # (median, least, greatest)


def ratio(a: list[float], b: list[float]) -> Spread:
    """The spread of a / b, taken round by round."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def shown(spread: Spread, form: str = ".2f") -> str:
    """The spread as text: "median [least, greatest]"."""
    median, least, greatest = spread
    return f"{median:{form}} [{least:{form}}, {greatest:{form}}]"


class PlainBlock(nn.Module):
    """A block of PlainLlama."""

    def __init__(self, cfg: LM2Config):
        super().__init__()
        D = cfg.n_embd
        self.n_head = cfg.n_head
        self.norm1 = nn.RMSNorm(D, cfg.norm_eps)
        self.q = nn.Linear(D, D, bias=False)
        self.k = nn.Linear(D, D, bias=False)
        self.v = nn.Linear(D, D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.norm2 = nn.RMSNorm(D, cfg.norm_eps)
        self.w1 = nn.Linear(D, cfg.ffn_dim, bias=False)
        self.w2 = nn.Linear(cfg.ffn_dim, D, bias=False)
        self.w3 = nn.Linear(D, cfg.ffn_dim, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(R, T, D) -> (R, H, T, D/H)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE on x (R, H, T, D/H): angle i turns the channels i and D/H/2 + i."""
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)"""
        h = self.norm1(x)
        q = self.turn(self.heads(self.q(h)), cos, sin)
        k = self.turn(self.heads(self.k(h)), cos, sin)
        y = F.scaled_dot_product_attention(q, k, self.heads(self.v(h)), is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(-2))  # (R, T, D)
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class PlainLlama(nn.Module):
    """A reference: a Llama made of PyTorch's own modules, without state, segments or options."""

    def __init__(self, cfg: LM2Config):
        super().__init__()
        D = cfg.n_embd
        self.embedding = nn.Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList([PlainBlock(cfg) for _ in range(cfg.n_layer)])
        self.norm = nn.RMSNorm(D, cfg.norm_eps)
        self.output = nn.Linear(D, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.output.weight = self.embedding.weight
        frequency = cfg.rope_theta ** (-torch.arange(0, D // cfg.n_head, 2) * cfg.n_head / D)
        angle = torch.outer(torch.arange(cfg.segment_len), frequency).repeat(1, 2)  # (T, D/H)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, idx: Tensor) -> Tensor:
        """idx (R, T) -> logits (R, T, V)"""
        x = self.embedding(idx)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output(self.norm(x))


class TransformersLlama(nn.Module):
    """The Llama of the library transformers. ImportError where that is not installed."""

    def __init__(self, cfg: LM2Config):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        rope = dict(rope_type="default", rope_theta=cfg.rope_theta)
        if cfg.rope_scaling is not None:
            rope.update(cfg.rope_scaling, rope_type="llama3")
        config = LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.n_embd,
            intermediate_size=cfg.ffn_dim,
            num_hidden_layers=cfg.n_layer,
            num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.n_kv_head,
            max_position_embeddings=cfg.segment_len,
            rms_norm_eps=cfg.norm_eps,
            tie_word_embeddings=cfg.tie_embeddings,
            rope_parameters=rope,
            attn_implementation="sdpa",
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (R, T) -> logits (R, T, V)"""
        return self.model(idx).logits


class Contender(NamedTuple):
    """A model with its training step, always on the same batch."""

    model: nn.Module
    step: Step


def contenders(setup: Setup, others: bool = False) -> dict[str, Contender]:
    """LM2 and a Llama with the same window. With `others` there are other memories and further
    Llamas. All of them train on the same B x T tokens, each of which has a target."""
    torch.manual_seed(0)
    cfg = setup.cfg
    ids = torch.randint(cfg.vocab_size, (setup.rows, setup.tokens + 1), device=setup.device)
    x = ids[:, :-1].contiguous()  # (B, T)
    y = ids[:, 1:].contiguous()  # (B, T)
    segments = x.view(-1, cfg.segment_len)  # (B*G, S)
    window = replace(cfg, n_mem_layer=0, mem_blocks=())
    full = replace(window, segment_len=setup.tokens)

    def ours(sizes: LM2Config) -> Contender:
        model = build_model(sizes).to(setup.device).train()

        def loss_of() -> Tensor:
            _, loss, _ = model(x, y)
            return loss

        return Contender(model, setup.training_step(model, loss_of))

    def theirs(model: nn.Module, idx: Tensor) -> Contender:
        model = model.to(setup.device).train()

        def loss_of() -> Tensor:
            logits = model(idx)
            return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())  # as in lm2.py

        return Contender(model, setup.training_step(model, loss_of))

    found = {"LM2": ours(cfg), "Llama": ours(window)}
    if others:
        found["neural memory"] = ours(replace(cfg, memory_kind="neural"))
        rmt = replace(window, n_mem_token=16)
        found["RMT"] = ours(rmt)
        found["RMT, projection"] = ours(replace(rmt, mem_projection=True))
        found["Llama, full"] = ours(full)
        found["plain PyTorch"] = theirs(PlainLlama(window), segments)
        try:
            found["transformers"] = theirs(TransformersLlama(window), segments)
            found["transformers, full"] = theirs(TransformersLlama(full), x)
        except ImportError:
            pass  # `train_steps` prints that transformers is not installed.
    return found


def warm_up(setup: Setup, found: dict[str, Contender]) -> tuple[dict[str, Step], dict[str, float]]:
    """Take two steps with each contender -> ({name: step}, {name: seconds of the two}). Compile the
    contenders first if --compile asks for that."""
    if setup.compile:
        # PyTorch limits recompilations, and would count those of an earlier part.
        torch.compiler.reset()
        for contender in found.values():
            if isinstance(contender.model, LM2 | RMT):
                compile_blocks(contender.model)
            else:
                contender.model.compile()
    steps = {name: contender.step for name, contender in found.items()}
    times = setup.alternate(steps, 2)
    return steps, {name: sum(seconds) for name, seconds in times.items()}


aten = torch.ops.aten
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of a tensor


class Product(NamedTuple):
    """A kind of matrix product: an operation on operands of this type, with these layouts."""

    op: torch._ops.OpOverload
    dtype: torch.dtype
    layouts: tuple[Layout, ...]  # of its operands

    def flops(self) -> int:
        """The number of multiplications and additions."""
        (a_shape, _), (b_shape, _) = self.layouts[-2:]
        return 2 * math.prod(a_shape) * b_shape[-1]


class CountProducts(TorchDispatchMode):
    """Counts the matrix products that run under it. A causal one counts as half of a full one."""

    def __init__(self):
        super().__init__()
        self.count: Counter[Product] = Counter()

    def add(self, op, operands: tuple[Tensor, ...], times: float) -> None:
        layouts = tuple((tuple(x.shape), x.stride()) for x in operands)
        self.count[Product(op, operands[-1].dtype, layouts)] += times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default):
            self.add(func, args, 1)
        elif func.__name__.startswith("_scaled_dot_product"):
            # The first argument has the shape of q, (R, H, T, d). Backward it is a gradient.
            q = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta").flatten(0, 1)
            A = q.new_empty(*q.shape[:2], q.shape[1])  # (R*H, T, T)
            # The forward pass has Q K^T and A V, the backward pass dA, dV, dQ and dK. Each counts
            # half, as the mask is causal.
            is_backward = "backward" in func.__name__
            self.add(aten.bmm.default, (q, q.mT), 0.5)
            self.add(aten.bmm.default, (A, q), 1.5 if is_backward else 0.5)
        return func(*args, **kwargs)


def products_of(step: Step) -> Counter[Product]:
    """How often a training step makes each matrix product."""
    with CountProducts() as products:
        step()
    return products.count


def gflop(count: Counter[Product]) -> float:
    """The work of all these products in 10^9 operations."""
    return sum(times * product.flops() for product, times in count.items()) / 1e9


def train_steps(setup: Setup) -> dict:
    """Measure the tokens/s of whole training steps: forward, backward, clipping, AdamW."""
    found = contenders(setup, others=True)
    work = {name: gflop(products_of(found[name].step)) for name in ("LM2", "Llama")}
    steps, warm_up_seconds = warm_up(setup, found)
    times = setup.alternate(steps, setup.rounds)
    n_tokens = setup.rows * setup.tokens
    print(
        f"\ntrain: whole steps; attention sees {setup.cfg.segment_len} tokens, "
        f"if full {setup.tokens:,}"
    )
    print(f"{'':20}{'M params':>9}{'warm-up s':>11}{'step s':>9}{'tokens/s [least, most]':>28}")
    for name, seconds in times.items():
        n_params = sum(p.numel() for p in found[name].model.parameters())
        median = statistics.median(seconds)
        rates = n_tokens / median, n_tokens / max(seconds), n_tokens / min(seconds)
        print(
            f"{name:20}{n_params / 1e6:9.2f}{warm_up_seconds[name]:11.2f}{median:9.3f}"
            f"{shown(rates, ',.0f'):>28}"
        )
    ratios = {}
    for a, b in (
        ("LM2", "Llama"),
        ("neural memory", "Llama"),
        ("RMT", "Llama"),
        ("RMT, projection", "Llama"),
        ("Llama", "plain PyTorch"),
        ("Llama", "transformers"),
        ("Llama, full", "transformers, full"),
    ):
        if b in times:
            ratios[f"{a} / {b}"] = ratio(times[b], times[a])
    print(
        "tokens/s [least, greatest]; the matrix products of LM2 and the Llama, "
        f"{work['LM2']:.1f} and\n{work['Llama']:.1f} GFLOP a step, would allow LM2 / Llama "
        f"{work['Llama'] / work['LM2']:.2f}"
    )
    for name, spread in ratios.items():
        print(f"  {name:40}{shown(spread)}")
    if "transformers" not in times:
        print("  transformers is not installed: no rows of it")
    return dict(seconds=times, warm_up=warm_up_seconds, ratios=ratios, gflop=work)


def random_operand(layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers in a tensor of this shape and these strides."""
    shape, strides = layout
    size = 1
    for n, stride in zip(shape, strides, strict=True):
        size += (n - 1) * stride
    return torch.randn(size, dtype=dtype, device=device).as_strided(shape, strides)


def repeated(setup: Setup, product: Product) -> tuple[Callable[[], None], int]:
    """A call that makes a product again and again for about 20 ms, and how often it does so."""
    operands = []
    for layout in product.layouts:
        operands.append(random_operand(layout, product.dtype, setup.device))

    def call(times: int) -> None:
        for _ in range(times):
            product.op(*operands)

    tries = [setup.seconds(partial(call, 3)) for _ in range(3)]
    once = min(tries) / 3
    goal = 0.002 if setup.quick else 0.02
    times = math.ceil(goal / once)
    return partial(call, times), times


def products(setup: Setup) -> dict:
    """Measure the utilisation of a step. It is the time that the step's matrix products take when
    each is timed alone, divided by the time of the step."""
    found = contenders(setup)
    counts = {name: products_of(contender.step) for name, contender in found.items()}
    if setup.quick:
        n = 256
    elif setup.on_cuda:
        n = 8192
    else:
        n = 2048
    dtype = torch.bfloat16 if setup.on_cuda else torch.float32
    n_by_n = (n, n), (n, 1)
    square = Product(aten.mm.default, dtype, (n_by_n, n_by_n))
    calls, _ = warm_up(setup, found)
    repeats = {}
    for product in {square, *counts["LM2"], *counts["Llama"]}:
        calls[product], repeats[product] = repeated(setup, product)
    times = setup.alternate(calls, setup.rounds)
    alone = {}  # seconds of a product
    for product, repeat in repeats.items():
        alone[product] = statistics.median(times[product]) / repeat
    print(
        f"\nproducts: {len(repeats) - 1} distinct matrix products, each timed alone, "
        "by the step's seconds"
    )
    print(f"{'':20}{'GFLOP':>9}{'alone s':>11}{'GFLOP/s':>10}{'step s':>9}{'utilisation':>14}")
    figures = {}
    for name, count in counts.items():
        ideal = sum(how_often * alone[product] for product, how_often in count.items())
        step = statistics.median(times[name])
        work = gflop(count)
        figures[name] = dict(gflop=work, alone=ideal, step=times[name], utilisation=ideal / step)
        print(
            f"{name:20}{work:9.2f}{ideal:11.4f}{work / ideal:10,.0f}{step:9.4f}{ideal / step:14.2f}"
        )
    peak = square.flops() / alone[square] / 1e9
    bound = figures["Llama"]["alone"] / figures["LM2"]["alone"]
    label = f"{n} x {n}"
    print(f"{label:20}{square.flops() / 1e9:9.2f}{alone[square]:11.4f}{peak:10,.0f}")
    print(f"alone they would allow LM2 / Llama {bound:.2f}")
    return dict(figures, square_gflops=peak, bound=bound)


@torch.no_grad()
def read_alone(setup: Setup, length: int) -> tuple[int, int]:
    """The peak memory in bytes once the model has seen a token, and once it has read a document.
    Both are without the ids of the document."""
    peak = torch.cuda.max_memory_allocated if setup.on_cuda else peak_memory
    model = setup.reader()
    document = setup.document(length)
    model(document[:, :1])  # `read` would keep the id and not run the model
    before = peak()
    model.read(document)
    return before - document.nbytes, peak() - document.nbytes


def read_in_a_process_of_its_own(setup: Setup, length: int) -> tuple[int, int]:
    """What `read_alone` returns in a process of its own. A peak never falls, so that no process can
    measure two."""
    command = [sys.executable, __file__, "--read_alone", str(length)]
    command += ["--device", str(setup.device), "--threads", str(torch.get_num_threads())]
    command += ["--preset", setup.preset]
    if setup.quick:
        command.append("--quick")
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    before, peak = json.loads(output)
    return before, peak


def read(setup: Setup) -> dict:
    """Measure the time and the peak memory of LM2.read on documents of growing length."""
    lengths = [1000, 4000, 16_000]
    if not setup.quick:
        lengths += [64_000, 256_000, 1_000_000]
    memory = {length: read_in_a_process_of_its_own(setup, length) for length in lengths}
    model = setup.reader()
    documents = {length: setup.document(length) for length in lengths}
    tries = [setup.seconds(partial(model.read, documents[4000])) for _ in range(3)]
    seconds_a_token = min(tries) / 4000
    goal = 0.1 if setup.quick else 1.0  # seconds, so that short documents are read several times
    repeats = {length: math.ceil(goal / (length * seconds_a_token)) for length in lengths}

    def read_repeatedly(length: int) -> None:
        for _ in range(repeats[length]):
            model.read(documents[length])

    calls = {length: partial(read_repeatedly, length) for length in lengths}
    times = {}
    for length, seconds in setup.alternate(calls, min(3, setup.rounds)).items():
        times[length] = [x / repeats[length] for x in seconds]
    what = "allocated on the device" if setup.on_cuda else "resident set"
    print(
        f"\nread: {model.n_params()[0]:,} parameters, segments of {model.cfg.segment_len}, "
        f"batch 1. Peak: {what}\n"
        "of a process of its own, less the document's ids; grown: since it had read a token"
    )
    print(f"{'tokens':20}{'s':>9}{'us/token':>11}{'peak MiB':>10}{'grown MiB':>11}")
    for length, (before, peak) in memory.items():
        median = statistics.median(times[length])
        print(
            f"{length_name(length):20}{median:9.3f}{1e6 * median / length:11.1f}"
            f"{peak / 2**20:10.1f}{(peak - before) / 2**20:11.1f}"
        )
    short = lengths[0]
    middle = lengths[len(lengths) // 2]
    long = lengths[-1]
    slower = ratio(times[long], times[middle])
    larger = memory[long][1] / memory[short][1]
    print(
        f"{length_name(long)} / {length_name(middle)}: time {shown(slower)}, "
        f"tokens {long / middle:.1f}; "
        f"{length_name(long)} / {length_name(short)}: peak {larger:.3f}"
    )
    return dict(seconds=times, memory=memory, time_ratio=slower, memory_ratio=larger)


def generate(setup: Setup) -> dict:
    """Measure the tokens/s of greedy generation after a short and after a long document. They take
    turns after each segment."""
    model = setup.reader()
    rounds = setup.rounds if setup.quick else 4 * setup.rounds
    S = model.cfg.segment_len
    short, long = (100, 1000) if setup.quick else (1000, 128_000)

    def next_segment(stream) -> None:
        for new in itertools.islice(stream, S):
            new.item()  # This waits for the device, as everybody does who prints a token.

    calls = {}
    for length in (short, long):
        stream = model.stream(setup.document(length), (rounds + 2) * S)
        calls[length_name(length)] = partial(next_segment, stream)
    setup.alternate(calls, 1)  # This reads the documents, too.
    times = setup.alternate(calls, rounds)
    print(f"\ngenerate: greedy, the median of {rounds} segments of {S} tokens")
    print(f"{'tokens before':20}{'tokens/s':>9}{'ms/token':>11}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:20}{S / median:9,.1f}{1e3 * median / S:11.3f}")
    rates = ratio(times[length_name(short)], times[length_name(long)])
    print(f"{length_name(long)} / {length_name(short)}: tokens/s {shown(rates)}")
    return dict(seconds=times, tokens=S, ratio=rates)


def batches(setup: Setup) -> dict:
    """Measure how fast training batches are made, and what share of the time this takes beside the
    steps of the default model on them."""
    c = train.TrainConfig(batch_size=4) if setup.quick else train.TrainConfig()
    model = LM2(LM2Config(**PRESETS[c.preset])).to(setup.device)
    lessons = train.make_story_data(c, load(), model.cfg.segment_len).batches
    numbers = itertools.count()
    batches_a_round = 1 if setup.quick else 4

    def make(stage: Stage) -> list[Batch]:
        made = []
        for number in itertools.islice(numbers, batches_a_round):
            _, batch = lessons[stage, number]
            made.append(batch)
        return made

    def loss_of(batch: Batch, segment_len: int) -> Tensor:
        _, loss, _ = model(batch.idx, batch.targets, at=batch.at, segment_len=segment_len)
        return loss

    def take_steps(step: Step, stage: Stage, made: list[Batch]) -> None:
        for batch in made:
            step(batch.to(setup.device), stage.segment_len)

    print(
        "\ndata: making the default batches, and steps of "
        f"{model.n_params()[0]:,} parameters on them"
    )
    heads = f"{'documents/s':>13}{'tokens/s':>12}{'step tokens/s':>15}{'share in %':>12}"
    print(f"{'stage':24}{heads}")
    middle = len(c.stages) // 2
    figures = {}
    for text in (c.stages[0], c.stages[middle], c.stages[-1]):
        stage = parse_stage(text, model.cfg.segment_len)
        step = setup.training_step(model, loss_of)
        take_steps(step, stage, make(stage))  # The first steps are slow and do not count.
        making = 0.0
        stepping = 0.0
        n_documents = 0
        n_tokens = 0
        for _ in range(setup.rounds):
            start = setup.clock()
            made = make(stage)
            making += setup.clock() - start
            stepping += setup.seconds(partial(take_steps, step, stage, made))
            for batch in made:
                n_documents += len(batch.idx)
                n_tokens += batch.idx.numel()
        figures[str(stage)] = dict(
            making=making, stepping=stepping, documents=n_documents, tokens=n_tokens
        )
        print(
            f"{str(stage):24}{n_documents / making:13,.0f}{n_tokens / making:12,.0f}"
            f"{n_tokens / stepping:15,.0f}{100 * making / (making + stepping):12.2f}"
        )
    return figures


def profile(setup: Setup) -> dict:
    """Show the 25 operations that take most of a training step. The time of an operation is without
    that of the operations that it calls."""
    steps, _ = warm_up(setup, contenders(setup))
    key = "self_device_time_total" if setup.on_cuda else "self_cpu_time_total"
    # Take a gigabyte and free it at once. The profiler's notes need memory, and without this the
    # step would pay for getting it from the system.
    torch.ones(2**28)
    figures = {}
    for name, step in steps.items():
        with torch.profiler.profile() as profiler:  # It sees the CPU, and CUDA if that is here.
            setup.seconds(step)
        rows = []
        for event in profiler.key_averages():
            if event.device_type == torch.autograd.DeviceType.CPU:
                rows.append((getattr(event, key) / 1e3, event.count, event.key))
        rows.sort(reverse=True)
        total = sum(ms for ms, _, _ in rows)
        print(f"\n{name}: {total:.1f} ms on {setup.device}")
        print(f"{'operation':60}{'ms':>12}{'%':>8}{'calls':>8}")
        for ms, count, operation in rows[:25]:
            print(f"{operation[:59]:60}{ms:12.2f}{100 * ms / total:8.1f}{count:8d}")
        figures[name] = rows
    return figures


PARTS = dict(train=train_steps, products=products, read=read, generate=generate, data=batches)


def machine(setup: Setup) -> str:
    """One line about what the figures were measured on."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.split(": ")[1]
                break
    where = "float32"
    if setup.on_cuda:
        where = f"{torch.cuda.get_device_name(setup.device)}, bfloat16"
    n_threads = torch.get_num_threads()
    return f"{processor}, {n_threads} threads, PyTorch {torch.__version__}, {where}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--parts",
        nargs="+",
        default=list(PARTS),
        choices=PARTS,
        metavar="PART",
        help=f"Measure these parts: {', '.join(PARTS)} (default all).",
    )
    add("--quick", action="store_true", help="Use tiny sizes, to see that it runs (default off).")
    add(
        "--rounds",
        type=int,
        help="Make each measurement this number of times (default 5, with --quick 2).",
    )
    add(
        "--profile",
        action="store_true",
        help="Show what operations a training step spends its time on, instead of measuring the "
        "parts (default off).",
    )
    add(
        "--compile",
        action="store_true",
        help="Compile the training steps of train, products and --profile (default off).",
    )
    add(
        "--preset",
        default="cpu",
        choices=PRESETS,
        metavar="PRESET",
        help="On a CPU the model of this preset reads and generates (default cpu).",
    )
    add(
        "--device",
        default="auto",
        help="Compute on this device, cpu or cuda; auto takes CUDA if there is one (default auto).",
    )
    add(
        "--threads",
        type=int,
        default=0,
        help="Use this number of CPU threads; 0 leaves the choice to PyTorch (default 0).",
    )
    add("--out", help="Write the figures as JSON to this new file (default none).")
    add("--read_alone", type=int, help=SUPPRESS)  # `read` starts this script with it.
    args = parser.parse_args(argv)
    rounds = args.rounds
    if rounds is None:
        rounds = 2 if args.quick else 5
    keep_freed_memory()
    with one_line("bench.py"):
        if rounds < 1:
            raise ValueError(f"--rounds {rounds} must be at least 1")
        if args.threads < 0:
            raise ValueError(f"--threads {args.threads} must be at least 0")
        if args.out:
            out = Path(args.out)
            if out.exists() or not out.absolute().parent.is_dir():
                raise ValueError(f"--out {out}: name a new file in a folder that is there")
        device = pick_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        sizes, rows, tokens = STEPS["quick" if args.quick else device.type]
        cfg = LM2Config(**sizes)
        setup = Setup(device, cfg, rows, tokens, rounds, args.compile, args.quick, args.preset)
        if args.read_alone:
            print(json.dumps(read_alone(setup, args.read_alone)))
            return
        with torch.device("meta"):
            n_params, n_memory = LM2(cfg).n_params()
        shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
        print(machine(setup))
        print(textwrap.fill(f"training steps of {rows} x {tokens:,} tokens; {shape}", 80))
        compiled = ", compiled" if args.compile else ""
        print(
            f"LM2 {n_params:,} parameters, {n_memory:,} of them memory; {rounds} rounds{compiled}",
            flush=True,
        )
        figures = dict(
            machine=machine(setup),
            sizes=sizes,
            rows=rows,
            tokens=tokens,
            rounds=rounds,
            compiled=args.compile,
        )
        if args.profile:
            figures["profile"] = profile(setup)
        else:
            for name in dict.fromkeys(args.parts):
                figures[name] = PARTS[name](setup)
                sys.stdout.flush()
        if args.out:
            save_json(figures, args.out)


if __name__ == "__main__":
    main()
