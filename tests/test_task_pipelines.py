"""Every task equals diffusers' pipeline for it: every latent on the way, and every pixel at its end.

img2img, inpaint (4 and 9 channels), InstructPix2Pix, depth2img and upscale, of diffusers 0.42.1, on tiny models of
drawn parameters (`tiny_tasks.py`); img2img and inpaint on the embedded weights too. In float64 both sides draw their
noise in float32; generators, PIL pictures and everything else are what a user would pass.
"""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image
from reference import assert_close, normal, scheduler_of
from test_pipeline import OF_RATIO, SAMPLERS, ends, equal, generators, landed, same_pixels
from tiny_pairs import MODELS, OTHERS, PROMPT, SCENES, SD, scenes, with_scheduler
from tiny_tasks import NOISE_LEVELS, TASKS, box_mask, noise_of_float32, picture

import ldm
from ldm.scenes import draw

F32, F64 = torch.float32, torch.float64
TIGHT = {F32: 1e-5, F64: 1e-12}  # of the largest number in a latent
LOOSE = {"ddpm": 1e-9}  # REFERENCE_DEFECTS.md, 5
EXTRA = {name: told for name, (_, _, told) in SAMPLERS.items()}
PROMPTS, NEGATIVE = [PROMPT, OTHERS[0]], ["fog", "a dog at dusk"]
GUIDED = {"prompt": PROMPTS, "negative": NEGATIVE, "guidance": 3.0}
PLAIN = {"prompt": PROMPTS, "guidance": 1.0}
THEIRS = {  # our option -> diffusers'
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "image_guidance": "image_guidance_scale",
    "mask": "mask_image",
    "depth": "depth_map",
    "count": "num_images_per_prompt",
}
W, H = 50, 37  # what is drawn is 48 x 32
SMALL = {"width": 48, "height": 32}


def scheduler_like(sampler, family, spacing, n, dtype):
    cls, end, _ = SAMPLERS[sampler]
    return scheduler_of(cls, {**SD, **end, "timestep_spacing": spacing, "prediction_type": family}, n, dtype)


def run_diffusers(pipe, scheduler, n, request):
    """The latents behind every step, in the model's coordinates, and the final pixels (B, H, W, 3) from 0 to 255.

    `request` holds our options, and diffusers' own; of the steps, `run` are taken.
    """
    pipe.scheduler, found = scheduler, []
    request = {THEIRS.get(name, name): value for name, value in request.items() if name not in ("paste", "compat")}
    run = min(int(n * request.get("strength", 1)), n)
    prompts = [request["prompt"]] if isinstance(request["prompt"], str) else request["prompt"]
    known = inspect.signature(type(pipe).__call__).parameters
    if "callback_on_step_end" in known:
        request["callback_on_step_end"] = lambda pipe, i, t, given: found.append(given["latents"]) or {}
    else:
        request |= {"callback": lambda i, t, x: found.append(x), "callback_steps": 1}
    with noise_of_float32(pipe):
        images = pipe(
            **{name: value for name, value in request.items() if name != "timesteps"},
            num_inference_steps=n,
            generator=generators(len(prompts) * request.get("num_images_per_prompt", 1)),
            output_type="np",
        ).images
    found = [found[k] for k in ends(scheduler, run)]
    if type(scheduler).__name__.startswith(OF_RATIO):
        sigmas = landed(scheduler, n)[n - run :]
        found = [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(found, sigmas, strict=True)]
    return found, (images * 255).round()


def run_ours(pipe, n, request):
    """The same of ours, without what is pasted in the end."""
    run = pipe.prepare(**{"seed": 5, "steps": n, "compat": True, "paste": False, **request})
    steps = list(run.steps())
    assert len(steps) == len(run)
    return [step.x for step in steps], np.stack([np.asarray(image) for image in run.finish(steps[-1].x).images])


def check(models, name, way, sampler, spacing, n, dtype, request, tolerance=None):
    """Both runs, compared; returns the largest difference in units of the latent."""
    family = MODELS[TASKS[name][1] if name in TASKS else name][2]
    scheduler, told = scheduler_like(sampler, family, spacing, n, dtype), EXTRA[sampler]
    ours = {key: value for key, value in request.items() if key not in ("height", "width")}
    theirs = run_diffusers(models.reference(name, dtype, way), scheduler, n, {**request, **told})
    found = run_ours(with_scheduler(models.ours(name, dtype), scheduler), n, {**ours, **told})
    worst = equal(found[0], theirs[0], tolerance or LOOSE.get(sampler, TIGHT[dtype]))
    same_pixels(found[1], theirs[1], most=0 if dtype == F64 else 1)
    return worst


every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
TWO = [picture(1, W, H), picture(2, W, H)]
MASK = box_mask(W, H, 10, 5, 37, 30)  # its sides lie within a latent's position
GREY = Image.fromarray(np.random.default_rng(3).integers(100, 156, (H, W), dtype=np.uint8))  # about white's threshold

# ------------------------------------------------------------------------------------ image to image, and inpainting

FROM_PICTURE = [  # sampler, spacing, steps, strength: the steps run are cut, 0.58 of 50 to 28
    ("ddim", "leading", 10, 0.3),
    ("ddim", "leading", 50, 0.58),
    ("ddim", "trailing", 7, 1.0),
    ("ddim eta=0.6", "linspace", 6, 0.8),
    ("ddpm", "leading", 6, 0.8),
    ("euler", "linspace", 7, 0.58),
    ("euler-a", "trailing", 6, 0.8),
    ("dpm++2m", "leading", 10, 0.3),
    ("dpm++2m karras", "leading", 6, 0.8),
    ("dpm++2m-sde", "linspace", 7, 0.58),
    ("dpm++2s", "leading", 6, 0.8),
    ("unipc2", "linspace", 6, 0.8),
    ("deis2", "leading", 6, 0.8),
    ("lms", "leading", 7, 0.8),
]
WITHIN_A_STEP = [("heun", "leading", 6, 0.58), ("dpm2-a", "leading", 3, 0.8)]  # evaluate twice a step
WHOLE = [("plms", "leading", 6, 1.0), ("pndm", "leading", 6, 1.0)]  # begun in the middle: REFERENCE_DEFECTS.md, 9
FEW = [FROM_PICTURE[2], FROM_PICTURE[5], FROM_PICTURE[6], FROM_PICTURE[8], FROM_PICTURE[11]]


@every_model
@pytest.mark.parametrize("case", FROM_PICTURE + WITHIN_A_STEP + WHOLE, ids=str)
def test_image_to_image_equals_diffusers_in_float64(task_models, name, case):
    sampler, spacing, n, strength = case
    request = {**GUIDED, "image": TWO, "strength": strength}
    check(task_models, name, "image to image", sampler, spacing, n, F64, request)


@every_model
@pytest.mark.parametrize("case", FROM_PICTURE, ids=str)
def test_inpainting_by_blending_equals_diffusers_in_float64(task_models, name, case):
    sampler, spacing, n, _ = case
    for strength, mask in ((case[3], MASK), (1.0, [GREY, MASK])) if n < 50 else ((case[3], GREY),):
        request = {**GUIDED, "image": TWO, "mask": mask, "strength": strength, **SMALL}
        check(task_models, name, "blend", sampler, spacing, n, F64, request)


@pytest.mark.parametrize("name", ["inpaint", "inpaint2"])
@pytest.mark.parametrize("case", FROM_PICTURE + WITHIN_A_STEP + WHOLE, ids=str)
def test_inpainting_with_nine_channels_equals_diffusers_in_float64(task_models, name, case):
    sampler, spacing, n, least = case
    for strength in {least, 1.0} if n < 50 else {least}:
        request = {**GUIDED, "image": TWO, "mask": [MASK, GREY], "strength": strength, **SMALL}
        check(task_models, name, None, sampler, spacing, n, F64, request)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_pictures_and_masks_equal_diffusers_to_1e_5_in_float32(task_models, case):
    sampler, spacing, n, strength = case
    request = {**GUIDED, "image": TWO, "strength": strength}
    masked = {**request, "mask": MASK, **SMALL}
    check(task_models, "sd1", "image to image", sampler, spacing, n, F32, request)
    check(task_models, "sd2", "blend", sampler, spacing, n, F32, masked)
    check(task_models, "inpaint", None, sampler, spacing, n, F32, masked)


ONE = {"prompt": PROMPT, "guidance": 3.0}
REQUESTS = {
    "unguided": {**PLAIN, "image": TWO},
    "one picture for two prompts": {**GUIDED, "image": TWO[0]},
    "one picture, drawn twice": {**ONE, "count": 2, "image": TWO[1]},
    "two of each": {**GUIDED, "count": 2, "image": [TWO[0], TWO[0], TWO[1], TWO[1]]},
    "latents": {**GUIDED, "image": normal(4, 2, 4, 4, 6)},
    "a high one": {**ONE, "image": picture(7, 24, 71)},
    "its own size": {**ONE, "image": picture(7, 40, 24)},
}


@pytest.mark.parametrize("what", REQUESTS)
def test_image_to_image_of_every_kind_equals_diffusers(task_models, what):
    request = {**REQUESTS[what], "strength": 0.7}
    check(task_models, "sd2", "image to image", "euler-a", "linspace", 5, F64, request)


@pytest.mark.parametrize("name, way", [("sd1", "blend"), ("inpaint", None)])
@pytest.mark.parametrize("what", ["unguided", "a high one", "its own size"])
def test_inpainting_of_every_kind_equals_diffusers(task_models, name, way, what):
    request = dict(REQUESTS[what])
    size = (request["image"][0] if isinstance(request["image"], list) else request["image"]).size
    drawn = {"width": size[0] // 8 * 8, "height": size[1] // 8 * 8}
    mask = box_mask(*size, 3, 2, 21, 22)
    check(task_models, name, way, "euler-a", "linspace", 5, F64, {**request, "mask": mask, "strength": 0.7, **drawn})


@pytest.mark.parametrize("name, way", [("sd1", "blend"), ("inpaint", None)])
@pytest.mark.parametrize("sampler, spacing", [("ddim", "leading"), ("euler", "linspace"), ("dpm++2m-sde", "leading")])
def test_inpainting_from_given_latents_equals_diffusers(task_models, name, way, sampler, spacing):
    """They replace the first noise, and with four channels the noise on what is kept, too."""
    latents = normal(9, 2, 4, 4, 6, dtype=F64)
    request = {**GUIDED, "image": TWO, "mask": MASK, "strength": 1.0, "latents": latents, **SMALL}
    check(task_models, name, way, sampler, spacing, 5, F64, request)


def test_without_compat_a_mask_of_whole_positions_equals_diffusers_too(task_models):
    """The default takes masks otherwise, and may draw less noise: where neither is felt, nothing differs."""
    scheduler = scheduler_like("ddim", "epsilon", "leading", 10, F64)
    image = [picture(5, 48, 32), picture(6, 48, 32)]
    request = {**GUIDED, "image": image, "mask": box_mask(48, 32, 16, 8, 40, 24), "strength": 0.6}
    for name, way in (("sd1", "blend"), ("inpaint", None)):
        theirs = run_diffusers(task_models.reference(name, F64, way), scheduler, 10, {**request, **SMALL})
        pipe = with_scheduler(task_models.ours(name, F64), scheduler)
        ours = run_ours(pipe, 10, {**request, "compat": False})
        equal(ours[0], theirs[0], TIGHT[F64])
        same_pixels(ours[1], theirs[1])
        # And of a mask that cuts positions, one more of them is drawn anew.
        cut = {**request, "mask": box_mask(48, 32, 15, 8, 40, 24)}
        compat, default = (run_ours(pipe, 10, {**cut, "compat": compat})[0][-1] for compat in (True, False))
        assert (compat - default).abs().max() > 1e-3


# ------------------------------------------------------------------------------------ edit, depth, upscale

ROAD = [  # sampler, spacing, steps
    ("ddim", "leading", 6),
    ("ddim eta=0.6", "trailing", 5),
    ("euler", "linspace", 5),
    ("euler-a", "trailing", 5),
    ("heun", "linspace", 4),
    ("dpm++2m", "leading", 6),
    ("unipc2", "linspace", 5),
    ("plms", "leading", 6),
]
once = pytest.mark.parametrize("case", ROAD[::2], ids=str)


@pytest.mark.parametrize("case", ROAD, ids=str)
def test_editing_equals_diffusers_in_float64(task_models, case):
    request = {**GUIDED, "image": TWO, "image_guidance": 1.6}
    check(task_models, "edit", None, *case, F64, request)


EDITS = {
    "as diffusers' defaults": {"prompt": PROMPT, "image": TWO[0]},
    "much of the picture": {**GUIDED, "guidance": 2.0, "image_guidance": 4.0, "image": TWO},
    "just enough": {**GUIDED, "image_guidance": 1.0, "image": TWO},
    "unguided": {**PLAIN, "image": TWO, "image_guidance": 2.5},
    "one picture for two prompts": {**GUIDED, "image": TWO[0]},
    "drawn twice": {**ONE, "count": 2, "image": TWO[1]},
    "given latents": {**GUIDED, "image": TWO, "latents": normal(9, 2, 4, 4, 6, dtype=F64)},
}


@pytest.mark.parametrize("what", EDITS)
def test_editing_of_every_kind_equals_diffusers(task_models, what):
    check(task_models, "edit", None, "euler-a", "linspace", 4, F64, EDITS[what])


@once
def test_editing_equals_diffusers_to_1e_5_in_float32(task_models, case):
    check(task_models, "edit", None, *case, F32, {**GUIDED, "image": TWO, "image_guidance": 1.6})


def depths(dtype=F32):
    """(2, 4, 6), of whole 256ths from 0 to 1: exact in every dtype, and no size to be changed."""
    found = torch.randint(0, 257, (2, 4, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    found[:, 0, 0], found[:, 1, 1] = 0, 256
    return found / 256


@pytest.mark.parametrize("case", ROAD, ids=str)
def test_depth_to_image_equals_diffusers_in_float64(task_models, case):
    for strength in (1.0,) if case[0] == "plms" else (0.58, 1.0):
        request = {**GUIDED, "image": TWO, "depth": depths(), "strength": strength}
        check(task_models, "depth", None, *case, F64, request)


DEPTHS = {
    "unguided": {**PLAIN, "image": TWO, "depth": depths()},
    "one for two prompts": {**GUIDED, "image": TWO[0], "depth": depths()[:1]},
    "drawn twice": {**ONE, "count": 2, "image": TWO[1], "depth": depths()[1:]},
}


@pytest.mark.parametrize("what", DEPTHS)
def test_depth_to_image_of_every_kind_equals_diffusers(task_models, what):
    request = {**DEPTHS[what], "strength": 0.8}
    check(task_models, "depth", None, "euler-a", "linspace", 5, F64, request)


@once
def test_depth_to_image_equals_diffusers_to_1e_5_in_float32(task_models, case):
    """Depths of any range and size: each picture's own is stretched to -1 ... 1 at the latent's."""
    depth = 40 + 300 * normal(6, 2, 21, 30).cumsum(2)
    request = {**GUIDED, "image": TWO, "depth": depth, "strength": 0.7}
    check(task_models, "depth", None, *case, F32, request)


SMALL_ONES = [picture(1, 12, 8), picture(2, 12, 8)]


@pytest.mark.parametrize("noise_level", [0, 20, NOISE_LEVELS - 1])
@pytest.mark.parametrize("case", [*ROAD[:4], ROAD[5]], ids=str)
def test_upscaling_equals_diffusers_in_float64(task_models, case, noise_level):
    """One evaluation a step: of others this pipeline reports but the last ones of a step."""
    request = {**GUIDED, "image": SMALL_ONES, "noise_level": noise_level}
    check(task_models, "upscale", None, *case, F64, request)


UPSCALES = {
    "as diffusers' defaults": {"prompt": PROMPT, "image": picture(3, 8, 16), "guidance": 9.0},
    "unguided": {**PLAIN, "image": SMALL_ONES},
    "given latents": {**GUIDED, "image": SMALL_ONES, "latents": normal(9, 2, 4, 8, 12, dtype=F64)},
}


@pytest.mark.parametrize("what", UPSCALES)
def test_upscaling_of_every_kind_equals_diffusers(task_models, what):
    check(task_models, "upscale", None, "euler-a", "linspace", 4, F64, {**UPSCALES[what], "noise_level": 20})


@pytest.mark.parametrize("case", ROAD[:4:2], ids=str)
def test_upscaling_equals_diffusers_to_1e_5_in_float32(task_models, case):
    check(task_models, "upscale", None, *case, F32, {**GUIDED, "image": SMALL_ONES, "noise_level": 20})


# ------------------------------------------------------------------------------------ where the reference departs


def test_defect_diffusers_encodes_one_picture_for_all_from_the_first_generator(task_models):
    """Inpainting alone: a picture for two prompts is drawn from the first's noise, so the first's own noise differs.

    Ours draws each picture as if it were alone; diffusers does, too, where the picture is given once for each.
    """
    scheduler = scheduler_like("ddim", "epsilon", "leading", 5, F64)
    for name, way in (("sd1", "blend"), ("inpaint", None)):
        pipe, reference = with_scheduler(task_models.ours(name, F64), scheduler), task_models.reference(name, F64, way)
        request = {**GUIDED, "mask": MASK, "strength": 0.8}
        each = run_diffusers(reference, scheduler, 5, {**request, "image": [TWO[0]] * 2, **SMALL})[0]
        shared = run_diffusers(reference, scheduler, 5, {**request, "image": TWO[0], **SMALL})[0]
        ours = run_ours(pipe, 5, {**request, "image": TWO[0]})[0]
        equal(ours, each, TIGHT[F64])
        equal([x[:1] for x in shared], [x[:1] for x in each], TIGHT[F64])
        assert (shared[-1][1] - each[-1][1]).abs().max() > 0.1 * each[-1].abs().max()


def test_defect_diffusers_forgets_the_picture_where_latents_are_given(task_models):
    """Inpainting below strength 1 then begins from the latents alone, in the middle of the schedule.

    Ours puts them onto the picture, as the noise that they are.
    """
    scheduler, x = scheduler_like("ddim", "epsilon", "leading", 10, F64), normal(9, 2, 4, 4, 6, dtype=F64)
    pipe = with_scheduler(task_models.ours("sd1", F64), scheduler)
    request = {**GUIDED, "image": TWO, "mask": MASK, "strength": 0.5}
    theirs = run_diffusers(
        task_models.reference("sd1", F64, "blend"), scheduler, 10, {**request, "latents": x, **SMALL}
    )[0]
    run = pipe.prepare(**request, steps=10, seed=5, compat=True, latents=x)
    level = run.schedule[5]
    x0 = (run.x - level.sigma * x) / level.alpha
    encoded = pipe.prepare(**{**request, "strength": 0.0}, steps=10, seed=5, compat=True).x
    assert_close(x0, encoded, 1e-12)
    assert (run.x - x).abs().max() > 0.1
    ours = run_ours(pipe, 10, {**request, "latents": x})[0]
    assert (ours[-1] - theirs[-1]).abs().max() > 0.05 * ours[-1].abs().max()


def test_defect_diffusers_drops_all_guidance_where_the_picture_s_is_below_1(task_models):
    """InstructPix2Pix with image_guidance_scale 0.9 runs without any, and the sentence's scale does nothing."""
    scheduler = scheduler_like("ddim", "epsilon", "leading", 5, F64)
    pipe, reference = with_scheduler(task_models.ours("edit", F64), scheduler), task_models.reference("edit", F64)
    request = {**GUIDED, "image": TWO, "image_guidance": 0.9}
    theirs = run_diffusers(reference, scheduler, 5, request)[0]
    equal(run_ours(pipe, 5, {**request, "guidance": 1.0})[0], theirs, TIGHT[F64])
    at_one = run_diffusers(reference, scheduler, 5, {**request, "image_guidance": 1.0})[0]
    ours = run_ours(pipe, 5, request)[0]
    size = ours[-1].abs().max()
    assert (ours[-1] - theirs[-1]).abs().max() > 3 * (ours[-1] - at_one[-1]).abs().max() > 1e-3 * size


@pytest.mark.parametrize("sampler", ["heun", "plms"])
def test_defect_diffusers_blends_within_a_step(task_models, sampler):
    """Of samplers that look ahead, what they see there is blended too; ours blends what a step has led to.

    `test_blending_after_heun_s_steps_equals_a_loop_written_out` has ours.
    """
    scheduler = scheduler_like(sampler, "epsilon", "leading", 6, F64)
    request = {**GUIDED, "image": TWO, "mask": MASK, "strength": 1.0}
    theirs = run_diffusers(task_models.reference("sd1", F64, "blend"), scheduler, 6, {**request, **SMALL})[0]
    ours = run_ours(with_scheduler(task_models.ours("sd1", F64), scheduler), 6, request)[0]
    assert len(ours) == len(theirs) == 6
    assert 0.01 < (ours[-1] - theirs[-1]).abs().max() / ours[-1].abs().max() < 0.3


# ------------------------------------------------------------------------------------ what diffusers has no class for


def heun_written_out(pipe, scheduler, n, strength, image, mask, nine):
    """Heun's method over diffusers' own UNet and VAE, beside a mask (nine channels) or blended after every step."""
    m, first = int(n * strength), n - int(n * strength)
    sigmas = scheduler.sigmas[[0, *range(1, 2 * n - 2, 2), -1]]  # n + 1, each once
    ts = scheduler.timesteps[[0, *range(1, 2 * n - 2, 2)]]
    context = torch.cat([pipe.encode_prompt([text], "cpu", 1, False)[0] for text in NEGATIVE + PROMPTS])
    g = generators(2)

    def drawn(*shape):
        return torch.cat([torch.randn((1, *shape), generator=one) for one in g]).double()

    def encoded(pixels):
        posterior = pipe.vae.encode(pixels).latent_dist
        return pipe.vae.config.scaling_factor * (posterior.mean + posterior.std * drawn(4, 4, 6))

    shown = torch.from_numpy(np.stack([np.asarray(i.resize((48, 32), Image.Resampling.LANCZOS)) for i in image]))
    shown = (2 * (shown.permute(0, 3, 1, 2).float() / 255) - 1).double()
    hole = np.asarray(mask.resize((48, 32), Image.Resampling.LANCZOS)) >= 128
    hole = torch.from_numpy(hole)[None, None].double().expand(2, -1, -1, -1)
    small = hole[:, :, ::8, ::8]
    x0, eps = encoded(shown), drawn(4, 4, 6)
    beside = torch.cat([small, encoded(shown * (1 - hole))], dim=1) if nine else torch.zeros(2, 0, 4, 6)

    def slope(x, k):  # x is x0 + sigma * eps
        told = torch.cat([x / (sigmas[k] ** 2 + 1) ** 0.5, beside], dim=1)
        uncond, cond = pipe.unet(torch.cat([told, told]), ts[k], encoder_hidden_states=context).sample.chunk(2)
        return uncond + 3.0 * (cond - uncond)

    x, found = x0 + sigmas[first] * eps, []
    for k in range(first, first + m):
        d, h = slope(x, k), sigmas[k + 1] - sigmas[k]
        x = x + h * (d if k + 1 == n else (d + slope(x + h * d, k + 1)) / 2)
        if not nine:
            x = small * x + (1 - small) * (x0 + sigmas[k + 1] * eps)
        found.append(x / (sigmas[k + 1] ** 2 + 1) ** 0.5)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name, way", [("inpaint", None), ("sd1", "blend")])
def test_blending_after_heun_s_steps_equals_a_loop_written_out(task_models, name, way):
    """Strength 0.7 with Heun: nine channels (diffusers has it) and a blend after whole steps (diffusers has not)."""
    scheduler, reference = (
        scheduler_of(HeunDiscreteScheduler, {**SD, "timestep_spacing": "leading"}, 7),
        task_models.reference(name, F64, way),
    )
    theirs = heun_written_out(reference, scheduler, 7, 0.7, TWO, MASK, nine=way is None)
    request = {**GUIDED, "image": TWO, "mask": MASK, "strength": 0.7}
    ours = run_ours(with_scheduler(task_models.ours(name, F64), scheduler), 7, request)[0]
    assert len(ours) == 4
    equal(ours, theirs, TIGHT[F64])


# ------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name, task", [("inpaint", "inpaint"), ("inpaint2", "inpaint"), ("edit", "edit"),
                                        ("depth", "depth"), ("upscale", "upscale"), ("sd1", "text")])  # fmt: skip
def test_folders_that_diffusers_wrote_are_loaded_for_their_task(task_models, name, task, capsys):
    folder = task_models.folder(name)
    capsys.readouterr()  # diffusers' progress, where it is written only now
    pipe = ldm.load(folder)
    assert pipe.task == task and capsys.readouterr().err == ""
    index = json.loads((folder / "model_index.json").read_text())
    assert (pipe.low_res is not None) == ("low_res_scheduler" in index) == (task == "upscale")


# ------------------------------------------------------------------------------------ the model that travels with ldm

SEEDS, WORDS = (11, 12), ["a large red house on snow at night", "a small blue fish"]


@pytest.fixture(scope="session")
def scenes_both():
    """Both sides in float64 and in float32: image to image, inpainting, ours."""

    def loaded(dtype):
        found = []
        for cls in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
            pipe = cls.from_pretrained(SCENES, torch_dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            found.append(pipe)
        return *found, ldm.load(SCENES, dtype)

    return {dtype: loaded(dtype) for dtype in (F64, F32)}


def scenes_scheduler(sampler, n, dtype):
    saved = json.loads((SCENES / "scheduler" / "scheduler_config.json").read_text())
    cls, own, told = SAMPLERS[sampler]
    return scheduler_of(cls, {**saved, **own}, n, dtype), told


def shown_scenes():
    return [Image.fromarray(draw(seed)[0].image) for seed in SEEDS]


SCENES_MASK = box_mask(128, 128, 20, 50, 90, 121)


@scenes
@every_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
@pytest.mark.parametrize("sampler", ["ddim", "euler-a", "dpm++2m"])
def test_the_embedded_model_draws_over_scenes_as_diffusers_does(scenes_both, sampler, masked, dtype):
    image_to_image, inpaint, pipe = scenes_both[dtype]
    n, reference = 4, inpaint if masked else image_to_image
    scheduler, told = scenes_scheduler(sampler, n, dtype)
    request = {"prompt": WORDS, "guidance": 3.0, "image": shown_scenes(), "strength": 0.7, **told}
    size = {}
    if masked:
        request["mask"], size = SCENES_MASK, {"width": 128, "height": 128}
    theirs = run_diffusers(reference, scheduler, n, {**request, **size})
    ours = run_ours(with_scheduler(pipe, scheduler), n, request)
    equal(ours[0], theirs[0], {F64: 1e-12, F32: 1e-4}[dtype])
    same_pixels(ours[1], theirs[1], most=0 if dtype == F64 else 1)


@scenes
def test_diffusers_called_as_anyone_would_draws_the_same_over_a_scene(scenes_both):
    """The folder's own scheduler, a picture and a mask, nothing else; and ours by name, without compat."""
    image_to_image, inpaint, pipe = scenes_both[F32]
    for reference in (image_to_image, inpaint):
        reference.scheduler = DDIMScheduler.from_pretrained(SCENES, subfolder="scheduler")
    image, mask = shown_scenes()[0], box_mask(128, 128, 32, 48, 96, 120)
    said = {"num_inference_steps": 10, "strength": 0.6, "guidance_scale": 4.0, "output_type": "pil"}
    drawn = image_to_image(WORDS[0], image=image, generator=generators(1)[0], **said).images[0]
    ours = pipe(WORDS[0], image=image, strength=0.6, steps=10, guidance=4.0, seed=5, sampler="ddim").images[0]
    same_pixels(np.asarray(ours).astype(float).round().astype(np.uint8), np.asarray(drawn).astype(float), most=1)
    drawn = inpaint(WORDS[0], image=image, mask_image=mask, width=128, height=128, generator=generators(1)[0], **said)
    result = pipe(WORDS[0], image=image, mask=mask, strength=0.6, steps=10, guidance=4.0, seed=5, sampler="ddim")
    a, b, was = (np.asarray(i).astype(float) for i in (result.images[0], drawn.images[0], image))
    inside = np.asarray(mask) > 0
    assert np.abs(a - b)[inside].max() <= 1 and np.abs(b - was)[inside].mean() > 5
    assert np.array_equal(a[~inside], was[~inside]), "what the mask keeps is the picture's own, bit for bit"
    assert np.abs(b - was)[~inside].mean() > 0.2, "diffusers returns what the VAE makes of it"
