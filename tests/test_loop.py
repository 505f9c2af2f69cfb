"""The loop: a run may be watched, paused, edited, resumed, rewound and forked, and never changes for being looked at.

Also the noise it is given, and the ends of a schedule, alpha = 0 and sigma = 0.
"""

import copy
import dataclasses
import io
import itertools
import math
from functools import partial

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from reference import normal
from test_sampler_parity import (
    SHAPE,
    VARIANTS,
    config_of,
    denoiser,
    error,
    generators,
    make,
    quiet,
    run_diffusers,
)

from ldm.diffusion import to_x0_eps
from ldm.errors import LDMError
from ldm.noise import Noise
from ldm.samplers import SAMPLERS
from ldm.samplers.lines import along_eps, along_x0
from ldm.samplers.onestep import ddim
from ldm.sampling import sample
from ldm.schedules import Level, ScheduleConfig, make_schedule

ALL = {**{name: method.step for name, method in SAMPLERS.items()}, "ddim eta=1": partial(ddim, eta=1.0)}
STOCHASTIC = [name for name, method in SAMPLERS.items() if method.adds_noise] + ["ddim eta=1"]
# They look at earlier steps; "dpm++2s" at the one before, in every second row.
MULTISTEP = [
    name for name in ALL if name.startswith(("lms", "plms", "pndm", "dpm++", "dpm2m", "dpm3m", "deis", "unipc"))
]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
N = 6
SCHEDULE = make_schedule(ScheduleConfig(**SD), N)
COMPAT = make_schedule(ScheduleConfig(**SD), N, compat=True)
X = normal(0, 2, 4, 3, 5)

every_sampler = pytest.mark.parametrize("name", ALL)
every_k = pytest.mark.parametrize("k", range(N + 1))
both_truths = pytest.mark.parametrize("schedule", [SCHEDULE, COMPAT], ids=["method", "compat"])


def denoise(x, level, schedule=SCHEDULE):
    return to_x0_eps(torch.tanh(0.8 * x + 0.1 * level.t / 1000), x, level.alpha, level.sigma, schedule.prediction)


def run(name, x=X, schedule=SCHEDULE, noise=None, after=(), first=0):
    noise = Noise.from_seeds([1, 2]) if noise is None else noise
    return sample(partial(denoise, schedule=schedule), x, schedule, ALL[name], noise, after, first)


def step_alone(name, x, i, history=(), noise=None, schedule=SCHEDULE):
    """The sampler called by hand, without the loop."""
    noise = Noise.from_seeds([1, 2]) if noise is None else noise
    return ALL[name](partial(denoise, schedule=schedule), x, schedule, i, list(history), noise)


def same(a, b):
    """Two runs, bit for bit, the states of their noise too."""
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        assert (s.level, s.next) == (t.level, t.next)
        assert all(torch.equal(getattr(s, key), getattr(t, key)) for key in ("x_before", "x", "x0", "eps"))
        assert s.corrected is t.corrected is None or torch.equal(s.corrected, t.corrected)
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
@both_truths
def test_a_sampler_is_a_pure_function(name, schedule):
    """Called twice on one row it answers the same twice, and changes neither x, nor the steps it was shown."""
    steps = list(run(name, schedule=schedule))
    kept = copy.deepcopy(steps)
    for i in range(N):
        noise, history, x = Noise.from_seeds([1, 2]), steps[:i], steps[i].x_before
        answers = []
        for _ in range(2):
            if i:
                noise.restore(steps[i - 1].noise_state)
            else:
                noise = Noise.from_seeds([1, 2])
            answers.append(ALL[name](partial(denoise, schedule=schedule), x, schedule, i, history, noise))
        assert torch.equal(answers[0].x, answers[1].x) and torch.equal(answers[0].x, steps[i].x)
        assert len(history) == i and all(a is b for a, b in zip(history, steps, strict=False))
    assert same(steps, kept)
    assert not any(s.edited for s in steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_asks_the_network_as_often_as_its_method_says(name):
    """In the middle of a run; and it draws noise if, and only if, it says so."""
    asked, method = [], SAMPLERS[name]
    steps = list(run(name))
    noise = Noise.from_seeds([1, 2])
    before = noise.state()

    def counting(x, level):
        asked.append(level)
        return denoise(x, level)

    method.step(counting, steps[3].x_before, SCHEDULE, 3, steps[:3], noise)
    assert len(asked) == method.evaluations and asked[0] == SCHEDULE[3]
    assert method.adds_noise == any(not torch.equal(a, b) for a, b in zip(before, noise.state(), strict=True))


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
@both_truths
@every_k
def test_resumed_at_any_step_a_run_is_the_unbroken_one(name, schedule, k):
    go = partial(run, name, schedule=schedule)
    expected = list(go())
    paused, begun = go(), []
    for _ in range(k):
        begun.append(next(paused))
    noise = Noise.from_seeds([1, 2] if k == 0 else [77, 78])  # steps carry their noise: the seeds no longer matter
    assert same([*begun, *go(noise=noise, after=begun)], expected)
    assert same([*begun, *paused], expected)  # and the first run goes on as if nobody had forked


@every_sampler
@both_truths
def test_rewinding_the_same_noise_source_repeats_the_run(name, schedule):
    noise = Noise.from_seeds([1, 2])
    expected = list(run(name, noise=noise, schedule=schedule))
    for k in (4, 1, 3, 5, 2):
        assert same([*expected[:k], *run(name, noise=noise, schedule=schedule, after=expected[:k])], expected)


@every_sampler
@every_k
def test_a_run_may_begin_at_any_row(name, k):
    """As image-to-image does: the rows from `first` on, and nothing before them; it can be resumed too."""
    steps = list(run(name, first=k))
    assert [s.level for s in steps] == list(SCHEDULE.levels[k:-1])
    if k == N:
        return
    assert torch.equal(steps[0].x_before, X) and torch.equal(steps[0].x, step_alone(name, X, k).x)
    for j in range(N - k + 1):
        noise = Noise.from_seeds([1, 2] if j == 0 else [77, 78])
        assert same([*steps[:j], *run(name, first=k, noise=noise, after=steps[:j])], steps)
    if name == "dpm++2s" and k % 2:  # its pairs begin on even rows
        return
    levels = tuple(level._replace(i=i) for i, level in enumerate(SCHEDULE.levels[k:]))
    shorter = dataclasses.replace(SCHEDULE, levels=levels)
    for a, b in zip(steps, run(name, schedule=shorter), strict=True):
        assert torch.equal(a.x, b.x)


@pytest.mark.parametrize("first", [-1, N + 1])
def test_a_run_that_begins_outside_its_schedule_is_refused(first):
    with pytest.raises(LDMError, match=f"A run of {N} steps can begin at row 0 to {N}, not {first}"):
        next(run("ddim", first=first))


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
    for k in range(1, 5):
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
    fresh = step_alone(name, x, k, [], noise)
    assert torch.equal(live[k].x_before, x) and torch.equal(live[k].x, fresh.x)
    assert (live[k].x - plain[k].x).abs().max() > 1e-3
    if k + 1 < N:  # and from there on the new steps are the history
        assert torch.equal(live[k + 1].x, step_alone(name, fresh.x, k + 1, [fresh], noise).x)

    forked = list(run(name))[:k]
    edit(forked[-1], in_place)
    assert same([*forked, *run(name, after=forked)], live)


def matters(name, k):
    """Whether step k of six looks at what came before it."""
    if name == "dpm++2s":
        return k % 2 == 1 and k < N - 1
    if name == "pndm":  # three steps of Runge and Kutta's come first
        return k >= 3
    return k < N - 1 or name in ("lms", "plms")  # the others' step to sigma = 0 is of first order


@pytest.mark.parametrize("name", MULTISTEP)
def test_the_history_that_an_edit_ends_would_have_mattered(name):
    """Otherwise the test above shows nothing for the multistep samplers."""
    steps = list(run(name))
    for k in range(1, N):
        stale, fresh = (step_alone(name, steps[k].x_before, k, history) for history in (steps[:k], []))
        if matters(name, k):
            assert (stale.x - fresh.x).abs().max() > 1e-4, k
        else:
            assert torch.equal(stale.x, fresh.x), k
        if name not in ("plms", "pndm"):  # they begin with more evaluations, and not with a lower order
            line = along_eps(fresh.x_before, fresh.eps, fresh.level, fresh.next) if name == "lms" else None
            line = along_x0(fresh.x_before, fresh.x0, fresh.level, fresh.next) if line is None else line
            if name not in STOCHASTIC:
                assert torch.equal(fresh.x, line)


@pytest.mark.parametrize("name", sorted(set(ALL) - set(MULTISTEP)))
def test_samplers_that_are_not_multistep_have_no_past(name):
    steps = list(run(name))
    for k in range(1, N):
        noise = Noise.from_seeds([1, 2])
        noise.restore(steps[k - 1].noise_state)
        assert torch.equal(step_alone(name, steps[k].x_before, k, [], noise).x, steps[k].x)


@pytest.mark.parametrize("name", ["dpm++2m", "unipc3", "pndm"])
def test_a_replaced_step_counts_as_edited(name):
    steps = list(run(name))
    other = dataclasses.replace(steps[2], x=steps[2].x + 0.1)
    assert other.edited and not dataclasses.replace(steps[2], cond=None).edited
    forked, live = [*steps[:2], other], copy.deepcopy(steps[:3])
    live[2].x = steps[2].x + 0.1
    pairs = zip(run(name, after=forked), run(name, after=live), strict=True)
    assert all(torch.equal(a.x, b.x) for a, b in pairs)


@pytest.mark.parametrize("name", MULTISTEP)
def test_two_edits_leave_the_history_after_the_later_one(name):
    steps = list(run(name))[:5]
    edit(steps[0], True)
    edit(steps[2], False)
    noise = Noise.from_seeds([1, 2])
    noise.restore(steps[4].noise_state)
    assert torch.equal(next(run(name, after=steps)).x, step_alone(name, steps[4].x, 5, steps[3:5], noise).x)


# ------------------------------------------------------------------------------------ editing, as diffusers takes it


@every_sampler
@pytest.mark.parametrize("k", range(1, N))
def test_under_compat_an_edit_leaves_the_history(name, k):
    """diffusers can't know of an edit: a multistep sampler builds on all steps, though they led elsewhere."""
    live = []
    for step in run(name, schedule=COMPAT):
        if step.i == k - 1:
            edit(step, True)
        live.append(step)
    noise = Noise.from_seeds([3, 4])
    noise.restore(live[k - 1].noise_state)
    expected = step_alone(name, live[k - 1].x, k, live[:k], noise, COMPAT)
    assert torch.equal(live[k].x_before, live[k - 1].x) and torch.equal(live[k].x, expected.x)
    noise.restore(live[k - 1].noise_state)
    fresh = step_alone(name, live[k - 1].x, k, [], noise, COMPAT)
    if name in MULTISTEP and matters(name, k):
        assert (live[k].x - fresh.x).abs().max() > 1e-4
    else:
        assert torch.equal(live[k].x, fresh.x)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("unipc")])
def test_under_compat_unipc_overrides_an_edit(name):
    """Its corrector starts from the row before: of the edit it keeps only what the network says of it, here nothing."""

    def deaf(x, level):
        x0 = torch.tanh(X + level.t / 500)
        return to_x0_eps(x0, x, level.alpha, level.sigma, "sample")

    for schedule in (COMPAT, SCHEDULE):
        runs = []
        for edits in (False, True):
            runs.append([])
            for step in sample(deaf, X, schedule, ALL[name], Noise([])):
                if edits and step.i == 2:
                    edit(step, False)
                runs[-1].append(step)
        plain, live = runs
        assert (live[2].x - plain[2].x).abs().max() > 0.1
        assert torch.equal(live[3].x, plain[3].x) == schedule.compat
        assert schedule.compat or (live[3].x - plain[3].x).abs().max() > 0.1


# Under the names of test_sampler_parity.py; a sampler without a past has nothing to forget.
DIFFUSERS = [name for name, (_, _, sampler) in VARIANTS.items() if sampler in MULTISTEP]


@pytest.mark.parametrize("n", [N, 16])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_under_compat_an_edit_between_two_steps_does_what_it_does_in_diffusers(name, n):
    """Every class that keeps a past, in float64, its latent edited after step 2 and after step 3.

    PNDM's step 2 is its last by Runge and Kutta, of four evaluations, and its step 3 the first by the past.
    """
    # As Stable Diffusion's file has it: without the offset PNDM's last two rows are one, which the default refuses.
    offset = {"steps_offset": 1} if VARIANTS[name][0] == "PNDMScheduler" else {}
    scheduler = make(name, n, prediction_type="v_prediction", **offset)
    schedule = make_schedule(config_of(scheduler), n, compat=True)
    x = normal(3, *SHAPE, dtype=torch.float64)

    def edited(row, x):
        return x * 0.5 + 0.25 if row in (3, 4) else x

    with quiet():
        reference = run_diffusers(scheduler, n, x, edit=edited)[1:]
    method, live = ALL[VARIANTS[name][2]], []
    for step in sample(denoiser(schedule), x * schedule.start_scale, schedule, method, Noise(generators())):
        if step.i in (2, 3):
            edit(step, in_place=step.i == 2)
        live.append(step)
    assert len(live) == len(reference) == n
    assert max(error(step.x, expected) for step, expected in zip(live, reference, strict=True)) < 1e-10
    default = dataclasses.replace(schedule, compat=False)
    fresh = next(sample(denoiser(default), x, default, method, Noise(generators()), live[:3]))
    assert error(fresh.x, live[3].made[0]) > 0.01  # the default, which drops the history, goes elsewhere


# ------------------------------------------------------------------------------------ steps of another run


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


@every_sampler
@both_truths
def test_a_picture_does_not_depend_on_its_batch(name, schedule):
    *_, both = run(name, schedule=schedule)
    for k, seed in enumerate((1, 2)):
        *_, alone = run(name, x=X[k : k + 1], schedule=schedule, noise=Noise.from_seeds([seed]))
        assert torch.equal(alone.x, both.x[k : k + 1])
    *_, other = run(name, schedule=schedule, noise=Noise.from_seeds([1, 3]))
    assert torch.equal(other.x[0], both.x[0]) and torch.equal(other.x[1], both.x[1]) != (name in STOCHASTIC)


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
    allowed = {torch.bfloat16: 0.06, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    assert (last.x.double() - single.x.double()).abs().max() < allowed * single.x.abs().max()


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


BLIND = {  # alpha = 0 in the first row: zero terminal signal-to-noise (Lin et al. 2023), and flow matching
    "zero SNR": ScheduleConfig(
        **SD, timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "flow": ScheduleConfig(prediction_type="flow", rule="flow", shift=2.0),
}


@every_sampler
@pytest.mark.parametrize("table", BLIND)
def test_a_schedule_may_begin_at_alpha_0(name, table):
    """x is pure noise and lambda minus infinity there: one step of first order, to which later ones don't look back."""
    schedule, x, asked = make_schedule(BLIND[table], N), X.double(), []

    def counting(x, level):
        asked.append(level)
        return denoise(x, level, schedule)

    assert schedule[0].alpha == 0 and schedule[0].sigma == 1
    steps = []
    for step in sample(counting, x, schedule, ALL[name], Noise.from_seeds([1, 2])):
        if step.i == 0:
            assert len(asked) == (2 if name == "flow-heun" else 1)  # its slopes need no division: Heun's rule at once
        steps.append(step)
    assert all(torch.isfinite(s.x).all() and s.x.std() > 0.05 for s in steps)
    first, level, after = steps[0], *schedule.step(0)
    torch.testing.assert_close(first.eps, x, rtol=0, atol=1e-15)
    line = along_x0(x, first.x0, level, after)
    torch.testing.assert_close(line, after.alpha * first.x0 + after.sigma * x, rtol=0, atol=1e-15)
    if name in STOCHASTIC and name != "tcd":  # all noise is renewed: the posterior forgets x
        line = after.alpha * first.x0 + after.sigma * Noise.from_seeds([1, 2])(x)
    if name not in ("flow-heun", "tcd"):
        # LCM mixes 3e-9 of x into its picture.
        torch.testing.assert_close(first.x, line, rtol=0, atol=1e-7 if name == "lcm" else 1e-14)
    assert torch.equal(steps[1].x, redo(name, schedule, steps, 1, []).x)
    if name in MULTISTEP:  # the third step looks back to the second again
        k = {"dpm++2s": 3, "pndm": 4}.get(name, 2)
        assert (steps[k].x - redo(name, schedule, steps, k, []).x).abs().max() > 1e-6
        if name not in ("dpm++2s", "pndm"):
            assert torch.equal(steps[k].x, redo(name, schedule, steps, k, steps[1:k]).x)


def redo(name, schedule, steps, k, history):
    """Step k of a run once more, with another past and the same noise."""
    noise = Noise.from_seeds([1, 2])
    noise.restore(steps[k - 1].noise_state)
    return step_alone(name, steps[k].x_before, k, history, noise, schedule)


@every_sampler
@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_a_step_to_sigma_0_gives_exactly_alpha_x0(name, alpha):
    """Methods that draw their curve through eps come there by division, and LCM's network means x itself at t = 0."""
    levels = (*SCHEDULE.levels[:-1], Level(N, 0.0, alpha, 0.0))
    schedule = dataclasses.replace(SCHEDULE, levels=levels)
    *_, before, last = run(name, x=X.double(), schedule=schedule)
    assert last.x.isfinite().all() and last.x.std() > 0.1
    if name == "lcm":
        assert last.level.t == 0 and torch.equal(last.x, alpha * last.x_before)
    elif name in ("lms", "plms", "pndm"):
        lone = step_alone(name, last.x_before, N - 1, [], schedule=schedule)
        torch.testing.assert_close(lone.x, alpha * lone.x0, rtol=0, atol=1e-13)
        eps = (last.x_before - last.level.alpha / alpha * last.x) / last.level.sigma  # the mean that it went along
        assert (eps - last.eps).abs().max() < 4 * (last.eps - before.eps).abs().max()
        assert (eps - last.eps).abs().max() > 0.02 * (last.eps - before.eps).abs().max()
    else:  # (DDPM's weights are a quotient)
        torch.testing.assert_close(last.x, alpha * last.x0, rtol=1e-15 if name == "ddpm" else 0, atol=0)


def twice_on_one_level():
    """Tables that end twice on one level: linspace stops at t = 0, and an end on the first training level is there."""
    for betas in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        fields = {"beta_schedule": betas, "timestep_spacing": "linspace", "prediction_type": "v_prediction"}
        yield ScheduleConfig(**fields, set_alpha_to_one=False, rule="ddim"), None
        yield ScheduleConfig(**fields, final_sigmas_type="sigma_min", rule="euler"), None
        for rule in ("unipc", "deis"):
            yield ScheduleConfig(**fields, final_sigmas_type="sigma_min", rule=rule), "karras"
        # here the rows differ by rounding, and the noise between them would be the root of -1e-15
        yield ScheduleConfig(**fields, final_sigmas_type="sigma_min", rule="dpm"), "exponential"


@every_sampler
def test_under_compat_a_schedule_may_end_twice_on_one_level(name):
    """A step of length 0 changes nothing: UniPC has mended the step before, and LCM noises whatever it is given."""
    for config, sigmas in twice_on_one_level():
        if name == "lcm":
            continue
        schedule = make_schedule(config, 4, compat=True, sigmas=sigmas)
        assert math.isclose(schedule[3].ratio, schedule[4].ratio, rel_tol=1e-6)
        *_, last = run(name, schedule=schedule, x=X.double())
        kept = last.x_before if last.corrected is None else last.corrected
        assert kept.isfinite().all() and kept.std() > 0.05
        # Where the rows differ by rounding, noise may be added: of the root of that.
        torch.testing.assert_close(last.x, kept, rtol=0, atol=1e-6 if sigmas == "exponential" else 1e-11)


def test_without_compat_a_step_of_length_0_is_refused():
    for config, sigmas in twice_on_one_level():
        if sigmas is None:
            with pytest.raises(LDMError, match=r"Rows 3 and 4 .* are the same noise level"):
                make_schedule(config, 4)


@every_sampler
def test_one_step_goes_from_noise_to_the_predicted_latent(name):
    schedule = make_schedule(ScheduleConfig(timestep_spacing="trailing"), 1)
    (step,) = run(name, x=X.double(), schedule=schedule)
    assert step.level.t == 999 and step.x0.std() > 0.1
    if name in ("lms", "lcm"):  # one divides by alpha, the other mixes 3e-9 of x into the picture
        torch.testing.assert_close(step.x, step.x0, rtol=1e-6, atol=1e-8)
    else:
        assert torch.equal(step.x, step.x0)


@every_sampler
@pytest.mark.parametrize("n", [1, 2, 3, 4, 14, 15])
@pytest.mark.parametrize("compat", [False, True])
def test_runs_of_every_length_are_finite(name, n, compat):
    """Methods that count their first and last steps, where those are all steps there are."""
    schedule = make_schedule(ScheduleConfig(**SD, prediction_type="v_prediction"), n, compat=compat)
    steps = list(run(name, x=X.double(), schedule=schedule))
    assert [s.i for s in steps] == list(range(n))
    assert all(s.x.isfinite().all() and s.x.std() > 0.05 for s in steps)
