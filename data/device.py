"""What the machine has: the device, graphs and compiled blocks on it, the memory used, how it is treated.

    from data.device import pick_device, compile_blocks, CudaGraphs, bfloat16_layers, peak_memory

Writes nothing.
"""
import ctypes
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA if there is one; ValueError for a device that this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # the angles are made in float64
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)       # graphs are recorded on the current one
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError):
        raise ValueError(f"--device {name!r} is not on this machine: give cpu, cuda or auto") from None


def check_compiler(device: torch.device) -> None:
    """ValueError where torch.compile has no compiler: one of C++ for a CPU, of C for a GPU's launches."""
    gpu = ("cl",) if sys.platform == "win32" else ("gcc", "clang")
    names = gpu if device.type == "cuda" else (dict(darwin="clang++", win32="cl").get(sys.platform, "g++"),)
    if not any(map(shutil.which, names)):
        raise ValueError(f"--compile finds no compiler here: install {names[0]} or give --no-compile")


def compile_blocks(model: nn.Module, **options) -> None:
    """Compile in place what whole segments of an LM2 pass through, with torch.compile's options: three graphs
    a block, without breaks, shared by all blocks; the loop over segments stays outside, so that a longer
    document needs no other graph. Open segments, calls without gradients, and banks that are not written run
    as they are. What nothing has used may get a gradient of zeros instead of none."""
    config = torch._dynamo.config  # graphs a function, beyond which it refuses: ours are few, but not 8
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # PyTorch 2.6
    setattr(config, limit, max(getattr(config, limit), 64))
    if options.get("dynamic"):
        torch.fx.experimental._config.use_duck_shape = False    # 8 rows are not 8 heads, in all that follows
    for block in model.layers:
        parts = block.before, block.memory and block.memory.step, block.after
        block.fast = tuple(part and torch.compile(part, fullgraph=True, **options) for part in parts)


class CudaGraphs:
    """f(*values, *tensors) -> Tensor on a GPU, as a CUDA graph for each set of values and shapes, recorded at
    its second call (the first compiles and loads its kernels): one launch for thousands of small kernels,
    which would else wait for Python. f must not wait for the device; the gradients that it adds to and all
    else that it reads must stay in place. Tensors come last, of a shape always of one dtype. The graphs, kept
    as long as this, share their memory: one runs at a time."""

    def __init__(self, f: Callable[..., Tensor]):
        self.f, self.pool, self.graphs = f, torch.cuda.graph_pool_handle(), {}

    def __call__(self, *args) -> Tensor:
        tensors = [a for a in args if isinstance(a, Tensor)]
        values = args[:len(args) - len(tensors)]
        key = *values, *(t.shape for t in tensors)
        if key not in self.graphs:
            self.graphs[key], output = None, self.f(*args)
            torch.cuda.empty_cache()            # the graphs take theirs from a pool of their own
            return output
        if self.graphs[key] is None:
            inputs, graph = [t.clone() for t in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.f(*values, *inputs)
            self.graphs[key] = graph, inputs, output
        graph, inputs, output = self.graphs[key]
        for own, given in zip(inputs, tensors):
            own.copy_(given)
        graph.replay()
        return output.clone()


def bfloat16_layers(model: nn.Module) -> None:
    """Let every linear layer, from now on, multiply in bfloat16; weights, gradients of weights, and all else
    stay as they are. Autocast does so on a GPU. On a CPU that has tiles for it (AMX) such a product takes a
    quarter of the time, but autocast would take small attention along, which is slower there in bfloat16."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = partial(bfloat16_product, layer)


def bfloat16_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out) in the dtype of x."""
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return F.linear(x.bfloat16(), layer.weight.bfloat16(), bias).to(x.dtype)


def peak_memory() -> int:
    """Peak resident set of this process in bytes (0 where the system does not tell)."""
    status = Path("/proc/self/status")  # Linux: ru_maxrss would be the parent's, if that was larger
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees: to give it back and take it again costs 10 to 25 % of a CPU step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another system or C library: nothing to mend
