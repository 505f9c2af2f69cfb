"""Samplers that ask the network twice a step: once where they stand, and once ahead. All are of second order.

Where the picture is not yet or the noise no longer there (alpha = 0, sigma' = 0) they take one step of first order.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from ldm.noise import Noise
from ldm.samplers.lines import along_eps, along_x0, ancestral, with_noise
from ldm.sampling import Denoise, Step
from ldm.schedules import Schedule


def heun(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Euler's step, then the mean of the two slopes (Karras et al. 2022, algorithm 1), in x/alpha over sigma/alpha."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    ahead = along_x0(x, p.x0, level, after)
    if level.alpha == 0 or after.sigma == 0:
        return Step(level, after, x, ahead, *p)
    q = denoise(ahead, after)
    return Step(level, after, x, along_eps(x, (p.eps + q.eps) / 2, level, after), *p)


def flow_heun(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Heun's rule in the model's own coordinates: dx = x0 dalpha + eps dsigma, and the mean of both ends.

    On a flow schedule this is dx = (eps - x0) dsigma, diffusers' FlowMatchHeun. Other coordinates, another method:
    `heun` takes the mean of the same predictions and lands elsewhere. Holds at alpha = 0.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    ahead = along_x0(x, p.x0, level, after)
    if after.sigma == 0:
        return Step(level, after, x, ahead, *p)
    q = denoise(ahead, after)
    d_alpha, d_sigma = after.alpha - level.alpha, after.sigma - level.sigma
    return Step(level, after, x, x + d_alpha * (p.x0 + q.x0) / 2 + d_sigma * (p.eps + q.eps) / 2, *p)


def dpm2(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """The midpoint rule, the middle taken in log(sigma/alpha) (DPM-Solver-2 as k-diffusion writes it, sample_dpm_2)."""
    return midpoint(denoise, x, schedule, i, noise, eta=0.0)


def dpm2_ancestral(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise
) -> Step:
    """The midpoint rule past the next level, and noise back to it (k-diffusion's sample_dpm_2_ancestral)."""
    return midpoint(denoise, x, schedule, i, noise, eta=1.0)


def midpoint(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, noise: Noise, eta: float) -> Step:
    level, after = schedule.step(i)
    p = denoise(x, level)
    down, std = ancestral(level, after, eta)
    if level.alpha == 0 or down.sigma == 0:
        return Step(level, after, x, with_noise(along_x0(x, p.x0, level, down), std, noise), *p)
    middle = schedule.between(i, math.sqrt(level.ratio * down.ratio))
    q = denoise(along_x0(x, p.x0, level, middle), middle)
    return Step(level, after, x, with_noise(along_eps(x, q.eps, level, down), std, noise), *p)
