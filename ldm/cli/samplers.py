"""`ldm samplers`: every sampler in a line, and what one wants to know before taking it."""

import argparse

HELP = """List the samplers.

order         halving the steps divides the error by 2 to this power, once it has earlier steps to build on; for
              those that add noise, the error of the law of their pictures. – : made for distilled networks
evaluations   of the network a step; the first and the last may take more or fewer
noise         whether it adds some on its way; with eta, as much as --eta says
rule          the table of noise levels that its class in diffusers has, taken with --compat"""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("samplers", help="list the samplers: order, cost, noise, source", description=HELP)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> None:
    from ldm.samplers import table

    print(table())
