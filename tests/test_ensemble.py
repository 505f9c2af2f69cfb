"""Base and refiner after each other: equal to diffusers' `denoising_end` and `denoising_start` under `compat`, and by
default handed over at the very level that the latent has."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from reference import assert_close
from test_pipeline import OF_RATIO, equal, generators, landed
from test_sdxl import F64, NEGATIVE, PROMPTS, SIZE, Changed, run_diffusers, run_ours, scheduler_like
from tiny_pairs import PROMPT, with_scheduler

import ldm
from ldm.ensemble import Ensemble, taken_over
from ldm.errors import LDMError
from ldm.schedules.table import stays
from ldm.sizes import Sizes

REQUEST = {"prompt": PROMPTS, "negative": NEGATIVE, "guidance": 3.0}


def pair(models, sampler, spacing, n, m, dtype=F64):
    """The base's scheduler for n steps and the refiner's for m, and our pipelines with them."""
    schedulers = [scheduler_like(sampler, spacing, steps, dtype) for steps in (n, m)]
    told = schedulers[0][1]
    schedulers = [scheduler for scheduler, _ in schedulers]
    ours = [
        with_scheduler(models.ours(name, dtype), s) for name, s in zip(("sdxl", "refiner"), schedulers, strict=True)
    ]
    return schedulers, ours, told


def run_both(models, sampler, spacing, n, m, at, dtype=F64):
    """diffusers' ensemble: the base's latents and the refiner's, in our coordinates, and the pixels."""
    schedulers, _, told = pair(models, sampler, spacing, n, m, dtype)
    gs = generators(2)
    base = {**REQUEST, **SIZE, **told, "denoising_end": at, "generator": gs}
    first, _ = run_diffusers(StableDiffusionXLPipeline, models.reference("sdxl", dtype), schedulers[0], n, base, dtype)
    refine = {**REQUEST, **told, "denoising_start": at, "generator": gs, "image": first[-1]}
    refiner = models.reference("refiner", dtype)
    second, pixels = run_diffusers(StableDiffusionXLImg2ImgPipeline, refiner, schedulers[1], m, refine, dtype)
    if not type(schedulers[0]).__name__.startswith(OF_RATIO):
        return first, second, pixels
    ends, starts = landed(schedulers[0], n), landed(schedulers[1], m)[m - len(second) :]
    first = [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(first, ends, strict=False)]
    return first, [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(second, starts, strict=True)], pixels


CASES = [  # sampler, spacing, steps of the base and of the refiner, share
    ("ddim", "leading", 10, 10, 0.8),
    ("ddim", "leading", 8, 11, 0.7),
    ("euler", "leading", 10, 10, 0.8),
    ("euler", "trailing", 7, 12, 0.65),
    ("ddim eta=0.6", "leading", 6, 6, 0.5),
    ("euler-a", "leading", 9, 6, 0.6),
    ("dpm++2m", "leading", 9, 9, 0.8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_under_compat_the_ensemble_equals_diffusers(models, case, capsys):
    sampler, spacing, n, m, at = case
    first, second, pixels = run_both(models, *case)
    _, (base, refiner), told = pair(models, sampler, spacing, n, m)
    two = Ensemble(base, refiner, at)
    steps = list(two.steps(**REQUEST, **SIZE, **told, seed=5, steps=n, compat=True, refined={"steps": m}))
    assert len(steps) == len(first) + len(second) and len(second) > 0
    equal([step.x for step in steps[: len(first)]], first, 1e-11)
    mismatch = not stays(steps[len(first)].level, steps[len(first) - 1].next)
    assert mismatch == (n != m)
    assert ("is told that its latent is at" in capsys.readouterr().err) == mismatch
    equal([step.x for step in steps[len(first) :]], second, 1e-11)
    run = two.prepare(**REQUEST, **SIZE, **told, seed=5, steps=n, compat=True)
    assert two.count(run.settings, {"steps": m}) == len(steps)
    result = two(**REQUEST, **SIZE, **told, seed=5, steps=n, compat=True, refined={"steps": m})
    drawn = np.stack([np.asarray(image) for image in result.images])
    assert np.abs(drawn - pixels).max() == 0 and pixels.std() > 20


def test_latents_given_by_hand_begin_where_diffusers_begins(models):
    """Without an `Ensemble`: denoising_end, the latents as image, denoising_start; each side with the same table."""
    first, second, _ = run_both(models, "ddim", "leading", 10, 10, 0.8)
    _, (base, refiner), _ = pair(models, "ddim", "leading", 10, 10)
    half = run_ours(base, 10, {**REQUEST, **SIZE, "denoising_end": 0.8})[0]
    equal(half, first, 1e-11)
    rest = run_ours(refiner, 10, {**REQUEST, "image": half[-1], "denoising_start": 0.8})[0]
    equal(rest, second, 1e-11)
    middle = run_ours(base, 10, {**REQUEST, "image": half[4], "denoising_start": 0.5, "denoising_end": 0.8})[0]
    equal(middle, first[5:], 1e-11)


def test_a_step_that_begins_at_the_very_share_is_the_base_s(models):
    """As in diffusers: not below the cutoff is before the hand-over, below it is after."""
    scheduler, _ = scheduler_like("ddim", "leading", 10, F64, steps_offset=0)  # 900, 800, ..., 200, ...
    request = {**REQUEST, **SIZE, "denoising_end": 0.8}
    reference, pipe = models.reference("sdxl", F64), with_scheduler(models.ours("sdxl", F64), scheduler)
    theirs, _ = run_diffusers(StableDiffusionXLPipeline, reference, scheduler, 10, request, F64)
    ours = list(pipe.steps(**request, seed=5, steps=10, compat=True))
    equal([step.x for step in ours], theirs, 1e-11)
    assert ours[-1].level.t == 200


def test_by_default_the_refiner_begins_at_the_level_that_is_handed_over(models, capsys):
    _, (base, refiner), _ = pair(models, "ddim", "leading", 8, 11)
    steps = list(Ensemble(base, refiner, 0.7).steps(**REQUEST, **SIZE, seed=5, steps=8, refined={"steps": 11}))
    levels = [step.level for step in steps]
    k = next(k for k in range(1, len(steps)) if steps[k].level.i == 0)
    assert levels[k][1:] == steps[k - 1].next[1:] and torch.equal(steps[k].x_before, steps[k - 1].x)
    own = refiner.schedule(11).levels
    assert [level[1:] for level in levels[k + 1 :]] == [row[1:] for row in own if row.ratio < levels[k].ratio][:-1]
    assert steps[-1].next.sigma == own[-1].sigma
    said = capsys.readouterr().err
    assert f"stops at t = {levels[k].t:g}" in said and f"to {levels[k + 1].t:g}" in said
    above = min((row for row in own if row.ratio > levels[k].ratio), key=lambda row: row.ratio)
    assert f"(that has {above.t:g} and {levels[k + 1].t:g})" in said


def test_equal_tables_are_handed_over_without_a_word(models, capsys):
    """And then by default and under compat it is the same run, of which nothing is lost or done twice."""
    _, (base, refiner), _ = pair(models, "dpm++2m", "leading", 10, 10)
    capsys.readouterr()  # what diffusers says when it writes the folders
    options = {**REQUEST, **SIZE, "seed": 5, "steps": 10}
    plain = list(Ensemble(base, refiner).steps(**options))
    compat = list(Ensemble(base, refiner).steps(**options, compat=True))
    assert capsys.readouterr().err == ""
    assert (
        [step.level.t for step in plain]
        == [step.level.t for step in compat]
        == [r.t for r in base.schedule(10).levels[:-1]]
    )
    for a, b in zip(plain, compat, strict=True):
        assert_close(a.x, b.x, 1e-11 * b.x.abs().max().item())
    alone = list(base.steps(**options))
    same = sum(torch.equal(a.x, b.x) for a, b in zip(plain, alone, strict=True))
    assert same == Ensemble(base, refiner).count(base.settings(**options), {}) - 2 == 8  # then the refiner's own


def test_an_ensemble_of_one_model_is_that_model(models):
    """Nothing is added or lost where it hands over to itself, also with noise on the way."""
    pipe = with_scheduler(models.ours("sdxl", F64), scheduler_like("ddim", "leading", 10, F64)[0])
    for asked in (
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7, "clip_skip": 1},
        {"sampler": "euler-a"},
        {"sampler": "ddpm", "rule": "euler"},
        {"sampler": "euler", "sigmas": "karras"},
    ):
        options = {**REQUEST, **SIZE, "seed": 5, "steps": 10, **asked}
        whole, two = list(pipe.steps(**options)), list(Ensemble(pipe, pipe, 0.7).steps(**options))
        assert all(torch.equal(a.x, b.x) for a, b in zip(whole, two, strict=True)), asked


def test_the_refiner_is_told_its_score_and_the_base_s_sizes_stay_there(models):
    _, (base, refiner), _ = pair(models, "ddim", "leading", 5, 5)
    options = {**REQUEST, **SIZE, "seed": 5, "steps": 5, "sizes": Sizes(original=(20, 10))}
    two = Ensemble(base, refiner)
    plain = two(**options).x0
    ugly = two(**options, refined={"sizes": Sizes(score=1.0)}).x0
    assert (plain - ugly).abs().max() > 1e-6 * plain.abs().max()  # rounding is below 1e-14


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_mask_of_the_base_s_is_kept_by_the_pair(models, dtype):
    from tiny_tasks import box_mask, picture

    image, mask = picture(1, 48, 32), box_mask(48, 32, 8, 8, 24, 24)
    two = Ensemble(models.ours("sdxl", dtype), models.ours("refiner", dtype), 0.5)
    options = {"image": image, "mask": mask, "steps": 4, "seed": 1}
    found = two(PROMPT, **options).images[0]
    late = {**options, "strength": 0.75}  # a step less
    assert two.count(two.prepare(PROMPT, **late).settings, {}) == len(list(two.steps(PROMPT, **late))) == 3
    kept, given, drawn = np.asarray(mask) < 128, np.asarray(image), np.asarray(found)
    assert (drawn[kept] == given[kept]).all() and (drawn[~kept] != given[~kept]).mean() > 0.5


def test_the_refiner_goes_on_by_the_base_s_method_whatever_its_folder_says(models, capsys):
    base = with_scheduler(models.ours("sdxl", F64), scheduler_like("euler", "leading", 6, F64)[0])
    refiner = with_scheduler(models.ours("refiner", F64), scheduler_like("dpm++2m karras", "leading", 6, F64)[0])
    two, options = Ensemble(base, refiner, 0.6), {**REQUEST, **SIZE, "seed": 5}
    steps = list(two.steps(**options, steps=6))
    assert [step.level[1:] for step in steps] == [row[1:] for row in base.schedule(6).levels[:-1]]
    assert capsys.readouterr().err == ""
    same = list(two.steps(**options, steps=6, refined={"sampler": "euler", "rule": "euler", "sigmas": "spaced"}))
    assert torch.equal(same[-1].x, steps[-1].x)
    own = list(two.steps(**options, steps=6, refined={"sampler": "dpm++2m", "rule": "dpm", "sigmas": "karras"}))
    assert (own[-1].x - steps[-1].x).abs().max() > 1e-3 * own[-1].x.abs().max()
    for asked, refined in (
        ({"steps": 7, "rule": "dpm", "sigmas": "karras"}, {}),
        ({"sigmas": [14.6, 8, 4, 2, 1, 0.5, 0]}, {}),
        ({"sigmas": [14.6, 8, 4, 2, 1, 0.5, 0]}, {"steps": 9}),
        ({"timesteps": [900, 700, 500, 300, 100]}, {}),
        ({"steps": 5, "sampler": "ddim", "eta": 0.5}, {"sampler": "euler", "steps": 8}),
    ):
        capsys.readouterr()
        taken = list(two.steps(**options, **asked, refined=refined))
        assert len(taken) == two.count(base.settings(**options, **asked), refined)
        assert "holds" not in capsys.readouterr().err  # it doesn't begin from noise
    assert not two.refiner.zero_negative
    plain = list(Ensemble(base, base, 0.6).steps(PROMPT, **SIZE, steps=5, negative="", seed=1))
    assert torch.equal(plain[-1].x, list(base.steps(PROMPT, **SIZE, steps=5, negative="", seed=1))[-1].x)


def test_of_two_offloaded_models_one_is_on_the_device(models):
    from ldm import memory

    two = Ensemble(ldm.load(models.folder("sdxl")), ldm.load(models.folder("refiner")), 0.5)
    expected = two(PROMPT, steps=4, seed=1, **SIZE).x0
    for pipe in (two.base, two.refiner):
        memory.offload(pipe, "cpu")
    stages = [memory.stages_of(pipe)[0] for pipe in (two.base, two.refiner)]
    for _ in range(2):
        first, x = two.prepare(PROMPT, steps=4, seed=1, **SIZE), None
        for step in two.walk(first, {}, {}):
            assert sum(bool(stage.present) for stage in stages) == 1
            x = step.x
        assert not any(stage.present for stage in stages)
        assert torch.equal(x, expected)


WRONG = {
    "no share": ({"denoising_end": 1.5}, "denoising_end must be a share of the road above 0 and below 1"),
    "a word": ({"denoising_start": "late", "image": True}, "denoising_start must be a share"),
    "nothing between": ({"denoising_start": 0.8, "denoising_end": 0.5, "image": True}, "nothing is left between them"),
    "nothing at all": ({"denoising_start": 0.5, "denoising_end": 0.5, "image": True}, "nothing is left between them"),
    "the whole road": ({"denoising_end": 1.0}, "denoising_end must be a share of the road above 0 and below 1"),
    "no latents": ({"denoising_start": 0.8}, "goes on from latents on the way"),
    "a strength": ({"denoising_start": 0.8, "image": True, "strength": 0.5}, "knows no strength"),
}


@pytest.mark.parametrize("what", WRONG)
def test_shares_that_cannot_be_are_refused(models, what):
    options, sentence = WRONG[what]
    if "image" in options:
        options = {**options, "image": torch.zeros(1, 4, 4, 6)}
    with pytest.raises(LDMError, match=sentence):
        models.ours("sdxl").prepare(PROMPT, steps=4, **options)


def test_what_cannot_be_handed_over_is_refused(models):
    base, refiner = models.ours("sdxl"), models.ours("refiner")
    *_, step = base.steps(PROMPT, steps=5, denoising_end=0.6, **SIZE)
    for options, sentence in (
        ({"image": "x.png"}, "leave image out"),
        ({"strength": 0.3}, "leave strength out"),
        ({"denoising_start": 0.6}, "leave denoising_start out"),
        ({"compat": True}, "the row that denoising_start says"),
        ({"count": 2}, "Latents of 1 pictures are handed over, for 2"),
        ({"seed": 1, "width": 64, "height": 64}, "The latents given are of 48x32 pixels"),
    ):
        with pytest.raises(LDMError, match=sentence):
            refiner.prepare(PROMPT, handed=step, steps=5, **options)
    with pytest.raises(LDMError, match="has no row below it"):
        taken_over(refiner.schedule(3), refiner.schedule(3).levels[-1])
    with pytest.raises(LDMError, match="says itself where they meet: leave denoising_end out"):
        Ensemble(base, refiner)(PROMPT, denoising_end=0.5)
    with pytest.raises(LDMError, match=r"No step of 1 lies on that side of denoising_end 0\.0001"):
        Ensemble(base, refiner, 0.0001)(PROMPT, steps=1, sampler="ddim", **SIZE)
    with pytest.raises(
        LDMError, match=r"No step is left to run: strength 0\.1 begins at row 18, .* ends at row 10 of 20"
    ):
        base.prepare(PROMPT, image=torch.zeros(1, 4, 4, 6), strength=0.1, denoising_end=0.5, steps=20)
    with pytest.raises(LDMError, match=r"No step of 5 lies on that side of denoising_start 0\.9999"):
        refiner.prepare(PROMPT, image=step.x, denoising_start=0.9999, steps=5)
    with pytest.raises(LDMError, match="at must be a share of the road above 0 and below 1"):
        Ensemble(base, refiner, 1.2)
    with pytest.raises(LDMError, match="leave one_by_one out"):
        Ensemble(base, refiner)(PROMPT, one_by_one=True)
    with pytest.raises(LDMError, match="goes on with the base's prompt: leave it out of refined"):
        Ensemble(base, refiner)(PROMPT, steps=4, refined={"prompt": "a fish"}, **SIZE)
    with pytest.raises(LDMError, match=r"Under compat ddim can't hand over to euler"):
        Ensemble(base, refiner)(PROMPT, steps=5, sampler="ddim", compat=True, refined={"sampler": "euler"}, **SIZE)
    calls = []
    hook = base.unet.register_forward_pre_hook(lambda *given: calls.append(1))
    for wrong in ({"prompt": "a fish"}, {"image": None}):
        with pytest.raises(LDMError, match="leave it out of refined"):
            next(Ensemble(base, refiner).steps(PROMPT, steps=4, refined=wrong, **SIZE))
    hook.remove()
    assert not calls  # not after the base has drawn its part
    for name in ("denoising_end", "denoising_start", "handed"):
        with pytest.raises(LDMError, match=f"Inversion walks DDIM's road from the whole picture: leave {name} out"):
            base.prepare_inversion(step.x, PROMPT, **{name: 0.5})
    with pytest.raises(LDMError, match="latents of different kinds"):
        Ensemble(base, models.ours("sd1"))
    with pytest.raises(LDMError, match="a model to inpaint pictures; it must go on from a latent alone"):
        Ensemble(base, Changed(models, in_channels=9).ours("sdxl", torch.float32))


def test_ldm_has_the_ensemble_among_its_names():
    assert ldm.Ensemble is Ensemble and ldm.Sizes is Sizes


# ---------------------------------------------------------------------------------------------- diffusers' defects


def test_defect_diffusers_cuts_methods_that_ask_twice_within_a_step(models):
    """REFERENCE_DEFECTS.md, 25: the base's last step of Heun's is Euler's, and the refiner begins a row too early."""
    schedulers, (base, refiner), _ = pair(models, "heun", "leading", 8, 8)
    request = {**REQUEST, **SIZE, "generator": generators(2), "denoising_end": 0.6}
    found, _ = run_diffusers(StableDiffusionXLPipeline, models.reference("sdxl", F64), schedulers[0], 8, request, F64)
    steps = list(base.steps(**{**REQUEST, **SIZE}, seed=5, steps=8, denoising_end=0.6, compat=True))
    cutoff, rows = steps[-1].next, base.schedule(8, compat=True)
    assert len(found) == 2 * len(steps) - 1  # an evaluation too few
    last = found[-1] * cutoff.alpha
    ratio = (cutoff.sigma / cutoff.alpha - steps[-1].level.ratio) * steps[-1].eps  # Euler's step, in x / alpha
    euler = (steps[-1].x_before / steps[-1].level.alpha + ratio) * cutoff.alpha
    assert_close(last, euler, 1e-11 * euler.abs().max().item())
    assert (last - steps[-1].x).abs().max() > 1e-3 * euler.abs().max()
    request = {**REQUEST, "generator": generators(2), "denoising_start": 0.6, "image": found[-1]}
    rest, _ = run_diffusers(
        StableDiffusionXLImg2ImgPipeline, models.reference("refiner", F64), schedulers[1], 8, request, F64
    )
    own = list(refiner.steps(**REQUEST, image=last, seed=5, steps=8, denoising_start=0.6, compat=True))
    assert own[0].level[1:] == rows[len(steps)][1:] == cutoff[1:]
    assert len(rest) == 2 * (len(own) + 1) - 1  # a step more than there is to go


def test_defect_diffusers_blends_a_clean_picture_into_a_noisy_latent(models):
    """REFERENCE_DEFECTS.md, 26: what the mask keeps is put in without noise where `denoising_end` cuts the run."""
    from diffusers import StableDiffusionXLInpaintPipeline
    from tiny_tasks import box_mask, picture

    image, mask = picture(1, 48, 32), box_mask(48, 32, 8, 8, 24, 24)
    scheduler, _ = scheduler_like("ddim", "leading", 10, F64)
    request = {"prompt": PROMPT, "guidance": 3.0, "image": image, "mask": mask, "strength": 1.0, **SIZE}
    base = models.reference("sdxl", F64)
    theirs, _ = run_diffusers(
        StableDiffusionXLInpaintPipeline, base, scheduler, 10, {**request, "denoising_end": 0.6}, F64
    )
    pipe = with_scheduler(models.ours("sdxl", F64), scheduler)
    run = pipe.prepare(**request, seed=5, steps=10, denoising_end=0.6, compat=True)
    ours = [step.x for step in run.steps()]
    equal(ours[:-1], theirs[:-1], 1e-11)
    drawn = torch.zeros(4, 6, dtype=bool)
    drawn[1:3, 1:3] = True
    assert_close(ours[-1][..., drawn], theirs[-1][..., drawn], 1e-11 * theirs[-1].abs().max().item())
    level, x0 = run.schedule[len(run)], theirs[-1][..., ~drawn]
    noise = (ours[-1][..., ~drawn] - level.alpha * x0) / level.sigma  # ours is that picture with the level's noise
    assert level.sigma > 0.5 and 0.7 < noise.std() < 1.3 and (ours[-1][..., ~drawn] - x0).abs().max() > 0.5
