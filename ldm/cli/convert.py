"""`ldm convert`: a model in another format, with the same bits."""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ldm.cli.options import DTYPES, one_of, progress, real
from ldm.errors import bytes_in_words, say_on_stderr

if TYPE_CHECKING:
    from ldm.convert.writing import Tick, Written

PARTS = ("controlnet", "vae", "unet", "transformer")  # of `ldm.convert`, which would bring torch along
PREDICTIONS = ("epsilon", "v_prediction", "sample")

HELP = """Write a model as a folder in diffusers' format, or as a single file in the original layout.

  ldm convert v1-5-pruned-emaonly.safetensors my-model           a file becomes a folder
  ldm convert my-model my-model.safetensors                      a folder becomes a file
  ldm convert my-model half.safetensors --dtype float16          ... half as large
  ldm convert old.ckpt my-model --allow-pickle --variant ema     the averaged weights of a pickle
  ldm convert control_sd15_canny.pth canny --allow-pickle        a ControlNet
  ldm convert my-model vae.safetensors --part vae                one network of a model
  ldm convert flux1-dev.safetensors dev --parts-of flux-schnell  FLUX's transformer, with another FLUX.1's other parts

SOURCE is whatever `ldm generate` reads as a model, a ControlNet or a VAE: the name of an embedded model, a folder, a
file, or an address on the hub. TARGET is a file if it ends in .safetensors, and a folder otherwise. Every number keeps
its bits unless --dtype says otherwise, and so a model can be converted there and back. What a file holds and no
network reads (averages, tables of the schedule, ...) is named and left out. A file carries its configurations in its
metadata; a tokenizer that isn't CLIP's own is written beside it.

An original file doesn't always say whether its network predicts noise or velocity: then it is tried out, or
--prediction-type says it."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("convert", help="write a model in another format", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("source", metavar="SOURCE", help="a model's name, folder, file or address")
    p.add_argument("target", metavar="TARGET", help="a file that ends in .safetensors, or a folder")
    p.add_argument("--dtype", type=one_of(DTYPES), help=f"{', '.join(DTYPES)} (default: each number's own)")
    p.add_argument(
        "--variant", metavar="NAME", help="which weights of several: fp16 of a folder, ema of a file with averaged ones"
    )
    p.add_argument(
        "--prediction-type", type=one_of(PREDICTIONS), metavar="TYPE", help="what the UNet predicts: epsilon, "
        "v_prediction, sample (default: what the source says, or shows)",
    )  # fmt: skip
    p.add_argument("--part", type=one_of(PARTS), help=f"one network alone: {', '.join(PARTS)}")
    p.add_argument(
        "--scaling-factor", type=real(1e-6, 1e6), metavar="X", help="of a VAE alone, where its file doesn't say it: "
        "that in the vae/config.json of its model (SDXL's is 0.13025)",
    )  # fmt: skip
    p.add_argument(
        "--parts-of", metavar="FLUX", help="of a transformer of FLUX alone: the FLUX.1 whose other parts it is put "
        "beside, a folder, or an address on the hub",
    )  # fmt: skip
    p.add_argument("--allow-pickle", action="store_true", help="read .ckpt, .pt and .bin, running nothing of them")
    p.add_argument("--overwrite", action="store_true", help="replace a file or a model of that name")


def run(args: argparse.Namespace) -> None:
    from ldm.convert import convert

    with ExitStack() as stack:

        def begin(size: int) -> "Tick":
            bar = stack.enter_context(progress(size, unit="B"))
            bar.unit_scale = True
            return bar.update

        written = convert(
            args.source,
            args.target,
            dtype=args.dtype,
            variant=args.variant,
            prediction_type=args.prediction_type,
            part=args.part,
            allow_pickle=args.allow_pickle,
            overwrite=args.overwrite,
            scaling_factor=args.scaling_factor,
            begin=begin,
            parts_of=args.parts_of,
        )
    for folder in written.beside:
        say_on_stderr(f"{folder}: the tokenizer, which has no place in the file; keep the two together.")
    print(f"{written.path}: {', '.join(written.parts)}, {bytes_in_words(written.bytes)}")
    print(use(written))


def use(written: "Written") -> str:
    """The line that uses what was written."""
    from ldm.convert.writing import is_file
    from ldm.inspect.told import line_of_model, line_of_part

    path, source = str(written.path), written.source
    if source.model is not None:
        return line_of_model(path, source.configs)
    (part,) = source.configs
    how = "from_single_file" if is_file(written.path) else "from_pretrained"
    return line_of_part(part, path) or f"UNet2DConditionModel.{how}({path!r})   # diffusers; ldm reads whole models"
