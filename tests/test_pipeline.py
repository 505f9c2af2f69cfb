"""The whole road equals diffusers' StableDiffusionPipeline: every latent on the way, and every pixel at its end.

Both load the same folder, which diffusers has written (`tiny_pairs.py`); where a test is in float64, diffusers'
schedulers are recompiled in it (`reference.in_float64`). The first latents are drawn in float32, as both sides do.
"""

import json
import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from reference import assert_close, normal, scheduler_of
from tiny_pairs import MODELS, OTHERS, PROMPT, SCENES, SD, scenes, with_scheduler

import ldm

every_model = pytest.mark.parametrize("name", MODELS)

SAMPLERS = {  # name -> diffusers' class, what makes it this sampler and its schedule's end, what its step is told
    "ddim": (DDIMScheduler, {"set_alpha_to_one": False}, {}),
    "ddim to alpha 1": (DDIMScheduler, {"set_alpha_to_one": True}, {}),
    "ddim eta=0.6": (DDIMScheduler, {"set_alpha_to_one": False}, {"eta": 0.6}),
    "ddim eta=1": (DDIMScheduler, {}, {"eta": 1.0}),
    "ddpm": (DDPMScheduler, {}, {}),
    "euler": (EulerDiscreteScheduler, {}, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}, {}),
    "heun": (HeunDiscreteScheduler, {}, {}),
    "dpm2": (KDPM2DiscreteScheduler, {}, {}),
    "dpm2-a": (KDPM2AncestralDiscreteScheduler, {}, {}),
    "lms": (LMSDiscreteScheduler, {}, {}),
    "lms karras": (LMSDiscreteScheduler, {"use_karras_sigmas": True}, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}, {}),
    "pndm": (PNDMScheduler, {}, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}, {}),
    "dpm++2m karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"solver_order": 3}, {}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm++3m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    "dpm2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    "dpm++2s": (DPMSolverSinglestepScheduler, {}, {}),
    "deis2": (DEISMultistepScheduler, {}, {}),
    "deis3": (DEISMultistepScheduler, {"solver_order": 3}, {}),
    "unipc2": (UniPCMultistepScheduler, {}, {}),
    "unipc3": (UniPCMultistepScheduler, {"solver_order": 3}, {}),
    "lcm": (LCMScheduler, {}, {}),
    "tcd": (TCDScheduler, {}, {"eta": 0.3}),
}
LOOSE = {"ddpm": 1e-9}  # REFERENCE_DEFECTS.md, 5
SWAPPED = ("plms", "heun", "unipc2", "deis2", "dpm++2m-sde", "dpm2-a")  # on the embedded model, a few of many
TABLES = [("leading", 2), ("linspace", 3), ("trailing", 6)]  # test_sampler_parity.py has hundreds
# Two prompts, two pictures of each, each prompt with a negative one of its own, twice as wide as high.
RICH = {"prompt": [PROMPT, OTHERS[0]], "negative": ["fog", "a dog at dusk"], "count": 2, "height": 32, "width": 64}
REQUESTS = {
    "one prompt": {"prompt": PROMPT},
    "a negative prompt": {"prompt": PROMPT, "negative": "a small blue fish", "guidance": 3.0},
    "three prompts": {"prompt": [PROMPT, *OTHERS], "negative": ["", "fog", "red"]},
    "two pictures a prompt": {"prompt": [PROMPT, OTHERS[1]], "count": 2},
    "without guidance": {"prompt": [PROMPT, OTHERS[1]], "guidance": 1.0},
    "guidance below 1": {"prompt": PROMPT, "guidance": 0.5},
    "guidance just above 1": {"prompt": PROMPT, "guidance": 1.1},
    "the empty prompt": {"prompt": "", "guidance": 0.0},
    "of two tongues and signs": {"prompt": "Ein Haus!! 猫 & it's 10:30 <|endoftext|> a\tdog!"},
    "longer than 77 tokens": {"prompt": "a large red house, " * 30 + "a fish", "negative": "a fish, " * 50},
    "wide": {"prompt": PROMPT, "height": 40, "width": 96},
    "high": {"prompt": OTHERS, "height": 72, "width": 8},
}


def generators(n, seed=5):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def pictures_in(request):
    prompt = request["prompt"]
    return (1 if isinstance(prompt, str) else len(prompt)) * request.get("count", 1)


def run_diffusers(pipe, scheduler, n, request, extra=None, clip_skip=None, latents=None):
    """The latents behind every step, in the model's coordinates, and the final pixels (B, H, W, 3) from 0 to 255.

    In float64 diffusers would draw other noise; it is given the float32 one.
    """
    pipe.scheduler = scheduler
    gs, found, calls = generators(pictures_in(request)), {}, iter(range(10**6))
    if pipe.unet.dtype == torch.float64 and latents is None:
        size = [
            request.get(side) or pipe.unet.config.sample_size * pipe.vae_scale_factor for side in ("height", "width")
        ]
        shape = (len(gs), 4, *(pixels // pipe.vae_scale_factor for pixels in size))
        latents = randn_tensor(shape, generator=gs, dtype=torch.float32).double()
    many = not isinstance(request["prompt"], str)
    out = pipe(
        request["prompt"],
        negative_prompt=request.get("negative", [""] * len(request["prompt"]) if many else ""),
        num_images_per_prompt=request.get("count", 1),
        guidance_scale=request.get("guidance", 7.5),
        height=request.get("height"),
        width=request.get("width"),
        num_inference_steps=n,
        generator=gs,
        latents=latents,
        clip_skip=clip_skip,
        output_type="np",
        callback_on_step_end=lambda pipe, i, t, tensors: found.update({next(calls): tensors["latents"]}) or {},
        **(extra or {}),
    )
    found = [found[k] for k in ends(scheduler, n) if k in found]
    if type(scheduler).__name__.startswith(OF_RATIO):
        found = [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(found, landed(scheduler, n), strict=True)]
    return found, (out.images * 255).round()


OF_RATIO = ("Euler", "Heun", "LMS", "KDPM2")  # they work on x / alpha
TWICE = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


def ends(scheduler, n):
    """Which of diffusers' calls, one for each evaluation, end a step."""
    name = type(scheduler).__name__
    if name in TWICE:
        return [*range(1, 2 * n - 2, 2), 2 * n - 2]
    if name != "PNDMScheduler":
        return list(range(n))
    if scheduler.config.skip_prk_steps:  # its first step takes two evaluations
        return list(range(1, n + 1))
    return [3, 7, *range(11, 9 + n)]  # and the first three of all of PNDM four each


def landed(scheduler, n):
    """sigma / alpha behind every step, of which two evaluations make two rows in diffusers' table."""
    if type(scheduler).__name__ in TWICE:
        return scheduler.sigmas[[*range(1, 2 * n - 2, 2), -1]]
    return scheduler.sigmas[1:]


def run_ours(pipe, n, request, extra=None, clip_skip=0, latents=None, compat=True):
    options = {**request, **(extra or {}), "seed": 5, "steps": n, "compat": compat}
    steps = list(pipe.steps(**options, clip_skip=clip_skip, latents=latents))
    return [step.x for step in steps], np.stack([np.asarray(image) for image in pipe.decode(steps[-1].x)])


def equal(ours, theirs, tolerance):
    """Every latent, relative to the largest number in it; returns the largest difference."""
    assert len(ours) == len(theirs) > 0
    return max(
        assert_close(a, b, tolerance * b.abs().max().item()) / b.abs().max().item()
        for a, b in zip(ours, theirs, strict=True)
    )


def same_pixels(ours, theirs, most=0):
    """At most `most` grey levels apart; and the pictures show something: neither all black nor all white."""
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    assert np.abs(ours - theirs).max() <= most
    assert theirs.std() > 20 and ((theirs > 0) & (theirs < 255)).mean() > 0.5


def scheduler_like(name, model, spacing, n, dtype):
    cls, end, extra = SAMPLERS[name]
    fields = {**SD, **end, "timestep_spacing": spacing, "prediction_type": MODELS[model][2]}
    return scheduler_of(cls, fields, n, dtype), extra


@contextmanager
def quiet():
    """Without diffusers' warnings; and what it makes of whole numbers (LCM's timesteps) in float64 too."""
    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------- float64


@every_model
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_runs_equal_diffusers_in_float64(models, name, sampler):
    for spacing, n in TABLES:
        n += 4 * (sampler == "pndm")  # diffusers' Runge-Kutta steps need four rows (REFERENCE_DEFECTS.md, 9)
        scheduler, extra = scheduler_like(sampler, name, spacing, n, torch.float64)
        pipe = with_scheduler(models.ours(name, torch.float64), scheduler)
        assert sampler.startswith(pipe.scheduler.sampler)
        with quiet():
            latents, pixels = run_diffusers(models.reference(name, torch.float64), scheduler, n, RICH, extra)
        ours = run_ours(pipe, n, RICH, extra)
        equal(ours[0], latents, LOOSE.get(sampler, 1e-11))
        same_pixels(ours[1], pixels)


@every_model
@pytest.mark.parametrize("what", REQUESTS)
def test_requests_of_every_kind_equal_diffusers_in_float64(models, name, what, capsys):
    scheduler, _ = scheduler_like("ddim", name, "leading", 4, torch.float64)
    latents, pixels = run_diffusers(models.reference(name, torch.float64), scheduler, 4, REQUESTS[what])
    ours = run_ours(with_scheduler(models.ours(name, torch.float64), scheduler), 4, REQUESTS[what])
    equal(ours[0], latents, 1e-11)
    same_pixels(ours[1], pixels)
    assert ("longer than 77 tokens" in capsys.readouterr().err) == (what == "longer than 77 tokens")


@every_model
def test_default_step_count_size_and_scheduler_are_the_folder_s(models, name):
    """Nothing said but the prompt and the guidance: size and scheduler as diffusers reads them from the same folder."""
    pipe = models.ours(name, torch.float64)
    assert (pipe.defaults.steps, pipe.defaults.guidance) == (50, 7.5)  # diffusers' own defaults
    settings = pipe.settings(PROMPT)
    assert (settings.width, settings.height, settings.sampler) == (64, 64, "ddim")
    fields = json.loads((models.folder(name) / "scheduler" / "scheduler_config.json").read_text())
    fields = {key: value for key, value in fields.items() if not key.startswith("_")}
    scheduler = scheduler_of(DDIMScheduler, fields, 5)
    latents, pixels = run_diffusers(models.reference(name, torch.float64), scheduler, 5, {"prompt": PROMPT})
    ours = run_ours(models.ours(name, torch.float64), 5, {"prompt": PROMPT}, compat=False)
    equal(ours[0], latents, 1e-11)
    same_pixels(ours[1], pixels)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "ddpm", "heun", "lms", "unipc2"])
def test_given_latents_equal_diffusers_in_float64(models, sampler):
    """They are taken as unit noise and scaled by the schedule (Euler's begins at sigma, not 1), and left unchanged."""
    x = normal(9, 2, 4, 4, 6, dtype=torch.float64)
    kept = x.clone()
    request = {"prompt": [PROMPT, OTHERS[0]], "height": 32, "width": 48}
    scheduler, _ = scheduler_like(sampler, "sd1", "trailing", 4, torch.float64)
    theirs = run_diffusers(models.reference("sd1", torch.float64), scheduler, 4, request, latents=x.clone())
    ours = run_ours(with_scheduler(models.ours("sd1", torch.float64), scheduler), 4, request, latents=x)
    equal(ours[0], theirs[0], 1e-9)
    same_pixels(ours[1], theirs[1])
    assert torch.equal(x, kept)


def test_given_generators_are_those_of_the_seeds(models):
    pipe, request = models.ours("sd1"), {"prompt": [PROMPT, OTHERS[0]], "steps": 3, "sampler": "ddpm"}
    by_seed, gs = pipe(**request, seed=5).x0, generators(2)
    assert torch.equal(pipe(**request, generator=gs).x0, by_seed) and by_seed.std() > 0.1
    alone = pipe(PROMPT, steps=3, sampler="ddpm", generator=generators(1)[0]).x0
    assert_close(alone, by_seed[:1], 1e-5 * by_seed.abs().max())
    assert not torch.equal(pipe(**request, generator=gs).x0, by_seed)  # the caller's generators have moved on


# ---------------------------------------------------------------------------------------------------- float32


@every_model
def test_in_float32_we_draw_the_same_noise_and_are_as_near_the_truth_as_diffusers(models, name):
    """diffusers as people use it: float32, no latents given, a list of generators.

    Our error against float64, root mean square over all samplers and steps, is at most twice diffusers' own.
    """
    squares, count = np.zeros(2), 0
    runs = [("ddim", "leading", 5), ("ddpm", "trailing", 4), ("euler", "linspace", 6), ("dpm++2m", "leading", 6)]
    for sampler, spacing, n in runs:
        scheduler, extra = scheduler_like(sampler, name, spacing, n, torch.float64)
        truth, _ = run_diffusers(models.reference(name, torch.float64), scheduler, n, RICH, extra)
        scheduler, extra = scheduler_like(sampler, name, spacing, n, torch.float32)
        theirs, pixels = run_diffusers(models.reference(name), scheduler, n, RICH, extra)
        ours, drawn = run_ours(with_scheduler(models.ours(name), scheduler), n, RICH, extra)
        same_pixels(drawn, pixels, most=1)
        for a, b, c in zip(ours, theirs, truth, strict=True):
            assert a.dtype == b.dtype == torch.float32 and c.abs().mean() > 0.1
            size = c.abs().max().item()
            squares += [((x.double() - c).abs().max().item() / size) ** 2 for x in (a, b)]
            count += 1
    ours, theirs = np.sqrt(squares / count)
    assert 1e-9 < theirs < 1e-3, "the reference isn't in float32, or its runs are chaotic"
    assert ours <= 2 * theirs, f"our float32 error is {ours:.1e}, diffusers' {theirs:.1e}"


# ---------------------------------------------------------------------------------------------------- clip_skip


@pytest.mark.parametrize("clip_skip", [0, 1, 2, 3])
def test_clip_skip_is_what_diffusers_means_by_it(models, clip_skip):
    """Of the prompt alone, not of the negative one. diffusers' code runs once it is given the attribute it asks for."""
    reference = models.reference("sd2", torch.float64)
    scheduler, _ = scheduler_like("ddim", "sd2", "leading", 4, torch.float64)
    object.__setattr__(reference.text_encoder, "text_model", reference.text_encoder)
    try:
        theirs = run_diffusers(reference, scheduler, 4, RICH, clip_skip=clip_skip)
    finally:
        object.__delattr__(reference.text_encoder, "text_model")
    ours = run_ours(with_scheduler(models.ours("sd2", torch.float64), scheduler), 4, RICH, clip_skip=clip_skip)
    equal(ours[0], theirs[0], 1e-9)
    same_pixels(ours[1], theirs[1])
    plain, _ = run_diffusers(reference, scheduler, 4, RICH)
    assert ((plain[-1] - theirs[0][-1]).abs().max() > 1e-3) == (clip_skip > 0)


def test_defect_clip_skip_crashes_in_diffusers(models):
    """REFERENCE_DEFECTS.md, 6: when this fails, diffusers has mended it, and the test above can do without its aid."""
    scheduler, _ = scheduler_like("ddim", "sd1", "leading", 2, torch.float32)
    with pytest.raises(AttributeError, match="text_model"):
        run_diffusers(models.reference("sd1"), scheduler, 2, {"prompt": PROMPT}, clip_skip=1)


# ------------------------------------------------------------------------------------ the model that travels with ldm

WORDS = ["a large red house on snow at night", "a small blue fish left of a tree, oil painting", "mountains"]


@pytest.fixture(scope="session")
def both_scenes():
    reference = StableDiffusionPipeline.from_pretrained(SCENES, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, ldm.load(SCENES)


@scenes
def test_diffusers_draws_the_embedded_model_s_pictures(both_scenes):
    """As anyone would call either; the folder's own scheduler and sizes, within one grey level."""
    reference, pipe = both_scenes
    pixels = reference(
        WORDS, num_inference_steps=10, guidance_scale=5.0, generator=generators(3), output_type="np"
    ).images
    result = pipe(WORDS, steps=10, guidance=5.0, seed=5, sampler="ddim")
    same_pixels(np.stack([np.asarray(image) for image in result.images]), (pixels * 255).round(), most=1)
    for image, picture in zip(result.images, reference.numpy_to_pil(pixels), strict=True):
        assert image.size == picture.size and image.mode == picture.mode


@scenes
@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpm++2m", "ddim eta=0.6", *SWAPPED])
def test_every_sampler_on_the_embedded_model_equals_diffusers(both_scenes, sampler):
    """A scheduler swapped in by `from_config`, as diffusers' users do, and ours with the rule of its class."""
    reference, pipe = both_scenes
    cls, own, extra = SAMPLERS[sampler]
    saved = json.loads((SCENES / "scheduler" / "scheduler_config.json").read_text())
    scheduler = cls.from_config(saved, **own)
    request = {"prompt": WORDS[:1], "negative": ["a fish"], "guidance": 4.0}
    theirs = run_diffusers(reference, scheduler, 6, request, extra)
    same_file = run_ours(with_scheduler(pipe, scheduler), 6, request, extra)
    # Our users only name the sampler: `compat` takes the rule of its class, as `from_config` does.
    ours = run_ours(pipe, 6, request, {"sampler": sampler.split()[0], **extra})
    assert all(torch.equal(a, b) for a, b in zip(ours[0], same_file[0], strict=True))
    equal(ours[0], theirs[0], 1e-3)  # guidance amplifies float32's rounding
    same_pixels(ours[1], theirs[1], most=1)


@pytest.fixture(scope="session")
def exact_scenes():
    """The same in float64: what looks like agreement in float32 is agreement."""
    reference = StableDiffusionPipeline.from_pretrained(SCENES, torch_dtype=torch.float64)
    reference.set_progress_bar_config(disable=True)
    return reference, ldm.load(SCENES, torch.float64)


def scenes_scheduler(sampler, spacing, n, dtype=torch.float64):
    """diffusers' scheduler of that sampler over the embedded model's own betas."""
    saved = json.loads((SCENES / "scheduler" / "scheduler_config.json").read_text())
    cls, own, extra = SAMPLERS[sampler]
    return scheduler_of(cls, {**saved, **own, "timestep_spacing": spacing}, n, dtype), extra


SCENES_REQUESTS = {
    "guided": {"prompt": WORDS[1], "guidance": 5.0},
    "negative": {"prompt": WORDS[:2], "negative": ["a fish", ""], "guidance": 4.0, "width": 64, "height": 96},
    "not guided": {"prompt": WORDS[2], "guidance": 1.0, "width": 64, "height": 64},
}


@scenes
@pytest.mark.parametrize("what", SCENES_REQUESTS)
@pytest.mark.parametrize("spacing, n", TABLES)
@pytest.mark.parametrize("sampler", ["ddim", "ddim eta=0.6", "ddpm", "euler", "dpm++2m", "heun", "unipc2"])
def test_runs_of_the_embedded_model_equal_diffusers_in_float64(exact_scenes, sampler, spacing, n, what):
    reference, pipe = exact_scenes
    scheduler, extra = scenes_scheduler(sampler, spacing, n)
    theirs = run_diffusers(reference, scheduler, n, SCENES_REQUESTS[what], extra)
    ours = run_ours(with_scheduler(pipe, scheduler), n, SCENES_REQUESTS[what], extra)
    equal(ours[0], theirs[0], 1e-9)
    assert np.abs(ours[1] - theirs[1]).max() == 0 and theirs[1].std() > 5


@scenes
def test_the_embedded_model_s_float32_error_is_at_most_twice_diffusers_own(both_scenes, exact_scenes):
    squares = np.zeros(2)
    for sampler, spacing, n in [("ddim", "leading", 5), ("ddpm", "trailing", 4), ("dpm++2m", "linspace", 6)]:
        request = SCENES_REQUESTS["negative"]
        scheduler, extra = scenes_scheduler(sampler, spacing, n)
        truth, _ = run_diffusers(exact_scenes[0], scheduler, n, request, extra)
        scheduler, extra = scenes_scheduler(sampler, spacing, n, torch.float32)
        theirs, _ = run_diffusers(both_scenes[0], scheduler, n, request, extra)
        ours, _ = run_ours(with_scheduler(both_scenes[1], scheduler), n, request, extra)
        for a, b, c in zip(ours, theirs, truth, strict=True):
            squares += [(x.double() - c).square().mean().item() / c.square().mean().item() for x in (a, b)]
    ours, theirs = np.sqrt(squares)
    assert 1e-9 < theirs < 1e-2 and ours <= 2 * theirs, (ours, theirs)


@scenes
@torch.no_grad()
def test_every_part_of_the_embedded_model_equals_the_reference_s(exact_scenes, both_scenes):
    """CLIP, UNet, and the VAE both ways, forward: 1e-11 of the largest number in float64, 1e-5 in float32."""
    for (reference, pipe), tolerance in ((exact_scenes, 1e-11), (both_scenes, 1e-5)):
        dtype = pipe.dtype
        ids = pipe.tokenizer(WORDS).ids
        context = reference.text_encoder(ids).last_hidden_state
        x, image = normal(1, 3, 4, 16, 12, dtype=dtype), normal(2, 2, 3, 64, 96, dtype=dtype).tanh()
        t = torch.tensor([981, 3, 440])
        pairs = {
            "text encoder": (pipe.text_encoder.context(ids), context),
            "UNet": (pipe.unet(x, t, context), reference.unet(x, t, encoder_hidden_states=context).sample),
            "VAE's encoder": (pipe.vae.posterior(image).mean, reference.vae.encode(image).latent_dist.mean),
            "VAE's decoder": (
                pipe.vae.decode(x),
                reference.vae.decode(x / reference.vae.config.scaling_factor).sample,
            ),
        }
        for ours, theirs in pairs.values():
            assert_close(ours, theirs, tolerance * theirs.abs().max().item())
