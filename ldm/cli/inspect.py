"""`ldm inspect`: what a file or folder is, and whether all is there, from the headers alone."""

import argparse
import json
import os
import sys

HELP = """Tell what a file or folder is: a model of which family, a ControlNet, a VAE, a LoRA ...; its parts with their
sizes and types; tensors that are missing, misshapen or not asked for; what it predicts, what is passed over, and the
line that uses it. Only headers are read, so that gigabytes take a second; no pickle is run, and nothing is fetched.

Of a LoRA: whose format it has, who trained it, its rank and alpha, what it changes and how much, block by block; of an
embedding, the word and its vectors; of both, what they go with. These are small, and are read whole, and of a model
that they go with the weights that they change, if it is here: --model M asks whether they go with M.

Exit status: 0 every tensor is there, of a whole model, of a part of one or of what is added to one; 1 something is
wrong, it doesn't go with --model, or it is nothing that ldm loads."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("inspect", help="what a file or folder holds, from its headers", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument(
        "model", metavar="MODEL", help="a file, a folder, an embedded model, or a name of the hub that is here"
    )
    p.add_argument(
        "--model", metavar="M", dest="base", help="of a LoRA or an embedding: whether it goes with this model, and "
        "what share of its weights a LoRA changes",
    )  # fmt: skip
    p.add_argument("--variant", metavar="NAME", help="look at these weights of several: fp16; ema of a single file")
    p.add_argument("--keys", action="store_true", help="name every tensor, with its shape and type")
    p.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    from ldm.inspect import inspect
    from ldm.inspect.report import as_json, page

    report = inspect(args.model, args.variant, args.base)
    if args.json:
        print(json.dumps(as_json(report, args.keys), indent=2))
    else:
        print(page(report, args.keys, coloured=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    return 0 if report.sound else 1
