"""Measure how well models of plain text predict documents, and on which tokens a memory helps.

    python assets/text.py --ckpt lm2=out/lm2/ckpt.pt llama=out/llama/ckpt.pt --out out/text.json
    python assets/text.py --ckpt out/ckpt.pt --text books/ --memory on off
    python assets/pictures.py text --figures out/text.json --out out/text.png

Prints the tables below, and writes them to --out as JSON. All models read the same documents, each
with its own tokenizer. These are the documents for validation, of which data/text.py tells. The
memory is used in the ways that data/loss.py tells.

loss    The loss by the position in the document. Models with the same tokenizer share a table. Of
        other tables only the line "all" can be compared, as positions count tokens.
tokens  The tokens on which one column predicts better than another one, as in arXiv 2203.07852.
        Only tokens beyond the first segment count. The gain is the other column's loss less this
        column's loss, in nats. `not in segment` says how often the token had occurred in the
        document, but not in the segment so far. Only a memory can know of such an occurrence.
where   The same gain by where the token had occurred before. If the memory recalls what the
        segment does not show, the row `in the document, not in segment` has a larger share of the
        gain than of the tokens.

A column is a model and a way to use its memory. The column `on` of the first model is compared with
its `off`, and with the `on` of each other model.

An interval is a 95 % interval over documents. It says nothing of other seeds of the model.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/text.py`

import numpy as np  # noqa: E402

from babilong_eval import Loaded, check_out, read_models, tokenizer_key  # noqa: E402
from data.common import Parser, one_line, pick_device, save_json  # noqa: E402
from data.loss import (  # noqa: E402
    LONGEST,
    MODES,
    MOST_DOCUMENTS,
    Column,
    measure,
    none_if_nan,
    ratio,
    summary,
    table,
    with_interval,
)
from data.text import describe_sources, read_documents, token_folder  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

N_TOKENS = 20  # entries of the vocabulary in a table
TOKEN_WIDTH = 25  # characters of a token in a table

# Where a token had occurred before.
BEFORE_SEGMENT, IN_SEGMENT, NOWHERE = range(3)
PLACES = {
    BEFORE_SEGMENT: "in the document, not in segment",
    IN_SEGMENT: "in the segment",
    NOWHERE: "nowhere in the document",
}


# -------------------------------------------------------------------------------------------------
# The gain of one column on another one, token by token


def places_before(targets: np.ndarray, segment_len: int) -> np.ndarray:
    """Where each token of a document had occurred before, as a key of PLACES: (n,).

    targets  the ids that are predicted, (n,), as data/loss.py has them"""
    places = np.empty(len(targets), np.int64)
    latest = {}  # id -> the last place at which it occurred
    for i, token in enumerate(targets.tolist()):
        # The first token that a segment reads is the last target of the segment before.
        segment_start = i // segment_len * segment_len - 1
        if token not in latest:
            places[i] = NOWHERE
        elif latest[token] >= segment_start:
            places[i] = IN_SEGMENT
        else:
            places[i] = BEFORE_SEGMENT
        latest[token] = i
    return places


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as Python would write it: a text, or bytes where they are no whole characters."""
    content = tokenizer.decode_bytes([token])
    try:
        return repr(content.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(content)


def gains_of(first: Column, second: Column, tokenizer: Tokenizer) -> dict | None:
    """By how much the first column predicts better than the second one beyond the first segment.

    Both are of the same documents and tokens. Returns the tokens that gain most, and the gain by
    where a token had occurred before, as plain values for a file. The segments are those of the
    first column. None if no document is longer than a segment."""
    (a, a_mode), (b, b_mode) = first, second
    start = a.segment_len
    if max(len(targets) for targets in a.targets) <= start:
        return None
    ids = []
    gains = []
    places = []
    for i, targets in enumerate(a.targets):
        gain = b.nats[b_mode][i] - a.nats[a_mode][i]
        ids.append(targets[start:])
        gains.append(gain[start:])
        places.append(places_before(targets, a.segment_len)[start:])

    all_ids = np.concatenate(ids)
    is_before_segment = np.concatenate(places) == BEFORE_SEGMENT
    counts = np.bincount(all_ids)
    totals = np.bincount(all_ids, weights=np.concatenate(gains))
    before_segment = np.bincount(all_ids, weights=is_before_segment)
    tokens = []
    for token in np.argsort(-totals, kind="stable")[:N_TOKENS].tolist():
        if totals[token] <= 0:
            break
        tokens.append(
            dict(
                token=token_text(tokenizer, token),
                id=token,
                occurrences=int(counts[token]),
                gain=float(totals[token]),
                mean=float(totals[token] / counts[token]),
                before_segment=float(before_segment[token] / counts[token]),
            )
        )

    total = float(totals.sum())
    of_places = []
    for place, name in PLACES.items():
        sums = []
        sizes = []
        for gain, place_of_token in zip(gains, places, strict=True):
            is_there = place_of_token == place
            sums.append(gain[is_there].sum())
            sizes.append(is_there.sum())
        line = dict(place=name, tokens=int(sum(sizes)), gain=float(sum(sums)))
        if line["tokens"]:
            mean, half = ratio(np.array(sums), np.array(sizes))
            line |= dict(mean=float(mean), half=none_if_nan(half))
        of_places.append(line)
    return dict(n_tokens=len(all_ids), gain=total, tokens=tokens, places=of_places)


def gain_table(head: str, against: str, gains: dict) -> str:
    """The two tables of `gains_of`, up to 79 columns wide."""
    n_tokens = gains["n_tokens"]
    total = gains["gain"]
    lines = [
        f"{head} against {against}, beyond the first segment",
        f"{'token':<{TOKEN_WIDTH}} {'occurrences':>12} {'gain (nats)':>13} {'mean gain':>11} "
        "not in segment",
    ]
    for line in gains["tokens"]:
        text = line["token"]
        if len(text) > TOKEN_WIDTH:
            text = text[: TOKEN_WIDTH - 3] + "..."
        lines.append(
            f"{text:<{TOKEN_WIDTH}} {line['occurrences']:12,} {line['gain']:13,.1f} "
            f"{line['mean']:11.3f} {line['before_segment']:14.0%}"
        )
    lines.append("")
    lines.append(f"{'where it had occurred':<32} tokens    gain  mean gain (nats)")
    for line in gains["places"]:
        share = "-"  # the memory does not help in all, so no part of it is a share
        if total > 0:
            share = f"{line['gain'] / total:.0%}"
        mean = "-"
        if line["tokens"]:
            mean = with_interval(line["mean"], line["half"], ".4f")
        lines.append(f"{line['place']:<32} {line['tokens'] / n_tokens:6.0%} {share:>7}  {mean}")
    lines.append(f"{'all':<32} {n_tokens:6,} {total:7,.0f}  {total / n_tokens:.4f}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# A run


def describe(loaded: Loaded) -> str:
    """What a model is, and on which texts it was trained."""
    n_params, _ = loaded.model.n_params()
    trained = "not trained on text"
    if loaded.train.get("recipe") == "text":
        trained = f"trained on {describe_sources(loaded.train.get('text', ()))}"
    segment_len = loaded.model.cfg.segment_len
    return f"{loaded.name}: {n_params:,} parameters, segments of {segment_len}, {trained}"


def run(args) -> None:
    """Measure all models, print the tables and write them."""
    models = read_models(args.ckpt, pick_device(args.device))
    first = models[0]
    if args.text is None:
        sources = list(first.train.get("text", ()))
        skip_bad = first.train.get("skip_bad", False)
    else:
        sources = args.text
        skip_bad = args.skip_bad
    for loaded in models:
        if token_folder(sources) and tokenizer_key(loaded) != tokenizer_key(first):
            raise ValueError(
                f"--text {sources[0]} holds ids of one tokenizer, but {loaded.name} has another "
                f"one than {first.name}: measure it alone, or name texts"
            )
    print(f"the documents for validation of {describe_sources(sources)}")

    columns_of = {}  # what tells a tokenizer -> the columns of the models that have it
    figures = dict(text=sources, models=[], gains=[])
    modes = [mode for mode in MODES if mode == "on" or mode in args.memory]
    for loaded in models:
        print(describe(loaded), flush=True)
        documents = read_documents(sources, "val", loaded.tokenizer, skip_bad)
        measured = measure(
            loaded.model.eval(), loaded.tokenizer, documents, args.n, args.longest, modes
        )
        columns = columns_of.setdefault(tokenizer_key(loaded), {})
        for mode in measured.nats:
            columns[f"{loaded.name} {mode}"] = (measured, mode)
        figures["models"].append(dict(name=loaded.name, **summary(measured)))
    for columns in columns_of.values():
        print("\n" + table(columns))

    columns = columns_of[tokenizer_key(first)]
    against = []  # the columns that the first model's "on" is compared with
    for head in columns:
        if head == f"{first.name} off" or (head.endswith(" on") and head != f"{first.name} on"):
            against.append(head)
    for head in against:
        gains = gains_of(columns[f"{first.name} on"], columns[head], first.tokenizer)
        if gains is not None:
            figures["gains"].append(dict(column=f"{first.name} on", against=head, **gains))
            print("\n" + gain_table(f"{first.name} on", head, gains))
    if args.out:
        save_json(figures, args.out)


def load_losses(path: str) -> dict:
    """The content of a file of --out. ValueError if it is not one."""
    try:
        figures = json.loads(Path(path).read_bytes())
        models = figures["models"]
        is_sound = bool(models)
        for model in models:
            is_sound = is_sound and {"name", "segment_len", "longest", "unit"} <= model.keys()
            is_sound = is_sound and "on" in model["modes"]
            for mode in model["modes"].values():
                for entry in mode["by_position"]:
                    is_sound = is_sound and {"low", "high", "loss"} <= entry.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{path} holds no such figures: write it with assets/text.py --out")
    return figures


def main(argv: list[str] | None = None) -> None:
    """Print the tables of some checkpoints."""
    parser = Parser("python assets/text.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--ckpt",
        nargs="+",
        default=["out/ckpt.pt"],
        help="The checkpoints of train.py to measure, as PATH or NAME=PATH (default out/ckpt.pt).",
    )
    add(
        "--text",
        nargs="+",
        metavar="PATH",
        help="Files and folders of texts in UTF-8. Without this flag, they are the files that the "
        "first model learned from. Only their documents for validation are measured.",
    )
    add("--skip_bad", action="store_true", help="Files of --text that are not UTF-8 are left out.")
    add(
        "--memory",
        nargs="+",
        default=list(MODES),
        choices=MODES,
        help="How the memory is used. on carries it from segment to segment, as in training. It is "
        "always measured. off reads each segment as a document of its own. other gives each "
        f"segment the memory of another document (default {' '.join(MODES)}).",
    )
    add(
        "--n",
        type=int,
        default=MOST_DOCUMENTS,
        help=f"At most this many documents are read (default {MOST_DOCUMENTS}).",
    )
    add(
        "--longest",
        type=int,
        default=LONGEST,
        help=f"At most this many bytes of a document are read (default {LONGEST}).",
    )
    add(
        "--device",
        default="auto",
        help="The device to compute on: auto, cpu or cuda (default auto).",
    )
    add("--out", help="A .json file for the figures, which assets/pictures.py text draws.")
    args = parser.parse_args(argv)
    with one_line("python assets/text.py"):
        if args.n < 1 or args.longest < 1:
            raise ValueError(f"--n {args.n} and --longest {args.longest} must be at least 1")
        if args.skip_bad and args.text is None:
            raise ValueError("--skip_bad is for the files of --text: give them, or leave it out")
        if args.out:
            if Path(args.out).suffix != ".json":
                raise ValueError(f"--out {args.out}: the name must end in .json")
            check_out(args, Path(args.out))
        run(args)


if __name__ == "__main__":
    main()
