"""SDXL and its refiner equal diffusers' pipelines: every latent on the way, and every pixel at its end.

From words, from a picture, inpainting with 4 and 9 channels, editing, led by ControlNets; of diffusers 0.42.1, on tiny
models of drawn parameters (`tiny_pairs.py`) in folders that diffusers has written.
"""

import inspect
from copy import copy, deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models import MultiControlNetModel
from reference import assert_close, randomise, scheduler_of
from test_pipeline import OF_RATIO, SAMPLERS, ends, equal, generators, landed, quiet, same_pixels
from tiny_pairs import OTHERS, PROMPT, SD, with_scheduler, xl_unet
from tiny_tasks import box_mask, noise_of_float32, picture

import ldm
from ldm.control import Control
from ldm.models.unet import UNet, UNetConfig
from ldm.network import tell
from ldm.sizes import Sizes
from ldm.text.words import Words

F32, F64 = torch.float32, torch.float64
TIGHT = {F32: 1e-5, F64: 1e-12}  # of the largest number in a latent
W, H = 50, 37  # what is drawn of a picture is 48 x 32
SIZE = {"width": 48, "height": 32}
PROMPTS, NEGATIVE = [PROMPT, OTHERS[0]], ["fog", "a dog at dusk"]
RICH = {"prompt": PROMPTS, "negative": NEGATIVE, "count": 2, "guidance": 4.0, **SIZE}
TWO = [picture(1, W, H), picture(2, W, H)]
EDGES = [picture(31, W, H), picture(32, W, H)]
MASK = box_mask(W, H, 10, 5, 37, 30)
THEIRS = {  # our option -> diffusers'
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "image_guidance": "image_guidance_scale",
    "mask": "mask_image",
    "count": "num_images_per_prompt",
    "clip_skip": "clip_skip",
}
every_dtype = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])


def scheduler_like(sampler, spacing, n, dtype, **fields):
    cls, end, told = SAMPLERS[sampler]
    return scheduler_of(cls, {**SD, **end, "timestep_spacing": spacing, **fields}, n, dtype), told


def sizes_of(request):
    """Our sizes as diffusers' options."""
    told = {}
    for option, prefix in (("sizes", ""), ("negative_sizes", "negative_")):
        sizes = request.pop(option, Sizes())
        names = {"original": "original_size", "crop": "crops_coords_top_left", "target": "target_size"}
        named = {f"{prefix}{theirs}": getattr(sizes, ours) for ours, theirs in names.items()}
        named[f"{prefix}aesthetic_score"] = sizes.score
        told |= {name: value for name, value in named.items() if value is not None}
    return told


def run_diffusers(cls, base, scheduler, n, request, dtype, own=(), **parts):
    """diffusers' pipeline of class `cls` over the parts of `base`, and others: the latents in the model's coordinates,
    the pixels from 0 to 255."""
    known = inspect.signature(cls.__init__).parameters
    components = {key: part for key, part in base.components.items() if key in known}
    asks = {key: base.config[key] for key in ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
            if key in base.config and key in known}  # fmt: skip
    pipe = cls(**{**components, **asks, "scheduler": scheduler, **parts}).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    request = {**request}
    request |= sizes_of(request)
    request = {THEIRS.get(key, key): value for key, value in request.items()}
    count = 1 if isinstance(request["prompt"], str) else len(request["prompt"])
    count *= request.get("num_images_per_prompt", 1)
    request.setdefault("generator", generators(count))
    found = []
    if "callback_on_step_end" in inspect.signature(cls.__call__).parameters:
        request["callback_on_step_end"] = lambda pipe, i, t, given: found.append(given["latents"]) or {}
    else:
        request |= {"callback": lambda i, t, x: found.append(x), "callback_steps": 1}
    with noise_of_float32(pipe), quiet() if dtype == F64 else torch.no_grad():
        images = pipe(num_inference_steps=n, output_type="np", **request, **dict(own)).images
    return found, (images * 255).round()


def in_our_coordinates(found, scheduler, n):
    """What diffusers' Euler and its like call x / alpha; `found` are the last of n steps."""
    if not type(scheduler).__name__.startswith(OF_RATIO):
        return found
    sigmas = landed(scheduler, n)[n - len(found) :]
    return [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(found, sigmas, strict=True)]


def run_ours(pipe, n, request):
    run = pipe.prepare(**{"seed": 5, "steps": n, "compat": True, "paste": False, **request})
    steps = list(run.steps())
    assert len(steps) == len(run)
    return [step.x for step in steps], np.stack([np.asarray(image) for image in run.finish(steps[-1].x).images])


def check(models, cls, name, request, sampler="ddim", n=4, dtype=F64, spacing="leading", tolerance=None, **parts):
    """Both runs of one request, compared; returns the largest difference and our last latent."""
    base, ours = models.reference(name, dtype), models.ours(name, dtype)
    scheduler, told = scheduler_like(sampler, spacing, n, dtype)
    theirs = run_diffusers(cls, base, scheduler, n, {**request, **told}, dtype, **parts)
    run = min(int(n * request.get("strength", 1)), n)
    latents = [theirs[0][k] for k in ends(scheduler, run) if k < len(theirs[0])]
    latents = in_our_coordinates(latents, scheduler, n)
    found = run_ours(with_scheduler(ours, scheduler), n, {**request, **told})
    worst = equal(found[0], latents, tolerance or TIGHT[dtype])
    same_pixels(found[1], theirs[1], most=0 if dtype == F64 else 1)
    return worst, found[0][-1]


words = partial(check, cls=StableDiffusionXLPipeline, name="sdxl")

# ------------------------------------------------------------------------------------------------------ from words


@pytest.mark.parametrize("sampler", ["ddim", "ddim eta=0.6", "euler", "euler-a", "heun", "dpm++2m karras", "unipc2",
                                     "lcm", "plms", "dpm++2m-sde"])  # fmt: skip
def test_guided_runs_equal_diffusers_in_float64(models, sampler):
    words(models, request=RICH, sampler=sampler, spacing="trailing", n=5)


REQUESTS = {
    "one prompt": {"prompt": PROMPT},  # the negative half is zeros
    "an empty negative prompt": {"prompt": PROMPT, "negative": ""},  # and this one is words
    "three prompts": {"prompt": [PROMPT, *OTHERS], "negative": ["", "fog", "red"]},
    "without guidance": {"prompt": PROMPTS, "guidance": 1.0},
    "longer than 77 tokens": {"prompt": "a large red house, " * 30 + "a fish", "negative": "a fish, " * 50},
    "its own size": {"prompt": PROMPT, "width": 0, "height": 0},
    "sizes": {"prompt": PROMPTS, "sizes": Sizes(original=(512, 768), crop=(16, 100), target=(640, 512))},
    "sizes of the other half": {
        "prompt": PROMPT,
        "sizes": Sizes(original=(300, 200), crop=(3, 7)),
        "negative_sizes": Sizes(original=(100, 90), crop=(40, 50), target=(77, 66)),
    },
    "an earlier layer": {"prompt": PROMPTS, "clip_skip": 1},
}


@pytest.mark.parametrize("what", REQUESTS)
def test_requests_of_every_kind_equal_diffusers_in_float64(models, what):
    request = {"guidance": 5.0, **SIZE, **REQUESTS[what]}
    request = {key: value for key, value in request.items() if value != 0}
    _, found = words(models, request=request)
    plain = {
        key: value for key, value in request.items() if key not in ("sizes", "negative_sizes", "clip_skip", "negative")
    }
    if len(plain) < len(request):  # what was asked beside does something
        scheduler, _ = scheduler_like("ddim", "leading", 4, F64)
        other = run_ours(with_scheduler(models.ours("sdxl", F64), scheduler), 4, plain)[0][-1]
        assert (other - found).abs().max() > 1e-3 * found.abs().max()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
def test_in_float32_equal_diffusers(models, sampler):
    words(models, request={**RICH, "guidance": 2.0}, sampler=sampler, dtype=F32)


def test_what_the_folder_says_is_taken_where_nothing_is_said(models):
    pipe = models.ours("sdxl")
    settings = pipe.settings(PROMPT)
    assert (settings.width, settings.height, settings.steps, settings.guidance) == (64, 64, 50, 5.0)
    assert settings.sampler == "euler" and settings.negative == (None,)
    assert settings.sizes == settings.negative_sizes == Sizes((64, 64), (0, 0), (64, 64))
    refiner = models.ours("refiner").settings(PROMPT, width=48)
    assert refiner.sizes == Sizes((64, 48), (0, 0), score=6.0) and refiner.negative == ("",)
    assert refiner.negative_sizes == Sizes((64, 48), (0, 0), score=2.5)
    assert refiner.sizes.numbers == (64, 48, 0, 0, 6) and settings.sizes.numbers == (64, 64, 0, 0, 64, 64)


def test_a_picture_does_not_depend_on_its_batch(models):
    """Its pooled vector and sizes neither: with and without words for the negative half."""
    pipe, options = models.ours("sdxl", F64), {"steps": 3, **SIZE, "sizes": Sizes(original=(9, 8))}
    for negative in (None, ["fog", "red"], ["fog", None]):
        together = pipe(PROMPTS, negative=negative, seed=3, **options).x0
        for k in range(2):
            own = None if negative is None else negative[k]
            alone = pipe(PROMPTS[k], negative=own, seed=3 + k, **options).x0
            assert_close(alone, together[k : k + 1], 1e-11 * together.abs().max().item())
        apart = pipe(PROMPTS, negative=negative, seed=3, together=False, **options).x0
        assert_close(apart, together, 1e-11 * together.abs().max().item())
    assert torch.equal(together, pipe(PROMPTS, negative=negative, seed=3, one_by_one=False, **options).x0)
    alone = pipe(PROMPTS, negative=negative, seed=3, one_by_one=True, **options).x0
    assert_close(alone, together, 1e-11 * together.abs().max().item())


@torch.no_grad()
def test_words_are_the_last_but_one_layers_of_both_encoders(models):
    pipe, reference = models.ours("sdxl", F64), models.reference("sdxl", F64)
    context, _, pooled, _ = reference.encode_prompt(PROMPTS, device="cpu")
    found = pipe.read(PROMPTS)
    assert_close(found.context, context, 1e-11)
    assert_close(found.pooled, pooled, 1e-11)
    assert found.context.shape == (2, 77, 44) and found.pooled.shape == (2, 14)
    normed = pipe.text_encoder.context(pipe.tokenizer(PROMPTS).ids)
    assert (found.context[..., :24] - normed).abs().max() > 0.1


def test_what_is_cut_off_is_said_once_though_two_encoders_read_it(models, capsys):
    pipe, long = models.ours("sdxl"), "a fish, " * 50
    capsys.readouterr()
    pipe.read([long, PROMPT, long])
    said = capsys.readouterr().err
    assert said.count("longer than 77 tokens") == 1 and said.count("\n") == 1


def test_defect_diffusers_mixes_the_halves_sizes_up_in_a_batch(models):
    """REFERENCE_DEFECTS.md, 23: of several pictures, ids [neg, pos, neg, pos] meet embeddings [neg, neg, pos, pos]."""
    request = {
        "prompt": PROMPTS,
        "guidance": 5.0,
        **SIZE,
        **{k: REQUESTS["sizes of the other half"][k] for k in ("sizes", "negative_sizes")},
    }
    with pytest.raises(AssertionError, match="off by"):
        words(models, request=request)
    scheduler, _ = scheduler_like("ddim", "leading", 4, F64)
    together = run_ours(with_scheduler(models.ours("sdxl", F64), scheduler), 4, request)[0][-1]
    alone = words(models, request={**request, "prompt": PROMPT})[1]  # a single picture is right there, too
    assert_close(together[:1], alone, 1e-11 * alone.abs().max().item())


# ----------------------------------------------------------------------------------------------- from pictures


@pytest.mark.parametrize("sampler, strength", [("ddim", 0.58), ("euler", 0.8), ("euler-a", 0.6), ("dpm++2m", 1.0)])
def test_image_to_image_equals_diffusers_in_float64(models, sampler, strength):
    request = {"prompt": PROMPTS, "negative": NEGATIVE, "guidance": 3.0, "image": TWO, "strength": strength}
    ours = {**request, "image": [each.resize((48, 32)) for each in TWO]}  # diffusers draws at the next multiple of 8
    check(models, StableDiffusionXLImg2ImgPipeline, "sdxl", ours, sampler, n=6)


@pytest.mark.parametrize("sampler, strength", [("ddim", 0.58), ("euler", 1.0), ("euler-a", 0.8), ("unipc2", 0.8)])
def test_inpainting_by_blending_equals_diffusers_in_float64(models, sampler, strength):
    request = {"prompt": PROMPTS, "guidance": 3.0, "image": TWO, "mask": MASK, "strength": strength, **SIZE}
    check(models, StableDiffusionXLInpaintPipeline, "sdxl", request, sampler, n=6)


@pytest.mark.parametrize("sampler, strength, dtype", [("ddim", 0.58, F64), ("euler", 0.4, F64), ("dpm++2m", 0.7, F32)])
def test_a_refiner_draws_over_a_picture_as_diffusers_does(models, sampler, strength, dtype):
    """It is told a score in place of the target size, and reads the second encoder's words alone."""
    request = {
        "prompt": PROMPTS,
        "negative": NEGATIVE,
        "guidance": 3.0,
        "image": [each.resize((48, 32)) for each in TWO],
    }
    sizes = {"sizes": Sizes((300, 200), (3, 7), score=7.5), "negative_sizes": Sizes((90, 80), (0, 0), score=1.5)}
    refine = partial(check, models, StableDiffusionXLImg2ImgPipeline, "refiner", sampler=sampler, n=6, dtype=dtype)
    plain = refine(request={**request, "strength": strength})[1]
    told = refine(request={**request, "strength": strength, **sizes})[1]
    assert (plain - told).abs().max() > 1e-4 * plain.abs().max()


class Changed:
    """The tiny SDXL with another UNet, on both sides."""

    def __init__(self, models, **fields):
        self.models, self.fields = models, fields

    def reference(self, name, dtype):
        pipe = self.models.reference(name, dtype)
        parts = {**pipe.components, "unet": self.unet(name, dtype)}
        return StableDiffusionXLPipeline(**parts)

    def unet(self, name, dtype):
        return xl_unet(name, **self.fields).to(dtype)

    def ours(self, name, dtype):
        pipe, reference = copy(self.models.ours(name, dtype)), self.unet(name, dtype)
        with torch.device("meta"):
            unet = UNet(UNetConfig.from_json(dict(reference.config)))
        unet.load_state_dict(reference.state_dict(), strict=True, assign=True)
        pipe.unet = unet.eval()
        return pipe


@pytest.mark.parametrize("sampler, strength", [("ddim", 0.58), ("euler", 1.0)])
def test_inpainting_with_nine_channels_equals_diffusers_in_float64(models, sampler, strength):
    request = {"prompt": PROMPTS, "guidance": 3.0, "image": TWO, "mask": MASK, "strength": strength, **SIZE}
    check(Changed(models, in_channels=9), StableDiffusionXLInpaintPipeline, "sdxl", request, sampler)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_editing_equals_diffusers_in_float64(models, sampler):
    request = {"prompt": PROMPT, "negative": "fog", "guidance": 3.0, "image_guidance": 1.7, "image": TWO[0], **SIZE}
    check(Changed(models, in_channels=8), StableDiffusionXLInstructPix2PixPipeline, "sdxl", request, sampler)


# ------------------------------------------------------------------------------------------------- ControlNets


def nets(models, seed, dtype):
    """diffusers' ControlNet for the tiny SDXL, every parameter drawn, and ours from its folder."""
    folder = models.root / f"sdxl-controlnet-{seed}"
    if not folder.exists():
        net = ControlNetModel.from_unet(
            models.reference("sdxl").unet, conditioning_embedding_out_channels=(4, 6, 10, 12)
        )
        randomise(net, seed).save_pretrained(folder)
    reference = ControlNetModel.from_pretrained(folder, torch_dtype=dtype).eval()
    return reference, ldm.load_controlnet(folder, models.ours("sdxl", dtype))


LED = {
    "one": [{"scale": 0.7}],
    "guess": [{"guess": True}],
    "two": [{"scale": 0.6, "end": 0.7}, {"scale": 1.2, "start": 0.2}],
}
CONTROL = {
    "words": (StableDiffusionXLControlNetPipeline, {}),
    "image": (StableDiffusionXLControlNetImg2ImgPipeline, {"image": TWO, "strength": 0.7}),
    "inpaint": (StableDiffusionXLControlNetInpaintPipeline, {"image": TWO, "mask": MASK, "strength": 0.8}),
}


@pytest.mark.parametrize("way, led, dtype", [("words", "one", F64), ("words", "guess", F64), ("words", "two", F64),
    ("image", "one", F64), ("image", "two", F64), ("inpaint", "one", F64), ("words", "two", F32)], ids=str)  # fmt: skip
def test_pictures_led_by_controlnets_equal_diffusers(models, way, led, dtype):
    cls, more = CONTROL[way]
    pairs = [nets(models, 40 + k, dtype) for k in range(len(LED[led]))]
    ours = [Control(net, each, **told) for (_, net), each, told in zip(pairs, EDGES, LED[led], strict=False)]
    theirs = {
        "controlnet_conditioning_scale": [each.scale for each in ours],
        "control_guidance_start": [each.start for each in ours],
        "control_guidance_end": [each.end for each in ours],
    }
    seen = EDGES[: len(ours)]
    if len(ours) == 1:
        theirs, seen = {key: value for key, (value,) in theirs.items()}, seen[0]
    if way != "inpaint":
        theirs["guess_mode"] = ours[0].guess
    theirs["image" if way == "words" else "control_image"] = seen
    references = [reference for reference, _ in pairs]
    net = MultiControlNetModel(references) if len(references) > 1 else references[0]
    request = {"prompt": PROMPTS, "negative": NEGATIVE, "guidance": 2.0, **SIZE, **more}
    scheduler, _ = scheduler_like("euler", "leading", 5, dtype)
    base = models.reference("sdxl", dtype)
    latents, pixels = run_diffusers(cls, base, scheduler, 5, request, dtype, theirs, controlnet=net)
    pipe = with_scheduler(models.ours("sdxl", dtype), scheduler)
    found, drawn = run_ours(pipe, 5, {**request, "control": ours})
    equal(found, in_our_coordinates(latents, scheduler, 5), TIGHT[dtype])
    same_pixels(drawn, pixels, most=0 if dtype == F64 else 1)
    without, _ = run_ours(pipe, 5, request)
    assert (found[-1] - without[-1]).abs().max() > 1e-3 * found[-1].abs().max()


def test_defect_diffusers_reads_the_other_half_s_sizes_only_in_part(models):
    """REFERENCE_DEFECTS.md, 24: from words both must be said or none counts; from a picture the crop is never read."""
    crops = {"guidance": 5.0, "prompt": PROMPT, "negative_sizes": Sizes(crop=(40, 50)), **SIZE}
    original = {**crops, "negative_sizes": Sizes(original=(100, 90))}
    picked = {"prompt": PROMPT, "guidance": 5.0, "image": TWO[0].resize((48, 32)), "strength": 0.8}
    for cls, request, like in (
        (StableDiffusionXLPipeline, original, {}),
        (StableDiffusionXLImg2ImgPipeline, {**picked, "negative_sizes": Sizes(crop=(40, 50))}, {}),
    ):
        scheduler, _ = scheduler_like("ddim", "leading", 4, F64)
        plain = {key: value for key, value in request.items() if key != "negative_sizes"} | like
        base = models.reference("sdxl", F64)
        with_sizes, without = (run_diffusers(cls, base, scheduler, 4, each, F64)[0] for each in (request, plain))
        assert torch.equal(with_sizes[-1], without[-1])  # what was said changed nothing
        pipe = with_scheduler(models.ours("sdxl", F64), scheduler)
        ours, silent = (run_ours(pipe, 4, each)[0][-1] for each in (request, plain))
        assert_close(silent, without[-1], 1e-11 * silent.abs().max().item())
        assert (ours - silent).abs().max() > 1e-4 * silent.abs().max()


def test_defect_sizes_are_rounded_in_bfloat16(models):
    """REFERENCE_DEFECTS.md, 27: diffusers keeps them in the dtype of the words, which of 1017 makes 1016."""
    base = models.reference("sdxl")
    found = base._get_add_time_ids((1017, 768), (0, 0), (1017, 768), torch.bfloat16, 14)
    assert found.float().tolist() == [[1016, 768, 0, 0, 1016, 768]]
    pipe = models.ours("sdxl")
    unet, words = deepcopy(pipe.unet).bfloat16(), Words(*(each.bfloat16() for each in pipe.read([PROMPT])))
    told = tell(unet, words, Sizes((1017, 768), (0, 0), (1017, 768)))
    assert told.extras.time_ids.tolist() == [[1017, 768, 0, 0, 1017, 768]]


# ----------------------------------------------------------------------- tasks that diffusers has no pipeline for


@pytest.mark.parametrize("name", ["sdxl", "sd2"])
def test_inversion_enlarging_and_tiles_go_with_every_family(models, name):
    pipe, image = models.ours(name, F64), picture(1, 48, 32)
    options = {"steps": 12, "guidance": 1.0, "seed": 5}
    x0 = pipe.prepare(PROMPT, image=image, strength=0.0, sampler="ddim", **options).x
    noise = pipe.invert(image, PROMPT, refine=12, **options)
    back = pipe(PROMPT, latents=noise, sampler="ddim", **SIZE, **options).x0
    assert_close(back, x0, 1e-3 * x0.abs().max().item())
    large = pipe.enlarge(x0, 2)
    refined = pipe(PROMPT, image=large, strength=0.5, steps=4)
    assert refined.images[0].size == (96, 64) and (refined.x0 - large).abs().max() > 0.1
    options = {"steps": 2, "width": 96, "height": 64, "seed": 1}
    whole, tiled, small = (pipe(PROMPT, tile=tile, **options).x0 for tile in (0, 96, 64))
    assert_close(tiled, whole, 1e-11 * whole.abs().max().item())
    assert (small - whole).abs().max() > 1e-3 * whole.abs().max()


def test_runs_of_sdxl_are_watched_forked_and_resumed_as_all_are(models):
    pipe = models.ours("sdxl")
    options = {"steps": 4, "seed": 1, "sampler": "euler-a", **SIZE}
    steps = list(pipe.steps(PROMPT, **options))
    again = list(pipe.steps(PROMPT, after=steps[:2], **options))
    assert torch.equal(again[-1].x, steps[-1].x) and len(again) == 2
    with ldm.watch(pipe) as seen:
        watched = list(pipe.steps(PROMPT, **options))
    assert torch.equal(watched[-1].x, steps[-1].x)
    assert seen.map(2).sum() > 0
    trace = pipe.trace(PROMPT, **options)
    assert torch.equal(trace[-1].x, steps[-1].x) and [word.text for word in trace.words[0]][:2] == ["a", "large"]
