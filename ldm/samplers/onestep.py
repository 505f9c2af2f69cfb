"""Samplers that look at the present row alone, once."""

import math
from collections.abc import Sequence

from torch import Tensor

from ldm.noise import Noise
from ldm.samplers.lines import along_x0, ancestral, with_noise
from ldm.sampling import Denoise, Step
from ldm.schedules import Schedule


def ddpm(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Ancestral sampling from the posterior q(x' | x, x0) (Ho et al. 2020, equations 6 and 7), of fixed variance."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    a = level.alpha / after.alpha  # alpha of the step between the two levels
    variance = max(level.sigma**2 - (a * after.sigma) ** 2, 0.0)  # sigma^2 of that step; rounding may give -1e-17
    mean = (a * after.sigma**2 / level.sigma**2) * x + (after.alpha * variance / level.sigma**2) * p.x0
    std = after.sigma * math.sqrt(variance) / level.sigma
    return Step(level, after, x, with_noise(mean, std, noise), *p)


def ddim(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise, eta: float = 0.0
) -> Step:
    """Song et al. 2021, equation 12. `eta` 0 is deterministic; 1 adds as much noise as DDPM (their equation 16)."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    down, std = ancestral(level, after, eta)
    return Step(level, after, x, with_noise(down.alpha * p.x0 + down.sigma * p.eps, std, noise), *p)


def euler(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Euler's method on d(x/alpha) / d(sigma/alpha) = eps (Karras et al. 2022, algorithm 1 without churn)."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    return Step(level, after, x, along_x0(x, p.x0, level, after), *p)


def euler_ancestral(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise
) -> Step:
    """Euler's method past the next level, and noise back to it (k-diffusion's sample_euler_ancestral).

    Step by step it is DDPM: the same posterior, reached from the other side.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    down, std = ancestral(level, after)
    return Step(level, after, x, with_noise(along_x0(x, p.x0, level, down), std, noise), *p)


def lcm(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): a picture, noised afresh to the next level.

    For networks distilled to predict the picture at once. c_skip and c_out, with sigma_data 0.5 and timesteps times 10,
    make a consistency model the identity at t = 0 (Song et al. 2023); elsewhere they are all but 0 and 1.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    t = 10 * level.t
    c_skip, c_out = 0.25 / (t**2 + 0.25), t / math.sqrt(t**2 + 0.25)
    picture = c_out * p.x0 + c_skip * x
    last = i == len(schedule) - 1  # nothing follows that could take noise away again
    return Step(level, after, x, after.alpha * picture + after.sigma * (p.eps if last else noise(x)), *p)


def tcd(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise, eta: float = 0.3
) -> Step:
    """Trajectory consistency sampling (Zheng et al. 2024, algorithm 4; their gamma is `eta`).

    For networks distilled to jump along the trajectory: down to timestep s = (1 - eta) t', and by the diffusion itself
    back up to t'. `eta` 0 is DDIM, 1 noises the picture afresh like LCM. The last step is without noise.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    if eta == 0 or i == len(schedule) - 1:
        return Step(level, after, x, after.alpha * p.x0 + after.sigma * p.eps, *p)
    s = schedule.at(i, math.floor((1 - eta) * after.t))
    if s.ratio > after.ratio:  # levels of the caller's own, below what training knew at that timestep
        s = after
    a = after.alpha / s.alpha  # the diffusion from s up to t': q(x' | x_s) = N(a x_s, sigma'^2 - a^2 sigma_s^2)
    std = math.sqrt(max(after.sigma**2 - (a * s.sigma) ** 2, 0.0))
    return Step(level, after, x, with_noise(a * (s.alpha * p.x0 + s.sigma * p.eps), std, noise), *p)
