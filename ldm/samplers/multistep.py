"""Samplers that draw a curve through earlier predictions and integrate it exactly: one evaluation a step, higher order.

In the right coordinates the solution between two levels is a weighted mean of what the network says on the way:

    x' = (sigma'/sigma) x + alpha' * integral of e^-(lambda' - l) x0(l) dl            l from lambda to lambda'      (1)
    x' = (alpha'/alpha) x - sigma' * integral of e^+(lambda' - l) eps(l) dl                                         (2)

(Lu et al. 2022a, equation 3.4; 2022b, proposition 4.1). A constant gives the lines of `lines.py`; so every method here
is one of those lines, along the mean, over the step, of a polynomial through the predictions: all that differs is
which prediction, how many of them, and with what weight e^(-a(1-u)) the step 0 <= u <= 1 is averaged. `a` is h for (1),
-h for (2), 2h for (1) with noise, 0 for LMS.

The steps are of first order where nothing else can be: the first one, those next to alpha = 0, and one to sigma = 0.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.noise import Noise
from ldm.samplers.lines import along_eps, along_x0, ancestral, lam, with_noise
from ldm.sampling import Denoise, Step
from ldm.schedules import Level, Schedule
from ldm.schedules.table import stays


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights of the predictions at `nodes`, in units of the step, that average 1, u, u^2, ... to `moments`.

    So they average every polynomial that passes through the predictions.
    """
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()


NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)  # exact to rounding for every step a schedule can have


def moments(a: float, n: int) -> list[float]:
    """The means of u^0 ... u^(n-1) over the step, weighted by e^(-a(1-u)). By quadrature: the closed form cancels."""
    u = (NODES + 1) / 2
    weight = WEIGHTS * np.exp(-a * (1 - u))
    return [float((weight * u**j).sum() / weight.sum()) for j in range(n)]


def mean(w: Sequence[float], predictions: Sequence[Tensor]) -> Tensor:
    return sum(a * p for a, p in zip(w, predictions, strict=True))


def past(schedule: Schedule, i: int, history: Sequence[Step], order: int) -> list[Step]:
    """The earlier steps through which a method of that order may draw its curve, the latest first.

    As the authors of DPM-Solver do (`lower_order_final`), runs of fewer than 15 steps end with lower orders.
    """
    level, after = schedule.step(i)
    if after.sigma == 0 or level.alpha == 0 or stays(level, after):
        return []
    left = len(schedule) - i
    return usable(history, order if len(schedule) >= 15 else min(order, left))


def usable(history: Sequence[Step], order: int) -> list[Step]:
    """The latest order - 1 steps that stand on a level with a picture in it: lambda is minus infinity at alpha = 0."""
    latest = list(history[::-1][: order - 1])
    return [step for step in latest if step.level.alpha > 0]


def nodes_of(level: Level, after: Level, steps: Sequence[Step]) -> list[float]:
    """Where the predictions at `level` and at the earlier `steps` lie, in units of the step in lambda."""
    h = lam(after) - lam(level)
    return [0.0, *((lam(step.level) - lam(level)) / h for step in steps)]


def dpmpp(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    i: int,
    history: Sequence[Step],
    noise: Noise,
    order: int,
    sde: bool,
) -> Step:
    """DPM-Solver++(2M) and (3M) (Lu et al. 2022b, algorithm 2): equation (1), with noise the SDE of their appendix.

    With two points the authors take the curve's value in the middle of the step, with three its exact mean. diffusers
    bends its parabola half as much, and in the SDE the wrong way (REFERENCE_DEFECTS.md, 7 and 8): that is `compat`.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    steps = past(schedule, i, history, order)
    down, std = ancestral(level, after) if sde else (after, 0.0)
    averages = [1.0, 0.5]
    if len(steps) == 2:
        a = (lam(after) - lam(level)) * (2 if sde else 1)
        averages = moments(a, 3)
        if schedule.compat:
            averages[2] = ((1 - math.exp(-a) - a) / a**2 - 0.5) / (1 - math.exp(-a)) if sde else averages[2] / 2
    x0 = p.x0
    if steps:
        w = weights(nodes_of(level, after, steps), averages[: len(steps) + 1])
        x0 = mean(w, [p.x0, *(step.x0 for step in steps)])
    return Step(level, after, x, with_noise(along_x0(x, x0, level, down), std, noise), *p)


def dpm(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise, order: int
) -> Step:
    """The first DPM-Solver, multistep (Lu et al. 2022a): equation (2), two points in the middle, three exactly.

    Its parabola, too, bends half as much in diffusers: that is `compat`.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    steps = past(schedule, i, history, order)
    if not steps:
        return Step(level, after, x, along_x0(x, p.x0, level, after), *p)
    averages = [1.0, 0.5]
    if len(steps) == 2:
        averages = moments(lam(level) - lam(after), 3)
        averages[2] /= 2 if schedule.compat else 1
    w = weights(nodes_of(level, after, steps), averages)
    eps = mean(w, [p.eps, *(step.eps for step in steps)])
    return Step(level, after, x, along_eps(x, eps, level, after), *p)


def deis(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise, order: int
) -> Step:
    """DEIS (Zhang & Chen 2023), polynomials in log rho = -lambda: equation (2) with the exact mean at every order."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    steps = past(schedule, i, history, order)
    if not steps:
        return Step(level, after, x, along_x0(x, p.x0, level, after), *p)
    w = weights(nodes_of(level, after, steps), moments(lam(level) - lam(after), len(steps) + 1))
    eps = mean(w, [p.eps, *(step.eps for step in steps)])
    return Step(level, after, x, along_eps(x, eps, level, after), *p)


def dpmpp_2s(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1), its two evaluations laid on two rows.

    Even rows take a step of first order; odd ones start again where the even one began, and know the slope in between.
    The last step is of first order.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    steps = usable(history, 2)
    if i % 2 == 0 or i == len(schedule) - 1 or after.sigma == 0 or not steps:
        return Step(level, after, x, along_x0(x, p.x0, level, after), *p)
    (begin,) = steps
    middle = (lam(level) - lam(begin.level)) / (lam(after) - lam(begin.level))
    x0 = mean(weights([0.0, middle], [1.0, 0.5]), [begin.x0, p.x0])
    return Step(level, after, x, along_x0(begin.x_before, x0, begin.level, after), *p)


def unipc(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    i: int,
    history: Sequence[Step],
    noise: Noise,
    order: int,
    bh1: bool = False,
) -> Step:
    """UniPC in data prediction (Zhao et al. 2023): equation (1) twice, first to mend the step that led here.

    The prediction at this row says how the last step should have gone: it is taken again, with one point more
    (`Step.corrected`), before the next. `bh1` or bh2 is their B(h), which is felt where a slope is known by one
    difference alone.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    here = corrected(x, p.x0, level, schedule, i, history, order, bh1)
    reach = min(order, len(schedule) - i)
    steps = [] if after.sigma == 0 or level.alpha == 0 or stays(level, after) else usable(history, reach)
    x0 = p.x0
    if steps:
        w = weights(nodes_of(level, after, steps), unipc_moments(lam(after) - lam(level), len(steps) + 1, bh1))
        x0 = mean(w, [p.x0, *(step.x0 for step in steps)])
    return Step(level, after, x, along_x0(here, x0, level, after), *p, corrected=here)


def corrected(
    x: Tensor, x0: Tensor, level: Level, schedule: Schedule, i: int, history: Sequence[Step], order: int, bh1: bool
) -> Tensor:
    """The step before taken once more, now that the prediction at its end is known (UniC)."""
    if not history or history[-1].level.alpha == 0 or stays(history[-1].level, level):
        return x
    before = history[-1]
    steps = usable(history[:-1], min(order, len(schedule) - i + 1))  # the curve that the step was taken with
    nodes = [*nodes_of(before.level, level, steps), 1.0]
    w = weights(nodes, unipc_moments(lam(level) - lam(before.level), len(nodes), bh1))
    x0 = mean(w, [before.x0, *(step.x0 for step in steps), x0])
    start = before.x_before if before.corrected is None else before.corrected  # None: another sampler's step
    return along_x0(start, x0, before.level, level)


def unipc_moments(h: float, n: int, bh1: bool) -> list[float]:
    """The exact means of n points; for two, as its authors do, the middle of the step, stretched by bh1's B(h)."""
    return moments(h, n) if n > 2 else [1.0, 0.5 * (h / (1 - math.exp(-h)) if bh1 else 1.0)]


def lms(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Linear multistep, four points: Adams and Bashforth's method for uneven steps, d(x/alpha) = eps d(sigma/alpha).

    (k-diffusion's sample_lms.) The curve is drawn in the ratio, so it may end at sigma = 0. Begun in the middle of a
    schedule, diffusers takes coefficients for predictions that it lacks (REFERENCE_DEFECTS.md, 13): that is `compat`.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    if level.alpha == 0 or stays(level, after):
        return Step(level, after, x, along_x0(x, p.x0, level, after), *p)
    steps = usable(history, 4)
    levels = [level, *(step.level for step in steps)]
    if schedule.compat:
        levels = [row for row in schedule.levels[max(i - 3, 0) : i + 1][::-1] if row.alpha > 0]
    d = after.ratio - level.ratio
    w = weights([(each.ratio - level.ratio) / d for each in levels], moments(0.0, len(levels)))
    eps = mean(w[: len(steps) + 1], [p.eps, *(step.eps for step in steps)])
    return Step(level, after, x, along_eps(x, eps, level, after), *p)
