"""Pictures on the command line: what `ldm generate` begins from, keeps and is led by, and how a record tells of it."""

import argparse
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import Parser, one_of, real, whole
from ldm.errors import LDMError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.control import Control
    from ldm.pipeline import Pipeline
    from ldm.run import Result, Run
    from ldm.sampling import Step
    from ldm.settings import Settings

HELP = """pictures given:
  --image photo.png                   begin from it; --strength says how much of it is drawn over
  --mask mask.png                     draw anew where this is white; every other pixel stays as it is, bit for bit
  --outpaint 0,32,0,32                draw so many pixels more at the left, top, right and bottom of --image
  --control canny:photo.png:0.8       let a ControlNet see the edges of a photograph; may be given several times:
                                      KIND[@NET]:PICTURE[:SCALE[:START:END]]. KIND is made of the picture (canny,
                                      scribble, segmentation, pose, depth@... with --estimator), or is `as-is` for a
                                      picture that is a condition already. NET is a ControlNet's folder or name;
                                      left out, it is the embedded model's own (canny, depth).
  --image scene:7                     instead of a file, anywhere: scene 7 of the embedded model's world
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
    p.add_argument("--explain", metavar="PNG", help="write there what the model is given")


def sides(text: str) -> list[int]:
    words = text.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"must be four numbers of pixels, left,top,right,bottom, not {text!r}")
    return [int(word) for word in words]


def control(text: str) -> dict:
    """KIND[@NET]:PICTURE[:SCALE[:START:END]]"""
    outer = SPEC.fullmatch(text)
    inner = outer and NUMBERS.fullmatch(outer["rest"])
    try:
        if inner is None:
            raise ValueError
        scale, start, end = (
            float(inner[name] or default) for name, default in (("scale", 1), ("start", 0), ("end", 1))
        )
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must read KIND[@NET]:PICTURE[:SCALE[:START:END]], like canny:photo.png:0.8, not {text!r}"
        ) from None
    named = {"kind": outer["kind"], "net": outer["net"], "picture": inner["picture"]}
    return named | {"scale": scale, "start": start, "end": end, "text": text}


OPTIONS = ("image", "mask", "outpaint", "control", "estimator", "depth", "tile", "enlarge", "refine", "invert")
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

    @property
    def refine(self) -> float:
        return self.wish.get("refine", 0.6)

    def record(self) -> dict:
        """What decides the picture: everything but where the pictures lie."""
        said = {name: value for name, value in self.wish.items() if name not in ("image", "mask", "depth", "control")}
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

    def total(self, settings: "Settings") -> int:
        """How many steps are taken for a picture: after an inversion, or before a refinement, all of them."""
        inverted = settings.steps if "invert" in self.wish else 0
        return inverted + settings.steps - settings.first + self.refined(settings)


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
    if "control" in wish:
        controls = [open_control(each, wish, pipe, model) for each in wish["control"]]
        given.options["control"] = [each for each, _ in controls]
        given.hashes["control"] = [told for _, told in controls]
    return given


def sized(given: Given, pipe: "Pipeline", options: dict) -> dict:
    """The options, with the size and strength that the pictures given decide."""
    image = None if "image" not in given.options else [given.options["image"]]
    asked = (options.get(name) for name in ("width", "height", "strength"))
    found = pipe.sizes(image, given.options.get("mask"), given.options.get("control", ()), *asked)
    if "invert" in given.wish:  # that begins from noise
        idle = [name for name in ("strength", "steps_are") if name in options]
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


def open_control(wish: dict, all_wishes: dict, pipe: "Pipeline", model: str) -> "tuple[Control, dict]":
    """One --control: the ControlNet with its condition, and what the record tells of it."""
    from ldm.conditions.checks import check_kind
    from ldm.control import Control
    from ldm.io.folders import folder_hash
    from ldm.loading import embedded, find_model, load_controlnet

    kind, net = wish["kind"], wish["net"]
    if kind != AS_IS:
        check_kind(kind)
    if net is None:
        net = f"{Path(model).name}-{kind}"
        if net not in embedded("config.json"):
            raise LDMError(
                f"There is no ControlNet {net!r} that travels with ldm: name one, "
                f"--control {kind}@FOLDER:{wish['picture']}."
            )
    loaded = load_controlnet(net, pipe)
    picture = condition_of(kind, wish["picture"], all_wishes.get("estimator"))
    control = Control(
        loaded, picture, wish["scale"], wish["start"], wish["end"], all_wishes.get("guess", False),
        None if kind == AS_IS else kind,
    )  # fmt: skip
    told = {name: wish[name] for name in ("kind", "scale", "start", "end")}
    return control, told | {"picture": hash_of(picture), "net": folder_hash(find_model(net, "config.json"))}


def condition_of(
    kind: str, source: str, estimator: str | None = None, low: float | None = None, high: float | None = None
) -> "Image.Image":
    """The condition that a picture is made into; a line on stderr if it looks as if it had been, already."""
    from ldm.conditions import already_processed, prepare
    from ldm.errors import say_on_stderr

    if kind == AS_IS or (kind == "depth" and source.startswith("scene:")):
        return picture_of(source, kind)
    if kind == "depth" and estimator is None:
        raise LDMError(
            "--control depth makes depth of a photograph with --estimator FOLDER; a picture that is depth already is "
            f"--control as-is@NET:{source}."
        )
    made_of = source if kind in ("segmentation", "pose") else picture_of(source)  # once: it may have remarks to make
    for sentence in already_processed(kind, made_of) if kind in ("canny", "scribble") else ():
        say_on_stderr(f"{source}: {sentence}")
    return prepare(kind, made_of, low, high, estimator if kind == "depth" else None)


def draw(pipe: "Pipeline", prompt: str, given: Given, watch: "Callable[[Step | None], None]", **options) -> "Result":
    """Draw with what was given: after an inversion, or refined after enlarging, if that was wished.

    `watch` is called with every step of the drawing, and with None for those of an inversion.
    """
    pictures = dict(given.options)
    if "invert" in given.wish:
        downwards = ("guidance", "sampler", "eta", "negative", "strength")  # of the way back
        same = {name: value for name, value in options.items() if name not in downwards}
        upwards = pipe.prepare_inversion(pictures.pop("image"), given.wish["invert"], **same)
        options["latents"] = watched(upwards, lambda step: watch(None)) / upwards.schedule.start_scale
    run = pipe.prepare(prompt, **pictures, **options)
    x = watched(run, watch)
    if "enlarge" in given.wish:
        large = pipe.enlarge(x, given.wish["enlarge"])
        led = {name: value for name, value in pictures.items() if name in ("control", "tile")}
        options = {name: value for name, value in options.items() if name not in ABOUT_THE_FIRST}
        run = pipe.prepare(prompt, image=large, strength=given.refine, **led, **options)
        x = watched(run, watch)
    return run.finish(x)


def watched(run: "Run", watch: "Callable[[Step | None], None]") -> "Tensor":
    """Take the steps of a run; the last latent, which is the first one where there are none."""
    x = run.x
    for step in run.steps():
        watch(step)
        x = step.x
    return x


def explain(given: Given, settings: "Settings") -> "Image.Image":
    """What the model is given, on a sheet: the picture, what of it is drawn anew, conditions as their nets see them."""
    from PIL import Image, ImageOps

    from ldm.cli.inside import contact_sheet
    from ldm.pictures import fit

    width, height, shown = settings.width, settings.height, []
    image, mask = given.options.get("image"), given.options.get("mask")
    if image is not None:
        scale = "" if image.size == (width, height) else f", of {image.width}x{image.height}"
        shown.append((image, f"image{scale}"))
    if mask is not None:
        red = Image.blend(image, Image.new("RGB", image.size, "red"), 0.6)
        new = mask.point(lambda value: 255 * (value >= 128))
        share = sum(new.histogram()[128:]) / (mask.width * mask.height)
        shown.append((Image.composite(red, image, new), f"red: drawn anew ({share:.0%})"))
    if "depth" in given.options:
        shown.append((given.options["depth"], "depth, near is white"))
    for each in given.options.get("control", ()):
        span = "" if (each.start, each.end) == (0, 1) else f", from {each.start:g} to {each.end:g}"
        shown.append((fit(each.picture, width, height), f"{each.kind or 'condition'}, scale {each.scale:g}{span}"))
    if not shown:
        raise LDMError("--explain shows the pictures that the model is given, and none is.")
    return contact_sheet([(ImageOps.contain(picture, (256, 256)), label) for picture, label in shown])
