"""Exercises of notebook 02: the VAE, its factor and the linear preview."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.lab.check import Exercise, calling


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


def uneven(generator, *shape):
    """Latents whose channels differ in mean and spread, (B, 4, h, w)."""
    spread, mean = (torch.tensor(each).view(4, 1, 1) for each in ([2.4, 0.6, 1.7, 3.1], [-0.8, 0.1, 1.9, 0.4]))
    return mean + spread * noise(generator, *shape)


# 02.1 -------------------------------------------------------------------------------------------------------


def compression(factor, channels, bits):
    return 3 * factor**2 / channels, 3 * factor**2 * 8 / (channels * bits)


def ratios(numbers):
    """A wrong answer from its ratio of numbers, with the bits counted rightly after that."""
    return lambda factor, channels, bits: (
        numbers(factor, channels),
        numbers(factor, channels) * 8 / bits,
    )


COUNT = Exercise(
    "compression(factor, channels, bits)",
    compression,
    calling((8, 4, 16), (8, 4, 32), (8, 16, 16), (4, 3, 16), (16, 8, 32)),
    {
        "that counts positions, factor², the widespread “64 times”: a pixel holds 3 numbers and a position of the "
        "latent `channels` of them.": ratios(lambda f, c: f**2),
        "a latent is smaller along both sides: factor², not factor.": ratios(lambda f, c: 3 * f / c),
        "the 3 colours of a pixel are missing: a picture has 3 numbers a pixel.": ratios(lambda f, c: f**2 / c),
        "the latent's channels are missing: it has `channels` numbers a position.": ratios(lambda f, c: 3 * f**2),
        "both ratios are upside down: the picture's count stands above, the latent's below.":
            lambda f, c, b: (c / (3 * f**2), c * b / (3 * f**2 * 8)),
        "the second ratio takes no account of the bits: a pixel's numbers have 8 each, the latent's `bits`.":
            lambda f, c, b: (3 * f**2 / c, 3 * f**2 / c),
        "the second ratio forgets that the picture's numbers have 8 bits each.":
            lambda f, c, b: (3 * f**2 / c, 3 * f**2 / (c * b)),
        "in the second ratio the bits are the wrong way round: wider numbers make the latent larger.":
            lambda f, c, b: (3 * f**2 / c, 3 * f**2 / c * b / 8),
    },
)  # fmt: skip


# 02.2 -------------------------------------------------------------------------------------------------------


def kl(mean, log_variance):
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))


def posteriors(generator):
    return [
        (noise(generator, 3, 4, 6, 6), 0.8 * noise(generator, 3, 4, 6, 6) - 1),
        (2 * noise(generator, 2, 4, 4, 8), 0.5 * noise(generator, 2, 4, 4, 8) - 3),
    ]


def each(term):
    """A wrong answer from its term for one coordinate."""
    return lambda m, lv: term(m, lv).sum((1, 2, 3))


KL = Exercise(
    "kl(mean, log_variance)",
    kl,
    calling(posteriors),
    {
        "the factor ½ is missing: it is twice too large.": each(lambda m, lv: m**2 + lv.exp() - 1 - lv),
        "the log-variance stands where the variance belongs: exp is missing, and what is left is the mean's part.":
            each(lambda m, lv: 0.5 * (m**2 + lv - 1 - lv)),
        "log_variance is taken for the variance itself, and its logarithm taken again: (3)'s log σ² is what is given.":
            each(lambda m, lv: 0.5 * (m**2 + lv - 1 - lv.log())),
        "log_variance is taken for log σ: its exponential already is the variance, it isn't squared again.":
            each(lambda m, lv: 0.5 * (m**2 + (2 * lv).exp() - 1 - 2 * lv)),
        "the standard deviation stands where the variance belongs: exp of half the log-variance is σ, not σ².":
            each(lambda m, lv: 0.5 * (m**2 + (lv / 2).exp() - 1 - lv)),
        "the average over the coordinates is taken: they are independent, so their divergences add up.":
            lambda m, lv: kl(m, lv) / m[0].numel(),
        "everything is summed into one number: each picture of the batch has its own divergence, (B,).":
            lambda m, lv: kl(m, lv).sum(),
        "the batch is averaged: each picture has its own divergence, (B,).": lambda m, lv: kl(m, lv).mean(),
        "only the channels are summed: each position has its coordinates too, and all of them count.":
            lambda m, lv: 0.5 * (m**2 + lv.exp() - 1 - lv).sum(1),
        "the sign is wrong: a divergence is never negative. (With a minus it is a term of the bound to be maximised.)":
            each(lambda m, lv: -0.5 * (m**2 + lv.exp() - 1 - lv)),
        "this is the divergence the other way round, from the standard normal to the posterior: it isn't symmetric.":
            each(lambda m, lv: 0.5 * ((m**2 + 1) / lv.exp() - 1 + lv)),
        "the −1 is missing: for mean 0 and variance 1 nothing may be left.":
            each(lambda m, lv: 0.5 * (m**2 + lv.exp() - lv)),
        "the mean isn't squared.": each(lambda m, lv: 0.5 * (m + lv.exp() - 1 - lv)),
        "the logarithm has the wrong sign: a posterior that is too narrow has to cost something.":
            each(lambda m, lv: 0.5 * (m**2 + lv.exp() - 1 + lv)),
    },
)  # fmt: skip


# 02.3 -------------------------------------------------------------------------------------------------------


def sample(moments, eps):
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * eps


def moments(generator):
    """What an encoder gives for two pictures, one log-variance of it far beyond what is allowed."""
    given = noise(generator, 2, 8, 6, 6)
    given[0, 5, 1, 2] = 26.0
    return given, noise(generator, 2, 4, 6, 6)


def drawn(with_spread):
    """A wrong answer from what it makes of mean, log-variance and noise."""

    def answer(moments, eps):
        mean, log_variance = moments.chunk(2, dim=1)
        return with_spread(mean, log_variance.clamp(-30, 20), eps)

    return answer


def interleaved(moments, eps):
    return moments[:, ::2] + (0.5 * moments[:, 1::2].clamp(-30, 20)).exp() * eps


SAMPLE = Exercise(
    "sample(moments, eps)",
    sample,
    calling(moments),
    {
        "the noise is multiplied by the variance: the ½ in the exponent is missing.":
            drawn(lambda m, lv, e: m + lv.exp() * e),
        "the noise is multiplied by the log-variance: the exponential is missing.": drawn(lambda m, lv, e: m + lv * e),
        "the ½ stands before the exponential: it belongs into it, where it takes the root of the variance.":
            drawn(lambda m, lv, e: m + 0.5 * lv.exp() * e),
        "the exponent has the wrong sign: this is 1/σ.": drawn(lambda m, lv, e: m + (-0.5 * lv).exp() * e),
        "the noise is added as it is: σ is missing.": drawn(lambda m, lv, e: m + e),
        "the mean is missing: this draws around zero.": drawn(lambda m, lv, e: (0.5 * lv).exp() * e),
        "the noise isn't used: mean + σ is one fixed point.": drawn(lambda m, lv, e: m + (0.5 * lv).exp()),
        "the noise given isn't used, other noise is drawn: with eps passed in, a run can be repeated.":
            drawn(lambda m, lv, e: m + (0.5 * lv).exp() * torch.randn_like(m)),
        "the halves are swapped: the means are the first four channels, the log-variances the last four.":
            lambda given, e: sample(given.roll(4, 1), e),
        "the channels are taken alternately: the means are the first four, not every other one.": interleaved,
        "the log-variance isn't clamped to [-30, 20]: one wild value makes the latent explode.":
            lambda given, e: given[:, :4] + (0.5 * given[:, 4:]).exp() * e,
    },
)  # fmt: skip


# 02.4 -------------------------------------------------------------------------------------------------------


def total_variance(mean, log_variance):
    return mean.var() + log_variance.exp().mean()


def scaling_factor(mean, log_variance):
    return total_variance(mean, log_variance) ** -0.5


def wide(generator):
    """Posteriors whose own spread counts, (B, 4, h, w)."""
    return uneven(generator, 12, 4, 16, 16), 0.3 * noise(generator, 12, 4, 16, 16) + 0.9


FACTOR = Exercise(
    "scaling_factor(mean, log_variance)",
    scaling_factor,
    calling(wide, wide),
    {
        "this is the standard deviation itself: the factor is its reciprocal.":
            lambda m, lv: total_variance(m, lv).sqrt(),
        "this is 1 over the variance: a square root is missing.": lambda m, lv: 1 / total_variance(m, lv),
        "this is the variance: the factor is 1 over its square root.": total_variance,
        "the mean isn't taken off: 1 over the root of the mean square is smaller, unless the latents have mean 0.":
            lambda m, lv: (m.square().mean() + lv.exp().mean()) ** -0.5,
        "the posterior's own spread is left out: samples vary more than the means do.": lambda m, lv: 1 / m.std(),
        "standard deviations are added: it is variances that add up.":
            lambda m, lv: 1 / (m.std() + (0.5 * lv).exp().mean()),
        "the posterior's variance is averaged wrongly: exp of a mean is less than the mean of exp.":
            lambda m, lv: (m.var() + lv.mean().exp()) ** -0.5,
        "there is one factor a channel: the recipe of Stable Diffusion has one for all, so that channels keep their "
        "proportions.": lambda m, lv: (m.var((0, 2, 3)) + lv.exp().mean((0, 2, 3))) ** -0.5,
        "each channel's factor is found, and then averaged: one spread over all the numbers is asked for.":
            lambda m, lv: ((m.var((0, 2, 3)) + lv.exp().mean((0, 2, 3))) ** -0.5).mean(),
        "each picture's factor is found, and then averaged: pictures differ from one another, and that is part of it.":
            lambda m, lv: ((m.var((1, 2, 3)) + lv.exp().mean((1, 2, 3))) ** -0.5).mean(),
        "this is 1 over the largest value, which brings latents into [-1, 1]: it is the spread that is to be 1.":
            lambda m, lv: 1 / m.abs().max(),
    },
)  # fmt: skip


# 02.5 -------------------------------------------------------------------------------------------------------


def there_and_back_again(z, x0, factor, shift):
    return (z - shift) * factor, x0 / factor + shift


SHIFT = Exercise(
    "there_and_back_again(z, x0, factor, shift)",
    there_and_back_again,
    calling(lambda g: (uneven(g, 2, 4, 4, 4), noise(g, 2, 4, 4, 4), 0.3611, 0.1159)),
    {
        "the shift is taken off after the factor, and added before it is divided out: they undo each other, but the "
        "shift is measured on raw latents.": lambda z, x0, f, s: (z * f - s, (x0 + s) / f),
        "the way there is right, the way back undoes the two in the same order: the last one done is undone first.":
            lambda z, x0, f, s: ((z - s) * f, (x0 + s) / f),
        "the way back is right, but there the shift comes off after the factor: centre first, then scale.":
            lambda z, x0, f, s: (z * f - s, x0 / f + s),
        "the shift has the wrong sign both times: there it is taken off, back it is added.":
            lambda z, x0, f, s: ((z + s) * f, x0 / f - s),
        "the factor is the wrong way round: raw latents are multiplied by it, the diffusion model's are divided.":
            lambda z, x0, f, s: ((z - s) / f, x0 * f + s),
        "the shift is missing.": lambda z, x0, f, s: (z * f, x0 / f),
        "the two are exchanged: first what becomes of z, then what becomes of x0.":
            lambda z, x0, f, s: (x0 / f + s, (z - s) * f),
        "the way back multiplies by the factor again, as if it were 1 over the one stored.":
            lambda z, x0, f, s: ((z - s) * f, x0 * f + s),
    },
)  # fmt: skip


# 02.6 -------------------------------------------------------------------------------------------------------


def fit_preview(x0, pictures):
    rows = with_one(x0)
    colours = F.avg_pool2d(pictures, pictures.shape[-1] // x0.shape[-1])
    return solve(rows, in_rows(colours))


def with_one(x0: Tensor) -> Tensor:
    """(B, C, h, w) -> (B*h*w, C + 1): the channels of each position, and a 1."""
    rows = in_rows(x0)
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def in_rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, 2)


def solve(rows: Tensor, wanted: Tensor) -> Tensor:
    return torch.linalg.lstsq(rows, wanted).solution


def coloured(generator):
    """Latents, and pictures whose colours follow them, roughly: cells have structure inside, and a slope."""
    x0, cell = uneven(generator, 3, 4, 6, 6) / 3, noise(generator, 1, 3, 8, 8) + torch.linspace(-1, 1, 8)
    colours = (
        torch.einsum("bchw,ck->bkhw", x0, noise(generator, 4, 3)) / 3 + torch.tensor([0.4, -0.2, 0.1])[:, None, None]
    )
    pictures = F.interpolate(colours, scale_factor=8) * (1 + 0.5 * cell.repeat(1, 1, 6, 6))
    return x0, pictures + 0.2 * noise(generator, 3, 3, 48, 48)


def with_colours(colours):
    """A wrong answer from how it makes small pictures of large ones."""
    return lambda x0, pictures: solve(with_one(x0), in_rows(colours(pictures)))


def without_bias(x0, pictures):
    return solve(in_rows(x0), in_rows(F.avg_pool2d(pictures, 8)))


def bias_first(x0, pictures):
    return fit_preview(x0, pictures).roll(1, 0)


def scrambled(x0, pictures):
    """Reshaped without moving the channels last: rows of neighbours, not of channels."""
    rows = x0.reshape(-1, x0.shape[1])
    return solve(torch.cat([rows, torch.ones(len(rows), 1)], 1), F.avg_pool2d(pictures, 8).reshape(-1, 3))


def backwards(x0, pictures):
    """Latents predicted from colours, and that inverted."""
    colours = in_rows(F.avg_pool2d(pictures, 8))
    return torch.linalg.pinv(solve(torch.cat([colours, torch.ones(len(colours), 1)], 1), with_one(x0)))[:, :3]


PREVIEW = Exercise(
    "fit_preview(x0, pictures)",
    fit_preview,
    calling(coloured),
    {
        "there is no bias: grey isn't the colour of a latent of zeros. Give each position a 1 as its fifth number.":
            without_bias,
        "the fifth row is zero: the four others were fitted without a bias, and it doesn't follow afterwards.":
            lambda x0, pictures: F.pad(without_bias(x0, pictures), (0, 0, 0, 1)),
        "the bias stands first: it should be the last row, behind those of the channels.": bias_first,
        "it is transposed: one row a channel and one for the bias, a column a colour, (5, 3).":
            lambda x0, pictures: fit_preview(x0, pictures).T,
        "the rows are mixed up: reshaping (B, 4, h, w) to (-1, 4) takes four neighbours for four channels. Move the "
        "channels last before.": scrambled,
        "each cell's first pixel is taken for its colour: fit to the mean of its 8 x 8 pixels.":
            with_colours(lambda pictures: pictures[..., ::8, ::8]),
        "the pictures are made small by interpolation without averaging: a cell's colour is the mean of its pixels.":
            with_colours(lambda pictures: F.interpolate(pictures, scale_factor=1 / 8, mode="bilinear")),
        "the pixels of a cell are summed, not averaged: everything is 64 times too large.":
            with_colours(lambda pictures: 64 * F.avg_pool2d(pictures, 8)),
        "the colours are brought to [0, 1] first: the pictures are in [-1, 1], and so is what the matrix should give.":
            with_colours(lambda pictures: F.avg_pool2d(pictures, 8) / 2 + 0.5),
        "that fits latents to colours and inverts the result: the error that is to be smallest is that of the colours.":
            backwards,
    },
    atol=1e-4,
    rtol=1e-3,
)  # fmt: skip


EXERCISES = {"02.1": COUNT, "02.2": KL, "02.3": SAMPLE, "02.4": FACTOR, "02.5": SHIFT, "02.6": PREVIEW}
