"""Drawing what a command line asks for, stage after stage; and a sheet that explains what the model is given."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.cli.given import Given
from ldm.cli.wishes import ABOUT_THE_FIRST
from ldm.errors import LDMError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.pipeline import Pipeline
    from ldm.run import Result
    from ldm.sampling import Step
    from ldm.settings import Settings


def draw(pipe: "Pipeline", prompt: str, given: Given, watch: "Callable[[Step | None], None]", **options) -> "Result":
    """Draw with what was given: after an inversion, or refined after enlarging, if that was wished.

    `watch` is called with every step of the drawing, and with None for those of an inversion.
    """
    pictures = dict(given.options)
    if "invert" in given.wish:
        downwards = ("guidance", "sampler", "eta", "negative", "strength")  # of the way back
        same = {name: value for name, value in options.items() if name not in downwards}
        upwards = pipe.prepare_inversion(pictures.pop("image"), given.wish["invert"], **same)
        noise = watched(upwards.steps(), lambda step: watch(None), upwards.x)
        options["latents"] = noise / upwards.schedule.start_scale
    if given.refiner is not None:
        two = given.ensemble(pipe)
        run = two.prepare(prompt, **pictures, **options)
        return run.finish(watched(two.walk(run, options, given.refiner_options), watch, run.x))
    run = pipe.prepare(prompt, **pictures, **options)
    x = watched(run.steps(), watch, run.x)
    if "enlarge" in given.wish:
        large = pipe.enlarge(x, given.wish["enlarge"])
        led = {"tile": pictures["tile"]} if "tile" in pictures else {}
        height, width = (pipe.vae.config.factor * side for side in large.shape[2:])
        led["control"] = [each.at(width, height) for each in given.led]
        options = {name: value for name, value in options.items() if name not in ABOUT_THE_FIRST}
        options |= sizes_of_larger(options, (run.settings.height, run.settings.width))
        run = pipe.prepare(prompt, image=large, strength=given.refine, **led, **options)
        x = watched(run.steps(), watch, run.x)
    return run.finish(x)


def sizes_of_larger(options: dict, drawn: tuple[int, int]) -> dict:
    """What SDXL is told of sizes when a picture of the size `drawn` is refined larger: what was as it goes with it."""
    from ldm.sizes import Sizes

    found = {name: Sizes.read(options[name]) for name in ("sizes", "negative_sizes") if options.get(name) is not None}
    return {
        name: replace(each, **{side: None for side in ("original", "target") if getattr(each, side) == drawn})
        for name, each in found.items()
    }


def watched(steps: "Iterator[Step]", watch: "Callable[[Step | None], None]", x: "Tensor") -> "Tensor":
    """Take the steps; the last latent, which is the first one, `x`, where there are none."""
    for step in steps:
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
