"""What the machine has: its device, compiled blocks and CUDA graphs on it, the memory in use.

    from data.device import pick_device, compile_blocks, CudaGraphs, bfloat16_layers, peak_memory

Writes nothing.
"""

import contextlib
import ctypes
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def pick_device(name: str) -> torch.device:
    """The device of a flag; "auto" takes CUDA if there is one. ValueError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # fails where it is not
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # graphs are recorded on the current one
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError):
        raise ValueError(
            f"--device {name!r} is not on this machine: give cpu, cuda or auto"
        ) from None


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


MEMORY_PARTS = ("queries", "candidates", "write", "keys_and_values", "read")


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
            for name in MEMORY_PARTS:
                part = getattr(block.memory, name)
                setattr(block.memory, name, torch.compile(part, fullgraph=True, **options))


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_blocks` was called on this model."""
    return model.layers[0].attention._compiled_call_impl is not None


def run_eager() -> contextlib.AbstractContextManager:
    """Within it compiled models run as they are written: an evaluation has too many shapes."""
    return torch.compiler.set_stance("force_eager")


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


def peak_memory() -> int:
    """The peak resident set of this process in bytes, 0 where the system does not tell."""
    status = Path("/proc/self/status")  # Linux: ru_maxrss would be the parent's, if that was larger
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


M_MMAP_MAX = -4
M_TRIM_THRESHOLD = -1


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees. To give it back and take it again costs 10 to 25 % of a
    training step on a CPU."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another system or C library: nothing to mend
