"""Let a trained model read a prompt of any length and go on from it, token by token as they come.

    python sample.py --prompt "Mary went to the kitchen. John moved to the garden. Where is Mary?"
    python sample.py --file book.txt --prompt "Where is Mary?"  # the file, then the prompt
    cat book.txt | python sample.py --file - --memory off       # standard input, memory off

Writes the continuation to standard output, and nothing else. The prompt is read segment by segment:
a million tokens need no more memory than a thousand, apart from their ids, and a token of the
answer takes as long.
"""

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data import tokenizer as tokenizers
from data.common import Parser, one_line, pick_device
from lm2 import LM2, RMT, load_checkpoint


def read_text(name: str) -> str:
    """The text of a file, or of standard input for "-"; ValueError for a file that is missing or
    not UTF-8."""
    if name == "-":
        content = sys.stdin.buffer.read()
    elif Path(name).is_dir():
        raise ValueError(f"--file {name} is a folder: give the path of a text in it")
    elif not Path(name).exists():
        raise ValueError(
            f"--file {name}: there is no such file, give the path of a text or - for standard input"
        )
    else:
        content = Path(name).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--file {name} is not UTF-8 (byte {error.start}): convert it first"
        ) from None


def read_prompt(args) -> str:
    """The text to go on from: --file or standard input, then --prompt."""
    name = args.file
    if name is None and not args.prompt:
        if sys.stdin.isatty():
            raise ValueError("there is no prompt: give --prompt, --file or text on standard input")
        name = "-"
    parts = []
    if name is not None:
        parts.append(read_text(name))
    parts.append(args.prompt)
    text = " ".join(part for part in parts if part)
    if not text.strip():
        raise ValueError("the prompt is empty: give --prompt, --file or text on standard input")
    if args.raw:
        return text
    return " " + " ".join(text.split())  # in the training text a space stands before a sentence


def stream_without_memory(
    model: LM2 | RMT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """As `model.stream`, but every segment is a document of its own, which finds nothing."""
    S = model.cfg.segment_len
    latest = (idx.shape[1] - 1) // S * S
    segment = idx[:, latest:]
    left = max_new_tokens
    while left > 0:
        # As many tokens as the segment has room for, and the first one of the next segment.
        n = min(left, S - segment.shape[1] + 1)
        for new in model.stream(segment, n, temperature, generator):
            yield new
        segment = new[:, None]
        left -= n


def main(argv: list[str] | None = None) -> None:
    parser = Parser("sample.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py (default out/ckpt.pt)")
    add("--prompt", default="", help="text to go on from, read after --file (default none)")
    add(
        "--file",
        help="UTF-8 file to read first, - for standard input (default none; standard input if "
        "there is no --prompt either)",
    )
    add("--max_new_tokens", type=int, default=16, help="tokens to write at most (default 16)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token, more draws at random (default 0)",
    )
    add("--seed", type=int, default=0, help="seed of what is drawn at random (default 0)")
    add(
        "--memory",
        default="on",
        choices=("on", "off"),
        help="off reads every segment as a document of its own (default on)",
    )
    add(
        "--raw",
        action="store_true",
        help="keep line ends and runs of spaces; otherwise they become single spaces, as in the "
        "training text (default off)",
    )
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 0:
        parser.error(f"--max_new_tokens {args.max_new_tokens} must not be negative")
    if not args.temperature >= 0:
        parser.error(f"--temperature {args.temperature} must not be negative")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} must lie between 0 and {2**32 - 1}")
    with one_line("sample.py"):
        device = pick_device(args.device)
        model, content = load_checkpoint(args.ckpt, device)
        tokenizer = tokenizers.of_checkpoint(content, args.ckpt)
        idx = torch.tensor([tokenizer.encode(read_prompt(args))], device=device)  # (1, T)
        model.eval()
        generator = torch.Generator(device).manual_seed(args.seed)
        sampling = (idx, args.max_new_tokens, args.temperature, generator)
        if args.memory == "on":
            stream = model.stream(*sampling)
        else:
            stream = stream_without_memory(model, *sampling)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for new in stream:
            if new.item() == tokenizer.eot:
                break
            # A character may span tokens: the decoder keeps its bytes until it is complete.
            text = decoder.decode(tokenizer.decode_bytes([new.item()]))
            print(text, end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
