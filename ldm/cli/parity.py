"""`ldm parity`: ours beside diffusers, or beside a port of your own, down to the first block that differs."""

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import DTYPES, add_device, find_device, one_of, progress, whole
from ldm.errors import LDMError
from ldm.io.atomic import atomic_file, check_writable

if TYPE_CHECKING:
    import torch

    from ldm.parity.inputs import Plan
    from ldm.parity.report import Report
    from ldm.parity.sides import Side

HELP = """Prove that ldm equals diffusers, on your own weights or at full size with random ones; or find out where a
port of your own departs.

  ldm parity                                    the embedded model, every station of the road
  ldm parity my-model --dtype float64           a folder: both sides load it with their own loaders
  ldm parity --random-init sdxl --dtype bfloat16 --device cuda --size 512x512
  ldm parity scenes --against port.py           your own code beside ours

Stations: weights, tokenizer, text, vae, unet, transformer (FLUX's), controlnet, samplers, pipelines (--only takes some
of them). A line says
the largest difference, the same relative to the reference's largest value, what is allowed, and the milliseconds of
both; of a network that is equal, also every module inside it is held against its counterpart. Allowed is 1e-11 in
float64, 1e-5 in float32, and for whole runs 1e-10 and 1e-3, for guidance and steps multiply rounding. In half precision
both are held against float32, and our error may be 1.05 times the reference's, of whole runs 1.5 times. Samplers are
always compared in float64. At the first station that differs the network is run again with every module watched: the
first block to differ is named, and likely causes are found by experiment. float64 sees what float32's rounding hides.

A port is a Python file with a function load(folder, device, dtype), which returns an object or a dict with any of
  tokenizer(list of prompts) -> ids (B, 77)
  text_encoder(ids) -> (context, pooled or None)       text_encoder_2 likewise, of SDXL
  vae_encode(image in [-1, 1]) -> means of the latents, at the UNet's scale
  vae_decode(x0) -> image
  unet(x, t, context, extras) -> prediction            extras: a dict, of SDXL with pooled and time_ids
  transformer(x, t, context, extras) -> velocity       FLUX's, of latents as they are; extras: pooled, and guidance
  unet_module, text_encoder_module, vae_module         nn.Modules, walked block by block: names are the checkpoint's
                                                       (transformer_module likewise)
What it lacks is skipped. With a port, ours is the reference, and diffusers isn't needed.

Exit status: 0 equal, 1 not."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser(
        "parity", help="prove equality with diffusers, or find where a port departs", description=HELP
    )
    p.set_defaults(run=run, parser=p)
    p.add_argument("model", nargs="?", metavar="MODEL", help="an embedded model's name or a folder (default: scenes)")
    p.add_argument(
        "--against", default="diffusers", metavar="WHAT", help="diffusers (default), or a port's Python file"
    )
    p.add_argument(
        "--random-init", metavar="NAME", help="a published architecture with random weights: sd15, sd15-inpaint, "
        "sd15-controlnet, sd21, sd21-base, sdxl, sdxl-controlnet, sdxl-refiner, flux-schnell, flux-dev, flux-fill, "
        "flux-canny, and tiny ones: tiny-sd15, tiny-flux ...",
    )  # fmt: skip
    p.add_argument("--controlnet", metavar="FOLDER", help="a ControlNet for the model, by name or folder")
    add_device(p)
    p.add_argument("--dtype", default="float32", type=one_of(DTYPES), help=f"{', '.join(DTYPES)} (default: float32)")
    p.add_argument("--size", type=size, metavar="WxH", help="pixels of the pictures (default: the model's own)")
    p.add_argument("--steps", type=whole(1), default=4, metavar="N", help="steps of the pipelines' runs (default: 4)")
    p.add_argument("--only", metavar="PARTS", help="some stations, with commas between them")
    p.add_argument("--keep-going", action="store_true", help="go on after a station that differs")
    p.add_argument("--html", metavar="FILE", help="write a report as a page")
    p.add_argument("--json", metavar="FILE", help="write all numbers")
    p.add_argument("--threads", type=whole(1), metavar="N", help="threads on the CPU (default: torch's)")


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None or any(int(side) % 8 or not int(side) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, both multiples of 8, such as 512x384, not {text!r}")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    from ldm.parity.opening import check_choice, of_architecture, of_folder
    from ldm.parity.timing import full_float32
    from ldm.parity.walk import check_parts

    only = tuple(word.strip() for word in args.only.split(",")) if args.only else ()
    check_parts(only)
    if args.random_init is not None and args.model is not None:
        raise LDMError("--random-init stands in the place of MODEL: leave one of them out.")
    check_choice(args.random_init, args.against, args.controlnet)
    for path in (args.html, args.json):
        if path is not None:
            check_writable(path)
    device, dtype = find_device(args.device), dtype_of(args.dtype)
    with full_float32(args.threads):
        if args.random_init is not None:
            ours, theirs = of_architecture(args.random_init, dtype, device)
        else:
            ours, theirs = of_folder(args.model or "scenes", dtype, device, args.against, args.controlnet)
        return walked(args, ours, theirs, plan_of(args, ours, device, dtype, only))


def dtype_of(name: str) -> "torch.dtype":
    import torch

    return getattr(torch, name)


def plan_of(
    args: argparse.Namespace, ours: "Side", device: "torch.device", dtype: "torch.dtype", only: tuple[str, ...]
) -> "Plan":
    from ldm.parity.inputs import Plan

    pipe = ours.own[0]
    width, height = args.size or (pipe.default_size, pipe.default_size)
    if width % pipe.model.multiple or height % pipe.model.multiple:
        raise LDMError(f"--size must be of multiples of {pipe.model.multiple} for this model, not {width}x{height}.")
    return Plan(device, dtype, width, height, args.steps, only)


def walked(args: argparse.Namespace, ours: "Side", theirs: "Side", plan: "Plan") -> int:
    """Print every line when it is known; write the report, also of a walk that was stopped."""
    from ldm.parity.blocks import Divergence, Walked
    from ldm.parity.report import Report, header, paragraph, row
    from ldm.parity.walk import Walk, along

    report = Report(about(args, theirs, plan))
    print(header(), flush=True)
    try:
        with progress(0, unit=" lines") as bar:
            for found in along(Walk(ours, theirs, plan), args.keep_going, bar.set_description):
                report.add(found)
                if isinstance(found, Walked):  # for the page; its line is printed
                    continue
                bar.update()
                with bar.external_write_mode():
                    text = paragraph(found) if isinstance(found, Divergence) else [row(found)]
                    print(*text, sep="\n", flush=True)
        report.finished = True
    finally:
        write(report, args)
    print(report.sentence)
    return 0 if report.equal else 1


def write(report: "Report", args: argparse.Namespace) -> None:
    from ldm.io.folders import write_json
    from ldm.parity.page import page

    if args.json is not None:
        write_json(args.json, report.to_json())
    if args.html is not None:
        with atomic_file(args.html, "w") as file:
            file.write(page(report))


def about(args: argparse.Namespace, theirs: "Side", plan: "Plan") -> dict[str, str]:
    """What was compared, for whoever reads the report."""
    import platform

    import torch

    from ldm import __version__
    from ldm.parity import reference

    libraries = reference.versions() if theirs.name == "diffusers" else {}
    against = f"diffusers {libraries['diffusers']}" if libraries else theirs.name
    place = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else platform.processor() or "CPU"
    model = f"random {args.random_init}" if args.random_init else Path(args.model or "scenes").name
    return {
        "command": shlex.join(["ldm", *args.argv]),
        "model": model,
        "against": against,
        "device": f"{plan.device} ({place})",
        "dtype": args.dtype,
        "size": f"{plan.width}x{plan.height} pixels, a batch of 2",
        "steps": f"{plan.steps} in pipelines, 16 or more for samplers",
        "seeds": f"weights and inputs {plan.seed}, pictures 5 and 6",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {number}" for name, number in
                              ({"ldm": __version__, "torch": torch.__version__, "Python": platform.python_version()}
                               | libraries).items()),
    }  # fmt: skip
