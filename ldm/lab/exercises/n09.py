"""Exercises of notebook 09: ControlNet."""

import torch
import torch.nn.functional as F
from torch import nn

from ldm.lab.check import Exercise, Told, calling


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


# 09.1 -------------------------------------------------------------------------------------------------------


def zero_conv(channels):
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


NOT_A_MODULE = "it should give an nn.Module, a layer that can be trained."
ANOTHER_SHAPE = "its output should have the shape of its input: as many channels, the same height and width."
NOT_ZERO = "its output isn't 0: the finished model would be changed before the first step of training."
NO_GRADIENT = "it can never learn: no parameter of it gets a gradient."
SEES_NEIGHBOURS = (
    "it should mix channels at each position alone (1x1): the layer has more than channels * (channels + 1) numbers."
)


def try_zero_conv(answer, generator):
    for channels in (4, 6):
        layer = answer(channels)
        if layer is None or layer is ...:
            raise NotImplementedError
        if not isinstance(layer, nn.Module):
            raise Told(NOT_A_MODULE)
        x = noise(generator, 2, channels, 5, 7)
        y = layer(x)
        if y.shape != x.shape:
            raise Told(ANOTHER_SHAPE)
        if y.abs().max() > 0:
            raise Told(NOT_ZERO)
        if y.requires_grad:
            (y * noise(generator, *y.shape)).sum().backward()
        slopes = [p.grad for p in layer.parameters() if p.grad is not None and p.grad.abs().max() > 0]
        if not any(p.dim() > 1 for p in slopes):
            raise Told(NO_GRADIENT)
        if sum(p.numel() for p in layer.parameters()) > channels * (channels + 1):
            raise Told(SEES_NEIGHBOURS)
    return []


class TimesZero(nn.Conv2d):
    def forward(self, x):
        return 0 * super().forward(x)


def filled(conv, value, bias=0.0):
    nn.init.constant_(conv.weight, value)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)
    return conv


ZERO = Exercise(
    "zero_conv(channels)",
    zero_conv,
    try_zero_conv,
    {
        NOT_A_MODULE: lambda c: lambda x: 0 * x,
        ANOTHER_SHAPE: lambda c: filled(nn.Conv2d(c, c, 3), 0.0),
        NOT_ZERO: lambda c: filled(nn.Conv2d(c, c, 1), 0.0, bias=0.1),
        NO_GRADIENT: lambda c: TimesZero(c, c, 1),
        SEES_NEIGHBOURS: lambda c: filled(nn.Conv2d(c, c, 3, padding=1), 0.0),
    },
)


# 09.2 -------------------------------------------------------------------------------------------------------


def inject(skips, middle, extra_skips, extra_middle, scale):
    return [s + scale * e for s, e in zip(skips, extra_skips, strict=True)], middle + scale * extra_middle


def of_a_unet(generator):
    def features():
        return [noise(generator, 2, 6, 8, 8) for _ in range(4)]

    return features(), noise(generator, 2, 6, 4, 4), features(), noise(generator, 2, 6, 4, 4), 0.7


INJECT = Exercise(
    "inject(skips, middle, extra_skips, extra_middle, scale)",
    inject,
    calling(of_a_unet),
    {
        "the residuals go on the skips in the wrong order: the way up takes skips from the end, but both lists are in "
        "the order of the way down.":
            lambda s, m, es, em, k: ([a + k * b for a, b in zip(s, es[::-1], strict=True)], m + k * em),
        "the middle is forgotten: the ControlNet speaks to the middle block's output as well.":
            lambda s, m, es, em, k: ([a + k * b for a, b in zip(s, es, strict=True)], m),
        "the scale multiplies the UNet's own features; it belongs to what the ControlNet adds.":
            lambda s, m, es, em, k: ([k * a + b for a, b in zip(s, es, strict=True)], k * m + em),
        "the scale is left out: 0 should switch the net off.":
            lambda s, m, es, em, k: ([a + b for a, b in zip(s, es, strict=True)], m + em),
        "the scale multiplies the sum: with scale 0 nothing would be left of the UNet's own features.":
            lambda s, m, es, em, k: ([k * (a + b) for a, b in zip(s, es, strict=True)], k * (m + em)),
        "the scale doesn't reach the middle.":
            lambda s, m, es, em, k: ([a + k * b for a, b in zip(s, es, strict=True)], m + em),
        "the residuals replace the skips: they are added to them.":
            lambda s, m, es, em, k: ([k * b for b in es], k * em),
    },
)  # fmt: skip


# 09.3 -------------------------------------------------------------------------------------------------------


def near(edges):
    return F.max_pool2d(edges.float()[None], 3, stride=1, padding=1)[0] > 0


def edge_f1(found, wanted):
    precision = (found & near(wanted)).sum() / found.sum()
    recall = (wanted & near(found)).sum() / wanted.sum()
    return 2 * precision * recall / (precision + recall)


def lines(generator):
    """Two drawings (24, 24) of bool, the second with more in it, partly a pixel aside."""
    wanted = torch.zeros(24, 24, dtype=torch.bool)
    wanted[6, 2:20] = wanted[18, 4:22] = True
    found = torch.zeros(24, 24, dtype=torch.bool)
    found[7, 2:18] = found[18, 4:10] = found[11, 3:9] = True
    return found, wanted & (torch.rand(24, 24, generator=generator) < 0.9)


def mean_of(found, wanted, combine):
    precision = (found & near(wanted)).sum() / found.sum()
    recall = (wanted & near(found)).sum() / wanted.sum()
    return combine(precision, recall)


def strict_f1(found, wanted):
    return 2 * (found & wanted).sum() / (found.sum() + wanted.sum())


def wide_f1(found, wanted):
    return strict_f1(near(found), near(wanted))


EDGES = Exercise(
    "my_edge_f1(found, wanted)",
    edge_f1,
    calling(lines),
    {
        "an edge one pixel aside counts as missed: a pixel is met if there is one within one pixel of it, also aslant.":
            strict_f1,
        "this is the precision alone: a picture without half of its edges would be perfect.":
            lambda f, w: mean_of(f, w, lambda p, r: p),
        "this is the recall alone: a picture full of lines would be perfect.":
            lambda f, w: mean_of(f, w, lambda p, r: r),
        "precision and recall are averaged: F1 is their harmonic mean, near the smaller of the two.":
            lambda f, w: mean_of(f, w, lambda p, r: (p + r) / 2),
        "both maps are thickened before they are compared: widen the one a pixel is looked up in, not the one it is "
        "from.": wide_f1,
        "the factor 2 is missing: for two equal maps F1 is 1.": lambda f, w: edge_f1(f, w) / 2,
    },
)  # fmt: skip


# 09.4 -------------------------------------------------------------------------------------------------------


def steps_led(n, start, end):
    return [k for k in range(n) if k / n >= start and (k + 1) / n <= end]


INTERVAL = Exercise(
    "steps_led(n, start, end)",
    steps_led,
    calling((10, 0.0, 1.0), (10, 0.0, 0.5), (10, 0.5, 1.0), (8, 0.2, 0.7), (7, 0.3, 0.9)),
    {
        "a step counts that only begins before `end`: it has to be over by then.":
            lambda n, start, end: [k for k in range(n) if start <= k / n <= end],
        "a step counts as soon as a part of it is inside: it has to lie wholly between the two.":
            lambda n, start, end: [k for k in range(n) if (k + 1) / n > start and k / n < end],
        "the steps are counted from 1: the first is step 0, where the noise is.":
            lambda n, start, end: [k + 1 for k in range(n) if k / n >= start and (k + 1) / n <= end],
        "shares are taken of n - 1 instead of n: step k goes from k/n to (k+1)/n.":
            lambda n, start, end: [k for k in range(n) if k / (n - 1) >= start and k / (n - 1) <= end],
        "the interval is inside out: these are the steps without the net.":
            lambda n, start, end: [k for k in range(n) if not (k / n >= start and (k + 1) / n <= end)],
    },
)  # fmt: skip


EXERCISES = {"09.1": ZERO, "09.2": INJECT, "09.3": EDGES, "09.4": INTERVAL}
