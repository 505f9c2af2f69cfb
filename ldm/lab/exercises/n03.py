"""Exercises of notebook 03: noise, and the perfect denoiser."""

import torch
from torch import Tensor

from ldm.diffusion import add_noise, target
from ldm.lab.check import Exercise, calling
from ldm.schedules.betas import betas
from ldm.schedules.config import SD_BETAS, ScheduleConfig

SD = ScheduleConfig(beta_schedule="scaled_linear", **SD_BETAS)


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


def bars_of(config) -> Tensor:
    return (1 - betas(config)).cumprod(0)


def bars_sd(generator):
    return (bars_of(SD),)


def bars_linear(generator):
    return (bars_of(ScheduleConfig()),)


# 03.1 -------------------------------------------------------------------------------------------------------


def log_snr(bars):
    return (bars / (1 - bars)).log()


LOG_SNR = Exercise(
    "log_snr(bars)",
    log_snr,
    calling(bars_sd, bars_linear),
    {
        "it is the logarithm of alpha / sigma, half of what is asked: the SNR is the square of that.":
            lambda bars: (bars / (1 - bars)).sqrt().log(),
        "the fraction is upside down: noise over signal. At t = 0, where there is hardly any noise, it must be large.":
            lambda bars: ((1 - bars) / bars).log(),
        "the logarithm has base 10: the field's log-SNR is the natural one.": lambda bars: (bars / (1 - bars)).log10(),
        "these are decibels, 10 times the logarithm to base 10: the field's log-SNR is the natural logarithm.":
            lambda bars: 10 * (bars / (1 - bars)).log10(),
        "this is the SNR; its logarithm is missing.": lambda bars: bars / (1 - bars),
        "only the signal is there: alpha-bar has to be divided by the variance of the noise.": lambda bars: bars.log(),
        "the noise's share is taken as 1 - sqrt(alpha-bar); variances add up to 1, not amplitudes.":
            lambda bars: (bars / (1 - bars.sqrt()) ** 2).log(),
        "a 1 is added before the logarithm (log1p): log-SNR falls below 0 where noise outweighs the picture.":
            lambda bars: (bars / (1 - bars)).log1p(),
    },
)  # fmt: skip


# 03.2 -------------------------------------------------------------------------------------------------------


def noised(x0, eps, t, betas):
    return with_bars(lambda betas: (1 - betas).cumprod(0))(x0, eps, t, betas)


def with_bars(bars_from, shares=lambda bar: (bar.sqrt(), (1 - bar).sqrt())):
    """An answer, from what it takes for alpha-bar and for alpha and sigma."""

    def answer(x0, eps, t, betas):
        return add_noise(x0, eps, *shares(bars_from(betas)[t].view(-1, 1, 1, 1)))

    return answer


def product(betas):
    return (1 - betas).cumprod(0)


def three_latents(generator):
    t = torch.randint(150, 850, (3,), generator=generator)
    return noise(generator, 3, 4, 8, 8), noise(generator, 3, 4, 8, 8), t, betas(SD)


def both_ends(generator):
    x0, eps, _, all_betas = three_latents(generator)
    return x0, eps, torch.tensor([0, 354, 999]), all_betas


NOISED = Exercise(
    "noised(x0, eps, t, betas)",
    noised,
    calling(three_latents, both_ends),
    {
        "the square roots are missing: alpha-bar and 1 - alpha-bar are variances, x is made of amplitudes.":
            with_bars(product, lambda bar: (bar, 1 - bar)),
        "picture and noise are swapped: at t = 0 nearly all of x must be x0.":
            with_bars(product, lambda bar: ((1 - bar).sqrt(), bar.sqrt())),
        "beta stands where alpha-bar belongs: even at t = 0 hardly anything of the picture is left.":
            with_bars(lambda betas: betas),
        "1 - beta is one step's share; t steps multiply: the running product up to t belongs there.":
            with_bars(lambda betas: 1 - betas),
        "this is the running product of the betas, which is soon 0; the shares that stay, 1 - beta, are multiplied.":
            with_bars(lambda betas: betas.cumprod(0)),
        "the betas are added up: 1 minus their sum falls below 0, and its root is not a number. Shares are multiplied.":
            with_bars(lambda betas: 1 - betas.cumsum(0)),
        "sigma is 1 - alpha here: amplitudes don't add up to 1, their squares do.":
            with_bars(product, lambda bar: (bar.sqrt(), 1 - bar.sqrt())),
        "only the noise has its square root; alpha is the root of alpha-bar.":
            with_bars(product, lambda bar: (bar, (1 - bar).sqrt())),
        "it is one step off: alpha-bar at t is the product up to and with beta at t.":
            lambda x0, eps, t, betas: noised(x0, eps, t - 1, betas),
        "all pictures get the first one's t: each has its own.":
            lambda x0, eps, t, betas: noised(x0, eps, t[:1].expand(len(t)), betas),
    },
)  # fmt: skip


# 03.3 -------------------------------------------------------------------------------------------------------


def both(out, x, alpha, sigma, kind):
    if kind == "eps":
        return (x - sigma * out) / alpha, out
    return alpha * x - sigma * out, sigma * x + alpha * out


def wrong_eps(x0):
    """An answer that is right about v, and wrong about x0 from eps."""
    return lambda out, x, a, s, kind: (x0(out, x, a, s), out) if kind == "eps" else both(out, x, a, s, kind)


def wrong_v(pair):
    """An answer that is right about eps, and wrong about v."""
    return lambda out, x, a, s, kind: pair(out, x, a, s) if kind == "v" else both(out, x, a, s, kind)


def seen(kind, alpha):
    """A noisy latent at that alpha, and what a perfect network would say of it."""

    def draw(generator):
        x0, eps, sigma = noise(generator, 2, 4, 8, 8), noise(generator, 2, 4, 8, 8), (1 - alpha**2) ** 0.5
        out = target(x0, eps, alpha, sigma, {"eps": "epsilon", "v": "v_prediction"}[kind])
        return out, add_noise(x0, eps, alpha, sigma), alpha, sigma, kind

    return draw


BOTH = Exercise(
    "both(out, x, alpha, sigma, kind)",
    both,
    calling(seen("eps", 0.9), seen("eps", 0.35), seen("v", 0.9), seen("v", 0.35)),
    {
        "from eps: x0 is not divided by alpha, so it comes out too small.": wrong_eps(lambda e, x, a, s: x - s * e),
        "from eps: only x is divided by alpha; the noise has to be taken away before the division.":
            wrong_eps(lambda e, x, a, s: x / a - s * e),
        "from eps: the noise is added once more; solve x = alpha*x0 + sigma*eps for x0 and watch the sign.":
            wrong_eps(lambda e, x, a, s: (x + s * e) / a),
        "from eps: alpha and sigma are swapped.": wrong_eps(lambda e, x, a, s: (x - a * e) / s),
        "from eps: eps is taken away with weight 1; in x it stands with weight sigma.":
            wrong_eps(lambda e, x, a, s: (x - e) / a),
        "v is treated as if it were eps: look at `kind`.":
            lambda out, x, a, s, kind: both(out, x, a, s, "eps"),
        "from v: the sign in x0 is wrong. (alpha, sigma) is a rotation, and this turns the wrong way.":
            wrong_v(lambda v, x, a, s: (a * x + s * v, s * x + a * v)),
        "from v: the sign in eps is wrong. (alpha, sigma) is a rotation: one of its two rows has a minus, that of x0.":
            wrong_v(lambda v, x, a, s: (a * x - s * v, a * v - s * x)),
        "from v: both signs are wrong; that belongs to v with the opposite sign, sigma*x0 - alpha*eps.":
            wrong_v(lambda v, x, a, s: (a * x + s * v, s * x - a * v)),
        "from v: alpha and sigma are swapped.":
            wrong_v(lambda v, x, a, s: (s * x - a * v, a * x + s * v)),
        "the two come in the wrong order: x0 first, then eps.":
            lambda *given: both(*given)[::-1],
    },
)  # fmt: skip


# 03.4 -------------------------------------------------------------------------------------------------------


def distances(x, alpha, data):
    """|x - alpha x0_i|^2: (B, N)."""
    return (x[:, None] - alpha * data).square().flatten(2).sum(2)


def averaged(weights, data):
    """(B, N), (N, 4, h, w) -> (B, 4, h, w)."""
    return torch.einsum("bn,nchw->bchw", weights, data)


def ideal(x, alpha, sigma, data):
    return averaged((-distances(x, alpha, data) / (2 * sigma**2)).softmax(1), data)


def weighed(logits, dim=1):
    """An answer from its logits of (squared distance, sigma)."""
    return lambda x, a, s, data: averaged(logits(distances(x, a, data), s).softmax(dim), data)


def nearest(x, alpha, sigma, data):
    return data[distances(x, alpha, data).argmin(1)]


def without_care(x, alpha, sigma, data):
    weights = (-distances(x, alpha, data) / (2 * sigma**2)).exp()
    return averaged(weights / weights.sum(1, keepdim=True), data)


def in_the_fog(alpha, shape, spread):
    """Two noisy latents of a set of six, so close together that several count."""

    def draw(generator):
        data, sigma = spread * noise(generator, 6, *shape), (1 - alpha**2) ** 0.5
        return alpha * data[:2] + sigma * noise(generator, 2, *shape), alpha, sigma, data

    return draw


def nearly_clean(generator):
    data = noise(generator, 6, 4, 16, 16)
    return 0.999 * data[:2] + 0.0447 * noise(generator, 2, 4, 16, 16), 0.999, 0.0447, data


IDEAL = Exercise(
    "my_ideal(x, alpha, sigma, data)",
    ideal,
    calling(in_the_fog(0.6, (4, 2, 2), 0.5), in_the_fog(0.9, (4, 2, 2), 0.25), nearly_clean),
    {
        "the 1/2 is missing: a Gaussian's exponent is the squared distance over 2 sigma^2.":
            weighed(lambda d, s: -d / s**2),
        "sigma is not squared: a Gaussian's exponent is the squared distance over 2 sigma^2.":
            weighed(lambda d, s: -d / (2 * s)),
        "the distance is not squared: a Gaussian's exponent is the squared distance over 2 sigma^2.":
            weighed(lambda d, s: -d.sqrt() / (2 * s**2)),
        "alpha is forgotten: x is near alpha*x0, not near x0.":
            lambda x, a, s, data: averaged((-distances(x, 1.0, data) / (2 * s**2)).softmax(1), data),
        "x is divided by alpha, but sigma is not: noise grows along with it, to sigma / alpha.":
            lambda x, a, s, data: averaged((-distances(x / a, 1.0, data) / (2 * s**2)).softmax(1), data),
        "the softmax runs over the batch: for each latent the scenes of the set compete, and their weights sum to 1.":
            weighed(lambda d, s: -d / (2 * s**2), dim=0),
        "the sign is wrong: the farthest scene gets the largest weight.": weighed(lambda d, s: d / (2 * s**2)),
        "the squares are averaged over the numbers of a latent, not summed: the weights come out nearly equal.":
            lambda x, a, s, data: averaged((-distances(x, a, data) / data[0].numel() / (2 * s**2)).softmax(1), data),
        "this is the nearest scene alone; the least squared error has the mean of all, each with its probability.":
            nearest,
        "alpha*x0 is averaged; the clean scenes themselves belong into the mean.":
            lambda x, a, s, data: a * ideal(x, a, s, data),
        "the exponentials underflow and 0 is divided by 0: a softmax takes the largest exponent out first.":
            without_care,
    },
    atol=1e-4,
)  # fmt: skip


# 03.5 -------------------------------------------------------------------------------------------------------


def zero_terminal(bars):
    root = bars.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def on_roots(change):
    """An answer from what it does to the square roots, given the first and the last of them."""
    return lambda bars: change(bars.sqrt(), bars.sqrt()[0], bars.sqrt()[-1]) ** 2


def last_is_zero(bars):
    changed = bars.clone()
    changed[-1] = 0
    return changed


ZERO_TERMINAL = Exercise(
    "zero_terminal(bars)",
    zero_terminal,
    calling(bars_sd, lambda generator: (bars_of(ScheduleConfig())[:600],)),
    {
        "the first level has changed: after the shift stretch the roots, so that the first is again what it was.":
            on_roots(lambda root, first, last: root - last),
        "alpha-bar itself is shifted and stretched; it should be its square root.":
            lambda bars: (bars - bars[-1]) * bars[0] / (bars[0] - bars[-1]),
        "these are the square roots: alpha-bar is asked for.": lambda bars: zero_terminal(bars).sqrt(),
        "the stretch is upside down: the range has become shorter by the shift and must grow again.":
            on_roots(lambda root, first, last: (root - last) * (first - last) / first),
        "the first level has become 1, no noise at all; it should keep the value it had.":
            on_roots(lambda root, first, last: (root - last) / (first - last)),
        "only the last level is changed: a cliff between it and the one before. All of them move a little.":
            last_is_zero,
        "the roots are stretched, but not shifted: the last one is not 0.":
            on_roots(lambda root, first, last: root * first / (first - last)),
        "it subtracts the first root where the last belongs: the last one is to become 0.":
            on_roots(lambda root, first, last: (root - first) * first / (first - last)),
    },
)  # fmt: skip


EXERCISES = {"03.1": LOG_SNR, "03.2": NOISED, "03.3": BOTH, "03.4": IDEAL, "03.5": ZERO_TERMINAL}
