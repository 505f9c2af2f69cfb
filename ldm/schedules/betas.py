"""The noise of training: how much of it was added at each of the (mostly 1000) training steps."""

import math

import torch
from torch import Tensor

from ldm.errors import LDMError
from ldm.schedules.config import ScheduleConfig, find_rule


def betas(config: ScheduleConfig) -> Tensor:
    """The variance added at each training step, (N,) float32 as in training: other digits would be another schedule."""
    n, first, last = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float32)
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


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The same noise, shifted so that nothing is left of the picture at the last step (Lin et al. 2023, alg. 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bars = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


def alpha_bars(config: ScheduleConfig) -> Tensor:
    """alpha^2 at every training step, (N,) float32: the running product of 1 - beta (Ho et al. 2020, equation 4)."""
    if not config.rescale_betas_zero_snr:
        return torch.cumprod(1.0 - betas(config), dim=0)
    bars = torch.cumprod(1.0 - zero_terminal_snr(betas(config)), dim=0)
    if find_rule(config.rule).nearly_zero:
        bars[-1] = 2**-24
    return bars
