"""What pictures do for a run: strength, masks, tiles, larger pictures, inversion; and what is refused, in sentences.

Statements are exact, bit for bit, wherever the mathematics is. `test_task_pipelines.py` compares with diffusers.
"""

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from reference import assert_close, normal
from tiny_pairs import OTHERS, PROMPT, SCENES, scenes
from tiny_tasks import box_mask, picture

import ldm
from ldm import conditions, pictures, tasks
from ldm.diffusion import Prediction
from ldm.errors import LDMError
from ldm.models.controlnet import ControlNet
from ldm.noise import Noise
from ldm.pipeline import Pipeline
from ldm.samplers.inverse import ddim_inverse
from ldm.scenes import draw
from ldm.schedules import ScheduleConfig, make_schedule
from ldm.settings import Settings, choose_steps, run_of
from ldm.tiles import in_tiles, ramp, starts

W, H = 48, 32
P, Q = picture(1, W, H), picture(2, W, H)
BOX = box_mask(W, H, 16, 8, 40, 24)
METHODS = ["ddim", "ddpm", "euler", "euler-a", "heun", "dpm2", "lms", "plms", "pndm", "dpm++2m", "dpm++2m-sde",
           "dpm++2s", "unipc2", "deis2"]  # fmt: skip
SILENT = [name for name in METHODS if name not in ("ddpm", "euler-a", "dpm++2m-sde")]  # draw no noise on the way
every_method = pytest.mark.parametrize("sampler", METHODS)


@pytest.fixture
def pipe(models):
    return models.ours("sd1")


@pytest.fixture(scope="session")
def embedded():
    return ldm.load(SCENES)


def encoded(pipe, shown, seeds):
    """x0 and the first noise as a run draws them: the posterior's noise comes first, each picture's from its seed."""
    noise = Noise.from_seeds(seeds)
    like = torch.empty(len(seeds), 4, shown[0].height // 8, shown[0].width // 8)
    with torch.no_grad():
        return pipe.vae.encode(pictures.image_tensor(shown), noise(like)), noise(like)


def pixels(image):
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------------------------------------ strength

STRENGTHS = [k / 100 for k in range(1, 101)] + [1 / 3, 2 / 3, 0.1 + 0.2, 0.999, 1 - 1e-16, 0.58, 0.29]


def test_the_share_of_the_steps_is_cut_as_diffusers_cuts_it():
    for n in [*range(1, 61), 100, 999, 1000]:
        stub = SimpleNamespace(scheduler=SimpleNamespace(timesteps=list(range(n)), order=1))
        for strength in STRENGTHS:
            timesteps, run = StableDiffusionImg2ImgPipeline.get_timesteps(stub, n, strength, None)
            assert run_of(n, strength) == run == len(timesteps)
            if run:
                assert choose_steps(n, strength, "total", 1000) == n
    assert (run_of(50, 0.58), run_of(100, 0.29), run_of(50, 1.0)) == (28, 28, 50)  # 0.58 of 50 would be 29


def test_actual_steps_are_run_to_the_last_of_them_and_no_table_is_longer_than_need_be():
    for n in range(1, 61):
        for strength in STRENGTHS:
            rows = choose_steps(n, strength, "actual", 10**6)
            assert run_of(rows, strength) == n and run_of(rows - 1, strength) < n
            assert n <= rows <= n / Fraction(strength) + 2
    assert choose_steps(10, 0, "actual", 1000) == choose_steps(10, 0.0, "total", 1000) == 10


@pytest.mark.parametrize("steps_are", ["total", "actual"])
@pytest.mark.parametrize("n, strength", [(5, 0.3), (7, 0.58), (10, 0.1), (4, 1.0), (21, 0.35), (3, 0.0), (1, 1)])
def test_as_many_steps_are_yielded_as_strength_says(pipe, n, strength, steps_are):
    options = {"image": P, "strength": strength, "steps": n, "steps_are": steps_are, "sampler": "ddim", "guidance": 1}
    run = pipe.prepare(PROMPT, **options)
    wanted = int(n * strength) if steps_are == "total" else n * (strength > 0)
    steps = list(run.steps())
    assert len(steps) == len(run) == wanted
    assert [step.i for step in steps] == list(range(len(run.schedule) - wanted, len(run.schedule)))
    assert run.settings.strength == strength and run.settings.steps == len(run.schedule)


def test_strength_that_leaves_no_step_is_refused_and_the_one_named_is_the_smallest_that_works():
    for n in [*range(1, 400), 600, 999, 1000]:
        for strength in (1e-9, 0.5 / n, 0.999999 / n):
            with pytest.raises(LDMError, match=r"less than one step: [\d.]+ is the smallest that works, or 0") as error:
                choose_steps(n, strength, "total", 1000)
            least = float(re.search(r"step: ([\d.]+) is", str(error.value))[1])
            assert run_of(n, least) >= 1 and choose_steps(n, least, "total", 1000) == n
            assert run_of(n, least - 0.001) == 0, "of three digits, none smaller works"


def test_the_strength_named_in_the_sentence_draws_a_picture(pipe):
    with pytest.raises(LDMError, match=r"Strength 0\.1 of 7 steps") as error:
        pipe(PROMPT, image=P, strength=0.1, steps=7)
    least = float(re.search(r"([\d.]+) is the smallest", str(error.value))[1])
    assert len(pipe.prepare(PROMPT, image=P, strength=least, steps=7)) == 1
    assert pipe(PROMPT, image=P, strength=0.1, steps=1, steps_are="actual", sampler="ddim").x0.isfinite().all()


@pytest.mark.parametrize("strength", [0.01, 1e-6, 1e-300, 5e-324])
def test_actual_steps_that_the_schedule_has_no_room_for_are_refused(strength):
    with pytest.raises(LDMError, match="at most 1000: take fewer steps or more strength"):
        choose_steps(50, strength, "actual", 1000)
    assert choose_steps(10, 0.01, "actual", 1000) == 1000


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m", "unipc2", "euler-a"])
def test_strength_0_returns_the_encoded_picture_bit_for_bit(pipe, sampler, masked):
    mask = BOX if masked else None
    result = pipe([PROMPT, OTHERS[0]], image=[P, Q], mask=mask, strength=0, steps=4, seed=5, sampler=sampler)
    x0, _ = encoded(pipe, [P, Q], [5, 6])
    assert torch.equal(result.x0, x0) and x0.abs().mean() > 0.1
    plain = pipe.decode(x0)
    if not masked:
        assert all(np.array_equal(a, b) for a, b in zip(result.images, plain, strict=True))
    else:
        for image, back, original in zip(result.images, plain, (P, Q), strict=True):
            assert np.array_equal(pixels(image), np.where(pixels(BOX)[..., None] > 0, pixels(back), pixels(original)))


def test_strength_0_returns_given_latents_as_they_are(pipe):
    x0 = normal(3, 1, 4, 3, 5)
    assert torch.equal(pipe(PROMPT, image=x0, strength=0, steps=3).x0, x0)


def test_a_run_begins_at_the_picture_with_the_noise_of_its_row(pipe):
    x0, eps = encoded(pipe, [P], [5])
    for strength, first in ((0.25, 6), (0.5, 4), (1.0, 0)):
        run = pipe.prepare(PROMPT, image=P, strength=strength, steps=8, seed=5, sampler="ddim")
        level = run.schedule[first]
        assert run.rows.start == first
        assert torch.equal(run.x, level.alpha * x0 + level.sigma * eps)


@scenes
def test_more_strength_leaves_less_of_the_picture(embedded):
    scene = draw(3)[0].image
    apart = []
    for strength in (0.0, 0.3, 0.6, 1.0):
        image = embedded("two trees at night", image=scene, strength=strength, steps=10, seed=1).images[0]
        apart.append(np.abs(pixels(image) - pixels(scene)).mean())
    assert apart[0] < 6 and all(b > a + 2 for a, b in pairwise(apart)), apart


# ------------------------------------------------------------------------------------------------ masks


@every_method
def test_a_mask_of_zeros_keeps_the_encoded_picture_exactly(pipe, sampler):
    """Through the closure: a mask without white is refused as a picture."""
    run = pipe.prepare(PROMPT, image=P, strength=0.8, steps=6, seed=5, sampler=sampler)
    x0, eps = encoded(pipe, [P], [5])
    kept = replace(run, sampler=tasks.blended(run.sampler, x0, eps, torch.zeros(1, 1, 4, 6)))
    steps = list(kept.steps())
    for step in steps[:-1]:
        assert torch.equal(step.x, step.next.alpha * x0 + step.next.sigma * eps)
    assert torch.equal(steps[-1].x, x0) and len(steps) == 4
    assert not torch.equal(list(run.steps())[-1].x, x0)


@pytest.mark.parametrize("sampler", SILENT)
def test_a_mask_of_ones_equals_plain_generation_from_the_same_noise_bit_for_bit(pipe, sampler):
    options = {"steps": 6, "sampler": sampler, "latents": normal(4, 2, 4, 4, 6), "width": W, "height": H}
    plain = pipe([PROMPT, OTHERS[0]], **options)
    masked = pipe([PROMPT, OTHERS[0]], image=P, mask=Image.new("L", (W, H), 255), **options)
    assert torch.equal(masked.x0, plain.x0) and plain.x0.abs().mean() > 0.1
    assert all(np.array_equal(a, b) for a, b in zip(masked.images, plain.images, strict=True))
    assert masked.changed == (0.0, 0.0)


@every_method
def test_what_the_mask_keeps_is_the_encoded_picture_bit_for_bit(pipe, sampler):
    result = pipe(PROMPT, image=P, mask=BOX, strength=0.7, steps=5, seed=5, sampler=sampler)
    x0, _ = encoded(pipe, [P], [5])
    inside = pictures.latent_mask(pictures.mask_tensor([BOX]), 8).bool()[0, 0]
    assert torch.equal(result.x0[..., ~inside], x0[..., ~inside])
    assert (result.x0 - x0)[..., inside].abs().mean() > 0.05 and 0 < inside.sum() < inside.numel()


@pytest.mark.parametrize("sampler", ["dpm++2m", "unipc2", "lms", "deis2", "plms"])
def test_a_blend_is_no_edit_so_that_multistep_methods_keep_their_past_and_a_user_s_edit_still_is_one(pipe, sampler):
    options = {"image": P, "mask": BOX, "strength": 1.0, "steps": 6, "seed": 5, "sampler": sampler}
    run = pipe.prepare(PROMPT, **options)
    steps = list(run.steps())
    assert not any(step.edited for step in steps)
    x0, eps = encoded(pipe, [P], [5])
    mask = pictures.latent_mask(pictures.mask_tensor([BOX]), 8)
    unblended = pipe.sampler(run.settings)
    seen = []
    for step in replace(run, sampler=unblended).steps():  # the same by hand, in the loop: there it is an edit
        step.x = mask * step.x + (1 - mask) * tasks.at_row(run.schedule, step.i + 1, x0, eps)
        assert step.edited
        seen.append(step.x)
    assert torch.equal(seen[0], steps[0].x)
    assert (seen[-1] - steps[-1].x).abs().max() > 1e-3, "the method went on without its past"
    for step in run.steps():  # and a user's edit of a blended run
        if step.i == 2:
            step.x = step.x.clone()
            assert step.edited
        last = step.x
    assert (last - steps[-1].x).abs().max() > 1e-3


@every_method
@pytest.mark.parametrize("how", ["image", "mask"])
def test_runs_from_pictures_pause_go_on_and_fork_with_the_same_bits(pipe, sampler, how):
    options = {"image": [P, Q], "strength": 0.8, "steps": 6, "seed": 5, "sampler": sampler, "guidance": 2.0}
    options |= {"mask": BOX} if how == "mask" else {}
    prompts = [PROMPT, OTHERS[0]]
    steps = list(pipe.steps(prompts, **options))
    assert len(steps) == 4
    for k in (1, 3):
        rest = list(pipe.steps(prompts, after=steps[:k], **options))
        assert [step.i for step in rest] == [step.i for step in steps[k:]]
        assert all(torch.equal(a.x, b.x) for a, b in zip(rest, steps[k:], strict=True))
    assert torch.equal(pipe(prompts, after=steps[:2], **options).x0, steps[-1].x)
    fork = list(pipe.steps(prompts, after=[*steps[:1], replace(steps[1], x=1.1 * steps[1].x)], **options))
    assert not torch.equal(fork[-1].x, steps[-1].x)


def test_pictures_drawn_alone_equal_those_of_a_batch(pipe):
    options = {"image": [P, Q], "mask": [BOX, box_mask(W, H, 0, 0, 20, 20)], "strength": 0.7, "steps": 4, "seed": 5}
    batch, alone = (pipe([PROMPT, OTHERS[0]], one_by_one=one, **options) for one in (False, True))
    assert_close(alone.x0, batch.x0, 1e-5 * batch.x0.abs().max().item())
    second = pipe(OTHERS[0], **options | {"image": Q, "mask": options["mask"][1], "seed": 6})
    assert torch.equal(second.x0, alone.x0[1:]) and alone.changed == pytest.approx(batch.changed, rel=1e-3)
    assert second.changed == alone.changed[1:] and alone.settings.seeds == (5, 6)
    outside = [pixels(mask) == 0 for mask in options["mask"]]
    for result in (alone, batch):  # each with the pixels of its own picture, outside its own mask
        for image, own, kept in zip(result.images, (P, Q), outside, strict=True):
            assert np.array_equal(pixels(image)[kept], pixels(own)[kept])
            assert (pixels(image) != pixels(own)).any(2)[~kept].mean() > 0.9


def test_one_by_one_takes_of_latents_and_depths_each_picture_s_own(pipe, task_models):
    prompts, depth = [PROMPT, OTHERS[0]], normal(1, 2, 8, 12).cumsum(2)
    depth_model, latents = task_models.ours("depth"), normal(3, 2, 4, 4, 6)
    two_rows = normal(2, 2, 12).cumsum(1)  # of one depth, for all
    for model, options in (
        (pipe, {"image": latents}),
        (pipe, {"image": latents[:1]}),
        (depth_model, {"image": [P, Q], "depth": depth}),
        (depth_model, {"image": P, "depth": [depth[0], depth[1]]}),
        (depth_model, {"image": P, "depth": two_rows}),
    ):
        options |= {"steps": 2, "strength": 1.0, "seed": 5}
        batch, alone = (model(prompts, one_by_one=one, **options).x0 for one in (False, True))
        assert_close(alone, batch, 1e-5 * batch.abs().max().item())


def test_a_line_of_one_pixel_survives_and_is_lost_as_in_diffusers():
    for place in (1, 7, 12, 30):
        mask = torch.zeros(1, 1, H, W)
        mask[..., place] = 1
        found = pictures.latent_mask(mask, 8)
        assert found[0, 0, :, place // 8].all() and found.sum() == H // 8
        assert pictures.latent_mask(mask, 8, nearest=True).sum() == 0
        corner = torch.zeros(1, 1, H, W)
        corner[..., 8 * (place // 8)] = 1
        assert torch.equal(pictures.latent_mask(corner, 8, nearest=True), found)


def test_by_default_a_thin_line_is_drawn_and_under_compat_nothing_is(pipe):
    line = box_mask(W, H, 19, 0, 20, H)
    x0, _ = encoded(pipe, [P], [5])
    options = {"image": P, "mask": line, "strength": 0.7, "steps": 4, "seed": 5, "sampler": "ddim"}
    changed = (pipe(PROMPT, **options).x0 != x0).any(1)[0]
    assert changed[:, 2].all() and changed.sum() == 4
    assert torch.equal(pipe(PROMPT, compat=True, **options).x0, x0)


@pytest.mark.parametrize("size", [(48, 32), (50, 37), (41, 64), (24, 24)])
@pytest.mark.parametrize("kind", ["noise", "grey", "box", "line", "but one pixel"])
def test_outside_the_mask_the_picture_is_bit_identical(pipe, size, kind):
    """At the size that is drawn: of a picture that had to be resized, the resized pixels."""
    rng, (w, h) = np.random.default_rng(7), size
    mask = {
        "noise": Image.fromarray(255 * rng.integers(0, 2, (h, w), dtype=np.uint8)),
        "grey": Image.fromarray(rng.integers(0, 256, (h, w), dtype=np.uint8)),
        "box": box_mask(w, h, 3, 5, 22, 20),
        "line": box_mask(w, h, 0, 9, w, 12),
        "but one pixel": box_mask(w, h, 0, 0, w, h - 1),
    }[kind]
    image, drawn = picture(3, w, h), (w // 8 * 8, h // 8 * 8)
    options = {"image": image, "mask": mask, "strength": 0.6, "steps": 3, "seed": 5}
    result = pipe(PROMPT, **options)
    loose = pipe(PROMPT, paste=False, **options)
    own = pixels(image.resize(drawn, Image.Resampling.LANCZOS))
    outside = pixels(mask.resize(drawn, Image.Resampling.LANCZOS)) < 128
    a, b = pixels(result.images[0]), pixels(loose.images[0])
    assert result.images[0].size == drawn and 0 < outside.sum() < outside.size
    assert np.array_equal(a[outside], own[outside]) and np.array_equal(a[~outside], b[~outside])
    apart = np.abs(b - own)[outside].mean()
    assert apart > 5 and result.changed == pytest.approx((apart,), rel=1e-12) and loose.changed == ()


def test_changed_outside_is_the_mean_of_grey_levels_where_the_mask_is_black():
    a, b = Image.new("RGB", (4, 2), (10, 20, 30)), Image.new("RGB", (4, 2), (10, 20, 30))
    mask = box_mask(4, 2, 0, 0, 2, 2)
    assert pictures.changed_outside(a, b, mask) == 0
    b.putpixel((0, 0), (255, 255, 255))  # inside
    assert pictures.changed_outside(a, b, mask) == 0
    b.putpixel((3, 1), (16, 17, 33))  # one of four outside, by 6 + 3 + 3
    assert pictures.changed_outside(a, b, mask) == 1.0
    assert pictures.changed_outside(a, b, Image.new("L", (4, 2), 255)) == 0.0
    assert pictures.changed_outside(a, b, Image.new("L", (4, 2), 127)) == pytest.approx((245 + 235 + 225 + 12) / 24)


# ------------------------------------------------------------------------------------------------ sizes, outpainting


@pytest.mark.parametrize(
    "given, drawn",
    [((48, 32), (48, 32)), ((50, 37), (48, 32)), ((5, 7), (8, 8)), ((63, 8), (56, 8)), ((128, 128), (128, 128)),
     ((256, 64), (256, 64))],
)  # fmt: skip
def test_a_picture_is_drawn_at_its_own_size_in_multiples_of_8(given, drawn, capsys):
    assert pictures.choose_size(*given, 64, 8) == drawn
    w, h = drawn
    resized = f"The picture has {given[0]}x{given[1]} pixels: drawn at {w}x{h}, multiples of 8; "
    assert capsys.readouterr().err.startswith(resized) if given != drawn else capsys.readouterr().err == ""


def test_large_pictures_are_drawn_smaller_in_their_proportions_and_it_is_said(capsys):
    for given in ((640, 480), (129, 128), (1000, 300), (300, 900)):
        width, height = pictures.choose_size(*given, 64, 8)
        said = capsys.readouterr().err
        assert f"{given[0]}x{given[1]} pixels, many for a model of 64x64: drawn at {width}x{height}, mult" in said
        assert width % 8 == height % 8 == 0 and 0.6 * 64**2 <= width * height <= 64**2
        assert abs(width / height / (given[0] / given[1]) - 1) < 8 / min(width, height)


@pytest.mark.parametrize("factor", [4, 8])
def test_a_side_left_open_keeps_the_picture_s_proportions(factor):
    assert pictures.complete(None, None, None, factor) == (None, None)
    assert pictures.complete(96, None, None, factor) == (96, None)
    for own in ((48, 32), (32, 48), (64, 64), (40, 24), (640, 480)):
        assert pictures.complete(None, None, own, factor) == own
        assert pictures.complete(16, 24, own, factor) == (16, 24)
        for asked in (8, 40, 96, 128):
            width, height = pictures.complete(asked, None, own, factor)
            assert width == asked and height % factor == 0 and height >= factor
            assert abs(height - asked * own[1] / own[0]) <= factor / 2 or height == factor
            assert pictures.complete(None, asked, own[::-1], factor) == (height, asked)
    assert pictures.complete(96, None, (48, 32), 8) == (96, 64) and pictures.complete(8, None, (640, 64), 8) == (8, 8)
    assert pictures.complete(20, None, (48, 32), 8) == (20, 16)  # which `settings` then refuses


def test_the_size_drawn_is_the_picture_s_or_what_is_asked_for_in_its_proportions(pipe, task_models):
    def drawn(pipe, **options):
        settings = pipe.prepare(PROMPT, steps=2, **options).settings
        return settings.width, settings.height

    assert pipe.prepare(PROMPT, image=P).settings.strength == 0.8
    assert pipe.prepare(PROMPT, image=P, mask=BOX).settings.strength == 1.0 and pipe.prepare(PROMPT).rows.start == 0
    assert drawn(pipe) == (64, 64) and drawn(pipe, width=16) == (16, 64)
    assert drawn(pipe, image=picture(1, 50, 37)) == (48, 32)
    assert drawn(pipe, image=P, width=96) == (96, 64) and drawn(pipe, image=P, height=64) == (96, 64)
    assert drawn(pipe, image=LATENTS, width=48) == (48, 32) and drawn(pipe, image=LATENTS) == (48, 32)
    led = (40, 24)
    for options, size in (({}, (40, 24)), ({"width": 80}, (80, 48)), ({"image": [P], "width": 96}, (96, 64))):
        sizes = tasks.choose_sizes(pipe.model, options.pop("image", None), None, led, **options)
        assert (sizes["width"], sizes["height"]) == size
    control = ldm.Control(ControlNet.from_unet(pipe.unet), picture(1, 40, 24))
    assert (
        drawn(pipe, control=control) == (40, 24) and drawn(pipe, control=[control], image=P.resize((80, 48)))[0] == 80
    )
    assert drawn(task_models.ours("upscale"), image=picture(1, 9, 6)) == (36, 24)
    assert drawn(task_models.ours("upscale"), image=picture(1, 9, 6), width=72) == (72, 48)


def test_pictures_are_fitted_by_lanczos_and_never_distorted():
    image = picture(1, 100, 75)
    assert pictures.fit(image, 100, 75) is image
    fitted = pictures.fit(image, 48, 32)
    assert fitted.size == (48, 32)
    assert np.array_equal(fitted, image.resize((48, 32), Image.Resampling.LANCZOS))
    assert pictures.fit(image, 200, 144).size == (200, 144)
    for width, height in ((48, 48), (100, 50), (75, 100), (200, 100)):
        with pytest.raises(LDMError, match=f"100x75 pixels, and {width}x{height} are to be drawn.*distort"):
            pictures.fit(image, width, height)


@pytest.mark.parametrize("sides", [(8, 0, 0, 0), (0, 16, 0, 0), (8, 8, 16, 24), (3, 5, 5, 3)])
def test_extended_pictures_hold_the_picture_and_its_border_and_the_mask_is_the_room(sides):
    left, top, right, bottom = sides
    wide, mask = pictures.extend(P, *sides)
    assert wide.size == mask.size == (W + left + right, H + top + bottom)
    inner = (slice(top, top + H), slice(left, left + W))
    assert np.array_equal(pixels(wide)[inner], pixels(P)) and not pixels(mask)[inner].any()
    assert (pixels(mask) == 255).sum() == wide.width * wide.height - W * H
    assert np.array_equal(pixels(wide)[:top, left : left + W], np.repeat(pixels(P)[:1], top, axis=0))
    assert np.array_equal(pixels(wide)[top : top + H, :left], np.repeat(pixels(P)[:, :1], left, axis=1))


@scenes
def test_outpainting_draws_the_room_and_nothing_else(embedded):
    scene = Image.fromarray(draw(3)[0].image).resize((96, 96))
    wide, mask = pictures.extend(scene, 32, 0, 0, 16)
    result = embedded("a house on snow", image=wide, mask=mask, steps=6, seed=1)
    found = pixels(result.images[0])
    assert found.shape == (112, 128, 3) and np.array_equal(found[:96, 32:], pixels(scene))
    assert np.abs(found - pixels(wide))[:, :32].mean() > 3 and 0 < result.changed[0] < 12


def test_depths_are_stretched_each_to_its_own_range_at_the_latent_s_size():
    depth = torch.stack([normal(1, 21, 30).cumsum(1), 500 + 3 * normal(2, 21, 30).cumsum(0)])
    found = pictures.depth_tensor(depth, 4, 6)
    assert found.shape == (2, 1, 4, 6)
    assert torch.equal(found.amin((1, 2, 3)), -torch.ones(2)) and torch.equal(found.amax((1, 2, 3)), torch.ones(2))
    for own, alone in zip(found, depth, strict=True):
        assert_close(pictures.depth_tensor(7 * alone - 100, 4, 6)[0], own, 1e-3)  # of any scale
    assert torch.equal(pictures.depth_tensor(depth.numpy(), 4, 6), found)
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
    of_picture = pictures.depth_tensor(Image.fromarray(ramp), 2, 3)
    assert (of_picture[0, 0, :, 1:] > of_picture[0, 0, :, :-1]).all()  # larger is nearer, as it was


def test_depth_to_image_takes_depths_in_every_form(task_models):
    depth_model, depth = task_models.ours("depth"), normal(1, 2, 8, 12).cumsum(2)
    prompts, options = [PROMPT, OTHERS[0]], {"image": P, "steps": 3, "strength": 1.0}
    whole = depth_model(prompts, depth=depth, **options).x0
    for same in (depth.numpy(), [depth[0], depth[1]], [depth[0].numpy(), depth[1].numpy()]):
        assert torch.equal(depth_model(prompts, depth=same, **options).x0, whole)
    for_all = depth_model(prompts, depth=depth[0], **options).x0
    assert torch.equal(for_all[0], whole[0]) and (for_all[1] - whole[1]).abs().max() > 1e-3


def test_without_a_depth_the_model_s_own_estimator_tells_that_of_each_picture(task_models, tmp_path, monkeypatch):
    known, asked = {P.tobytes(): normal(1, 8, 12), Q.tobytes(): normal(2, 8, 12)}, []

    def predict(image, folder):
        asked.append(folder)
        return known[image.tobytes()]

    monkeypatch.setattr(conditions, "predict_depth", predict)
    whole = task_models.ours("depth")
    parts = (whole.tokenizer, whole.text_encoder, whole.unet, whole.vae, whole.scheduler, whole.defaults)
    prompts, options = [PROMPT, OTHERS[0]], {"image": [P, Q], "steps": 2, "strength": 1.0}
    for folder in (None, tmp_path):
        with pytest.raises(LDMError, match="keeps the depth of the picture, and there is no depth_estimator in its"):
            Pipeline(*parts, folder).prepare(prompts, **options)
    (tmp_path / "depth_estimator").mkdir()
    pipe = Pipeline(*parts, tmp_path)
    given = pipe(prompts, depth=[known[P.tobytes()], known[Q.tobytes()]], **options).x0
    assert asked == [] and torch.equal(pipe(prompts, **options).x0, given)
    assert asked == [tmp_path / "depth_estimator"] * 2
    with pytest.raises(LDMError, match="pass it as depth"):
        pipe.prepare(PROMPT, image=LATENTS, steps=2)  # of latents nobody tells a depth


# ------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize("size, overlap", [(4, 1), (16, 4), (5, 4), (8, 0), (7, 3)])
def test_windows_cover_every_position_and_share_their_overlap(size, overlap):
    for length in range(1, 60):
        found = starts(length, size, overlap)
        if length <= size:
            assert found == [0]
            continue
        assert found[0] == 0 and found[-1] == length - size and len(set(found)) == len(found)
        assert all(b - a <= size - overlap for a, b in pairwise(found))
        assert len(found) == 1 + -(-(length - size) // (size - overlap)), "no window more than needed"
    weights = ramp(size, overlap)
    assert weights.min() > 0 and weights.max() == (1 if size >= 2 * overlap + 1 else weights[size // 2])
    assert torch.equal(weights, weights.flip(0))


@pytest.mark.parametrize("h, w", [(9, 33), (40, 8), (17, 16), (8, 25)])
@pytest.mark.parametrize("size, overlap", [(8, 2), (16, 4), (5, 0)])
def test_a_function_of_single_positions_in_tiles_equals_the_whole(h, w, size, overlap):
    x = normal(1, 2, 3, h, w, dtype=torch.float64)
    assert_close(in_tiles(lambda v: v.sin() + v**2, x, size, overlap), x.sin() + x**2, 1e-12)
    grown = in_tiles(lambda v: v.repeat_interleave(4, 2).repeat_interleave(4, 3), x, size, overlap, factor=4)
    assert_close(grown, x.repeat_interleave(4, 2).repeat_interleave(4, 3), 1e-12)


def test_a_convolution_in_tiles_differs_beside_the_windows_borders_alone():
    x, kernel = normal(1, 1, 2, 20, 44, dtype=torch.float64), normal(2, 3, 2, 3, 3, dtype=torch.float64)
    whole = torch.nn.functional.conv2d(x, kernel, padding=1)
    found = in_tiles(lambda v: torch.nn.functional.conv2d(v, kernel, padding=1), x, 16, 4)
    near = torch.zeros(20, 44, dtype=torch.bool)
    for top in starts(20, 16, 4):
        near[[y for y in (top, top + 15) if 0 < y < 19]] = True
    for left in starts(44, 16, 4):
        near[:, [c for c in (left, left + 15) if 0 < c < 43]] = True
    apart = (found - whole).abs().amax((0, 1))
    assert apart[~near].max() < 1e-12 and apart[near].max() > 1e-2
    # There a window's own weight is the smallest, 1/5 of 1 + 1/5 or more: so is its mistake.
    cut = in_tiles(lambda v: torch.nn.functional.conv2d(v, kernel, padding=1), x, 16, 0)
    assert apart.max() < 0.5 * (cut - whole).abs().max()


def test_what_fits_one_window_is_one_call_and_exactly_the_function_s():
    calls = []

    def function(v):
        calls.append(v)
        return v / 3

    x = normal(1, 1, 1, 16, 12)
    assert torch.equal(in_tiles(function, x, 16, 4), x / 3) and len(calls) == 1 and calls[0] is x
    calls.clear()
    in_tiles(function, normal(1, 1, 1, 17, 12), 16, 4)
    assert [tuple(call.shape[2:]) for call in calls] == [(16, 12)] * 2


@scenes
def test_a_picture_decoded_in_tiles_shows_no_seam(embedded):
    """256 x 384 in tiles of 128, the model's own size: how far it is from the whole, and how it steps at the joints."""
    scene = Image.fromarray(draw(3)[0].image).resize((384, 256), Image.Resampling.BICUBIC)
    with torch.no_grad():
        x0 = embedded.vae.encode(pictures.image_tensor([scene]))
        whole, tiled = (pixels(embedded.decode(x0, tile=tile)[0]).astype(float) for tile in (0, 128))
        cut = in_tiles(embedded.vae.decode, x0, 16, 0, 8)[0].permute(1, 2, 0).clamp(-1, 1).numpy() * 127.5 + 127.5
    assert whole.shape == (256, 384, 3) and whole.std() > 20
    apart = np.abs(tiled - whole)
    assert 0 < apart.mean() < 2 and np.quantile(apart, 0.999) < 15, (apart.mean(), np.quantile(apart, 0.999))

    def across(found, edges):
        """How much it steps from column to column: at these edges, and elsewhere."""
        steps = np.abs(np.diff(found, axis=1)).mean((0, 2))
        at = [8 * edge - 1 for edge in edges]
        return steps[at].mean(), np.delete(steps, at).mean()

    joints = sorted({edge for left in starts(48, 16, 4) for edge in (left, left + 16)} - {0, 48})
    there, elsewhere = across(tiled - whole, joints)
    assert there < 1 and there < 2 * elsewhere  # of 255: what tiles add steps at joints by less than a grey level
    there, elsewhere = across(tiled, joints)
    assert there < 1.5 * elsewhere and there < across(whole, joints)[0] + 0.5
    hard, _ = across(cut - whole, (16, 32))
    assert hard > 3 * there, "the yardstick: without an overlap one sees the seams"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_upscaler_s_run_in_tiles_is_near_the_whole(task_models, guidance):
    """Of drawn parameters, whose normalisation over the tile is felt most. Seen: 0.25 of the latents' spread.

    One tile is the whole, bit for bit; and the tiled run is no other picture.
    """
    pipe = task_models.ours("upscale")
    options = {"image": picture(3, 24, 16), "steps": 4, "seed": 5, "sampler": "ddim", "guidance": guidance}
    whole, default, one, tiled = (pipe(PROMPT, **options, **t) for t in ({"tile": 0}, {}, {"tile": 96}, {"tile": 64}))
    assert torch.equal(whole.x0, default.x0) and torch.equal(whole.x0, one.x0)
    assert np.array_equal(whole.images[0], one.images[0]) and np.array_equal(whole.images[0], default.images[0])
    assert whole.images[0].size == tiled.images[0].size == (96, 64)
    assert np.array_equal(tiled.images[0], pipe.decode(tiled.x0, tile=64)[0])  # drawn in tiles, decoded in them
    assert not np.array_equal(tiled.images[0], pipe.decode(tiled.x0)[0])
    near = ((tiled.x0 - whole.x0).square().mean().sqrt() / whole.x0.std()).item()
    assert 0.01 < near < 0.35
    assert np.corrcoef(tiled.x0.flatten(), whole.x0.flatten())[0, 1] > 0.9


def test_an_upscaler_alone_draws_in_tiles_by_itself_and_0_forbids_it(task_models, pipe, monkeypatch):
    monkeypatch.setattr("ldm.pipeline.TILE", 64)
    for model, own in ((task_models.ours("upscale"), 64), (pipe, 0)):
        options = {"image": picture(3, 24, 16) if own else picture(3, 96, 64), "steps": 2, "guidance": 1}
        default, *others = (model(PROMPT, **options, **t).x0 for t in ({}, {"tile": 64}, {"tile": 0}))
        assert [torch.equal(default, other) for other in others] == [own == 64, own == 0]


def test_every_picture_of_whatever_size_is_upscaled_four_times(task_models):
    pipe = task_models.ours("upscale")
    for size in ((13, 11), (3, 1), (8, 12)):
        result = pipe(PROMPT, image=picture(1, *size), steps=2, guidance=1)
        assert result.images[0].size == (4 * size[0], 4 * size[1]) and result.settings.noise_level == 20
        assert result.x0.shape == (1, 4, size[1], size[0])


# ------------------------------------------------------------------------------------------------ hi-res fix


def test_latents_are_enlarged_and_refined_by_the_strength(pipe):
    small = pipe([PROMPT, OTHERS[0]], width=W, height=H, steps=4, sampler="ddim")
    large = pipe.enlarge(small.x0, 2)
    assert large.shape == (2, 4, 8, 12) and torch.equal(large, pictures.enlarge(small.x0, 8, 12))
    assert_close(pictures.enlarge(torch.full((1, 4, 5, 5), 0.7), 9, 13), torch.full((1, 4, 9, 13), 0.7), 1e-6)
    assert_close(torch.nn.functional.avg_pool2d(large, 2), small.x0, small.x0.abs().max().item(), at_least=0.1)
    ramp = pictures.enlarge(torch.arange(8.0).expand(1, 4, 8, 8), 16, 24)[..., 6:-6]
    assert_close(ramp.diff(dim=3), torch.full((1, 4, 16, 11), 1 / 3), 1e-5)  # between positions, not their repetition
    correlation = np.corrcoef(torch.nn.functional.avg_pool2d(large, 2).flatten(), small.x0.flatten())[0, 1]
    assert correlation > 0.9
    run = pipe.prepare([PROMPT, OTHERS[0]], image=large, strength=0.6, steps=5, seed=5, sampler="ddim")
    level, eps = run.schedule[2], Noise.from_seeds([5, 6])(large)
    assert len(run) == 3 and torch.equal(run.x, level.alpha * large + level.sigma * eps)
    result = pipe([PROMPT, OTHERS[0]], image=large, strength=0.6, steps=5, seed=5, sampler="ddim")
    assert [image.size for image in result.images] == [(96, 64)] * 2 and result.settings.width == 96
    assert pipe.enlarge(small.x0, 1.4).shape == (2, 4, 6, 8) and pipe.enlarge(small.x0, 1).shape == small.x0.shape
    for factor in (0, 0.5, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(LDMError, match="factor of an enlargement must be a number of 1 or more, not"):
            pipe.enlarge(small.x0, factor)


# ------------------------------------------------------------------------------------------------ inversion


@scenes
@pytest.mark.parametrize("seed, guidance", [(3, 3.0)])
def test_a_scene_inverted_and_drawn_again_is_the_scene(embedded, seed, guidance):
    """16 steps."""
    scene, options = draw(seed)[0].image, {"steps": 16, "guidance": guidance}
    x0 = embedded.prepare("a house", image=scene, strength=0.0, sampler="ddim", **options).x
    shown, off = pixels(embedded.decode(x0)[0]), {}
    for refine in (0, 5):
        noise = embedded.invert(scene, "a house", refine=refine, **options)
        assert noise.shape == x0.shape and 0.7 < noise.std() < 1.6
        back = embedded("a house", latents=noise, sampler="ddim", **options)
        off[refine] = ((back.x0 - x0).square().mean().sqrt() / x0.square().mean().sqrt()).item()
        if refine:
            assert np.abs(pixels(back.images[0]) - shown).mean() < 0.1
    assert off[5] < 1e-2 and off[0] > 20 * off[5], off


@scenes
def test_an_inverted_scene_drawn_with_other_words_is_its_relative(embedded):
    scene, options = draw(3)[0].image, {"steps": 10, "guidance": 1.0}
    noise = embedded.invert(scene, "a house", **options)
    other = embedded("a fish at night", latents=noise, sampler="ddim", **options).images[0]
    chance = embedded("a fish at night", seed=1, sampler="ddim", **options).images[0]
    apart = [np.abs(pixels(image) - pixels(scene)).mean() for image in (other, chance)]
    assert 1 < apart[0] < 0.7 * apart[1], apart


@pytest.mark.parametrize("name, guidance, n, refine", [("sd1", 1.0, 20, 17), ("sd2", 1.5, 8, 12)])
def test_inversion_of_both_predictions_leads_back(models, name, guidance, n, refine):
    """In float64, refined until it stands still: DDIM is undone, of epsilon and of v."""
    pipe = models.ours(name, torch.float64)
    options = {"steps": n, "guidance": guidance, "seed": 5}
    x0 = pipe.prepare(PROMPT, image=P, strength=0.0, sampler="ddim", **options).x
    run = pipe.prepare_inversion(P, PROMPT, refine=refine, **options)
    assert torch.equal(run.x, x0) and len(run) == n
    steps = list(run.steps())
    assert [step.next.sigma for step in steps] == sorted(step.next.sigma for step in steps)
    back = pipe(PROMPT, latents=steps[-1].x / run.schedule.start_scale, width=W, height=H, sampler="ddim", **options).x0
    assert_close(back, x0, 1e-3 * x0.abs().max().item())
    rough = list(pipe.prepare_inversion(P, PROMPT, refine=0, **options).steps())[-1].x
    assert torch.equal(pipe.invert(P, PROMPT, refine=0, **options), rough)
    assert (rough - steps[-1].x).abs().max() > 1e-2


def test_inversion_tells_the_network_where_the_latent_stands_and_steps_as_ddim_does(pipe):
    schedule, asked = pipe.schedule(6).upwards(), []

    def denoise(x, level):
        asked.append(level)
        return Prediction(x.sin(), x.cos(), x, x)

    x, level, after = normal(1, 1, 4, 2, 2), *schedule.step(2)
    rough = ddim_inverse(denoise, x, schedule, 2, [], None, refine=0)
    assert asked == [level] and torch.equal(rough.x, after.alpha * x.sin() + after.sigma * x.cos())
    asked.clear()
    once = ddim_inverse(denoise, x, schedule, 2, [], None, refine=1)
    assert asked == [level, after] and (once.level, once.next) == (level, after)
    eps = rough.x.cos()
    x0 = (x - level.sigma * eps) / level.alpha
    assert_close(once.x, after.alpha * x0 + after.sigma * eps, 1e-6)
    assert_close(torch.cat([once.x0, once.eps]), torch.cat([x0, eps]), 1e-6)


def test_inverted_noise_is_of_unit_variance_whatever_the_rule_s_scale(pipe):
    """As `latents` are read: a run by the rule of Euler's sampler multiplies them by its first level's sigma."""
    scheduler = replace(pipe.scheduler, timestep_spacing="linspace")
    pipe = Pipeline(pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae, scheduler, pipe.defaults)
    options = {"steps": 4, "rule": "euler"}
    run = pipe.prepare_inversion(P, PROMPT, **options)
    assert run.schedule.start_scale != 1 and run.settings.guidance == 1 and run.settings.strength is None
    *_, last = run.steps()
    noise = pipe.invert(P, PROMPT, **options)
    assert torch.equal(noise, last.x / run.schedule.start_scale)
    drawn = pipe.prepare(PROMPT, latents=noise, sampler="ddim", guidance=1, width=W, height=H, **options)
    assert_close(drawn.x, last.x, 1e-6)


@pytest.mark.parametrize("sampler, rule", [("ddim", None), ("euler", "euler"), ("dpm++2m", "dpm"), ("heun", "heun")])
def test_the_way_up_has_the_rows_of_the_way_down_reversed(pipe, sampler, rule):
    down = pipe.schedule(7, sampler=sampler, rule=rule)
    up = down.upwards()
    assert len(up) == 7 and up.rises and not down.rises
    assert [level[1:] for level in up.levels] == [level[1:] for level in down.levels[::-1]]
    assert [level.i for level in up.levels] == list(range(8))
    assert up.step(0) == (up[0], up[1]) and up[0].sigma < up[1].sigma
    again = up.upwards()
    assert again.levels == down.levels and not again.rises
    striding = pipe.schedule(7, sampler=sampler, rule=rule, compat=True)
    assert (striding.landings is not None) == (rule is None)
    up = striding.upwards()
    assert [up.step(i) for i in range(7)] == list(pairwise(up.levels))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"sampler": "euler"}, "Inversion walks DDIM's road from the whole picture: leave sampler out"),
        ({"sampler": "ddim"}, "leave sampler out"),
        ({"strength": 0.5}, "leave strength out"),
        ({"strength": 0.5, "sampler": "ddim"}, "leave sampler and strength out"),
        ({"refine": -1}, "refine must be a whole number of 0 or more, not -1"),
        ({"refine": 1.5}, "refine must be a whole number of 0 or more, not 1.5"),
        ({"refine": True}, "refine must be a whole number of 0 or more, not True"),
    ],
    ids=["euler", "ddim", "strength", "both", "below-0", "half", "true"],
)
def test_an_inversion_s_sampler_and_strength_are_its_own_and_refine_is_whole(pipe, options, sentence):
    for inverted in (pipe.invert, pipe.prepare_inversion):
        with pytest.raises(LDMError, match=sentence):
            inverted(P, PROMPT, steps=2, **options)


# ------------------------------------------------------------------------------------------------ what is refused

NAN, INF = float("nan"), float("inf")
BLACK = Image.new("L", (W, H), 0)
LATENTS = normal(1, 1, 4, 4, 6)
DEPTH = normal(2, 8, 12)
REFUSED = {  # what is asked of which model -> the sentence
    "no picture to edit": ("edit", {}, r"draws from the picture to change: pass it as image \(--image\)"),
    "no picture to upscale": ("upscale", {}, "draws from the small picture: pass it as image"),
    "no picture to keep the depth of": ("depth", {}, "draws from a picture, whose depth it keeps: pass it as image"),
    "no picture to fill": ("inpaint", {"mask": BOX}, "fills holes in a picture: pass image and mask"),
    "no hole to fill": ("inpaint", {"image": P}, "fills holes in a picture: pass image and mask"),
    "a mask alone": ("sd1", {"mask": BOX}, "A mask says what of a picture is drawn anew: pass the picture"),
    "a strength alone": ("sd1", {"strength": 0.5}, "strength says how much of a picture is drawn over"),
    "a strength to edit": ("edit", {"image": P, "strength": 0.5}, "no meaning here: a model to edit"),
    "a strength to upscale": ("upscale", {"image": P, "strength": 0.5}, "no meaning here: a model to upscale"),
    "a mask to upscale": ("upscale", {"image": P, "mask": BOX}, "an upscaler draws every pixel"),
    "more noise than an upscaler knows": ("upscale", {"image": P, "noise_level": 100}, "of 0 or more and below 100"),
    "a depth": ("sd1", {"image": P, "depth": DEPTH}, "reads no depth of its own .* a ControlNet may"),
    "no depth": ("depth", {"image": P}, r"keeps the depth of the picture.* pass it as depth \(--depth\)"),
    "a noise level": ("sd1", {"noise_level": 3}, "noise_level is given, which only a model to upscale"),
    "a noise level of none": ("sd1", {"noise_level": 0}, "noise_level is given, which only a model to upscale"),
    "a picture's guidance": ("sd1", {"image_guidance": 3}, "image_guidance is given, which only a model to edit"),
    "too much noise": ("upscale", {"image": P, "noise_level": 100}, "noise_level must be .* 0 or more and below 100"),
    "less noise than none": ("upscale", {"image": P, "noise_level": -1}, "noise_level must be a whole number"),
    "half a noise level": ("upscale", {"image": P, "noise_level": 0.5}, "noise_level must be a whole number"),
    "no number": ("edit", {"image": P, "image_guidance": NAN}, "image_guidance must be a finite number, not nan"),
    "infinite": ("edit", {"image": P, "image_guidance": INF}, "image_guidance must be a finite number, not inf"),
    "a tensor of a picture": ("sd1", {"image": torch.rand(1, 3, 8, 8)}, r"must be latents \(B, 4, h, w\); pass a pic"),
    "latents without a batch": ("sd1", {"image": LATENTS[0]}, r"tensor of shape \(4, 4, 6\): .* must be latents"),
    "latents to edit": ("edit", {"image": LATENTS}, "to edit pictures reads the picture itself"),
    "latents to upscale": ("upscale", {"image": LATENTS}, "to upscale pictures reads the picture itself"),
    "latents and a mask": ("sd1", {"image": LATENTS, "mask": BOX}, "latents have no pixels to keep"),
    "latents of three": ("sd1", {"image": LATENTS.expand(3, -1, -1, -1)}, "Latents of 3 pictures for 1 to be drawn"),
    "latents of a size": ("sd1", {"image": LATENTS, "width": 64}, r"are of 48x32 pixels, and 64x\d+ are to be drawn"),
    "latents with a hole": ("sd1", {"image": LATENTS * NAN}, "The image given hold numbers that are not finite"),
    "noise with a hole": ("sd1", {"image": P, "latents": LATENTS * INF}, "The latents given hold numbers that are no"),
    "noise of a size": ("sd1", {"image": P, "latents": LATENTS[..., 1:]}, r"latents of shape \(1, 4, 4, 5\) given"),
    "no pictures": ("sd1", {"image": []}, "image is an empty list"),
    "two for one": ("sd1", {"image": [P, Q]}, "2 pictures for 1 pictures to be drawn: give one for all, or one each"),
    "two masks for one": ("sd1", {"image": P, "mask": [BOX, BOX]}, "2 masks for 1 pictures to be drawn"),
    "two depths for one": ("depth", {"image": P, "depth": [DEPTH, DEPTH]}, "2 depths for 1 pictures to be drawn"),
    "three depths": ("depth", {"image": P, "depth": normal(1, 3, 8, 12)}, "3 depths for 1 pictures to be drawn"),
    "depths of no shape": ("depth", {"image": P, "depth": normal(1, 1, 1, 8, 12)}, r"shape \(H, W\) or \(B, H, W\), n"),
    "a depth with a hole": ("depth", {"image": P, "depth": DEPTH / 0}, "The depth must be finite numbers"),
    "a flat depth": ("depth", {"image": P, "depth": torch.full((8, 12), 0.7)}, "The depth is the same everywhere"),
    "a missing depth": ("depth", {"image": P, "depth": "nowhere.png"}, "nowhere.png does not exist"),
    "a missing picture": ("sd1", {"image": "nowhere.png"}, "nowhere.png does not exist: check the path"),
    "a missing mask": ("sd1", {"image": P, "mask": "nowhere.png"}, "nowhere.png does not exist: check the path"),
    "no picture at all": ("sd1", {"image": 3}, "image must be a path, a Pillow image or an array of uint8, not an int"),
    "a mask of another size": ("sd1", {"image": P, "mask": picture(1, W, H - 1)}, "48x31 pixels and the picture 48x32"),
    "an empty mask": ("sd1", {"image": P, "mask": BLACK}, "is empty: no pixel of it is white .128 or more"),
    "nearly white": ("inpaint", {"image": P, "mask": BLACK.point(lambda _: 127)}, "is empty: no pixel of it is white"),
    "a mask that gets lost": (
        "sd1",
        {"image": picture(1, 480, 320), "mask": box_mask(480, 320, 9, 9, 11, 11), "width": W, "height": H},
        "So little of the mask is white that nothing is left of it at 48x32",
    ),
    "a stretched picture": (
        "sd1",
        {"image": P, "width": 96, "height": 32},
        "that would distort it. Crop it, or ask for",
    ),
    "pictures of two shapes": ("sd1", {"image": [P, picture(1, H, W)], "count": 2}, "32x48 pixels, and 48x32 are to"),
    "a negative strength": ("sd1", {"image": P, "strength": -0.1}, "strength must be a number from 0 .* not -0.1"),
    "too much strength": ("sd1", {"image": P, "strength": 1.1}, "strength must be a number from 0 .* to 1 .* not 1.1"),
    "no strength": ("sd1", {"image": P, "strength": NAN}, "strength must be a number from 0 .* not nan"),
    "strength in words": ("sd1", {"image": P, "strength": "half"}, "strength must be a number from 0 .* not 'half'"),
    "hardly any strength": ("sd1", {"image": P, "strength": 0.1, "steps": 5}, "0.2 is the smallest that works"),
    "other steps": ("sd1", {"image": P, "steps_are": "many"}, "steps_are must be 'total' .* or 'actual' .* not 'many'"),
    "steps of nothing": ("sd1", {"steps_are": "actual"}, "steps_are speaks of the steps run from a given picture"),
    "no room": (
        "sd1",
        {"image": P, "strength": 0.01, "steps": 50, "steps_are": "actual"},
        "the last of 5000, and this",
    ),
    "a tile too small": ("upscale", {"image": P, "tile": 15}, "A tile of 15 pixels is too small: 16 is the smallest"),
    "a tile below 0": ("upscale", {"image": P, "tile": -16}, "tile must be a whole number of 0 or more, not -16"),
    "a tile and a half": ("sd1", {"tile": 40.5}, "tile must be a whole number of 0 or more, not 40.5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_with_a_sentence_before_any_step(task_models, what):
    name, options, sentence = REFUSED[what]
    pipe = task_models.ours(name)
    with pytest.raises(LDMError, match=sentence):
        pipe.prepare(PROMPT, **{"steps": 3, **options})
    with pytest.raises(LDMError, match=sentence):
        pipe.steps(PROMPT, **{"steps": 3, **options})  # at once, not at the first step


def test_an_unreadable_picture_is_refused(pipe, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    for options in ({"image": tmp_path / "bad.png"}, {"image": P, "mask": tmp_path / "bad.png"}):
        with pytest.raises(LDMError, match=r"bad\.png is no picture that ldm can read"):
            pipe.prepare(PROMPT, **options)


@pytest.mark.parametrize(
    "sides", [(0, 0, 0, 0), (-8, 0, 0, 8), (8.0, 0, 0, 0), ("8", 0, 0, 0)], ids=["none", "below 0", "float", "words"]
)
def test_outpainting_without_room_is_refused(sides):
    with pytest.raises(LDMError, match="Outpainting takes pixels for left, top, right, bottom"):
        pictures.extend(P, *sides)


@pytest.mark.parametrize("size, overlap", [(4, 4), (4, 5), (4, -1), (0, 0)])
def test_tiles_that_overlap_wholly_are_refused(size, overlap):
    with pytest.raises(LDMError, match="the overlap must be 0 or more, and less than the size"):
        in_tiles(lambda x: x, normal(1, 1, 1, 9, 9), size, overlap)


def test_what_is_given_as_a_path_an_array_or_a_picture_draws_the_same(pipe, tmp_path):
    P.save(tmp_path / "picture.png")
    BOX.save(tmp_path / "mask.png")
    options = {"strength": 0.6, "steps": 3, "seed": 5}
    whole = pipe(PROMPT, image=P, mask=BOX, **options)
    for image, mask in (
        (tmp_path / "picture.png", str(tmp_path / "mask.png")),
        (np.asarray(P), np.asarray(BOX) > 0),
        ([P], (BOX,)),
    ):
        found = pipe(PROMPT, image=image, mask=mask, **options)
        assert torch.equal(found.x0, whole.x0) and np.array_equal(found.images[0], whole.images[0])


def test_settings_know_the_row_they_begin_at():
    at = {"steps": 50, "sampler": "ddim", "rule": "ddim", "sigmas": "spaced", "timesteps": None, "compat": False}
    at |= {"prompt": ("",), "negative": ("",), "seeds": (0,), "guidance": 1.0, "eta": 0.0, "width": 8, "height": 8}
    schedule = make_schedule(ScheduleConfig(), 50)
    assert Settings(**at).rows(schedule) == range(50)
    assert [Settings(**at, strength=s).rows(schedule).start for s in (0, 0.02, 0.58, 1.0)] == [50, 49, 22, 0]
    # Shares of training's timesteps: 980, 960 ... 200, 180; a row on the border is the first one's.
    assert [Settings(**at, denoising_end=s).rows(schedule).stop for s in (0.8, 0.7999, 0.81)] == [40, 40, 40]
    assert [Settings(**at, denoising_start=s).rows(schedule).start for s in (0.8, 0.0001, 0.999)] == [40, 0, 49]
    assert Settings(**at, denoising_start=0.5, denoising_end=0.8).rows(schedule) == range(25, 40)


@pytest.mark.parametrize("task", ["depth", "edit"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_mask_goes_with_depth_and_with_editing(task_models, task, guidance):
    """The UNet reads the same beside the latent as without a mask; what is kept is the picture, at every level."""
    pipe = task_models.ours(task)
    options = {"image": P, "steps": 4, "sampler": "dpm++2m", "guidance": guidance, "seed": 5}
    options |= {"depth": DEPTH} if task == "depth" else {}
    run = pipe.prepare(PROMPT, **options, mask=BOX)
    posterior, eps = ldm.Noise.from_seeds([5]), None
    like = torch.empty_like(run.x)
    x0 = pipe.vae.encode(pictures.image_tensor([P]), posterior(like))
    eps = posterior(like)
    assert torch.equal(run.x, eps * run.schedule.start_scale)  # strength 1, or an editor: from noise alone
    kept = pictures.latent_mask(pictures.mask_tensor([BOX]), 8)[0, 0] == 0
    for step in run.steps():
        level = run.schedule[step.i + 1]
        known = x0 if step.i + 1 == len(run.schedule) else level.alpha * x0 + level.sigma * eps
        assert torch.equal(step.x[..., kept], known[..., kept])
        assert not torch.allclose(step.x[..., ~kept], known[..., ~kept], atol=0.1)
    whole = pipe.prepare(PROMPT, **options | ({"strength": 1.0} if task == "depth" else {}))
    level = run.schedule[0]
    plain, masked = whole.denoise(run.x, level), run.denoise(run.x, level)
    assert torch.equal(plain.eps, masked.eps)
    drawn = np.asarray(pipe(PROMPT, **options, mask=BOX).images[0])
    outside = np.asarray(BOX) < 128
    assert np.array_equal(drawn[outside], np.asarray(P)[outside])


def test_an_upscaler_s_most_noise_is_that_of_its_folder(task_models, tmp_path):
    pipe = task_models.ours("upscale")
    known = Pipeline(
        pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae, pipe.scheduler, low_res=pipe.low_res, max_noise_level=35
    )
    assert known.settings("", noise_level=35).noise_level == 35
    with pytest.raises(LDMError, match="noise_level must be a whole number of 0 or more and below 36"):
        known.settings("", noise_level=36)


def test_depths_of_pictures_of_many_sizes_are_each_brought_to_size(tmp_path, monkeypatch):
    (tmp_path / "depth_estimator").mkdir()
    monkeypatch.setattr(conditions, "predict_depth", lambda image, folder: torch.rand(image.height, image.width))
    depths = tasks.own_depth(tmp_path, [P, P.resize((50, 33))])
    assert [tuple(depth.shape) for depth in depths] == [(P.height, P.width), (33, 50)]
    given = tasks.read_given([P, P.resize((50, 33))], None, depths, 2, P.size, 8)
    assert given.depth.shape == (2, 1, P.height // 8, P.width // 8)


def test_the_name_of_an_embedded_model_of_the_other_kind_is_said(models):
    with pytest.raises(LDMError, match="'scenes-canny' is a ControlNet: load_controlnet reads it"):
        ldm.load("scenes-canny")
    with pytest.raises(LDMError, match="'scenes' is a whole model: load reads it"):
        ldm.load_controlnet("scenes", models.ours("sd1"))
