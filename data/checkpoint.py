"""Checkpoints: the model, its configuration and tokenizer, and what training needs to go on, in one file.

    model, tokenizer, content = load_checkpoint("out/ckpt.pt")
    python -m data.checkpoint out/ckpt.pt small.pt      # the model alone in bfloat16, a sixth of the size

Tensors and plain values only, so that loading one runs no code. Writes where it is told, all or nothing.
"""
import hashlib
from dataclasses import asdict
from pathlib import Path

import torch

from data.cli import Parser, one_line, replacing
from data.tokenizer import Tokenizer
from lm2 import LM2, LM2Config

FORMAT = "lm2-checkpoint-1"
KEPT = "tasks", "recipe", "preset", "background", "seed"   # of the training, where the model alone is kept


def save_checkpoint(path: str | Path, model: LM2, tokenizer: Tokenizer, **values) -> None:
    """Write model, tokenizer and `values` (tensors and plain values only) to `path`; a file that is there
    stays whole until the new one is complete. Raises OSError if it cannot be written."""
    content = dict(format=FORMAT, config=asdict(model.cfg), model=model.state_dict(),
                   tokenizer=tokenizer.ranks)
    try:
        with replacing(path) as partial, open(partial, "wb") as file:
            torch.save(content | values, file)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise OSError(f"cannot write the checkpoint {path}: {error}") from None


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[LM2, Tokenizer, dict]:
    """A file of `save_checkpoint` -> the model on `device`, its tokenizer, and everything the file holds.
    Raises ValueError, in one line, for a file that is missing, cut short, or of another format."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: train one (python train.py) or name another")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a broken zip, pickle or tensor: torch has no common class for them
        raise ValueError(f"{path} is cut short or no checkpoint: train again or name another") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is of another format: this code reads {FORMAT}, written by its train.py")
    try:
        with torch.device(device):
            model = LM2(LM2Config(**content["config"]))
        model.load_state_dict(content["model"], strict=True)
        tokenizer = Tokenizer(content["tokenizer"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: train again or name another") from None
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this code: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.n_vocab != model.cfg.vocab_size:
        raise ValueError(f"{path}: a tokenizer of {tokenizer.n_vocab} tokens, "
                         f"a model of {model.cfg.vocab_size}")
    return model, tokenizer, content


def name_and_path(text: str) -> tuple[str, Path]:
    """NAME=PATH or PATH, which may hold "=" itself."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and not Path(text).is_file() else ("", Path(text))


def read_models(names: list[str], device: torch.device) -> dict[str, tuple[LM2, Tokenizer, dict, str]]:
    """Model, tokenizer, content and fingerprint of each checkpoint by its name: that given, else lm2, rmt or
    llama for one, and its folder for one of several."""
    models = {}
    for text in names:
        name, path = name_and_path(text)
        model, tokenizer, content = load_checkpoint(path, device)
        name = name or (model.cfg.kind if len(names) == 1 else path.resolve().parent.name)
        if name in models:
            raise ValueError(f"--ckpt: two models are called {name!r}, give NAME=PATH")
        digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        models[name] = model, tokenizer, content, digest
    return models


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m data.checkpoint", "Keep of a checkpoint what answering needs, in bfloat16.")
    parser.add_argument("ckpt", metavar="FROM", help="checkpoint of train.py")
    parser.add_argument("to", metavar="TO", help="file to write, which must not be there yet")
    args = parser.parse_args(argv)
    with one_line("python -m data.checkpoint"):
        model, tokenizer, content = load_checkpoint(args.ckpt)
        if Path(args.to).exists() or not Path(args.to).parent.is_dir():
            raise ValueError(f"{args.to} is there already, or its folder is not: name a new file")
        train = {k: v for k, v in content.get("train", {}).items() if k in KEPT}
        save_checkpoint(args.to, model.bfloat16(), tokenizer, train=train)
        size = Path(args.to).stat().st_size / 2**20
        print(f"{args.to}: {size:.1f} MiB of {model.n_params()[0]:,} parameters")


if __name__ == "__main__":
    main()
