"""The loop: a run may be watched, paused, edited, resumed, rewound and forked, and never changes for being looked at.

Also the noise it is given, and the ends of a schedule, alpha = 0 and sigma = 0.
"""

import copy
import dataclasses
import io
import itertools
from functools import partial

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from reference import normal

from ldm.diffusion import to_x0_eps
from ldm.errors import LDMError
from ldm.noise import Noise
from ldm.samplers import SAMPLERS, ddim, first_order, sample
from ldm.schedules import Level, Schedule, ScheduleConfig, make_schedule

ALL = {**SAMPLERS, "ddim eta=1": partial(ddim, eta=1.0)}
STOCHASTIC = ["ddpm", "ddim eta=1"]
N = 6
SCHEDULE = make_schedule(ScheduleConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), N)
X = normal(0, 2, 4, 3, 5)

every_sampler = pytest.mark.parametrize("name", ALL)
every_k = pytest.mark.parametrize("k", range(N + 1))


def denoise(x, level, schedule=SCHEDULE):
    return to_x0_eps(torch.tanh(0.8 * x + 0.1 * level.t / 1000), x, level.alpha, level.sigma, schedule.prediction)


def run(name, x=X, schedule=SCHEDULE, noise=None, after=()):
    noise = Noise.from_seeds([1, 2]) if noise is None else noise
    return sample(partial(denoise, schedule=schedule), x, schedule, ALL[name], noise, after)


def same(a, b):
    """Two runs, bit for bit, the states of their noise too."""
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        assert (s.level, s.next) == (t.level, t.next)
        assert all(torch.equal(getattr(s, key), getattr(t, key)) for key in ("x_before", "x", "x0", "eps"))
        assert all(torch.equal(p, q) for p, q in zip(s.noise_state, t.noise_state, strict=True))
    return True


# ---------------------------------------------------------------------------------------------------- watching


@every_sampler
def test_a_run_yields_every_row_in_order_and_its_steps_hang_together(name):
    x = X.clone()
    steps = list(run(name, x))
    assert torch.equal(x, X)  # the caller's first latent is left alone
    assert [s.i for s in steps] == list(range(N))
    assert [s.level for s in steps] == list(SCHEDULE.levels[:-1]) and [s.next for s in steps] == list(
        SCHEDULE.levels[1:]
    )
    assert all(torch.equal(a.x, b.x_before) for a, b in itertools.pairwise(steps))
    for s in steps:
        torch.testing.assert_close(s.level.alpha * s.x0 + s.level.sigma * s.eps, s.x_before, rtol=0, atol=1e-5)
        assert s.x.dtype == X.dtype and s.x.shape == X.shape and not s.edited and s.x.std() > 0.1


@every_sampler
def test_runs_repeat_and_looking_changes_nothing(name):
    expected = list(run(name))
    assert same(list(run(name)), expected)
    other = run(name, x=-X)
    watched = []
    for step in run(name):
        watched.append(step)
        # What a notebook does between two steps: convert, reduce, print, draw global noise, advance another run.
        (step.x0.double() / 2 + 0.5).clamp(0, 1).mul_(255).byte()
        step.x.clone().zero_()
        repr(step)
        torch.randn(7)
        next(other)
        assert not step.edited
    assert same(watched, expected)


@every_sampler
def test_a_sampler_is_a_pure_function(name):
    """Called twice on one row it answers the same twice, and changes neither x, nor the steps it was shown."""
    steps = list(run(name))
    kept = copy.deepcopy(steps)
    for i in range(N):
        noise, history, x = Noise.from_seeds([1, 2]), steps[:i], steps[i].x_before
        answers = []
        for _ in range(2):
            if i:
                noise.restore(steps[i - 1].noise_state)
            else:
                noise = Noise.from_seeds([1, 2])
            answers.append(ALL[name](denoise, x, SCHEDULE, i, history, noise))
        assert torch.equal(answers[0].x, answers[1].x) and torch.equal(answers[0].x, steps[i].x)
        assert len(history) == i
    assert same(steps, kept)


@every_sampler
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_caller_s_gradient_mode_is_untouched_and_irrelevant(name, mode):
    expected, weight = list(run(name)), torch.ones((), requires_grad=True)
    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        steps = []
        noise = Noise.from_seeds([1, 2])
        for step in sample(lambda x, level: denoise(x * weight, level), X, SCHEDULE, ALL[name], noise):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
            assert not step.x.requires_grad
            steps.append(step)
        assert same(steps, expected)
        steps[2].x.mul_(1.5)
        assert steps[2].edited


# ------------------------------------------------------------------------------------ resuming, forking, editing


@every_sampler
@every_k
def test_resumed_at_any_step_a_run_is_the_unbroken_one(name, k):
    expected = list(run(name))
    paused, begun = run(name), []
    for _ in range(k):
        begun.append(next(paused))
    noise = Noise.from_seeds([1, 2] if k == 0 else [77, 78])  # steps carry their noise: the seeds no longer matter
    assert same([*begun, *run(name, noise=noise, after=begun)], expected)
    assert same([*begun, *paused], expected)  # and the first run goes on as if nobody had forked


@every_sampler
def test_rewinding_the_same_noise_source_repeats_the_run(name):
    noise = Noise.from_seeds([1, 2])
    expected = list(run(name, noise=noise))
    for k in (4, 1, 3):
        assert same([*expected[:k], *run(name, noise=noise, after=expected[:k])], expected)


@every_sampler
@pytest.mark.parametrize("travel", ["deepcopy", "file"])
def test_copied_and_saved_steps_resume_the_same_run(name, travel):
    steps = list(run(name))
    steps[1].x = steps[1].x + 0.3
    if travel == "deepcopy":
        copied = copy.deepcopy(steps[:4])
    else:
        file = io.BytesIO()
        torch.save(steps[:4], file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert [s.edited for s in copied] == [s.edited for s in steps[:4]] == [False, True, False, False]
    for k in (2, 4):
        assert same(list(run(name, after=copied[:k])), list(run(name, after=steps[:k])))
    copied[3].x.add_(0.1)
    assert copied[3].edited and not steps[3].edited


def edit(step, in_place):
    if in_place:
        step.x.mul_(0.5).add_(0.25)
    else:
        step.x = step.x * 0.5 + 0.25


@every_sampler
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("k", range(1, N))
def test_an_edited_latent_is_taken_up_and_ends_the_history(name, in_place, k):
    """The step after the edit is the one a sampler with no past takes from there; live and forked runs agree."""
    plain = list(run(name))
    live = []
    for step in run(name):
        if step.i == k - 1:
            edit(step, in_place)
        live.append(step)
    assert [s.edited for s in live] == [s.i == k - 1 for s in live]
    assert same(live[: k - 1], plain[: k - 1])

    noise = Noise.from_seeds([3, 4])
    noise.restore(plain[k - 1].noise_state)
    x = plain[k - 1].x * 0.5 + 0.25
    fresh = ALL[name](denoise, x, SCHEDULE, k, [], noise)
    assert torch.equal(live[k].x_before, x) and torch.equal(live[k].x, fresh.x)
    assert (live[k].x - plain[k].x).abs().max() > 1e-3
    if k + 1 < N:  # and from there on the new steps are the history
        assert torch.equal(live[k + 1].x, ALL[name](denoise, fresh.x, SCHEDULE, k + 1, [fresh], noise).x)

    forked = list(run(name))[:k]
    edit(forked[-1], in_place)
    assert same([*forked, *run(name, after=forked)], live)


def test_the_history_that_an_edit_ends_would_have_mattered():
    """Otherwise the test above shows nothing for the multistep sampler."""
    steps = list(run("dpm++"))
    for k in range(1, N - 1):
        stale = SAMPLERS["dpm++"](denoise, steps[k].x_before, SCHEDULE, k, steps[:k], Noise([]))
        fresh = SAMPLERS["dpm++"](denoise, steps[k].x_before, SCHEDULE, k, [], Noise([]))
        assert (stale.x - fresh.x).abs().max() > 1e-3
        assert torch.equal(fresh.x, first_order(fresh.x_before, fresh.x0, fresh.level, fresh.next))


def test_a_replaced_step_counts_as_edited():
    steps = list(run("dpm++"))
    other = dataclasses.replace(steps[2], x=steps[2].x + 0.1)
    assert other.edited and not dataclasses.replace(steps[2], cond=None).edited
    forked, live = [*steps[:2], other], copy.deepcopy(steps[:3])
    live[2].x = steps[2].x + 0.1
    pairs = zip(run("dpm++", after=forked), run("dpm++", after=live), strict=True)
    assert all(torch.equal(a.x, b.x) for a, b in pairs)


def test_two_edits_leave_the_history_after_the_later_one():
    steps = list(run("dpm++"))[:5]
    edit(steps[0], True)
    edit(steps[2], False)
    expected = SAMPLERS["dpm++"](denoise, steps[4].x, SCHEDULE, 5, steps[3:5], Noise([]))
    assert torch.equal(next(run("dpm++", after=steps)).x, expected.x)


def wrong_steps():
    long = make_schedule(ScheduleConfig(beta_schedule="scaled_linear"), N)
    trailing = ScheduleConfig(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    steps = list(run("ddim"))
    return {
        "a later part": steps[2:],
        "one left out": [steps[0], steps[2]],
        "one twice, of the right number": [steps[0], steps[0], steps[2]],
        "another order": [steps[1], steps[0]],
        "another table": list(run("ddim", schedule=long))[:3],
        "more than there are": list(run("ddim", schedule=make_schedule(trailing, 2 * N))),
        "other landings": list(run("ddim", schedule=make_schedule(trailing, N, compat=True)))[:2],
    }


@pytest.mark.parametrize("what", wrong_steps())
def test_steps_of_another_run_are_refused(what):
    with pytest.raises(LDMError, match=r"don't belong to this schedule: pass steps\[:k\]"):
        next(run("ddim", after=wrong_steps()[what]))


def test_steps_of_a_run_without_compat_are_refused_under_compat():
    config = ScheduleConfig(timestep_spacing="trailing")
    steps = list(run("ddim", schedule=make_schedule(config, 7)))
    with pytest.raises(LDMError, match="don't belong to this schedule"):
        next(run("ddim", schedule=make_schedule(config, 7, compat=True), after=steps[:2]))


def test_steps_of_a_run_with_more_pictures_are_refused():
    with pytest.raises(LDMError, match="The run had 2 noise generators, this one has 1"):
        next(run("ddpm", noise=Noise.from_seeds([1]), after=list(run("ddpm"))[:2]))


# ---------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_picture_does_not_depend_on_its_batch(name):
    *_, both = run(name)
    for k, seed in enumerate((1, 2)):
        *_, alone = run(name, x=X[k : k + 1], noise=Noise.from_seeds([seed]))
        assert torch.equal(alone.x, both.x[k : k + 1])


def test_noise_is_what_diffusers_draws_for_a_list_of_generators():
    noise, generators = Noise.from_seeds([1, 2]), [torch.Generator().manual_seed(s) for s in (1, 2)]
    for shape in (
        (4, 8, 8),
        (4, 3, 5),
        (1, 2, 2),
    ):  # torch's stream depends on the size: below 16 numbers it is another
        expected = randn_tensor((2, *shape), generator=generators, dtype=torch.float32)
        assert torch.equal(noise(torch.empty(2, *shape)), expected)
    assert expected.std() > 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_gets_the_float32_stream(dtype):
    """torch itself would draw other numbers for float64."""
    drawn = Noise.from_seeds([1, 2])(X.to(dtype))
    assert drawn.dtype == dtype and torch.equal(drawn, Noise.from_seeds([1, 2])(X).to(dtype))
    assert Noise.from_seeds([1, 2]).draw((4,)).dtype == torch.float32


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_run_keeps_its_dtype_and_gets_the_same_noise(name, dtype):
    *_, last = run(name, x=X.to(dtype))
    *_, single = run(name)
    assert last.x.dtype == last.x0.dtype == dtype
    assert (last.x.double() - single.x.double()).abs().max() < {torch.bfloat16: 0.5, torch.float16: 0.05}.get(
        dtype, 1e-4
    )


def test_noise_goes_back_to_where_its_state_was_taken():
    noise = Noise.from_seeds([1, 2])
    noise(X)
    state = noise.state()
    first, second = noise(X), noise(X)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    noise.restore(state)
    assert torch.equal(noise(X), first) and torch.equal(noise(X), second)


def test_noise_for_another_number_of_pictures_is_refused():
    """One generator's noise would spread over all pictures by broadcasting, silently."""
    with pytest.raises(LDMError, match="1 noise generators for 2 pictures"):
        Noise.from_seeds([1])(X)


# ------------------------------------------------------------------------------------ the ends of a schedule


@every_sampler
def test_a_schedule_may_begin_at_alpha_0(name):
    """Zero terminal signal-to-noise (Lin et al. 2023): x is pure noise, and lambda is minus infinity there."""
    alphas = (0.0, 0.3, 0.6, 0.8, 0.95, 1.0)
    levels = (Level(i, 999.0 - 190 * i, a, (1 - a**2) ** 0.5) for i, a in enumerate(alphas))
    schedule = Schedule(tuple(levels), "v_prediction", 1.0, "ddim")
    steps = list(run(name, schedule=schedule, x=X.double()))
    assert all(torch.isfinite(s.x).all() and s.x.std() > 0.05 for s in steps)
    first = steps[0]
    assert torch.equal(first.eps, X.double())
    if name in ("ddim", "euler", "dpm++"):
        expected = 0.3 * first.x0 + schedule[1].sigma * first.x_before
        torch.testing.assert_close(first.x, expected, rtol=0, atol=1e-15)
    if name == "dpm++":  # the second step cannot draw a line from minus infinity, the third draws one again
        assert torch.equal(steps[1].x, first_order(steps[1].x_before, steps[1].x0, schedule[1], schedule[2]))
        assert not torch.equal(steps[2].x, first_order(steps[2].x_before, steps[2].x0, schedule[2], schedule[3]))


@every_sampler
@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_a_step_to_sigma_0_gives_exactly_alpha_x0(name, alpha):
    schedule = Schedule((*SCHEDULE.levels[:-1], Level(N, 0.0, alpha, 0.0)), "epsilon", 1.0, "ddim")
    *_, last = run(name, schedule=schedule)
    assert torch.equal(last.x, alpha * last.x0) and last.x.std() > 0.1


@every_sampler
@pytest.mark.parametrize("compat", [False, True])
def test_a_schedule_may_end_twice_on_one_level(name, compat):
    """linspace stops at t = 0, and set_alpha_to_one = false ends there again: a step of length 0 changes nothing."""
    for betas in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        fields = {"beta_schedule": betas, "timestep_spacing": "linspace", "prediction_type": "v_prediction"}
        for rule, end in (("ddim", {"set_alpha_to_one": False}), ("euler", {"final_sigmas_type": "sigma_min"})):
            schedule = make_schedule(ScheduleConfig(**fields, **end, rule=rule), 4, compat=compat)
            *_, last = run(name, schedule=schedule, x=X.double())
            torch.testing.assert_close(last.x, last.x_before, rtol=0, atol=1e-6)


@every_sampler
def test_one_step_goes_from_noise_to_the_predicted_latent(name):
    schedule = make_schedule(ScheduleConfig(timestep_spacing="trailing"), 1)
    (step,) = run(name, schedule=schedule)
    assert torch.equal(step.x, step.x0) and step.level.t == 999
