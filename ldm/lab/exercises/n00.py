"""Exercises of notebook 00: one picture, six boxes."""

import math
from itertools import pairwise

import torch

from ldm.lab.check import Exercise, calling
from ldm.schedules import Level, Schedule


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


def levels(generator, steps):
    """Falling noise levels with random gaps: alpha^2 + sigma^2 = 1, and the last one is not quite clean."""
    gaps = 0.3 + torch.rand(steps + 1, generator=generator)
    angles = (1.5 * gaps.cumsum(0) / gaps.sum()).flip(0)  # from 1.5, nearly pure noise, down
    return tuple(Level(i, 1000 * a / 1.6, math.cos(a), math.sin(a)) for i, a in enumerate(angles.tolist()))


# 00.1 -------------------------------------------------------------------------------------------------------


def shapes(n, height, width):
    h, w = height // 8, width // 8
    return [(n, 77), (n, 77, 128), (n, 4, h, w), (n, 4, h, w), (n, 4, h, w), (n, 3, height, width)]


def handed_on(
    context=lambda n: (n, 77, 128), latent=lambda n, h, w: (n, 4, h, w), picture=lambda n, h, w: (n, 3, h, w)
):
    """A wrong answer to 00.1: one of the shapes is another one. `latent` is given the latent's own h and w."""

    def answer(n, height, width):
        own = latent(n, height // 8, width // 8)
        return [(n, 77), context(n), own, own, own, picture(n, height, width)]

    return answer


SHAPES = Exercise(
    "shapes(n, height, width)",
    shapes,
    calling((1, 128, 128), (3, 96, 160), (2, 512, 768)),
    {
        "the latent has the picture's size: it is an eighth as high and an eighth as wide.":
            handed_on(latent=lambda n, h, w: (n, 4, 8 * h, 8 * w)),
        "the latent is too small: each of its two sides is an eighth of the picture's, not a sixty-fourth.":
            handed_on(latent=lambda n, h, w: (n, 4, h // 8, w // 8)),
        "the latent has the picture's three channels: it has four, and they are no colours.":
            handed_on(latent=lambda n, h, w: (n, 3, h, w)),
        "width stands before height in the latents: rows come first, (n, 4, h, w).":
            handed_on(latent=lambda n, h, w: (n, 4, w, h)),
        "width stands before height everywhere: rows come first in tensors, although one says “768 by 512”.":
            handed_on(latent=lambda n, h, w: (n, 4, w, h), picture=lambda n, h, w: (n, 3, w, h)),
        "the colours stand last in the picture, as in Pillow and NumPy: the decoder gives them first, (n, 3, H, W).":
            handed_on(picture=lambda n, h, w: (n, h, w, 3)),
        "one vector for a whole sentence: the UNet reads one for each of the 77 tokens.":
            handed_on(context=lambda n: (n, 128)),
    },
)  # fmt: skip


# 00.2 -------------------------------------------------------------------------------------------------------


def unet_runs(steps, sampler, last_sigma, guidance, together):
    calls = steps if sampler != "heun" else 2 * steps - (last_sigma == 0)
    return calls * (1 if guidance <= 1 or together else 2)


def each_way(runs):
    """The cases one by one: sampler, end of the schedule, guidance, together or apart."""
    return [
        (steps, sampler, last_sigma, guidance, together)
        for steps in runs
        for sampler in ("ddim", "euler", "heun")
        for last_sigma in (0.0, 0.03)
        for guidance in (1.0, 4.0)
        for together in (True, False)
    ]


RUNS = Exercise(
    "unet_runs(steps, sampler, last_sigma, guidance, together)",
    unet_runs,
    calling(lambda g: each_way((10, 25))),
    {
        "these are the steps alone: what does Heun add, and what do the two halves of guidance add when they go apart?":
            lambda n, sampler, last, s, together: n,
        "Heun asks once more at the place where its first half lands: two runs a step, where DDIM and Euler have one.":
            lambda n, sampler, last, s, together: n * (1 if s <= 1 or together else 2),
        "a step that ends at sigma = 0 has no second half, for nothing is left there to ask about: Heun then has one "
        "run less.":
            lambda n, sampler, last, s, together: unet_runs(n, sampler, 0.03, s, together),
        "Heun leaves out the second half of its last step only where that ends at sigma = 0.":
            lambda n, sampler, last, s, together: unet_runs(n, sampler, 0, s, together),
        "both halves of guidance are rows of one batch when they go together: that is a larger run, not a second one.":
            lambda n, sampler, last, s, together: unet_runs(n, sampler, last, s, False),
        "when the halves of guidance go apart, each of them is a run of its own.":
            lambda n, sampler, last, s, together: unet_runs(n, sampler, last, s, True),
        "at guidance 1 or less there is no unconditional half, and nothing to double.":
            lambda n, sampler, last, s, together: unet_runs(n, sampler, last, 4.0, together),
        "a schedule of n steps has n + 1 levels, but no step begins at the last one.":
            lambda n, sampler, last, s, together: unet_runs(n + 1, sampler, last, s, together),
    },
)  # fmt: skip


# 00.3 -------------------------------------------------------------------------------------------------------


def ddim_step(x, eps, level, after):
    x0 = (x - level.sigma * eps) / level.alpha
    return after.alpha * x0 + after.sigma * eps


def one_step(generator):
    """Latents, a prediction and two neighbouring levels, far from and near to the picture."""
    rows = levels(generator, 6)
    pairs = ((rows[0], rows[1]), (rows[2], rows[3]), (rows[-2], rows[-1]))
    return [(noise(generator, 2, 4, 8, 8), noise(generator, 2, 4, 8, 8), *pair) for pair in pairs]


STEP = Exercise(
    "ddim_step(x, eps, level, after)",
    ddim_step,
    calling(one_step),
    {
        "this is the guess x0, the whole way at once: equation (2) goes only as far as the next level.":
            lambda x, eps, level, after: (x - level.sigma * eps) / level.alpha,
        "both lines are at one level, so nothing happens: `level` belongs into the first, `after` into the second.":
            lambda x, eps, level, after: ddim_step(x, eps, level, level),
        "the noise that is mixed in again is that of `level`; at the next level there is less of it.":
            lambda x, eps, level, after: ddim_step(x, eps, level, Level(0, 0, after.alpha, level.sigma)),
        "`level` and `after` are swapped: x lies at `level`, and x0 is solved for there.":
            lambda x, eps, level, after: ddim_step(x, eps, after, level),
        "alpha and sigma are the wrong way round: alpha is the picture's share, sigma the noise's.":
            lambda x, eps, level, after: ddim_step(
                x, eps, *(Level(row.i, row.t, row.sigma, row.alpha) for row in (level, after))
            ),
        "the guess isn't divided by alpha: (1) says that x holds alpha times the picture.":
            lambda x, eps, level, after: after.alpha * (x - level.sigma * eps) + after.sigma * eps,
        "no noise is put back: x0 alone at the next level, but the network expects sigma of noise there.":
            lambda x, eps, level, after: after.alpha * (x - level.sigma * eps) / level.alpha,
        "a root too many: alpha and sigma are roots already. (diffusers keeps their squares, alphas_cumprod.)":
            lambda x, eps, level, after: ddim_step(
                x, eps, *(Level(row.i, row.t, row.alpha**0.5, row.sigma**0.5) for row in (level, after))
            ),
        "the sign before the noise is wrong in the second line: it is put back, not taken away once more.":
            lambda x, eps, level, after: after.alpha * (x - level.sigma * eps) / level.alpha - after.sigma * eps,
    },
)  # fmt: skip


# 00.4 -------------------------------------------------------------------------------------------------------


def draw(unet, noise, schedule, s):
    x = noise * schedule.start_scale
    for level, after in pairwise(schedule.levels):
        uncond, cond = unet(x, level.t)
        eps = uncond + s * (cond - uncond)
        x = ddim_step(x, eps, level, after)
    return x


def toy(x, t):
    """A small UNet: bent, told apart by every t, its two halves unlike."""
    return torch.tanh(x + 0.002 * t), torch.sin(1.3 * x) - 0.001 * t


def small_run(generator):
    """What `draw` is given: the toy, noise, a schedule that begins at 0.7 of it, a scale of guidance."""
    schedule = Schedule(levels(generator, 5), "epsilon", start_scale=0.7, rule="ddim")
    return (toy, noise(generator, 2, 4, 8, 8), schedule, 3.0)


def start_of(noise, schedule):
    return noise * schedule.start_scale


def own_t(level, after):
    return level.t


def guided(uncond, cond, s):
    return uncond + s * (cond - uncond)


def walked(start=start_of, t=own_t, mix=guided, step=ddim_step, rows=slice(None), end=lambda x, x0: x):
    """A wrong answer to 00.4: `draw` with one thing otherwise."""

    def answer(unet, noise, schedule, s):
        x, visited = start(noise, schedule), schedule.levels[rows]
        for level, after in pairwise(visited):
            eps = mix(*unet(x, t(level, after)), s)
            x0 = (x - level.sigma * eps) / level.alpha
            x = step(x, eps, level, after)
        return end(x, x0)

    return answer


def from_the_noise(unet, noise, schedule, s):
    """Every step begins at the first noise again."""
    start = noise * schedule.start_scale
    for level, after in pairwise(schedule.levels):
        uncond, cond = unet(start, level.t)
        x = ddim_step(start, uncond + s * (cond - uncond), level, after)
    return x


LOOP = Exercise(
    "draw(unet, noise, schedule, s)",
    draw,
    calling(small_run, small_run),
    {
        "the last x0 is returned instead of the last x: the end of the schedule may still hold a little noise.":
            walked(end=lambda x, x0: x0),
        "the steps run backwards, from the cleanest level to the noisiest: the first row is the one to begin at.":
            walked(rows=slice(None, None, -1)),
        "the network is told the t of the level it goes to: it must hear that of the x it is given, or it takes away "
        "too little noise.": walked(t=lambda level, after: after.t),
        "the start isn't scaled: the first x is the noise times schedule.start_scale.":
            walked(start=lambda eps, schedule: eps),
        "the last step is missing: n + 1 levels make n steps.": walked(rows=slice(None, -1)),
        "the first step is missing: row 0 is where the noise lies.": walked(rows=slice(1, None)),
        "the guidance is forgotten: cond alone, the scale s does nothing.": walked(mix=lambda uncond, cond, s: cond),
        "uncond and cond are swapped: unet(x, t) gives uncond first.":
            walked(mix=lambda uncond, cond, s: cond + s * (uncond - cond)),
        "x jumps to x0 at every step, all the noise gone at once, while the next t announces noise that isn't there.":
            walked(step=lambda x, eps, level, after: (x - level.sigma * eps) / level.alpha),
        "every step begins at the noise again: it has to begin at the x of the step before.": from_the_noise,
    },
)  # fmt: skip


EXERCISES = {"00.1": SHAPES, "00.2": RUNS, "00.3": STEP, "00.4": LOOP}
