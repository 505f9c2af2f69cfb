"""`ldm plan`: what a picture takes of memory in every way of running a model, and the way that fits."""

import argparse
import json
import re
from typing import TYPE_CHECKING

from ldm.cli.options import add_model, one_of, whole

if TYPE_CHECKING:
    from ldm.planned import Need, Planned, Way

HELP = """Tell what a model needs of memory before anything of it is loaded, or even there: station by station, in every
way of running it, which of them fit, and the line that takes the best one.

  ldm plan --model flux-dev --memory 16G
  ldm plan --model sdxl --width 1024 --height 1024 --batch 4
  ldm plan --model FOLDER --device cpu

Beside what `ldm generate` takes, --model may name an architecture: sd15, sdxl, flux-schnell, flux-dev ... Weights are
counted, and so is what is computed beside them, on networks without numbers. Of four runs on a processor the whole was
from 0.4 % less to 14 % more than they took; on a card, and of FLUX, it was not measured.

Exit status: 0 something fits, 1 nothing does."""

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
DEVICES = ("cuda", "cpu")


def size(text: str) -> int:
    """The kind of option that is an amount of memory: 16G, 16 GiB, 500M, or so many bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"must be an amount of memory such as 16G, not {text!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("plan", help="what a model needs of memory, before anything loads", description=HELP)
    p.set_defaults(run=run, parser=p)
    add_model(p)
    p.add_argument(
        "--memory", type=size, metavar="SIZE", help="what there is: 16G, 500M (default: what is free of this machine's)"
    )
    p.add_argument(
        "--device", type=one_of(DEVICES), metavar="NAME", help="cuda, a card of its own, or cpu (default: cuda where "
        "there is one, or where --memory is said)",
    )  # fmt: skip
    p.add_argument("--width", type=whole(1), metavar="PX", help="of the picture (default: the model's)")
    p.add_argument("--height", type=whole(1), metavar="PX")
    p.add_argument("--batch", type=whole(1), default=1, metavar="N", help="pictures at once (default: 1)")
    p.add_argument("--steps", type=whole(1), metavar="N", help="of the run: of FLUX's some vectors of each are kept")
    p.add_argument("--json", action="store_true", help="the same for a program, in bytes")


def run(args: argparse.Namespace) -> int:
    from ldm.planned import plan

    device = args.device or find_device(args.memory is not None)
    memory = free(device) if args.memory is None else args.memory
    planned = plan(args.model, args.width, args.height, args.batch, args.steps)
    best = planned.best(device, memory)
    print(json.dumps(as_json(planned, device, memory), indent=2) if args.json else page(planned, device, memory))
    return 0 if best else 1


def find_device(told: bool) -> str:
    """The device that is planned for, if none is named: a card where there is one, or where memory was named."""
    import torch

    return "cuda" if told or torch.cuda.is_available() else "cpu"


def free(device: str) -> int:
    """Bytes that are free now. Raises LDMError where they can't be told."""
    import torch

    from ldm.doctor.machine import ram
    from ldm.errors import LDMError

    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    found = ram() if device == "cpu" else None
    if found is None:
        raise LDMError(f"What memory {device} has can't be told here: say --memory, such as 16G.")
    return found.available


# ------------------------------------------------------------------------------------------------ what is printed


def page(planned: "Planned", device: str, memory: int) -> str:
    """The table, what is to be known of it, and the line to take."""
    pictures = "1 picture" if planned.batch == 1 else f"{planned.batch} pictures"
    where = "a card's memory" if device == "cuda" else "the processor's memory"
    head = f"{planned.model}: {pictures} of {planned.width}x{planned.height}, {planned.steps} steps"
    lines = [f"{head}; GiB of {where}, {gib(memory)} there", ""]
    needs, names = planned.needs(device), list(planned.counts)
    widths = [max(len(name), 6) for name in names]
    left = max(len(way.name) for way in needs)
    titles = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines.append(f"  {'':{left}}  {titles}  at most")
    for way, need in needs.items():
        cells = "  ".join(f"{gib(need.stations[n]):>{width}}" for n, width in zip(names, widths, strict=True))
        lines.append(f"{'*' if need.peak <= memory else ' '} {way.name:{left}}  {cells}  {gib(need.peak):>7}")
    return "\n".join([*lines, "", *notes(planned, device), "", *advice(planned, needs, device, memory)])


def notes(planned: "Planned", device: str) -> list[str]:
    """What the ways do, of those that are offered."""
    said = ["* fits."]
    late = sum(count.modulations for count in planned.counts.values())
    if device == "cuda":
        said[0] += " Parts in turn, and blocks, come from the files on the disk as they are needed."
    if late and device == "cuda":
        said.append(
            f"Modulations, {gib(2 * late)} of the transformer in bfloat16, come once a run, and are never there."
        )
    said.append("8 and 4 bits change the picture a little; everything else is exact for its type.")
    return said


def advice(planned: "Planned", needs: "dict[Way, Need]", device: str, memory: int) -> list[str]:
    """The line that takes the best way; or what the least one lacks."""
    best = planned.best(device, memory)
    if best is None:
        way = min(needs, key=lambda way: needs[way].peak)
        lacks = f"Nothing fits: {way.name} takes least, {gib(needs[way].peak)} GiB."
        return [f"{lacks} Draw smaller pictures (--width, --height), or fewer at once (--batch)."]
    host = planned.host(best)
    beside = f" It takes {gib(host)} GiB of the processor's memory beside." if host else ""
    return [f"Take {best.name}.{beside}", f"  {command(planned, best, device)}"]


def command(planned: "Planned", way: "Way", device: str) -> str:
    """`ldm generate`, that way."""
    words = ["ldm generate", '"a red house"', f"--model {quoted(planned.model)}"]
    words += [f"--device {device}"] if device != "cpu" else []
    words += [] if way.options == "--dtype float32" else [way.options]
    words += [f"--width {planned.width} --height {planned.height}", f"--steps {planned.steps}"]
    return " ".join([*words, *([f"--count {planned.batch} --batch {planned.batch}"] if planned.batch > 1 else [])])


def quoted(word: str) -> str:
    from ldm.doctor.lines import quoted

    return quoted(word)


def gib(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.1f}"


def as_json(planned: "Planned", device: str, memory: int) -> dict:
    best, needs = planned.best(device, memory), planned.needs(device)
    ways = [
        {"way": way.name, "options": way.options, "fits": need.peak <= memory, "host": planned.host(way)}
        | need._asdict()
        for way, need in needs.items()
    ]
    return {
        "model": planned.model,
        "width": planned.width,
        "height": planned.height,
        "batch": planned.batch,
        "steps": planned.steps,
        "device": device,
        "memory": memory,
        "ways": ways,
        "best": best and best.name,
        "command": best and command(planned, best, device),
    }
