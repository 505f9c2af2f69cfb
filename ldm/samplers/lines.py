"""What samplers are made of: first-order lines from one level of noise to another, and the noise that goes on top.

Notation, here and in all samplers: level (alpha, sigma) now, (alpha', sigma') next; ratio r = sigma / alpha;
lambda = -log r, half the log of the signal-to-noise ratio.
"""

import math

from torch import Tensor

from ldm.noise import Noise
from ldm.schedules import Level


def lam(level: Level) -> float:
    """Half the log of the signal-to-noise ratio (Kingma et al. 2021): the time in which DPM-Solver's steps are even."""
    return math.log(level.alpha / level.sigma)


def along_x0(x: Tensor, x0: Tensor, level: Level, after: Level) -> Tensor:
    """Keep the noise that `x` holds, and only change its weight: x' = (s'/s) x + (a' - a s'/s) x0.

    DDIM without added noise (Song et al. 2021, equation 12), Euler's method (Karras et al. 2022, algorithm 1) and flow
    matching's Euler are this one line in different coordinates. Holds at alpha = 0; needs sigma > 0.
    """
    kept = after.sigma / level.sigma
    return kept * x + (after.alpha - level.alpha * kept) * x0


def along_eps(x: Tensor, eps: Tensor, level: Level, after: Level) -> Tensor:
    """The same line through the noise: keep the picture that `x` holds. Holds at sigma = 0; needs alpha > 0."""
    kept = after.alpha / level.alpha
    return kept * x + (after.sigma - level.sigma * kept) * eps


def ancestral(level: Level, after: Level, eta: float = 1.0) -> tuple[Level, float]:
    """Less noise than `after` has, and the standard deviation of fresh noise that makes up for the rest.

    `eta` 1 is the posterior of the diffusion q(x' | x, x0) (Ho et al. 2020, equation 7), 0 adds none; in between, and
    in this form, Song et al. 2021, equation 16. k-diffusion calls the two sigma_down and sigma_up.
    """
    shrinks = (after.sigma * level.alpha) / (after.alpha * level.sigma)  # r' / r
    fresh = eta**2 * max(1 - shrinks**2, 0.0)  # rounding may give -1e-17
    return after._replace(sigma=after.sigma * math.sqrt(1 - fresh)), after.sigma * math.sqrt(fresh)


def with_noise(x: Tensor, std: float, noise: Noise) -> Tensor:
    """`x` and fresh noise; none is drawn where none is added."""
    return x + std * noise(x) if std > 0 else x
