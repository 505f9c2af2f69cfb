"""Closures between the sampler and the network: they turn a UNet that reads text into `denoise(x, level)`.

A `Network` is what the UNet says of (x, level) in the model's own parametrisation. Guidance wraps networks; `denoiser`
turns the outermost into the prediction that samplers understand.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion import Prediction, to_x0_eps
from ldm.models.blocks import Context
from ldm.models.unet import Extras, UNet
from ldm.schedules import Level


class Output(NamedTuple):
    """A network's output, and the two it was made of where guidance made it of two. All (B, C, h, w)."""

    out: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None


Network = Callable[[Tensor, Level], Output]


def conditional(unet: UNet, context: Tensor, extras: Extras = Extras()) -> Network:
    """The UNet reading `context` (B, L, D), of which keys and values are computed here, once."""
    prepared: Context = unet.prepare(context)

    def network(x: Tensor, level: Level) -> Output:
        return Output(unet(x, level.t, prepared, extras))

    return network


Halves = Callable[[Tensor, Level], tuple[Tensor, Tensor]]  # (uncond, cond), each (B, C, h, w)


def halves_together(network: Network) -> Halves:
    """Both halves of guidance in one run, of a network told what the unconditional pictures and then the others are."""

    def halves(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        uncond, cond = network(torch.cat([x, x]), level).out.chunk(2)
        return uncond, cond

    return halves


def halves_apart(uncond: Network, cond: Network) -> Halves:
    """The halves one after the other: half the memory."""
    return lambda x, level: (uncond(x, level).out, cond(x, level).out)


def classifier_free(halves: Halves, scale: float) -> Network:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, equation 6; the paper's w is scale - 1).

    `scale` 0 ignores the prompt, 1 is the plain conditional model. A negative prompt stands in the empty one's place.
    """

    def network(x: Tensor, level: Level) -> Output:
        uncond, cond = halves(x, level)
        return Output(uncond + scale * (cond - uncond), cond, uncond)

    return network


def denoiser(network: Network, prediction: str) -> Callable[[Tensor, Level], Prediction]:
    """`denoise(x, level) -> Prediction`, the one contract under all samplers."""

    def denoise(x: Tensor, level: Level) -> Prediction:
        out, cond, uncond = network(x, level)
        x0, eps, *_ = to_x0_eps(out, x, level.alpha, level.sigma, prediction)
        return Prediction(x0, eps, cond, uncond)

    return denoise
