"""Exercises of notebook 06: guidance."""

import torch

from ldm.lab.check import Exercise, calling


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


def two_predictions(generator, *more):
    """Arguments (uncond, cond, ...) as a model gives them: unlike in size, alike in direction, two pictures."""
    uncond = noise(generator, 2, 4, 8, 8)
    return (uncond, 1.3 * uncond + 0.4 * noise(generator, 2, 4, 8, 8), *more)


# 06.1 -------------------------------------------------------------------------------------------------------


def cfg(uncond, cond, s):
    return uncond + s * (cond - uncond)


GUIDE = Exercise(
    "cfg(uncond, cond, s)",
    cfg,
    calling(
        lambda g: two_predictions(g, 4.0), lambda g: two_predictions(g, 0.0), lambda g: two_predictions(g, 1.0)
    ),
    {
        "cond and uncond are swapped: this steers away from the prompt.": lambda u, c, s: c + s * (u - c),
        "it starts from cond instead of uncond: with s = 0 the prompt still counts. (That is the paper's w = s - 1.)":
            lambda u, c, s: c + s * (c - u),
        "the sign of the second term is wrong, s*cond + (s - 1)*uncond: with s = 1 it fits, otherwise it doesn't.":
            lambda u, c, s: s * c + (s - 1) * u,
        "this mixes the two, (s*cond + uncond) / (s + 1), and never goes beyond cond; guidance extrapolates.":
            lambda u, c, s: (s * c + u) / (s + 1),
        "the difference is there, but not what it is added to: uncond is missing.": lambda u, c, s: s * (c - u),
        "it subtracts the guidance from uncond: the sign before s is wrong.": lambda u, c, s: u - s * (c - u),
    },
)  # fmt: skip


# 06.2 -------------------------------------------------------------------------------------------------------


def one_batch(x, negative, positive):
    return torch.cat([x, x]), torch.cat([negative, positive])


def three_contexts(generator):
    return tuple(noise(generator, 3, *shape) for shape in ((4, 8, 8), (77, 16), (77, 16)))


BATCH = Exercise(
    "one_batch(x, negative, positive)",
    one_batch,
    calling(three_contexts),
    {
        "the halves are in the wrong order: the negative prompt belongs first, as uncond, or everything is guided "
        "away from the prompt.": lambda x, n, p: (torch.cat([x, x]), torch.cat([p, n])),
        "each picture is repeated beside itself (repeat_interleave), while the contexts come in two halves: picture 1 "
        "meets the words of picture 2.": lambda x, n, p: (x.repeat_interleave(2, 0), torch.cat([n, p])),
        "x goes in once, the words twice: the network needs a latent for every context.":
            lambda x, n, p: (x, torch.cat([n, p])),
        "the words are joined along the tokens; the two halves are two rows of the batch (dim 0).":
            lambda x, n, p: (torch.cat([x, x]), torch.cat([n, p], dim=1)),
        "the negative prompt isn't used: both halves read the same words, and guidance has no direction.":
            lambda x, n, p: (torch.cat([x, x]), torch.cat([p, p])),
    },
)  # fmt: skip


# 06.3 -------------------------------------------------------------------------------------------------------


def rescaled(uncond, cond, s, phi):
    out = cfg(uncond, cond, s)
    factor = cond.std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True)
    return phi * factor * out + (1 - phi) * out


def scaled(uncond, cond, s, phi, factor):
    out = cfg(uncond, cond, s)
    return out * (phi * factor(uncond, cond, out) + 1 - phi)


def spread(x):
    return x.std((1, 2, 3), keepdim=True)


RESCALE = Exercise(
    "rescaled(uncond, cond, s, phi)",
    rescaled,
    calling(lambda g: two_predictions(g, 7.5, 0.7), lambda g: two_predictions(g, 3.0, 1.0)),
    {
        "the factor is upside down: std(cond) / std(out) makes the output smaller, yours makes it larger still.":
            lambda u, c, s, phi: scaled(u, c, s, phi, lambda u, c, out: spread(out) / spread(c)),
        "one spread for the whole batch: a picture would depend on its neighbours. Take std over (1, 2, 3).":
            lambda u, c, s, phi: scaled(u, c, s, phi, lambda u, c, out: c.std() / out.std()),
        "the spread that is restored is that of uncond; it should be cond's.":
            lambda u, c, s, phi: scaled(u, c, s, phi, lambda u, c, out: spread(u) / spread(out)),
        "phi does nothing: the rescaled output has to be mixed with the plain one.":
            lambda u, c, s, phi: scaled(u, c, s, 1.0, lambda u, c, out: spread(c) / spread(out)),
        "phi is the wrong way round: 1 rescales fully, 0 leaves the output as it is.":
            lambda u, c, s, phi: scaled(u, c, s, 1 - phi, lambda u, c, out: spread(c) / spread(out)),
        "the variances are brought together, not the standard deviations: a square root is missing.":
            lambda u, c, s, phi: scaled(u, c, s, phi, lambda u, c, out: (spread(c) / spread(out)) ** 2),
    },
)  # fmt: skip


# 06.4 -------------------------------------------------------------------------------------------------------


def scale_at(s, ratio, low, high):
    return s if low < ratio <= high else 1.0


def at_each(inside):
    """A wrong answer from its test for being inside."""
    return lambda s, ratio, low, high: s if inside(ratio, low, high) else 1.0


INTERVAL = Exercise(
    "scale_at(s, ratio, low, high)",
    scale_at,
    calling(*((5.0, ratio, 0.5, 4.0) for ratio in (14.6, 4.0, 2.0, 1.0, 0.5, 0.3, 0.03))),
    {
        "outside the interval the scale is 1, the plain conditional model; 0 would forget the prompt there.":
            lambda s, ratio, low, high: s if low < ratio <= high else 0.0,
        "the interval is inside out: guidance belongs between low and high.":
            at_each(lambda ratio, low, high: not low < ratio <= high),
        "the ends are the wrong way round: low is left out and high belongs to it, (low, high].":
            at_each(lambda ratio, low, high: low <= ratio < high),
        "only the upper end is looked at: at the last, nearly clean levels guidance should be off as well.":
            at_each(lambda ratio, low, high: ratio <= high),
        "only the lower end is looked at: at the first, noisiest levels guidance should be off as well.":
            at_each(lambda ratio, low, high: ratio > low),
    },
)  # fmt: skip


EXERCISES = {"06.1": GUIDE, "06.2": BATCH, "06.3": RESCALE, "06.4": INTERVAL}
