"""Pictures led by ControlNets equal diffusers' ControlNet pipelines, every latent on the way.

From words, from a picture, and inpainting with 4 and 9 channels; one net and two, guess mode, scales, intervals; of
diffusers 0.42.1, on tiny models of drawn parameters, zero convolutions too, and on the embedded weights. In float64
both sides draw their noise in float32; generators and PIL pictures are what a user would pass.
What diffusers lacks is compared with loops written out here.
"""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from diffusers.models import MultiControlNetModel
from reference import assert_close, normal
from test_pipeline import OF_RATIO, SAMPLERS, equal, generators, landed, quiet, same_pixels, scheduler_like
from tiny_pairs import MODELS, OTHERS, PROMPT, SCENES, controlnets, scenes
from tiny_tasks import TaskModels, box_mask, noise_of_float32, picture, with_scheduler

import ldm
from ldm.control import Control
from ldm.io.folders import write_json
from ldm.io.weights import save_weights
from ldm.models.controlnet import ControlNet

F32, F64 = torch.float32, torch.float64
TIGHT = {F32: 1e-5, F64: 1e-11}  # of the largest number in a latent
W, H = 50, 37  # what is drawn is 48 x 32
SIZE = {"width": 48, "height": 32}
PROMPTS, NEGATIVE = [PROMPT, OTHERS[0]], ["fog", "a dog at dusk"]
FOUR = {"prompt": PROMPTS, "negative": NEGATIVE, "count": 2, "guidance": 4.0}  # two prompts, two pictures of each
TWO = {"prompt": PROMPTS, "negative": NEGATIVE, "guidance": 4.0}
PLAIN = {"prompt": PROMPTS, "guidance": 1.0}
CLASSES = {
    "words": StableDiffusionControlNetPipeline,
    "image": StableDiffusionControlNetImg2ImgPipeline,
    "inpaint": StableDiffusionControlNetInpaintPipeline,
}
EDGES = [picture(31, W, H), picture(32, W, H)]
MASKS = [box_mask(W, H, 10, 5, 37, 30), box_mask(W, H, 3, 13, 29, 27)]  # their sides lie within a latent's position
PICTURES = [picture(41, W, H), picture(42, W, H)]
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="session")
def task_models(tmp_path_factory, models):
    return TaskModels(tmp_path_factory.mktemp("tasks"), models)


# What leads: for each net (its number, its options); of two, the second sees the second picture.
LED = {
    "one": [(4, {})],
    "half": [(4, {"scale": 0.5})],
    "more": [(4, {"scale": 1.5})],
    "against": [(4, {"scale": -0.7})],
    "within": [(4, {"start": 0.2, "end": 0.7})],
    "late": [(5, {"scale": 0.8, "start": 0.5})],
    "guess": [(4, {"guess": True})],
    "guess within": [(4, {"guess": True, "scale": 1.3, "end": 0.6})],
    "pooled": [(6, {})],
    "two": [(4, {"scale": 0.6, "end": 0.7}), (5, {"scale": 1.2, "start": 0.2})],
    "two alike": [(4, {"scale": 0.6}), (4, {"scale": 0.4})],
    "two guess": [(4, {"guess": True, "scale": 0.9}), (5, {"guess": True, "start": 0.3})],
}
FIELDS = {6: {"global_pool_conditions": True}}


def led_by(models, name, led, dtype, pictures=EDGES):
    """Our controls, and what diffusers' pipeline is told of the same."""
    pairs = [controlnets(models, name, seed, dtype, **FIELDS.get(seed, {})) for seed, _ in LED[led]]
    ours = [
        Control(net, each, **options)
        for (_, net), (_, options), each in zip(pairs, LED[led], pictures, strict=False)
    ]
    told = {
        "controlnet_conditioning_scale": [each.scale for each in ours],
        "control_guidance_start": [each.start for each in ours],
        "control_guidance_end": [each.end for each in ours],
    }
    if len(ours) == 1:
        told = {key: value for key, (value,) in told.items()}
    nets = [reference for reference, _ in pairs]
    seen = list(pictures[: len(ours)]) if len(ours) > 1 else pictures[0]
    return ours, (MultiControlNetModel(nets) if len(nets) > 1 else nets[0]), seen, told | {"guess_mode": ours[0].guess}


def run_diffusers(base, way, controlnet, seen, told, scheduler, n, request):
    """The latents behind every step, in the model's coordinates; `request` holds our options."""
    cls = CLASSES[way]
    parts = {key: part for key, part in base.components.items() if key in inspect.signature(cls).parameters}
    pipe = cls(**{**parts, "scheduler": scheduler, "controlnet": controlnet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    names = {"negative": "negative_prompt", "guidance": "guidance_scale", "count": "num_images_per_prompt"}
    request = {names.get(key, key): value for key, value in request.items()}
    request["image" if way == "words" else "control_image"] = seen
    if "mask" in request:
        request["mask_image"] = request.pop("mask")
    found, count = [], len(request["prompt"]) * request.get("num_images_per_prompt", 1)
    with noise_of_float32(pipe):
        last = pipe(
            **{**SIZE, **request, **told},
            num_inference_steps=n,
            generator=generators(count),
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, tensors: found.append(tensors["latents"]) or {},
        ).images
    assert torch.equal(found[-1], last)
    if type(scheduler).__name__.startswith(OF_RATIO):
        sigmas = landed(scheduler, n)[-len(found) :]
        found = [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(found, sigmas, strict=True)]
    return found


def run_ours(pipe, n, request):
    return [step.x for step in pipe.steps(**{"seed": 5, "steps": n, "compat": True, **request})]


def check(models, name, way, led, sampler, n, dtype, request, spacing="leading", base=None, pipe=None, tolerance=None):
    """Both runs compared, and ours with one that no ControlNet leads; returns the largest difference."""
    scheduler, extra = scheduler_like(sampler, name, spacing, n, dtype)
    ours, controlnet, seen, told = led_by(models, name, led, dtype)
    base = models.reference(name, dtype) if base is None else base
    if dtype == F64:
        with quiet():  # guess mode's scales are of the default dtype
            theirs = run_diffusers(base, way, controlnet, seen, told, scheduler, n, {**request, **extra})
    else:
        theirs = run_diffusers(base, way, controlnet, seen, told, scheduler, n, {**request, **extra})
    pipe = with_scheduler(models.ours(name, dtype) if pipe is None else pipe, scheduler)
    found = run_ours(pipe, n, {**request, **extra, "control": ours})
    worst = equal(found, theirs, tolerance or TIGHT[dtype])
    without = run_ours(pipe, n, {**SIZE, **request, **extra})
    assert (found[-1] - without[-1]).abs().max() > 1e-3 * found[-1].abs().max(), "the ControlNet changed nothing"
    print(f"{name} {way} {led} {sampler} {dtype}: {worst:.1e}")
    return worst


# ------------------------------------------------------------------------------------------------- from words


@every_model
@pytest.mark.parametrize("led", LED)
def test_every_way_of_leading_equals_diffusers_in_float64(models, name, led):
    check(models, name, "words", led, "ddim", 5, F64, FOUR)


@every_model
@pytest.mark.parametrize("sampler", ["ddim eta=0.6", "ddpm", "euler", "euler-a", "dpm++2m", "unipc2"])
def test_samplers_led_by_two_nets_equal_diffusers_in_float64(models, name, sampler):
    tolerance = 1e-9 if sampler == "ddpm" else None  # REFERENCE_DEFECTS.md, 5
    check(models, name, "words", "two", sampler, 6, F64, TWO, "trailing", tolerance=tolerance)


@every_model
@pytest.mark.parametrize("led", ["one", "guess", "two guess", "pooled"])
def test_without_guidance_equal_diffusers_in_float64(models, name, led):
    check(models, name, "words", led, "dpm++2m", 4, F64, PLAIN)


@every_model
@pytest.mark.parametrize("led, sampler", [("one", "ddim"), ("two", "euler"), ("guess", "dpm++2m"), ("within", "unipc2")])
def test_in_float32_equal_diffusers(models, name, led, sampler):
    check(models, name, "words", led, sampler, 4, F32, {**FOUR, "guidance": 2.0})


def test_a_picture_for_each_prompt_equals_diffusers_in_float64(models):
    """diffusers takes one a prompt and repeats it; ours one a picture drawn."""
    scheduler, _ = scheduler_like("ddim", "sd1", "leading", 4, F64)
    reference, net = controlnets(models, "sd1", 4, F64)
    with quiet():
        theirs = run_diffusers(models.reference("sd1", F64), "words", reference, EDGES, {}, scheduler, 4, FOUR)
    control = [Control(net, [EDGES[0], EDGES[0], EDGES[1], EDGES[1]])]
    pipe = with_scheduler(models.ours("sd1", F64), scheduler)
    equal(run_ours(pipe, 4, {**FOUR, "control": control}), theirs, 1e-11)


# ------------------------------------------------------------------------------------------------- from pictures

FROM_PICTURE = [("ddim", "one"), ("ddim", "two"), ("euler", "guess"), ("euler-a", "one"), ("dpm++2m", "within")]
FROM_PICTURE += [("unipc2", "two guess"), ("ddim eta=0.6", "half"), ("ddim", "pooled")]


@every_model
@pytest.mark.parametrize("sampler, led", FROM_PICTURE)
def test_image_to_image_equals_diffusers_in_float64(models, name, sampler, led):
    check(models, name, "image", led, sampler, 6, F64, {**TWO, "image": PICTURES, "strength": 0.6})


@pytest.mark.parametrize("led", ["one", "two"])
def test_image_to_image_in_float32_equals_diffusers(models, led):
    """One picture for two prompts, each with noise of its own."""
    check(models, "sd1", "image", led, "dpm++2m", 5, F32, {**TWO, "image": PICTURES[0], "strength": 0.6, "guidance": 2.0})


INPAINT = [("ddim", "one", 1.0), ("ddim", "two", 0.6), ("euler", "within", 0.6), ("euler-a", "guess", 1.0)]
INPAINT += [("dpm++2m", "one", 0.6), ("unipc2", "two guess", 0.6)]


@every_model
@pytest.mark.parametrize("sampler, led, strength", INPAINT)
def test_inpainting_by_blending_equals_diffusers_in_float64(models, name, sampler, led, strength):
    """Masks whose sides lie within a latent's position: `compat` takes them to the latent as diffusers does."""
    request = {**TWO, "image": PICTURES, "mask": MASKS, "strength": strength}
    check(models, name, "inpaint", led, sampler, 5, F64, request)


@pytest.mark.parametrize("name, family", [("inpaint", "sd1"), ("inpaint2", "sd2")])
@pytest.mark.parametrize("sampler, led, strength", [INPAINT[0], INPAINT[1], INPAINT[4], ("euler", "guess", 1.0)])
def test_inpainting_with_nine_channels_equals_diffusers_in_float64(
    task_models, models, name, family, sampler, led, strength
):
    """What the UNet reads beside the latent, the ControlNet of the plain model doesn't."""
    request = {**TWO, "image": PICTURES, "mask": MASKS, "strength": strength}
    base, pipe = task_models.reference(name, F64), task_models.ours(name, F64)
    assert pipe.unet.config.in_channels == 9
    check(models, family, "inpaint", led, sampler, 5, F64, request, base=base, pipe=pipe)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_inpainting_in_float32_equals_diffusers(models, guidance):
    request = {**TWO, "image": PICTURES, "mask": MASKS[0], "strength": 0.8, "guidance": guidance}
    if guidance == 1:
        del request["negative"]
    check(models, "sd1", "inpaint", "two", "ddim", 5, F32, request)
