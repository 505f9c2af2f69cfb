"""Samplers where the answer is known in closed form: orders of convergence, laws of random samples, exact integrals.

Whole runs against diffusers' classes are in `test_sampler_parity.py`; here stand DDIM and DDPM, where diffusers departs
from the method, and what mathematics says of all samplers. Data are Gaussian or of two modes: there the best denoiser
and the solution of the probability-flow ODE are known.
"""

import itertools
import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from reference import assert_close, normal, scheduler_of
from test_sampler_parity import SD, SHAPE, config_of, denoiser, error, generators, network, run_diffusers

from ldm.diffusion import Prediction, to_x0_eps
from ldm.noise import Noise
from ldm.samplers import SAMPLERS
from ldm.samplers.lines import along_x0, ancestral, lam
from ldm.samplers.multistep import deis, dpm, dpmpp, moments, weights
from ldm.samplers.onestep import ddim, ddpm, euler, euler_ancestral, tcd
from ldm.sampling import Step, sample
from ldm.schedules import Level, Schedule, ScheduleConfig, alpha_bars, make_schedule


def run_ours(schedule, sampler, x):
    x = x * schedule.start_scale
    return [x, *(step.x for step in sample(denoiser(schedule), x, schedule, sampler, Noise(generators())))]


# ------------------------------------------------------------------------------------ noise, and the swapped sampler


ETAS = {  # DDIM's eta is an argument of `step`, and so no part of a scheduler file
    "ddpm": (ddpm, DDPMScheduler, {}),
    "ddim eta=0.4": (partial(ddim, eta=0.4), DDIMScheduler, {"eta": 0.4}),
    "ddim eta=1": (partial(ddim, eta=1.0), DDIMScheduler, {"eta": 1.0}),
}


@pytest.mark.parametrize("name", ETAS)
def test_the_same_generators_give_the_noise_diffusers_draws(name):
    """The real float32 classes, a list of generators: the same pictures, and the streams end at the same place.

    But that diffusers' DDIM draws once more, for a last step that adds none.
    """
    sampler, cls, extra = ETAS[name]
    scheduler = scheduler_of(cls, SD, 20, torch.float32)  # offset 0: DDPM's last timestep is 0, where both draw nothing
    gs, noise, x = generators(), Noise(generators()), normal(3, *SHAPE)
    reference = run_diffusers(scheduler, 20, x, noise=gs, **extra)[-1]
    schedule = make_schedule(config_of(scheduler), 20)
    *_, last = sample(denoiser(schedule), x, schedule, sampler, noise)
    assert_close(last.x, reference, atol=1e-5)
    if cls is DDIMScheduler:
        assert not torch.equal(noise.state()[0], gs[0].get_state())
        noise(x)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(noise.state(), gs, strict=True))
    *_, other = sample(denoiser(schedule), x, schedule, sampler, Noise.from_seeds((11, 13)))
    assert torch.equal(other.x[0], last.x[0]) and (other.x[1] - last.x[1]).abs().max() > 0.1


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_under_compat_ddim_with_noise_equals_diffusers(spacing, eta):
    for n, prediction in itertools.product((1, 2, 7, 30), ("epsilon", "v_prediction", "sample")):
        fields = {**SD, "timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": n % 2 == 0}
        scheduler, x = scheduler_of(DDIMScheduler, fields, n), normal(3, *SHAPE, dtype=torch.float64)
        reference = run_diffusers(scheduler, n, x, eta=eta)
        ours = run_ours(make_schedule(config_of(scheduler), n, compat=True), partial(ddim, eta=eta), x)
        assert max(map(error, ours, reference)) < 1e-9, (n, prediction)


@pytest.mark.parametrize("file", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize(
    "name, cls",
    [
        ("ddpm", DDPMScheduler),
        ("ddim", DDIMScheduler),
        ("euler", EulerDiscreteScheduler),
        ("dpm++2m", DPMSolverMultistepScheduler),
    ],
)
def test_a_swapped_sampler_with_its_rule_equals_from_config(file, name, cls):
    method = SAMPLERS[name]
    saved = file(**SD, timestep_spacing="leading", steps_offset=1)
    scheduler = cls.from_config(saved.config, **({"clip_sample": False} if name in ("ddpm", "ddim") else {}))
    scheduler.set_timesteps(12)
    x = normal(3, *SHAPE)
    reference = run_diffusers(scheduler, 12, x)
    ours = run_ours(make_schedule(config_of(saved), 12, rule=method.rule), method.step, x)
    assert max(map(error, ours, reference)) < 1e-5


def test_no_two_samplers_are_the_same():
    """On a nonlinear network, else the comparisons with diffusers would show little. Three are one method."""
    x, one = normal(3, *SHAPE, dtype=torch.float64), ({"ddim", "euler"}, {"ddpm", "euler-a"})
    schedule = make_schedule(ScheduleConfig(**SD, timestep_spacing="trailing"), 20)
    finals = {name: run_ours(schedule, method.step, x)[-1] for name, method in SAMPLERS.items()}
    for (a, x_a), (b, x_b) in itertools.combinations(finals.items(), 2):
        apart = error(x_a, x_b)
        assert apart < 1e-12 if {a, b} in one else apart > 1e-4, (a, b)


# ------------------------------------------------------------------------------------ DDIM: the method and diffusers


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_default_ddim_is_the_papers_formula_on_the_very_next_timestep(spacing, eta):
    """Song et al. 2021, equations 12 and 16, in their letters (their alpha is our alpha^2), on diffusers' timesteps."""
    for n in (1, 2, 3, 7, 30):
        scheduler = scheduler_of(DDIMScheduler, {**SD, "timestep_spacing": spacing}, n)
        x, alphas, noise = normal(3, *SHAPE, dtype=torch.float64), scheduler.alphas_cumprod, Noise(generators())
        ours = run_ours(make_schedule(config_of(scheduler), n), partial(ddim, eta=eta), x)
        ts = scheduler.timesteps.tolist()
        for i, (t, a) in enumerate(zip(ts, alphas[ts].tolist(), strict=True)):
            b = alphas[ts[i + 1]].item() if i + 1 < n else 1.0
            sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
            eps = network(x, t)
            x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b - sigma**2) ** 0.5 * eps
            x = x + sigma * noise(x) if eta else x
            assert error(ours[i + 1], x) < 1e-9, (n, i)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_default_ddim_with_eta_1_equals_diffusers_ddpm(spacing):
    """A second witness for the previous timestep: Song et al.'s equation 16 at eta = 1 is Ho et al.'s posterior."""
    for n in (2, 7, 30):
        scheduler = scheduler_of(DDPMScheduler, {**SD, "timestep_spacing": spacing}, n)
        x = normal(3, *SHAPE, dtype=torch.float64)
        reference = run_diffusers(scheduler, n, x)
        schedule = make_schedule(config_of(scheduler), n, rule="ddim")
        assert max(map(error, run_ours(schedule, partial(ddim, eta=1.0), x), reference)) < 1e-9


def test_default_ddim_with_trailing_equals_diffusers_euler_and_its_first_order_dpm_solver():
    """Two more: DDIM is Euler's method in sigma/alpha and DPM-Solver++ of first order; both land on the next row."""
    fields = {**SD, "timestep_spacing": "trailing"}
    for n in (3, 7, 30):
        x = normal(3, *SHAPE, dtype=torch.float64)
        schedule = make_schedule(ScheduleConfig(**fields, rule="ddim"), n)
        for cls, order, start in (
            (EulerDiscreteScheduler, {}, schedule[0].sigma),
            (DPMSolverMultistepScheduler, {"solver_order": 1}, 1),
        ):
            reference = run_diffusers(scheduler_of(cls, {**fields, **order}, n), n, x)
            assert max(map(error, run_ours(schedule, ddim, x * start), reference)) < 1e-9


@pytest.mark.parametrize("spacing, n, least", [("linspace", 30, 0.01), ("trailing", 30, 0.001), ("trailing", 7, 0.01)])
def test_defect_ddim_takes_a_wrong_previous_timestep(spacing, n, least):
    """REFERENCE_DEFECTS.md, 1: when this fails, diffusers has mended it, and `compat` has lost its object."""
    scheduler = scheduler_of(DDIMScheduler, {**SD, "timestep_spacing": spacing}, n)
    x = normal(3, *SHAPE, dtype=torch.float64)
    theirs = run_diffusers(scheduler, n, x)[-1]
    compat, method = (run_ours(make_schedule(config_of(scheduler), n, compat=c), ddim, x)[-1] for c in (True, False))
    assert error(compat, theirs) < 1e-9
    assert error(method, theirs) > least


def test_defect_ddim_stops_short_of_the_clean_latent():
    """REFERENCE_DEFECTS.md, 1: from 501 steps on, offset 1 makes the last step end at t = 0 instead of at alpha = 1."""
    scheduler = scheduler_of(DDIMScheduler, {**SD, "steps_offset": 1}, 600)
    x = normal(3, *SHAPE, dtype=torch.float64)
    theirs = scheduler.step(network(x, 1.0), 1, x)
    assert scheduler.timesteps[-1] == 1
    assert error(theirs.prev_sample, theirs.pred_original_sample) > 1e-3
    for compat in (True, False):
        schedule = make_schedule(config_of(scheduler), 600, compat=compat)
        step = ddim(denoiser(schedule), x, schedule, 599, [], Noise(generators()))
        assert error(step.x, theirs.prev_sample if compat else theirs.pred_original_sample) < 1e-11


def test_defect_ddpm_adds_noise_to_a_finished_latent():
    """REFERENCE_DEFECTS.md, 5: with an offset diffusers' last step draws noise, and adds it with std 1e-10."""
    scheduler = scheduler_of(DDPMScheduler, {**SD, "steps_offset": 1}, 5)
    gs, x = generators(), normal(3, *SHAPE, dtype=torch.float64)
    before = [g.get_state() for g in gs]
    reference = scheduler.step(network(x, 1.0), scheduler.timesteps[-1], x, generator=gs).prev_sample
    assert not torch.equal(before[0], gs[0].get_state())
    schedule, noise = make_schedule(config_of(scheduler), 5), Noise(generators())
    ours = ddpm(denoiser(schedule), x, schedule, 4, [], noise)
    assert torch.equal(ours.x, ours.x0) and torch.equal(before[0], noise.state()[0])
    assert 1e-11 < (ours.x - reference).abs().max() < 1e-9


# ------------------------------------------------------------------------------------ one method under many names


def equal_runs(a, b, flow=False):
    """Every latent of both runs, on each rule's table and spacing, with the same noise."""
    x = normal(3, *SHAPE, dtype=torch.float64)
    tables = [ScheduleConfig(prediction_type="flow", rule="flow", shift=3.0)] if flow else []
    for rule, spacing in itertools.product(("ddpm", "ddim", "euler", "dpm"), ("leading", "linspace", "trailing")):
        tables.append(ScheduleConfig(**SD, timestep_spacing=spacing, rule=rule))
    for config in tables:
        schedule = make_schedule(config, 20)
        runs = [run_ours(schedule, s, x) for s in (a, b)]
        assert max(map(error, *runs)) < 1e-12, config


def test_ddim_with_eta_1_is_ddpm():
    """The same mean and the same noise in every step (Song et al. 2021, section 4.1)."""
    equal_runs(ddpm, partial(ddim, eta=1.0), flow=True)


def test_euler_ancestral_is_ddpm():
    """Down past the next level and back up to it: the same posterior."""
    equal_runs(ddpm, euler_ancestral, flow=True)


def test_the_first_order_of_the_sde_is_ddpm():
    """(Lu et al. 2022b, appendix: SDE-DPM-Solver++(1) is DDIM with eta = 1.)"""
    equal_runs(ddpm, partial(dpmpp, order=1, sde=True), flow=True)


@pytest.mark.parametrize(
    "sampler",
    [euler, partial(dpmpp, order=1, sde=False), partial(dpm, order=1), partial(deis, order=1), partial(tcd, eta=0.0)],
    ids=["euler", "dpm++1", "dpm1", "deis1", "tcd eta=0"],
)
def test_every_deterministic_method_of_first_order_is_ddim(sampler):
    """One line in different coordinates (Lu et al. 2022a, section 4.1)."""
    equal_runs(ddim, sampler, flow=True)


def test_lambda_is_half_the_log_of_the_signal_to_noise_ratio():
    level = Level(0, 0.0, 0.6, 0.8)
    assert lam(level) == pytest.approx(0.5 * math.log(0.36 / 0.64), abs=1e-15)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_an_ancestral_step_arrives_at_the_next_level_s_noise(eta):
    """Song et al. 2021, equation 16, in their letters: what is left of the noise and what is added make sigma'."""
    level, after = Level(0, 0.0, 0.6, 0.8), Level(1, 0.0, 0.8, 0.6)
    down, std = ancestral(level, after, eta)
    assert down.alpha == after.alpha and math.hypot(down.sigma, std) == pytest.approx(after.sigma, abs=1e-15)
    a, b = level.alpha**2, after.alpha**2
    assert std == pytest.approx(eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b), abs=1e-15)


# ------------------------------------------------------------------------------------ solutions known in closed form

BARS = alpha_bars(ScheduleConfig(**SD)).double().numpy()


def even_in_lambda(n, first=-0.5, last=1.5, compat=False):
    """n steps of equal length in log(alpha / sigma), alpha^2 + sigma^2 = 1: no ends to break orders of convergence.

    Where lambda is -1 to 2 predictions change most: there errors show their order early.
    """
    levels = []
    for i in range(n + 1):
        x = first + (last - first) * i / n
        levels.append(Level(i, float(n - i), (1 + math.exp(-2 * x)) ** -0.5, (1 + math.exp(2 * x)) ** -0.5))
    return Schedule(tuple(levels), "epsilon", 1.0, "ddim", compat=compat, bars=BARS)


def even_in_time(n, bars):
    """Every (N/n)th of N training steps, whose alpha^2 are `bars`: what PNDM was made for."""
    levels = (
        Level(i, float(t), math.sqrt(bars[t]), math.sqrt(1 - bars[t]))
        for i, t in enumerate(range(len(bars) - 1, -1, -(len(bars) - 1) // n))
    )
    return Schedule(tuple(levels), "epsilon", 1.0, "ddim", bars=bars, total=len(bars))


def even_in_ratio(n):
    """Time is sigma / alpha, the variable of PNDM's line: here Adams and Bashforth's coefficients are exact."""
    return even_in_time(n, 1 / (1 + np.linspace(0.3, 1.5, 1025) ** 2))


def cosine(n):
    """Nichol & Dhariwal's schedule without its ends: smooth, but sigma / alpha is no line in time."""
    return even_in_time(n, np.cos(np.linspace(0.15, 0.85, 1025) * math.pi / 2) ** 2)


MU, STD = 0.7, 0.5


def gaussian(x, level):
    """The exact denoiser of x0 ~ N(MU, STD^2), pixel by pixel: the mean of x0 given x."""
    variance = (level.alpha * STD) ** 2 + level.sigma**2
    x0 = (MU * level.sigma**2 + level.alpha * STD**2 * x) / variance
    return Prediction(x0, (x - level.alpha * x0) / level.sigma)


def gaussian_solution(x, level, after):
    """The probability-flow ODE keeps every quantile: x stays equally many standard deviations from the mean."""
    z = (x - level.alpha * MU) / math.hypot(level.alpha * STD, level.sigma)
    return after.alpha * MU + math.hypot(after.alpha * STD, after.sigma) * z


MODES = [(0.3, -1.0, 0.4), (0.7, 0.8, 0.3)]  # weight, mean, standard deviation: data of two kinds, a nonlinear denoiser


def two_modes(x, level):
    total, x0 = 0, 0
    for w, mean, std in MODES:
        variance = (level.alpha * std) ** 2 + level.sigma**2
        p = w * (-((x - level.alpha * mean) ** 2) / (2 * variance)).exp() / math.sqrt(variance)
        total, x0 = total + p, x0 + p * (mean * level.sigma**2 + level.alpha * std**2 * x) / variance
    return Prediction(x0 / total, (x - level.alpha * x0 / total) / level.sigma)


def two_modes_solution(x, level, after):
    """Keeping every quantile again: solve CDF_after(y) = CDF_level(x) by bisection."""

    def cdf(x, at):
        scale = [math.hypot(at.alpha * std, at.sigma) for _, _, std in MODES]
        return sum(w * torch.special.ndtr((x - at.alpha * m) / s) for (w, m, _), s in zip(MODES, scale, strict=True))

    low, high, wanted = torch.full_like(x, -9), torch.full_like(x, 9), cdf(x, level)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, after) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


DATA = {"gaussian": (gaussian, gaussian_solution), "two modes": (two_modes, two_modes_solution)}
both_data = pytest.mark.parametrize("data", DATA)
PIXELS = torch.linspace(-1.5, 1.5, 32, dtype=torch.float64).view(1, 1, 4, 8)


def error_of(sampler, schedule, data, start="own", end=7 / 8):
    """The error at row `end` * n: of UniPC's corrected latent, as the last step of a run has nobody to mend it.

    `start` "exact": at row n / 8, with a past of four steps on the solution itself.
    """
    denoise, solution = DATA[data]
    n, after = len(schedule), []
    stop, first = round(end * n), 0

    def at(i):
        return solution(PIXELS, schedule[0], schedule[i])

    if start == "exact":
        first = n // 8 - 4
        for i in range(first, n // 8):
            x, x_next = at(i), at(i + 1)
            p = denoise(x, schedule[i])
            after.append(Step(schedule[i], schedule[i + 1], x, x_next, *p, corrected=x, noise_state=[]))
    for step in sample(denoise, PIXELS, schedule, sampler, Noise([]), after, first):
        if step.i == stop:
            return ((step.x_before if step.corrected is None else step.corrected) - at(stop)).abs().max().item()
    return (step.x - at(n)).abs().max().item()


def slope(sampler, schedule, data, n=128, **kind):
    """log2 of what halving the steps divides the error by."""
    a, b = (error_of(sampler, schedule(k), data, **kind) for k in (n, 2 * n))
    assert 1e-13 < b < a < 0.1, (a, b)
    return math.log2(a / b)


DETERMINISTIC = {name: method for name, method in SAMPLERS.items() if not method.adds_noise}


@both_data
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name, data):
    """Halve the steps: a method of order p divides its error by 2^p, when its past is right.

    UniPC of order p has p + 1, with its corrector (Zhao et al. 2023, theorem 3.1). PNDM reaches its four where time is
    sigma / alpha.
    """
    schedule, order = (even_in_ratio, 4) if name in ("plms", "pndm") else (even_in_lambda, SAMPLERS[name].order)
    assert abs(slope(SAMPLERS[name].step, schedule, data, start="exact") - order) < 0.15


@both_data
@pytest.mark.parametrize("name", ["plms", "pndm"])
def test_pndm_is_of_second_order_where_time_is_not_sigma_over_alpha(name, data):
    """Liu et al. 2022, theorem 3.1: its line weighs all eps of a step alike, the solution by d(sigma/alpha)/dt.

    That is an error of h^3 in every step, however good the curve through eps; so on every schedule of real use.
    """
    for start in ("exact", "own"):
        assert abs(slope(SAMPLERS[name].step, cosine, data, start=start) - SAMPLERS[name].order) < 0.15
    assert SAMPLERS[name].order == 2


OWN_START = {  # order of a whole run where it isn't the method's: p = 1 + the order of the lowest step at the start
    "lms": 2, "dpm++3m": 2, "dpm3m": 2, "deis3": 2,  # one step of first order is off by h^2
    "unipc3": 3, "unipc3-bh1": 3,  # mended by UniC-1: h^3
}  # fmt: skip


@both_data
@pytest.mark.parametrize("name", sorted(set(DETERMINISTIC) - {"plms", "pndm"}))
def test_order_of_convergence_from_a_run_s_own_start(name, data):
    """One step of low order at the start costs one order more than many of them: it is but one."""
    measured = slope(SAMPLERS[name].step, partial(even_in_lambda, first=0.0, last=2.0), data)
    assert abs(measured - OWN_START.get(name, SAMPLERS[name].order)) < 0.15


@both_data
def test_pndm_s_own_start(data):
    """Runge and Kutta's steps are of fourth order; PLMS begins with one of second order, which is off by h^3."""
    assert abs(slope(SAMPLERS["pndm"].step, even_in_ratio, data) - 4) < 0.15
    assert abs(slope(SAMPLERS["plms"].step, partial(even_in_time, bars=STEEP), data, n=512) - 3) < 0.15


STEEP = 1 / (1 + np.linspace(0.2, 1.0, 1025) ** 2)


@both_data
@pytest.mark.parametrize("name", ["unipc2", "unipc3", "unipc3-bh1"])
def test_unipc_ends_with_a_step_of_first_order(name, data):
    """(`lower_order_final`) Nobody mends it: off by h^2 where the table ends above sigma = 0, where it is exact."""
    assert abs(slope(SAMPLERS[name].step, even_in_lambda, data, n=256, start="exact", end=1) - 2) < 0.15


@both_data
@pytest.mark.parametrize("name", ["dpm++3m", "dpm3m"])
def test_defect_dpm_solver_3m_is_of_second_order_in_diffusers(name, data):
    """REFERENCE_DEFECTS.md, 7: half of the parabola is missing; by default it isn't."""
    compat, method = (
        slope(SAMPLERS[name].step, partial(even_in_lambda, compat=c), data, start="exact") for c in (True, False)
    )
    assert abs(compat - 2) < 0.15 and abs(method - 3) < 0.15


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_stable_diffusion_schedule_reaches_the_solution(name):
    """On the table of real use: 100 steps from pure noise to the clean latent, each sampler on each rule's table."""
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
    for rule, spacing in itertools.product(("ddim", "euler", "dpm"), ("linspace", "trailing")):
        schedule = make_schedule(ScheduleConfig(**SD, timestep_spacing=spacing, rule=rule), 100)
        *_, last = sample(gaussian, x, schedule, SAMPLERS[name].step, Noise([]))
        off = (last.x - gaussian_solution(x, schedule[0], schedule[100])).abs().max()
        assert off < 0.04, (rule, spacing, off)


# ------------------------------------------------------------------------------------ curves, integrated exactly


def exact_moments(a, n):
    """The means of u^k, weighted by e^(-a(1-u)), by parts: the integral I_k = 1/a - (k/a) I_(k-1)."""
    integrals = [(1 - math.exp(-a)) / a]
    for k in range(1, n):
        integrals.append((1 - k * integrals[-1]) / a)
    return [i / integrals[0] for i in integrals]


@pytest.mark.parametrize("a", [-6.0, -0.5, 0.3, 1.0, 9.0])
def test_moments_are_the_exact_integrals(a):
    assert moments(a, 4) == pytest.approx(exact_moments(a, 4), rel=1e-10)


def test_moments_without_weight_are_those_of_a_line():
    assert moments(0.0, 4) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-14)
    assert moments(1e-9, 3) == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-8)  # where closed forms cancel


def test_weights_are_adams_and_bashforth_s_on_even_nodes():
    expected = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    assert weights([0, -1, -2, -3], [1, 1 / 2, 1 / 3, 1 / 4]) == pytest.approx(expected, rel=1e-12)


C = (0.8, -0.5, 0.9, 0.6)  # a polynomial's coefficients


def polynomial(c, at):
    return sum(a * at**k for k, a in enumerate(c))


def uneven(compat=False):
    """20 steps of different lengths in lambda."""
    at = np.cumsum([-1.0, *(0.15 + 0.1 * math.sin(2.3 * i) for i in range(20))]).tolist()
    levels = (Level(i, 900.0 - 40 * i, (1 + math.exp(-2 * x)) ** -0.5, (1 + math.exp(2 * x)) ** -0.5)
              for i, x in enumerate(at))  # fmt: skip
    return Schedule(tuple(levels), "epsilon", 1.0, "ddim", compat=compat, bars=BARS)


class Silence:
    """A source of noise that is always zero: what is left is the mean of a step."""

    def __call__(self, like):
        return torch.zeros_like(like)

    def state(self):
        return []

    def restore(self, state):
        pass


def predicts(c, what):
    """A network whose x0, or eps, is a polynomial in lambda (for "ratio": in sigma / alpha), whatever it sees."""

    def denoise(x, level):
        value = torch.full_like(x, polynomial(c, level.ratio if what == "ratio" else lam(level)))
        if what == "x0":
            return to_x0_eps(value, x, level.alpha, level.sigma, "sample")
        return to_x0_eps(value, x, level.alpha, level.sigma, "epsilon")

    return denoise


def mean_over(c, level, after, a):
    """The exact mean of a polynomial in lambda over a step: its coefficients in u, times the moments of u."""
    h = lam(after) - lam(level)
    shifted = np.polynomial.Polynomial(c)(np.polynomial.Polynomial([lam(level), h])).coef
    return float(np.dot(shifted, exact_moments(a, len(shifted))))


def middle_of(c, level, after):
    return polynomial(c, (lam(level) + lam(after)) / 2)


X0 = normal(4, 1, 1, 2, 3, dtype=torch.float64)
EXACT = {  # what is predicted, its degree, the exponent of the weight in h (None: the value in the middle of the step)
    "dpm++2m": ("x0", 1, None), "dpm++3m": ("x0", 2, 1),
    "dpm++2m-sde": ("x0", 1, None), "dpm++3m-sde": ("x0", 2, 2),
    "dpm2m": ("eps", 1, None), "dpm3m": ("eps", 2, -1), "deis2": ("eps", 1, -1), "deis3": ("eps", 2, -1),
    "unipc2": ("x0", 1, None), "unipc3": ("x0", 2, 1), "unipc3-bh1": ("x0", 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_polynomial_is_integrated_exactly(name):
    """Equations (1) and (2) of `multistep.py` on uneven steps, from where the past is long enough."""
    what, degree, weight = EXACT[name]
    c, sde = C[: degree + 1], name.endswith("sde")
    schedule = uneven()
    for step in sample(predicts(c, what), X0, schedule, SAMPLERS[name].step, Silence()):
        if step.i < degree or (name.startswith("unipc") and step.i > len(schedule) - degree - 1):
            continue
        level, after = step.level, step.next
        h = lam(after) - lam(level)
        mean = middle_of(c, level, after) if weight is None else mean_over(c, level, after, weight * h)
        x = step.x_before if step.corrected is None else step.corrected
        if what == "x0":
            kept = after.sigma / level.sigma * (math.exp(-h) if sde else 1)
            expected = kept * x + after.alpha * -math.expm1(-(2 if sde else 1) * h) * mean
        else:
            expected = after.alpha / level.alpha * x - after.sigma * math.expm1(h) * mean
        torch.testing.assert_close(step.x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["unipc2", "unipc3", "unipc2-bh1", "unipc3-bh1"])
def test_the_corrector_integrates_one_degree_more(name):
    order = int(name[5])
    c, before, seen = C[: order + 1], None, 0
    for step in sample(predicts(c, "x0"), X0, uneven(), SAMPLERS[name].step, Silence()):
        if before is not None and step.i >= order:
            level, after = before.level, before.next
            h = lam(after) - lam(level)
            whole = mean_over(c, level, after, h)
            expected = after.sigma / level.sigma * before.corrected + after.alpha * -math.expm1(-h) * whole
            if step.i <= 20 - order + 1:  # lower orders at the end
                torch.testing.assert_close(step.corrected, expected, rtol=0, atol=1e-12)
                assert (step.corrected - step.x_before).abs().max() > 1e-5
                seen += 1
        before = step
    assert seen > 10


def test_unipc1_s_corrector_is_the_trapezoid():
    """bh2 takes the mean of both ends; bh1 stretches the slope by h / (1 - e^-h), its B(h) being h."""
    for name in ("unipc1", "unipc1-bh1"):
        before = None
        for step in sample(predicts(C[:2], "x0"), X0, uneven(), SAMPLERS[name].step, Silence()):
            if before is not None:
                h = lam(before.next) - lam(before.level)
                w = 0.5 * (h / -math.expm1(-h) if name == "unipc1-bh1" else 1)
                mean = (1 - w) * before.x0 + w * step.x0
                expected = along_x0(before.corrected, mean, before.level, before.next)
                torch.testing.assert_close(step.corrected, expected, rtol=0, atol=1e-13)
            before = step


def test_lms_integrates_a_cubic_in_the_ratio_exactly():
    """x'/alpha' = x/alpha + the integral of eps d(sigma/alpha)."""
    integral = np.polynomial.Polynomial(C).integ()
    for step in sample(predicts(C, "ratio"), X0, uneven(), SAMPLERS["lms"].step, Silence()):
        if step.i >= 3:
            area = integral(step.next.ratio) - integral(step.level.ratio)
            expected = step.next.alpha * (step.x_before / step.level.alpha + area)
            torch.testing.assert_close(step.x, expected, rtol=0, atol=1e-12)


def test_heun_integrates_a_line_in_the_ratio_exactly():
    integral = np.polynomial.Polynomial(C[:2]).integ()
    for step in sample(predicts(C[:2], "ratio"), X0, uneven(), SAMPLERS["heun"].step, Silence()):
        area = integral(step.next.ratio) - integral(step.level.ratio)
        expected = step.next.alpha * (step.x_before / step.level.alpha + area)
        torch.testing.assert_close(step.x, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["plms", "pndm"])
def test_pndm_integrates_a_cubic_in_time_exactly(name):
    """Where time is sigma / alpha; PLMS from its fourth step on."""
    schedule = even_in_ratio(16)
    integral = np.polynomial.Polynomial(C).integ()
    for step in sample(predicts(C, "ratio"), X0, schedule, SAMPLERS[name].step, Silence()):
        if name == "pndm" or step.i >= 3:
            area = integral(step.next.ratio) - integral(step.level.ratio)
            expected = step.next.alpha * (step.x_before / step.level.alpha + area)
            torch.testing.assert_close(step.x, expected, rtol=0, atol=1e-12)


def test_defects_7_and_8_of_diffusers_parabola():
    """REFERENCE_DEFECTS.md: the mean of x0 = (l - lambda)^2 comes out half as large, and with noise below zero.

    A parabola that is nowhere negative has a positive mean under every weight.
    """
    for name, factor in (("dpm++3m", 1), ("dpm++3m-sde", 2)):
        for compat in (False, True):
            schedule = uneven(compat)
            level, after = schedule.step(6)
            h = lam(after) - lam(level)
            c = (lam(level) ** 2, -2 * lam(level), 1.0)
            run = sample(predicts(c, "x0"), X0, schedule, SAMPLERS[name].step, Silence())
            step = next(itertools.islice(run, 6, None))
            down, _ = ancestral(level, after, factor - 1)
            kept = down.sigma / level.sigma
            mean = ((step.x - kept * step.x_before) / (after.alpha - level.alpha * kept)).mean().item()
            exact = h**2 * exact_moments(factor * h, 3)[2]
            if not compat:
                assert mean == pytest.approx(exact, rel=1e-9)
            elif factor == 1:
                assert mean == pytest.approx(exact / 2, rel=1e-9)
            else:
                assert mean < -exact


# ------------------------------------------------------------------------------------ laws of random samples

STOCHASTIC = {
    **{name: method.step for name, method in SAMPLERS.items() if method.adds_noise},
    "ddim eta=0.5": partial(ddim, eta=0.5),
    "ddim eta=1": partial(ddim, eta=1.0),
}
REAL = ScheduleConfig(**SD, timestep_spacing="trailing")


class Impulses(Silence):
    """The j-th noise that is drawn is 1 in pixel 2 + j and 0 elsewhere."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, like):
        impulse = torch.zeros_like(like)
        impulse[..., 2 + self.drawn] = 1
        self.drawn += 1
        return impulse


def affine(sampler, schedule, denoise=gaussian):
    """On Gaussian data all steps are affine: x_n = c[0] + c[1] x_T + c[2] n_1 + c[3] n_2 + ...; read off in one run."""
    x = torch.zeros(1, 1, 1, 2 + len(schedule), dtype=torch.float64)
    x[..., 1] = 1
    *_, last = sample(denoise, x, schedule, sampler, Impulses())
    y = last.x.flatten().numpy()
    return np.concatenate([y[:1], y[1:] - y[0]])


def law(c, mean, variance):
    """Mean and variance of x_n, of those of x_T."""
    return c[0] + c[1] * mean, c[1] ** 2 * variance + (c[2:] ** 2).sum()


def marginal(level):
    """Mean and variance of noised data."""
    return level.alpha * MU, (level.alpha * STD) ** 2 + level.sigma**2


@cache
def by_hand(name, n):
    """The same coefficients from the papers' formulas, on x = c[0] + c[1] x_T + c[2] n_1 + ... as an array."""
    schedule = make_schedule(REAL, n)
    x, one, before = np.eye(n + 2)[1], np.eye(n + 2)[0], None
    fresh = iter(np.eye(n + 2)[2:])
    for level, after in itertools.pairwise(schedule.levels):
        a, s, a2, s2 = level.alpha, level.sigma, after.alpha, after.sigma
        gain = a * STD**2 / ((a * STD) ** 2 + s**2)
        x0 = MU * one + gain * (x - a * MU * one)
        eps, last = (x - a * x0) / s, after.i == n
        if name in ("ddpm", "euler-a", "ddim eta=0.5", "ddim eta=1"):  # Song et al. 2021, equations 12 and 16
            std = (0.5 if name == "ddim eta=0.5" else 1) * s2 / s * math.sqrt(1 - (a / a2) ** 2)
            x = a2 * x0 + math.sqrt(max(s2**2 - std**2, 0)) * eps + (0 if last else std * next(fresh))
        elif name == "lcm":  # Luo et al. 2023, algorithm 3
            t = 10 * level.t
            picture = x0 * t / math.hypot(t, 0.5) + x * 0.25 / (t**2 + 0.25)
            x = a2 * picture + (s2 * eps if last else s2 * next(fresh))
        elif name == "tcd":  # Zheng et al. 2024, algorithm 4
            bar = schedule.bars[math.floor(0.7 * after.t)]
            jumped = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * eps
            x = x0 if last else a2 / math.sqrt(bar) * jumped + math.sqrt(1 - a2**2 / bar) * next(fresh)
        elif last:
            x = x0
        elif name == "dpm2-a":  # k-diffusion's sample_dpm_2_ancestral, y = x / alpha at the noise level r
            r, r2, y = s / a, s2 / a2, x / a
            up = math.sqrt(r2**2 * (r**2 - r2**2) / r**2)
            down = math.sqrt(r2**2 - up**2)
            middle = math.sqrt(r * down)
            y_middle = y + eps * (middle - r)
            slope = (y_middle - (MU * middle**2 * one + STD**2 * y_middle) / (STD**2 + middle**2)) / middle
            x = a2 * (y + slope * (down - r) + up * next(fresh))
        else:  # SDE-DPM-Solver++(2M), (Lu et al. 2022b)
            h = math.log(a2 / s2 * s / a)
            point = x0 if before is None else x0 + 0.5 * h / before[0] * (x0 - before[1])
            x = s2 / s * math.exp(-h) * x - a2 * math.expm1(-2 * h) * point
            x, before = x + s2 * math.sqrt(-math.expm1(-2 * h)) * next(fresh), (h, x0)
    return x


@pytest.mark.parametrize("name", sorted(set(STOCHASTIC) - {"dpm++3m-sde"}))  # its curve is tested above
def test_every_noise_enters_with_the_papers_weight(name):
    for n in (1, 2, 20):
        c = affine(STOCHASTIC[name], make_schedule(REAL, n))
        np.testing.assert_allclose(c, by_hand(name, n), rtol=0, atol=1e-12)
    assert np.abs(c[2:-1]).max() > 0.01 and c[-1] == 0  # the last step adds none


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_samplers_of_distilled_models_add_no_noise_at_last(name):
    """Not even where the table ends above sigma = 0: they go along the prediction there."""
    for step in sample(gaussian, X0, even_in_lambda(5), STOCHASTIC[name], Noise.from_seeds([1])):
        drawn = (step.x - step.next.alpha * step.x0 - step.next.sigma * step.eps).std() > 0.05
        assert drawn == (step.i < 4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_have_the_mean_and_variance_of_their_law(name):
    """20,000 pixels: mean and variance lie within 4.5 standard errors (a right sampler misses one with p = 7e-6)."""
    schedule, count = make_schedule(REAL, 20), 20_000
    mean, variance = law(affine(STOCHASTIC[name], schedule), 0.0, 1.0)
    noise = Noise.from_seeds([5])
    *_, last = sample(gaussian, noise.draw((1, 100, 200)).double(), schedule, STOCHASTIC[name], noise)
    assert abs(last.x.mean().item() - mean) < 4.5 * math.sqrt(variance / count)
    assert abs(last.x.var().item() / variance - 1) < 4.5 * math.sqrt(2 / count)


# A step along the ODE past the next level and noise back to it keeps the law but for the ODE's error: so the order in
# law is the ODE method's. The SDE's multistep curves look back across noise, which a parabola doesn't fit better.
LAW = {"ddpm": 1, "euler-a": 1, "ddim eta=0.5": 1, "ddim eta=1": 1, "dpm2-a": 2, "dpm++2m-sde": 2, "dpm++3m-sde": 2}


@pytest.mark.parametrize("name", LAW)
def test_the_law_tends_to_the_data_s(name):
    """Begun with noised data, the mean is right at once, and the variance's error falls with the method's order."""
    errors = []
    for n in (128, 256):
        schedule = even_in_lambda(n)
        mean, variance = law(affine(STOCHASTIC[name], schedule), *marginal(schedule[0]))
        wanted = marginal(schedule[n])
        assert abs(mean - wanted[0]) < 1e-13
        errors.append(abs(variance / wanted[1] - 1))
    assert 1e-7 < errors[1] < errors[0] < 0.02
    assert abs(math.log2(errors[0] / errors[1]) - LAW[name]) < 0.2
    assert LAW[name] == SAMPLERS[name.split()[0]].order

    mean, variance = law(affine(STOCHASTIC[name], make_schedule(REAL, 500)), 0.0, 1.0)  # from pure noise, as in use
    assert abs(mean - MU) < 0.002 if name != "ddim eta=0.5" else 0.005 < abs(mean - MU) < 0.02
    assert abs(variance / STD**2 - 1) < (0.04 if LAW[name] == 1 else 0.01)


def test_defect_the_sde_of_3m_is_of_first_order_in_law_in_diffusers():
    """REFERENCE_DEFECTS.md, 8: its parabola bends the wrong way, by 1 / h times what it should; ours is of second."""
    for compat, order in ((True, 1), (False, 2)):
        errors = []
        for n in (128, 256):
            schedule = even_in_lambda(n, 0.0, 2.0, compat)
            _, variance = law(affine(STOCHASTIC["dpm++3m-sde"], schedule), *marginal(schedule[0]))
            errors.append(abs(variance / marginal(schedule[n])[1] - 1))
        assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15


def test_lcm_with_a_network_that_was_not_distilled_loses_half_of_the_variance():
    """The mean of x0 given x isn't a sample. Its variance p goes to k^2 (alpha^2 p + sigma^2), k being the denoiser's

    slope; where steps are short that stands still at S^4 / (2 S^2 + r^2), S the data's deviation and r = sigma / alpha.
    """
    schedule = make_schedule(REAL, 1000)
    mean, variance = law(affine(STOCHASTIC["lcm"], schedule), *marginal(schedule[0]))
    r = schedule[len(schedule) - 2].ratio  # the last row has t = 0, where LCM's network means x itself
    assert abs(mean - MU) < 0.002
    assert variance == pytest.approx(STD**4 / (2 * STD**2 + r**2), rel=0.02)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_lcm_with_a_perfect_student_is_exact(n):
    """A student that jumps to the end of the trajectory gives data, and noised afresh they are noised data."""
    schedule = make_schedule(ScheduleConfig(**SD, rule="lcm"), n)
    end = schedule[n]

    def student(x, level):
        x0 = gaussian_solution(x, level, end)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    c = affine(STOCHASTIC["lcm"], schedule, student)
    assert law(c, *marginal(schedule[0])) == pytest.approx((MU, STD**2), abs=1e-6)  # c_skip is 1e-7
    assert (c[2 : n + 1] > 1e-5).all() and c[n + 1] == 0


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_tcd_with_a_perfect_student_is_exact(n, eta):
    """A student that jumps to s = (1 - eta) t', and the diffusion, which takes it up to t', keep every row's law."""
    schedule = make_schedule(ScheduleConfig(**SD, rule="tcd"), n)

    def student(x, level):
        _, after = schedule.step(level.i)
        last = eta == 0 or level.i == n - 1
        s = after if last else schedule.at(level.i, math.floor((1 - eta) * after.t))
        there = gaussian_solution(x, level, s)  # (x0, eps) whose line through x leads there
        x0 = (s.sigma * x - level.sigma * there) / (s.sigma * level.alpha - level.sigma * s.alpha)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    c = affine(partial(tcd, eta=eta), schedule, student)
    assert law(c, *marginal(schedule[0])) == pytest.approx(marginal(schedule[n]), abs=1e-12)
    assert (np.abs(c[2 : n + 1]) > 1e-6).all() == (eta > 0 or n == 1)


def test_tcd_with_a_network_that_was_not_distilled_tends_to_the_data_s_law_without_noise_alone():
    """Its jumps don't shorten with the steps: at eta 0.3 a tenth of the variance is lost however many there are."""
    schedule = make_schedule(REAL, 500)
    ratio = {}
    for eta in (0.0, 0.3):
        _, variance = law(affine(partial(tcd, eta=eta), schedule), *marginal(schedule[0]))
        ratio[eta] = variance / STD**2
    assert abs(ratio[0.0] - 1) < 0.02 and 0.85 < ratio[0.3] < 0.95


def test_tcd_s_last_step_is_without_noise_wherever_it_ends():
    """Nothing follows that could take it away again: also on a table that stops early."""
    schedule = make_schedule(ScheduleConfig(**SD), sigmas=[10.0, 2.0, 0.5])
    *_, before, last = sample(
        gaussian, normal(3, 1, 1, 8, 8).double(), schedule, SAMPLERS["tcd"].step, Noise.from_seeds([1])
    )
    assert torch.equal(last.x, last.next.alpha * last.x0 + last.next.sigma * last.eps) and last.next.sigma > 0.4
    assert (before.x - before.next.alpha * before.x0 - before.next.sigma * before.eps).abs().max() > 0.01
