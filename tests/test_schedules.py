"""Schedules: every table equal to that of diffusers' class, to published tables and to the papers' formulas."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from ldm.errors import LDMError
from ldm.schedules import NEUTRAL, Level, Schedule, ScheduleConfig, alpha_bars, make_schedule

CLASSES = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (1, 2, 3, 5, 7, 10, 14, 15, 16, 20, 25, 30, 50, 100, 333, 999, 1000)
ENDS = {  # whether the last level is the clean latent or the cleanest training level, as each class's file says it
    "ddpm": {True: {}},
    "ddim": {True: {"set_alpha_to_one": True}, False: {"set_alpha_to_one": False}},
    "euler": {True: {"final_sigmas_type": "zero"}, False: {"final_sigmas_type": "sigma_min"}},
    "dpm": {True: {"final_sigmas_type": "zero"}, False: {"final_sigmas_type": "sigma_min"}},
}


def read(scheduler):
    """ldm's configuration from the very JSON that diffusers writes for `scheduler`."""
    return ScheduleConfig.from_json(json.loads(scheduler.to_json_string()))


def reference(scheduler, rule, n):
    """The table of a diffusers scheduler: timesteps (n,), alpha and sigma (n+1,) float64, start scale."""
    scheduler.set_timesteps(n)
    if rule in ("euler", "dpm"):
        ratio = scheduler.sigmas.double()
        alpha = 1 / (1 + ratio**2).sqrt()
        sigma = ratio * alpha
    else:
        last = scheduler.one if rule == "ddpm" else scheduler.final_alpha_cumprod
        bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], last.view(1)]).double()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    # diffusers' Euler works on x / alpha, and starts from init_noise_sigma * eps there.
    start = float(scheduler.init_noise_sigma) * (alpha[0].item() if rule == "euler" else 1)
    return scheduler.timesteps.double(), alpha, sigma, start


def past_the_end(rule, spacing, offset, n):
    """Where diffusers asks the network for a timestep that training never had (REFERENCE_DEFECTS.md, 2)."""
    points = n + 1 if rule == "dpm" else n
    return spacing == "leading" and offset == 1 and points == 1000


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("rule", CLASSES)
def test_table_equals_diffusers(rule, spacing, betas):
    predictions = itertools.cycle(["epsilon", "v_prediction", "sample"])
    for offset, (clean, end) in itertools.product((0, 1), ENDS[rule].items()):
        prediction = next(predictions)
        fields = {**SD, "beta_schedule": betas, "timestep_spacing": spacing, "steps_offset": offset}
        scheduler = CLASSES[rule](**fields, **end, prediction_type=prediction)
        config = read(scheduler)
        for n in STEPS:
            if past_the_end(rule, spacing, offset, n) or (rule == "dpm" and n == 1000 and spacing != "trailing"):
                continue  # each has its own test below
            schedule = make_schedule(config, n)
            t, alpha, sigma, start = reference(scheduler, rule, n)
            ours = torch.tensor(schedule.levels, dtype=torch.float64)
            where = f"n={n} offset={offset} clean={clean}"

            assert len(schedule) == n and schedule.prediction == prediction and schedule.rule == rule, where
            assert [r.i for r in schedule.levels] == list(range(n + 1)), where
            # Euler's timesteps may be fractional, and diffusers rounds those to float32.
            assert torch.equal(ours[:n, 1].float().double(), t), where
            # Both read one float32 table. From there diffusers' Euler and DPM go on in float32 (measured: 1.3e-7), DDPM
            # and DDIM are read before they do. Where Euler's timesteps are fractional, their rounding moves the level
            # too: by 1.3e-5 next to the cosine's end, where one timestep multiplies sigma/alpha by 20.
            tolerance = 4e-7 if rule in ("euler", "dpm") else 1e-15
            tolerance = 2e-5 if (rule, spacing, betas) == ("euler", "linspace", "squaredcos_cap_v2") else tolerance
            torch.testing.assert_close(ours[:, 2], alpha, rtol=tolerance, atol=0, msg=where)
            torch.testing.assert_close(ours[:, 3], sigma, rtol=tolerance, atol=0, msg=where)
            assert schedule.start_scale == pytest.approx(start, rel=4e-7), where
            assert (schedule[n].sigma == 0) is clean and schedule[n].t == 0, where

            # What a sampler may rely on.
            torch.testing.assert_close(
                ours[:, 2] ** 2 + ours[:, 3] ** 2, torch.ones(n + 1).double(), rtol=0, atol=1e-15
            )
            assert (ours[:n, 1].diff() < 0).all() and (ours[:n, 3].diff() < 0).all(), where
            assert ours[n, 3] <= ours[n - 1, 3] + 1e-12, where  # equal where both are the cleanest training level


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("total", [100, 1100])
def test_table_of_another_training_length_equals_diffusers(rule, total):
    for spacing, n in itertools.product(SPACINGS, (1, 4, 9, 33, 50)):
        scheduler = CLASSES[rule](**SD, num_train_timesteps=total, timestep_spacing=spacing)
        t, alpha, sigma, _ = reference(scheduler, rule, n)
        ours = torch.tensor(make_schedule(read(scheduler), n).levels, dtype=torch.float64)
        assert torch.equal(ours[:n, 1].float().double(), t)
        torch.testing.assert_close(ours[:, 2:], torch.stack([alpha, sigma], 1), rtol=4e-7, atol=0)


@pytest.mark.parametrize("rule", CLASSES)
def test_a_file_that_says_nothing_means_its_class(rule):
    """diffusers' classes differ in their default spacing, and fill what a file leaves out."""
    scheduler = CLASSES[rule]()
    t, alpha, sigma, start = reference(scheduler, rule, 7)
    for config in (ScheduleConfig.from_json({"_class_name": CLASSES[rule].__name__}), read(scheduler)):
        schedule = make_schedule(config, 7)
        ours = torch.tensor(schedule.levels, dtype=torch.float64)
        assert torch.equal(ours[:7, 1].float().double(), t)
        torch.testing.assert_close(ours[:, 2:], torch.stack([alpha, sigma], 1), rtol=4e-7, atol=0)
        assert schedule.start_scale == pytest.approx(start, rel=4e-7)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [2, 5, 30])
def test_pndm_files_give_the_levels_that_pndm_visits(spacing, n):
    """Stable Diffusion 1.x ships a PNDM file; PNDM walks one level twice and ends on the cleanest training level."""
    scheduler = PNDMScheduler(**SD, timestep_spacing=spacing, skip_prk_steps=True)
    scheduler.set_timesteps(n)
    schedule = make_schedule(read(scheduler), n)
    silent = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": spacing, **SD}
    assert schedule == make_schedule(ScheduleConfig.from_json(silent), n)
    assert [r.t for r in schedule.levels[:-1]] == sorted(set(scheduler.timesteps.tolist()), reverse=True)
    assert schedule[n].alpha == math.sqrt(scheduler.final_alpha_cumprod.item()) < 1


@pytest.mark.parametrize(
    "rule, published",
    [("ddim", [801, 601, 401, 201, 1]), ("euler", [801, 601, 401, 201, 1]), ("dpm", [831, 665, 499, 333, 167])],
)
def test_five_steps_of_stable_diffusion_as_published(rule, published):
    """diffusers' own tests publish the first; all three were read off its pipelines (one file, three tables)."""
    config = ScheduleConfig.from_json({"_class_name": "DDIMScheduler", "timestep_spacing": "leading", **SD})
    assert [r.t for r in make_schedule(config, 5, rule=rule).levels] == [*published, 0]


def test_ten_steps_as_in_table_2_of_lin_et_al():
    """ "Common diffusion noise schedules and sample steps are flawed", table 2: T = 1000, S = 10, counted from 1."""
    published = {
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    }
    for spacing, ts in published.items():
        schedule = make_schedule(ScheduleConfig(timestep_spacing=spacing, rule="ddim"), 10)
        assert [r.t + 1 for r in schedule.levels[:-1]] == ts


def test_stable_diffusion_starts_at_its_known_noise_levels():
    """sigma_max = 14.6146 is printed in every k-diffusion port; 11.5203 is leading's first, for 30 steps."""
    config = ScheduleConfig(**SD, rule="euler")
    first = make_schedule(dataclasses.replace(config, timestep_spacing="linspace"), 30)
    assert first[0].sigma / first[0].alpha == pytest.approx(14.6146, abs=1e-4)
    assert first.start_scale == first[0].sigma
    first = make_schedule(dataclasses.replace(config, timestep_spacing="leading"), 30)
    assert 1 / first[0].alpha == pytest.approx(11.5203, abs=1e-4)
    assert first.start_scale == 1


def test_alpha_bars_follow_the_papers_formulas_in_float64():
    """Independent of torch's float32: Ho et al. 2020 eq. 4, Rombach et al.'s square, Nichol & Dhariwal 2021 eq. 17."""
    t = np.arange(1000)
    linear = np.cumprod(1 - (1e-4 + (0.02 - 1e-4) * t / 999))
    scaled = np.cumprod(1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2)
    f = np.cos(((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    # A float32 product of a thousand factors is good to about 1e-5; cosine's last factor is 0.001 instead of 0.
    for betas, expected, count in (
        ("linear", linear, 1000),
        ("scaled_linear", scaled, 1000),
        ("squaredcos_cap_v2", f, 999),
    ):
        start, end = (1e-4, 0.02) if betas == "linear" else (0.00085, 0.012)
        bars = alpha_bars(ScheduleConfig(beta_schedule=betas, beta_start=start, beta_end=end)).double().numpy()
        assert bars.shape == (1000,)
        np.testing.assert_allclose(bars[:count], expected[:count], rtol=5e-5)
        assert bars[-1] < 0.005


# ------------------------------------------------------------------------------------ where the reference departs


@pytest.mark.parametrize("rule, n", [("ddpm", 1000), ("ddim", 1000), ("euler", 1000), ("dpm", 999)])
def test_defect_as_many_steps_as_training_with_offset(rule, n):
    """REFERENCE_DEFECTS.md, 2: diffusers' first timestep is 1000, one past the end; ldm's is 999."""
    scheduler = CLASSES[rule](**SD, timestep_spacing="leading")
    scheduler.set_timesteps(n)
    assert scheduler.timesteps[0] == 1000
    x = torch.ones(1, 1, 2, 2)
    if rule in ("ddpm", "ddim"):
        with pytest.raises(IndexError):
            scheduler.step(x, scheduler.timesteps[0], x)
    else:  # np.interp holds the last value: the same noise level twice, under two timesteps
        assert scheduler.sigmas[0] == scheduler.sigmas[1]
    ts = [r.t for r in make_schedule(read(scheduler), n).levels[:-1]]
    assert ts[0] == 999 and ts == sorted(set(ts), reverse=True) and len(ts) == n


@pytest.mark.parametrize("rule", CLASSES)
def test_defect_trailing_miscounts(rule):
    """REFERENCE_DEFECTS.md, 3: np.arange with a fractional stride gives 62 timesteps for 61 steps, the last -1."""
    scheduler = CLASSES[rule](**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62 and scheduler.timesteps[-1] == -1
    schedule = make_schedule(read(scheduler), 61)
    assert len(schedule) == 61
    assert [r.t for r in schedule.levels[:-1]] == scheduler.timesteps[:61].tolist()


def test_defect_dpm_with_a_thousand_steps_of_linspace():
    """REFERENCE_DEFECTS.md, 4: n + 1 points on 1000 timesteps: two rows are one level, and 2M divides by 0."""
    scheduler = DPMSolverMultistepScheduler(**SD, timestep_spacing="linspace")
    scheduler.set_timesteps(1000)
    assert len(set(scheduler.timesteps.tolist())) == 999
    x = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    assert x.isnan().any()
    with pytest.raises(LDMError, match=r"1000 steps asked for; .* between 1 and 999"):
        make_schedule(read(scheduler), 1000)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_compat_lands_where_diffusers_ddim_does_and_by_default_on_the_next_row(spacing):
    for n, clean in itertools.product((1, 2, 3, 7, 10, 30, 333, 999), (True, False)):
        config = ScheduleConfig(**SD, timestep_spacing=spacing, set_alpha_to_one=clean, rule="ddim")
        bars = alpha_bars(config).double()
        plain, compat = make_schedule(config, n), make_schedule(config, n, compat=True)
        assert plain.levels == compat.levels and plain.landings is None
        for i in range(n):
            assert plain.step(i) == (plain[i], plain[i + 1])
            level, after = compat.step(i)
            t = int(level.t) - 1000 // n  # scheduling_ddim.py:445
            assert level == compat[i] and after.i == i + 1
            assert after.alpha == (math.sqrt(bars[t]) if t >= 0 else compat[n].alpha)
            assert after.sigma == (math.sqrt(1 - bars[t]) if t >= 0 else compat[n].sigma)
        if spacing == "leading" and n != 999:
            assert all(plain.step(i)[1][2:] == compat.step(i)[1][2:] for i in range(n))


@pytest.mark.parametrize("rule", ["ddpm", "euler", "dpm"])
def test_compat_changes_nothing_for_other_rules(rule):
    config = ScheduleConfig(**SD, timestep_spacing="trailing", rule=rule)
    assert make_schedule(config, 7, compat=True) == make_schedule(config, 7)


# ------------------------------------------------------------------------------------ one file, another rule; errors


@pytest.mark.parametrize("there", CLASSES)
@pytest.mark.parametrize("file", CLASSES)
def test_a_rule_swaps_the_table_as_from_config_swaps_the_class(file, there):
    saved = CLASSES[file](**SD, timestep_spacing="leading")
    t, alpha, sigma, start = reference(CLASSES[there].from_config(saved.config), there, 12)
    schedule = make_schedule(read(saved), 12, rule=there)
    ours = torch.tensor(schedule.levels, dtype=torch.float64)
    assert schedule.rule == there and torch.equal(ours[:12, 1].float().double(), t)
    torch.testing.assert_close(ours[:, 2:], torch.stack([alpha, sigma], 1), rtol=4e-7, atol=0)
    assert schedule.start_scale == pytest.approx(start, rel=4e-7)


@pytest.mark.parametrize("n", [0, -3, 1001, 10**9])
@pytest.mark.parametrize("rule", CLASSES)
def test_a_wrong_step_count_is_refused_with_the_right_ones(rule, n):
    with pytest.raises(LDMError, match=rf"{n} steps asked for; .* between 1 and {999 if rule == 'dpm' else 1000} "):
        make_schedule(ScheduleConfig(rule=rule), n)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"timestep_spacing": "even"}, "timestep_spacing 'even': ldm knows leading, trailing and linspace"),
        (
            {"beta_schedule": "sigmoid"},
            "beta_schedule 'sigmoid': ldm knows linear, scaled_linear and squaredcos_cap_v2",
        ),
        ({"rule": "heun"}, "rule 'heun': ldm knows ddpm, ddim, euler, dpm"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(fields, message):
    with pytest.raises(LDMError, match=message):
        make_schedule(ScheduleConfig(**fields), 10)


def test_an_unknown_rule_argument_is_refused():
    with pytest.raises(LDMError, match="rule 'lms'"):
        make_schedule(ScheduleConfig(), 10, rule="lms")


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "EulerAncestralDiscreteScheduler", ""])
def test_an_unknown_class_is_refused_by_name(name):
    with pytest.raises(LDMError, match=f"names '{name}'; ldm knows DDPMScheduler, .*DPMSolverMultistepScheduler"):
        ScheduleConfig.from_json({"_class_name": name})


# A value of each field that diffusers accepts and that would change the numbers.
OTHER = {
    "algorithm_type": "sde-dpmsolver++",
    "clip_sample_range": 2.0,
    "dynamic_thresholding_ratio": 0.9,
    "flow_shift": 3.0,
    "interpolation_type": "log_linear",
    "lambda_min_clipped": -5.1,
    "lower_order_final": False,
    "sample_max_value": 2.0,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "skip_prk_steps": False,
    "solver_order": 3,
    "solver_type": "heun",
    "timestep_type": "continuous",
    "trained_betas": [0.1, 0.2],
    "variance_type": "learned_range",
    "time_shift_type": "linear",
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_that_is_not_implemented_is_refused_by_name(name):
    value = OTHER.get(name, True)
    assert value != NEUTRAL[name]
    with pytest.raises(LDMError, match=f"scheduler asks for '{name}' = "):
        ScheduleConfig.from_json({"_class_name": "DDIMScheduler", name: value})
    ScheduleConfig.from_json({"_class_name": "DDIMScheduler", name: NEUTRAL[name]})
    ScheduleConfig.from_json({"_class_name": "DDIMScheduler", name: None})


@pytest.mark.parametrize(
    "field, message",
    [
        ({"beta_min": 0.1}, "doesn't know: 'beta_min' = 0.1"),
        ({"prediction_type": "x0"}, "prediction_type 'x0'"),
        ({"final_sigmas_type": "sigma_mid"}, "final_sigmas_type 'sigma_mid'"),
    ],
)
def test_a_field_or_value_that_nobody_knows_is_refused_by_name(field, message):
    with pytest.raises(LDMError, match=message):
        ScheduleConfig.from_json({"_class_name": "DDIMScheduler", **field})


def test_a_schedule_is_a_table_that_prints_and_cannot_be_changed():
    schedule = make_schedule(ScheduleConfig(**SD), 5)
    rows = schedule.table().splitlines()
    assert rows[0].split() == ["i", "t", "alpha", "sigma"]
    printed = [[float(word) for word in row.split()] for row in rows[1:]]
    np.testing.assert_allclose(printed, schedule.levels, atol=5.1e-7)
    assert isinstance(schedule[0], Level) and schedule.levels[-1] == schedule[-1] == schedule[5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.rule = "euler"


def test_epsilon_prediction_at_zero_terminal_snr_is_refused():
    levels = (Level(0, 999.0, 0.0, 1.0), Level(1, 0.0, 1.0, 0.0))
    with pytest.raises(LDMError, match="begins at alpha = 0"):
        Schedule(levels, "epsilon", 1.0, "ddim")
    assert len(Schedule(levels, "v_prediction", 1.0, "ddim")) == 1
