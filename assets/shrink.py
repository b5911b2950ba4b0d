"""Keep of a checkpoint what answering needs: the model alone, in bfloat16, a sixth of the size.

    python assets/shrink.py out/ckpt.pt small.pt

Writes the second file, which must not be there yet. The models in this folder were made so.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python assets/shrink.py`

from data.common import Parser, one_line  # noqa: E402
from data.tokenizer import of_checkpoint  # noqa: E402
from lm2 import load_checkpoint, save_checkpoint  # noqa: E402

# What is kept about the training.
KEPT = ("tasks", "text", "skip_bad", "recipe", "preset", "background", "seed")


def main(argv: list[str] | None = None) -> None:
    """Write the small copy."""
    parser = Parser("assets/shrink.py", __doc__.split("\n")[0])
    parser.add_argument("source", metavar="FROM", help="checkpoint of train.py")
    parser.add_argument("target", metavar="TO", help="file to write, which must not be there yet")
    args = parser.parse_args(argv)
    with one_line("assets/shrink.py"):
        model, content = load_checkpoint(args.source)
        tokenizer = of_checkpoint(content, args.source)
        target = Path(args.target)
        if target.exists() or not target.parent.is_dir():
            raise ValueError(f"{target} is there already, or its folder is not: name a new file")
        train = {}
        for name in KEPT:
            if name in content.get("train", {}):
                train[name] = content["train"][name]
        save_checkpoint(target, model.bfloat16(), **tokenizer.for_checkpoint(), train=train)
        size = target.stat().st_size / 2**20
        print(f"{target}: {size:.1f} MiB of {model.n_params()[0]:,} parameters")


if __name__ == "__main__":
    main()
