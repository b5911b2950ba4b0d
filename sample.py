"""Let a trained model read a prompt of any length and go on from it, token by token as they come.

    python sample.py --prompt "Mary went to the kitchen. John moved to the garden. Where is Mary?"
    python sample.py --file book.txt --prompt "Where is Mary?"  # the file, then the prompt
    cat book.txt | python sample.py --file - --memory off       # standard input, memory off
    python sample.py --ckpt out/ckpt.pt --temperature 0.8 --top_k 200 --samples 3

The prompt is read segment by segment. Apart from its ids, a million tokens need no more RAM than a
thousand, and a token of the answer takes no longer. What the model keeps of the prompt is its
state, a few kilobytes. So a book can be read once and asked often:

    python sample.py --file book.txt --save_state book.state --max_new_tokens 0
    python sample.py --load_state book.state --prompt "Where is Mary?"
    python sample.py --load_state book.state --interactive  # one question after the other

A model that was trained on text (train.py --recipe text) needs no prompt: it starts a text of its
own. The continuation is written to standard output. Nothing else is written but the file of
--save_state.
"""

import codecs
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data.common import Parser, one_line, pick_device
from data.llama import tokenizer_of
from data.tokenizer import Tokenizer, was_trained_on_text
from lm2 import LM2, RMT, State, load_model, load_state, save_state


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


def given_texts(args) -> list[str]:
    """The texts to read one behind the other: --file or standard input, then --prompt."""
    texts = []
    if args.file is not None:
        texts.append(read_text(args.file))
    elif not (args.prompt or args.load_state or args.interactive or sys.stdin.isatty()):
        piped = read_text("-")
        if piped:
            texts.append(piped)
    if args.prompt:
        texts.append(args.prompt)
    return texts


def ids_behind(last_id: int | None, text: str, tokenizer: Tokenizer, is_raw: bool) -> list[int]:
    """The ids of a text that is read behind another one. There is a space between the two.

    last_id  what was read last, None for nothing
    is_raw   keep white space. Otherwise it becomes single spaces, also before the first word, as in
             the training text of bAbI stories"""
    if is_raw:
        text = text.replace("\r\n", "\n")  # as in training
    else:
        text = " ".join(text.split())
    if not text:
        return []
    starts_document = last_id in (None, tokenizer.bos, *tokenizer.ends)
    if not (is_raw and starts_document):
        text = " " + text
    ids = tokenizer.encode(text)
    if tokenizer.bos is not None and last_id in tokenizer.ends:
        ids.insert(0, tokenizer.bos)  # a released model begins a new document
    return ids


def pieces_of(
    texts: list[str], last_id: int | None, tokenizer: Tokenizer, is_raw: bool
) -> list[list[int]]:
    """The ids of each text behind the one before, as `ids_behind` makes them. Texts without ids are
    left out. ValueError if none of the given texts has ids."""
    pieces = []
    for text in texts:
        ids = ids_behind(last_id, text, tokenizer, is_raw)
        if ids:
            pieces.append(ids)
            last_id = ids[-1]
    if texts and not pieces:
        raise ValueError("the prompt is empty: give --prompt, --file or text on standard input")
    return pieces


def last_open_id(state: State) -> int | None:
    """The id that a state of one document has read last, None if it has read nothing."""
    ids = state.open_ids[0].tolist()
    return ids[-1] if ids else None


def read(model: LM2 | RMT, ids: list[int], state: State) -> State:
    """The state after these ids, the same one if there are none."""
    if not ids:
        return state
    idx = torch.tensor([ids], device=state.open_ids.device)  # (1, T)
    return model.read(idx, state)


def stream_from(
    model: LM2 | RMT,
    state: State,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    top_k: int | None,
) -> Iterator[Tensor]:
    """As `model.stream`, but from a state alone, which must have an open id."""
    # `stream` has to read at least one id. So the last one is taken out of the state again.
    before = State(state.carried, state.open_ids[:, :-1], state.segment_len)
    last = state.open_ids[:, -1:]
    return model.stream(last, max_new_tokens, temperature, generator, before, top_k)


def stream_without_memory(
    model: LM2 | RMT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    top_k: int | None,
) -> Iterator[Tensor]:
    """As `model.stream`, but every segment is a document of its own, which finds nothing."""
    S = model.cfg.segment_len
    latest = (idx.shape[1] - 1) // S * S
    segment = idx[:, latest:]
    left = max_new_tokens
    while left > 0:
        # As many tokens as the segment has room for, and the first one of the next segment.
        n = min(left, S - segment.shape[1] + 1)
        for new in model.stream(segment, n, temperature, generator, top_k=top_k):
            yield new
        segment = new[:, None]
        left -= n


def print_stream(stream: Iterator[Tensor], tokenizer: Tokenizer) -> list[int]:
    """Print a stream as text until a token that ends it. Return its ids, that one included."""
    ids = []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for new in stream:
        ids.append(new.item())
        if ids[-1] in tokenizer.ends:
            break
        # A character may span tokens: the decoder keeps its bytes until it is complete.
        text = decoder.decode(tokenizer.decode_bytes(ids[-1:]))
        print(text, end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    return ids


def next_line() -> str:
    """The next line of standard input without its end, "" for an empty line and at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline().decode("utf-8", errors="replace")
    return line.rstrip("\r\n")


def talk(
    model: LM2 | RMT, state: State, tokenizer: Tokenizer, is_raw: bool, sampling: dict
) -> None:
    """Read lines of standard input and write a continuation of each, up to an empty line.

    The model reads what it writes, and its end of text. It is the same with the questions of a
    training story. A model of text has never seen a memory that goes on behind an end of text.
    `sampling` holds what `stream_from` takes besides."""
    line = next_line()
    while line.strip():
        state = read(model, ids_behind(last_open_id(state), line, tokenizer, is_raw), state)
        written = print_stream(stream_from(model, state, **sampling), tokenizer)
        state = read(model, written, state)
        line = next_line()


def check_flags(args) -> None:
    """ValueError for a flag that cannot be, alone or beside the others."""
    if args.max_new_tokens < 0:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} must not be negative")
    if not args.temperature >= 0:
        raise ValueError(f"--temperature {args.temperature} must not be negative")
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"--top_k {args.top_k} must be at least 1")
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must lie between 0 and {2**32 - 1}")
    if args.memory == "off":
        for name in ("save_state", "load_state", "interactive"):
            if getattr(args, name):
                raise ValueError(f"--{name} needs the memory: leave out --memory off")
    if args.interactive and args.samples > 1:
        raise ValueError(f"--samples {args.samples} and --interactive: leave out one of the two")
    if args.interactive and args.file == "-":
        raise ValueError("--file - and --interactive both read standard input: give a file")


def check_save_state(args) -> None:
    """ValueError for a --save_state that cannot be written or that would replace an input. It is
    called early, as reading a book takes a while."""
    path = Path(args.save_state)
    if path.is_dir():
        raise ValueError(f"--save_state {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--save_state {path}: there is no such folder, name another")
    for name in (args.ckpt, args.file):
        if name is not None and path.exists() and Path(name).exists() and path.samefile(name):
            raise ValueError(f"--save_state {path} is the checkpoint or the text: name another")
    if path.resolve().parent == Path(args.ckpt).resolve():
        raise ValueError(f"--save_state {path} lies among a model's files: name another folder")


def read_flags(argv: list[str] | None):
    """The flags, checked as far as they can be without a file."""
    parser = Parser("sample.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--ckpt",
        default="out/ckpt.pt",
        help="The checkpoint of train.py, or the folder of a released Llama (default out/ckpt.pt).",
    )
    add("--prompt", default="", help="The text to go on from, read after --file (default: none).")
    add(
        "--file",
        help="A UTF-8 file to read before the prompt. - is standard input, which is also read if "
        "none of --file, --prompt, --load_state and --interactive is given.",
    )
    add(
        "--max_new_tokens",
        type=int,
        default=16,
        help="Write this many tokens at most (default 16).",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token, a larger number draws at random (default 0).",
    )
    add(
        "--top_k",
        type=int,
        help="Draw from this many of the likeliest tokens, with a --temperature above 0 (default: "
        "from all).",
    )
    add(
        "--samples",
        type=int,
        default=1,
        help="Write this many continuations, with a line of --------------- between them. They "
        "are alike at temperature 0 (default 1).",
    )
    add("--seed", type=int, default=0, help="The seed of what is drawn at random (default 0).")
    add(
        "--memory",
        default="on",
        choices=("on", "off"),
        help="on carries the memory from segment to segment. off reads each segment as a document "
        "of its own (default on).",
    )
    add(
        "--raw",
        action="store_true",
        help="Keep line ends and runs of spaces. Without it they become single spaces, as in the "
        "training stories. A model that was trained on text and a released Llama always keep them.",
    )
    add(
        "--save_state",
        metavar="FILE",
        help="Write the state to this file when the prompt has been read, before anything is "
        "continued (default: none).",
    )
    add(
        "--load_state",
        metavar="FILE",
        help="Start from this file, which --save_state wrote with the same model. The prompt is "
        "read behind its document. Without a prompt the document is continued (default: none).",
    )
    add(
        "--interactive",
        action="store_true",
        help="Read a line of standard input behind the prompt, write the continuation, read the "
        "next line behind both, and so on. An empty line or Ctrl-D ends it.",
    )
    add("--device", default="auto", help="The device: auto, cpu or cuda (default auto).")
    args = parser.parse_args(argv)
    try:
        check_flags(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args) -> None:
    """Read what is given, and write what comes next."""
    if args.save_state:
        check_save_state(args)
    device = pick_device(args.device)
    model, content = load_model(args.ckpt, device)
    model.eval()
    tokenizer = tokenizer_of(content, args.ckpt, model.cfg.vocab_size)
    learned_text = was_trained_on_text(content)
    is_released = not content
    is_raw = args.raw or learned_text or is_released
    if args.load_state:
        state = load_state(args.load_state, model)
    else:
        state = model.initial_state(1)
    last_id = last_open_id(state)
    pieces = []  # the ids of each text to read behind the state
    first_id = tokenizer.bos
    if first_id is None and learned_text:
        first_id = tokenizer.eot
    if last_id is None and first_id is not None:
        last_id = first_id
        pieces.append([first_id])
    pieces += pieces_of(given_texts(args), last_id, tokenizer, is_raw)
    if not pieces and last_id is None and not args.interactive:
        raise ValueError("there is no prompt: give --prompt, --file or text on standard input")
    sampling = dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        generator=torch.Generator(device).manual_seed(args.seed),
        top_k=args.top_k,
    )
    if args.memory == "on":
        # The texts are read in separate calls. So a run that saves its state between two of them
        # gets the same numbers, to the last bit.
        for ids in pieces:
            state = read(model, ids, state)
    if args.save_state:
        save_state(args.save_state, model, state)
    if args.interactive:
        talk(model, state, tokenizer, is_raw, sampling)
        return
    for number in range(args.samples):
        if number > 0:
            print("---------------")
        if args.memory == "on":
            stream = stream_from(model, state, **sampling)
        else:
            ids = list(itertools.chain.from_iterable(pieces))
            idx = torch.tensor([ids], device=device)  # (1, T)
            stream = stream_without_memory(model, idx, **sampling)
        print_stream(stream, tokenizer)


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    with one_line("sample.py"):
        run(args)


if __name__ == "__main__":
    main()
