"""Runs of diffusers' schedulers, and of our samplers beside them, on a network in closed form that costs nothing.

Both are always compared in float64, whatever the networks' dtype: samplers have no weights, and there a wrong
coefficient stands a million times above rounding. diffusers' classes are recompiled for it (`reference.in_float64`);
the betas keep the float32 digits that training had.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion import to_x0_eps
from ldm.noise import Noise
from ldm.parity.compare import Line, held, skipped
from ldm.parity.timing import both
from ldm.samplers import SAMPLERS
from ldm.sampling import sample
from ldm.schedules import ScheduleConfig, make_schedule

SHAPE, SEEDS = (2, 4, 6, 5), (11, 12)
STEPS = 16  # below 15 the solvers of higher order end with lower ones
MULTI, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
THEIRS = {  # sampler -> diffusers' class, and what makes it this sampler
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": False}),
    "dpm++2m": (MULTI, {}),
    "dpm++3m": (MULTI, {"solver_order": 3}),
    "dpm++2m-sde": (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++3m-sde": (MULTI, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm2m": (MULTI, {"algorithm_type": "dpmsolver", **TO_SIGMA_MIN}),
    "dpm3m": (MULTI, {"algorithm_type": "dpmsolver", "solver_order": 3, **TO_SIGMA_MIN}),
    "deis2": ("DEISMultistepScheduler", {}),
    "deis3": ("DEISMultistepScheduler", {"solver_order": 3}),
    **{f"unipc{order}": (UNIPC, {"solver_order": order}) for order in (1, 2, 3)},
    # to sigma = 0 diffusers' bh1 is NaN (REFERENCE_DEFECTS.md, 12)
    **{f"unipc{n}-bh1": (UNIPC, {"solver_order": n, "solver_type": "bh1", **TO_SIGMA_MIN}) for n in (1, 2, 3)},
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
FLOW = {"euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), "flow-heun": THEIRS["flow-heun"]}
ALLOWED = 1e-10
LOOSE = {"ddpm": (1e-9, "diffusers adds noise of 1e-10 to the finished latent")}
COSINE = {  # what diffusers rounds in its own float64 where sigma/alpha begins at 20291
    "dpm2-a": (1e-6, "on a cosine schedule sigma_down, a root of a difference, loses half its digits"),
    "dpm2": (1e-9, "on a cosine schedule its logarithms lose a digit"),
    "deis3": (1e-9, "on a cosine schedule its closed forms cancel"),
}
TWICE = ("HeunDiscrete", "KDPM2", "FlowMatchHeun")  # two evaluations, and two rows of diffusers' table, for a step
OF_RATIO = ("Euler", "Heun", "LMS", "KDPM2")  # these work on x / alpha
TAKE_GENERATOR = ("DDPM", "DDIM", "Ancestral", "LCM", "TCD", "DPMSolver")


def network(x: Tensor, t: float) -> Tensor:
    """A guided, nonlinear stand-in for a UNet, in which neighbours and times differ."""
    bias = torch.linspace(-0.5, 0.5, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    scale = (t + 300) / (t + 500)
    cond = torch.tanh(0.7 * x + 0.2 * x.roll(1, -1) + bias) * scale
    uncond = torch.tanh(0.6 * x + 0.2 * x.roll(1, -1)) * scale
    return uncond + 5.0 * (cond - uncond)


def is_a(scheduler: Any, names: tuple[str, ...]) -> bool:
    return type(scheduler).__name__.startswith(names)


def ends(scheduler: Any, n: int) -> list[int]:
    """Which of the calls of a run of n steps, one for each evaluation, end a step."""
    if is_a(scheduler, TWICE):
        return [*range(1, 2 * n - 2, 2), 2 * n - 2]
    if not is_a(scheduler, ("PNDM",)):
        return list(range(n))
    if scheduler.config.skip_prk_steps:  # its first step takes two evaluations
        return list(range(1, n + 1)) if n > 1 else [0]
    return [3, 7, *range(11, 9 + n)]  # and the first three of all of PNDM four each


def to_model(scheduler: Any, latents: list[Tensor], n: int) -> list[Tensor]:
    """Latents after the last of n steps, in the model's coordinates: x = alpha * x0 + sigma * eps."""
    if not is_a(scheduler, OF_RATIO) or is_a(scheduler, ("FlowMatch",)):
        return latents
    sigmas = scheduler.sigmas[[*range(1, 2 * n - 2, 2), -1]] if is_a(scheduler, TWICE) else scheduler.sigmas[1:]
    sigmas = sigmas[n - len(latents) :].tolist()
    return [x / math.hypot(1, sigma) for x, sigma in zip(latents, sigmas, strict=True)]


def theirs(scheduler: Any, n: int, x: Tensor) -> list[Tensor]:
    """The latents after every step of a scheduler whose steps are set, from unit noise `x`."""
    wants = any(word in type(scheduler).__name__ for word in TAKE_GENERATOR)
    extra = {"generator": [torch.Generator().manual_seed(seed) for seed in SEEDS]} if wants else {}
    x, found, calls = x * float(getattr(scheduler, "init_noise_sigma", 1.0)), [], ends(scheduler, n)
    for k, t in enumerate(scheduler.timesteps[: calls[-1] + 1]):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t.item()), t, x, **extra).prev_sample
        if k in calls:
            found.append(x)
    return to_model(scheduler, found, n)


def mine(name: str, config: ScheduleConfig, n: int, x: Tensor) -> list[Tensor]:
    schedule = make_schedule(config, n, compat=True)

    def denoise(x: Tensor, level: Any) -> Any:
        return to_x0_eps(network(x, level.t), x, level.alpha, level.sigma, schedule.prediction)

    x = x * schedule.start_scale
    return [step.x for step in sample(denoise, x, schedule, SAMPLERS[name].step, Noise.from_seeds(SEEDS))]


def as_config(scheduler: Any) -> ScheduleConfig:
    """What diffusers' scheduler would write into its folder, read by us."""
    fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return ScheduleConfig.from_json(fields | {"_class_name": type(scheduler).__name__})


def compared(
    make: Callable[[dict, str, dict, torch.dtype], Any], quiet: Callable, fields: dict, steps: int
) -> Iterator[Line]:
    """Every sampler on the model's own scheduler file `fields`; `make` makes diffusers' scheduler of a class.

    Of a flow model those two that diffusers has for one, on their classes' own tables.
    """
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).double()
    flow = fields.get("_class_name", "").startswith("FlowMatch")
    for name, (cls, own) in (FLOW if flow else {name: THEIRS[name] for name in SAMPLERS}).items():
        yield one(make, quiet, name, cls, {} if cls.startswith("Flow") else fields, own, max(steps, STEPS), x)
    if flow:
        others = len(SAMPLERS) - len(FLOW)
        yield skipped("samplers", f"the other {others} have no class of diffusers' for flow: `ldm parity` has them")


def one(make: Callable, quiet: Callable, name: str, cls: str, fields: dict, own: dict, n: int, x: Tensor) -> Line:
    fields = {key: value for key, value in fields.items() if key not in ("_class_name", "solver_order", "solver_type")}
    prediction = fields.get("prediction_type", "epsilon")
    if prediction == "sample" and cls.startswith(("PNDM", "KDPM2", "EulerAncestral")):
        return skipped("samplers", f"{name}: diffusers' class doesn't know prediction_type 'sample'")
    scheduler = make(fields, cls, {"clip_sample": False, **own}, torch.float64)

    def run_theirs() -> Tensor:
        with quiet(torch.float64):
            scheduler.set_timesteps(n)
            return torch.stack(theirs(scheduler, n, x))

    config = as_config(scheduler)
    timed = both(lambda: torch.stack(mine(name, config, n, x)), run_theirs, x.device)
    cosine = COSINE if fields.get("beta_schedule") == "squaredcos_cap_v2" else {}
    allowed, why = (LOOSE | cosine).get(name, (ALLOWED, ""))
    line = held("samplers", name, timed.ours, timed.theirs, allowed)
    where = "" if not cls.startswith("Flow") else "on its class's own table: this one is for flow models"
    note = "; ".join(part for part in (line.note, where, why) if part)
    return timed.on(replace(line, note=note))
