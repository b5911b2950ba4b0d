"""What all command lines here share: flags made from a dataclass, mistakes that end in one line, exit code 2.

    from data.cli import Parser, one_line

Writes nothing but the line on standard error.
"""
import argparse
import contextlib
import functools
import inspect
import json
import signal
import sys
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None            # Windows: two runs in one folder are not told apart there


class Parser(argparse.ArgumentParser):
    """argparse without prefix matching, and with one line for a mistake instead of the whole usage."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")

    def add_fields(self, config: type, skip: tuple[str, ...] = (), shown: dict | None = None):
        """One flag for each field of a dataclass: its type, its default, and the comment behind it as help.
        A flag that is not given is None, so that a preset can be told from an explicit choice."""
        for f in fields(config):
            if f.name in skip:
                continue
            kind, note = described(config)[f.name]
            default = (shown or {}).get(f.name, None if f.default is MISSING else f.default)
            text = f"{note} (default {default})".replace("%", "%%")
            if kind is bool:
                self.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=None,
                                  help=text)
            else:
                self.add_argument(f"--{f.name}", type=kind, default=None, metavar=kind.__name__.upper(),
                                  help=text)


@functools.cache
def described(config: type) -> dict[str, tuple[type, str]]:
    """Of each field of a dataclass its plain type (int for `int` and for `int | None`) and the comment behind
    its line `name: type = default` of the source."""
    kinds, found = typing.get_type_hints(config), {}
    for line in inspect.getsource(config).splitlines():
        code, _, note = line.partition("  # ")
        name = code.strip().partition(":")[0]
        if name in kinds and name not in found:
            parts = typing.get_args(kinds[name]) or (kinds[name],)
            found[name] = next(kind for kind in parts if kind is not types.NoneType), note.strip()
    return found


@contextlib.contextmanager
def one_line(prog: str):
    """A user's mistake (ValueError, a file that cannot be used) ends in one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130)
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        sys.stderr.close()
        raise SystemExit(0)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        full = ("not enough memory", "out of memory", "can't allocate memory")      # torch's words for it
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in full):
            raise                       # ours
        if isinstance(error, (MemoryError, RuntimeError)):
            error = ValueError("not enough memory: smaller batches, models or documents need less")
        message = (f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename
                   else str(error))
        print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


@contextlib.contextmanager
def interrupts_kept(asked: list):
    """Ctrl-C is noted in `asked` meanwhile, for whoever ends in order; asked twice it ends at once."""
    def note(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def replacing(path: str | Path):
    """A file to write beside `path`, which takes its place when the block ends; after an error nothing has
    changed."""
    partial = Path(f"{path}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_file():
            partial.unlink()


class JsonLines:
    """A file of JSON, a line a call of `write`, by one process at a time. Of one that is there already the
    lines up to a step are kept: a run that was killed has logged steps that are taken again; without a step
    it starts anew. ValueError while another process writes it, and for lines that are no such JSON."""

    def __init__(self, path: Path, step: int | None):
        self.file, kept = open(path, "a+b"), 0
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run writes {path}: give another --out_dir, or end that one") from None
        self.file.seek(0)
        for number, line in enumerate(self.file if step is not None else (), 1):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}: line {number} is none of a run's: move the file away") from None
            kept += len(line)
        self.file.truncate(kept)

    def write(self, **values) -> None:
        self.file.write(json.dumps(values).encode() + b"\n")
        self.file.flush()


def save_json(value, path: str | Path) -> None:
    """Write a value as JSON, one line for each item of its lists; an older file stays until it is whole."""
    text = json.dumps(value, ensure_ascii=False).replace("}, {", "},\n {")
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
