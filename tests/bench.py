"""Speed and memory of this implementation, beside Llamas of the same sizes: one process, alternating runs.

    python tests/bench.py --quick --threads 1     # tiny sizes, seconds: it runs, its figures mean nothing
    python tests/bench.py                         # everything, minutes on two CPU cores
    python tests/bench.py --parts train products  # some of it: train, products, read, generate, data
    python tests/bench.py --profile               # where a training step's time goes
    python tests/bench.py --compile --parts train # compiled training steps: on a CPU minutes until they are

Writes nothing but the figures, as JSON, to --out if that is given. Every round runs each contender once, and
starts with another one: a machine that slows down slows all of them. Figures are medians over the rounds;
ratios are taken within a round, the least and the greatest in brackets. pytest does not collect this file.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tests/bench.py`

import train  # noqa: E402
from data.babilong import Builder  # noqa: E402
from data.batches import Maker, Stage  # noqa: E402
from data.cli import Parser, one_line, save_json  # noqa: E402
from data.device import compile_blocks, keep_freed_memory, peak_memory, pick_device  # noqa: E402
from data.document import length_name  # noqa: E402
from data.tokenizer import load  # noqa: E402
from data.recipes import PRESETS  # noqa: E402
from lm2 import LM2, LM2Config  # noqa: E402

# Of training steps: the model and B rows of T tokens. Without memory "cuda" is as large as GPT-2 small.
SIZES: dict[str, tuple[dict, int, int]] = {
    "quick": (dict(vocab_size=256, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, ffn_dim=176, segment_len=32,
                   n_slot=8, n_mem_head=2), 2, 128),
    "cpu": (dict(vocab_size=2048, n_layer=4, n_head=8, n_kv_head=8, n_embd=512, ffn_dim=1408, n_slot=64,
                 segment_len=256, n_mem_head=8), 2, 1024),
    "cuda": (dict(vocab_size=50304, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, ffn_dim=2048, n_slot=64,
                  segment_len=512, n_mem_head=12, tie_embeddings=True), 4, 4096)}
aten, median = torch.ops.aten, statistics.median


@dataclass(frozen=True)
class Setup:
    """What the parts share."""
    device: torch.device
    cfg: LM2Config                      # of training steps
    rows: int                           # B
    tokens: int                         # T
    rounds: int                         # of each measurement
    compile: bool                       # training steps of compiled blocks
    quick: bool                         # tiny sizes

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def clock(self) -> float:
        """Seconds, when all work given to the device so far is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, call: Callable) -> float:
        start = self.clock()
        call()
        return self.clock() - start

    def alternate(self, calls: dict, rounds: int) -> dict:
        """{name: call} -> {name: seconds, one a round}"""
        names, times = list(calls), {name: [] for name in calls}
        for r in range(rounds):
            first = r % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self.seconds(calls[name]))
        return times

    def training_step(self, model: nn.Module, loss: Callable[..., Tensor]) -> Callable:
        """Forward, backward, clipping and AdamW as in train.py; float32, on CUDA bfloat16 by autocast."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(*batch):
            with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
                value = loss(*batch)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step

    def reader(self) -> LM2:
        """The model that reads and generates: the default one, on CUDA that of the training steps."""
        torch.manual_seed(0)
        model = LM2(self.cfg if self.cuda else LM2Config(**PRESETS["cpu"]))
        return model.to(self.device, torch.bfloat16 if self.cuda else torch.float32).eval()

    def document(self, length: int) -> Tensor:
        """(1, length) random ids, fewer than any vocabulary here has"""
        return torch.randint(256, (1, length), device=self.device)


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(median, least, greatest) of a / b, round by round."""
    each = [x / y for x, y in zip(a, b)]
    return median(each), min(each), max(each)


def spread(r: tuple[float, float, float], form: str = ".2f") -> str:
    return f"{r[0]:{form}} [{r[1]:{form}}, {r[2]:{form}}]"


class PlainLlama(nn.Module):
    """The reference: a Llama of PyTorch's own functions, with no state, no segments and no options."""
    def __init__(self, cfg: LM2Config):
        super().__init__()
        D, self.n_head = cfg.n_embd, cfg.n_head
        shapes = dict(q=(D, D), k=(D, D), v=(D, D), o=(D, D), w1=(D, cfg.ffn_dim), w3=(D, cfg.ffn_dim),
                      w2=(cfg.ffn_dim, D))
        self.blocks = nn.ModuleList(nn.ModuleDict(
            {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
            | {name: nn.RMSNorm(D, cfg.norm_eps) for name in ("norm1", "norm2")}) for _ in range(cfg.n_layer))
        self.embedding, self.norm = nn.Embedding(cfg.vocab_size, D), nn.RMSNorm(D, cfg.norm_eps)
        self.output = nn.Linear(D, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.output.weight = self.embedding.weight
        freq = cfg.rope_theta ** (-torch.arange(0, D // cfg.n_head, 2) * cfg.n_head / D)
        angle = torch.outer(torch.arange(cfg.segment_len), freq).repeat(1, 2)       # (T, D/H)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turn(self, x: Tensor) -> Tensor:
        """RoPE: x (R, H, T, D/H); angle i turns channels i and D/H/2 + i."""
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-b, a), dim=-1) * self.sin

    def forward(self, idx: Tensor) -> Tensor:
        """idx (R, T) -> logits (R, T, V)"""
        x = self.embedding(idx)
        for b in self.blocks:
            h = b["norm1"](x)
            q, k, v = (b[name](h).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for name in "qkv")
            y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
            x = x + b["o"](y.transpose(1, 2).flatten(-2))                           # (R, T, D)
            h = b["norm2"](x)
            x = x + b["w2"](F.silu(b["w1"](h)) * b["w3"](h))
        return self.output(self.norm(x))


def contenders(s: Setup, others: bool = False) -> dict[str, tuple[nn.Module, Callable]]:
    """{name: (model, its training step)}, all on the same B x T tokens with a target each."""
    torch.manual_seed(0)
    ids = torch.randint(s.cfg.vocab_size, (s.rows, s.tokens + 1), device=s.device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()                        # (B, T)
    llama = replace(s.cfg, n_mem_layer=0)
    full, rows, found = replace(llama, segment_len=s.tokens), x.view(-1, s.cfg.segment_len), {}

    def enter(name: str, model: nn.Module, idx: Tensor | None = None) -> None:
        model = model.to(s.device).train()

        def loss() -> Tensor:
            if idx is None:
                return model(x, y)[1]
            out = model(idx)
            logits = out if isinstance(out, Tensor) else out.logits
            return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())      # as in lm2.py
        found[name] = model, s.training_step(model, loss)

    enter("LM2", LM2(s.cfg))
    enter("Llama", LM2(llama))
    if others:
        enter("Llama, full", LM2(full))
        enter("plain PyTorch", PlainLlama(llama), rows)
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            return found
        for name, c, idx in (("transformers", llama, rows), ("transformers, full", full, x)):
            enter(name, LlamaForCausalLM(LlamaConfig(
                vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim, use_cache=False,
                num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
                max_position_embeddings=c.segment_len, rms_norm_eps=c.norm_eps, attn_implementation="sdpa",
                tie_word_embeddings=c.tie_embeddings)), idx)
    return found


def warm_up(s: Setup, found: dict) -> tuple[dict, dict]:
    """Two steps each, compiled first if that is asked for -> {name: step}, {name: seconds of both}."""
    if s.compile:
        torch.compiler.reset()  # what an earlier part compiled counts towards the limit of recompilations
        for model, _ in found.values():
            compile_blocks(model)
    steps = {name: step for name, (_, step) in found.items()}
    return steps, {name: sum(t) for name, t in s.alternate(steps, 2).items()}


class Products(TorchDispatchMode):
    """Counts the matrix products that run under it: {(operation, dtype, shapes and strides): how often}."""
    def __init__(self):
        super().__init__()
        self.count: Counter = Counter()

    def add(self, op, operands: tuple[Tensor, ...], n: float) -> None:
        self.count[op, operands[-1].dtype, tuple((tuple(x.shape), x.stride()) for x in operands)] += n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default):
            self.add(func, args, 1)
        elif func.__name__.startswith("_scaled_dot_product"):  # q, or backward its gradient, (R, H, T, d)
            q = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta").flatten(0, 1)
            A = q.new_empty(*q.shape[:2], q.shape[1])                               # (R*H, T, T)
            # halves, as the mask is causal: forward Q K^T and A V, backward dA and then dV, dQ, dK
            self.add(aten.bmm.default, (q, q.mT), 0.5)
            self.add(aten.bmm.default, (A, q), 1.5 if "backward" in func.__name__ else 0.5)
        return func(*args, **(kwargs or {}))


def record(step: Callable) -> Counter:
    with Products() as products:
        step()
    return products.count


def flops(product: tuple) -> int:
    """A multiplication and an addition count as two."""
    (a, _), (b, _) = product[2][-2:]
    return 2 * math.prod(a) * b[-1]


def gflop(count: Counter) -> float:
    return sum(n * flops(product) for product, n in count.items()) / 1e9


def train_steps(s: Setup) -> dict:
    """Tokens/s of whole training steps: forward, backward, clipping, AdamW."""
    found = contenders(s, others=True)
    work = {name: gflop(record(found[name][1])) for name in ("LM2", "Llama")}
    steps, warm = warm_up(s, found)
    times, n = s.alternate(steps, s.rounds), s.rows * s.tokens
    print(f"\ntrain: whole steps; attention sees {s.cfg.segment_len} tokens, if full {s.tokens:,}\n"
          f"{'':20}{'M params':>9}{'warm-up s':>11}{'step s':>9}{'tokens/s [least, most]':>28}")
    for name, t in times.items():
        params = sum(p.numel() for p in found[name][0].parameters()) / 1e6
        print(f"{name:20}{params:9.2f}{warm[name]:11.2f}{median(t):9.3f}"
              f"{spread((n / median(t), n / max(t), n / min(t)), ',.0f'):>28}")
    pairs = [("LM2", "Llama"), ("Llama", "plain PyTorch"), ("Llama", "transformers"),
             ("Llama, full", "transformers, full")]
    ratios = {f"{a} / {b}": ratio(times[b], times[a]) for a, b in pairs if b in times}
    print(f"tokens/s [least, greatest]; the matrix products of LM2 and the Llama, {work['LM2']:.1f} and\n"
          f"{work['Llama']:.1f} GFLOP a step, would allow LM2 / Llama {work['Llama'] / work['LM2']:.2f}")
    for name, r in ratios.items():
        print(f"  {name:40}{spread(r)}")
    if "transformers" not in times:
        print("  transformers is not installed: no rows of it")
    return dict(seconds=times, warm_up=warm, ratios=ratios, gflop=work)


def products(s: Setup) -> dict:
    """Utilisation: what a step's matrix products take when each is timed alone, by what the step takes."""
    found = contenders(s)
    counts = {name: record(step) for name, (_, step) in found.items()}
    n, dtype = 256 if s.quick else 8192 if s.cuda else 2048, torch.bfloat16 if s.cuda else torch.float32
    square = (aten.mm.default, dtype, (((n, n), (n, 1)),) * 2)
    calls, often = warm_up(s, found)[0], {}
    for product in {square, *counts["LM2"], *counts["Llama"]}:
        op, dtype, layouts = product
        sizes = [1 + sum((n - 1) * step for n, step in zip(*layout)) for layout in layouts]
        operands = [torch.randn(size, dtype=dtype, device=s.device).as_strided(*layout)
                    for size, layout in zip(sizes, layouts)]

        def call(product=product, op=op, operands=operands):
            for _ in range(often[product]):
                op(*operands)
        often[product] = 3
        once = min(s.seconds(call) for _ in range(3)) / 3
        often[product] = math.ceil((0.002 if s.quick else 0.02) / once)              # to take 20 ms
        calls[product] = call
    times = s.alternate(calls, s.rounds)
    alone = {product: median(times[product]) / k for product, k in often.items()}
    print(f"\nproducts: {len(often) - 1} distinct matrix products, each timed alone, by the step's seconds\n"
          f"{'':20}{'GFLOP':>9}{'alone s':>11}{'GFLOP/s':>10}{'step s':>9}{'utilisation':>14}")
    figures = {}
    for name, count in counts.items():
        ideal, step, work = sum(k * alone[p] for p, k in count.items()), median(times[name]), gflop(count)
        figures[name] = dict(gflop=work, alone=ideal, step=times[name], utilisation=ideal / step)
        print(f"{name:20}{work:9.2f}{ideal:11.4f}{work / ideal:10,.0f}{step:9.4f}{ideal / step:14.2f}")
    peak, bound = flops(square) / alone[square] / 1e9, figures["Llama"]["alone"] / figures["LM2"]["alone"]
    print(f"{f'{n} x {n}':20}{flops(square) / 1e9:9.2f}{alone[square]:11.4f}{peak:10,.0f}\n"
          f"alone they would allow LM2 / Llama {bound:.2f}")
    return dict(figures, square_gflops=peak, bound=bound)


def read_alone(s: Setup, length: int) -> tuple[int, int]:
    """Peak memory in bytes, the document apart: (model in place and one token read, document read)."""
    peak = torch.cuda.max_memory_allocated if s.cuda else peak_memory
    model, document = s.reader(), s.document(length)
    model.read(document[:, :1])
    before = peak()
    model.read(document)
    return before - document.nbytes, peak() - document.nbytes


def read(s: Setup) -> dict:
    """Seconds and peak memory of LM2.read on documents of growing length."""
    lengths = [1000, 4000, 16_000] if s.quick else [1000, 4000, 16_000, 64_000, 256_000, 1_000_000]
    memory, model, often = {}, s.reader(), {}
    for n in lengths:  # a process each: a peak never falls
        command = [sys.executable, __file__, "--read_alone", str(n), "--device", str(s.device),
                   "--threads", str(torch.get_num_threads()), *["--quick"] * s.quick]
        memory[n] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    documents = {n: s.document(n) for n in lengths}
    second = min(s.seconds(lambda: model.read(documents[4000])) for _ in range(3)) / 4000   # a token's, about
    often = {n: math.ceil((0.1 if s.quick else 1) / (n * second)) for n in lengths}
    calls = {n: lambda n=n: [model.read(documents[n]) for _ in range(often[n])] for n in lengths}
    times = {n: [x / often[n] for x in t] for n, t in s.alternate(calls, min(3, s.rounds)).items()}
    print(f"\nread: {model.n_params()[0]:,} parameters, segments of {model.cfg.segment_len}, batch 1. Peak: "
          f"{'allocated on the device' if s.cuda else 'resident set'}\nof a process of its own, less the "
          f"document's ids; grown: since it had read a token\n"
          f"{'tokens':20}{'s':>9}{'us/token':>11}{'peak MiB':>10}{'grown MiB':>11}")
    for n, (before, peak) in memory.items():
        t = median(times[n])
        print(f"{length_name(n):20}{t:9.3f}{1e6 * t / n:11.1f}{peak / 2**20:10.1f}"
              f"{(peak - before) / 2**20:11.1f}")
    short, middle, long = lengths[0], lengths[len(lengths) // 2], lengths[-1]
    slower, larger = ratio(times[long], times[middle]), memory[long][1] / memory[short][1]
    print(f"{length_name(long)} / {length_name(middle)}: time {spread(slower)}, tokens {long / middle:.1f}; "
          f"{length_name(long)} / {length_name(short)}: peak {larger:.3f}")
    return dict(seconds=times, memory=memory, time_ratio=slower, memory_ratio=larger)


def generate(s: Setup) -> dict:
    """Tokens/s of cached greedy generation behind a short and a long document, a segment of each in turn."""
    model, rounds = s.reader(), s.rounds if s.quick else 4 * s.rounds
    S, lengths = model.cfg.segment_len, (100, 1000) if s.quick else (1000, 128_000)
    streams = {length_name(n): model.stream(s.document(n), (rounds + 2) * S) for n in lengths}
    calls = {name: lambda x=x: [new.item() for new in itertools.islice(x, S)] for name, x in streams.items()}
    s.alternate(calls, 1)                                                           # reads the document, too
    times = s.alternate(calls, rounds)
    print(f"\ngenerate: greedy, the median of {rounds} segments of {S} tokens\n"
          f"{'tokens before':20}{'tokens/s':>9}{'ms/token':>11}")
    for name, t in times.items():
        print(f"{name:20}{S / median(t):9,.1f}{1e3 * median(t) / S:11.3f}")
    short, long = times
    rates = ratio(times[short], times[long])
    print(f"{long} / {short}: tokens/s {spread(rates)}")
    return dict(seconds=times, tokens=S, ratio=rates)


def batches(s: Setup) -> dict:
    """Speed of making training batches, and its share of a step of the default model on them."""
    c, builder = train.TrainConfig(**dict(batch_size=4) if s.quick else {}), Builder(load(), "train")
    model = LM2(LM2Config(**PRESETS[c.preset] | dict(vocab_size=builder.tokenizer.n_vocab))).to(s.device)
    stages, figures, numbers = c.stages.split(), {}, itertools.count()
    maker = Maker(builder, tuple(c.tasks.split()), c.batch_size, c.batch_tokens, c.plain, c.asides,
                  c.seed, c.accumulate)
    print(f"\ndata: making the default batches, and steps of {model.n_params()[0]:,} parameters on them\n"
          f"{'stage':24}{'documents/s':>13}{'tokens/s':>12}{'step tokens/s':>15}{'share in %':>12}")
    for text in (stages[0], stages[len(stages) // 2], stages[-1]):
        stage, made, rows = Stage.parse(text, model.cfg.segment_len), [], []
        step = s.training_step(model, lambda batch: model(
            batch.idx, batch.targets, keep=batch.keep, segment_len=stage.segment_len)[1])

        def make():
            made[:] = [maker[stage, next(numbers)][1] for _ in range(1 if s.quick else 4)]

        def steps():
            for batch in made:
                step(batch.to(s.device))
        make(), steps()
        for _ in range(s.rounds):
            rows.append((s.seconds(make), s.seconds(steps), sum(len(batch.idx) for batch in made),
                         sum(batch.idx.numel() for batch in made)))
        making, stepping, documents, tokens = (sum(column) for column in zip(*rows))
        figures[str(stage)] = dict(making=making, stepping=stepping, documents=documents, tokens=tokens)
        print(f"{str(stage):24}{documents / making:13,.0f}{tokens / making:12,.0f}{tokens / stepping:15,.0f}"
              f"{100 * making / (making + stepping):12.2f}")
    return figures


def profile(s: Setup) -> dict:
    """The operations that take most of a training step, 25 each; their own time, not of those they call."""
    steps, figures = warm_up(s, contenders(s))[0], {}
    key = "self_device_time_total" if s.cuda else "self_cpu_time_total"
    torch.ones(2**28)  # a gigabyte, freed at once: else the profiler's notes make the step fetch new pages
    for name, step in steps.items():
        with torch.profiler.profile() as p:  # of the processor, and of CUDA where it is
            s.seconds(step)
        events = [x for x in p.key_averages() if x.device_type == torch.autograd.DeviceType.CPU]
        rows = sorted(((getattr(x, key) / 1e3, x.count, x.key) for x in events), reverse=True)
        total = sum(ms for ms, *_ in rows)
        print(f"\n{name}: {total:.1f} ms on {s.device}\n{'operation':60}{'ms':>12}{'%':>8}{'calls':>8}")
        for ms, count, op in rows[:25]:
            print(f"{op[:59]:60}{ms:12.2f}{100 * ms / total:8.1f}{count:8d}")
        figures[name] = rows
    return figures


PARTS = dict(train=train_steps, products=products, read=read, generate=generate, data=batches)


def machine(s: Setup) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.processor())
    where = f"{torch.cuda.get_device_name(s.device)}, bfloat16" if s.cuda else "float32"
    return f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, {where}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench.py", __doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART",
                        help=f"what to measure: {', '.join(PARTS)} (default all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes (default off)")
    parser.add_argument("--rounds", type=int, help="of each measurement (default 5, with --quick 2)")
    parser.add_argument("--profile", action="store_true",
                        help="instead of the parts: the operations of a training step (default off)")
    parser.add_argument("--compile", action="store_true",
                        help="training steps of train, products and --profile compiled (default off)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default 0: PyTorch's choice)")
    parser.add_argument("--out", help="new JSON file for the figures (default none)")
    parser.add_argument("--read_alone", type=int, help=SUPPRESS)  # what `read` starts for a length
    args = parser.parse_args(argv)
    rounds = (2 if args.quick else 5) if args.rounds is None else args.rounds
    keep_freed_memory()
    with one_line("bench.py"):
        for name, value, least in (("rounds", rounds, 1), ("threads", args.threads, 0)):
            if value < least:
                raise ValueError(f"--{name} {value} must be at least {least}")
        if args.out and (Path(args.out).exists() or not Path(args.out).absolute().parent.is_dir()):
            raise ValueError(f"--out {args.out}: name a new file in a folder that is there")
        device = pick_device(args.device)
        torch.set_num_threads(args.threads or torch.get_num_threads())
        sizes, rows, tokens = SIZES["quick" if args.quick else device.type]
        s = Setup(device, LM2Config(**sizes), rows, tokens, rounds, args.compile, args.quick)
        if args.read_alone:
            return print(json.dumps(read_alone(s, args.read_alone)))
        with torch.device("meta"):
            total, memory = LM2(s.cfg).n_params()
        shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
        shape = textwrap.fill(f"training steps of {rows} x {tokens:,} tokens; {shape}", 80)
        print(machine(s), shape, f"LM2 {total:,} parameters, {memory:,} of them memory; "
              f"{rounds} rounds{', compiled' * args.compile}", sep="\n", flush=True)
        figures = dict(machine=machine(s), sizes=sizes, rows=rows, tokens=tokens, rounds=rounds,
                       compiled=args.compile)
        for name in ["profile"] if args.profile else dict.fromkeys(args.parts):
            figures[name] = (PARTS | dict(profile=profile))[name](s)
            sys.stdout.flush()
        if args.out:
            save_json(figures, args.out)


if __name__ == "__main__":
    main()
