"""What a command line wishes of pictures, in words: parsed, checked against each other, and told again by a record."""

import argparse
import re
from pathlib import Path

from ldm.cli.options import one_of, read_again, real, whole
from ldm.errors import LDMError

HELP = """pictures given:
  --image photo.png                   begin from it; --strength says how much of it is drawn over
  --mask mask.png                     draw anew where this is white; all other pixels are put back, bit for bit as
                                      they are at the size drawn (multiples of 8)
  --outpaint 0,32,0,32                draw so many pixels more at the left, top, right and bottom of --image; best on
                                      one side at a time, and with words that tell of the whole picture
  --control canny:photo.png:0.8       let a ControlNet see the edges of a photograph; may be given several times:
                                      KIND[@NET]:PICTURE[:SCALE[:START:END]]. KIND is made of the picture (canny,
                                      scribble, segmentation, pose, depth with --estimator); as-is-KIND says that the
                                      picture is one already. NET is a ControlNet's folder or name; left out, it is
                                      the embedded model's own (canny, depth).
  --image scene:7                     instead of a photograph: scene 7 of the embedded model's world
  --explain sheet.png                 show what the model is given: the picture, what of it is drawn anew, conditions
"""
AS_IS = "as-is"
SPEC = re.compile(r"(?P<kind>[\w-]+)(?:@(?P<net>[^:]+))?:(?P<rest>.+)")
NUMBERS = re.compile(r"(?P<picture>scene:\d+|.+?)(?::(?P<scale>-?[\d.]+)(?::(?P<start>[\d.]+):(?P<end>[\d.]+))?)?")


def add(p: "argparse._ActionsContainer") -> None:
    """The options of the pictures given."""
    p.add_argument("--image", metavar="PICTURE", help="a picture to begin from, to change, to fill or to enlarge")
    p.add_argument(
        "--strength", type=real(0, 1), metavar="S", help="how much of --image is drawn over: 0 nothing, 1 all "
        "(default: 0.8, with a mask 1, by a refiner 0.3)",
    )  # fmt: skip
    p.add_argument(
        "--steps-are", type=one_of(("total", "actual")), metavar="WORD", help="total: strength's share of the steps is "
        "run (default); actual: so many are run",
    )  # fmt: skip
    p.add_argument("--mask", metavar="PICTURE", help="white is drawn anew, black is kept; as large as --image")
    p.add_argument("--no-paste", action="store_true", help="leave outside the mask what the VAE made of it")
    p.add_argument("--outpaint", type=sides, metavar="L,T,R,B", help="pixels to draw around --image")
    p.add_argument("--control", type=control, action="append", default=[], metavar="SPEC", help="see below")
    p.add_argument("--guess", action="store_true", help="ControlNets in guess mode, for drawing without a prompt")
    p.add_argument("--estimator", metavar="FOLDER", help="a depth network of transformers, for --control depth@NET:...")
    p.add_argument(
        "--depth",
        metavar="PICTURE",
        help="of a depth-to-image model: grey, near is white (default: its own estimator's)",
    )
    p.add_argument("--image-guidance", type=real(), metavar="SCALE", help="of a model that edits: how --image counts")
    p.add_argument("--noise-level", type=whole(0), metavar="T", help="of an upscaler: noise on the small picture")
    p.add_argument("--tile", type=whole(0), metavar="PIXELS", help="draw in overlapping tiles (upscalers do: 512)")
    p.add_argument("--enlarge", type=real(1, 8), metavar="FACTOR", help="draw, enlarge the latents, and refine them")
    p.add_argument("--refine", type=real(0, 1), metavar="S", help="the strength of that (default: 0.6)")
    p.add_argument(
        "--invert", metavar="TEXT", help="begin from the noise from which DDIM draws --image, of which TEXT tells; the "
        "prompt may change it",
    )  # fmt: skip
    p.add_argument(
        "--refiner", metavar="FOLDER", help="of SDXL: a second model that draws the last part of the road; no --lora "
        "is on it, and of an --embedding what is for SDXL's second text encoder",
    )  # fmt: skip
    p.add_argument(
        "--hand-over", type=real(0.001, 0.999), metavar="S", help="the share of the road at which it takes over "
        "(default: 0.8)",
    )  # fmt: skip
    p.add_argument(
        "--refiner-steps", type=whole(1), metavar="N", help="steps of its whole road (default: as many as --steps)"
    )
    p.add_argument(
        "--sizes", type=sizes, metavar="SIZES", help="what SDXL is told: original=WxH,crop=LEFTxTOP,target=WxH, or "
        "score=6 (its refiner); what is left out is as the picture that is drawn",
    )  # fmt: skip
    p.add_argument("--negative-sizes", type=sizes, metavar="SIZES", help="the same of the negative prompt")
    p.add_argument("--explain", metavar="PNG", help="write there what the model is given")


def sides(text: str) -> list[int]:
    words = text.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"must be four numbers of pixels, left,top,right,bottom, not {text!r}")
    return [int(word) for word in words]


def sizes(text: str) -> dict:
    """original=1024x768,crop=0x64,target=1024x768,score=6 -> the table that `ldm.sizes` reads: height before width."""
    found = {}
    for word in text.split(","):
        match = re.fullmatch(r"(original|crop|target)=(\d+)x(\d+)|(score)=(\d+(?:\.\d+)?)", word.strip())
        if match is None:
            raise argparse.ArgumentTypeError(
                f"must read original=WIDTHxHEIGHT,crop=LEFTxTOP,target=WIDTHxHEIGHT or score=NUMBER, not {text!r}"
            )
        if match[4]:
            found["score"] = float(match[5])
        else:
            found[match[1]] = (int(match[3]), int(match[2]))
    return found


def control(text: str) -> dict:
    """KIND[@NET]:PICTURE[:SCALE[:START:END]]"""
    outer = SPEC.fullmatch(text)
    inner = outer and NUMBERS.fullmatch(outer["rest"])
    try:
        tail = inner and re.search(r":[\d.e+-]*$", inner["picture"]) and not inner["picture"].startswith("scene:")
        if inner is None or (tail and not Path(inner["picture"]).exists()):
            raise ValueError
        scale, start, end = (
            float(inner[name] or default) for name, default in (("scale", 1), ("start", 0), ("end", 1))
        )
    except ValueError:
        raise argparse.ArgumentTypeError(
            "must read KIND[@NET]:PICTURE[:SCALE[:START:END]], like canny:photo.png:0.8 or canny:photo.png:0.8:0:0.5 "
            f"(START and END come together), not {text!r}"
        ) from None
    named = {"kind": outer["kind"], "net": outer["net"], "picture": inner["picture"]}
    return named | {"scale": scale, "start": start, "end": end, "text": text}


OPTIONS = (
    "image", "mask", "outpaint", "control", "estimator", "depth", "tile", "enlarge", "refine", "invert", "refiner",
    "hand_over", "refiner_steps",
)  # fmt: skip
ABOUT_THE_FIRST = ("width", "height", "strength", "steps_are", "latents")  # not about the one that is enlarged
FLAGS = ("no_paste", "guess")  # these two lists, and `wishes`, hold what a record needs to open the pictures again


def wishes(args: argparse.Namespace) -> dict:
    """What the command line says of pictures: only what was said."""
    found = {name: getattr(args, name) for name in (*OPTIONS, *FLAGS)}
    return {name: value for name, value in found.items() if value is not None and value is not False and value != []}


def words(wish: dict) -> list[str]:
    """Wishes as words of a command line: so a record keeps them, for `read_words` trusts nothing."""
    found = []
    for name, value in wish.items():
        option = "--" + name.replace("_", "-")
        if name == "control":
            found += [f"{option}={each['text']}" for each in value]
        elif name == "outpaint":
            found.append(f"{option}={','.join(map(str, value))}")
        else:
            found.append(option if value is True else f"{option}={value}")  # "=": a value may begin with "-"
    return found


def read_words(told: list[str], where: str) -> dict:
    """The wishes that `words` wrote. Raises LDMError for anything else."""
    return wishes(read_again(add, told, f"{where} tells of pictures given"))


def models(wish: dict, variant: str | None) -> dict[str, str | None]:
    """The models that a command names beside the one that draws: ControlNets, and a refiner, which is of a variant."""
    nets = {each["net"]: None for each in wish.get("control", ()) if each["net"] is not None}
    return nets | ({wish["refiner"]: variant} if "refiner" in wish else {})


def files(wish: dict) -> list[Path]:
    """The files that a command reads as pictures."""
    named = [wish[name] for name in ("image", "mask", "depth") if name in wish]
    return [Path(name).resolve() for name in (*named, *(each["picture"] for each in wish.get("control", ())))]


def check_wishes(wish: dict, task: str) -> None:
    """Raise LDMError for wishes that contradict each other, or that nothing would come of."""
    said = wish.keys()
    faults = {
        "--mask, --outpaint and --invert are about a picture: name it with --image.": (
            said & {"mask", "outpaint", "invert"} and "image" not in said
        ),
        "--outpaint makes its own mask: leave --mask out, or widen the picture and the mask yourself.": (
            {"outpaint", "mask"} <= said
        ),
        "--enlarge draws over the whole picture, which --mask and --outpaint forbid: do one after the other.": (
            "enlarge" in said and said & {"mask", "outpaint"}
        ),
        "--refine is the strength with which an enlarged picture is drawn over: say --enlarge, too.": (
            "refine" in said and "enlarge" not in said
        ),
        "--invert begins from noise, and a mask keeps a picture: leave one of them out.": (
            "invert" in said and said & {"mask", "outpaint"}
        ),
        "--no-paste is about what a mask keeps: say --mask or --outpaint, or leave it out.": (
            "no_paste" in said and not said & {"mask", "outpaint"}
        ),
        "--guess and --estimator are about ControlNets: say --control, or leave them out.": (
            said & {"guess", "estimator"} and "control" not in said
        ),
        "--estimator tells the depth of photographs: say --control depth@NET:PICTURE, or leave it out.": (
            {"estimator", "control"} <= said and not any(each["kind"] == "depth" for each in wish["control"])
        ),
        "--hand-over and --refiner-steps are about a refiner: say --refiner FOLDER, or leave them out.": (
            said & {"hand_over", "refiner_steps"} and "refiner" not in said
        ),
        "--refiner draws the end of the road, and --enlarge and --invert walk it otherwise: do one after the other.": (
            "refiner" in said and said & {"enlarge", "invert"}
        ),
        f"--enlarge and --invert need a model that draws from words; this one is for {task}.": (
            said & {"enlarge", "invert"} and task != "text"
        ),
    }
    for sentence, holds in faults.items():
        if holds:
            raise LDMError(sentence)


def kind_of(word: str) -> str | None:
    """The kind of condition that a --control speaks of; None for a finished one of no named kind."""
    kind = word.removeprefix(AS_IS).removeprefix("-") if word.startswith(AS_IS) else word
    return kind or None
