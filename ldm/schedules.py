"""Schedules: from a checkpoint's `scheduler_config.json`, a step count and a rule to a table of noise levels.

A schedule is n+1 rows `Level(i, t, alpha, sigma)`, from the noisiest to the cleanest, made before the loop. A sampler
walks from row to row and asks nothing else about noise.

diffusers' scheduler classes turn one and the same configuration into different tables. Which class's way is taken is
the `rule`; left alone, it is that of the class the file names.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.config import from_json
from ldm.diffusion import PREDICTIONS
from ldm.errors import LDMError

RULES = {  # the class that a file names -> the rule by which it makes its table
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",  # the same levels; PNDM itself walks one of them twice
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm",
}
SPACINGS = {"ddpm": "leading", "ddim": "leading", "euler": "linspace", "dpm": "linspace"}  # where the file has none


class Level(NamedTuple):
    """One row: x = alpha * x0 + sigma * eps, and the timestep `t` the network is told (a fraction for some rules)."""

    i: int
    t: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class ScheduleConfig:
    """The fields of `scheduler_config.json` that shape the table. Defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    final_sigmas_type: str = "zero"
    clip_sample: bool | None = None  # a habit of pixel models; latents are not clipped, nor does diffusers' pipeline
    rule: str = "ddim"

    @property
    def spacing(self) -> str:
        """The file's spacing, or the one its class takes where the file is silent."""
        return self.timestep_spacing or SPACINGS[self.rule]

    @classmethod
    def from_json(cls, fields: dict) -> "ScheduleConfig":
        """Read diffusers' JSON; a field that is neither implemented nor neutral is refused by name."""
        name = fields.get("_class_name", "DDIMScheduler")
        if name not in RULES:
            raise LDMError(f"The scheduler file names {name!r}; ldm knows {', '.join(RULES)}.")
        fields = {k: v for k, v in fields.items() if v is not None}  # null: what the class does when told nothing
        if name == "PNDMScheduler":  # where DDIM ends at 1 unless told otherwise, PNDM does not
            fields = {"set_alpha_to_one": False} | fields
        config = replace(from_json(cls, fields, NEUTRAL, "the scheduler"), rule=RULES[name])
        if config.prediction_type not in PREDICTIONS:
            raise LDMError(f"The scheduler file has prediction_type {config.prediction_type!r}, unknown to ldm.")
        if config.final_sigmas_type not in ("zero", "sigma_min"):
            raise LDMError(f"The scheduler file has final_sigmas_type {config.final_sigmas_type!r}, unknown to ldm.")
        return config


NEUTRAL = {  # fields of the JSON that we accept at these values alone: with them they change nothing
    "algorithm_type": "dpmsolver++",
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,  # read only with thresholding
    "euler_at_final": False,
    "flow_shift": 1.0,
    "interpolation_type": "linear",
    "lambda_min_clipped": -math.inf,
    "lower_order_final": True,
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "sigma_max": None,
    "sigma_min": None,
    "skip_prk_steps": True,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": "fixed_small",
    "time_shift_type": "exponential",
}


def betas(config: ScheduleConfig) -> Tensor:
    """The variance added at each training step, (N,) float32 as in training: other digits would be another schedule."""
    n, first, last = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":  # Ho et al. 2020, section 4
        return torch.linspace(first, last, n, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":  # Rombach et al. 2022, in their code: linear in the square root
        return torch.linspace(first**0.5, last**0.5, n, dtype=torch.float32) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, equation 17
        f = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return torch.tensor([min(1 - f[i + 1] / f[i], 0.999) for i in range(n)], dtype=torch.float32)
    raise LDMError(
        f"Unknown beta_schedule {config.beta_schedule!r}: ldm knows linear, scaled_linear and squaredcos_cap_v2."
    )


def alpha_bars(config: ScheduleConfig) -> Tensor:
    """alpha^2 at every training step, (N,) float32: the running product of 1 - beta (Ho et al. 2020, equation 4)."""
    return torch.cumprod(1.0 - betas(config), dim=0)


def timesteps(config: ScheduleConfig, n: int) -> np.ndarray:
    """The `n` timesteps of the rule, falling; Lin et al. 2023 ("flawed"), table 2, compares the three spacings."""
    total, offset, spacing = config.num_train_timesteps, config.steps_offset, config.spacing
    # The DPM rule lays n + 1 points and leaves out the last, which stands for the clean end.
    points = n + 1 if config.rule == "dpm" else n
    if spacing == "linspace":
        t = np.linspace(0, total - 1, points)[::-1][:n]
        return t if config.rule == "euler" else t.round()
    if spacing == "leading":
        ratio = total // points
        # With as many steps as training had, SD's offset of 1 would point one past the table's end.
        offset = min(offset, total - 1 - ratio * (points - 1))
        return (np.arange(points) * ratio)[::-1][:n].astype(float) + offset
    if spacing == "trailing":
        return np.arange(total, 0, -total / n)[:n].round() - 1
    raise LDMError(f"Unknown timestep_spacing {spacing!r}: ldm knows leading, trailing and linspace.")


@dataclass(frozen=True)
class Schedule:
    """`levels`: n+1 rows. The loop starts from `start_scale` * eps; the network speaks in `prediction`.

    `landings`, set under `compat` alone, are the levels on which diffusers' DDIM believes to land, where those are not
    the next rows (spacing linspace and trailing).
    """

    levels: tuple[Level, ...]
    prediction: str
    start_scale: float
    rule: str
    landings: tuple[Level, ...] | None = None

    def __post_init__(self):
        if self.prediction == "epsilon" and self.levels[0].alpha == 0:
            raise LDMError(
                "This schedule begins at alpha = 0, pure noise, where predicting the noise says nothing of the "
                "picture: a model trained for it predicts v or flow (Lin et al. 2023, section 3.3)."
            )

    def __len__(self) -> int:
        """The number of steps: one less than there are levels."""
        return len(self.levels) - 1

    def __getitem__(self, i: int) -> Level:
        return self.levels[i]

    def step(self, i: int) -> tuple[Level, Level]:
        """The level that step `i` starts from, and the one it goes to."""
        return self.levels[i], self.landings[i] if self.landings else self.levels[i + 1]

    def table(self) -> str:
        """The rows as text."""
        rows = [f"{r.i:4d} {r.t:9.3f} {r.alpha:9.6f} {r.sigma:9.6f}" for r in self.levels]
        return "\n".join(["   i         t     alpha     sigma", *rows])


def make_schedule(config: ScheduleConfig, n: int, rule: str | None = None, compat: bool = False) -> Schedule:
    """The table for `n` steps. `rule`: ddpm, ddim, euler or dpm, otherwise the file's own.

    `compat` copies diffusers 0.42.1 where it departs from the method (see `Schedule.landings`).
    Raises LDMError for a step count that the schedule cannot hold.
    """
    config = config if rule is None else replace(config, rule=rule)
    total = config.num_train_timesteps
    if config.rule not in SPACINGS:
        raise LDMError(f"Unknown schedule rule {config.rule!r}: ldm knows {', '.join(SPACINGS)}.")
    most = total - 1 if config.rule == "dpm" and config.spacing != "trailing" else total
    if not 1 <= n <= most:
        raise LDMError(f"{n} steps asked for; this model's schedule has between 1 and {most} of them.")
    ts = timesteps(config, n)
    bars = alpha_bars(config).double().numpy()

    if config.rule == "euler":
        # Between two training steps it is sigma/alpha that is interpolated (Karras et al. 2022's coordinates).
        ratio = np.interp(ts, np.arange(total), np.sqrt((1 - bars) / bars))
        at = [1 / (1 + r**2) for r in ratio]
    else:
        at = [float(bars[int(t)]) for t in ts]
    rows = [
        Level(i, float(t), math.sqrt(bar), math.sqrt(1 - bar)) for i, (t, bar) in enumerate(zip(ts, at, strict=True))
    ]

    # DDPM ends on the clean latent; DDIM, Euler and DPM there or on the cleanest training level, as the file says.
    zero = config.final_sigmas_type == "zero"
    to_zero = {"ddpm": True, "ddim": config.set_alpha_to_one, "euler": zero, "dpm": zero}[config.rule]
    last = 1.0 if to_zero else float(bars[0])
    rows.append(Level(n, 0.0, math.sqrt(last), math.sqrt(1 - last)))

    # Euler's table begins at sigma_max: spacings that reach the noisiest step begin from sigma * eps, as they say;
    # "leading" stops short of it and calls its first level pure noise. So do all other rules.
    start_scale = rows[0].sigma if config.rule == "euler" and config.spacing != "leading" else 1.0
    landings = ddim_landings(rows, bars, total // n) if compat and config.rule == "ddim" else None
    return Schedule(tuple(rows), config.prediction_type, start_scale, config.rule, landings)


def ddim_landings(rows: list[Level], bars: np.ndarray, stride: int) -> tuple[Level, ...]:
    """Where diffusers' DDIM goes: always `stride` timesteps down, whatever the next row is (scheduling_ddim.py:445)."""
    landings = []
    for row in rows[:-1]:
        i, t = row.i + 1, int(row.t) - stride
        bar = float(bars[t])
        landings.append(Level(i, t, math.sqrt(bar), math.sqrt(1 - bar)) if t >= 0 else rows[-1]._replace(i=i))
    return tuple(landings)
