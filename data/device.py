"""What the machine has: the device, the memory used, and how freed memory is treated.

    from data.device import pick_device, peak_memory, keep_freed_memory

Writes nothing.
"""
import ctypes
import sys
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA if there is one; ValueError for a device that this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # the angles are made in float64
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise ValueError(f"--device {name!r} is not on this machine: give cpu, cuda or auto") from None


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
