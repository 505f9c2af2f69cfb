"""`ldm convert`: a model in another format, with the same bits."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import DTYPES, one_of, progress, real
from ldm.errors import say_on_stderr

if TYPE_CHECKING:
    from ldm.convert.writing import Source, Written

PARTS = ("controlnet", "vae", "unet")  # of `ldm.convert`, which would bring torch along
PREDICTIONS = ("epsilon", "v_prediction", "sample")

HELP = """Write a model as a folder in diffusers' format, or as a single file in the original layout.

  ldm convert v1-5-pruned-emaonly.safetensors my-model           a file becomes a folder
  ldm convert my-model my-model.safetensors                      a folder becomes a file
  ldm convert my-model half.safetensors --dtype float16          ... half as large
  ldm convert old.ckpt my-model --allow-pickle --variant ema     the averaged weights of a pickle
  ldm convert control_sd15_canny.pth canny --allow-pickle        a ControlNet
  ldm convert my-model vae.safetensors --part vae                one network of a model

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
        "--scaling-factor", type=real(1e-6, 1e6), metavar="X", help="of a VAE alone in a file, which doesn't say it: "
        "0.18215 for Stable Diffusion 1 and 2, 0.13025 for SDXL",
    )  # fmt: skip
    p.add_argument("--allow-pickle", action="store_true", help="read .ckpt, .pt and .bin, running nothing of them")
    p.add_argument("--overwrite", action="store_true", help="replace a file or a model of that name")


def run(args: argparse.Namespace) -> None:
    from ldm.convert import open_source
    from ldm.convert.writing import check_target, write
    from ldm.loading import find_dtype

    check_target(args.source, args.target, args.overwrite)
    source = open_source(
        args.source, args.variant, args.prediction_type, args.part, args.allow_pickle, args.scaling_factor
    )
    dtype = None if args.dtype is None else find_dtype(args.dtype)
    with progress(source.bytes(dtype), unit="B") as bar:
        bar.unit_scale = True
        written = write(source, args.target, dtype, args.overwrite, bar.update)
    for folder in written.beside:
        say_on_stderr(f"{folder}: the tokenizer, which has no place in the file; keep the two together.")
    print(f"{written.path}: {', '.join(written.parts)}, {written.bytes / 1e6:.1f} MB")
    print(use(written, source))


def use(written: "Written", source: "Source") -> str:
    """The line that uses what was written."""
    from ldm.tasks import task_of

    path = shlex.quote(str(written.path))
    if source.model is not None:
        task = task_of(source.configs["unet"].in_channels, source.configs["vae"].latent_channels)
        given = {"inpaint": " --image PICTURE --mask MASK", "text": ""}.get(task, " --image PICTURE")
        return f'ldm generate "a prompt" --model {path}{given}'
    ((part,), name) = written.parts, str(Path(written.path))
    return {
        "controlnet": f'ldm generate "a prompt" --model MODEL --control KIND@{path}:PICTURE',
        "vae": f"pipe.vae = ldm.load_vae({name!r}, pipe)  # in Python",
        "unet": f"UNet2DConditionModel.from_single_file({name!r})  # diffusers; ldm reads whole models"
        if name.lower().endswith(".safetensors")
        else f"UNet2DConditionModel.from_pretrained({name!r})  # diffusers; ldm reads whole models",
    }[part]
