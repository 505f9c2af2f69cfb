"""Whole pipelines: every latent on the way and the picture at its end, drawn by both sides from the same seeds.

From words, from a picture, and inpainting; and led by a ControlNet. Both take the model's own scheduler file, ours
under `compat`. diffusers is told to draw its noise in float32, as we do: in another dtype it would be other noise.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.control import Control
from ldm.parity import flux
from ldm.parity.compare import DIFFERS, EQUAL, HALF, Line, held, rms, skipped, unfit
from ldm.parity.drawn import widened
from ldm.parity.inputs import NEGATIVE, PROMPTS, Plan, normal
from ldm.parity.schedulers import as_config, ends, to_model
from ldm.parity.sides import Side
from ldm.parity.timing import both
from ldm.pipeline import Pipeline

GUIDANCE, STRENGTH, SEED, LED = 4.0, 0.8, 5, 0.7
# In float32 the network's rounding of 1e-6 is multiplied by guidance, and by every step that follows.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-3}
LEVELS = {torch.float64: 0, torch.float32: 1}  # grey levels of 255
SLACK = 1.5  # in half precision: rounding that is multiplied in that way differs by chance, step by step
TITLES = {"words": "drawn from words", "image": "drawn from a picture", "inpaint": "inpainted"}
# diffusers begins these in the middle otherwise, or blends within their steps (REFERENCE_DEFECTS.md, 9 and 22).
NOT_FROM_PICTURES = (
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
WHOLE = {"text": ("words", "image", "inpaint"), "inpaint": ("inpaint",)}  # by the task of the UNet


def drawn_alike(ours: Side, theirs: Side, plan: Plan) -> Iterator[Line]:
    """A few lines for every way of drawing that the model has."""
    pipe, net = ours.own
    ways = ways_of(pipe)
    if not ways:
        yield skipped("pipelines", f"a model for the task {pipe.task!r} is drawn with by the tests alone")
    for way in ways:
        yield from one(way, ours, theirs, plan, led=False)
    if net is not None and "words" in ways:
        yield from one("words", ours, theirs, plan, led=True)


def ways_of(pipe: Pipeline) -> tuple[str, ...]:
    if pipe.flux:
        return flux.ways_of(pipe.task)
    if pipe.xl and pipe.text_encoder_2 is None:
        return ("image",)  # SDXL's refiner, which diffusers has draw over pictures alone
    return WHOLE.get(pipe.task, ())


def one(way: str, ours: Side, theirs: Side, plan: Plan, led: bool) -> Iterator[Line]:
    """Both draw; in half precision diffusers draws once more in float32, which is then the truth for both."""
    from ldm.parity import reference

    pipe, net = ours.own
    own, note = theirs.own, ""
    cls = own["scheduler"].get("_class_name", "DDIMScheduler")
    if way != "words" and cls in NOT_FROM_PICTURES:
        cls, note = "DDIMScheduler", f"by DDIM: diffusers' {cls} doesn't begin in the middle"
    fields = {"clip_sample": False}
    made = reference.scheduler(own["scheduler"], cls, fields, plan.dtype)
    if pipe.flux and plan.dtype == torch.float64:
        made = reference.in_float32_digits(made, own["scheduler"], cls)
    drawing = Drawing(way, plan, net if led else None)
    pipe = with_config(pipe, as_config(made))

    def mine() -> tuple[list[Tensor], Tensor]:
        return drawing.ours(pipe)

    def other() -> tuple[list[Tensor], Tensor]:
        return drawing.theirs(reference, own, made)

    timed = both(mine, other, plan.device)
    truth = None
    if plan.dtype in HALF:
        with ExitStack() as stack:
            for part in own["parts"].values():
                stack.enter_context(widened(part))
            made = reference.scheduler(own["scheduler"], cls, fields, torch.float32)
            truth = drawing.theirs(reference, own, made)
    station = TITLES[way] if not led else "led by a ControlNet"
    for line in held_pictures(station, timed.ours, timed.theirs, truth, plan):
        yield timed.on(replace(line, note="; ".join(filter(None, (line.note, note)))))


def with_config(pipe: Pipeline, config: Any) -> Pipeline:
    """The same parts on another scheduler's table."""
    pipe = copy.copy(pipe)
    pipe.scheduler = config
    return pipe


class Drawing:
    """One request, as either side is told of it."""

    def __init__(self, way: str, plan: Plan, net: Any):
        self.way, self.plan, self.net = way, plan, net
        size = (plan.width, plan.height)
        # One each: a shared one diffusers' inpainting encodes from the first seed alone (REFERENCE_DEFECTS.md, 19).
        self.pictures = [noisy_picture(3 + k, *size) for k in range(len(PROMPTS))]
        self.seen = noisy_picture(2, *size)
        self.mask = Image.new("L", size, 0)
        self.mask.paste(255, (size[0] // 5, size[1] // 4, size[0] * 3 // 4, size[1] * 4 // 5))

    @property
    def steps(self) -> int:
        return max(self.plan.steps, 2)

    def ours(self, pipe: Pipeline) -> tuple[list[Tensor], Tensor]:
        """Every latent, and the pictures (B, H, W, 3) in grey levels."""
        told = {"negative": NEGATIVE, "guidance": GUIDANCE, "seed": SEED, "steps": self.steps, "compat": True}
        told |= {"sampler": pipe.scheduler.sampler}  # and not the folder's default
        if pipe.flux:
            told |= flux.guided(pipe.distilled, pipe.task, GUIDANCE)[0]
            told |= {"max_sequence_length": min(flux.TOKENS, pipe.most_tokens)}
            told |= {} if pipe.task == "text" else {"negative": None}
        if self.way != "words":
            told |= {"image": self.pictures}
        if self.strength(pipe.task) is not None:
            told |= {"strength": STRENGTH}
        if self.way == "inpaint":
            told |= {"mask": self.mask, "paste": False}
        if self.way == "words":
            told |= {"width": self.plan.width, "height": self.plan.height}
        if self.net is not None:
            told["control"] = [Control(self.net, self.seen, scale=LED)]
        run = pipe.prepare(PROMPTS, **told)
        found = [step.x for step in run.steps()]
        images = run.finish(found[-1]).images
        return found, torch.from_numpy(np.stack([np.asarray(image) for image in images]))

    def strength(self, task: str) -> float | None:
        """Of a way that begins from a picture."""
        return None if self.way == "words" or task == "control" else STRENGTH

    def theirs(self, reference: Any, own: dict, made: Any) -> tuple[list[Tensor], Tensor]:
        told = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "guidance_scale": GUIDANCE}
        task = own.get("task", "text")
        if "task" in own:
            told |= self.told_flux(own)
            told = told if task == "text" else {k: v for k, v in told.items() if not k.startswith("negative")}
        if self.way != "words":
            told |= {"control_image" if task == "control" else "image": self.pictures}
        if self.strength(task) is not None:
            told |= {"strength": STRENGTH}
        if self.way == "inpaint":
            told["mask_image"] = self.mask
        if self.way != "image" or "task" in own:
            told |= {"width": self.plan.width, "height": self.plan.height}
        if self.net is not None:
            told |= {"image": self.seen, "controlnet_conditioning_scale": LED}
        pipe = reference.pipeline(own, self.way, made, led=self.net is not None)
        generators = [torch.Generator().manual_seed(SEED + k) for k in range(len(PROMPTS))]
        dtype = own["parts"]["transformer" if "task" in own else "unet"].dtype
        found, images = reference.run(pipe, self.steps, told, generators, dtype)
        if "task" in own:
            return flux.unpacked(found, self.plan.width, self.plan.height, pipe.vae_scale_factor), images
        n = self.steps if self.way == "words" else int(self.steps * STRENGTH)
        found = [found[k] for k in ends(made, n)]
        return to_model(made, found, self.steps), images

    def told_flux(self, own: dict) -> dict:
        """Guidance, and how many tokens; a FLUX without T5 is given its vectors, for diffusers knows no such thing."""
        parts, device = own["parts"], self.plan.device
        told = flux.guided(parts["transformer"].config.guidance_embeds, own["task"], GUIDANCE)[1]
        if "text_encoder_2" in parts:
            return told | {"max_sequence_length": flux.TOKENS}
        tokenizer = own["tokenizers"]["tokenizer"]
        read = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        for prefix, prompts in (("", PROMPTS), ("negative_", NEGATIVE)):
            ids = tokenizer(prompts, **read).input_ids.to(device)
            told |= flux.embedded(parts["text_encoder"], ids, flux.TOKENS, prefix)
        return told | {"prompt": None, "negative_prompt": None}


def noisy_picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured noise, so that every pixel counts."""
    levels = (normal(seed, height, width, 3).sigmoid() * 255).round().byte()
    return Image.fromarray(levels.numpy())


def held_pictures(
    station: str, ours: tuple, theirs: tuple, truth: tuple | None, plan: Plan
) -> Iterator[Line]:  # fmt: skip
    """A line for the latents of all steps, and one for the pictures."""
    what = f"{len(theirs[0])} latent{'s' * (len(theirs[0]) > 1)} on the way"
    if len(ours[0]) != len(theirs[0]):
        yield Line(station, what, DIFFERS, note=f"ours took {len(ours[0])} steps")
        return
    a, b = torch.stack(ours[0]), torch.stack(theirs[0])
    if truth is not None:
        b = b.to(a.dtype)  # some of diffusers' schedulers answer half precision in float32
        yield held(station, what, a, b, truth=torch.stack(truth[0]), slack=SLACK)
    else:
        yield held(station, what, a, b, ALLOWED[plan.dtype])
    yield held_levels(station, ours[1], theirs[1], None if truth is None else truth[1], plan)


def held_levels(station: str, ours: Tensor, theirs: Tensor, truth: Tensor | None, plan: Plan) -> Line:
    """Pixels in grey levels; in half precision our distance from the truth and theirs."""
    line = Line(station, "pictures, in grey levels", EQUAL)
    if ours.shape != theirs.shape:
        return replace(line, verdict=DIFFERS, note=f"{tuple(ours.shape)}, the reference's {tuple(theirs.shape)}")
    if why := unfit(theirs):
        return replace(line, verdict="refused", note=why)
    off = (ours.double() - theirs.double()).abs().max().item()
    if truth is None:
        most = LEVELS[plan.dtype]
        return replace(line, verdict=EQUAL if off <= most else DIFFERS, difference=off, relative=off / 255,
                       allowed=most / 255)  # fmt: skip
    mine, other = rms(ours, truth), rms(theirs, truth)
    bound = max(SLACK * other, 1 / 255)
    return replace(line, verdict=EQUAL if mine <= bound else DIFFERS, difference=off, relative=mine, allowed=bound,
                   note=f"rms error against float32; theirs {other:.2e}")  # fmt: skip
