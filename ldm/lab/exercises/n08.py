"""Exercises of notebook 08: start from a picture."""

import math

import torch
import torch.nn.functional as F

from ldm.lab.check import Exercise, calling
from ldm.schedules import Level


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


def level(i, t, sigma):
    """A row of a schedule with alpha^2 + sigma^2 = 1."""
    return Level(i, t, math.sqrt(1 - sigma**2), sigma)


# 08.1 -------------------------------------------------------------------------------------------------------


def first_row(steps, strength):
    return steps - min(int(steps * strength), steps)


ROW = Exercise(
    "first_row(steps, strength)",
    first_row,
    calling((20, 0.5), (50, 0.58), (10, 0.75), (10, 0.33), (25, 0.3), (20, 0.0), (20, 1.0), (7, 0.9)),
    {
        "this is how many steps are run; the row they begin at is what is left of the table above them.":
            lambda steps, strength: int(steps * strength),
        "strength is read as the share of the picture that is kept; it is the share of the steps that is run.":
            lambda steps, strength: steps - int(steps * (1 - strength)),
        "the number of steps is rounded; it is cut to whole ones (and 50 * 0.58 is a hair below 29).":
            lambda steps, strength: steps - round(steps * strength),
        "the row is cut to a whole number, not the steps: that runs a step more wherever their number is broken. "
        "(FLUX's pipelines in diffusers do it this way.)": lambda steps, strength: int(steps - steps * strength),
        "one row too early: it runs a step more than asked for.":
            lambda steps, strength: steps - int(steps * strength) - 1,
        "one row too late: it runs a step less than asked for.":
            lambda steps, strength: steps - int(steps * strength) + 1,
        "at strength 0 a step is run all the same; the picture should come back as it is.":
            lambda steps, strength: steps - max(1, int(steps * strength)),
        "at strength 1 the first row is left out; all of them belong to it.":
            lambda steps, strength: max(1, steps - int(steps * strength)),
    },
)  # fmt: skip


# 08.2 -------------------------------------------------------------------------------------------------------


def blend(x, x0, eps, mask, level, after):
    return mask * x + (1 - mask) * (after.alpha * x0 + after.sigma * eps)


def with_known(known):
    """A wrong answer from what it takes for the known part."""
    return lambda x, x0, eps, mask, level, after: mask * x + (1 - mask) * known(x0, eps, level, after)


def a_step_with_a_mask(generator):
    """x has landed on the lower of two rows; the mask covers about half."""
    mask = (torch.rand((2, 1, 8, 8), generator=generator) < 0.5).float()
    mask[:, :, 0, 0], mask[:, :, 0, 1] = 0, 1
    parts = (noise(generator, 2, 4, 8, 8), 0.8 * noise(generator, 2, 4, 8, 8), noise(generator, 2, 4, 8, 8), mask)
    return (*parts, level(4, 700.0, 0.96), level(5, 600.0, 0.87))


BLEND = Exercise(
    "blend(x, x0, eps, mask, level, after)",
    blend,
    calling(a_step_with_a_mask),
    {
        "the known part is clean, but x still has noise: what goes back in needs the noise of the row that x is on.":
            with_known(lambda x0, eps, level, after: x0),
        "the known part has the noise of the row before the step; x has landed on the next one.":
            with_known(lambda x0, eps, level, after: level.alpha * x0 + level.sigma * eps),
        "the mask is the wrong way round: 1 is drawn anew, 0 is kept.":
            lambda x, x0, eps, mask, level, after: blend(x, x0, eps, 1 - mask, level, after),
        "the noise is drawn anew at every step; the eps that is given belongs to the whole run, so that the known part "
        "comes down one road.": with_known(lambda x0, eps, level, after: (
            after.alpha * x0 + after.sigma * torch.randn_like(x0))),
        "noise is added to x0 without making x0 smaller by alpha: the known part is too large for its row.":
            with_known(lambda x0, eps, level, after: x0 + after.sigma * eps),
        "the known part is made smaller by alpha, but has no noise in it.":
            with_known(lambda x0, eps, level, after: after.alpha * x0),
        "alpha and sigma are exchanged in the known part: it has far too little of the picture, or too much.":
            with_known(lambda x0, eps, level, after: after.sigma * x0 + after.alpha * eps),
        "the known part is added to the whole of x; inside the mask x stays alone, outside it has no part.":
            lambda x, x0, eps, mask, level, after: x + (1 - mask) * (after.alpha * x0 + after.sigma * eps),
    },
)  # fmt: skip


# 08.3 -------------------------------------------------------------------------------------------------------


def up(predict, x, level, after, refine):
    eps = predict(x, level.t)
    y = land(x, eps, level, after)
    for _ in range(refine):
        y = land(x, predict(y, after.t), level, after)
    return y


def land(x, eps, level, after):
    return after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps


def corrected(again):
    """A wrong answer from what it takes for a correction: (predict, x, y, level, after) -> y."""

    def answer(predict, x, level, after, refine):
        y = up(predict, x, level, after, 0)
        for _ in range(refine):
            y = again(predict, x, y, level, after)
        return y

    return answer


def told_too_early(predict, x, level, after, refine):
    return up(lambda latent, t: predict(latent, after.t), x, level, after, refine)


def renoised(predict, x, level, after, refine):
    a = after.alpha / level.alpha
    return a * x + math.sqrt(after.sigma**2 - (a * level.sigma) ** 2) * torch.randn_like(x)


def taken_for_clean(predict, x, level, after, refine):
    y = after.alpha * x + after.sigma * predict(x, level.t)
    for _ in range(refine):
        y = after.alpha * x + after.sigma * predict(y, after.t)
    return y


def smooth_network(x, t):
    """Stands for a UNet: its prediction depends on the latent, its place and the timestep."""
    return torch.tanh(1.4 * x + torch.roll(x, 1, dims=-1) + t / 400) - 0.3


def two_climbs(generator):
    x = 0.7 * noise(generator, 2, 4, 8, 8)
    return [(smooth_network, x, level(2, 300.0, 0.64), level(3, 500.0, 0.85), refine) for refine in (0, 3)]


CLIMB = Exercise(
    "up(predict, x, level, after, refine)",
    up,
    calling(two_climbs),
    {
        "the two rows are exchanged: this walks down, from `after` to `level`.":
            lambda predict, x, level, after, refine: up(predict, x, after, level, refine),
        "the first prediction is told the timestep of `after`, but x is still on `level`.": told_too_early,
        "the corrections predict in y, but with the timestep of `level`; y is on `after`.":
            corrected(lambda predict, x, y, level, after: land(x, predict(y, level.t), level, after)),
        "each correction sets out from where the last one landed, and climbs on; all of them set out from x.":
            corrected(lambda predict, x, y, level, after: land(y, predict(y, after.t), level, after)),
        "the corrections change nothing, for they predict in x again; what is wanted is the prediction in y.":
            corrected(lambda predict, x, y, level, after: land(x, predict(x, level.t), level, after)),
        "one correction too few: the first landing doesn't count as one.":
            lambda predict, x, level, after, refine: up(predict, x, level, after, max(0, refine - 1)),
        "fresh noise is added, as image-to-image begins; inversion adds the noise that is predicted.": renoised,
        "x is taken for the clean latent: take its own noise out first, and divide by its alpha.": taken_for_clean,
    },
)  # fmt: skip


# 08.4 -------------------------------------------------------------------------------------------------------


def latent_mask(mask, factor):
    return F.max_pool2d(mask, factor)


def patchy_masks(generator):
    """(2, 1, 48, 64) of patches that are full, empty, or covered by a few or by most of their pixels."""
    share = torch.tensor([0.0, 0.04, 0.8, 1.0])[torch.randint(4, (2, 1, 6, 8), generator=generator)]
    share = share.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (torch.rand(share.shape, generator=generator) < share).float(), 8


MASK = Exercise(
    "latent_mask(mask, factor)",
    latent_mask,
    calling(patchy_masks),
    {
        "one pixel speaks for each patch (nearest): a stroke thinner than a patch can be lost. Every pixel counts.":
            lambda mask, factor: mask[:, :, ::factor, ::factor],
        "this is the share of white pixels: a mask of fractions keeps a ghost of the old picture. One white pixel is "
        "enough for 1.": lambda mask, factor: F.avg_pool2d(mask, factor),
        "a patch counts where most of its pixels are white; one white pixel is enough.":
            lambda mask, factor: (F.avg_pool2d(mask, factor) > 0.5).float(),
        "a patch counts only where all its pixels are white (the minimum); one white pixel is enough.":
            lambda mask, factor: -F.max_pool2d(-mask, factor),
        "the mask is resized bilinearly: that looks at a few pixels of each patch, and makes fractions of them.":
            lambda mask, factor: F.interpolate(mask, scale_factor=1 / factor, mode="bilinear"),
        "black and white are exchanged: 1 stays 1.": lambda mask, factor: 1 - F.max_pool2d(mask, factor),
        "the maximum is right, but the mask still has the size of the picture: one value for each patch.":
            lambda mask, factor: F.interpolate(F.max_pool2d(mask, factor), scale_factor=factor),
    },
)  # fmt: skip


# 08.5 -------------------------------------------------------------------------------------------------------


def merged(windows, lefts, weight, width):
    total, weights = torch.zeros(*windows[0].shape[:-1], width), torch.zeros(width)
    for window, left in zip(windows, lefts, strict=True):
        total[..., left : left + len(weight)] += weight * window
        weights[left : left + len(weight)] += weight
    return total / weights


def plainly(windows, lefts, weight, width):
    return merged(windows, lefts, torch.ones_like(weight), width)


def summed(windows, lefts, weight, width):
    """The weighted sum, not divided."""
    total = torch.zeros(*windows[0].shape[:-1], width)
    for window, left in zip(windows, lefts, strict=True):
        total[..., left : left + len(weight)] += weight * window
    return total


def counted(windows, lefts, weight, width):
    ones = [torch.ones_like(window) for window in windows]
    return summed(windows, lefts, weight, width) / summed(ones, lefts, torch.ones_like(weight), width)


def pasted(windows, lefts, weight, width, order=1):
    total = torch.zeros(*windows[0].shape[:-1], width)
    for window, left in list(zip(windows, lefts, strict=True))[::order]:
        total[..., left : left + len(weight)] = window
    return total


def squared(windows, lefts, weight, width):
    return merged(windows, lefts, weight**2, width)


def overlapping(generator):
    """Four windows of 16 positions: three overlap evenly, the last by more than half."""
    weight = torch.minimum(torch.arange(1.0, 17.0), torch.arange(16.0, 0.0, -1.0)) / 8
    return [noise(generator, 4, 16, 16) for _ in range(4)], [0, 10, 20, 27], weight, 43


MERGE = Exercise(
    "merged(windows, lefts, weight, width)",
    merged,
    calling(overlapping),
    {
        "the weighted windows are added up, but not divided by the sum of the weights that each position got.": summed,
        "the sum is divided by the number of windows in all; it is the weights at each position that count.":
            lambda windows, lefts, weight, width: summed(windows, lefts, weight, width) / len(windows),
        "the weighted sum is divided by how many windows see a position; divide by the sum of their weights.": counted,
        "the weights are not used: a window's border, where it knows least, counts as much as its middle.": plainly,
        "where windows overlap the last one wins: they are to be averaged, or seams remain.": pasted,
        "where windows overlap the first one wins: they are to be averaged, or seams remain.":
            lambda windows, lefts, weight, width: pasted(windows, lefts, weight, width, order=-1),
        "the weight is multiplied in twice.": squared,
    },
)  # fmt: skip


EXERCISES = {"08.1": ROW, "08.2": BLEND, "08.3": CLIMB, "08.4": MASK, "08.5": MERGE}
