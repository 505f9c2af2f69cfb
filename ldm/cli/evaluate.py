"""`ldm evaluate`: draw pictures for held-out scenes, have the checker read them, and print how much is right."""

import argparse
from pathlib import Path

from ldm.cli.options import LEVELS, add_levels, add_model_options, open_model, real, said, whole

HELP = """Draw a picture for each of many held-out scenes, and have a checker read what it shows.

Prints, question by question, the share of right answers on true pictures, on the VAE's reconstructions of them and on
drawn pictures, with 95 % confidence intervals, and the VAE's PSNR. Needs the checker that travels with the model (the
folder named like the model's, with "-extras" behind it). With --out, pictures and verdicts are kept in a folder, and a
run that was stopped goes on where it was."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("evaluate", help="measure how much of what is asked for is drawn", description=HELP)
    p.set_defaults(run=run, parser=p)
    add_model_options(p)
    p.add_argument("--count", type=whole(1), default=1000, metavar="N", help="pictures (default: 1000)")
    p.add_argument("--guidance", type=real(0), metavar="S", help="guidance scale (default: the model's)")
    p.add_argument("--batch", type=whole(1), default=20, metavar="N", help="pictures drawn at once (default: 20)")
    p.add_argument("--out", metavar="DIR", help="keep the pictures, a sheet of them and the verdicts there")
    add_levels(p.add_argument_group("the levels of noise (what is left out is as the model's folder says)"))


def run(args: argparse.Namespace) -> None:
    from ldm.metrics.evaluation import evaluate

    pipe, _ = open_model(args.model, args.dtype, args.device)
    pipe.schedule(**said(args, LEVELS))  # refuses at once what the model cannot do
    folder = Path(args.out) if args.out else None
    evaluate(pipe, args.count, folder, batch=args.batch, **said(args, (*LEVELS, "guidance")))
