"""Schedules: every table equal to that of diffusers' class, to published tables and to the papers' formulas."""

import dataclasses
import itertools
import json
import math

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ldm.errors import LDMError
from ldm.schedules import Level, Schedule, ScheduleConfig, alpha_bars, make_schedule
from ldm.schedules.config import CHOICES, NEUTRAL, RULES
from ldm.schedules.config import CLASSES as NAMES
from ldm.schedules.spacing import AYS
from ldm.schedules.table import timestep_of

CLASSES = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
}
# Classes with a rule like one of these, but for the last row: (rule, class, whether it can end at zero, at the first)
LIKE = {
    "heun": (LMSDiscreteScheduler, {True: {}}),
    "deis": (DEISMultistepScheduler, {False: {}}),
    "unipc": (UniPCMultistepScheduler, {True: {}, False: {"final_sigmas_type": "sigma_min"}}),
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (1, 2, 3, 5, 7, 10, 14, 15, 16, 20, 25, 30, 50, 100, 333, 999, 1000)
ENDS = {  # whether the last level is the clean latent or the cleanest training level, as each class's file says it
    "ddpm": {True: {}},
    "ddim": {True: {"set_alpha_to_one": True}, False: {"set_alpha_to_one": False}},
    "euler": {True: {"final_sigmas_type": "zero"}, False: {"final_sigmas_type": "sigma_min"}},
    "dpm": {True: {"final_sigmas_type": "zero"}, False: {"final_sigmas_type": "sigma_min"}},
    **{rule: ends for rule, (_, ends) in LIKE.items()},
}
ALL = CLASSES | {rule: cls for rule, (cls, _) in LIKE.items()}
IN_RATIO = ("euler", "heun")
SOLVERS = ("dpm", "deis", "unipc")


def read(scheduler):
    """ldm's configuration from the very JSON that diffusers writes for `scheduler`."""
    return ScheduleConfig.from_json(json.loads(scheduler.to_json_string()))


def reference(scheduler, rule, n):
    """The table of a diffusers scheduler: timesteps (n,), alpha and sigma (n+1,) float64, start scale."""
    scheduler.set_timesteps(n)
    if rule in (*IN_RATIO, *SOLVERS):
        ratio = scheduler.sigmas.double()
        alpha = 1 / (1 + ratio**2).sqrt()
        sigma = ratio * alpha
    else:
        last = scheduler.one if rule == "ddpm" else scheduler.final_alpha_cumprod
        bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], last.view(1)]).double()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    # diffusers' Euler works on x / alpha, and starts from init_noise_sigma * eps there.
    start = float(scheduler.init_noise_sigma) * (alpha[0].item() if rule in IN_RATIO else 1)
    return scheduler.timesteps.double(), alpha, sigma, start


def past_the_end(rule, spacing, offset, n):
    """Where diffusers asks the network for a timestep that training never had (REFERENCE_DEFECTS.md, 2)."""
    points = n + 1 if rule in SOLVERS else n
    return spacing == "leading" and offset == 1 and points == 1000


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("rule", ALL)
def test_table_equals_diffusers(rule, spacing, betas):
    predictions = itertools.cycle(["epsilon", "v_prediction", "sample"])
    for offset, (clean, end) in itertools.product((0, 1), ENDS[rule].items()):
        prediction = next(predictions)
        fields = {**SD, "beta_schedule": betas, "timestep_spacing": spacing, "steps_offset": offset}
        scheduler = ALL[rule](**fields, **end, prediction_type=prediction)
        config = read(scheduler)
        for n in STEPS:
            if past_the_end(rule, spacing, offset, n) or (rule in SOLVERS and n == 1000 and spacing != "trailing"):
                continue  # each has its own test below
            schedule = make_schedule(config, n, compat=True)
            if schedule[n].ratio < schedule[n - 1].ratio:
                assert make_schedule(config, n).levels == schedule.levels
            else:
                with pytest.raises(LDMError, match=rf"Rows {n - 1} and {n} .* are the same noise level, .* at zero"):
                    make_schedule(config, n)
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
            tolerance = 4e-7 if rule in (*IN_RATIO, *SOLVERS) else 1e-15
            if rule in IN_RATIO and (spacing, betas) == ("linspace", "squaredcos_cap_v2"):
                tolerance = 2e-5
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
    schedule = make_schedule(read(scheduler), n, compat=True)
    silent = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": spacing, **SD}
    assert schedule == make_schedule(ScheduleConfig.from_json(silent), n, compat=True)
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
        compat = make_schedule(config, n, compat=True)
        if compat[n].ratio == compat[n - 1].ratio:
            continue  # by default refused
        plain = make_schedule(config, n)
        assert plain.levels == compat.levels and plain.landings is None and compat.compat and not plain.compat
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
    assert make_schedule(config, 7, compat=True) == dataclasses.replace(make_schedule(config, 7), compat=True)


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
        ({"timestep_spacing": "even"}, "timestep_spacing 'even': ldm knows leading, linspace, trailing"),
        (
            {"beta_schedule": "sigmoid"},
            "beta_schedule 'sigmoid': ldm knows linear, scaled_linear and squaredcos_cap_v2",
        ),
        ({"rule": "hein"}, "rule 'hein': ldm knows ddpm, ddim, euler, heun, .*Did you mean 'heun'"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(fields, message):
    with pytest.raises(LDMError, match=message):
        make_schedule(ScheduleConfig(**fields), 10)


def test_an_unknown_rule_argument_is_refused():
    with pytest.raises(LDMError, match="rule 'karras'"):
        make_schedule(ScheduleConfig(), 10, rule="karras")


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "EDMEulerScheduler", ""])
def test_an_unknown_class_is_refused_by_name(name):
    with pytest.raises(LDMError, match=f"names '{name}'; ldm knows DDPMScheduler, .*FlowMatchHeunDiscreteScheduler"):
        ScheduleConfig.from_json({"_class_name": name})


# A value of each field that diffusers accepts and that would change the numbers.
OTHER = {
    "clip_sample_range": 2.0,
    "dynamic_thresholding_ratio": 0.9,
    "flow_shift": 3.0,
    "interpolation_type": "log_linear",
    "lambda_min_clipped": -5.1,
    "sample_max_value": 2.0,
    "disable_corrector": [0],
    "predict_x0": False,
    "solver_p": {"_class_name": "DDIMScheduler"},
    "timestep_scaling": 1.0,
    "timestep_type": "continuous",
    "variance_type": "learned_range",
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
    assert rows[0].split() == ["i", "t", "alpha", "sigma", "sigma/alpha"]
    printed = [[float(word) for word in row.split()] for row in rows[1:]]
    np.testing.assert_allclose(printed, [(*level, level.ratio) for level in schedule.levels], atol=5.1e-7)
    assert isinstance(schedule[0], Level) and schedule.levels[-1] == schedule[-1] == schedule[5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.rule = "euler"


def test_epsilon_prediction_at_zero_terminal_snr_is_refused():
    levels = (Level(0, 999.0, 0.0, 1.0), Level(1, 0.0, 1.0, 0.0))
    with pytest.raises(LDMError, match="begins at alpha = 0"):
        Schedule(levels, "epsilon", 1.0, "ddim")
    assert len(Schedule(levels, "v_prediction", 1.0, "ddim")) == 1


# ------------------------------------------------------------------------------------ every class, and what it reads


FILES = {  # class -> fields -> (rule, sampler)
    ("DDPMScheduler", ()): ("ddpm", "ddpm"),
    ("DDIMScheduler", ()): ("ddim", "ddim"),
    ("PNDMScheduler", ()): ("ddim", "pndm"),
    ("PNDMScheduler", (("skip_prk_steps", True),)): ("ddim", "plms"),
    ("EulerDiscreteScheduler", ()): ("euler", "euler"),
    ("EulerAncestralDiscreteScheduler", ()): ("heun", "euler-a"),
    ("HeunDiscreteScheduler", ()): ("heun", "heun"),
    ("LMSDiscreteScheduler", ()): ("heun", "lms"),
    ("KDPM2DiscreteScheduler", ()): ("dpm2", "dpm2"),
    ("KDPM2AncestralDiscreteScheduler", ()): ("dpm2", "dpm2-a"),
    ("DPMSolverMultistepScheduler", ()): ("dpm", "dpm++2m"),
    ("DPMSolverMultistepScheduler", (("solver_order", 3),)): ("dpm", "dpm++3m"),
    ("DPMSolverMultistepScheduler", (("algorithm_type", "sde-dpmsolver++"),)): ("dpm", "dpm++2m-sde"),
    ("DPMSolverMultistepScheduler", (("solver_type", "logrho"),)): ("dpm", "dpm++2m"),
    ("DPMSolverSinglestepScheduler", ()): ("singlestep", "dpm++2s"),
    ("DEISMultistepScheduler", (("algorithm_type", "dpmsolver++"), ("solver_type", "midpoint"))): ("deis", "deis2"),
    ("UniPCMultistepScheduler", ()): ("unipc", "unipc2"),
    ("UniPCMultistepScheduler", (("solver_type", "bh1"), ("solver_order", 3))): ("unipc", "unipc3-bh1"),
    ("LCMScheduler", ()): ("lcm", "lcm"),
    ("TCDScheduler", ()): ("tcd", "tcd"),
    ("FlowMatchEulerDiscreteScheduler", ()): ("flow", "euler"),
    ("FlowMatchHeunDiscreteScheduler", ()): ("flow", "flow-heun"),
}


@pytest.mark.parametrize("name, fields", FILES)
def test_a_file_of_every_class_means_its_rule_its_sampler_and_its_silent_defaults(name, fields):
    """The file as diffusers writes it, every field in it, and the one that only names its class."""
    scheduler = getattr(diffusers, name)(**dict(fields))
    full = json.loads(scheduler.to_json_string())
    # a habit of pixel models that neither we nor diffusers' pipelines keep
    short = {"_class_name": name, **dict(fields)}
    for file in (full, short):
        config = ScheduleConfig.from_json(file)
        assert (config.rule, config.sampler) == FILES[name, fields]
        for field in {f.name for f in dataclasses.fields(config)} & full.keys() - {"clip_sample", "timestep_spacing"}:
            expected = full[field]
            if field == "set_alpha_to_one" and getattr(config, field) is None:
                expected = None  # unsaid, which is true
                assert full[field] is True
            assert getattr(config, field) == expected or (expected is None and field.startswith("sigma_m")), field
        assert name == "DPMSolverSinglestepScheduler" or config.spacing == full.get("timestep_spacing", config.spacing)
    assert {name for name, _ in FILES} == set(NAMES)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type 'heun'.* has solver_type midpoint"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type 'sde-dpmsolver'"),
        ("DPMSolverMultistepScheduler", {"lower_order_final": False}, "'lower_order_final' = False"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, "solver_order 3; .* dpmsolver.. of order 2"),
        ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}, "'lower_order_final' = False"),
        ("UniPCMultistepScheduler", {"solver_order": 4}, "solver_order 4; .* order 3"),
        ("DEISMultistepScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr, which DEIS"),
        ("DDIMScheduler", {"use_karras_sigmas": True}, "karras sigmas, which DDIMScheduler doesn't read"),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True}, "shifts its levels"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "karras and beta sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "'stochastic_sampling' = True"),
        ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "cubic"}, "time_shift_type 'cubic'"),
    ],
)
def test_a_variant_that_ldm_lacks_is_refused_by_name(name, fields, message):
    with pytest.raises(LDMError, match=message):
        ScheduleConfig.from_json({"_class_name": name, **fields})


BETWEEN_0_AND_1 = "a number above 0 and below 1"
TRUTH, WORD = "true or false", "a word"
BAD_FILES = [  # a field's value, and what the sentence says that it must be
    *(("beta_start", value, BETWEEN_0_AND_1) for value in ("a", 0, 0.0, -0.1, 1, 1.5, True, math.nan, [0.1])),
    *(("beta_end", value, BETWEEN_0_AND_1) for value in ("0.02", 0, 1.0)),
    *(("num_train_timesteps", value, "a whole number, 2 to 1000000") for value in (100.5, 1000.0, 0, 1, -5, True, "9")),
    *(("steps_offset", value, "a whole number, 0 to") for value in ("1", -1, 0.5, False)),
    *(("original_inference_steps", value, "a whole number, 1 to") for value in (0, 2.5, [50])),
    *(("trained_betas", value, "a list of numbers above 0 and below 1") for value in
      ("linear", 0.1, [0.1, 1.0], [0.0, 0.1], [0.1, "a"], [True], [[0.1]])),
    *((name, value, "a number above 0 and below 1e+06")
      for name in ("sigma_min", "sigma_max", "shift") for value in (0, -1, "1", -math.inf, math.inf)),
    *((name, "1", "a number above -100 and below 100") for name in ("base_shift", "max_shift")),
    *((name, "256", "a whole number, 1 to") for name in ("base_image_seq_len", "max_image_seq_len")),
    ("shift_terminal", "0.1", BETWEEN_0_AND_1),
    ("shift_terminal", 1, BETWEEN_0_AND_1),
    ("use_karras_sigmas", "yes", TRUTH),
    ("rescale_betas_zero_snr", 1, TRUTH),
    ("skip_prk_steps", "no", TRUTH),
    ("lower_order_final", 0, TRUTH),
    ("clip_sample", "no", TRUTH),
    ("set_alpha_to_one", [], TRUTH),
    ("solver_order", [2], "a whole number"),
    ("solver_order", True, "a whole number"),
    ("algorithm_type", ["dpmsolver"], WORD),
    ("solver_type", {"a": 1}, WORD),
    ("prediction_type", ["epsilon"], WORD),
    ("timestep_spacing", 3, WORD),
]  # fmt: skip


@pytest.mark.parametrize("field, value, words", BAD_FILES)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_value_of_another_kind_or_range_is_refused_by_name(name, field, value, words):
    with pytest.raises(LDMError) as caught:
        ScheduleConfig.from_json({"_class_name": name, field: value})
    assert str(caught.value).startswith(f"The scheduler file has {field} {value!r}: it must be {words}")


@pytest.mark.parametrize(
    "file, message",
    [
        ({"_class_name": ["DDIMScheduler"]}, r"names \['DDIMScheduler'\]; ldm knows .* Did you mean 'DDIMScheduler'"),
        ({"_class_name": None}, "names None; ldm knows"),
        ({"trained_betas": [0.1] * 999}, "999 trained_betas for 1000 num_train_timesteps: each training step needs"),
        ({"trained_betas": [], "num_train_timesteps": 2}, "0 trained_betas for 2 num_train_timesteps"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "max_image_seq_len": 256},
            "max_image_seq_len 256: it must be above base_image_seq_len, 256",
        ),
    ],
)
def test_a_file_that_makes_no_schedule_is_refused(file, message):
    with pytest.raises(LDMError, match=message):
        ScheduleConfig.from_json(file)


def test_whole_numbers_and_longer_lists_are_fine_where_numbers_are():
    file = {"_class_name": "EulerDiscreteScheduler", "sigma_min": 1, "sigma_max": 10, "use_karras_sigmas": True}
    schedule = make_schedule(ScheduleConfig.from_json(file), 3)
    np.testing.assert_allclose([schedule[0].ratio, schedule[2].ratio], [10, 1])
    assert len(make_schedule(ScheduleConfig.from_json({"trained_betas": [0.01] * 1001}), 3)) == 3
    assert len(make_schedule(ScheduleConfig.from_json({"num_train_timesteps": 2}), 2)) == 2
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3}
    assert ScheduleConfig.from_json(flow) == ScheduleConfig.from_json(flow | {"shift": 3.0})


# ------------------------------------------------------------------------------------ levels chosen, levels given


def test_the_published_levels_of_align_your_steps():
    """Sabour et al. 2024's ten steps as they print them, with the timesteps that diffusers prints for them."""
    published = diffusers.schedulers.AysSchedules
    config = ScheduleConfig(**SD, rule="euler")
    for name, key in (("ays", "StableDiffusion"), ("ays-xl", "StableDiffusionXL")):
        ratios = [level.ratio for level in make_schedule(config, 10, sigmas=name).levels]
        np.testing.assert_allclose(ratios[:-1], AYS[name][:-1], rtol=1e-12)
        told = [round(level.t) for level in make_schedule(config, 10, sigmas=name).levels[:-1]]
        assert ratios[-1] == 0 and np.abs(np.subtract(told, published[f"{key}Timesteps"])).max() <= 4
        given = make_schedule(config, timesteps=published[f"{key}Timesteps"])
        np.testing.assert_allclose([level.ratio for level in given.levels[:-1]], ratios[:-1], rtol=0.06)
    # Between them, evenly in the logarithm: twice as many steps keep the ten.
    twice = [level.ratio for level in make_schedule(config, 20, sigmas="ays").levels]
    np.testing.assert_allclose(twice[:-1:2], AYS["ays"][:-1], rtol=1e-12)
    np.testing.assert_allclose(np.log(twice[1:19:2]), np.diff(np.log(AYS["ays"]))[:-1] / 2 + np.log(AYS["ays"])[:-2])


def test_chosen_levels_follow_their_formulas():
    config = ScheduleConfig(**SD, rule="dpm")
    bars = alpha_bars(config).double().numpy()
    most, least = np.sqrt((1 - bars[[-1, 0]]) / bars[[-1, 0]])
    for n in (2, 5, 30):
        ratios = {c: np.array([r.ratio for r in make_schedule(config, n, sigmas=c).levels[:-1]]) for c in CHOICES[:4]}
        for choice in ("karras", "exponential", "beta"):
            np.testing.assert_allclose(ratios[choice][[0, -1]], (most, least), rtol=1e-12)
        root = ratios["karras"] ** (1 / 7)  # Karras et al. 2022, equation 5: even in the seventh root
        np.testing.assert_allclose(np.diff(root), np.full(n - 1, (root[-1] - root[0]) / (n - 1)), rtol=1e-9)
        np.testing.assert_allclose(np.diff(np.log(ratios["exponential"])), np.log(least / most) / (n - 1))
        u = (ratios["beta"] - least) / (most - least)
        np.testing.assert_allclose(scipy.stats.beta.cdf(u, 0.6, 0.6), 1 - np.linspace(0, 1, n), atol=1e-7)
        assert make_schedule(config, n, sigmas="spaced") == make_schedule(config, n)


@pytest.mark.parametrize("choice", ["karras", "exponential", "beta", "ays"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("flow", "deis")])
def test_every_rule_takes_every_choice(rule, choice):
    """Also those whose class in diffusers has none; the network is told where training had that much noise."""
    schedule = make_schedule(ScheduleConfig(**SD, rule=rule), 12, sigmas=choice)
    assert len(schedule) == 12 and schedule.rule == rule
    ratios = [level.ratio for level in schedule.levels]
    assert all(a > b for a, b in itertools.pairwise(ratios))
    whole = rule in ("dpm", "singlestep", "unipc") or (rule == "dpm2" and choice == "karras")
    for level in schedule.levels[:-1]:
        exact = timestep_of(level.ratio, schedule.bars)
        assert level.t == (round(exact) if whole else pytest.approx(exact, rel=1e-9))


def test_rules_whose_end_is_their_own_do_not_ask_the_file():
    config = ScheduleConfig(**SD, set_alpha_to_one=False, final_sigmas_type="sigma_min")
    for rule in ("ddpm", "heun", "dpm2", "lcm"):
        assert make_schedule(config, 5, rule=rule)[5].sigma == 0, rule
    for rule in ("deis", "tcd"):
        assert make_schedule(ScheduleConfig(**SD), 5, rule=rule)[5].sigma > 0, rule


def test_singlestep_does_not_read_the_spacing():
    config = ScheduleConfig(**SD, rule="singlestep")
    for spacing in ("leading", "trailing"):
        assert make_schedule(dataclasses.replace(config, timestep_spacing=spacing), 5) == make_schedule(config, 5)


@pytest.mark.parametrize("rule", ["deis", "unipc"])
def test_a_chosen_table_that_stops_above_the_first_level_ends_on_it(rule):
    config = ScheduleConfig(**SD, rule=rule, sigma_min=0.05, final_sigmas_type="sigma_min")
    schedule = make_schedule(config, 5, sigmas="karras")
    assert schedule[4].ratio == pytest.approx(0.05) and schedule[5].alpha == math.sqrt(alpha_bars(config)[0].item())
    twice = make_schedule(config, 5, sigmas="karras", compat=True)
    assert twice[5].ratio == twice[4].ratio  # as diffusers has it


def test_betas_given_one_by_one():
    given = tuple(np.linspace(0.001, 0.03, 40).tolist())
    config = ScheduleConfig(num_train_timesteps=40, trained_betas=given)
    np.testing.assert_allclose(alpha_bars(config), np.cumprod(1 - np.array(given)), rtol=1e-5)


def test_levels_and_timesteps_of_the_caller():
    config = ScheduleConfig(**SD, rule="euler")
    schedule = make_schedule(config, sigmas=[10.0, 2.0, 0.5, 0.0])
    np.testing.assert_allclose([r.ratio for r in schedule.levels], [10, 2, 0.5, 0], rtol=1e-12)
    scheduler = EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(sigmas=[10.0, 2.0, 0.5, 0.0])
    np.testing.assert_allclose([r.t for r in schedule.levels[:-1]], scheduler.timesteps.numpy(), rtol=1e-6)
    for rule, cls in (("euler", EulerDiscreteScheduler), ("dpm", DPMSolverMultistepScheduler)):
        scheduler = cls(**SD)
        scheduler.set_timesteps(timesteps=[900, 500, 20])
        schedule = make_schedule(dataclasses.replace(config, rule=rule), 3, timesteps=[900, 500, 20])
        np.testing.assert_allclose([r.ratio for r in schedule.levels], scheduler.sigmas.numpy(), rtol=1e-6)
        assert [r.t for r in schedule.levels] == [900, 500, 20, 0]
    config = dataclasses.replace(config, rule="dpm")
    fractions = [900.7, 500.25, 20.0]
    for compat, told in ((False, fractions), (True, [900, 500, 20])):  # diffusers' solvers cut what they are given
        assert [r.t for r in make_schedule(config, timesteps=fractions, compat=compat).levels[:-1]] == told


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 5, "sigmas": "karas"}, "choice of sigmas 'karas': .*Did you mean 'karras'"),
        ({"sigmas": [1.0]}, "sigmas must be 2 or more falling numbers"),
        ({"sigmas": [1.0, 2.0]}, r"falling numbers, none below 0: not \[1.0, 2.0\]"),
        ({"sigmas": [1.0, -2.0]}, "none below 0"),
        ({"timesteps": [1000, 3]}, "at most 999"),
        ({"timesteps": []}, "timesteps must be 1 or more"),
        ({"timesteps": [5, 3], "n": 3}, "3 steps asked for, but the timesteps given make 2"),
        ({"timesteps": [5, 3], "sigmas": "karras"}, "Both timesteps and sigmas"),
        ({"n": None}, "None steps asked for; .* between 1 and 999"),
        ({"n": 5, "rule": "flow"}, "rule 'flow' doesn't go with a network that predicts epsilon"),
        ({"n": 51, "rule": "lcm"}, "51 steps asked for; .* between 1 and 50 "),
        ({"n": 2.5}, "2.5 steps asked for; .* between 1 and 999"),
        ({"n": 2.0}, "2.0 steps asked for"),
        ({"n": "5"}, "'5' steps asked for; .* between 1 and 999"),
        ({"n": True}, "True steps asked for"),
        ({"n": [5]}, r"\[5\] steps asked for"),
        ({"n": np.int64(1001)}, "^1001 steps asked for"),
        ({"n": True, "timesteps": [5]}, "True steps asked for, but the timesteps given make 1"),
        ({"n": np.array([1, 2]), "timesteps": [5]}, r"array\(\[1, 2\]\) steps asked for, but"),
        ({"n": 5, "sigmas": ""}, "Unknown choice of sigmas '': ldm knows spaced"),
        ({"n": 5, "rule": ["dpm"]}, r"rule \['dpm'\]: ldm knows ddpm, .*Did you mean 'dpm'"),
        ({"n": 5, "rule": 3}, "rule 3: ldm knows ddpm"),
        ({"sigmas": 5.0}, "sigmas must be a list of falling numbers, not 5.0"),
        ({"sigmas": ["a", "b"]}, r"sigmas must be a list of falling numbers, not \['a', 'b'\]"),
        ({"sigmas": [10**400, 0]}, "sigmas must be a list of falling numbers"),
        ({"sigmas": torch.ones(2, 2)}, "sigmas must be a list of falling numbers, not tensor"),
        ({"sigmas": np.ones((2, 2))}, "sigmas must be a list of falling numbers, not array"),
        ({"sigmas": [math.nan, 0]}, "sigmas must be 2 or more falling numbers"),
        ({"sigmas": np.array([])}, r"sigmas must be 2 or more falling numbers, .* not \[\]"),
        ({"timesteps": "321"}, "timesteps must be a list of falling numbers, not '321'"),
        ({"timesteps": [None]}, r"timesteps must be a list of falling numbers, not \[None\]"),
        ({"timesteps": torch.tensor(5.0)}, "timesteps must be a list of falling numbers, not tensor"),
        ({"timesteps": [5, 3], "sigmas": np.array([2.0, 1.0])}, "Both timesteps and sigmas"),
        ({"n": 1, "rule": "tcd", "original_inference_steps": 1001}, "1001, more than the 1000 steps of training"),
    ],
)
def test_levels_that_cannot_be_are_refused(options, message):
    original = options.pop("original_inference_steps", 50)
    with pytest.raises(LDMError, match=message):
        make_schedule(ScheduleConfig(**SD, rule="dpm", original_inference_steps=original), **options)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, iter, lambda values: np.array(values, "float32")])
@pytest.mark.parametrize("compat", [False, True])
def test_levels_may_come_in_whatever_holds_numbers(kind, compat):
    flow = ScheduleConfig(prediction_type="flow", rule="flow")
    for config, sigmas, timesteps in ((ScheduleConfig(**SD), [8.0, 2.0, 0.5], [900, 500, 20]), (flow, [1, 0.5], [900])):
        for name, values in (("sigmas", sigmas), ("timesteps", timesteps)):
            plain = make_schedule(config, compat=compat, **{name: values})
            assert make_schedule(config, compat=compat, **{name: kind(values)}).levels == plain.levels
            n = np.int64(len(plain))
            assert make_schedule(config, n, compat=compat, **{name: kind(values)}).levels == plain.levels
    assert make_schedule(ScheduleConfig(), np.int64(5)) == make_schedule(ScheduleConfig(), 5)


def test_a_choice_of_levels_at_zero_terminal_snr_says_what_to_do():
    """Where the rule leaves alpha = 0, there is no largest sigma/alpha to choose from."""
    v = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    config = ScheduleConfig(**SD, **v, rescale_betas_zero_snr=True)
    with pytest.raises(LDMError, match=r"pure noise .* karras levels .* sigma_max"):
        make_schedule(config, 5, sigmas="karras")
    assert make_schedule(dataclasses.replace(config, sigma_max=50.0), 5, sigmas="karras")[0].ratio == pytest.approx(50)
    nearly = make_schedule(dataclasses.replace(config, rule="euler"), 5, sigmas="karras")
    assert nearly[0].ratio == pytest.approx(4096, rel=1e-3)


def test_zero_terminal_snr_is_lin_et_al_s():
    """Algorithm 1: the first level stays, the last has alpha = 0, and sqrt(alpha_bar) is shifted and scaled between."""
    plain, config = ScheduleConfig(**SD), ScheduleConfig(**SD, rescale_betas_zero_snr=True)
    root, shifted = (alpha_bars(c).double().sqrt().numpy() for c in (plain, config))
    np.testing.assert_allclose(shifted, (root - root[-1]) * root[0] / (root[0] - root[-1]), atol=2e-5)
    assert shifted[-1] == 0 and alpha_bars(dataclasses.replace(config, rule="euler"))[-1] == 2**-24


def test_flow_tables_follow_their_formulas():
    """Esser et al. 2024, equation 23, and FLUX's mu: a line through (256, 0.5) and (4096, 1.15)."""
    config = ScheduleConfig.from_json({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    schedule = make_schedule(config, 4)
    np.testing.assert_allclose([r.sigma for r in schedule.levels], [1, 0.667, 0.334, 0.001, 0])
    assert all(r.alpha == 1 - r.sigma and r.t == pytest.approx(1000 * r.sigma) for r in schedule.levels)
    assert schedule.prediction == "flow" and schedule.start_scale == 1 and schedule.bars is None
    moved = dataclasses.replace(config, use_dynamic_shifting=True)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.63)):
        s = np.array([1, 0.667, 0.334, 0.001])
        expected = [*np.exp(mu) / (np.exp(mu) + 1 / s - 1), 0]
        np.testing.assert_allclose([r.sigma for r in make_schedule(moved, 4, tokens=tokens).levels], expected)
    with pytest.raises(LDMError, match="depends on the size of the picture: pass `tokens`"):
        make_schedule(moved, 4)
    ended = dataclasses.replace(config, shift=3.0, shift_terminal=0.1)
    assert make_schedule(ended, 4)[3].sigma == pytest.approx(0.1)
    with pytest.raises(LDMError, match="found for Stable Diffusion"):
        make_schedule(config, 4, sigmas="ays")
    with pytest.raises(LDMError, match=r"between 0 and 1: not 1\.5"):
        make_schedule(config, sigmas=[1.5, 0.0])
    given = make_schedule(config, timesteps=[1000, 500])
    assert (
        [r.sigma for r in given.levels]
        == [1, 0.5, 0]
        == [r.sigma for r in make_schedule(config, sigmas=[1, 0.5, 0]).levels]
    )


@pytest.mark.parametrize("fields", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True},
    {"use_exponential_sigmas": True, "shift": 2.0}, {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"}])  # fmt: skip
@pytest.mark.parametrize("n", [1, 2, 7, 28])
def test_flow_tables_equal_diffusers(fields, n):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
    scheduler.set_timesteps(n, **({"mu": 0.63} if "use_dynamic_shifting" in fields else {}))
    if "shift_terminal" in fields and n == 1:
        assert scheduler.sigmas[0].isnan()  # 0 / 0: one level cannot be first and last
        assert make_schedule(read(scheduler), n, tokens=1024)[0].sigma == 1
        return
    schedule = make_schedule(read(scheduler), n, tokens=1024)
    np.testing.assert_allclose([r.sigma for r in schedule.levels], scheduler.sigmas.numpy(), rtol=2e-6)
    np.testing.assert_allclose([r.t for r in schedule.levels[:-1]], scheduler.timesteps.numpy(), rtol=2e-6)


def test_levels_at_a_timestep_and_between_two():
    """What DPM2, TCD and Runge and Kutta's steps ask for beside the rows."""
    schedule = make_schedule(ScheduleConfig(**SD), 5)
    bars = schedule.bars
    assert schedule.at(2, 601)[1:] == schedule[1][1:] and schedule.at(2, 601).i == 2
    half = schedule.at(0, 600.5)
    assert half.ratio == pytest.approx((schedule.at(0, 600).ratio + schedule.at(0, 601).ratio) / 2, rel=1e-12)
    for t in (0, 1, 500, 998, 999):
        assert timestep_of(math.sqrt((1 - bars[t]) / bars[t]), bars) == pytest.approx(t, abs=1e-9)
    middle = schedule.between(1, math.sqrt(schedule[1].ratio * schedule[2].ratio))
    assert schedule[2].t < middle.t < schedule[1].t
    assert math.log(middle.ratio) == pytest.approx((math.log(schedule[1].ratio) + math.log(schedule[2].ratio)) / 2)
    assert timestep_of(1e-12, bars) == 0 and timestep_of(1e9, bars) == 999
    flow = make_schedule(ScheduleConfig(prediction_type="flow", rule="flow"), 4)
    assert flow.at(0, 250)[1:] == (250, 0.75, 0.25) and flow.between(0, 1.0)[1:] == (500, 0.5, 0.5)
