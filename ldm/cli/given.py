"""Pictures on the command line, opened: what a run begins from, keeps and is led by, and how a record tells of it."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import save_memory
from ldm.cli.wishes import ABOUT_THE_FIRST, AS_IS, check_wishes, kind_of, words
from ldm.errors import LDMError

if TYPE_CHECKING:
    from PIL import Image

    from ldm.cli.additions import Additions
    from ldm.control import Control
    from ldm.ensemble import Ensemble
    from ldm.models.controlnet import ControlNet
    from ldm.pipeline import Pipeline
    from ldm.settings import Settings


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

        return run_of(settings.steps, self.refine, settings.rule) if "enlarge" in self.wish else 0

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


def open_given(
    wish: dict,
    pipe: "Pipeline",
    model: str,
    memory: dict | None = None,
    reading: dict | None = None,
    additions: "Additions | None" = None,
) -> Given:
    """Open every picture, make the conditions and load the ControlNets. Raises LDMError for what cannot be.

    `memory`: the switches of `ldm.memory`, which hold for a refiner, too. `reading`: how the model was read; a folder's
    variant is the refiner's as well, and pickles are allowed for all. `additions`: what was added to the pipeline.
    """
    from ldm.pictures import extend, read_mask

    given, allow_pickle = Given(wish), "allow_pickle" in (reading or {})
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
        from ldm.checkpoints.places import INDEX, find_model
        from ldm.io.folders import folder_hash
        from ldm.loading import load

        kept = "cpu" if pipe.where is not None else pipe.device
        if pipe.flux:
            raise LDMError("--refiner is SDXL's, which a second model finishes: leave it out for FLUX.")
        dtypes, variant = {"rest": pipe.dtype, "vae": pipe.vae.dtype}, variant_of_others(reading)
        place = find_model(wish["refiner"], INDEX, variant, allow_pickle)
        given.refiner = load(place, dtypes, kept, variant, allow_pickle=allow_pickle)
        if additions is not None:
            additions.put_on_refiner(given.refiner)
        save_memory(given.refiner, memory or {}, pipe.device)
        given.hashes["refiner"] = folder_hash(place)
        given.ensemble(pipe)  # refused now, if they don't go together
    given.led = [open_control(each, wish, pipe, model, allow_pickle) for each in wish.get("control", ())]
    if given.led and memory:  # anew, with the nets beside the UNet
        save_memory(pipe, memory, pipe.device, [each.net for each in given.led])
    return given


def variant_of_others(reading: dict | None) -> str | None:
    """The variant in which a refiner is read: the model's, but for the averaged weights of a single file."""
    variant = (reading or {}).get("variant")
    return None if variant == "ema" else variant


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


def open_control(wish: dict, all_wishes: dict, pipe: "Pipeline", model: str, allow_pickle: bool = False) -> Led:
    """The ControlNet and the picture of one --control. Raises LDMError for an unknown kind, net or picture."""
    from ldm.checkpoints.places import CONFIG, embedded, find_model
    from ldm.conditions import check_kind
    from ldm.io.folders import folder_hash
    from ldm.loading import load_controlnet

    kind, net = kind_of(wish["kind"]), wish["net"]
    if kind is not None:
        check_kind(kind)
    if net is None:
        net = f"{Path(model).name}-{kind}"
        if kind is None or net not in embedded(CONFIG):
            raise LDMError(
                f"No ControlNet for {wish['kind']!r} travels with this model: name one, "
                f"--control {wish['kind']}@FOLDER:{wish['picture']}."
            )
    place = find_model(net, CONFIG, None, allow_pickle)
    loaded = load_controlnet(place, pipe, allow_pickle=allow_pickle)
    picture, finished = source_of(wish["kind"], wish["picture"], all_wishes.get("estimator"))
    net_hash = folder_hash(place)
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
