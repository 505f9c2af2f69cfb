"""Exercises of notebook 07: samplers. Levels are ratios sigma / alpha, r now and s next, as the notebook has them."""

import math
from itertools import pairwise

import numpy as np
import torch

from ldm.lab.check import Exercise, calling


def noise(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# 07.1 -------------------------------------------------------------------------------------------------------


def ddim_step(x, eps, bar, bar_next):
    x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    return math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next) * eps


def two_latents(*bars):
    return lambda g: (noise(g, 2, 4, 8, 8), noise(g, 2, 4, 8, 8), *bars)


def clean(x, eps, bar):
    return (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)


def fresh(x, eps, bar, bar_next):
    return math.sqrt(bar_next) * clean(x, eps, bar) + math.sqrt(1 - bar_next) * torch.randn_like(x)


DDIM = Exercise(
    "ddim_step(x, eps, bar, bar_next)",
    ddim_step,
    calling(two_latents(0.3, 0.6), two_latents(0.02, 0.1), two_latents(0.9, 0.99)),
    {
        "x comes back as it was: one and the same level stands in both places. The clean latent belongs to bar, the "
        "step leads to bar_next.": lambda x, e, b, c: x.clone(),
        "the two levels have changed places: this walks from bar_next to bar, towards noise.":
            lambda x, e, b, c: ddim_step(x, e, c, b),
        "the square roots are missing: bar is alpha squared, and 1 - bar is sigma squared.":
            lambda x, e, b, c: c * (x - (1 - b) * e) / b + (1 - c) * e,
        "sigma is forgotten where the step ends: the clean latent has to be noised again, to bar_next.":
            lambda x, e, b, c: math.sqrt(c) * clean(x, e, b),
        "x itself is carried over where the clean latent belongs: solve x = alpha x0 + sigma eps for x0 first.":
            lambda x, e, b, c: math.sqrt(c) * x + math.sqrt(1 - c) * e,
        "the noise keeps its old weight: at the next level it counts with that level's sigma.":
            lambda x, e, b, c: math.sqrt(c) * clean(x, e, b) + math.sqrt(1 - b) * e,
        "the clean latent is too small: what is left after the noise is taken away is alpha x0, not x0.":
            lambda x, e, b, c: math.sqrt(c) * (x - math.sqrt(1 - b) * e) + math.sqrt(1 - c) * e,
        "fresh noise takes the place of the predicted one: that is another, random method. DDIM keeps eps.": fresh,
        "sigma is taken as 1 - alpha, as flow models have it; here alpha^2 + sigma^2 = 1.":
            lambda x, e, b, c: math.sqrt(c) * (x - (1 - math.sqrt(b)) * e) / math.sqrt(b) + (1 - math.sqrt(c)) * e,
    },
)  # fmt: skip


# 07.2 -------------------------------------------------------------------------------------------------------


def midpoint(eps, y, r, s):
    m = math.sqrt(r * s)
    return y + (s - r) * eps(y + (m - r) * eps(y, r), m)


def bent(y, r):
    """A slope that depends on both, and on neither linearly."""
    return torch.tanh(0.8 * y + 0.3 * r) / (0.5 + r) + 0.2 * y


def by_middle(middle):
    """A wrong answer from where it takes its middle."""

    def step(eps, y, r, s):
        m = middle(r, s)
        return y + (s - r) * eps(y + (m - r) * eps(y, r), m)

    return step


def two_halves(eps, y, r, s):
    m = math.sqrt(r * s)
    y = y + (m - r) * eps(y, r)
    return y + (s - m) * eps(y, m)


def from_the_middle(eps, y, r, s):
    m = math.sqrt(r * s)
    y = y + (m - r) * eps(y, r)
    return y + (s - r) * eps(y, m)


def averaged(eps, y, r, s):
    m = math.sqrt(r * s)
    d = eps(y, r)
    return y + (s - r) * (d + eps(y + (m - r) * d, m)) / 2


def heun(eps, y, r, s):
    d = eps(y, r)
    return y + (s - r) * (d + eps(y + (s - r) * d, s)) / 2


def at_middle(where):
    """A wrong answer from the point (y, r) at which it asks the second time."""

    def step(eps, y, r, s):
        m = math.sqrt(r * s)
        return y + (s - r) * eps(*where(y, y + (m - r) * eps(y, r), r, m))

    return step


MIDPOINT = Exercise(
    "midpoint(eps, y, r, s)",
    midpoint,
    calling(*(lambda g, r=r, s=s: (bent, noise(g, 3, 5), r, s) for r, s in ((4.0, 1.0), (1.2, 0.7), (0.5, 0.1)))),
    {
        "the middle is (r + s) / 2: here it is asked for in the logarithm, the root of r times s.":
            by_middle(lambda r, s: (r + s) / 2),
        "these are two steps of Euler's, one after the other: the slope in the middle should lead from the beginning "
        "over the whole step.": two_halves,
        "the whole step is walked from the middle, where you are only to ask: walk it from y.": from_the_middle,
        "the two slopes are averaged, as in Heun's method: here the slope in the middle counts alone.": averaged,
        "this is Heun's method: the second question is put in the middle, not at the end, and nothing is averaged.":
            heun,
        "the network is asked in the middle about the old y: take half the way to the middle first.":
            at_middle(lambda y, half, r, m: (y, m)),
        "the network is told the old level with the new y: in the middle it has to be told the middle's.":
            at_middle(lambda y, half, r, m: (half, r)),
        "this is Euler's step: the slope in the middle isn't used.": lambda e, y, r, s: y + (s - r) * e(y, r),
        "the sign of the step is wrong: r falls, and s - r is negative.":
            lambda e, y, r, s: midpoint(lambda y, r: -e(y, r), y, r, s),
    },
)  # fmt: skip


# 07.3 -------------------------------------------------------------------------------------------------------


def slope_ahead(eps, before, q, r, s):
    return eps + (s - r) / (2 * (r - q)) * (eps - before)


def two_slopes(q, r, s):
    return lambda g: (noise(g, 2, 4, 4, 4), noise(g, 2, 4, 4, 4), q, r, s)


def by_weight(weight):
    """A wrong answer from how much of the change of the slope it adds."""
    return lambda e, b, q, r, s: e + weight(q, r, s) * (e - b)


SLOPE = Exercise(
    "slope_ahead(eps, before, q, r, s)",
    slope_ahead,
    calling(two_slopes(4.0, 2.5, 1.9), two_slopes(1.0, 0.8, 0.2), two_slopes(0.3, 0.2, 0.0)),
    {
        "this holds where all steps are of the same length alone: weigh the change by the lengths of the two steps.":
            by_weight(lambda q, r, s: 0.5),
        "the line is followed to the end of the step: the slope wanted is that in its middle, half as far.":
            by_weight(lambda q, r, s: (s - r) / (r - q)),
        "the ratio of the two steps is upside down: the step ahead is divided by the one that lies behind.":
            by_weight(lambda q, r, s: (r - q) / (2 * (s - r))),
        "the line is followed backwards: the change from `before` to `eps` goes on in the same direction.":
            by_weight(lambda q, r, s: -(s - r) / (2 * (r - q))),
        "the two slopes are averaged: their mean lies in the step behind you, and the middle of the step ahead is "
        "wanted.": lambda e, b, q, r, s: (e + b) / 2,
        "the line starts at the older slope: start at `eps` and add the change.":
            lambda e, b, q, r, s: b + (s - r) / (2 * (r - q)) * (e - b),
        "the older slope is added as it is: what is carried on is the change, eps - before.":
            lambda e, b, q, r, s: e + (s - r) / (2 * (r - q)) * b,
        "this is the plain slope, Euler's: the earlier one isn't used.": lambda e, b, q, r, s: e.clone(),
    },
)  # fmt: skip


# 07.4 -------------------------------------------------------------------------------------------------------


def split(r, s, eta):
    up = eta * s * math.sqrt(1 - (s / r) ** 2)
    return math.sqrt(s**2 - up**2), up


def with_up(up):
    """A wrong answer from its fresh noise, which leaves room for the rest as it should."""

    def pair(r, s, eta):
        fresh = up(r, s, eta)
        return math.sqrt(max(s**2 - fresh**2, 0.0)), fresh

    return pair


SPLIT = Exercise(
    "split(r, s, eta)",
    split,
    calling((1.0, 0.8, 1.0), (2.0, 1.7, 0.5), (14.6, 11.0, 0.3), (0.4, 0.3, 0.0)),
    {
        "the two are in the wrong order: (down, up) is asked for.": lambda r, s, eta: split(r, s, eta)[::-1],
        "standard deviations are subtracted, down = s - up: it is variances that add up, down^2 + up^2 = s^2.":
            lambda r, s, eta: (s - split(r, s, eta)[1], split(r, s, eta)[1]),
        "there is no room for the fresh noise: with down = s and up on top, the next latent is too noisy.":
            lambda r, s, eta: (s, split(r, s, eta)[1]),
        "these are the variances: take the roots.": lambda r, s, eta: tuple(x**2 for x in split(r, s, eta)),
        "eta is missing: with 0 no noise may be added, and the step is Euler's.":
            lambda r, s, eta: split(r, s, 1.0),
        "eta weighs the variance: it is the standard deviation of the fresh noise that it scales.":
            with_up(lambda r, s, eta: s * math.sqrt(eta * (1 - (s / r) ** 2))),
        "up is what lies between the two levels, the root of r^2 - s^2: that is what was noised from s to r. On the "
        "way back its share is smaller, by s / r.": with_up(lambda r, s, eta: eta * math.sqrt(r**2 - s**2)),
        "the ratio s / r enters without its square.": with_up(lambda r, s, eta: eta * s * math.sqrt(1 - s / r)),
        "a root is missing: 1 - (s/r)^2 is a share of the variance.":
            with_up(lambda r, s, eta: eta * s * (1 - (s / r) ** 2)),
    },
)  # fmt: skip


# 07.5 -------------------------------------------------------------------------------------------------------


def karras(n, most, least, rho):
    ramp = np.linspace(most ** (1 / rho), least ** (1 / rho), n)
    return np.append(ramp**rho, 0.0)


def as_numbers(*cases):
    """Lists, arrays and tensors are all right."""

    def use(answer, generator):
        given = [answer(*case) for case in cases]
        return [each if each is None or each is ... else np.array([float(x) for x in each]) for each in given]

    return use


KARRAS = Exercise(
    "karras(n, most, least, rho)",
    karras,
    as_numbers((10, 14.6, 0.03, 7.0), (5, 80.0, 0.002, 3.0)),
    {
        "rho and 1 / rho have changed places: levels are even in their rho-th root, and raised to rho again.":
            lambda n, a, b, rho: karras(n, a, b, 1 / rho),
        "the levels rise: a run begins at the noisiest. (The zero stays at the end.)":
            lambda n, a, b, rho: karras(n, b, a, rho),
        "the zero at the end is missing: the last step leads to the clean latent.":
            lambda n, a, b, rho: karras(n, a, b, rho)[:-1],
        "one level is missing: n levels from `most` to `least`, and the zero besides, are n + 1.":
            lambda n, a, b, rho: karras(n - 1, a, b, rho),
        "the levels are even in themselves: the roots are what has to be even.":
            lambda n, a, b, rho: karras(n, a, b, 1.0),
        "the levels are even in the logarithm: that is the limit of very large rho.":
            lambda n, a, b, rho: np.append(np.exp(np.linspace(math.log(a), math.log(b), n)), 0.0),
        "the last of the n levels is not `least`: both ends belong to them.":
            lambda n, a, b, rho: np.append(karras(n + 1, a, b, rho)[:n], 0.0),
        "these are still the roots: raise them to rho.":
            lambda n, a, b, rho: np.append(np.linspace(a ** (1 / rho), b ** (1 / rho), n), 0.0),
    },
)  # fmt: skip


# 07.6 -------------------------------------------------------------------------------------------------------


def orders(steps, errors):
    points = zip(steps, errors, strict=True)
    return [math.log(e / f) / math.log(m / n) for (n, e), (m, f) in pairwise(points)]


def by_pairs(slope):
    """A wrong answer from what it makes of two neighbours: n steps with error e, m > n with f."""
    return lambda steps, errors: [slope(*a, *b) for a, b in pairwise(zip(steps, errors, strict=True))]


def some_errors(generator):
    """As a method of some order would leave them, not quite in a line, and not at doublings alone."""
    order = 1 + 2 * torch.rand((), generator=generator).item()
    wobble = 1 + 0.1 * torch.rand(4, generator=generator)
    steps = [10, 20, 50, 80]
    return steps, [0.7 * w / n**order for n, w in zip(steps, wobble.tolist(), strict=True)]


ORDERS = Exercise(
    "orders(steps, errors)",
    orders,
    calling(some_errors, some_errors),
    {
        "log2 of the errors' ratio is right where the steps are doubled alone: divide by the logarithm of the steps' "
        "ratio.": by_pairs(lambda n, e, m, f: math.log2(e / f)),
        "the natural logarithm of the errors' ratio stands alone: divide by that of the steps' ratio.":
            by_pairs(lambda n, e, m, f: math.log(e / f)),
        "the sign is wrong: an error that falls has a positive order.":
            by_pairs(lambda n, e, m, f: math.log(f / e) / math.log(m / n)),
        "the fraction is upside down: the steps' logarithm belongs below.":
            by_pairs(lambda n, e, m, f: math.log(m / n) / math.log(e / f)),
        "the ratios are divided without their logarithms: 4 = 2^p says p = 2, and so does 9 = 3^p.":
            by_pairs(lambda n, e, m, f: (e / f) / (m / n)),
        "the errors' logarithms are divided by the difference of the steps: these need the logarithm as well.":
            by_pairs(lambda n, e, m, f: math.log(e / f) / (m - n)),
        "the logarithms are divided instead of being subtracted first: it is the slope between two points.":
            by_pairs(lambda n, e, m, f: -math.log(f) / math.log(m)),
        "this is one slope from the first to the last: one for every two neighbours is asked for.":
            lambda steps, errors: [math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])],
    },
)  # fmt: skip


EXERCISES = {
    "07.1": DDIM,
    "07.2": MIDPOINT,
    "07.3": SLOPE,
    "07.4": SPLIT,
    "07.5": KARRAS,
    "07.6": ORDERS,
}
