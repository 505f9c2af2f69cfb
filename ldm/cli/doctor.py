"""`ldm doctor`: what works here, what doesn't, and the lines that mend it."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.doctor import Mend, Section
    from ldm.doctor.lines import Line

HELP = """Tell what works here and what doesn't: versions, devices and the types they compute in, memory and the models
that fit into it, and whether the embedded model draws the picture that it should. At the end stand the lines that mend
what doesn't work, what stops drawing first.

Exit status: 0 everything works that drawing needs, 1 something doesn't. Where `ldm` itself doesn't start, because
another package of that name is found first, go to the folder of the checkout and say `python -m ldm doctor`."""

MARKS = {"ok": " ", "lacks": "-", "broken": "!"}
COLOURS = {"ok": "", "lacks": "", "broken": "\x1b[31m"}
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("doctor", help="what works here, and what mends the rest", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    from ldm.doctor import examine, to_mend, works

    sections, coloured = [], sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for section in examine():
        sections.append(section)
        if not args.json:
            print("\n".join(shown(section, coloured)), end="\n\n", flush=True)
    mends, well = to_mend(sections), works(sections)
    if args.json:
        print(json.dumps(as_json(sections, mends, well), indent=2))
    else:
        print("\n".join(advice(mends, well, coloured)))
    return 0 if well else 1


def shown(section: "Section", coloured: bool) -> list[str]:
    """A section in aligned lines: "-" marks what is lacking, "!" what stops drawing."""
    width = max((len(line.name) for line in section.lines), default=0)
    return [section.title, *(shown_line(line, width, coloured) for line in section.lines)]


def shown_line(line: "Line", width: int, coloured: bool) -> str:
    text = f"{MARKS[line.verdict]} {line.name:{width}}  {line.text}"
    colour = COLOURS[line.verdict] if coloured else ""
    return f"{colour}{text}{PLAIN}" if colour else text


def advice(mends: Sequence["Mend"], well: bool, coloured: bool) -> list[str]:
    """The last section: what is wrong, in sentences, and the line for each."""
    lines = ["To mend"]
    for number, mend in enumerate(mends, 1):
        first, *others = [*mend.faults, *filter(None, [mend.command])]
        lines += [f"  {number}. {first}", *(f"     {other}" for other in others)]
    lines += [] if mends else ["  Nothing to mend."]
    verdict = "Drawing works." if well else "Drawing does not work here."
    colour = (GREEN if well else COLOURS["broken"]) if coloured else ""
    return [*lines, "", f"{colour}{verdict}{PLAIN}" if colour else verdict]


def as_json(sections: Sequence["Section"], mends: Sequence["Mend"], well: bool) -> dict:
    return {
        "works": well,
        "sections": {section.title: [line._asdict() for line in section.lines] for section in sections},
        "to_mend": [mend._asdict() for mend in mends],
    }
