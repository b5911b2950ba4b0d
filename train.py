"""Train LM2 on stories made on the fly, with questions (BABILong), or on any text.

    # half a minute: it runs, it learns nothing
    python train.py --tokens 300000 --table_n 9 --out_dir out/quick
    # the default model: minutes on two CPU cores
    python train.py
    # stop after 20 minutes, and go on later
    python train.py --tokens 30000000 --minutes 20
    python train.py --resume --minutes 20
    # a language model of Python's library, or of your own files
    python train.py --recipe text --out_dir out/text
    python train.py --text books/ notes.md --out_dir out/books
    # on several GPUs, which share the micro-batches of a step
    torchrun --nproc_per_node 4 train.py --preset gpu --accumulate 4 --batch_size 16

Writes ckpt.pt and metrics.jsonl to --out_dir. A run ends with a table, which is written there, too:
the accuracy against length (table.jsonl), or for text the loss by position (loss.json). A run on
text also keeps its token ids there, in text/. `python babilong_eval.py` and `python sample.py` read
the checkpoint.

`train` is the loop. On a CPU, a step is shared by several processes, each of one thread, if their
number divides --accumulate: small products are not worth splitting among threads.
"""

import contextlib
import hashlib
import math
import multiprocessing.connection
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from babilong_eval import check_cells, evaluate, save, table, to_cells
from data import background
from data.babi import TASKS, check_tasks, find_file
from data.babilong import Builder, generated
from data.common import (
    JsonLines,
    Parser,
    flag,
    ignore_interrupts,
    interrupts_handled_by,
    interrupts_kept,
    keep_freed_memory,
    one_line,
    pick_device,
    save_json,
)
from data.document import length_name, parse_length
from data.lessons import (
    MOST_QUESTIONS,
    Batch,
    Batches,
    Curriculum,
    Lessons,
    Stage,
    parse_stages,
)
from data.llama import read_tokenizer
from data.loss import measure, ratio, summary
from data.loss import table as loss_table
from data.recipes import PRESETS, QA1, RECIPE_OF, RECIPES
from data.text import (
    TOKEN_FILES,
    Documents,
    Windows,
    describe_sources,
    read_tokens,
    token_folder,
    write_documents,
)
from data.tokenizer import Tokenizer, of_checkpoint, was_trained_on_text
from data.tokenizer import choose as choose_tokenizer
from lm2 import (
    LM2,
    MEMORIES,
    RMT,
    LM2Config,
    build_model,
    graft,
    holds_llama,
    load_checkpoint,
    load_llama,
    save_checkpoint,
)

# -------------------------------------------------------------------------------------------------
# Configuration

# No recipe changes these.
WARMUP_STEPS = 100  # steps from a learning rate of 0 to --lr
BETAS = (0.9, 0.98)  # of AdamW
WEIGHT_DECAY = 0.1  # of matrices
CLIP = 1.0  # longest gradient, as a norm over all parameters
LOG_EVERY = 10  # steps between two lines of metrics.jsonl; stages end at these steps alone
VALIDATION_SEED = -1  # of the questions of validations
TABLE_SEED = 0  # of those of the table, as in babilong_eval.py
VALIDATION_DOCUMENTS = 16  # of a validation on text, and how many bytes of each
VALIDATION_BYTES = 2048
N_SAMPLES = 3  # texts that a model of text writes at the end of its run
SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE = 0.8
SAMPLE_SEED = 0
LOG_NAME = "metrics.jsonl"
LARGE = 100_000_000  # parameters, from which on a run says how much memory it takes
LEAVE_WINDOW = 16  # steps on the longest documents, whose accuracy ends a stage


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run but the sizes of its model. Each is a flag of the same name."""

    # What is trained, and for how long
    preset: str = flag("cpu", f"The name of a set of model sizes: {', '.join(PRESETS)}.")
    recipe: str = flag("qa1", f"The name of a set of training settings: {', '.join(RECIPES)}.")
    init: str | None = flag(
        None,
        "A checkpoint to start from. The weights, the sizes and the recipe are taken from it. Or "
        "the folder of a released Llama, which gets a memory in all blocks, or in those that "
        "--mem_blocks names.",
    )
    train: str = flag(
        "all", "What is trained: all weights, or with memory those of the memory alone."
    )
    out_dir: str = flag("out", "The folder for the checkpoint, the log and the table.")
    tokens: int = flag(16_000_000, "The run ends after this many tokens, padding included.")
    final_tokens: int = flag(
        1_500_000, "The run ends after this many tokens in its last stage, if that is sooner."
    )
    total_minutes: float | None = flag(
        None,
        "The whole run ends after this many minutes, counted over all its calls. The learning rate "
        "falls to 0 by then.",
    )
    minutes: float | None = flag(
        None,
        "This call stops after this many minutes, saves and evaluates. The run is not over: "
        "--resume goes on with it.",
    )
    seed: int = flag(0, "The seed of the initial weights and of the data.")

    # Documents
    tasks: tuple[str, ...] = flag(("qa1",), "The bAbI tasks to train on and to evaluate.")
    stages: tuple[str, ...] = flag(
        QA1["stages"],
        "The curriculum, from easy to hard. Each stage is facts:segments[:tokens][@task,task]: the "
        "most facts in a document, the most segments, the tokens of a segment and the tasks. A "
        "stage of 0 segments has facts without prose. The stage echo has lists of tokens that are "
        "said twice. In a run on text a stage is text:N, windows of N tokens, such as text:1024.",
    )
    background: str | None = flag(
        None, "A folder of .txt files to hide facts in. Without it, Python's documentation is used."
    )
    stories: str | None = flag(
        None, "A folder of original bAbI files. Without it, stories are generated."
    )
    names: str = flag(
        "own",
        "The names of people, rooms and things in the training documents: own for bAbI's own "
        "alone, many for many more. The evaluation has bAbI's own in any case.",
    )
    text: tuple[str, ...] = flag(
        (),
        "Files and folders of text to learn from, or nanoGPT's train.bin and val.bin. They imply "
        "--recipe text. Without them that recipe learns the modules of Python's library.",
        is_path=True,
    )
    tokenizer: str = flag(
        "shipped",
        "The tokenizer of a new model of text: shipped, bytes, gpt2, learned, ids, or a file that "
        "`python -m data.tokenizer` has written. learned makes one from the texts first. The "
        "recipe text takes it, and gpt2 for train.bin and val.bin. ids takes these files on a "
        "machine without GPT-2's tokenizer; such a model writes no text.",
    )
    skip_bad: bool = flag(False, "Files of --text that are not UTF-8 are left out.")
    plain: float = flag(0.1, "This share of the batches has no prose, in stages that have prose.")
    longest: float = flag(
        0.5,
        "This share of the batches with prose has the longest documents, in the last stage. In the "
        "stages before it is one half.",
    )
    asides: int = flag(
        3, "A training document may ask questions before its end, at up to this many places."
    )
    usual: float = flag(
        0.9,
        "A training story has at most as many facts as are enough for this share of bAbI's "
        "own questions.",
    )
    short_questions: int = flag(
        MOST_QUESTIONS,
        "A story of up to 4 facts without prose is asked at most this many questions. With one, no "
        "answer can be guessed from earlier answers.",
    )
    whole: bool = flag(
        False, "Each document is read as one segment, so that attention sees all of it."
    )

    # When a stage ends
    leave_at: float = flag(
        0.9,
        "A stage with prose ends when this share of the latest answers is right. The stage echo "
        "ends when this share of its tokens is right.",
    )
    leave_plain_at: float = flag(
        0.95,
        "A stage of stories without prose ends when this share of the latest answers is right.",
    )
    stage_steps: int = flag(1500, "A stage ends after this many steps in any case.")

    # A step
    batch_size: int = flag(16, "A micro-batch has at most this many documents, or windows of text.")
    batch_tokens: int = flag(4096, "A micro-batch has at most this many tokens.")
    accumulate: int = flag(
        2, "A step sums the gradients of this many micro-batches, over all processes together."
    )
    lr: float = flag(2e-3, "The learning rate after the warm-up.")
    decay: float = flag(0.25, "The learning rate falls to 0 over this last share of the run.")
    gate_lr: float = flag(
        1.0,
        "The gates and the nulls of a memory learn at this multiple of the learning rate. Above 1 "
        "their weights do not decay.",
    )

    # How it is computed
    device: str = flag("auto", "The device to compute on: auto, cpu or cuda.")
    processes: int | None = flag(
        None,
        "This many processes share each step on a CPU. The number must divide --accumulate. "
        "By default there is one for each thread if that number divides, and one otherwise. For a "
        "released Llama there is one, because each has a model of its own.",
    )
    threads: int = flag(
        0, "The number of threads of all processes together. With 0, PyTorch chooses."
    )
    workers: int | None = flag(
        None,
        "This many workers make batches ahead, for each training process. By default it is 4 on a "
        "GPU and 0 on a CPU.",
    )
    bfloat16: bool | None = flag(
        None,
        "Matrices are multiplied in bfloat16. By default a GPU does so and a CPU does not, as only "
        "a CPU with AMX gains from it.",
    )
    compile: bool = flag(
        False, "The model is compiled, which takes minutes and makes each step faster."
    )
    graphs: bool = flag(
        True, "A GPU runs each micro-batch as a CUDA graph. This saves time in small models."
    )
    recompute: bool = flag(
        False, "Activations are computed again for the gradient, which saves memory and takes time."
    )

    # Evaluation
    eval_every: int = flag(
        4_000_000, "The run saves its checkpoint and validates each time after this many tokens."
    )
    eval_n: int = flag(32, "A validation asks this many questions of each task and length.")
    table_lengths: tuple[str, ...] = flag(
        ("0k", "1k", "2k", "4k", "8k", "16k"),
        "The lengths in the table at the end, in tokens of facts and prose.",
    )
    table_n: int = flag(200, "The table asks this many questions of each task and length.")

    def __post_init__(self):
        self.check("tokens", 1, math.inf)
        self.check("final_tokens", 1, math.inf)
        self.check("total_minutes", 0.01, math.inf)
        self.check("minutes", 0, math.inf)
        self.check("seed", 0, 2**32 - 1)
        self.check("plain", 0, 1)
        self.check("longest", 0, 1)
        self.check("asides", 0, 1000)
        self.check("usual", 0, 1)
        self.check("short_questions", 1, MOST_QUESTIONS)
        self.check("leave_at", 0, 1)
        self.check("leave_plain_at", 0, 1)
        self.check("stage_steps", 1, math.inf)
        self.check("batch_size", 1, math.inf)
        self.check("batch_tokens", 1, math.inf)
        self.check("accumulate", 1, math.inf)
        self.check("lr", 1e-12, 1e3)
        self.check("decay", 1e-9, 1)
        self.check("gate_lr", 1, 1000)
        self.check("processes", 1, 4096)
        self.check("threads", 0, 4096)
        self.check("workers", 0, 256)
        self.check("eval_every", 1, math.inf)
        self.check("eval_n", 1, math.inf)
        self.check("table_n", 1, math.inf)
        if self.processes is not None and self.accumulate % self.processes:
            raise ValueError(
                f"--processes {self.processes} must divide --accumulate {self.accumulate}"
            )
        if self.stories is not None and not Path(self.stories).is_dir():
            # One file would be both trained on and validated with.
            raise ValueError(
                f"--stories {self.stories} is no folder: name one with _train and _test files"
            )
        if self.train not in ("all", "memory"):
            raise ValueError(f"--train {self.train!r} is unknown: choose all or memory")
        if self.names not in ("own", "many"):
            raise ValueError(f"--names {self.names!r} is unknown: choose own or many")
        if self.text and not self.is_text:
            raise ValueError(f"--text {self.text[0]} with --recipe {self.recipe}: leave one out")
        if self.tokenizer != "shipped" and not self.is_text:
            raise ValueError(
                f"--tokenizer {self.tokenizer} is for --recipe text: the stories need the shipped "
                "one, leave it out"
            )
        if self.is_text and self.tasks:
            raise ValueError(
                f"--tasks {' '.join(self.tasks)} in a run on text: leave --tasks out, or give "
                "another --recipe"
            )
        if not self.tasks and not self.is_text:
            raise ValueError(f"--tasks is empty: choose from {' '.join(TASKS)}")
        check_tasks(self.tasks)
        if not self.table_lengths:
            raise ValueError("--table_lengths is empty: give some, such as 0k 4k")
        for text in self.table_lengths:
            parse_length(text)

    def check(self, name: str, low: float, high: float) -> None:
        """ValueError if a setting is given and does not lie between two numbers."""
        value = getattr(self, name)
        if value is None or low <= value <= high:
            return
        if high == math.inf:
            raise ValueError(f"--{name} {value} must be at least {low}")
        raise ValueError(f"--{name} {value} must lie between {low} and {high}")

    @property
    def is_text(self) -> bool:
        """Whether the run learns text, not stories."""
        return self.recipe == "text"

    @property
    def lengths(self) -> list[int]:
        """The lengths of the table in tokens, each once."""
        return list(dict.fromkeys(parse_length(text) for text in self.table_lengths))


# The sizes that are flags, too. Their defaults are those of the preset.
SIZE_FLAGS = dict(
    n_layer="The number of blocks.",
    n_head="The number of query heads of self-attention.",
    n_kv_head="The number of key and value heads. Fewer than --n_head is grouped-query attention.",
    n_embd="The width of the model.",
    ffn_dim="The inner width of the MLP.",
    segment_len="The number of tokens in a segment, which is all that self-attention sees.",
    n_slot="The number of memory slots in a block.",
    n_mem_head="The number of heads of the memory.",
    n_mem_layer="The number of blocks with a memory, from the first on. 0 makes a Llama. Without "
    "this flag, --mem_blocks or the preset says which blocks have one.",
    mem_blocks="The numbers of the blocks with a memory, instead of --n_mem_layer. The first is 0, "
    "the last is -1.",
    memory_kind="The kind of memory in these blocks, a name in MEMORIES of lm2.py.",
    n_mem_token="The number of memory tokens. More than 0 makes an RMT, which has no slots.",
    mem_projection="What an RMT carries to the next segment goes through a matrix first.",
)

# Settings that older checkpoints lack, with the values that their runs had.
MISSING_IN_OLDER = dict(
    names="own",
    short_questions=8,
    longest=0.5,
    text=(),
    tokenizer="shipped",
    skip_bad=False,
    gate_lr=1.0,
    train="all",
)

# What the flags say of a released Llama: its memory and its segments. If they are silent, a segment
# has GRAFT_SEGMENT tokens at most. The rate is low, so that what the Llama has learned stays.
GRAFT_SIZES = ("segment_len", "n_slot", "n_mem_head", "n_mem_layer", "mem_blocks", "memory_kind")
GRAFT_SEGMENT = 2048
GRAFT_LR = 1e-4

# What may change where a run is resumed: how it is computed, stopped and evaluated, and where the
# same texts lie.
MAY_CHANGE = (
    "out_dir",
    "background",
    "stories",
    "text",
    "minutes",
    "total_minutes",
    "device",
    "threads",
    "processes",
    "workers",
    "bfloat16",
    "compile",
    "graphs",
    "recompute",
    "eval_every",
    "eval_n",
    "table_lengths",
    "table_n",
)


def sizes_of(preset: str, given: dict) -> dict:
    """The sizes of a preset, with those that are given in their place."""
    sizes = dict(PRESETS[preset])
    if "n_mem_layer" in given or "mem_blocks" in given or given.get("n_mem_token"):
        # The preset's answer to where the memory is gives way to theirs.
        for name in ("n_mem_layer", "mem_blocks"):
            sizes.pop(name, None)
    return sizes | given


def sizes_of_graft(llama: LM2Config, given: dict) -> dict:
    """The sizes of a released Llama that gets a memory, as the flags say."""
    sizes = asdict(llama)
    for name in ("n_mem_layer", "mem_blocks"):
        del sizes[name]
    sizes["segment_len"] = min(sizes["segment_len"], GRAFT_SEGMENT)
    return sizes | given


def settings_of(recipe: str | None, preset: str | None, sizes: dict) -> dict:
    """The settings of a recipe. ValueError for an unknown name.

    A recipe has one set of settings for each kind of model: LM2, RMT, window Llama, Llama with full
    attention. The sizes decide which kind it is: those of the preset, and `sizes` in their place.

    recipe  None takes the recipe that data/recipes.py names for the preset
    preset  None takes the preset that the recipe names for LM2"""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is unknown: choose from {', '.join(PRESETS)}")
    if recipe is None:
        recipe = "qa1" if preset is None else RECIPE_OF[preset]
    if recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe!r} is unknown: choose from {', '.join(RECIPES)}")
    if preset is None:
        preset = RECIPES[recipe]["lm2"]["preset"]
    model_cfg = LM2Config(**sizes_of(preset, sizes))
    kind = model_cfg.kind
    if kind == "llama" and model_cfg.segment_len >= 4096:
        kind = "full"  # its window holds whole documents
    return RECIPES[recipe][kind] | dict(recipe=recipe, preset=preset)


@dataclass(frozen=True)
class Flags:
    """What a command line asks for."""

    cfg: TrainConfig
    sizes: dict  # of a model that is made anew, as LM2Config takes them
    resume: bool


def read_flags(argv: list[str] | None) -> Flags:
    """The command line, checked as far as it can be without the data. ValueError for what cannot
    be. In order of precedence: flags, the checkpoint of --init, recipe and preset, defaults."""
    parser = Parser("train.py", __doc__.split("\n")[0])
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from the checkpoint in --out_dir, with its settings. Of the flags, only these "
        f"may be given: {', '.join(MAY_CHANGE)}.",
    )
    parser.add_settings(TrainConfig)
    parser.add_sizes(SIZE_FLAGS, LM2Config(**PRESETS["cpu"]))
    given = {}
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not None:
            given[name] = value
    if given.pop("resume"):
        return Flags(settings_to_resume(given), {}, resume=True)

    sizes = {}
    settings = {}
    for name, value in given.items():
        if name in SIZE_FLAGS:
            sizes[name] = value
        else:
            settings[name] = value
    if "text" in settings:
        settings.setdefault("recipe", "text")
        if token_folder(settings["text"]) is not None and "init" not in settings:
            settings.setdefault("tokenizer", "gpt2")  # that of nanoGPT's files
    if "tasks" in settings:
        settings["tasks"] = tuple(dict.fromkeys(settings["tasks"]))  # each once
    if "init" in settings:
        is_llama = holds_llama(settings["init"])
        wrong = [*sizes, *(["preset"] if "preset" in settings else [])]
        if is_llama:
            wrong = [name for name in wrong if name not in GRAFT_SIZES]
        if wrong:
            raise ValueError(
                f"--init {settings['init']} has sizes of its own: leave --{wrong[0]} out"
            )
        if "tokenizer" in settings:
            raise ValueError(
                f"--init {settings['init']} has a tokenizer of its own: leave --tokenizer out"
            )
        if is_llama:
            sizes = sizes_of_graft(load_llama(settings["init"]).cfg, sizes)
            settings.setdefault("lr", GRAFT_LR)
            content = {}
        else:
            model, content = load_checkpoint(settings["init"])
            sizes = asdict(model.cfg)
            if "released" in content:
                settings.setdefault("lr", GRAFT_LR)
        before = content.get("train", {})
        recipe = settings.get("recipe", before.get("recipe"))
        preset = before.get("preset")
        if preset not in PRESETS:
            preset = None  # the checkpoint is of other presets than these
        if recipe == "text" and before.get("recipe") == "text" and "text" not in settings:
            settings = dict(text=before["text"], skip_bad=before["skip_bad"]) | settings
        cfg = TrainConfig(**settings_of(recipe, preset, sizes) | settings)
    else:
        recipe = settings.get("recipe")
        preset = settings.get("preset")
        cfg = TrainConfig(**settings_of(recipe, preset, sizes) | settings)
        sizes = sizes_of(cfg.preset, sizes)

    folder = Path(cfg.out_dir)
    if folder.is_file():
        raise ValueError(f"--out_dir {folder} is a file: name a folder")
    if (folder / "ckpt.pt").exists():
        raise ValueError(
            f"{folder / 'ckpt.pt'} is there already: go on with --resume, or give another --out_dir"
        )
    parse_stages(cfg.stages, LM2Config(**sizes).segment_len, cfg.tasks, cfg.whole)
    return Flags(cfg, sizes, resume=False)


def settings_to_resume(given: dict) -> TrainConfig:
    """The settings of the run in --out_dir, with the flags that may be given anew. ValueError for
    other flags, and for a checkpoint that cannot be gone on with."""
    for name in given:
        if name not in MAY_CHANGE:
            raise ValueError(f"--resume takes --{name} from the checkpoint: leave that flag out")
    path = Path(given.get("out_dir", TrainConfig.out_dir), "ckpt.pt")
    _, content = load_checkpoint(path)
    if not {"train", "optimizer", "progress"} <= set(content):
        raise ValueError(f"{path} holds a model but no training to resume")
    settings = MISSING_IN_OLDER | content["train"]
    known = {f.name for f in fields(TrainConfig)}
    odd = known ^ set(settings)
    if odd:
        raise ValueError(
            f"{path} was written by a train.py of other flags ({', '.join(sorted(odd))}): train "
            "anew, or start from it with --init"
        )
    anew = dict(out_dir=str(path.parent), minutes=None)  # the limit was that of an earlier call
    if dist.is_torchelastic_launched():
        anew["processes"] = None  # torchrun has its own
    return TrainConfig(**settings | anew | given)


# -------------------------------------------------------------------------------------------------
# How a model is computed faster


def check_compiler(device: torch.device) -> None:
    """ValueError where torch.compile finds no compiler, of C++ for a CPU, of C for a GPU."""
    if device.type == "cuda":
        names = ["cl"] if sys.platform == "win32" else ["gcc", "clang"]
    else:
        names = [{"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"--compile finds no compiler here: install {names[0]} or give --no-compile"
        )


def compile_blocks(model: nn.Module, **options) -> None:
    """Compile in place, with torch.compile's options, what the segments of a document pass through.

    The parts of a memory are compiled one by one. The loop over segments stays outside of them, so
    that a longer document needs no other graph. All blocks share their graphs. A deepcopy of a
    compiled model would go on with the weights of the original: copy first."""
    config = torch._dynamo.config
    # PyTorch gives up after 8 graphs of one function. Ours need more: one for each set of shapes.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), 64))
    if options.get("dynamic"):
        # Without this, dynamo takes a batch of 8 rows and 8 heads for the same number.
        torch.fx.experimental._config.use_duck_shape = False
    for block in model.layers:
        block.attention.compile(fullgraph=True, **options)
        block.feed_forward.compile(fullgraph=True, **options)
        if block.memory is not None:
            for name in block.memory.parts:
                part = getattr(block.memory, name)
                setattr(block.memory, name, torch.compile(part, fullgraph=True, **options))


class CudaGraphs:
    """Calls f(*values, *tensors) -> Tensor on a GPU as CUDA graphs, one for each set of values and
    shapes.

    A graph is one launch for thousands of small kernels, which would wait for Python otherwise. It
    is recorded at the second call, since the first compiles and loads kernels. f must not wait for
    the device. The gradients that it adds to, and all else that it reads, must stay in place.
    Tensors come last, and a shape has always the same dtype. The graphs are kept as long as this
    object and share their memory, so one runs at a time."""

    def __init__(self, f: Callable[..., Tensor]):
        self.f = f
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs = {}  # key -> (graph, its inputs, its output), or None after the first call

    def __call__(self, *args) -> Tensor:
        tensors = [a for a in args if isinstance(a, Tensor)]
        values = args[: len(args) - len(tensors)]
        key = (*values, *(t.shape for t in tensors))
        if key not in self.graphs:
            self.graphs[key] = None
            output = self.f(*args)
            torch.cuda.empty_cache()  # the graphs take their memory from a pool of their own
            return output
        if self.graphs[key] is None:
            inputs = [t.clone() for t in tensors]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.f(*values, *inputs)
            self.graphs[key] = graph, inputs, output
        graph, inputs, output = self.graphs[key]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return output.clone()


class BFloat16Linear(nn.Linear):
    """A linear layer that multiplies in bfloat16 and returns the dtype that it was given."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(x.bfloat16(), self.weight.bfloat16(), bias).to(x.dtype)


def bfloat16_layers(model: nn.Module) -> None:
    """Let every linear layer multiply in bfloat16 from now on. Weights, their gradients and all
    else stay as they are.

    On a GPU autocast does that. A CPU with tiles for it (AMX) takes a quarter of the time for such
    a product. Autocast would also move small attention to bfloat16, which is slower there."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = BFloat16Linear  # one class for all layers, so that they share graphs


# -------------------------------------------------------------------------------------------------
# Several processes


HAS_TOLD = 2  # exit code of a process that has said what was wrong


class ProcessLost(ValueError):
    """Another process of this training has ended, so that no step can be taken any more."""

    def __init__(self, detail: str):
        super().__init__(
            f"a process that takes part in the training has ended ({detail}). Was there too little "
            "memory? If a checkpoint was saved, it is whole: go on with --resume"
        )


@dataclass
class Processes:
    """Those that train together, as one of them sees them.

    Each takes its share of a step's micro-batches. Then their gradients are summed, and all make
    the same update, so that their weights stay equal. The first one, of rank 0, decides how the run
    goes on, and it alone logs, saves and evaluates."""

    rank: int = 0  # of this process
    n: int = 1  # all processes
    train_threads: int = 1  # of this process in a training step
    eval_threads: int = 1  # of the first process while it evaluates and the others wait
    local_rank: int = 0  # of this process among those on its machine, to choose a GPU
    group: dist.ProcessGroup | None = None  # None where there is only one process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self, meet_at: str, device_type: str) -> None:
        """Meet the other processes at an address. ProcessLost if one does not come."""
        if self.n == 1:
            return
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        with lost_is_raised():
            dist.init_process_group(
                backend,
                init_method=meet_at,
                rank=self.rank,
                world_size=self.n,
                timeout=timedelta(minutes=2),
            )
            # From now on they wait for each other without a limit, as an evaluation may take long.
            self.group = dist.new_group(backend=backend, timeout=timedelta(days=365))

    def leave(self) -> None:
        """Part from the other processes, if this one has met them."""
        if self.group is not None:
            dist.destroy_process_group()
            self.group = None

    def wait_for_first(self) -> None:
        """Wait until the first process has come here, too."""
        self.told_by_first(0)

    def told_by_first(self, *numbers: float) -> list[float]:
        """The numbers that the first process gives. What the others give counts for nothing."""
        if self.group is None:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.float64)
        with lost_is_raised():
            dist.broadcast(message, src=0, group=self.group)
        return message.tolist()

    def sum_gradients(self, parameters: list[Tensor], numbers: Tensor) -> Tensor:
        """Sum up the parameters' gradients over the processes, in place, and return the sums of
        some more numbers (n,).

        All of it goes in one buffer. Which parameters have a gradient differs between processes: a
        batch of documents of one segment never writes to the memory, so that the weights of the
        write have none. So the buffer also counts, for each parameter, the processes that have one.
        A parameter that has a gradient nowhere keeps None, so that the optimiser passes over it, as
        it does where one process trains alone."""
        if self.group is None:
            return numbers
        pieces = []
        for p in parameters:
            piece = torch.zeros_like(p) if p.grad is None else p.grad
            pieces.append(piece.flatten())
        if numbers.is_cuda:
            # On a GPU all parameters have a gradient. The counts are made there, since a copy from
            # the CPU would make the CPU wait.
            counts = torch.ones(len(parameters), device=numbers.device)
        else:
            counts = torch.tensor([float(p.grad is not None) for p in parameters])
        buffer = torch.cat([*pieces, counts, numbers])
        with lost_is_raised():
            dist.all_reduce(buffer, group=self.group)
        sizes = [p.numel() for p in parameters]
        *totals, counts, numbers = buffer.split([*sizes, len(parameters), len(numbers)])
        for p, total, count in zip(parameters, totals, counts, strict=True):
            if p.is_cuda:
                p.grad.copy_(total.view_as(p))  # a GPU's gradients stay in place, see `train`
            elif count > 0:
                p.grad = total.view_as(p)
        return numbers


@contextlib.contextmanager
def lost_is_raised() -> Iterator[None]:
    """Within it an error of torch.distributed becomes ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(" ".join(str(error).split())[:300]) from error


def choose_processes(cfg: TrainConfig) -> Processes:
    """How many processes `python train.py` starts, itself included, and their threads. ValueError
    for --processes on a GPU."""
    threads = cfg.threads or torch.get_num_threads()
    if pick_device(cfg.device).type == "cuda":
        if cfg.processes is not None and cfg.processes > 1:
            raise ValueError(
                f"--processes {cfg.processes} is for a CPU: on GPUs start "
                f"`torchrun --nproc_per_node {cfg.processes} train.py`"
            )
        n = 1
    elif cfg.processes is not None:
        n = cfg.processes
    elif cfg.init is not None and holds_llama(cfg.init):
        n = 1  # each process would have a model of its own in RAM
    else:
        n = threads if cfg.accumulate % threads == 0 else 1
    return Processes(n=n, train_threads=threads if n == 1 else 1, eval_threads=threads)


def processes_of_torchrun(cfg: TrainConfig) -> Processes:
    """The place of this process among those that torchrun has started. ValueError if they do not
    divide the micro-batches."""
    n = int(os.environ["WORLD_SIZE"])
    if cfg.accumulate % n:
        raise ValueError(
            f"torchrun's {n} processes must divide --accumulate {cfg.accumulate}: give another one"
        )
    if cfg.processes is not None:
        raise ValueError(f"--processes {cfg.processes}: torchrun has {n}, leave that flag out")
    n_here = int(os.environ["LOCAL_WORLD_SIZE"])
    if cfg.threads:
        train_threads = max(1, cfg.threads // n_here)
    else:
        train_threads = torch.get_num_threads()
    return Processes(
        rank=int(os.environ["RANK"]),
        n=n,
        train_threads=train_threads,
        eval_threads=train_threads * n_here,
        local_rank=int(os.environ["LOCAL_RANK"]),
    )


def help_to_train(rank: int, processes: Processes, meet_at: str, flags: Flags, writer) -> None:
    """The life of a process of a rank above 0 that `python train.py` has started."""
    writer.send("started")
    keep_freed_memory()
    processes.rank = rank
    with one_line("train.py", is_silent=True):
        run(flags, processes, meet_at)


@contextlib.contextmanager
def helpers_started(processes: Processes, flags: Flags) -> Iterator[str | None]:
    """Within it the other processes of this machine run. Yields the address at which they meet.

    If one of them ends too soon, this process does so, too: with a line, or silently if the other
    has told why."""
    if processes.n == 1:
        yield None
        return
    # A fork would be quicker, but a copy of a process that has computed with several threads hangs.
    context = multiprocessing.get_context("spawn")
    readers = []
    helpers = []
    with tempfile.TemporaryDirectory(prefix="lm2-", ignore_cleanup_errors=True) as folder:
        meet_at = f"file://{folder}/processes"
        try:
            # They ignore Ctrl-C and SIGTERM from their start on: these are for the first process.
            with interrupts_handled_by(signal.SIG_IGN):
                for rank in range(1, processes.n):
                    reader, writer = context.Pipe(duplex=False)
                    readers.append(reader)
                    arguments = (rank, processes, meet_at, flags, writer)
                    helper = context.Process(target=help_to_train, args=arguments)
                    helper.start()
                    helpers.append(helper)
            for helper, reader in zip(helpers, readers, strict=True):
                if reader not in multiprocessing.connection.wait([reader, helper.sentinel]):
                    raise ProcessLost("at its start")
            yield meet_at
        except ProcessLost:
            codes = []
            for sentinel in multiprocessing.connection.wait([h.sentinel for h in helpers], 5):
                (helper,) = [h for h in helpers if h.sentinel == sentinel]
                helper.join()
                codes.append(helper.exitcode)
            if HAS_TOLD in codes:
                raise SystemExit(HAS_TOLD) from None
            raise ProcessLost(f"exit code {' '.join(map(str, codes))}") from None
        finally:
            for helper in helpers:
                helper.kill()
                helper.join()


# -------------------------------------------------------------------------------------------------
# The loop


def learning_rate(cfg: TrainConfig, step: int, share_done: float) -> float:
    """The learning rate of a step (counted from 0) when a share of the run is done. It rises over
    the warm-up, stays, and falls to 0 over the last part of the run."""
    warmed_up = min(1.0, (step + 1) / WARMUP_STEPS)
    share_left = max(0.0, 1.0 - share_done)
    not_decayed = min(1.0, share_left / cfg.decay)
    return cfg.lr * warmed_up * not_decayed


@dataclass
class Progress:
    """How far a run is."""

    step: int  # steps taken
    tokens: int  # trained on
    end: int  # the run ends after so many tokens
    seconds: float  # that it took so far, those before --resume included

    def share_done(self, cfg: TrainConfig) -> float:
        """The share of the run that lies behind: of its tokens or of its minutes."""
        share = self.tokens / self.end
        if cfg.total_minutes is not None:
            share = max(share, self.seconds / (60 * cfg.total_minutes))
        return share


def optimizer_groups(model: LM2 | RMT, gate_lr: float) -> list[dict]:
    """The parameters that are trained, in groups for AdamW. Matrices decay; the weights of norms,
    the biases and the scores of nulls do not. With a gate_lr above 1 the gates are a group of their
    own."""
    matrices = []
    others = []
    gates = []
    gate_names = MEMORIES[model.cfg.memory_kind].gates
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        _, _, in_memory = name.partition(".memory.")  # such as w_in.bias
        is_gate = in_memory.split(".")[0] in gate_names
        if is_gate and gate_lr > 1:
            gates.append(p)
        elif p.ndim >= 2:
            matrices.append(p)
        else:
            others.append(p)
    groups = [
        dict(params=matrices, weight_decay=WEIGHT_DECAY, multiple=1.0),
        dict(params=others, weight_decay=0.0, multiple=1.0),
    ]
    if gates:
        groups.append(dict(params=gates, weight_decay=0.0, multiple=gate_lr))
    return groups


@dataclass(frozen=True)
class Data:
    """What a run learns, and what it is measured with."""

    batches: Lessons | Windows  # the batches of training, as data.lessons.Batches takes them
    train_set: Builder | Documents
    val_set: Builder | Documents
    fingerprint: str  # a short text that changes with the texts that the run reads


def make_lessons(cfg: TrainConfig, train_set: Builder, segment_len: int) -> Lessons:
    """All batches of a run on stories with these settings. segment_len  of the model"""
    stages = parse_stages(cfg.stages, segment_len, cfg.tasks, cfg.whole)
    return Lessons(
        train_set,
        tasks=cfg.tasks,
        batch_size=cfg.batch_size,
        batch_tokens=cfg.batch_tokens,
        plain=cfg.plain,
        n_asides=cfg.asides,
        seed=cfg.seed,
        accumulate=cfg.accumulate,
        usual=cfg.usual,
        short_questions=cfg.short_questions,
        last_stage=stages[-1],
        longest=cfg.longest,
    )


def is_bfloat16(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether products are made in bfloat16: where the flag is not given, on a GPU alone."""
    return device.type == "cuda" if cfg.bfloat16 is None else cfg.bfloat16


def length_of_segments(batch: Batch, stage: Stage, cfg: TrainConfig, longest: int) -> int:
    """The length of the segments that a batch is read in: the stage's, or the batch's own length if
    that is shorter. With --whole it is always the batch's own. ValueError if that is longer than
    the model's longest."""
    n_tokens = batch.idx.shape[1]
    if cfg.whole and n_tokens > longest:
        raise ValueError(
            f"--whole: a document of '{stage}' has {n_tokens} tokens: give a longer --segment_len"
        )
    return n_tokens if cfg.whole else min(stage.segment_len, n_tokens)


def with_fewer_shapes(batch: Batch, stage: Stage) -> Batch:
    """A batch of one of few shapes, since each shape is a CUDA graph of its own."""
    width = batch.idx.shape[1]
    if width < stage.segment_len:
        width = min(stage.segment_len, (width + 127) // 128 * 128)
    return batch.padded(width, multiple=1024)


@contextlib.contextmanager
def evaluating(n_threads: int) -> Iterator[None]:
    """Within it the model runs with n_threads, as the other processes wait. It also runs without
    compiled graphs, because an evaluation has too many shapes for them."""
    train_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_num_threads(train_threads)


def ask(
    model: LM2 | RMT,
    tokenizer: Tokenizer,
    val_set: Builder,
    work: list[tuple[str, int, int]],  # tasks, lengths, and how many questions of each
    seed: int,
    modes: tuple[str, ...],  # of babilong_eval.py's --memory
    threads: int,
    show: bool = False,  # a bar
) -> list[dict]:
    """Predictions, as babilong_eval.py makes them, on documents that are never trained on."""
    samples = generated(val_set, seed)
    rows = []
    with evaluating(threads):
        for found in evaluate(
            model, tokenizer, samples, work, modes, name=model.cfg.kind, show=show
        ):
            rows.extend(found)
    return rows


def validate_answers(
    cfg: TrainConfig, model: LM2 | RMT, tokenizer: Tokenizer, val_set: Builder, threads: int
) -> dict[str, float]:
    """The share of right answers at each task and each length of the table up to 4k."""
    short = [length for length in cfg.lengths if length <= 4000] or cfg.lengths[:1]
    work = [(task, length, cfg.eval_n) for task in cfg.tasks for length in short]
    rows = ask(model, tokenizer, val_set, work, VALIDATION_SEED, ("on",), threads)
    shares = {}
    for cell in to_cells(rows):
        name = f"{cell['task']} {length_name(cell['length'])}"
        shares[name] = round(cell["exact"] / cell["n"], 4)
    return shares


def validate_text(
    model: LM2 | RMT, tokenizer: Tokenizer, val_set: Documents, threads: int
) -> dict[str, float]:
    """The loss on the first tokens of some documents, under the name of its unit."""
    with evaluating(threads):
        measured = measure(
            model, tokenizer, val_set, VALIDATION_DOCUMENTS, VALIDATION_BYTES, modes=("on",)
        )
    loss, _ = ratio(*measured.sums("on"))
    return {measured.unit: round(loss, 4)}


class Record:
    """What the first process tells of a run while it trains: a bar, lines of metrics.jsonl, and
    lines for people."""

    def __init__(self, cfg: TrainConfig, log: JsonLines, progress: Progress, n_stages: int):
        self.log = log
        self.progress = progress
        self.n_stages = n_stages
        self.bar = tqdm(
            total=None if cfg.total_minutes else progress.end,
            initial=progress.tokens,
            unit="tok",
            unit_scale=True,
            smoothing=0.05,
            disable=None,
        )
        # Of each step since the last line: whether its documents were the stage's longest, and
        # what was measured (3,), which still lies on the device: norm, loss, accuracy.
        self.pending = []
        self.rates = []  # tokens per second of each line
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the tokens per second of the next line from here."""
        self.since = (time.perf_counter(), self.progress.tokens)

    def new_end(self) -> None:
        """Let the bar end where the run does, which the last stage has decided."""
        if self.bar.total is not None:
            self.bar.total = self.progress.end
            self.bar.refresh()

    def add_step(self, n_tokens: int, is_longest: bool, norm: Tensor, sums: Tensor) -> None:
        """Note a step, without waiting for the device. sums: loss, right words, words, tokens"""
        self.bar.update(n_tokens)
        loss, n_right, n_words, _ = sums
        self.pending.append((is_longest, torch.stack([norm, loss, n_right / n_words])))

    def write_line(self, curriculum: Curriculum, lr: float) -> list[float]:
        """Log the steps since the last line. Returns the accuracies of those on the stage's longest
        documents, which decide when the stage ends.

        ValueError for a gradient that is not finite, so that no weights are saved that it has
        spoiled."""
        rows = fetch([measured for _, measured in self.pending])
        accuracies = []
        for (is_longest, _), (_, _, accuracy) in zip(self.pending, rows, strict=True):
            if is_longest:
                accuracies.append(accuracy)
        self.pending.clear()
        for step, (norm, _, _) in enumerate(rows, self.progress.step - len(rows) + 1):
            if not math.isfinite(norm):
                raise ValueError(
                    f"the gradient is {norm} at step {step}: train anew with a lower --lr"
                )
        norm, _, accuracy = rows[-1]
        mean_loss = sum(loss for _, loss, _ in rows) / len(rows)
        seconds, tokens = self.since
        rate = (self.progress.tokens - tokens) / (time.perf_counter() - seconds)
        self.rates.append(rate)
        self.write(
            loss=round(mean_loss, 6),
            accuracy=round(accuracy, 6),
            grad_norm=round(norm, 6),
            stage=curriculum.number,
            lr=lr,
            tokens_per_second=round(rate),
        )
        self.bar.set_postfix(
            loss=f"{mean_loss:.3f}",
            acc=f"{accuracy:.2f}",
            lr=f"{lr:.1e}",
            stage=f"{curriculum.number + 1}/{self.n_stages}",
        )
        self.restart_clock()
        return accuracies

    def write(self, **values) -> None:
        """A line of metrics.jsonl, with where the run stands."""
        now = self.progress
        self.log.write(step=now.step, tokens=now.tokens, seconds=round(now.seconds, 1), **values)

    def say(self, message: str) -> None:
        """A line for people, with where the run stands."""
        now = self.progress
        with contextlib.suppress(BrokenPipeError):  # nobody reads on, but the run goes on
            tqdm.write(f"{now.seconds:5.0f} s, {now.tokens / 1e6:4.1f} M tokens: {message}")

    def close(self, path: Path) -> None:
        """End the bar, and tell what was trained. path  of the checkpoint"""
        self.bar.close()
        now = self.progress
        rate = f" ({statistics.median(self.rates):,.0f} tokens/s)" if self.rates else ""
        print(
            f"trained {now.tokens / 1e6:.1f} M tokens in {now.step} steps and "
            f"{now.seconds / 60:.1f} minutes{rate}; the checkpoint is {path}",
            flush=True,
        )


def fetch(measured: list[Tensor]) -> list[list[float]]:
    """What was measured in some steps, from the device. This waits for it."""
    return torch.stack(measured).tolist()


def train(
    cfg: TrainConfig,
    model: LM2 | RMT,
    tokenizer: Tokenizer,
    data: Data,
    device: torch.device,
    processes: Processes,
    saved: dict | None,  # the checkpoint to go on from
    log: JsonLines | None,  # of the first process
    interrupts: list[float],  # not empty once Ctrl-C was pressed
) -> None:
    """Train the model to the end of the run, and write its checkpoint.

    Raises KeyboardInterrupt after the checkpoint is written if Ctrl-C was pressed, ValueError for a
    gradient that is not finite, and ProcessLost if another process has ended."""
    is_cuda = device.type == "cuda"
    path = Path(cfg.out_dir, "ckpt.pt")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        optimizer_groups(model, cfg.gate_lr), lr=cfg.lr, betas=BETAS, fused=True
    )
    stages = parse_stages(cfg.stages, model.cfg.segment_len, cfg.tasks, cfg.whole)
    curriculum = Curriculum(stages, cfg.leave_at, cfg.leave_plain_at, LEAVE_WINDOW, cfg.stage_steps)
    end = min(cfg.tokens, cfg.final_tokens) if curriculum.is_last else cfg.tokens
    progress = Progress(step=0, tokens=0, end=end, seconds=0.0)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        curriculum.load_state_dict(saved["curriculum"])
        progress = Progress(**saved["progress"])

    workers = cfg.workers
    if workers is None:
        workers = 4 if is_cuda else 0
    # Micro-batches are numbered through the whole run. Of n processes, that of rank r takes the
    # numbers r, r + n, r + 2 n and so on.
    batches = Batches(
        data.batches,
        curriculum.stage,
        number=progress.step * cfg.accumulate + processes.rank,
        stride=processes.n,
        workers=workers,
        pin=is_cuda,
    )
    autocast = is_cuda and is_bfloat16(cfg, device)  # on a CPU the layers do it themselves

    def micro_step(S: int, idx: Tensor, at: Tensor, targets: Tensor, is_word: Tensor) -> Tensor:
        """Add the gradient of one micro-batch, read in segments of S tokens, to the parameters'.

        S comes first and the tensors last, as CudaGraphs wants them.
        Returns three numbers (3,) without waiting for the device: its loss, divided by the number
        of micro-batches; how many words of its answers are right; and how many there are."""
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits, loss, _ = model(idx, targets, at=at, segment_len=S)
        loss = loss / cfg.accumulate
        loss.backward()
        is_right = (logits.argmax(dim=-1) == targets) & is_word
        return torch.stack([loss.detach(), is_right.sum(), is_word.sum()])

    run_micro_step = micro_step
    if is_cuda:
        for p in parameters:
            # A recorded graph writes to fixed addresses. So on a GPU every gradient is made once,
            # zeroed rather than freed, and written into rather than replaced.
            p.grad = torch.zeros_like(p)
        if cfg.graphs:
            run_micro_step = CudaGraphs(micro_step)

    if processes.is_first:
        record = Record(cfg, log, progress, len(stages))
    began = time.perf_counter() - progress.seconds  # as if without a break
    stop_at = math.inf if cfg.minutes is None else progress.seconds + 60 * cfg.minutes
    # is_call_done: the run has reached its end, or this call's --minutes are spent.
    # must_stop: that, or Ctrl-C was pressed. Then the loop ends.
    # A finished run that is resumed takes no step.
    is_call_done = progress.share_done(cfg) >= 1
    must_stop = is_call_done

    while True:
        # Every process computes these three, but only the first one's are right: it alone has the
        # clock, sees Ctrl-C and ends stages. All go on with its values.
        lr = learning_rate(cfg, progress.step, progress.share_done(cfg))
        lr, stage_number, must_stop = processes.told_by_first(lr, curriculum.number, must_stop)
        if must_stop:
            break
        curriculum.number = int(stage_number)
        stage = curriculum.stage
        batches.enter(stage)  # within a stage this does nothing
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("multiple", 1.0)  # older checkpoints lack it

        # One step: the gradients of this process's micro-batches, their sum over all processes
        sums = torch.zeros(4, device=device)  # loss, right words, words, tokens
        n_tokens = 0
        for _ in range(cfg.accumulate // processes.n):
            batch = next(batches).to(device)
            n_tokens += batch.idx.numel()  # before the padding for CUDA graphs
            is_longest = batch.is_longest  # as of all batches of a step
            if is_cuda:
                batch = with_fewer_shapes(batch, stage)
            S = length_of_segments(batch, stage, cfg, model.cfg.segment_len)
            sums[:3] += run_micro_step(S, batch.idx, batch.at, batch.targets, batch.is_word)
        sums[3] = n_tokens
        sums = processes.sum_gradients(parameters, sums)  # the four travel with the gradients
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not is_cuda)
        if processes.n > 1:
            n_tokens = int(sums[3])  # several GPUs are waited for here
        progress.step += 1
        progress.tokens += n_tokens
        if not processes.is_first:
            continue

        # What is due at the end of this step? The last step of a call is always logged and saved.
        record.add_step(n_tokens, is_longest, norm, sums)
        curriculum.steps += 1
        progress.seconds = time.perf_counter() - began
        is_call_done = progress.share_done(cfg) >= 1 or progress.seconds >= stop_at
        must_stop = is_call_done or bool(interrupts)
        is_validation_due = progress.tokens // cfg.eval_every > (
            (progress.tokens - n_tokens) // cfg.eval_every
        )
        is_line_due = progress.step % LOG_EVERY == 0

        if is_line_due or is_validation_due or must_stop:
            accuracies = record.write_line(curriculum, lr)  # this waits for the device
            curriculum.recent.extend(accuracies)

        if is_line_due:
            message = curriculum.advance()
            if message is not None:
                record.say(message)
                if curriculum.is_last:
                    progress.end = min(progress.end, progress.tokens + cfg.final_tokens)
                    record.new_end()

        # Save before the evaluation: whoever presses Ctrl-C twice shall not lose anything.
        if is_validation_due or must_stop:
            save_checkpoint(
                path,
                model,
                **tokenizer.for_checkpoint(),
                train=asdict(cfg),
                optimizer=optimizer.state_dict(),
                curriculum=curriculum.state_dict(),
                progress=asdict(progress),
                texts=data.fingerprint,
            )

        # If Ctrl-C was pressed during the save, no time is spent here. The next step notices it.
        is_last_of_text = cfg.is_text and is_call_done  # so that the curve ends where the run does
        if (is_validation_due and not must_stop or is_last_of_text) and not interrupts:
            threads = processes.eval_threads
            if cfg.is_text:
                found = validate_text(model, tokenizer, data.val_set, threads)
                shown = [f"{loss:.3f} {unit}" for unit, loss in found.items()]
            else:
                found = validate_answers(cfg, model, tokenizer, data.val_set, threads)
                shown = [f"{name} {100 * share:.0f} %" for name, share in found.items()]
            record.write(validation=found)
            record.say(f"validation {', '.join(shown)}")
            record.restart_clock()

    batches.close()
    if not processes.is_first:
        return
    if interrupts and not is_call_done:
        record.bar.close()
        print(f"saved {path}: go on with --resume", flush=True)
        raise KeyboardInterrupt
    record.close(path)


# -------------------------------------------------------------------------------------------------
# From a command line to the loop


def bytes_of_step(model: LM2 | RMT, cfg: TrainConfig) -> tuple[int, int]:
    """About how many bytes a step takes: first of weights, gradients and AdamW's two moments, then
    of what one micro-batch keeps for its gradient.

    The second is counted on a twin on the meta device, whose tensors have shapes and no content.
    It takes a second or two."""
    total, _ = model.n_params()
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = model.cfg
    if sizes.kind == "lm2":
        # A NeuralMemory switches autocast off, which the meta device does not know. It keeps about
        # as much as LM2's memory.
        sizes = replace(sizes, memory_kind="lm2", n_slot=min(sizes.n_slot, sizes.n_embd))
    with torch.device("meta"):
        twin = build_model(sizes)
    own = set()  # the weights, which are not kept once more
    is_trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in twin.named_parameters():
        p.requires_grad = is_trained.get(name, True)  # the twin's memory may have other names
        own.add(p.untyped_storage()._cdata)
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The meta device makes whole matrices of attention, and other devices do not.
        is_attention = tensor.shape[-2:] == (segment_len, segment_len)
        if storage._cdata not in own and not is_attention:
            kept[storage._cdata] = storage
        return tensor

    segment_len = min(sizes.segment_len, cfg.batch_tokens)
    n_segments = cfg.batch_tokens // segment_len
    idx = torch.zeros(1, n_segments * segment_len, dtype=torch.int64, device="meta")
    at = None if cfg.is_text else idx[0, ::10]  # answers are few of a story's tokens
    targets = idx if at is None else at
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, _, _ = twin(idx, targets, at=at, segment_len=segment_len)
    activations = sum(storage.nbytes() for storage in kept.values())
    if cfg.recompute:
        # One block at a time is run again, and of the others the input is kept.
        activations //= sizes.n_layer
        activations += 4 * sizes.n_layer * idx.numel() * sizes.n_embd
    activations += 2 * 4 * logits.numel()  # the gradient of the logits is made from a copy
    return 4 * total + 12 * n_trained, activations


def train_memory_alone(model: LM2 | RMT) -> None:
    """Keep all weights as they are but those of the memory. ValueError if there are none."""
    if model.cfg.kind != "lm2":
        raise ValueError("--train memory, but the model has none: say where with --mem_blocks")
    for name, p in model.named_parameters():
        p.requires_grad = ".memory." in name


def make_model(flags: Flags, device: torch.device) -> tuple[LM2 | RMT, Tokenizer, dict | None]:
    """The model on the device, its tokenizer, and the checkpoint to go on from if there is one.

    ValueError for a broken checkpoint, and for --compile where there is no compiler."""
    cfg = flags.cfg
    if cfg.compile:
        check_compiler(device)
    saved = None
    if flags.resume:
        path = Path(cfg.out_dir, "ckpt.pt")
        model, saved = load_checkpoint(path)
        tokenizer = of_checkpoint(saved, path)
    elif cfg.init is not None and holds_llama(cfg.init):
        llama = load_llama(cfg.init)
        tokenizer = read_tokenizer(cfg.init, llama.cfg.vocab_size)
        torch.manual_seed(cfg.seed)
        model = graft(llama, LM2Config(**flags.sizes))
    elif cfg.init is not None:
        model, content = load_checkpoint(cfg.init)
        tokenizer = of_checkpoint(content, cfg.init)
        is_shipped = tokenizer.for_checkpoint() == choose_tokenizer("shipped").for_checkpoint()
        is_own = "released" not in content and not is_shipped  # a tokenizer that this code made
        if was_trained_on_text(content) and not cfg.is_text and is_own:
            raise ValueError(
                f"--init {cfg.init} has another tokenizer than the shipped one, which stories "
                "need: train it with --tokenizer shipped"
            )
    else:
        tokenizer = choose_tokenizer(cfg.tokenizer, cfg.text)
        torch.manual_seed(cfg.seed)
        model = build_model(LM2Config(**flags.sizes | dict(vocab_size=tokenizer.n_vocab)))
    if cfg.train == "memory":
        train_memory_alone(model)
    model.to(device)
    model.recompute = cfg.recompute
    if device.type == "cpu" and is_bfloat16(cfg, device):
        bfloat16_layers(model)
    if cfg.compile:
        compile_blocks(model, dynamic=True if device.type == "cuda" else None)
    return model, tokenizer, saved


def make_story_data(cfg: TrainConfig, tokenizer: Tokenizer, segment_len: int) -> Data:
    """The data of a run on stories.

    segment_len  of the model
    ValueError for files, tasks or lengths that do not work. It comes before the first step."""
    documents = background.documents(cfg.background)
    train_set = Builder(tokenizer, "train", cfg.background, documents, cfg.stories, names=cfg.names)
    val_set = Builder(tokenizer, "val", cfg.background, documents, cfg.stories)
    check_cells(generated(val_set, cfg.seed), cfg.tasks, cfg.lengths)
    for task in cfg.tasks:
        train_set.story(task, 2, random.Random(0))  # a task without stories is found here
    digest = hashlib.blake2b(digest_size=8)
    for builder in (train_set, val_set):
        digest.update("".join(builder.sentences).encode())
        if cfg.stories is None:
            continue
        for task in cfg.tasks:
            digest.update(find_file(cfg.stories, task, builder.part).read_bytes())
    return Data(make_lessons(cfg, train_set, segment_len), train_set, val_set, digest.hexdigest())


def check_nobody_writes(log_path: Path) -> None:
    """ValueError if another run writes its log there."""
    if log_path.exists():
        with JsonLines(log_path, math.inf):
            pass


def make_text_data(
    cfg: TrainConfig, tokenizer: Tokenizer, sizes: LM2Config, processes: Processes, resume: bool
) -> Data:
    """The data of a run on text. Files of token ids are used where they lie. The ids of other texts
    are written to --out_dir once, and --resume reads them again.

    sizes  of the model
    ValueError for texts that do not work. It comes before the first step."""
    given = token_folder(cfg.text)
    folder = given or Path(cfg.out_dir, "text")
    is_there = all((folder / name).is_file() for name in TOKEN_FILES)
    if processes.is_first and given is None and not (resume and is_there):
        check_nobody_writes(Path(cfg.out_dir, LOG_NAME))
        write_documents(folder, cfg.text, tokenizer, cfg.skip_bad)
    processes.wait_for_first()
    train_set, val_set = [read_tokens(folder / name, tokenizer) for name in TOKEN_FILES]
    windows = Windows(train_set, cfg.batch_size, cfg.batch_tokens, cfg.seed)
    for stage in parse_stages(cfg.stages, sizes.segment_len, cfg.tasks, cfg.whole):
        n_tokens = stage.segments * stage.segment_len
        if stage.segments == 1 and sizes.kind != "llama":
            raise ValueError(
                f"a window of {n_tokens} tokens is one segment, so that no memory is ever used: "
                f"give longer ones, such as --stages text:{8 * sizes.segment_len}"
            )
        windows.places_up_to(n_tokens)  # texts that are too short are found here
    digest = hashlib.blake2b(digest_size=8)
    for documents in (train_set, val_set):
        digest.update(str(len(documents.ids)).encode())
        digest.update(documents.ids[:1_000_000].tobytes())
        digest.update(documents.ids[-1_000_000:].tobytes())
    return Data(windows, train_set, val_set, digest.hexdigest())


def table_file(cfg: TrainConfig) -> str:
    """The name of the file with what the closing table shows."""
    return "loss.json" if cfg.is_text else "table.jsonl"


def describe(
    cfg: TrainConfig,
    model: LM2 | RMT,
    tokenizer: Tokenizer,
    data: Data,
    device: torch.device,
    processes: Processes,
) -> str:
    """The table that is printed before the first step."""
    sizes = model.cfg
    total, memory = model.n_params()
    if sizes.kind == "lm2":
        blocks = " ".join(str(i) for i in sizes.mem_blocks)
        holds = f"{sizes.n_slot} slots"
        if sizes.memory_kind != "lm2":
            holds = f"a memory of the kind {sizes.memory_kind}"
        remembers = f"{holds} in block {blocks}"
        if sizes.n_mem_layer > 1:
            remembers = f"{holds} in each of the blocks {blocks}"
    elif sizes.kind == "rmt":
        remembers = f"{sizes.n_mem_token} memory tokens"
    else:
        remembers = "no memory"
    if cfg.device != "auto":
        why = "asked for"
    elif device.type == "cuda":
        why = "found"
    else:
        why = "no CUDA device here"
    number_type = "bfloat16" if is_bfloat16(cfg, device) else "float32"
    shared_by = f"{processes.train_threads} threads" if processes.train_threads > 1 else "1 thread"
    if processes.n > 1:
        shared_by = f"{processes.n} processes of {shared_by}"
    end = f"{cfg.tokens / 1e6:,.1f} M tokens"
    if cfg.final_tokens < cfg.tokens:
        end += f", or {cfg.final_tokens / 1e6:,.1f} M in the last stage"
    if cfg.total_minutes is not None:
        end = f"{cfg.total_minutes:g} minutes, or {end}"
    read_as = "windows" if cfg.is_text else "documents"
    rows = [
        ("model", f"{sizes.kind}, {total:,} parameters, {memory:,} of them memory"),
        ("", f"{sizes.n_layer} blocks of width {sizes.n_embd}, {remembers}"),
        ("", f"segments of {sizes.segment_len} tokens"),
        *describe_start(cfg, model, processes),
        *describe_data(cfg, sizes, tokenizer, data),
        ("step", f"{cfg.accumulate} micro-batches of up to {cfg.batch_size} {read_as} and"),
        ("", f"{cfg.batch_tokens:,} tokens, learning rate {cfg.lr:g}"),
        ("end", f"after {end}"),
        ("device", f"{device} ({why}), {number_type}, {shared_by}"),
        ("output", f"{Path(cfg.out_dir)}: ckpt.pt, metrics.jsonl, {table_file(cfg)}"),
    ]
    return "\n".join(f"{name:8}{value}" for name, value in rows)


def describe_start(
    cfg: TrainConfig, model: LM2 | RMT, processes: Processes
) -> list[tuple[str, str]]:
    """The rows of that table that tell where a run starts, and for a large model what it takes."""
    if cfg.init is None:
        rows = [("recipe", f"{cfg.recipe}, with the preset {cfg.preset}")]
    else:
        rows = [("recipe", f"{cfg.recipe}, from the weights of {cfg.init}")]
    if cfg.train == "memory":
        rows.append(("", "the memory alone is trained"))
    total, _ = model.n_params()
    if total >= LARGE:
        fixed, activations = bytes_of_step(model, cfg)
        whole = (fixed + activations) / 2**30
        batch = activations / 2**30
        rows.append(("memory", f"a step takes about {whole:,.1f} GiB, of which {batch:,.1f} GiB"))
        what_for = f"are for the {cfg.batch_tokens:,} tokens of a micro-batch"
        if processes.n > 1:
            what_for += f", in each of {processes.n} processes"
        rows.append(("", what_for))
    return rows


def describe_data(
    cfg: TrainConfig, sizes: LM2Config, tokenizer: Tokenizer, data: Data
) -> list[tuple[str, str]]:
    """The rows of that table that tell what is learned."""
    if cfg.is_text:
        stages = parse_stages(cfg.stages, sizes.segment_len, cfg.tasks, cfg.whole)
        sources = describe_sources(cfg.text)
        if not cfg.text:
            sources += f", that of {platform.python_version()}"
        longest = max(stage.segments * stage.segment_len for stage in stages)
        n_train = len(data.train_set)
        n_short = int((data.train_set.sizes <= longest).sum())
        return [
            ("text", sources),
            ("", f"{n_train:,} documents to train on, {len(data.train_set.ids):,} tokens"),
            ("", f"{n_short:,} of them are too short for a window and left out"),
            ("", f"{len(data.val_set):,} documents to validate, {len(data.val_set.ids):,} tokens"),
            ("", f"a vocabulary of {tokenizer.n_vocab:,} tokens"),
            ("windows", ", ".join(str(stage) for stage in stages)),
        ]
    tasks = " ".join(cfg.tasks)
    if cfg.names == "many":
        tasks += ", with many names in training"
    prose = cfg.background or "Python's documentation"
    n_train = len(data.train_set.prose)
    n_val = len(data.val_set.prose)
    return [
        ("tasks", tasks),
        ("stages", f"{len(cfg.stages)}, from {cfg.stages[0]} to {cfg.stages[-1]}"),
        ("prose", f"{prose}: {n_train:,} tokens to train on,"),
        ("", f"{n_val:,} to validate, {data.train_set.chars_per_token:.2f} characters each"),
    ]


def run(flags: Flags, processes: Processes, meet_at: str | None) -> None:
    """What each process does: it trains. The first one also prints and writes the closing table.

    meet_at  the address at which the processes meet; None where there is only one"""
    cfg = flags.cfg
    interrupts = []  # when Ctrl-C was pressed
    threads_before = torch.get_num_threads()
    torch.set_num_threads(processes.train_threads)
    try:
        device = pick_device(cfg.device)
        if device.type == "cuda" and processes.n > 1:
            device = torch.device("cuda", processes.local_rank)
            torch.cuda.set_device(device)
        if meet_at is not None:
            processes.join(meet_at, device.type)
        model, tokenizer, saved = make_model(flags, device)
        if cfg.is_text:
            data = make_text_data(cfg, tokenizer, model.cfg, processes, flags.resume)
        else:
            data = make_story_data(cfg, tokenizer, model.cfg.segment_len)
        if saved is not None and saved.get("texts", data.fingerprint) != data.fingerprint:
            raise ValueError(
                "--resume finds other texts than the run was trained on: name them with "
                "--background, --stories or --text. Python's own texts change with its version"
            )
        arguments = (cfg, model, tokenizer, data, device, processes, saved)
        if not processes.is_first:
            try:
                train(*arguments, log=None, interrupts=[])
            except ProcessLost:
                raise  # the first process tells it
            except (ValueError, OSError) as error:
                print(f"train.py: process {processes.rank}: {error}", file=sys.stderr, flush=True)
                os._exit(HAS_TOLD)  # at once: to leave in order could wait for the others
            return

        folder = Path(cfg.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        first_step = None if saved is None else saved["progress"]["step"]
        with (
            interrupts_kept(interrupts),
            JsonLines(folder / LOG_NAME, first_step) as log,
        ):
            print(describe(cfg, model, tokenizer, data, device, processes), flush=True)
            if first_step is not None:
                print(f"goes on from step {first_step}", flush=True)
            train(*arguments, log, interrupts)
        processes.leave()  # the others have ended
        path = folder / table_file(cfg)
        if cfg.is_text:
            with evaluating(processes.eval_threads):
                show_losses(model, tokenizer, data.val_set, path)
                show_samples(model, tokenizer)
        else:
            show_answers(cfg, model, tokenizer, data.val_set, path, processes.eval_threads)
    except ProcessLost:
        if torch.cuda.is_initialized():
            processes.group = None  # to leave it in order would wait for the lost process
        raise
    except RuntimeError as error:
        if interrupts and cfg.compile:
            raise KeyboardInterrupt from error  # Ctrl-C has ended the compiler, too
        raise
    finally:
        processes.leave()
        torch.set_num_threads(threads_before)


def show_answers(
    cfg: TrainConfig,
    model: LM2 | RMT,
    tokenizer: Tokenizer,
    val_set: Builder,
    path: Path,
    threads: int,
) -> None:
    """Print the table of accuracy against length, and write its answers to a file."""
    modes = ("on",) if model.cfg.kind == "llama" else ("on", "off")
    work = [(task, length, cfg.table_n) for task in cfg.tasks for length in cfg.lengths]
    rows = ask(model, tokenizer, val_set, work, TABLE_SEED, modes, threads, show=True)
    save(rows, path)
    print(table(to_cells(rows)))


def show_losses(model: LM2 | RMT, tokenizer: Tokenizer, val_set: Documents, path: Path) -> None:
    """Print the table of the loss by position, and write its figures to a file."""
    measured = measure(model, tokenizer, val_set)
    columns = {mode: (measured, mode) for mode in measured.nats}
    print(loss_table(columns))
    save_json(summary(measured) | dict(python=platform.python_version()), path)


def show_samples(model: LM2 | RMT, tokenizer: Tokenizer) -> None:
    """Print some texts that the model writes from nothing."""
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(SAMPLE_SEED)
    first_id = tokenizer.eot if tokenizer.bos is None else tokenizer.bos
    start = torch.full((N_SAMPLES, 1), first_id, device=device)
    samples = model.generate(start, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, generator)
    for ids in samples[:, 1:].tolist():
        for i, token in enumerate(ids):
            if token in tokenizer.ends:
                ids = ids[:i]
                break
        print(f"\n{' a sample ':-^79}\n{tokenizer.decode(ids)}")


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    if argv is None:
        argv = sys.argv[1:]
    if not dist.is_torchelastic_launched():
        with one_line("train.py"):
            flags = read_flags(argv)
            processes = choose_processes(flags.cfg)
            with helpers_started(processes, flags) as meet_at:
                run(flags, processes, meet_at)
        return
    # torchrun has started this process and the others.
    is_first = os.environ["RANK"] == "0"
    if not is_first:
        ignore_interrupts()  # they are for the first process
    with one_line("train.py", is_silent=not is_first):
        flags = read_flags(argv)
        run(flags, processes_of_torchrun(flags.cfg), "env://")


if __name__ == "__main__":
    main()
