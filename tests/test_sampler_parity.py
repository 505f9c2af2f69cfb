"""Every sampler and every schedule against diffusers' classes: whole runs on a nonlinear network, a generated matrix.

Under `compat` a run equals diffusers' latent by latent. diffusers calculates in float32 even when it is given float64,
so its modules are compiled once more with every float32 replaced (`in_float64`): then a bug stands a million times
above rounding. The betas' float32 digits stay, as training had them.
"""

import copy
import inspect
import itertools
import json
import logging
import math
import warnings
from contextlib import contextmanager
from functools import cache, partial

import diffusers
import numpy as np
import pytest
import torch
from reference import in_float64, normal

from ldm.diffusion import to_x0_eps
from ldm.noise import Noise
from ldm.samplers import SAMPLERS
from ldm.sampling import sample
from ldm.schedules import ScheduleConfig, make_schedule
from ldm.schedules.config import CLASSES

SHAPE = (2, 3, 4, 5)
SEEDS = (11, 12)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 2, 3, 5, 10, 13, 20, 25, 50)

# Under a name: the class, the fields that make it this variant, the sampler that its file must give.
VARIANTS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, "ddpm"),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "ddim"),
    "ddim to the first level": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, "ddim"),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, "plms"),
    "plms to zero": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, "plms"),
    "pndm": ("PNDMScheduler", {}, "pndm"),
    "euler": ("EulerDiscreteScheduler", {}, "euler"),
    "euler to sigma_min": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "euler"),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}, "euler-a"),
    "heun": ("HeunDiscreteScheduler", {}, "heun"),
    "lms": ("LMSDiscreteScheduler", {}, "lms"),
    "dpm2": ("KDPM2DiscreteScheduler", {}, "dpm2"),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}, "dpm2-a"),
    "dpm++1m": ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}, "dpm++2m"),
    "dpm++2m to sigma_min": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "dpm++2m"),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpm++3m"),
    "dpm++3m to sigma_min": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "final_sigmas_type": "sigma_min"},
        "dpm++3m",
    ),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpm++2m-sde"),
    "dpm++3m-sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        "dpm++3m-sde",
    ),
    "dpm2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "dpm2m",
    ),
    "dpm3m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        "dpm3m",
    ),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}, "dpm++2s"),
    "dpm++2s to sigma_min": (
        "DPMSolverSinglestepScheduler",
        {"final_sigmas_type": "sigma_min", "lower_order_final": True},
        "dpm++2s",
    ),
    "deis1": ("DEISMultistepScheduler", {"solver_order": 1}, "ddim"),
    "deis2": ("DEISMultistepScheduler", {}, "deis2"),
    "deis3": ("DEISMultistepScheduler", {"solver_order": 3}, "deis3"),
    **{
        f"unipc{order}{end}{bh}": (
            "UniPCMultistepScheduler",
            {"solver_order": order, "solver_type": bh or "bh2", **({"final_sigmas_type": "sigma_min"} if end else {})},
            f"unipc{order}" + ("-bh1" if bh else ""),
        )
        for order, (end, bh) in itertools.product(
            (1, 2, 3), (("", ""), (" to sigma_min", ""), (" to sigma_min, ", "bh1"))
        )
    },
    "lcm": ("LCMScheduler", {}, "lcm"),
    "tcd": ("TCDScheduler", {}, "tcd"),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {}, "euler"),
    "flow euler shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler"),
    "flow euler shifted by size": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "euler"),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "flow-heun"),
}
FLOW = [name for name in VARIANTS if name.startswith("flow")]
ORDER = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
RATIO = ("Euler", "Heun", "LMS", "KDPM2")  # classes that calculate in x / alpha
WITH_GENERATOR = ("DDPM", "DDIM", "Ancestral", "LCM", "TCD", "Multistep")
TOKENS = 1024


def network(x, t):
    """A guided, nonlinear, time-dependent stand-in for a UNet; neighbouring pixels and channels differ in it."""
    bias = torch.linspace(-0.5, 0.5, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    c = torch.tanh(0.7 * x + 0.2 * x.roll(1, -1) + bias) * (t + 300) / (t + 500)
    u = torch.tanh(0.6 * x + 0.2 * x.roll(1, -1)) * (t + 300) / (t + 500)
    return u + 7.5 * (c - u)


@contextmanager
def quiet(dtype=torch.float64):
    """Without diffusers' warnings; and what it makes of whole numbers (LCM's timesteps) in this dtype too."""
    logging.disable(logging.WARNING)
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.set_default_dtype(torch.float32)


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def fields_of(name, **fields):
    cls, own, _ = VARIANTS[name]
    return fields | own if cls.startswith("FlowMatch") else {**SD, **fields, **own}


@cache
def made(name, dtype, fields):
    """diffusers' scheduler before its steps are set: some classes take half a second."""
    cls = getattr(diffusers, VARIANTS[name][0])
    fields = fields_of(name, **dict(fields))
    with quiet(torch.float32):
        scheduler = cls(**fields)
        if dtype == torch.float64:
            bars = scheduler.alphas_cumprod.double() if hasattr(scheduler, "alphas_cumprod") else None
            scheduler = in_float64(cls)(**fields)
            if bars is not None:  # the digits that training had
                scheduler.alphas_cumprod = bars
                if getattr(scheduler, "final_alpha_cumprod", torch.ones(())) != 1:
                    scheduler.final_alpha_cumprod = bars[0]
    return scheduler


def make(name, n, dtype=torch.float64, told=None, **fields):
    """diffusers' scheduler with n steps set, or with levels given: `told` is what `set_timesteps` takes then."""
    scheduler = copy.deepcopy(made(name, dtype, tuple(fields.items())))
    with quiet(dtype):
        if told is not None:
            scheduler.set_timesteps(**told)
        elif scheduler.config.get("use_dynamic_shifting"):
            scheduler.set_timesteps(n, mu=0.5 + 0.65 * (TOKENS - 256) / (4096 - 256))
        else:
            scheduler.set_timesteps(n)
    chosen = any(fields.get(f"use_{choice}_sigmas") for choice in CHOICES)
    if chosen and dtype == torch.float64 and scheduler.timesteps.dtype == torch.int64:
        # Whole timesteps are those of the very class: whether 998.9999 is cut or 999, float32 decides.
        scheduler.timesteps = make(name, n, torch.float32, **fields).timesteps
    return scheduler


def config_of(scheduler):
    return ScheduleConfig.from_json(json.loads(scheduler.to_json_string()) | {"_class_name": type(scheduler).__name__})


def run_diffusers(scheduler, n, x, first=0, noise=None, edit=None, **told):
    """Latents at rows first, first + 1, ..., n, in the model's coordinates; `edit` may exchange one on its row.

    `told` goes to `step`: DDIM's eta.
    """
    cls = type(scheduler).__name__
    in_ratio = any(word in cls for word in RATIO) and "Flow" not in cls
    twice = cls in ORDER or cls == "FlowMatchHeunDiscreteScheduler"
    if cls == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        ends = {3, 7, 11} | set(range(12, 12 + n))
    elif cls == "PNDMScheduler":
        ends = {1, *range(2, n + 2)} if n > 1 else {0}
    else:
        ends = {*range(1, 2 * n - 1, 2), 2 * n - 2} if twice else set(range(n))
    extra = (
        {"generator": noise or generators()}
        if any(word in cls for word in WITH_GENERATOR) and "Flow" not in cls
        else {}
    )
    if cls in ("DEISMultistepScheduler", "UniPCMultistepScheduler"):
        extra = {}
    # A step that was reached by two evaluations has two sigmas in diffusers' table.
    sigmas = (
        scheduler.sigmas[[0, *range(1, 2 * n - 2, 2), -1]] if twice and n > 1 else getattr(scheduler, "sigmas", None)
    )
    scale = (lambda k: math.hypot(1, sigmas[k].item())) if in_ratio else lambda k: 1.0
    start = x if first else x * (float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0)
    x = x * scale(first) if first else start
    latents, row = [x / scale(first)], first
    begin = 2 * first if twice else first
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)  # left alone, it looks for its timestep and may find another (defect 15)
    ts = scheduler.timesteps[: max(ends) + 1]  # defect 3: trailing may have one too many
    for k, t in list(enumerate(ts))[begin:]:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t.item()), t, x, **extra, **told).prev_sample
        if k in ends:
            row += 1
            x = x if edit is None else edit(row, x / scale(row)) * scale(row)
            latents.append(x / scale(row))
    assert row == n, (row, n)
    return latents


def denoiser(schedule):
    return lambda x, level: to_x0_eps(network(x, level.t), x, level.alpha, level.sigma, schedule.prediction)


def run_ours(name, schedule, x, first=0, noise=None):
    sampler = SAMPLERS[VARIANTS[name][2]].step
    x = x if first else x * schedule.start_scale
    steps = sample(denoiser(schedule), x, schedule, sampler, noise or Noise(generators()), first=first)
    return [x, *(step.x for step in steps)]


def error(ours, reference):
    """The largest difference, in units of the reference's largest value."""
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    assert reference.isfinite().all() and reference.abs().max() > 0.01
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def compare(name, n, dtype=torch.float64, first=0, told=None, given=None, **fields):
    """The largest error of any latent of a run from row `first`. `told`: levels for diffusers, `given`: ours."""
    scheduler = make(name, n, dtype, told, **fields)
    config = config_of(scheduler)
    assert config.sampler == VARIANTS[name][2]
    schedule = make_schedule(config, n, compat=True, tokens=TOKENS, **(given or {}))
    x = normal(3, *SHAPE, dtype=dtype)
    with quiet(dtype):
        theirs = run_diffusers(scheduler, n, x, first)
    ours = run_ours(name, schedule, x, first)
    assert len(theirs) == len(ours) == n + 1 - first
    return max(map(error, ours, theirs))


# ------------------------------------------------------------------------------------------------------- the matrix

SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CHOICES = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}


def knows(name, field):
    """Whether the class reads the field, and makes something of it."""
    idle = name in ("lcm", "tcd") and field == "timestep_spacing"
    return not idle and field in inspect.signature(getattr(diffusers, VARIANTS[name][0]).__init__).parameters


def spacings(name):
    return [{"timestep_spacing": spacing} for spacing in SPACINGS] if knows(name, "timestep_spacing") else [{}]


def predictions(name):
    """diffusers' PNDM, DPM2 and Euler ancestral don't know `sample`."""
    if not knows(name, "prediction_type"):
        return [{}]
    few = VARIANTS[name][0].startswith(("PNDM", "KDPM2", "EulerA"))
    return [{"prediction_type": prediction} for prediction in PREDICTIONS[: 2 if few else 3]]


def steps_of(name, *steps):
    """diffusers' Runge-Kutta steps need four rows (defect 9)."""
    return [n for n in steps or STEPS if n >= 4 or name != "pndm"]


def plain(name):
    """Every spacing, prediction and step count; the offset takes turns."""
    for spacing, prediction, n in itertools.product(spacings(name), predictions(name), steps_of(name)):
        yield n, 0, {**spacing, **prediction, **({"steps_offset": n % 2} if knows(name, "steps_offset") else {})}


def chosen(name):
    """Every choice of sigmas; ends that come twice divide by zero in diffusers' third order (defect 11)."""
    if not knows(name, "use_karras_sigmas"):
        return
    twice = name in ("dpm++3m to sigma_min", "dpm3m")
    spanning = "Solver" in VARIANTS[name][0] or VARIANTS[name][0].startswith(("DEIS", "UniPC"))  # whatever the spacing
    for choice, spacing, prediction, n in itertools.product(
        CHOICES.values(), spacings(name)[: 1 if spanning else 3], predictions(name)[:2], STEPS
    ):
        if not (twice and n >= 15):
            yield n, 0, {**choice, **spacing, **prediction}
    if knows(name, "sigma_min"):
        for choice, n in itertools.product(CHOICES.values(), STEPS):
            yield n, 0, {**choice, "sigma_min": 0.05, "sigma_max": 9.0}


def cosine_and_linear(name):
    if knows(name, "beta_schedule"):
        for betas, spacing, prediction, n in itertools.product(
            ("linear", "squaredcos_cap_v2"), spacings(name), predictions(name)[:2], steps_of(name, 2, 5, 20)
        ):
            yield n, 0, {"beta_schedule": betas, **spacing, **prediction}
        given = tuple(torch.linspace(0.001, 0.03, 500).tolist())
        yield 10, 0, {"trained_betas": given, "num_train_timesteps": 500}
    choices = CHOICES.values() if knows(name, "use_karras_sigmas") and knows(name, "beta_schedule") else ()
    for choice, n in itertools.product(choices, (5, 10)):
        yield n, 0, {"beta_schedule": "squaredcos_cap_v2", **choice}


def zero_snr(name):
    if knows(name, "rescale_betas_zero_snr"):
        for spacing, prediction, n in itertools.product(spacings(name), predictions(name)[1:2], STEPS):
            yield n, 0, {"rescale_betas_zero_snr": True, **spacing, **prediction}


def midway(name):
    """As image-to-image begins; diffusers' PNDM has no way to (defect 9)."""
    if not name.startswith(("plms", "pndm")):
        for spacing, n in itertools.product(spacings(name), STEPS):
            for first in sorted({1, n // 2, n - 1} & set(range(1, n))):
                yield n, first, spacing


MATRIX = [
    (name, part, [*part(name)])
    for name in VARIANTS
    for part in (plain, chosen, cosine_and_linear, zero_snr, midway)
    if [*part(name)]
]


def allowed(name, fields):
    """1e-10, but for what diffusers rounds in its own float64."""
    cosine = fields.get("beta_schedule") == "squaredcos_cap_v2"  # sigma / alpha begins at 20291
    if name == "ddpm":  # it adds noise of standard deviation 1e-10 to a finished latent (defect 5)
        return 1e-9
    if name == "dpm2-a" and cosine:  # sigma_down, as the root of a difference, loses half its digits
        return 1e-6
    return 1e-9 if cosine and name in ("dpm2", "deis3") else 1e-10


@pytest.mark.parametrize(
    "name, part, cases", [pytest.param(*m, id=f"{m[0]} {m[1].__name__}".replace(" ", "-")) for m in MATRIX]
)
def test_every_latent_equals_diffusers_in_float64(name, part, cases):
    for n, first, fields in cases:
        off = compare(name, n, first=first, **fields)
        assert off < allowed(name, fields), f"{name}, n = {n}, from row {first}, {fields}: off by {off:.1e}"


def test_the_matrix_is_as_large_as_it_says():
    assert sum(len(cases) for _, _, cases in MATRIX) >= 3000
    assert {VARIANTS[name][2] for name, _, _ in MATRIX} == set(SAMPLERS)
    assert {VARIANTS[name][0] for name in VARIANTS} == set(CLASSES)
    assert (len(SAMPLERS), len(CLASSES)) == (28, 17)  # as README says


# --------------------------------------------------------------------------------------- levels given by the caller

AYS = diffusers.schedulers.AysSchedules
TIMESTEPS = {
    "align your steps": AYS["StableDiffusionTimesteps"],
    "align your steps, XL": AYS["StableDiffusionXLTimesteps"],
    "one": [700],
    "uneven": [999, 640, 631, 200, 3],
    "not from the top, to 0": [812, 500, 77, 0],
    "more than 15": [round(999 - 990 * (i / 17) ** 1.7) for i in range(18)],
}
FRACTIONS = [998.5, 640.25, 333.3, 41.7, 0.5]
GIVEN = {  # sigma / alpha, and where it ends
    "align your steps": AYS["StableDiffusionSigmas"],
    "align your steps, XL": AYS["StableDiffusionXLSigmas"],
    "a little noisier than training": [15.0, 3.0, 0.7, 0.0],
    "to a level with noise": [10.0, 2.0, 0.5, 0.1],
    "one": [5.0, 0.0],
}
TAKES_TIMESTEPS = [
    "ddpm", "euler", "euler to sigma_min", "heun", "dpm++2m", "dpm++2m to sigma_min", "dpm++3m", "dpm++2m-sde",
    "dpm++3m-sde", "dpm2m", "dpm3m", "dpm++2s", "dpm++2s to sigma_min", "lcm", "tcd",
]  # fmt: skip


@pytest.mark.parametrize("name", TAKES_TIMESTEPS)
def test_timesteps_of_the_caller_give_diffusers_latents(name):
    """The rows are the caller's, and everything between them must follow: step lengths, orders, ends, where to start.

    The spacing that the file names no longer shapes the table, but still says whether a run begins at sigma * eps.
    """
    rows = TIMESTEPS | ({"fractions": FRACTIONS} if name.startswith(("euler", "heun")) else {})
    for (what, timesteps), fields in itertools.product(rows.items(), predictions(name)[:2]):
        n, told = len(timesteps), {"timesteps": timesteps}
        for spacing, first in [(s, 0) for s in spacings(name)] + [({}, first) for first in {1, n - 1} if 0 < first < n]:
            theirs = make(name, n, told=told, **fields, **spacing).timesteps.tolist()
            assert sorted({*theirs}, reverse=True) == timesteps  # it took them
            off = compare(name, n, first=first, told=told, given=told, **fields, **spacing)
            assert off < allowed(name, fields), f"{what}, from row {first}, {fields}, {spacing}: off by {off:.1e}"


def test_every_class_that_takes_levels_is_compared():
    """But UniPC, which takes sigmas for flow models alone, and ldm has none of those."""
    for kind, names in (("timesteps", [*TAKES_TIMESTEPS, "flow euler"]), ("sigmas", ["euler", "flow euler", "unipc2"])):
        takes = {c for c in CLASSES if kind in inspect.signature(getattr(diffusers, c).set_timesteps).parameters}
        assert {VARIANTS[name][0] for name in names} == takes


@pytest.mark.parametrize("what", GIVEN)
def test_sigmas_of_the_caller_give_diffusers_latents(what):
    """Euler's class, with the end among the levels; above training's noisiest level the network is told 999."""
    n, told = len(GIVEN[what]) - 1, {"sigmas": GIVEN[what]}
    for fields, spacing in itertools.product(predictions("euler"), spacings("euler")):
        for first in {0, n // 2}:
            assert make("euler", n, told=told, **fields, **spacing).sigmas.tolist() == GIVEN[what]
            assert compare("euler", n, first=first, told=told, given=told, **fields, **spacing) < 1e-10


def test_align_your_steps_by_name_are_the_sigmas_that_diffusers_prints():
    """Ours by name, theirs by the list."""
    for choice, key in (("ays", "StableDiffusion"), ("ays-xl", "StableDiffusionXL")):
        told = {"sigmas": AYS[f"{key}Sigmas"]}
        assert compare("euler", 10, told=told, given={"sigmas": choice}) < 1e-10
        assert compare("euler", 10, given={"sigmas": choice}) > 1e-3  # and not the run of ten spaced steps


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_given_to_a_flow_model(shift):
    """diffusers shifts sigmas that it is given, as if they were evenly spaced, and adds the end; we take them as said.

    So with a shift ours are told what diffusers makes of its own.
    """
    for s in ([1.0, 0.8, 0.35, 0.1], [0.9, 0.42], [0.6], [(1 - i / 17) ** 1.3 for i in range(17)]):
        shifted = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in s]
        for first in {0, len(s) // 2}:
            run = partial(compare, "flow euler", len(s), first=first, shift=shift)
            assert run(told={"sigmas": s}, given={"sigmas": [*shifted, 0.0]}) < 1e-10
            if shift == 1:  # timesteps are sigma * 1000; a shift would move the levels and not what the network is told
                timesteps = {"timesteps": [1000 * sigma for sigma in s]}
                assert run(told=timesteps, given=timesteps) < 1e-10
            else:
                assert run(told={"sigmas": s}, given={"sigmas": [*s, 0.0]}) > 1e-3


@pytest.mark.parametrize("n", [14, 15])
@pytest.mark.parametrize("name", ["dpm++2m", "dpm++3m", "deis3", "dpm2m", "unipc3"])
def test_runs_of_fewer_than_15_steps_end_with_lower_orders(name, n):
    assert compare(name, n) < 1e-10


def test_a_sampler_s_rule_is_that_of_its_class():
    """Taken under compat. (The solvers' first order is DDIM's or Euler's step, and those have classes of their own.)"""
    for name, (_, _, sampler) in VARIANTS.items():
        if sampler not in ("ddim", "euler", "euler-a") or name.startswith(("ddim", "euler")):
            assert SAMPLERS[sampler].rule == config_of(make(name, 5)).rule, name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_999_steps_equals_diffusers(name):
    fields = {"timestep_spacing": "leading"} if knows(name, "timestep_spacing") else {}
    if name in ("lcm", "tcd"):
        fields = {"original_inference_steps": 999}
    assert compare(name, 999, **fields) < max(1e-9, allowed(name, fields))


# Where diffusers' float32 tables lose digits: in two steps from sigma/alpha 14.6 (heun, dpm2-a), in closed forms that
# cancel (dpm++3m-sde, deis3). There it is diffusers that is far from float64, and the test below sees that.
LOSES_DIGITS = {"heun": 2e-5, "dpm2-a": 2e-4, "dpm++3m-sde": 5e-5, "deis3": 3e-4}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_latent_equals_diffusers_in_float32(name):
    """The very classes, which keep float32 tables inside; ours are read from one float32 table in float64.

    At most 1e-5 of the largest value; and our error against float64, root mean square over all runs, is at most 2.5
    times diffusers' (measured: 0.01 to 2.1).
    """
    squares = []
    for spacing, n in itertools.product(spacings(name), steps_of(name)):
        runs = []
        for dtype in (torch.float64, torch.float32):
            scheduler = make(name, n, dtype, **spacing)
            schedule = make_schedule(config_of(scheduler), n, compat=True, tokens=TOKENS)
            x = normal(3, *SHAPE).to(dtype)
            with quiet(dtype):
                runs += [run_diffusers(scheduler, n, x), run_ours(name, schedule, x)]
        for truth, _, theirs, ours in zip(*runs, strict=True):
            squares.append([error(ours.double(), truth) ** 2, error(theirs.double(), truth) ** 2])
            off = error(ours, theirs)
            if name in LOSES_DIGITS and off > 1e-5:
                assert squares[-1][1] > 25 * squares[-1][0] and off < LOSES_DIGITS[name], f"{spacing}, n = {n}: {off}"
            else:
                assert off < 1e-5, f"{spacing}, n = {n}: off by {off:.1e}"
    ours, theirs = np.sqrt(np.mean(squares, axis=0))
    assert 1e-9 < ours < 1e-5 and ours <= 2.5 * theirs, f"ours {ours:.1e}, diffusers' {theirs:.1e}"


def test_the_float64_reference_is_diffusers_and_in_float64():
    for name in VARIANTS:
        x = normal(3, *SHAPE)
        with quiet(torch.float32):
            single = run_diffusers(make(name, 10, torch.float32), 10, x)[-1]
        with quiet():
            double = run_diffusers(make(name, 10), 10, x.double())[-1]
        # Close, but not the same digits: had float32 survived somewhere, more of them would agree, or none.
        assert 1e-9 < error(single.double(), double) < 1e-4, name
        assert double.dtype == torch.float64


@pytest.mark.parametrize("name", [name for name in VARIANTS if SAMPLERS[VARIANTS[name][2]].adds_noise])
def test_the_same_generators_give_the_noise_diffusers_draws(name):
    """The real float32 classes, a list of generators: the same pictures, and the streams stand at the same place."""
    scheduler, x = make(name, 20, torch.float32), normal(3, *SHAPE)
    schedule = make_schedule(config_of(scheduler), 20, compat=True)
    theirs = generators()
    with quiet(torch.float32):
        reference = run_diffusers(scheduler, 20, x, noise=theirs)
    ours, noise = run_ours(name, schedule, x, noise=Noise(mine := generators())), Noise(generators())
    assert error(ours[-1], reference[-1]) < 1e-4
    # Where diffusers draws noise for a finished latent, to multiply it by 0, we draw none.
    drawn = [torch.equal(a.get_state(), b.get_state()) for a, b in zip(mine, theirs, strict=True)]
    if not all(drawn):
        Noise(mine).draw(SHAPE[1:])
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(mine, theirs, strict=True))
    other = run_ours(name, schedule, x, noise=Noise([noise.generators[0], torch.Generator().manual_seed(13)]))
    assert torch.equal(other[-1][0], ours[-1][0]) and (other[-1][1] - ours[-1][1]).abs().max() > 0.01


def test_the_variants_can_be_told_apart():
    """The weakest comparison above allows 1e-6; different methods on one table are a ten-thousandth apart or more."""
    config = ScheduleConfig(**SD, timestep_spacing="trailing", rule="dpm")
    schedule, x = make_schedule(config, 10), normal(3, *SHAPE, dtype=torch.float64)
    finals = {VARIANTS[name][2]: run_ours(name, schedule, x)[-1] for name in VARIANTS}
    one = [{"ddpm", "euler-a"}, {"ddim", "euler"}]  # one method under two names, as other tests prove
    for (a, x_a), (b, x_b) in itertools.combinations(finals.items(), 2):
        if {a, b} not in one:
            assert error(x_a, x_b) > 1e-4, f"{a} and {b} agree"
