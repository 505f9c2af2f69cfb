"""`ldm condition`: what a ControlNet will look at, as a picture, before it does."""

import argparse
from pathlib import Path

from ldm.cli.options import real
from ldm.errors import LDMError, say_on_stderr
from ldm.io.atomic import atomic_file, check_writable

KINDS = ("canny", "scribble", "depth", "segmentation", "pose")  # of `ldm.conditions`, which would bring torch along

HELP = """Make the condition of a ControlNet, and say what the network will see of it.

  ldm condition canny photo.jpg --out edges.png --low 50 --high 150
  ldm condition scribble photo.jpg --out lines.png
  ldm condition depth photo.jpg --out depth.png --estimator dpt-large/
  ldm condition segmentation classes.png --out colours.png
  ldm condition pose people.json --out pose.png
  ldm condition depth scene:7 --out depth.png

segmentation colours a picture (grey or palette) whose values are ADE20K's classes, 0 (wall) to 149.
pose draws {"width": 512, "height": 512, "people": [[[x, y], null, ...]]}: 18 keypoints of OpenPose a person.
scene:7 instead of a file is scene 7 of the embedded model's world, whose depth is known."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("condition", help="make what a ControlNet looks at", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    p.add_argument("picture", metavar="PICTURE", help="a photograph; for segmentation and pose see above")
    p.add_argument("--out", required=True, metavar="PNG", help="where to write the condition")
    p.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    p.add_argument("--low", type=real(0), metavar="N", help="canny: edges go on above this gradient (default: 100)")
    p.add_argument("--high", type=real(0), metavar="N", help="canny: edges begin above this gradient (default: 200)")
    p.add_argument("--estimator", metavar="FOLDER", help="depth: a depth network in transformers' format")


def run(args: argparse.Namespace) -> None:
    from ldm.cli.given import source_of
    from ldm.conditions import doubts, prepare, to_tensor

    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise LDMError(f"--out {out} must end in .png.")
    check_writable(out)
    if out.exists() and not args.overwrite:
        raise LDMError(f"{out} is there already: choose another --out, or say --overwrite.")
    if args.kind == "depth" and args.estimator is None and not args.picture.startswith("scene:"):
        args.parser.error("depth of a photograph needs --estimator FOLDER, a depth network in transformers' format")
    for options, kind in ((("low", "high"), "canny"), (("estimator",), "depth")):
        if args.kind != kind and any(getattr(args, name) is not None for name in options):
            args.parser.error(f"--{' and --'.join(options)} {'are' if len(options) > 1 else 'is'} for {kind} alone")
    picture, finished = source_of(args.kind, args.picture, args.estimator)
    condition = picture if finished else prepare(args.kind, picture, args.low, args.high)
    for doubt in doubts(args.kind, condition):
        say_on_stderr(doubt)
    with atomic_file(out) as file:
        condition.save(file, format="PNG")
    x = to_tensor(condition)
    print(out)
    print(
        f"at this size the network gets {tuple(x.shape)} float32, from {x.min():g} to {x.max():g}, "
        f"mean {x.mean():.4f}, {(x > 0.5).float().mean():.2%} above one half"
    )
