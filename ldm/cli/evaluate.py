"""`ldm evaluate`: draw pictures for held-out scenes, have the checker read them, and print how much is right."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import added, additions
from ldm.cli.options import LEVELS, READING, add_levels, add_model_options, one_of, open_model, real, said, whole
from ldm.errors import LDMError

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

HELP = """Draw a picture for each of many held-out scenes, and have a checker read what it shows.

Prints, question by question, the share of right answers on true pictures, on the VAE's reconstructions of them and on
drawn pictures, with 95 % confidence intervals, and the VAE's PSNR. Needs the checker that travels with the model (the
folder named like the model's, with "-extras" behind it). With --out, pictures and verdicts are kept in a folder, and a
run that was stopped goes on where it was.

  ldm evaluate --control canny --count 200 --grid scales.png

measures a ControlNet instead: how near pictures drawn with it, and without, come to the edges or the depth given, and
whether they still show what was asked for. --grid draws a few at scales from 0 to 1.5."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("evaluate", help="measure how much of what is asked for is drawn", description=HELP)
    p.set_defaults(run=run, parser=p)
    add_model_options(p)
    p.add_argument("--count", type=whole(1), default=1000, metavar="N", help="pictures (default: 1000)")
    p.add_argument("--guidance", type=real(0), metavar="S", help="guidance scale (default: the model's)")
    p.add_argument("--batch", type=whole(1), default=20, metavar="N", help="pictures drawn at once (default: 20)")
    p.add_argument("--out", metavar="DIR", help="keep the pictures, a sheet of them and the verdicts there")
    p.add_argument(
        "--control", metavar="KIND", type=one_of(("canny", "depth")), help="measure a ControlNet: canny, depth"
    )
    p.add_argument("--net", metavar="NET", help="the ControlNet (default: the one that travels with the model)")
    p.add_argument(
        "--grid", metavar="PNG", help="with --control: draw four scenes at every scale, and write them there"
    )
    added.add(p.add_argument_group(added.TITLE))
    add_levels(p.add_argument_group("the levels of noise (what is left out is as the model's folder says)"))


def run(args: argparse.Namespace) -> None:
    from ldm.metrics.evaluation import evaluate

    found = additions.find(added.wishes(args), args.allow_pickle)
    if found.found and args.out:
        raise LDMError("--out tells pictures apart by their model alone: leave it out, or what is added to the model.")
    pipe, _ = open_model(args.model, args.dtype, args.device, None, said(args, READING), found)
    pipe.schedule(**said(args, LEVELS))  # refuses at once what the model cannot do
    if args.control:
        return run_control(args, pipe)
    if args.net or args.grid:
        raise LDMError("--net and --grid are about a ControlNet: say which, --control canny or --control depth.")
    folder = Path(args.out) if args.out else None
    evaluate(pipe, args.count, folder, batch=args.batch, **said(args, (*LEVELS, "guidance")))


def run_control(args: argparse.Namespace, pipe: "Pipeline") -> None:
    from ldm.cli.jobs import prepare_sheet
    from ldm.io.png import save_png
    from ldm.loading import load_controlnet
    from ldm.metrics.control import evaluate_control, report, scale_grid
    from ldm.metrics.evaluation import load_checker

    if args.out:
        raise LDMError("--out keeps the pictures of an evaluation without --control: leave one of them out.")
    if args.grid:
        prepare_sheet(Path(args.grid), "shows")
    net = load_controlnet(args.net or f"{Path(args.model).name}-{args.control}", pipe)
    options = said(args, (*LEVELS, "guidance"))
    checker = load_checker(pipe.folder).to(pipe.device)
    print(report(args.control, evaluate_control(pipe, net, args.control, checker, args.count, args.batch, **options)))
    if args.grid:
        grid = scale_grid(pipe, net, args.control, **options)
        save_png(grid, args.grid, {"shows": f"{args.control}, and pictures at scales 0, 0.25 ... 1.5"})
        print(args.grid)
