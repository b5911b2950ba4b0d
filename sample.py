"""Let a trained model read a prompt of any length and go on from it, token by token as they come.

    python sample.py --prompt "Mary went to the kitchen. John moved to the garden. Where is Mary?"
    python sample.py --file book.txt --prompt "Where is Mary?"       # the file, then the prompt behind it
    cat book.txt | python sample.py --file - --memory off            # from standard input, memory off

Writes nothing but the continuation, on standard output. The prompt is read segment by segment: a million
tokens need no more memory than a thousand, their ids apart, and a token of the answer costs the same.
"""
import codecs
import sys
from pathlib import Path

import torch

from data.checkpoint import load_checkpoint
from data.cli import Parser, one_line
from data.device import pick_device


def read_text(name: str) -> str:
    """The text of a file, "-" for standard input; ValueError names a file that is missing or not UTF-8."""
    if name != "-" and (Path(name).is_dir() or not Path(name).exists()):
        raise ValueError(f"--file {name}: there is no such file, give the path of a text or - for standard "
                         "input")
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {name} is not UTF-8 (byte {error.start}): convert it first") from None


def main(argv: list[str] | None = None) -> None:
    parser = Parser("sample.py", __doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py (default out/ckpt.pt)")
    parser.add_argument("--prompt", default="",
                        help="text to go on from, behind --file if both are given (default none)")
    parser.add_argument("--file", default=None, help="UTF-8 file to read first, - for standard input "
                        "(default none; standard input if there is no prompt either)")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="tokens to write at most (default 16)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0 takes the likeliest token (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed for temperatures above 0 (default 0)")
    parser.add_argument("--memory", default="on", choices=("on", "off"),
                        help="off holds every bank at its initial value (default on)")
    parser.add_argument("--raw", action="store_true", help="keep line ends and runs of spaces; without it "
                        "they become single spaces, as in the training text (default off)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 0 or not args.temperature >= 0 or not 0 <= args.seed < 2**32:
        parser.error(f"--max_new_tokens {args.max_new_tokens}, --temperature {args.temperature} and --seed "
                     f"{args.seed} must not be negative, nor the seed beyond {2**32 - 1}")
    with one_line("sample.py"):
        device = pick_device(args.device)
        model, tokenizer, _ = load_checkpoint(args.ckpt, device)
        if args.file is None and not args.prompt and sys.stdin.isatty():
            raise ValueError("there is no prompt: give --prompt, --file or text on standard input")
        name = "-" if args.file is None and not args.prompt else args.file
        text = " ".join(filter(None, [read_text(name) if name else "", args.prompt]))
        text = text if args.raw else " " + " ".join(text.split())   # training has a space before sentences
        ids = tokenizer.encode(text)
        if not text.strip():
            raise ValueError("the prompt is empty: give --prompt, --file or text on standard input")
        model.eval()
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
        generator = torch.Generator(device).manual_seed(args.seed)
        prompt = torch.tensor([ids], device=device)
        for new in model.stream(prompt, args.max_new_tokens, args.temperature, generator,
                                write=args.memory == "on"):
            if new.item() == tokenizer.eot:
                break
            print(decoder.decode(tokenizer.decode_bytes([new.item()])), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
