"""The tokenizers of released Llamas, from the files that lie beside their weights.

    from data.llama import read_tokenizer
    tokenizer = read_tokenizer("Llama-3.2-1B", 128256)  # a folder of Meta or of Hugging Face
    tokenizer.encode("Mary went to the kitchen.")

Reads tokenizer.json, or the rank file tokenizer.model of Llama 3. `lm2.load_llama` reads the
weights. Writes nothing.

Both files describe the same kind of tokenizer. A regular expression divides a text into pieces. In
each piece the two neighbours whose joint token has the lowest rank are merged, until no two have a
joint token. tiktoken does it, given a rank for each token. In tokenizer.json the order of the
merges gives the ranks.
"""

import hashlib
import json
from pathlib import Path

from data.tokenizer import ReleasedTokenizer, Tokenizer, format_ranks, of_checkpoint

# How Llama 3 divides a text. In tokenizer.model it is not written down.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's, and the same after each digit has been set apart.
GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT_2_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def byte_of_character() -> dict[str, int]:
    """tokenizer.json writes each byte of a token as one visible character, as GPT-2 did: a visible
    byte of Latin-1 as itself, the others, in order, as the characters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    found = {chr(byte): byte for byte in visible}
    for i, byte in enumerate(others):
        found[chr(0x100 + i)] = byte
    return found


def pattern_of(pre_tokenizer: dict) -> str:
    """The regular expression of the field pre_tokenizer of tokenizer.json. ValueError for one that
    is unknown here."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    first = steps[0]
    last = steps[-1]
    divides_as_gpt2 = last.get("use_regex", True)
    if last.get("add_prefix_space"):
        raise ValueError("it adds a space to a text, which is unknown here")
    if kinds == ["ByteLevel"] and divides_as_gpt2:
        return GPT_2
    if kinds == ["Digits", "ByteLevel"] and first["individual_digits"] and divides_as_gpt2:
        return GPT_2_DIGITS
    is_isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    if kinds == ["Split", "ByteLevel"] and is_isolated and not divides_as_gpt2:
        return first["pattern"]["Regex"]
    raise ValueError(f"its pre_tokenizer of {kinds} is unknown here")


def tokenizer_of_json(content: dict, config: dict, n_vocab: int) -> ReleasedTokenizer:
    """The tokenizer of tokenizer.json.

    config   the model's config.json, for the ids of the begin and the end of a document"""
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError("it is no byte-level BPE")
    if content.get("normalizer"):
        raise ValueError("it changes texts by a normalizer, which is unknown here")
    byte_of = byte_of_character()
    names = dict.fromkeys(byte_of)  # how the tokens are written, by rank, each once
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        names[left + right] = None
    tokens = []
    ids = []
    for name in names:
        tokens.append(bytes(byte_of[character] for character in name))
        # SmolLM2 lacks some bytes. Everything else needs an id.
        ids.append(model["vocab"].get(name) if name in byte_of else model["vocab"][name])
    bos = None
    # A template puts the begin of text before each text.
    if '"TemplateProcessing"' in json.dumps(content.get("post_processor")):
        bos = config.get("bos_token_id")
    ends = config["eos_token_id"]
    return ReleasedTokenizer(
        format_ranks(tokens),
        pattern_of(content.get("pre_tokenizer") or {}),
        ids,
        bos,
        ends if isinstance(ends, list) else [ends],
        n_vocab,
    )


def tokenizer_of_ranks(ranks: str, n_vocab: int) -> ReleasedTokenizer:
    """The tokenizer of Llama 3's tokenizer.model: <|begin_of_text|> and <|end_of_text|> are the
    first two ids behind the ranks."""
    ranks = ranks.rstrip("\n") + "\n"
    n_ranks = ranks.count("\n")
    return ReleasedTokenizer(ranks, LLAMA_3, list(range(n_ranks)), n_ranks, [n_ranks + 1], n_vocab)


def read_tokenizer(folder: str | Path, n_vocab: int) -> ReleasedTokenizer:
    """The tokenizer in the folder of a released model that has n_vocab ids.

    ValueError, with a message of one line, for a folder without one that is known here."""
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer.model", "original/tokenizer.model"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if name != "tokenizer.json":
                return tokenizer_of_ranks(text, n_vocab)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return tokenizer_of_json(json.loads(text), config, n_vocab)
        except UnicodeDecodeError:
            reason = "it is no text in UTF-8"
        except KeyError as error:
            reason = f"{error} is missing"
        except (ValueError, IndexError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is no tokenizer that can be read ({reason}): fetch it again, or name another "
            "model"
        )
    raise ValueError(f"{folder} has no tokenizer.json and no tokenizer.model: fetch one of them")


def tokenizer_of(content: dict, path: str | Path, n_vocab: int) -> Tokenizer:
    """The tokenizer of a model with n_vocab ids that `lm2.load_model` gave with this content: that
    of the checkpoint, or without content that of the released model's folder. ValueError, with a
    message of one line, for what cannot be read."""
    if content:
        return of_checkpoint(content, path)
    return read_tokenizer(path, n_vocab)


def fingerprint_of_files(path: str | Path) -> str:
    """16 hexadecimal digits that change with a checkpoint. Of a released model, whose files are
    large, with the names, sizes and times of the files that are read."""
    path = Path(path)
    if path.is_dir():
        files = []
        for pattern in ("*.json", "*.safetensors", "*.pth", "tokenizer.model"):
            for file in sorted(path.glob(pattern)):
                files.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
        content = str(files).encode()
    else:
        content = path.read_bytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
