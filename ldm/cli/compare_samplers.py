"""`ldm compare-samplers`: draw the same scenes with every sampler at several numbers of steps, and measure both."""

import argparse
from pathlib import Path

from ldm.cli.options import READING, add_model_options, open_model, real, said, whole

HELP = """Draw the same held-out scenes with every sampler, at several numbers of steps.

Prints how much of what was asked for a checker finds in the pictures, and how far their latents are from those of a
run of 500 steps, against the evaluations of the network that it took. The folder --out gets every finished run as a
line of results.jsonl, the table and a plot; a comparison that was stopped goes on where it was. Needs matplotlib, and
the checker that travels with the model (the folder named like the model's, with "-extras" behind it)."""

OPTIONS = ("samplers", "steps", "count", "batch", "guidance", "rule", "sigmas")


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("compare-samplers", help="which sampler, and how many steps", description=HELP)
    p.set_defaults(run=run, parser=p)
    add_model_options(p)
    p.add_argument("--samplers", nargs="+", metavar="NAME", help="which of them (default: all)")
    p.add_argument("--steps", nargs="+", type=whole(1), metavar="N", help="(default: 5 8 10 15 20 30 50)")
    p.add_argument("--count", type=whole(1), metavar="N", help="pictures a run (default: 32)")
    p.add_argument("--batch", type=whole(1), metavar="N", help="pictures drawn at once (default: 16)")
    p.add_argument("--guidance", type=real(0), metavar="S", help="guidance scale (default: the model's)")
    p.add_argument("--rule", metavar="NAME", help="how the noise levels are spaced (default: the model's)")
    p.add_argument("--sigmas", metavar="NAME", help="how the noise levels are chosen (default: the model's)")
    p.add_argument("--out", default="compare-samplers", metavar="DIR", help="folder (default: compare-samplers)")


def run(args: argparse.Namespace) -> None:
    from ldm.metrics.samplers import compare
    from ldm.metrics.samplers_plot import plot  # first, lest one learns after an hour that matplotlib is missing
    from ldm.samplers import find_sampler

    for name in args.samplers or ():
        find_sampler(name)
    pipe, _ = open_model(args.model, args.dtype, args.device, reading=said(args, READING))
    cells = compare(pipe, Path(args.out), **said(args, OPTIONS))
    plot(cells, Path(args.out) / "plot.png")
