"""Pictures led by ControlNets equal diffusers' ControlNet pipelines, every latent on the way.

From words, from a picture, and inpainting with 4 and 9 channels; one net and two, guess mode, scales, intervals; of
diffusers 0.42.1, on tiny models of drawn parameters, zero convolutions too, and on the embedded weights. In float64
both sides draw their noise in float32; generators and PIL pictures are what a user would pass.
What diffusers lacks is compared with loops written out here.
"""

import inspect
from functools import cache

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
from PIL import Image
from reference import assert_close, normal
from test_pipeline import OF_RATIO, ends, equal, generators, landed, quiet, scenes_scheduler, scheduler_like
from tiny_pairs import MODELS, OTHERS, PROMPT, SCENES, controlnets, scenes, with_scheduler
from tiny_tasks import box_mask, noise_of_float32, picture

import ldm
from ldm.control import Control
from ldm.io.folders import write_json
from ldm.io.weights import save_weights
from ldm.models.controlnet import ControlNet
from ldm.scenes import render, sample

F32, F64 = torch.float32, torch.float64
TIGHT = {F32: 1e-5, F64: 1e-12}  # of the largest number in a latent; seen: 7e-7 and 8e-15
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
    "two guess throughout": [(4, {"guess": True, "scale": 0.9}), (5, {"guess": True})],
    "two guess": [(4, {"guess": True, "scale": 0.9}), (5, {"guess": True, "start": 0.3})],
}
FIELDS = {6: {"global_pool_conditions": True}}


def led_by(models, name, led, dtype, pictures=EDGES):
    """Our controls, and what diffusers' pipeline is told of the same."""
    pairs = [controlnets(models, name, seed, dtype, **FIELDS.get(seed, {})) for seed, _ in LED[led]]
    ours = [
        Control(net, each, **options) for (_, net), (_, options), each in zip(pairs, LED[led], pictures, strict=False)
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
    found = [found[k] for k in ends(scheduler, min(int(n * request.get("strength", 1)), n))]
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
    return worst


# ------------------------------------------------------------------------------------------------- from words


@every_model
@pytest.mark.parametrize("led", LED)
def test_every_way_of_leading_equals_diffusers_in_float64(models, name, led):
    check(models, name, "words", led, "ddim", 5, F64, FOUR)


@every_model
@pytest.mark.parametrize("sampler", ["ddim eta=0.6", "ddpm", "euler", "euler-a", "dpm++2m", "unipc2", "plms"])
def test_samplers_led_by_two_nets_equal_diffusers_in_float64(models, name, sampler):
    tolerance = 1e-9 if sampler == "ddpm" else None  # REFERENCE_DEFECTS.md, 5
    led = "two alike" if sampler == "plms" else "two"  # its first step counts twice in diffusers' intervals
    check(models, name, "words", led, sampler, 6, F64, TWO, "trailing", tolerance=tolerance)


@pytest.mark.parametrize("sampler, led", [("heun", "two alike"), ("heun", "guess"), ("dpm2", "two guess throughout")])
def test_samplers_that_ask_twice_a_step_equal_diffusers_in_float64(models, sampler, led):
    check(models, "sd1", "words", led, sampler, 4, F64, TWO)


@every_model
@pytest.mark.parametrize("led", ["one", "guess", "two guess", "pooled"])
def test_without_guidance_equal_diffusers_in_float64(models, name, led):
    check(models, name, "words", led, "dpm++2m", 4, F64, PLAIN)


@every_model
@pytest.mark.parametrize(
    "led, sampler", [("one", "ddim"), ("two", "euler"), ("guess", "dpm++2m"), ("within", "unipc2")]
)
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
    check(
        models, "sd1", "image", led, "dpm++2m", 5, F32, {**TWO, "image": PICTURES[0], "strength": 0.6, "guidance": 2.0}
    )


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


# ------------------------------------------------------------------------------------- the model that travels with ldm


@pytest.fixture(scope="session")
def scenes_net(tmp_path_factory):
    """The folder of a ControlNet of ours, made of the embedded UNet, its zero convolutions drawn: small numbers."""
    folder = tmp_path_factory.mktemp("scenes-net")
    net = ControlNet.from_unet(ldm.load(SCENES).unet)
    zeros = [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]
    with torch.no_grad():
        for k, conv in enumerate(zeros):
            assert not conv.weight.any() and not conv.bias.any()
            conv.weight.copy_(0.3 * normal(100 + k, *conv.weight.shape) / conv.weight[0].numel() ** 0.5)
            conv.bias.copy_(0.02 * normal(200 + k, *conv.bias.shape))
    write_json(folder / "config.json", net.config.to_json())
    save_weights(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


@cache
def both_scenes(dtype):
    return ldm.load(SCENES, dtype), StableDiffusionPipeline.from_pretrained(SCENES, torch_dtype=dtype)


@scenes
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("way", CLASSES)
def test_led_pictures_of_the_embedded_model_equal_diffusers(scenes_net, way, dtype):
    pipe, reference = both_scenes(dtype)
    controlnet = ControlNetModel.from_pretrained(scenes_net, torch_dtype=dtype)
    net = ldm.load_controlnet(scenes_net, pipe)
    scheduler, _ = scenes_scheduler("ddim", "leading", 5, dtype)
    pipe = with_scheduler(pipe, scheduler)
    words = ["a large red house on snow at night", "a small blue fish left of a tree, oil painting"]
    request = {"prompt": words, "negative": ["fog", ""], "guidance": 4.0, "width": 80, "height": 48}
    seen = picture(33, 80, 48)
    if way != "words":
        request |= {"image": [draw(seed, 80, 48) for seed in (7, 8)], "strength": 0.6}
    if way == "inpaint":
        request["mask"] = box_mask(80, 48, 21, 10, 63, 37)
    told = {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.8}
    with quiet():
        theirs = run_diffusers(reference, way, controlnet, seen, told, scheduler, 5, request)
    control = Control(net, seen, scale=0.8, end=0.8)
    found = run_ours(pipe, 5, {**request, "control": control})
    equal(found, theirs, {F64: 1e-11, F32: 3e-5}[dtype])
    without = run_ours(pipe, 5, request)
    assert (found[-1] - without[-1]).abs().mean() > 0.02 * found[-1].abs().mean()


def draw(seed, width, height):
    """A picture of the world that the embedded model knows."""
    return Image.fromarray(render(sample(seed)).image).resize((width, height))


# ------------------------------------------------------------------------------------- where diffusers departs


def test_defect_a_pooling_net_goes_with_no_other(models):
    """diffusers adds what pools to what doesn't in place: the other way round the shapes don't fit.

    It asks the first net alone whether it pools: a later one is run on both halves of guidance. Ours asks each, and
    the order changes nothing.
    """
    pooled, plain = (controlnets(models, "sd1", seed, F64, **FIELDS.get(seed, {})) for seed in (6, 4))
    scheduler, _ = scheduler_like("ddim", "sd1", "leading", 4, F64)
    pipe = with_scheduler(models.ours("sd1", F64), scheduler)

    def theirs(nets, pictures, guess=False):
        told = {"controlnet_conditioning_scale": [1.0, 1.0], "guess_mode": guess}
        nets, base = MultiControlNetModel(nets), models.reference("sd1", F64)
        with quiet():
            return run_diffusers(base, "words", nets, pictures, told, scheduler, 4, TWO)

    def ours(**options):
        control = [Control(plain[1], EDGES[1], **options), Control(pooled[1], EDGES[0])]
        there, back = (run_ours(pipe, 4, {**TWO, "control": c}) for c in (control, control[::-1]))
        equal(there, back, 1e-12)
        return there

    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        theirs([pooled[0], plain[0]], EDGES)
    nets = [plain[0], pooled[0]]
    equal(ours(guess=True), theirs(nets, EDGES[::-1], guess=True), 1e-12)  # told to, it leaves the other half alone
    method, found = ours()[-1], theirs(nets, EDGES[::-1])[-1]
    assert (found - method).abs().max() > 0.05 * method.abs().max()


def test_defect_intervals_count_evaluations_instead_of_steps(models):
    """Heun asks twice at a level: diffusers' interval can end between the two. Ours goes by the level."""
    reference, net = controlnets(models, "sd1", 4, F64)
    scheduler, _ = scheduler_like("heun", "sd1", "leading", 4, F64)
    ran = {"theirs": [], "ours": []}
    hooks = [
        reference.register_forward_pre_hook(
            lambda m, args, kw: ran["theirs"].append((args[1].item(), kw["conditioning_scale"])), with_kwargs=True
        ),
        net.register_forward_pre_hook(lambda m, args: ran["ours"].append(float(args[1]))),
    ]
    try:
        with quiet():
            told = {"control_guidance_end": 0.6}
            run_diffusers(models.reference("sd1", F64), "words", reference, EDGES[0], told, scheduler, 4, TWO)
        pipe = with_scheduler(models.ours("sd1", F64), scheduler)
        run = pipe.prepare(**TWO, seed=5, steps=4, compat=True, control=Control(net, EDGES[0], end=0.6))
        list(run.steps())
    finally:
        for hook in hooks:
            hook.remove()
    t = [level.t for level in run.schedule.levels]
    assert len(ran["theirs"]) == 7  # outside the interval the net is run as well, for nothing
    assert [time for time, scale in ran["theirs"] if scale] == [t[0], t[1], t[1], t[2]]  # of t[2] once of twice
    assert ran["ours"] == [t[0], t[1], t[1]]


# ------------------------------------------------------------------------------------- what diffusers has no class for


def encoded(base, request):
    """The reference's own (uncond, cond)."""
    cond, uncond = base.encode_prompt(request["prompt"], "cpu", 1, True, request["negative"])
    return uncond, cond


def seen_by(net, picture):
    """A picture as the reference's ControlNet takes it."""
    pixels = np.asarray(picture.resize((SIZE["width"], SIZE["height"]), Image.Resampling.LANCZOS))
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255).to(net.dtype)


def residuals_of(plain, guess, x, t, contexts, edges, scales):
    """Of a net that all parts see and of one that the last part alone sees, in guess mode: the sum."""
    n, size = len(contexts), len(x)
    *skips, middle = (
        *(out := plain(torch.cat([x] * n), t, torch.cat(contexts), edges[0].expand(n * size, -1, -1, -1), scales[0],
                       return_dict=False))[0], out[1],
    )  # fmt: skip
    if guess is not None:
        out = guess(
            x, t, contexts[-1], edges[1].expand(size, -1, -1, -1), scales[1], guess_mode=True, return_dict=False
        )
        pad = [torch.cat([r.new_zeros((n - 1) * size, *r.shape[1:]), r]) for r in (*out[0], out[1])]
        skips, middle = [a + b for a, b in zip(skips, pad, strict=False)], middle + pad[-1]
    return skips, middle


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False])
def test_everything_at_once_equals_a_loop_written_out(models, together):
    """Two nets, one of them guessing and for a part of the run, from a picture, inside a mask, with Heun's method."""
    base, pipe = models.reference("sd1", F64), models.ours("sd1", F64)
    (plain, our_plain), (guess, our_guess) = (controlnets(models, "sd1", seed, F64) for seed in (4, 5))
    controls = [Control(our_plain, EDGES[0], 0.8), Control(our_guess, EDGES[1], 1.1, end=0.7, guess=True)]
    request = {**TWO, "image": PICTURES, "mask": MASKS, "strength": 0.8}
    run = pipe.prepare(**request, control=controls, sampler="heun", steps=5, seed=5, together=together)
    steps = list(run.steps())
    assert len(steps) == 4 and run.rows.start == 1 and run.settings.width == 48

    contexts, edges = encoded(base, TWO), [seen_by(plain, each) for each in EDGES]
    image = torch.cat([2 * seen_by(plain, each).float() - 1 for each in PICTURES]).double()
    whole = [np.asarray(m.resize((48, 32), Image.Resampling.LANCZOS)) >= 128 for m in MASKS]
    mask = torch.nn.functional.max_pool2d(torch.from_numpy(np.stack(whole)).double()[:, None], 8)
    gs = generators(2)
    draws = [torch.cat([torch.randn(1, 4, 4, 6, generator=g) for g in gs]).double() for _ in range(2)]
    posterior = base.vae.encode(image).latent_dist
    x0 = base.vae.config.scaling_factor * (posterior.mean + posterior.std * draws[0])
    levels = run.schedule.levels
    assert levels[-1].sigma > 0  # so that the last step, too, asks twice

    def eps(x, level):
        with quiet():
            inside = None if level.i > 2 else guess  # of the steps 1 to 4 those to 70 %: 1 and 2
            skips, middle = residuals_of(plain, inside, x, level.t, contexts, edges, (0.8, 1.1))
        out = base.unet(
            torch.cat([x, x]), level.t, torch.cat(contexts),
            down_block_additional_residuals=skips, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        uncond, cond = out.chunk(2)
        return uncond + 4.0 * (cond - uncond)

    x = levels[1].alpha * x0 + levels[1].sigma * draws[1]
    for step, level, after in zip(steps, levels[1:], levels[2:], strict=False):
        d = after.sigma / after.alpha - level.sigma / level.alpha
        slope = eps(x, level)
        ahead = after.alpha * (x / level.alpha + d * slope)
        if after.sigma > 0:
            slope = (slope + eps(ahead, after)) / 2
        x = after.alpha * (x / level.alpha + d * slope)
        known = after.alpha * x0 + after.sigma * draws[1] if after is not levels[-1] else x0
        x = mask * x + (1 - mask) * known
        assert_close(step.x, x, 1e-11 * x.abs().max().item())

    result = run.finish(steps[-1].x)
    for drawn, given, inside in zip(result.images, PICTURES, whole, strict=True):
        original = np.asarray(given.resize((48, 32), Image.Resampling.LANCZOS))
        assert np.array_equal(np.asarray(drawn)[~inside], original[~inside])
        assert np.abs(np.asarray(drawn)[inside].astype(int) - original[inside]).mean() > 5
    assert min(result.changed) > 1


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False])
def test_a_model_that_edits_is_led_too(task_models, models, together):
    """Guidance of three parts, beside a picture: the plain net sees all of them, the guessing one the last."""
    base, pipe = task_models.reference("edit", F64), task_models.ours("edit", F64)
    (plain, our_plain), (guess, our_guess) = (controlnets(models, "sd1", seed, F64) for seed in (4, 5))
    controls = [Control(our_plain, EDGES[0], 0.8), Control(our_guess, EDGES[1], 1.1, guess=True)]
    options = {"sampler": "ddim", "steps": 4, "seed": 5, "together": together, "image_guidance": 1.7}
    run = pipe.prepare(**TWO, image=PICTURES, control=controls, **options)

    uncond, cond = encoded(models.reference("sd1", F64), TWO)
    edges = [seen_by(plain, each) for each in EDGES]
    image = torch.cat([2 * seen_by(plain, each).float() - 1 for each in PICTURES]).double()
    beside = base.vae.encode(image).latent_dist.mode()
    x = torch.cat([torch.randn(1, 4, 4, 6, generator=g) for g in generators(2)]).double()
    channels, contexts = torch.cat([torch.zeros_like(beside), beside, beside]), (uncond, uncond, cond)
    levels = run.schedule.levels
    for step, level, after in zip(run.steps(), levels, levels[1:], strict=False):
        with quiet():
            skips, middle = residuals_of(plain, guess, x, level.t, contexts, edges, (0.8, 1.1))
        out = base.unet(
            torch.cat([torch.cat([x] * 3), channels], dim=1), level.t, torch.cat(contexts),
            down_block_additional_residuals=skips, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        without, seen, both = out.chunk(3)
        eps = without + 4.0 * (both - seen) + 1.7 * (seen - without)
        x = after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps
        assert_close(step.x, x, 1e-11 * x.abs().max().item())
    assert step.i == 3


def test_a_picture_inverted_under_control_is_drawn_again_under_it(models):
    """Each net is run at the levels at which drawing runs it; without them another picture comes back."""
    pipe, edges = models.ours("sd1", F64), picture(51, 24, 16)
    nets = [controlnets(models, "sd1", seed, F64)[1] for seed in (4, 5)]
    controls = [Control(nets[0], edges), Control(nets[1], edges, scale=1.3, end=0.5)]
    options = {"prompt": PROMPT, "steps": 4, "guidance": 1.0}
    x0 = pipe(**options, control=controls, sampler="ddim", seed=3).x0
    size, drawn = x0.abs().max().item(), []
    for control in (controls, controls[:1], ()):
        noise = pipe.invert(x0, **options, control=control, width=24, height=16, refine=10)
        drawn.append(pipe(**options, control=controls, sampler="ddim", latents=noise).x0)
    assert_close(drawn[0], x0, 1e-6 * size)
    assert all((other - x0).abs().max() > 1e-2 * size for other in drawn[1:])
