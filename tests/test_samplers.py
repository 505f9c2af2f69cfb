"""Samplers: equal to diffusers' classes step by step and run by run, and right where the solution is known.

The network of these tests is nonlinear and guided: on a linear one wrong samplers agree. diffusers calculates in
float32 even when it is given float64, so its modules are compiled once more with every float32 replaced: then a bug
stands a million times above rounding.
"""

import itertools
import json
import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from reference import assert_close, in_float64, normal, scheduler_of

from ldm.diffusion import Prediction, to_x0_eps
from ldm.noise import Noise
from ldm.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, euler, lam, sample
from ldm.schedules import Level, Schedule, ScheduleConfig, make_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 4, 5)
SEEDS = (11, 12)

CASES = {  # name -> (our sampler, diffusers' class, what its step is told besides, which end its file asks for)
    "ddpm": (ddpm, DDPMScheduler, {}, [{}]),
    "ddim": (ddim, DDIMScheduler, {"eta": 0.0}, [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}]),
    "ddim eta=0.4": (partial(ddim, eta=0.4), DDIMScheduler, {"eta": 0.4}, [{"set_alpha_to_one": False}]),
    "ddim eta=1": (partial(ddim, eta=1.0), DDIMScheduler, {"eta": 1.0}, [{"set_alpha_to_one": True}]),
    "euler": (euler, EulerDiscreteScheduler, {}, [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]),
    "dpm++": (
        dpmpp_2m,
        DPMSolverMultistepScheduler,
        {},
        [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}],
    ),
}


def network(x, t):
    """A guided, nonlinear, time-dependent stand-in for a UNet; neighbouring pixels and channels differ in it."""
    bias = torch.linspace(-0.5, 0.5, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    c = torch.tanh(0.7 * x + 0.2 * x.roll(1, -1) + bias) * (t + 300) / (t + 500)
    u = torch.tanh(0.6 * x + 0.2 * x.roll(1, -1)) * (t + 300) / (t + 500)
    return u + 7.5 * (c - u)


def denoiser(schedule):
    return lambda x, level: to_x0_eps(network(x, level.t), x, level.alpha, level.sigma, schedule.prediction)


def config_of(scheduler):
    return ScheduleConfig.from_json(json.loads(scheduler.to_json_string()) | {"_class_name": type(scheduler).__name__})


def run_diffusers(scheduler, n, x, extra, generators):
    """All latents of a run, the first included, in the model's coordinates (diffusers' Euler works on x / alpha)."""
    if isinstance(scheduler, DDPMScheduler | in_float64(DDPMScheduler) | DDIMScheduler | in_float64(DDIMScheduler)):
        extra = {**extra, "generator": generators}
    scales = [1.0] * (n + 1)
    if "Euler" in type(scheduler).__name__:
        scales = ((scheduler.sigmas**2 + 1) ** 0.5).tolist()
    x = x * float(scheduler.init_noise_sigma)
    latents = [x / scales[0]]
    for t, scale in zip(scheduler.timesteps[:n], scales[1:], strict=True):
        out = network(scheduler.scale_model_input(x, t), t.item())
        x = scheduler.step(out, t, x, **extra).prev_sample
        latents.append(x / scale)
    return latents


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def run_ours(schedule, sampler, x):
    steps = sample(denoiser(schedule), x * schedule.start_scale, schedule, sampler, Noise(generators()))
    return [x * schedule.start_scale, *(step.x for step in steps)]


def error(ours, reference):
    """The largest difference, in units of the reference's largest value."""
    assert ours.dtype == reference.dtype and ours.shape == reference.shape and reference.abs().max() > 0.01
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def compare(name, spacing, prediction, n, offset, end, betas="scaled_linear"):
    """One case in float64: every single step from diffusers' own latents, then the free run."""
    sampler, cls, extra, _ = CASES[name]
    fields = {**SD, "beta_schedule": betas, "timestep_spacing": spacing, "prediction_type": prediction}
    scheduler = scheduler_of(cls, {**fields, "steps_offset": offset, **end}, n)
    x = normal(3, *SHAPE, dtype=torch.float64)
    reference = run_diffusers(scheduler, n, x, extra, generators())
    schedule = make_schedule(config_of(scheduler), n, compat=True)
    where = f"{name} {spacing} {prediction} n={n} {end}"

    history, noise, denoise = [], Noise(generators()), denoiser(schedule)
    for i in range(n):
        history.append(sampler(denoise, reference[i], schedule, i, list(history), noise))
        # diffusers' DDPM adds noise of std 1e-10 to a finished latent (REFERENCE_DEFECTS.md, 5).
        allowed = 1e-9 if name == "ddpm" and i == n - 1 else 1e-11
        assert error(history[i].x, reference[i + 1]) < allowed, f"{where}, step {i}"

    ours = run_ours(schedule, sampler, x)
    assert len(ours) == len(reference) == n + 1
    assert max(map(error, ours, reference)) < 1e-9, where


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", CASES)
def test_compat_runs_equal_diffusers_in_float64(name, spacing, prediction):
    for n, end in itertools.product((1, 2, 3, 5, 7, 10, 14, 15, 16, 30), CASES[name][3]):
        compare(name, spacing, prediction, n, n % 2, end)


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", CASES)
def test_other_beta_schedules_equal_diffusers_in_float64(name, betas):
    for spacing, prediction in itertools.product(("leading", "trailing"), ("v_prediction", "sample")):
        compare(name, spacing, prediction, 20, 1, CASES[name][3][-1], betas)


@pytest.mark.parametrize(
    "name, spacing, n", [("ddpm", "trailing", 1000), ("ddim", "linspace", 333), ("dpm++", "trailing", 1000)]
)
def test_long_runs_equal_diffusers_in_float64(name, spacing, n):
    compare(name, spacing, "v_prediction", n, 0, CASES[name][3][-1])


def test_the_float64_reference_is_diffusers_and_in_float64():
    for name, (_, cls, extra, _) in CASES.items():
        x = normal(3, *SHAPE)
        single = run_diffusers(scheduler_of(cls, SD, 10, torch.float32), 10, x, extra, generators())[-1]
        double = run_diffusers(scheduler_of(cls, SD, 10), 10, x.double(), extra, generators())[-1]
        # Close, but not the same digits: had float32 survived somewhere, more of them would agree, or none.
        assert 1e-8 < error(single.double(), double) < 1e-5, name
        assert in_float64(cls) is not cls and double.dtype == torch.float64


@pytest.mark.parametrize("name", CASES)
def test_in_float32_we_are_as_near_the_truth_as_diffusers(name):
    """Error against float64, root mean square over steps, spacings and lengths: at most twice diffusers' own."""
    sampler, cls, extra, ends = CASES[name]
    squares = torch.zeros(2, dtype=torch.float64)
    for spacing, prediction, n in itertools.product(("leading", "trailing"), ("epsilon", "v_prediction"), (5, 20, 50)):
        fields = {**SD, "timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": 1, **ends[0]}
        x = normal(3, *SHAPE)
        truth = run_diffusers(scheduler_of(cls, fields, n), n, x.double(), extra, generators())
        scheduler = scheduler_of(cls, fields, n, torch.float32)
        theirs = run_diffusers(scheduler, n, x, extra, generators())
        ours = run_ours(make_schedule(config_of(scheduler), n, compat=True), sampler, x)
        for a, b, c in zip(ours, theirs, truth, strict=True):
            squares += torch.tensor([error(a.double(), c) ** 2, error(b.double(), c) ** 2])
    ratio = (squares[0] / squares[1]).sqrt().item()
    assert 0.01 < ratio <= 2, f"our float32 error is {ratio:.2f} times diffusers'"


def test_the_cases_can_be_told_apart():
    """The weakest comparison above allows 1e-9; different samplers and spacings are a thousandth apart or more."""
    x = normal(3, *SHAPE, dtype=torch.float64)
    finals = {}
    for name, (sampler, cls, _, _) in CASES.items():
        for spacing in ("leading", "trailing"):
            config = config_of(scheduler_of(cls, {**SD, "timestep_spacing": spacing}, 20))
            finals[name, spacing] = run_ours(make_schedule(config, 20), sampler, x)[-1]
    for (a, x_a), (b, x_b) in itertools.combinations(finals.items(), 2):
        if a[1] == b[1] and ({a[0], b[0]} == {"ddpm", "ddim eta=1"} or {a[0], b[0]} == {"ddim", "euler"}):
            continue  # one method under two names, as other tests prove
        assert (x_a - x_b).abs().max() > 1e-3, f"{a} and {b} agree"


# ------------------------------------------------------------------------------------ noise, and the swapped sampler


@pytest.mark.parametrize("name", ["ddpm", "ddim eta=0.4", "ddim eta=1"])
def test_the_same_generators_give_the_noise_diffusers_draws(name):
    """The real float32 classes, a list of generators: the same pictures, and the streams end at the same place."""
    sampler, cls, extra, _ = CASES[name]
    scheduler = scheduler_of(cls, SD, 20, torch.float32)  # offset 0: DDPM's last timestep is 0, where both draw nothing
    gs, noise, x = generators(), Noise(generators()), normal(3, *SHAPE)
    reference = run_diffusers(scheduler, 20, x, extra, gs)[-1]
    schedule = make_schedule(config_of(scheduler), 20)
    *_, last = sample(denoiser(schedule), x, schedule, sampler, noise)
    assert_close(last.x, reference, atol=1e-5)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(noise.state(), gs, strict=True))
    *_, other = sample(denoiser(schedule), x, schedule, sampler, Noise.from_seeds((11, 13)))
    assert torch.equal(other.x[0], last.x[0]) and (other.x[1] - last.x[1]).abs().max() > 0.1


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


@pytest.mark.parametrize("file", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("name, rule", [("ddpm", "ddpm"), ("ddim", "ddim"), ("euler", "euler"), ("dpm++", "dpm")])
def test_a_swapped_sampler_with_its_rule_equals_from_config(file, name, rule):
    sampler, cls, extra, _ = CASES[name]
    saved = file(**SD, timestep_spacing="leading", steps_offset=1)
    scheduler = cls.from_config(saved.config, **({"clip_sample": False} if rule in ("ddpm", "ddim") else {}))
    scheduler.set_timesteps(12)
    x = normal(3, *SHAPE)
    reference = run_diffusers(scheduler, 12, x, extra, generators())
    ours = run_ours(make_schedule(config_of(saved), 12, rule=rule), sampler, x)
    assert max(map(error, ours, reference)) < 1e-5


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
        reference = run_diffusers(scheduler, n, x, {}, generators())
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
            reference = run_diffusers(scheduler_of(cls, {**fields, **order}, n), n, x, {}, None)
            assert max(map(error, run_ours(schedule, ddim, x * start), reference)) < 1e-9


@pytest.mark.parametrize("spacing, n, least", [("linspace", 30, 0.01), ("trailing", 30, 0.001), ("trailing", 7, 0.01)])
def test_defect_ddim_takes_a_wrong_previous_timestep(spacing, n, least):
    """REFERENCE_DEFECTS.md, 1: when this fails, diffusers has mended it, and `compat` has lost its object."""
    scheduler = scheduler_of(DDIMScheduler, {**SD, "timestep_spacing": spacing}, n)
    x = normal(3, *SHAPE, dtype=torch.float64)
    theirs = run_diffusers(scheduler, n, x, {}, None)[-1]
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


# ------------------------------------------------------------------------------------ solutions known in closed form


def even_in_lambda(n, first=-3.0, last=3.0):
    """n steps of equal length in log(alpha / sigma), alpha^2 + sigma^2 = 1: no ends to break orders of convergence."""
    levels = []
    for i in range(n + 1):
        x = first + (last - first) * i / n
        levels.append(Level(i, float(n - i), (1 + math.exp(-2 * x)) ** -0.5, (1 + math.exp(2 * x)) ** -0.5))
    return Schedule(tuple(levels), "epsilon", 1.0, "ddim")


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


@pytest.mark.parametrize("denoise, solution", [(gaussian, gaussian_solution), (two_modes, two_modes_solution)])
@pytest.mark.parametrize("sampler, order", [(euler, 1), (ddim, 1), (dpmpp_2m, 2)])
def test_order_of_convergence(sampler, order, denoise, solution):
    """Halve the steps: a method of order p divides its error by 2^p."""
    x, errors = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8), []
    for n in (64, 128, 256):
        schedule = even_in_lambda(n)
        *_, last = sample(denoise, x, schedule, sampler, Noise([]))
        errors.append((last.x - solution(x, schedule[0], schedule[n])).abs().max().item())
    assert errors[0] < 0.1
    slope = math.log2(errors[1] / errors[2])
    assert abs(slope - order) < 0.15, f"measured order {slope:.3f}, errors {errors}"


@pytest.mark.parametrize("sampler", [euler, ddim, dpmpp_2m])
def test_a_stable_diffusion_schedule_reaches_the_solution(sampler):
    """On the table of real use: 100 steps from pure noise to the clean latent, each sampler on each rule's table."""
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
    for rule, spacing in itertools.product(("ddim", "euler", "dpm"), ("linspace", "trailing")):
        schedule = make_schedule(ScheduleConfig(**SD, timestep_spacing=spacing, rule=rule), 100)
        *_, last = sample(gaussian, x, schedule, sampler, Noise([]))
        off = (last.x - gaussian_solution(x, schedule[0], schedule[100])).abs().max()
        assert off < (0.02 if sampler is dpmpp_2m else 0.04), (rule, spacing, off)


@pytest.mark.parametrize("sampler", [ddpm, partial(ddim, eta=1.0)])
def test_ancestral_samples_have_the_data_s_mean_and_variance(sampler):
    """10,000 pixels, 4.5 standard errors; the steps being affine, the law of the last x is known exactly as well."""
    schedule, count = make_schedule(ScheduleConfig(**SD, timestep_spacing="trailing", rule="ddim"), 500), 10_000
    noise = Noise.from_seeds([5])
    *_, last = sample(gaussian, noise.draw((1, 100, 100)).double(), schedule, sampler, noise)
    mean, variance = last.x.mean().item(), last.x.var().item()

    m, v = 0.0, 1.0
    for level, after in zip(schedule.levels, schedule.levels[1:], strict=False):
        # The step's matrix and offset, measured on two points with Song et al.'s equation 12 and 16 at eta = 1.
        std = after.sigma / level.sigma * math.sqrt(1 - (level.alpha / after.alpha) ** 2)
        y = [
            after.alpha * p.x0 + math.sqrt(after.sigma**2 - std**2) * p.eps
            for p in (gaussian(0.0, level), gaussian(1.0, level))
        ]
        m, v = y[0] + (y[1] - y[0]) * m, (y[1] - y[0]) ** 2 * v + std**2
    assert abs(mean - m) < 4.5 * math.sqrt(v / count)
    assert abs(variance / v - 1) < 4.5 * math.sqrt(2 / count)
    # The posterior's variance is a little too small for steps of finite length: 3.4% after 500 of them.
    assert abs(m - MU) < 0.001 and abs(v / STD**2 - 1) < 0.04


def test_ddim_with_eta_1_is_ddpm():
    """The same mean and the same noise in every step (Song et al. 2021, section 4.1), the clean end excepted."""
    x = normal(3, *SHAPE, dtype=torch.float64)
    for rule, spacing in itertools.product(("ddpm", "ddim", "euler", "dpm"), ("leading", "linspace", "trailing")):
        schedule = make_schedule(ScheduleConfig(**SD, timestep_spacing=spacing, rule=rule), 20)
        runs = [run_ours(schedule, s, x) for s in (ddpm, partial(ddim, eta=1.0))]
        assert max(map(error, *runs)) < 1e-12


def test_lambda_is_half_the_log_of_the_signal_to_noise_ratio():
    level = Level(0, 0.0, 0.6, 0.8)
    assert lam(level) == pytest.approx(0.5 * math.log(0.36 / 0.64), abs=1e-15)
    assert set(SAMPLERS) == {"ddpm", "ddim", "euler", "dpm++"}  # a sampler that comes belongs into CASES above
