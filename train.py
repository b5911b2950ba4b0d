"""Train LM2 on BABILong documents made on the fly: few facts first, then prose, then many segments.

    python train.py --tokens 300000 --table_n 9 --out_dir out/quick  # a minute: it runs, it learns nothing
    python train.py                                         # the default model, minutes on two CPU cores
    python train.py --tokens 30000000 --minutes 20          # stops after 20 minutes, saves, evaluates ...
    python train.py --resume --minutes 20                   # ... and goes on where it stopped

Writes ckpt.pt, metrics.jsonl and, of the table of accuracy against length that it ends with, table.jsonl to
--out_dir. `python babilong_eval.py` and `python sample.py` read the checkpoint.
"""
import math
import random
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from babilong_eval import evaluate
from data import background
from data.babi import TASKS
from data.babilong import Builder
from data.batches import Batches, Curriculum, Maker, Stage
from data.cli import JsonLines, Parser, interrupts_kept, one_line
from data.device import (CudaGraphs, bfloat16_layers, check_compiler, compile_blocks, keep_freed_memory,
                         pick_device, run_eager)
from data.document import length_name, parse_length
from data.helpers import Helpers, add_gradients, help_step
from data.metrics import cells, table
from data.predictions import save
from data.recipes import PRESETS, knobs
from data.samples import check_cells, generated
from data.tokenizer import load, of_checkpoint
from lm2 import LM2, RMT, LM2Config, build_model, load_checkpoint, save_checkpoint

QA1_STAGES = "2:0 4:0 10:0 4:2:32 4:3:32 10:4:32 10:8:32 10:16:64 10:16 10:32"


@dataclass(frozen=True)
class TrainConfig:
    preset: str = "cpu"                 # sizes of data/recipes.py, else the recipe's; flags win over them
    recipe: str = "qa1"                 # of data/recipes.py, else the preset's: qa1, qa1-5, qa1-10[-hours]
    out_dir: str = "out"                # folder for ckpt.pt, metrics.jsonl and table.jsonl
    init: str | None = None             # checkpoint whose weights, sizes and recipe to start with; None: anew
    tasks: str = "qa1"                  # bAbI tasks to train on and to evaluate, with spaces between
    stages: str = QA1_STAGES            # facts:segments[:tokens a segment][@task,task]; 0 segments: no prose
    tokens: int = 16_000_000            # to train on at most, with padding; the rate ends at 0 there ...
    final_tokens: int = 1_500_000       # ... or after so many in the last stage, whichever comes first ...
    total_minutes: float | None = None  # ... or after so many minutes, with compiling, before --resume too
    whole: bool = False                 # a document is one segment, whatever its stage says: full attention
    batch_size: int = 16                # most documents in a micro-batch
    batch_tokens: int = 4096            # most tokens in a micro-batch: long documents come in smaller ones
    accumulate: int = 2                 # micro-batches a step
    processes: int | None = None        # that share them; None: one a thread if threads divide them, else 1
    asides: int = 3                     # at 1 to so many earlier points documents are asked too (batches.py)
    usual: float = 0.9                  # a story's most facts: this quantile over its task's own questions
    plain: float = 0.1                  # share of batches without background later on, so 0k is not forgotten
    leave_at: float = 0.9               # share right of its longest documents' answer tokens: ends a stage
    leave_plain_at: float = 0.95        # ... this share in stages without background ...
    leave_window: int = 16              # ... over so many of its latest steps, asked at log_every
    stage_steps: int = 1500             # ... or after so many steps
    lr: float = 2e-3                    # learning rate
    warmup: int = 100                   # steps from learning rate 0 to lr
    decay: float = 0.25                 # ... and share of the run over which it falls to 0 at the end
    weight_decay: float = 0.1           # of matrices, AdamW
    beta2: float = 0.98                 # AdamW; beta1 is 0.9
    clip: float = 1.0                   # longest gradient, norm over all parameters
    seed: int = 0                       # of the initial weights and of the data
    stories: str | None = None          # folder of original bAbI files; None: generated stories
    background: str | None = None       # folder of .txt files to hide facts in; None: Python's documentation
    device: str = "auto"                # auto, cpu or cuda
    threads: int = 0                    # CPU threads; 0 leaves PyTorch's choice
    workers: int | None = None          # processes that make batches ahead; None: 4 with CUDA, else 0
    compile: bool = False               # torch.compile: minutes at first, then faster; a CPU needs g++
    bfloat16: bool | None = None        # layers multiply in bfloat16; None: with CUDA alone. A CPU needs AMX
    graphs: bool = True                 # with CUDA: a micro-batch's gradient as one CUDA graph a shape
    recompute: bool = False             # activation checkpointing: less memory, a third more work
    minutes: float | None = None        # stop after so long, save and evaluate; --resume goes on
    log_every: int = 10                 # steps between lines of metrics.jsonl, at which stages may end
    eval_every: int = 4_000_000         # tokens between validations
    eval_n: int = 32                    # samples a length in a validation
    table_lengths: str = "0k 1k 2k 4k 8k 16k"  # of the table at the end, tokens of facts + background
    table_n: int = 200                  # samples a cell of that table

    def __post_init__(self):
        for name, low, high in (
                *((name, 1, math.inf) for name in "tokens final_tokens batch_size batch_tokens accumulate "
                  "leave_window stage_steps log_every eval_every eval_n table_n".split()),
                *((name, 0, 1) for name in "plain usual leave_at leave_plain_at".split()),
                *((name, 0, math.inf) for name in "weight_decay warmup minutes".split()),
                ("total_minutes", 0.01, math.inf), ("beta2", 0, 0.999999), ("decay", 1e-9, 1),
                ("lr", 1e-12, 1e3), ("clip", 1e-12, 1e12), ("asides", 0, 1000), ("seed", 0, 2**32 - 1),
                ("threads", 0, 4096), ("workers", 0, 256)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} {value} must lie between {low:g} and {high:g}")
        if self.processes is not None and (self.processes < 1 or self.accumulate % self.processes):
            raise ValueError(f"--processes {self.processes} must divide --accumulate {self.accumulate}")
        if self.stories and not Path(self.stories).is_dir():  # one file would be both train and val
            raise ValueError(f"--stories {self.stories} is no folder: name one with _train and _test files")
        for task in self.tasks.split() or [""]:
            if task not in TASKS:
                raise ValueError(f"--tasks {task!r} is unknown: choose from {' '.join(TASKS)}")


def learning_rate(c: TrainConfig, step: int, done: float) -> float:
    """At a step (from 0) and a share `done` of the whole run: a trapezoid."""
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup)) * min(1.0, max(0.0, 1 - done) / c.decay)


ANEW = ("out_dir minutes total_minutes device threads processes workers compile bfloat16 graphs recompute "
        "eval_every eval_n table_lengths table_n").split()


def read_flags(argv: list[str] | None) -> tuple[TrainConfig, dict, bool, dict]:
    """(training configuration, model sizes, whether to resume, flags given); ValueError for bad values."""
    parser = Parser("train.py", __doc__.split("\n")[0])
    parser.add_argument("--resume", action="store_true", help="go on from out_dir/ckpt.pt with its "
                        f"configuration; only {', '.join(ANEW)} may be given anew (default off)")
    parser.add_fields(TrainConfig)
    parser.add_fields(LM2Config, skip=("vocab_size", "rope_scaling"), shown=PRESETS["cpu"])
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    resume = given.pop("resume")
    own = {f.name: given[f.name] for f in fields(TrainConfig) if f.name in given}
    sizes, known = {k: v for k, v in given.items() if k not in own}, own
    if (init := given.get("init")) and not resume:
        if wrong := sorted(sizes) or ["preset"] * ("preset" in given):
            raise ValueError(f"--init {init} has sizes of its own: leave --{wrong[0]} out")
        model, content = load_checkpoint(init)
        sizes, known = asdict(model.cfg), content.get("train", {}) | own
        known["preset"] = known["preset"] if known.get("preset") in PRESETS else None   # one of an older file
    own |= dict(processes=None) if resume else {}       # they must divide the checkpoint's --accumulate
    c = TrainConfig(**knobs(known.get("recipe"), known.get("preset"), sizes) | own)
    return c, PRESETS[c.preset] | sizes, resume, given


def optimizer_groups(model: LM2 | RMT, weight_decay: float) -> list[dict]:
    """Two groups of parameters for AdamW: matrices decay, norms, biases and null scores do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


def add_gradient(model: LM2 | RMT, c: TrainConfig, segment_len: int, idx: Tensor, targets: Tensor,
                 keep: Tensor, words: Tensor) -> Tensor:
    """Add a micro-batch's gradient to the parameters'; of its answers' tokens (3,): loss, right, all. Nothing
    in it waits for the device."""
    answers = targets.flatten()[keep]
    with torch.autocast("cuda", torch.bfloat16, idx.is_cuda and c.bfloat16 is not False):
        logits, loss, _ = model(idx, answers, at=keep, segment_len=segment_len)
    (loss / c.accumulate).backward()
    right = ((logits.argmax(-1) == answers) & words).sum()
    return torch.stack([loss.detach() / c.accumulate, right, words.sum()])


class Trainer:
    """A run: what `save` writes (and under --total_minutes the clock) decides how it goes on: bit for bit on
    the same CPU."""

    def __init__(self, c: TrainConfig, sizes: dict, resume: bool, given: dict):
        self.ckpt = Path(c.out_dir, "ckpt.pt")
        if resume:
            if fixed := sorted(set(given) - set(ANEW)):
                raise ValueError(f"--resume takes --{fixed[0]} from the checkpoint: leave that flag out")
            self.model, saved = load_checkpoint(self.ckpt)
            self.tokenizer = of_checkpoint(saved, self.ckpt)
            if not {"train", "optimizer", "recent", "progress"} <= set(saved):
                raise ValueError(f"{self.ckpt} holds a model but no training to resume")
            if odd := {f.name for f in fields(TrainConfig)} ^ set(saved["train"]):
                raise ValueError(f"{self.ckpt} was written by a train.py of other flags "
                                 f"({', '.join(sorted(odd))}): train anew, or start from it with --init")
            c = TrainConfig(**saved["train"] | dict(minutes=None) | given)  # an earlier call's limit
        elif self.ckpt.parent.is_file():
            raise ValueError(f"--out_dir {c.out_dir} is a file: name a folder")
        elif self.ckpt.exists():
            raise ValueError(f"{self.ckpt} is there already: go on with --resume, or give another --out_dir")
        elif c.init:
            self.model, content = load_checkpoint(c.init)
            self.tokenizer = of_checkpoint(content, c.init)
        else:
            self.tokenizer = load()
            torch.manual_seed(c.seed)
            self.model = build_model(LM2Config(**sizes | dict(vocab_size=self.tokenizer.n_vocab)))
        self.c, self.device = c, pick_device(c.device)
        if c.compile:
            check_compiler(self.device)
        self.tasks = list(dict.fromkeys(c.tasks.split()))
        stages = Stage.parse_all(c.stages, self.model.cfg.segment_len, self.tasks, c.whole)
        self.course = Curriculum(stages, c.leave_at, c.leave_plain_at, c.leave_window, c.stage_steps)
        self.table_lengths = list(dict.fromkeys(map(parse_length, c.table_lengths.split())))
        if not self.table_lengths:
            raise ValueError("--table_lengths is empty: give some, such as 0k 4k")
        threads = c.threads or torch.get_num_threads()
        documents = background.documents(c.background)
        self.train_set, self.val_set = (Builder(self.tokenizer, part, c.background, documents, c.stories)
                                        for part in ("train", "val"))
        check_cells(generated(self.val_set, c.seed), self.tasks, self.table_lengths)
        for task in self.tasks:
            self.train_set.story(task, 2, random.Random(0))  # what is wrong with files shows before the start
        self.model.to(self.device)
        if self.device.type == "cpu" and c.bfloat16:
            bfloat16_layers(self.model)
        self.model.recompute = c.recompute
        self.optimizer = torch.optim.AdamW(optimizer_groups(self.model, c.weight_decay), lr=c.lr,
                                           betas=(0.9, c.beta2), fused=True)
        self.step, self.tokens, self.seconds, self.asked = 0, 0, 0.0, []
        self.end = min(c.tokens, c.final_tokens) if self.course.last else c.tokens
        if resume:
            self.optimizer.load_state_dict(saved["optimizer"])
            (self.step, self.tokens, self.end, self.course.at, self.course.steps,
             self.seconds) = saved["progress"]
            self.course.recent.extend(saved["recent"])
        cuda = self.device.type == "cuda"
        if cuda and given.get("processes", 1) > 1:
            raise ValueError(f"--processes {c.processes} share a CPU's work: leave it out on a GPU")
        self.processes = 1 if cuda else c.processes or (threads if c.accumulate % threads == 0 else 1)
        self.threads = threads, 1 if self.processes > 1 else threads  # to evaluate; to train
        maker = Maker(self.train_set, tuple(self.tasks), c.batch_size, c.batch_tokens, c.plain, c.asides,
                      c.seed, c.accumulate, c.usual)
        self.batches = Batches(maker, self.course.stage, self.step * c.accumulate,
                               4 * cuda if c.workers is None else c.workers, cuda, self.processes)
        self.helpers = Helpers(self.model, self.processes - 1, help_step,
                               (maker, self.processes, c, add_gradient))
        torch.set_num_threads(self.threads[1])
        if c.compile:
            compile_blocks(self.model, dynamic=True if cuda else None)
        self.add_gradient = CudaGraphs(add_gradient) if cuda and c.graphs else add_gradient
        for p in self.model.parameters() if cuda else ():
            p.grad = torch.zeros_like(p)        # graphs add to them where they are; what a batch does not
            #                                     use has a gradient of 0 there, with graphs or without
        self.pending: list[tuple] = []  # of each step since the last line: numbers still on the device
        self.ckpt.parent.mkdir(parents=True, exist_ok=True)
        self.metrics = JsonLines(self.ckpt.with_name("metrics.jsonl"), self.step if resume else None)

    def save(self) -> None:
        """Write the checkpoint. ValueError for a gradient that was not finite, OSError for a full disk."""
        if self.pending:
            self.collect()
        save_checkpoint(self.ckpt, self.model, tokenizer=self.tokenizer.ranks, train=asdict(self.c),
                        optimizer=self.optimizer.state_dict(), recent=list(self.course.recent),
                        progress=[self.step, self.tokens, self.end, self.course.at, self.course.steps,
                                  self.seconds])

    def close(self) -> None:
        """End the other processes, helpers and workers, and the log."""
        self.helpers.close()
        torch.set_num_threads(self.threads[0])
        self.batches.loader = None
        self.metrics.file.close()

    def log(self, **values) -> None:
        """A line of metrics.jsonl, with where the run stands."""
        self.metrics.write(step=self.step, tokens=self.tokens, seconds=round(self.seconds, 1), **values)

    def train_step(self) -> None:
        """One step of the optimiser on `accumulate` micro-batches. Nothing in it waits for the device, but
        where a graph is recorded: its numbers go to `pending`."""
        c, stage = self.c, self.course.stage
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, self.step, self.done)
        self.helpers.start((stage, self.step * c.accumulate))
        results = [add_gradients(self.model, self.batches, stage, c.accumulate // self.processes, c,
                                 self.device, self.add_gradient)]
        results += self.helpers.finish()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.device.type != "cuda")
        self.step, self.course.steps = self.step + 1, self.course.steps + 1
        self.tokens += sum(tokens for tokens, _, _ in results)
        loss, right, asked = sum(torch.as_tensor(numbers, device=self.device) for _, _, numbers in results)
        self.pending.append((results[0][1], torch.stack([norm, loss, right / asked])))

    def collect(self) -> dict:
        """Fetch the numbers of the pending steps: the mean loss and the last step's others. ValueError for a
        gradient that is not finite, before anything is saved."""
        values = torch.stack([numbers for _, numbers in self.pending]).tolist()
        first = self.step - len(values)
        for i, ((longest, _), (norm, _, accuracy)) in enumerate(zip(self.pending, values), first):
            if not math.isfinite(norm):
                raise ValueError(f"the gradient is {norm} at step {i}: train anew with a lower --lr")
            if longest:
                self.course.recent.append(accuracy)
        self.pending.clear()
        return dict(loss=sum(loss for _, loss, _ in values) / len(values), accuracy=accuracy,
                    stage=self.course.at, grad_norm=norm, lr=self.optimizer.param_groups[0]["lr"])

    @property
    def done(self) -> float:
        """The share of the run that lies behind: of its tokens, or of its minutes if those end first."""
        minutes = self.c.total_minutes or math.inf
        return max(self.tokens / self.end, self.seconds / (60 * minutes))

    def next_stage(self) -> None:
        """Enter the next stage if this one is learned or its steps are spent."""
        if line := self.course.advance():
            tqdm.write(f"{self.seconds:5.0f} s, {self.tokens / 1e6:4.1f} M tokens: {line}")
            self.batches.enter(self.course.stage)
            if self.course.last:    # the end is in sight
                self.end = min(self.end, self.tokens + self.c.final_tokens)

    def validate(self) -> dict:
        """Exact match on a fixed set of benchmark samples, the same every time."""
        lengths = [x for x in self.table_lengths if x <= 4000] or self.table_lengths[:1]
        found = cells(self.evaluate(lengths, self.c.eval_n, -1, ("on",)))
        return {f"{c['task']} {length_name(c['length'])}": round(c["exact"] / c["n"], 4) for c in found}

    def evaluate(self, lengths: list[int], n: int, seed: int, modes: tuple, show: bool = False) -> list[dict]:
        """Predictions on n validation samples a task and length, in modes of babilong_eval.py's --memory."""
        samples, work = generated(self.val_set, seed), [(t, x, n) for t in self.tasks for x in lengths]
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads[0])  # the helpers wait meanwhile
        with run_eager():
            rows = sum(evaluate(self.model, self.tokenizer, samples, work, modes,
                                name=self.model.cfg.kind, show=show), [])
        torch.set_num_threads(before)
        return rows

    def run(self) -> None:
        """Train to the end, or until it is asked to stop, which raises KeyboardInterrupt behind `save`."""
        c, began, before = self.c, time.perf_counter(), self.seconds
        bar = tqdm(total=None if c.total_minutes else c.tokens, initial=self.tokens, unit="tok",
                   unit_scale=True, disable=None, smoothing=0.05)
        validated, rates = self.tokens // c.eval_every, []
        while True:
            self.seconds = before + time.perf_counter() - began
            last = self.done >= 1 or c.minutes is not None and self.seconds - before >= 60 * c.minutes
            stopped = bool(self.asked)
            due = last or stopped or self.tokens // c.eval_every > validated
            if self.pending and (due or self.step % c.log_every == 0):
                numbers = self.collect()
                self.seconds = before + time.perf_counter() - began
                rates.append((self.tokens - logged[0]) / (self.seconds - logged[1]))
                self.log(**{k: round(v, 6) for k, v in numbers.items()}, tokens_per_second=round(rates[-1]))
                bar.set_postfix(loss=f"{numbers['loss']:.3f}", acc=f"{numbers['accuracy']:.2f}",
                                lr=f"{numbers['lr']:.1e}", stage=f"{self.course}")
                if self.step % c.log_every == 0:
                    self.next_stage()
            if due:
                self.save()  # first: who asks twice for an end does not wait for the validation
                validated = self.tokens // c.eval_every
                if stopped and not last:
                    raise KeyboardInterrupt
                if not last and not self.asked:
                    right = self.validate()
                    self.log(validation=right)
                    tqdm.write(f"{self.seconds:5.0f} s, {self.tokens / 1e6:4.1f} M tokens: validation "
                               + ", ".join(f"{cell} {100 * x:.0f} %" for cell, x in right.items()))
            if last:
                break
            if not self.pending:  # a line was written: the next one's rate counts from here
                logged = self.tokens, before + time.perf_counter() - began
            start = self.tokens
            self.train_step()
            bar.update(self.tokens - start)
        bar.close()
        rate = f" ({sorted(rates)[len(rates) // 2]:,.0f} tokens/s)" if rates else ""  # the median: no warm-up
        print(f"trained {self.tokens / 1e6:.1f} M tokens in {self.step} steps and {self.seconds / 60:.1f} "
              f"minutes{rate}; wrote {self.ckpt}", flush=True)

    def report(self) -> None:
        """Accuracy against length, printed and written beside the checkpoint."""
        modes = ("on",) if self.model.cfg.kind == "llama" else ("on", "off")    # it has nothing to switch off
        rows = self.evaluate(self.table_lengths, self.c.table_n, 0, modes, show=True)
        save(rows, self.ckpt.with_name("table.jsonl"))
        print(table(cells(rows)))


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    with one_line("train.py"):
        t = Trainer(*read_flags(argv))
        total, memory = t.model.n_params()
        cuda = t.device.type == "cuda"
        bfloat16 = cuda if t.c.bfloat16 is None else t.c.bfloat16
        why = "asked for" if t.c.device != "auto" else "found" if cuda else "no CUDA device here"
        print(t.c, t.model.cfg, sep="\n")
        print(f"{total:,} parameters, {memory:,} of them memory",
              f"{t.device} ({why}), {'bfloat16' if bfloat16 else 'float32'}, "
              + (f"{t.processes} processes of one thread" if t.processes > 1 else f"{t.threads[1]} threads"),
              f"{len(t.train_set.prose):,} tokens of background to train on, {len(t.val_set.prose):,} to "
              f"validate, {t.train_set.chars_per_token:.2f} characters a token",
              f"{t.c.accumulate} times {t.c.batch_size} documents a step, or fewer with {t.c.batch_tokens:,} "
              "tokens", sep="\n", flush=True)
        try:
            with interrupts_kept(t.asked):
                t.run()
        finally:
            t.close()
        t.report()


if __name__ == "__main__":
    main()
