"""What all command lines here share.

    from data.common import Parser, one_line

Flags: `Parser` and `flag` make them from a dataclass. Ends: `one_line` ends a user's mistake with
one line and exit code 2, `interrupts_kept` lets a run end in order, `ignore_interrupts` and
`interrupts_handled_by` are for the processes that it starts. Files: `replacing` writes them
as a whole, `lock` keeps other processes away, `JsonLines` and `save_json` write JSON. The machine:
`pick_device`, `peak_memory` and `keep_freed_memory`. Writes only what it is called for.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import signal
import sys
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: there a second run in the same folder is not noticed


def flag(default: Any, help: str, is_path: bool = False) -> Any:
    """A field of a dataclass with the help text of its flag.

    is_path  the values are paths, which may hold spaces"""
    return dataclasses.field(default=default, metadata=dict(help=help, is_path=is_path))


class Parser(argparse.ArgumentParser):
    """argparse without prefix matching, and with one line for a mistake instead of the usage."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")

    def add_settings(self, config: type) -> None:
        """Add a flag for each field of a dataclass, all of which were made by `flag`.

        A flag that is not given is None, so that it can be told from one that is given with its
        default. A tuple of texts is given with spaces between, quoted or not; a path that holds a
        space is quoted."""
        kinds = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            kind = kinds[field.name]
            options = dict(default=None, help=help_text(field.metadata["help"], field.default))
            if typing.get_origin(kind) is tuple:
                if field.metadata["is_path"]:
                    options |= dict(action=Tuple, metavar="PATH")
                else:
                    options |= dict(action=Words, metavar="TEXT")
                self.add_argument(f"--{field.name}", nargs="+", **options)
                continue
            if isinstance(kind, types.UnionType):
                (kind,) = set(typing.get_args(kind)) - {types.NoneType}
            if kind is bool:
                self.add_argument(
                    f"--{field.name}", action=argparse.BooleanOptionalAction, **options
                )
            else:
                self.add_argument(
                    f"--{field.name}", type=kind, metavar=kind.__name__.upper(), **options
                )

    def add_sizes(self, helps: dict[str, str], defaults: Any) -> None:
        """Add flags for whole numbers, names, and what is on or off. defaults has an attribute for
        each of them. Where that is a tuple, the flag takes one number or more."""
        group = self.add_argument_group("sizes of the model")
        for name, text in helps.items():
            default = getattr(defaults, name)
            if isinstance(default, bool):
                group.add_argument(f"--{name}", action="store_true", default=None, help=text)
                continue
            n_values = "+" if isinstance(default, tuple) else None
            kind = str if isinstance(default, str) else int
            group.add_argument(
                f"--{name}",
                nargs=n_values,
                type=kind,
                metavar=kind.__name__.upper(),
                help=help_text(text, default),
            )


class Tuple(argparse.Action):
    """Keeps the arguments of a flag as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class Words(argparse.Action):
    """Keeps the words of all arguments of a flag as one tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(" ".join(values).split()))


def help_text(text: str, default: Any) -> str:
    """The help of a flag with its default behind it, as argparse takes it."""
    if isinstance(default, tuple):
        default = " ".join(str(value) for value in default)
    if default not in (None, ""):
        text = f"{text} (default {default})"
    return text.replace("%", "%%")


# What torch's errors say when memory is lacking.
OUT_OF_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")


@contextlib.contextmanager
def one_line(prog: str, is_silent: bool = False) -> Iterator[None]:
    """Within it a user's mistake (a ValueError, a file that cannot be used) ends the program with
    one line on standard error and exit code 2. So does a lack of memory.

    is_silent  whether the exit code is 1 and no line is printed, because another process prints
               it"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # "?" for a sign that the console lacks
    try:
        yield
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        sys.stderr.close()
        raise SystemExit(0) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            words in str(error) for words in OUT_OF_MEMORY
        ):
            raise  # this is an error in the program, not a user's mistake
        if is_silent:
            raise SystemExit(1) from None
        if isinstance(error, (MemoryError, RuntimeError)):
            message = "not enough memory: smaller batches, models or documents need less"
        elif isinstance(error, OSError) and error.filename:
            message = f"{error.strerror}: {error.filename}"
        elif isinstance(error, OSError) and error.strerror:
            message = error.strerror  # such as a full disk
        else:
            message = str(error)
        print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None


INTERRUPTS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what ends a job


def ignore_interrupts() -> None:
    """Ignore Ctrl-C and SIGTERM from now on, in a process that another one ends."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_handled_by(handler: Any) -> Iterator[None]:
    """Within it this handler, as signal.signal takes it, gets Ctrl-C and SIGTERM."""
    before = {number: signal.signal(number, handler) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


@contextlib.contextmanager
def interrupts_kept(times: list[float]) -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM only note their time in `times`, so that a run can end in order.
    A second one raises KeyboardInterrupt at once.

    A terminal sends Ctrl-C to a launcher such as torchrun, too, which passes it on. So a signal
    within two seconds of the first one counts as the same one."""

    def note(*_):
        now = time.monotonic()
        if not times:
            times.append(now)
        elif now - times[0] > 2:
            raise KeyboardInterrupt

    with interrupts_handled_by(note):
        yield


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends. After an error
    nothing has changed."""
    partial = Path(f"{path}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_file():
            partial.unlink()


def lock(file: IO, message: str) -> None:
    """Keep other processes from an open file until it is closed. ValueError with the message if one
    has it already."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(message) from None
    except OSError:
        pass  # some file systems have no locks, such as some network mounts


class JsonLines:
    """A file of JSON, one line for each call of `write`, which one process writes at a time.

    ValueError while another process writes it, and if a line of an older file is not valid."""

    def __init__(self, path: Path, step: int | None):
        """step  keep the lines of an older file up to this step. Later ones are dropped, as the
        resumed run takes these steps again. None drops all"""
        self.file = open(path, "a+b")  # noqa: SIM115
        lock(self.file, f"another run writes {path}: give another --out_dir, or end that one")
        n_kept = 0  # bytes
        if step is not None:
            self.file.seek(0)
            for number, line in enumerate(self.file, 1):
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, TypeError, KeyError):
                    raise ValueError(
                        f"{path}: line {number} is not a line of a run: move the file away"
                    ) from None
                n_kept += len(line)
        self.file.truncate(n_kept)

    def write(self, **values: Any) -> None:
        """Add a line."""
        self.file.write(json.dumps(values).encode() + b"\n")
        self.file.flush()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def save_json(value: Any, path: str | Path) -> None:
    """Write a value as JSON, one line for each item of its lists. An older file stays until the new
    one is whole."""
    text = json.dumps(value, ensure_ascii=False).replace("}, {", "},\n {")
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def pick_device(name: str) -> torch.device:
    """The device of a flag; "auto" takes CUDA if there is one. ValueError if this machine does not
    have the device."""
    if name.startswith("mps"):
        raise ValueError(f"--device {name} was never tried with this code: give cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # fails without the device
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # graphs are recorded on the current one
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError):
        raise ValueError(
            f"--device {name!r} is not on this machine: give cpu, cuda or auto"
        ) from None


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
    """Let glibc keep the memory that a step frees. Returning it to the system and asking for it
    again costs 10 to 25 % of a training step on a CPU."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another system or C library: nothing to mend
