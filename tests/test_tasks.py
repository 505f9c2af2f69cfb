"""What pictures do for a run: strength, masks, tiles, larger pictures, inversion; and what is refused, in sentences.

Statements are exact, bit for bit, wherever the mathematics is. `test_task_pipelines.py` compares with diffusers.
"""

import re
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from reference import assert_close, normal
from tiny_pairs import OTHERS, PROMPT, SCENES, scenes
from tiny_tasks import TaskModels, box_mask, picture

import ldm
from ldm import pictures, tasks
from ldm.errors import LDMError
from ldm.noise import Noise
from ldm.scenes import draw
from ldm.settings import Settings, choose_steps, run_of
from ldm.tiles import in_tiles, ramp, starts

W, H = 48, 32
P, Q = picture(1, W, H), picture(2, W, H)
BOX = box_mask(W, H, 16, 8, 40, 24)
METHODS = ["ddim", "ddpm", "euler", "euler-a", "heun", "dpm2", "lms", "plms", "pndm", "dpm++2m", "dpm++2m-sde",
           "dpm++2s", "unipc2", "deis2"]  # fmt: skip
SILENT = [name for name in METHODS if name not in ("ddpm", "euler-a", "dpm++2m-sde")]  # draw no noise on the way
every_method = pytest.mark.parametrize("sampler", METHODS)


@pytest.fixture(scope="session")
def task_models(tmp_path_factory, models):
    return TaskModels(tmp_path_factory.mktemp("tasks"), models)


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
@pytest.mark.parametrize("n, strength", [(5, 0.3), (7, 0.58), (10, 0.1), (4, 1.0), (50, 0.02), (3, 0.0), (1, 1)])
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
    with pytest.raises(LDMError, match="Strength 0.1 of 7 steps") as error:
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
        assert run.settings.first == first
        assert torch.equal(run.x, level.alpha * x0 + level.sigma * eps)


@scenes
def test_more_strength_leaves_less_of_the_picture(embedded):
    scene = draw(3)[0].image
    apart = []
    for strength in (0.0, 0.3, 0.6, 1.0):
        image = embedded("two trees at night", image=scene, strength=strength, steps=10, seed=1).images[0]
        apart.append(np.abs(pixels(image) - pixels(scene)).mean())
    assert apart[0] < 3 and all(b > a + 2 for a, b in zip(apart, apart[1:], strict=False)), apart


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
    assert torch.equal(second.x0, alone.x0[1:]) and len(alone.changed) == 2


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
    assert pictures.choose_size(*given, 64, 8) == drawn and capsys.readouterr().err == ""


def test_large_pictures_are_drawn_smaller_in_their_proportions_and_it_is_said(capsys):
    for given in ((640, 480), (129, 128), (2000, 100), (300, 900)):
        width, height = pictures.choose_size(*given, 64, 8)
        said = capsys.readouterr().err
        assert f"{given[0]}x{given[1]} pixels are many for a model of 64x64: drawing {width}x{height}" in said
        assert width % 8 == height % 8 == 0 and 0.55 * 64**2 <= width * height <= 64**2
        assert abs(width / height / (given[0] / given[1]) - 1) < 8 / min(width, height)


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


# ------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize("size, overlap", [(4, 1), (16, 4), (5, 4), (8, 0), (7, 3)])
def test_windows_cover_every_position_and_share_their_overlap(size, overlap):
    for length in range(1, 60):
        found = starts(length, size, overlap)
        if length <= size:
            assert found == [0]
            continue
        assert found[0] == 0 and found[-1] == length - size and len(set(found)) == len(found)
        assert all(b - a <= size - overlap for a, b in zip(found, found[1:], strict=False))
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
    """256 x 384 in tiles of 128, the model's own size: how far it is from the whole, and where."""
    scene = Image.fromarray(draw(3)[0].image).resize((384, 256), Image.Resampling.BICUBIC)
    with torch.no_grad():
        x0 = embedded.vae.encode(pictures.image_tensor([scene]))
        whole, tiled = (pixels(embedded.decode(x0, tile=tile)[0]).astype(float) for tile in (0, 128))
        cut = in_tiles(embedded.vae.decode, x0, 16, 0, 8)[0].permute(1, 2, 0).clamp(-1, 1).numpy() * 127.5 + 127.5
    assert whole.shape == (256, 384, 3) and whole.std() > 20
    apart = np.abs(tiled - whole)
    assert apart.mean() < MEAN_APART and np.quantile(apart, 0.999) < MOST_APART, (apart.mean(), apart.max())
    joints = [8 * edge for left in starts(48, 16, 4) for edge in (left, left + 16) if 0 < edge < 48]
    across = {}
    for name, found in (("whole", whole), ("tiled", tiled), ("cut", cut)):
        steps = np.abs(np.diff(found - whole if name != "whole" else found, axis=1)).mean((0, 2))  # [c - 1]: to column c
        across[name] = (steps[[c - 1 for c in joints]].mean(), np.delete(steps, [c - 1 for c in joints]).mean())
    assert across["tiled"][0] < 1.5 * across["tiled"][1], across  # what tiles add jumps at joints no more than elsewhere
    jumps = [8 * left for left in starts(48, 16, 0) if left]
    steps = np.abs(np.diff(cut - whole, axis=1)).mean((0, 2))
    assert steps[[c - 1 for c in jumps]].mean() > 4 * np.delete(steps, [c - 1 for c in jumps]).mean(), "the yardstick"
    gradient = np.abs(np.diff(tiled, axis=1)).mean((0, 2))[[c - 1 for c in joints]].mean()
    assert gradient < 1.1 * across["whole"][0]


MEAN_APART, MOST_APART = 2.0, 20.0
