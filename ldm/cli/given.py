"""Pictures on the command line: what `ldm generate` begins from, keeps and is led by, and how a record tells of it."""

import argparse
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import Parser, one_of, real, whole
from ldm.errors import LDMError

if TYPE_CHECKING:
    from PIL import Image

    from ldm.control import Control
    from ldm.ensemble import Ensemble
    from ldm.models.controlnet import ControlNet
    from ldm.pipeline import Pipeline
    from ldm.settings import Settings

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
        "(default: 0.8, with a mask 1)",
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
    p.add_argument("--refiner", metavar="FOLDER", help="of SDXL: a second model that draws the last part of the road")
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
    parser = Parser(prog=where, add_help=False)
    add(parser)
    parser.error = lambda message: (_ for _ in ()).throw(LDMError(f"{where} tells of pictures given: {message}."))
    args, unknown = parser.parse_known_args(told)
    if unknown:
        raise LDMError(f"{where} tells of pictures given in words that ldm doesn't know: {unknown[0]!r}.")
    return wishes(args)


@dataclass
class Given:
    """The pictures of a command, opened. `hashes` are of their pixels: what the record knows them by."""

    wish: dict
    options: dict = field(default_factory=dict)  # for `Pipeline.prepare`
    hashes: dict = field(default_factory=dict)
    led: "list[Led]" = field(default_factory=list)
    refiner: "Pipeline | None" = None

    def lead(self, width: int, height: int) -> None:
        """Make the conditions for a drawing of that size."""
        if self.led:
            self.options["control"] = [each.at(width, height) for each in self.led]
            self.hashes["control"] = [
                {name: each.wish[name] for name in ("kind", "scale", "start", "end")}
                | {"picture": hash_of(control.picture), "net": each.net_hash}
                for each, control in zip(self.led, self.options["control"], strict=True)
            ]

    @property
    def refine(self) -> float:
        return self.wish.get("refine", 0.6)

    def record(self) -> dict:
        """What decides the picture: everything but where the pictures lie, and what reads them."""
        places = ("image", "mask", "depth", "control", "estimator", "refiner")
        said = {name: value for name, value in self.wish.items() if name not in places}
        return said | self.hashes

    def words(self) -> list[str]:
        """The words of the command line that name the pictures."""
        return words(self.wish)

    def size(self, settings: "Settings", factor: int) -> tuple[int, int]:
        """Width and height of what is drawn, where a latent stands for `factor` pixels: `Pipeline.enlarge` rounds."""
        sides = (settings.width // factor, settings.height // factor)
        return tuple(factor * max(1, round(self.wish.get("enlarge", 1) * side)) for side in sides)

    def refined(self, settings: "Settings") -> int:
        """How many steps an enlarged picture is refined by."""
        from ldm.settings import run_of

        return run_of(settings.steps, self.refine) if "enlarge" in self.wish else 0

    def total(self, pipe: "Pipeline", settings: "Settings") -> int:
        """How many steps are taken for a picture: after an inversion, or before a refinement, all of them."""
        inverted = settings.steps if "invert" in self.wish else 0
        if self.refiner is not None:
            return self.ensemble(pipe).count(settings, self.refiner_options)
        return inverted + len(settings.rows(pipe.schedule_of(settings))) + self.refined(settings)

    @property
    def refiner_options(self) -> dict:
        """In what the refiner's run differs from the base's."""
        return {"steps": self.wish["refiner_steps"]} if "refiner_steps" in self.wish else {}

    def ensemble(self, pipe: "Pipeline") -> "Ensemble":
        """The model and its refiner."""
        from ldm.ensemble import Ensemble

        return Ensemble(pipe, self.refiner, self.wish.get("hand_over", 0.8))


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


def open_given(wish: dict, pipe: "Pipeline", model: str) -> Given:
    """Open every picture, make the conditions and load the ControlNets. Raises LDMError for what cannot be."""
    from ldm.pictures import extend, read_mask

    given = Given(wish)
    check_wishes(wish, pipe.task)
    if "image" in wish:
        image = picture_of(wish["image"])
        if "outpaint" in wish:
            image, given.options["mask"] = extend(image, *wish["outpaint"])
        given.options["image"] = image
    if "mask" in wish:
        given.options["mask"] = read_mask(wish["mask"], given.options["image"], wish["mask"])
    if "depth" in wish:
        given.options["depth"] = picture_of(wish["depth"], "depth")
    for name in ("image", "mask", "depth"):
        if name in given.options:
            given.hashes[name] = hash_of(given.options[name])
    given.options |= {"tile": wish["tile"]} if "tile" in wish else {}
    given.options |= {"paste": False} if "no_paste" in wish else {}
    if "refiner" in wish:
        from ldm.io.folders import folder_hash
        from ldm.loading import find_model, load

        given.refiner = load(wish["refiner"], {"rest": pipe.dtype, "vae": pipe.vae.dtype}, pipe.device)
        given.hashes["refiner"] = folder_hash(find_model(wish["refiner"]))
        given.ensemble(pipe)  # refused now, if they don't go together
    given.led = [open_control(each, wish, pipe, model) for each in wish.get("control", ())]
    return given


def sized(given: Given, pipe: "Pipeline", options: dict) -> dict:
    """The options, with the size and strength that the pictures given decide."""
    from ldm.tasks import choose_sizes

    image = None if "image" not in given.options else [given.options["image"]]
    asked = (options.get(name) for name in ("width", "height", "strength"))
    led = given.led[0].picture.size if given.led and image is None else None
    found = choose_sizes(pipe.model, image, given.options.get("mask"), led, *asked)
    given.lead(found["width"], found["height"])
    if "invert" in given.wish:  # that begins from noise
        idle = [name for name in ("strength", "steps_are", "eta") if name in options]
        if idle or options.get("sampler", "ddim") != "ddim":
            name = (idle or ["sampler"])[0].replace("_", "-")
            raise LDMError(f"--invert goes all the way up to noise and back by DDIM: leave --{name} out.")
        found |= {"strength": None, "sampler": "ddim"}
    if "enlarge" in given.wish:  # refused now, and not when the small picture is drawn
        named = {name: value for name, value in options.items() if name not in ABOUT_THE_FIRST}
        pipe.settings("", **named, strength=given.refine)
    return options | {name: value for name, value in found.items() if value is not None}


def picture_of(source: str, kind: str = "canny") -> "Image.Image":
    """A picture file, or "scene:SEED": a scene of the world that the embedded model knows, or (depth) its depth."""
    from ldm.io.pictures import as_picture

    match = re.fullmatch(r"scene:(\d+)", source)
    if match is None:
        return as_picture(source)
    from PIL import Image

    from ldm import scenes
    from ldm.conditions import depth_picture

    shown = scenes.render(scenes.sample(int(match[1]), "any"))
    return depth_picture(shown.depth) if kind == "depth" else Image.fromarray(shown.image)


def hash_of(image: "Image.Image") -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Led:
    """One --control, opened: its ControlNet, and the picture that its condition is made of, or that is one already."""

    wish: dict
    net: "ControlNet"
    net_hash: str
    picture: "Image.Image"
    finished: bool
    guess: bool

    def at(self, width: int, height: int) -> "Control":
        """The control of a drawing of that size. Edges are found there: in a larger picture they would be too thin."""
        from ldm.conditions import prepare
        from ldm.control import Control
        from ldm.pictures import fit

        picture, kind = self.picture, kind_of(self.wish["kind"])
        if not self.finished:
            picture = prepare(kind, fit(picture, width, height, "The picture of a ControlNet"))
        return Control(self.net, picture, self.wish["scale"], self.wish["start"], self.wish["end"], self.guess, kind)


def kind_of(word: str) -> str | None:
    """The kind of condition that a --control speaks of; None for a finished one of no named kind."""
    kind = word.removeprefix(AS_IS).removeprefix("-") if word.startswith(AS_IS) else word
    return kind or None


def open_control(wish: dict, all_wishes: dict, pipe: "Pipeline", model: str) -> Led:
    """The ControlNet and the picture of one --control. Raises LDMError for an unknown kind, net or picture."""
    from ldm.conditions import check_kind
    from ldm.io.folders import folder_hash
    from ldm.loading import embedded, find_model, load_controlnet

    kind, net = kind_of(wish["kind"]), wish["net"]
    if kind is not None:
        check_kind(kind)
    if net is None:
        net = f"{Path(model).name}-{kind}"
        if kind is None or net not in embedded("config.json"):
            raise LDMError(
                f"No ControlNet for {wish['kind']!r} travels with this model: name one, "
                f"--control {wish['kind']}@FOLDER:{wish['picture']}."
            )
    loaded = load_controlnet(net, pipe)
    picture, finished = source_of(wish["kind"], wish["picture"], all_wishes.get("estimator"))
    net_hash = folder_hash(find_model(net, "config.json"))
    return Led(wish, loaded, net_hash, picture, finished, all_wishes.get("guess", False))


def source_of(word: str, source: str, estimator: str | None = None) -> "tuple[Image.Image, bool]":
    """The picture that a condition is made of, and whether it is one already; a line on stderr if it only looks so.

    Edges are made later, at the size that is drawn; depth, classes and poses at once.
    """
    from ldm.conditions import already_processed, prepare
    from ldm.errors import say_on_stderr

    kind = kind_of(word)
    if word.startswith(AS_IS) or (kind == "depth" and source.startswith("scene:")):
        return picture_of(source, kind), True
    if kind == "depth" and estimator is None:
        raise LDMError(
            "--control depth makes depth of a photograph with --estimator FOLDER; a picture that is depth already is "
            f"--control as-is-depth:{source}."
        )
    if kind in ("canny", "scribble"):
        picture = picture_of(source)
        for sentence in already_processed(kind, picture):
            say_on_stderr(f"{source}: {sentence} A finished condition is --control as-is-{kind}:{source}.")
        return picture, False
    return prepare(kind, source, estimator=estimator), True
