"""`ldm merge`: two models, or a model and LoRAs, become one."""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ldm.cli.added import lora
from ldm.cli.options import DTYPES, one_of, progress, real
from ldm.errors import bytes_in_words, say_on_stderr

if TYPE_CHECKING:
    from ldm.convert.writing import Tick

ENDS = 2.0  # `ldm.merge.MOST_ALPHA`, which would bring torch along

HELP = """Merge models: their weights, tensor by tensor, into those of one.

  ldm merge photo anime --alpha 0.4 --out both.safetensors        0.6 photo + 0.4 anime
  ldm merge photo anime --add-difference sd15 --out both          photo + 0.5 (anime - sd15)
  ldm merge photo anime --block text_encoder=0 --block OUT08=0.9 --out both
  ldm merge scenes --lora scenes-neon:0.8 --out neon              a LoRA for good
  ldm merge photo anime --lora neon.safetensors:0.8 --out all     ... on what the two became

A and B are whole models: the name of an embedded one, a folder, a file, or an address on the hub; what is written is a
file if it ends in .safetensors, and a folder otherwise. Only models that were trained from one go together: of two that
can be told apart (Stable Diffusion 1 and XL, noise and velocity, inpainting and not, ...) the first difference is
named. Configurations, tokenizers, schedule and defaults are A's.

--block takes a prefix of our names of weights (unet.up_blocks.1, text_encoder, vae), or one of the UNet's blocks as
other programs call them: IN00 to IN11, M00, OUT00 to OUT11. Of several that mean a weight, the narrowest counts."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("merge", help="make one model of two, or of a model and LoRAs", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("a", metavar="A", help="a model's name, folder, file or address")
    p.add_argument("b", metavar="B", nargs="?", help="another one (with --lora it may be left out)")
    p.add_argument("--out", required=True, metavar="PLACE", help="a file that ends in .safetensors, or a folder")
    p.add_argument(
        "--alpha", type=real(-ENDS, ENDS), default=None, metavar="X",
        help="how much of B: 0 is A, 1 is B (default: 0.5)",
    )  # fmt: skip
    p.add_argument(
        "--add-difference", metavar="BASE", help="add to A what B is beyond this model: A + alpha (B - BASE)"
    )
    p.add_argument(
        "--block", type=block, action="append", default=[], metavar="NAME=X", help="another alpha for some weights"
    )
    p.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]", help="a LoRA, added in the end"
    )
    p.add_argument("--dtype", type=one_of(DTYPES), help=f"{', '.join(DTYPES)} (default: A's own)")
    p.add_argument("--variant", metavar="NAME", help="which weights of several, as in `ldm convert`")
    p.add_argument("--allow-pickle", action="store_true", help="read .ckpt, .pt and .bin, running nothing of them")
    p.add_argument("--overwrite", action="store_true", help="replace a file or a model of that name")


def block(text: str) -> tuple[str, float]:
    """NAME=X."""
    name, equals, number = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must read NAME=X, like unet.up_blocks.1=0.9, not {text!r}")
    return name, real(-ENDS, ENDS)(number)


def run(args: argparse.Namespace) -> None:
    if args.b is None and args.alpha is not None:
        args.parser.error("--alpha says how much of a second model is taken: name one, or leave it out")
    blocks = dict(args.block)
    if len(blocks) < len(args.block):
        twice = next(name for name, _ in args.block if [each for each, _ in args.block].count(name) > 1)
        args.parser.error(f"--block names {twice!r} twice: leave one of them out")
    from ldm.merge import Recipe, merge

    recipe = Recipe(
        args.a,
        args.b,
        Recipe.alpha if args.alpha is None else args.alpha,
        base=args.add_difference,
        blocks=blocks,
        loras=[(wish.name, wish.value) for wish in args.lora],
    )
    with ExitStack() as stack:

        def begin(size: int) -> "Tick":
            bar = stack.enter_context(progress(size, unit="B"))
            bar.unit_scale = True
            return bar.update

        options = {"dtype": args.dtype, "variant": args.variant, "allow_pickle": args.allow_pickle}
        written, changes, _ = merge(recipe, args.out, **options, overwrite=args.overwrite, begin=begin)
    for folder in written.beside:
        say_on_stderr(f"{folder}: the tokenizer, which has no place in the file; keep the two together.")
    print(f"{written.path}: {recipe}, {bytes_in_words(written.bytes)}")
    for part, change in changes.items():
        print(f"  {part:15} is {change:.2%} from A's: |C - A| / |A|")
    from ldm.inspect.told import line_of_model

    print(line_of_model(str(written.path), written.source.configs))
