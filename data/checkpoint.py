"""Checkpoints: the model, its configuration and tokenizer, and what training needs to go on, in one file.

    model, content = load_checkpoint("out/ckpt.pt")

Tensors and plain values only, so that loading one runs no code. Writes where it is told, all or nothing.
"""
import os
from dataclasses import asdict
from pathlib import Path

import torch

from lm2 import LM2, LM2Config

FORMAT = "lm2-checkpoint-1"


def save_checkpoint(path: str | Path, model: LM2, **values) -> None:
    """Write the model and `values` (tensors and plain values only) to `path`; a file that is there stays whole until the
    new one is complete. Raises OSError if it cannot be written."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    content = dict(format=FORMAT, config=asdict(model.cfg), model=model.state_dict(), **values)
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write the checkpoint {path}: {error}") from None


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[LM2, dict]:
    """A file of `save_checkpoint` -> the model on `device`, and everything that the file holds. Raises ValueError, in one
    line, for a file that is missing, cut short, or of another format."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: train one (python train.py) or name another with --ckpt")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # a broken zip, pickle or tensor: torch has no common class for them
        raise ValueError(f"{path} is cut short or no checkpoint: train again or name another") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is of another format: this code reads {FORMAT}, written by its train.py")
    try:
        with torch.device(device):
            model = LM2(LM2Config(**content["config"]))
        model.load_state_dict(content["model"], strict=True)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this code: {str(error).splitlines()[0]}") from None
    return model, content
