"""Exercises of notebook 04: the UNet."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ldm.lab.check import Exercise, calling
from ldm.models.blocks import ResnetBlock


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


# 04.1 -------------------------------------------------------------------------------------------------------


def waves(t, width):
    return joined(angles(t, width))


def angles(t, width, period=10000, shift=0):
    """t times the frequencies: (B, width/2)."""
    half = width // 2
    return t[:, None] * torch.exp(-math.log(period) * torch.arange(half) / (half - shift))


def joined(angle):
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def at(t, frequencies):
    return joined(t[:, None] * frequencies)


def times(generator):
    """A few timesteps, the ends among them, whole numbers as a schedule has them."""
    return torch.cat([torch.tensor([0, 1, 999]), torch.randint(2, 999, (5,), generator=generator)])


CLOCK = Exercise(
    "my_waves(t, width)",
    waves,
    calling(lambda g: (times(g), 48), lambda g: (times(g), 10)),
    {
        "sines and cosines are exchanged: Stable Diffusion puts the cosines first (Ho et al. 2020 the sines).":
            lambda t, width: torch.cat([angles(t, width).sin(), angles(t, width).cos()], dim=-1),
        "cosines and sines alternate, as Vaswani et al. 2017 print them; here all cosines come first, then all sines.":
            lambda t, width: torch.stack([angles(t, width).cos(), angles(t, width).sin()], dim=-1).flatten(1),
        "the waves grow too little: the largest period is 1000 where 10000 belongs, and great times look alike.":
            lambda t, width: joined(angles(t, width, period=1000)),
        "the exponent is divided by half - 1, as in Ho et al.'s code (freq_shift 1); Stable Diffusion divides by half.":
            lambda t, width: joined(angles(t, width, shift=1)),
        "the exponent is divided by the whole width: the frequencies stop at 1/100, half-way to 1/10000.":
            lambda t, width: at(t, 10000 ** (-torch.arange(width // 2) / width)),
        "the exponent itself is used as the frequency: exp is missing.":
            lambda t, width: at(t, -math.log(10000) * torch.arange(width // 2) / (width // 2)),
        "the frequencies grow from 1 to 10000: the sign of the exponent is wrong.":
            lambda t, width: at(t, 10000 ** (torch.arange(width // 2) / (width // 2))),
        "exp of a logarithm to base 10: the slowest frequency is e^-4 where 10^-4 belongs.":
            lambda t, width: at(t, torch.exp(-4 * torch.arange(width // 2) / (width // 2))),
        "the frequencies lie on a straight line; each should be the one before it times the same factor.":
            lambda t, width: at(t, 1 - torch.arange(width // 2) / (width // 2)),
        "the slowest wave stands first: the frequencies fall from 1 downwards.":
            lambda t, width: joined(angles(t, width).flip(1)),
        "t is taken as a share of the way, t/1000, and nearly all waves stand still; it is a count of steps, 0 to 999.":
            lambda t, width: joined(angles(t / 1000, width)),
        "the angles are multiplied by 2 pi; t times the frequency is in radians as it is.":
            lambda t, width: joined(2 * math.pi * angles(t, width)),
        "the angles are turned from degrees to radians; they are in radians as they are.":
            lambda t, width: joined(torch.deg2rad(angles(t, width))),
    },
    atol=2e-3,  # of an angle of 999, float32 keeps four digits behind the point
)  # fmt: skip


# 04.2 -------------------------------------------------------------------------------------------------------


def group_norm(x, groups, weight, bias, eps):
    return normed(x, groups, weight, bias, eps)


def normed(x, groups, weight, bias, eps, dims=(2, 3, 4), unbiased=False, center=True, scale=None):
    """Group norm with its parts exposed to mistakes: `dims` are those of (B, G, C/G, H, W) that are averaged."""
    y = x.unflatten(1, (groups, -1))
    mean = y.mean(dims, keepdim=True)
    var = y.var(dims, keepdim=True, correction=int(unbiased)) if center else (y**2).mean(dims, keepdim=True)
    y = (y - mean if center else y) / (scale(var, eps) if scale else (var + eps).sqrt())
    return y.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


def interleaved(x, groups, weight, bias, eps):
    """Channel c in group c % G."""
    order = torch.arange(x.shape[1]).unflatten(0, (-1, groups)).T.flatten()
    plain = normed(x[:, order], groups, torch.ones_like(weight), torch.zeros_like(bias), eps)
    return plain[:, order.argsort()] * weight[:, None, None] + bias[:, None, None]


def channels(generator, eps):
    """Three pictures of 12 channels with levels and spreads of their own."""
    x = noise(generator, 3, 12, 4, 5) * (0.2 + noise(generator, 3, 12, 1, 1).abs()) + noise(generator, 3, 12, 1, 1)
    return x, 3, noise(generator, 12), noise(generator, 12), eps


NORM = Exercise(
    "my_group_norm(x, groups, weight, bias, eps)",
    group_norm,
    calling(lambda g: channels(g, 1e-5), lambda g: channels(g, 0.1)),
    {
        "the statistics run over the batch as well: each picture would depend on its neighbours.":
            lambda *given: normed(*given, dims=(0, 2, 3, 4)),
        "every channel is normalised alone (an instance norm); a group's channels share one mean and one spread.":
            lambda *given: normed(*given, dims=(3, 4)),
        "all channels of a picture are normalised together (a layer norm): the groups are missing.":
            lambda x, groups, *more: normed(x, 1, *more),
        "every position is normalised alone: the statistics run over the positions, too.":
            lambda *given: normed(*given, dims=(2,)),
        "the groups are interleaved: neighbouring channels belong together, the first C/G to the first group.":
            interleaved,
        "the variance is divided by n - 1 (torch's default); normalisation divides by n.":
            lambda *given: normed(*given, unbiased=True),
        "eps is added to the standard deviation; it belongs to the variance, under the root.":
            lambda *given: normed(*given, scale=lambda var, eps: var.sqrt() + eps),
        "it divides by the variance: the square root is missing.":
            lambda *given: normed(*given, scale=lambda var, eps: var + eps),
        "eps does nothing.": lambda *given: normed(*given, scale=lambda var, eps: var.sqrt()),
        "the mean is not subtracted.": lambda *given: normed(*given, center=False),
        "weight and bias do nothing: each channel is scaled and shifted at the end.":
            lambda x, groups, weight, bias, eps: normed(x, groups, weight * 0 + 1, bias * 0, eps),
        "the bias is added before the weight multiplies; it belongs at the end.":
            lambda x, groups, weight, bias, eps: normed(x, groups, weight, bias * weight, eps),
    },
)  # fmt: skip


# 04.3 -------------------------------------------------------------------------------------------------------


def resnet(block, x, emb):
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + branch(block, x, emb)


def branch(block, x, emb, act=F.silu, between=F.silu, first=F.silu, multiply=False):
    h = block.conv1(first(block.norm1(x)))
    shift = block.time_emb_proj(act(emb))[:, :, None, None]
    return block.conv2(between(block.norm2(h * shift if multiply else h + shift)))


def shortcut(block, x):
    return x if block.conv_shortcut is None else block.conv_shortcut(x)


def shift_of(block, emb):
    return block.time_emb_proj(F.silu(emb))[:, :, None, None]


def late(block, x, emb):
    """The time behind the second norm."""
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    return shortcut(block, x) + block.conv2(F.silu(h + shift_of(block, emb)))


def at_the_end(block, x, emb):
    h = block.conv1(F.silu(block.norm1(x)))
    return shortcut(block, x) + block.conv2(F.silu(block.norm2(h))) + shift_of(block, emb)


def timeless(block, x, emb):
    return shortcut(block, x) + block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))


def act_first(block, x, emb):
    h = block.conv1(block.norm1(F.silu(x))) + shift_of(block, emb)
    return shortcut(block, x) + block.conv2(block.norm2(F.silu(h)))


def without_norms(block, x, emb):
    h = block.conv1(F.silu(x)) + shift_of(block, emb)
    return shortcut(block, x) + block.conv2(F.silu(h))


def blocks(answer, generator):
    """Two blocks with every parameter random, one that changes the number of channels and one that doesn't."""
    outcomes = []
    for c_in, c_out in ((8, 12), (12, 12)):
        block = ResnetBlock(c_in, c_out, groups=4, eps=1e-5, emb_width=20)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(0.4 * noise(generator, *parameter.shape))
            parts = SimpleNamespace(**dict(block.named_children()))  # the bricks without the block's own forward
            parts.conv_shortcut = block.conv_shortcut
            x, emb = noise(generator, 2, c_in, 5, 6), noise(generator, 2, 20)
            outcomes.append(answer(parts, x, emb))
    return outcomes


BLOCK = Exercise(
    "my_resnet(block, x, emb)",
    resnet,
    blocks,
    {
        "the shortcut is missing: a ResNet block adds what it has made to its input.": branch,
        "the time is added behind the second norm; it belongs before it, to the output of conv1.": late,
        "the time is added at the very end; it belongs between the convolutions, before norm2.": at_the_end,
        "the embedding goes into time_emb_proj without SiLU.":
            lambda block, x, emb: shortcut(block, x) + branch(block, x, emb, act=lambda e: e),
        "the time multiplies; here it is added. (Scale and shift together is another design, Dhariwal & Nichol 2021.)":
            lambda block, x, emb: shortcut(block, x) + branch(block, x, emb, multiply=True),
        "the time does nothing: emb isn't used.": timeless,
        "all pictures are given the time of the first one.": lambda block, x, emb: resnet(block, x, emb[:1]),
        "there is no SiLU between norm2 and conv2.":
            lambda block, x, emb: shortcut(block, x) + branch(block, x, emb, between=lambda h: h),
        "there is no SiLU between norm1 and conv1.":
            lambda block, x, emb: shortcut(block, x) + branch(block, x, emb, first=lambda h: h),
        "SiLU comes before the norms; it belongs behind them.": act_first,
        "the norms are missing.": without_norms,
        "ReLU where SiLU belongs.":
            lambda block, x, emb: shortcut(block, x) + branch(block, x, emb, F.relu, F.relu, F.relu),
    },
    rtol=1e-3,
    atol=1e-4,
)  # fmt: skip


# 04.4 -------------------------------------------------------------------------------------------------------


def skip_shapes(widths, layers, height, width):
    return walked(widths, layers, height, width)


def walked(
    widths, layers, height, width, first=True, halved=True, last=False, up=True, early=False, begin=False, tail=0
):
    """The shapes on the way down, with mistakes to choose from."""
    h, w = height, width
    shapes = [(widths[0], h, w)] if first else []
    for level, channels in enumerate(widths):
        if begin and level:
            h, w = math.ceil(h / 2), math.ceil(w / 2)
        shapes += [(channels, h, w)] * (layers + tail)
        if not begin and (level < len(widths) - 1 or last):
            h, w = (math.ceil(h / 2), math.ceil(w / 2)) if up else (h // 2, w // 2)
            if halved:
                shapes.append((widths[min(level + 1, len(widths) - 1)] if early else channels, h, w))
    return shapes


SHAPES = Exercise(
    "skip_shapes(widths, layers, height, width)",
    skip_shapes,
    calling(
        ((48, 96, 128), 1, 16, 16), ((320, 640, 1280, 1280), 2, 64, 96), ((32, 64, 64), 3, 15, 10), ((16, 32), 2, 9, 7)
    ),
    {
        "the first convolution's output is missing: it is kept as well.": lambda *given: walked(*given, first=False),
        "what the strided convolutions put out is missing: it is kept as well.":
            lambda *given: walked(*given, halved=False),
        "the last level is halved, too; below it there is only the middle.": lambda *given: walked(*given, last=True),
        "halving changes the number of channels; it keeps it, and the next level's first ResNet block changes it.":
            lambda *given: walked(*given, early=True),
        "odd sizes are rounded down; a convolution of width 3, stride 2 and padding 1 rounds them up.":
            lambda *given: walked(*given, up=False),
        "the order is that in which the way up takes them; asked is that in which the way down makes them.":
            lambda *given: walked(*given)[::-1],
        "there is one layer too many a level: that is the way up, which takes a further skip.":
            lambda *given: walked(*given, tail=1),
        "one skip a level is kept; each of its layers leaves one.":
            lambda widths, layers, h, w: walked(widths, 1, h, w),
        "the number of channels stands last; it belongs before height and width.":
            lambda *given: [(h, w, c) for c, h, w in walked(*given)],
        "height and width are exchanged.": lambda *given: [(c, w, h) for c, h, w in walked(*given)],
        "no level is smaller than the one above it: each halves height and width.":
            lambda widths, layers, h, w: [(c, h, w) for c, _, _ in walked(widths, layers, h, w)],
    },
)  # fmt: skip


# 04.5 -------------------------------------------------------------------------------------------------------


def parameters(c_in, c_out, emb_width):
    with torch.device("meta"):
        block = ResnetBlock(c_in, c_out, groups=1, eps=1e-5, emb_width=emb_width)
    return sum(parameter.numel() for parameter in block.parameters())


def off_by(extra):
    """A wrong answer from what it counts too much."""
    return lambda c_in, c_out, emb_width: parameters(c_in, c_out, emb_width) + extra(c_in, c_out, emb_width)


COUNT = Exercise(
    "parameters(c_in, c_out, emb_width)",
    parameters,
    calling((48, 96, 192), (96, 96, 192), (2560, 1280, 1280), (64, 32, 100)),
    {
        "the biases are missing: a convolution and a linear layer have one for each channel that they put out.":
            off_by(lambda c_in, c_out, e: -3 * c_out - c_out * (c_in != c_out)),
        "the shortcut is counted where input and output have the same width: there it is no convolution at all.":
            off_by(lambda c_in, c_out, e: (c_in * c_out + c_out) * (c_in == c_out)),
        "the shortcut is missing: where the widths differ, it is a convolution of width 1.":
            off_by(lambda c_in, c_out, e: -(c_in * c_out + c_out) * (c_in != c_out)),
        "the shortcut is counted as a 3x3 convolution; its width is 1.":
            off_by(lambda c_in, c_out, e: 8 * c_in * c_out * (c_in != c_out)),
        "the norms are missing: each has a weight and a bias for each channel.":
            off_by(lambda c_in, c_out, e: -2 * c_in - 2 * c_out),
        "the norms are counted with one number a channel; each has a weight and a bias.":
            off_by(lambda c_in, c_out, e: -c_in - c_out),
        "the second norm is counted at the width of the input; it stands behind conv1.":
            off_by(lambda c_in, c_out, e: 2 * c_in - 2 * c_out),
        "both convolutions are counted from c_in to c_out; the second one goes from c_out to c_out.":
            off_by(lambda c_in, c_out, e: 9 * c_in * c_out - 9 * c_out * c_out),
        "the kernels are counted as 3 weights a pair of channels; 3x3 has 9.":
            off_by(lambda c_in, c_out, e: -6 * c_out * (c_in + c_out)),
        "the projection of the time is missing.": off_by(lambda c_in, c_out, e: -(e + 1) * c_out),
        "the time is counted as projected to c_in; it is added behind conv1.":
            off_by(lambda c_in, c_out, e: (e + 1) * (c_in - c_out)),
        "one of the two 3x3 convolutions is missing.":
            off_by(lambda c_in, c_out, e: -(9 * c_out * c_out + c_out)),
    },
)  # fmt: skip


EXERCISES = {"04.1": CLOCK, "04.2": NORM, "04.3": BLOCK, "04.4": SHAPES, "04.5": COUNT}
