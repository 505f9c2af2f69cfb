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


def classifier_free(unet: UNet, cond: Tensor, uncond: Tensor, scale: float, together: bool = True) -> Network:
    """uncond + scale * (cond - uncond), with `cond` and `uncond` contexts (B, L, D) (Ho & Salimans 2022, equation 6).

    `scale` 0 ignores the prompt, 1 is the plain conditional model (the paper's w is scale - 1). A negative prompt
    stands in the place of the empty one. `together` runs both as one batch, uncond first; apart needs half the memory.
    """
    if together:
        both = conditional(unet, torch.cat([uncond, cond]))
    else:
        first, second = conditional(unet, uncond), conditional(unet, cond)

    def network(x: Tensor, level: Level) -> Output:
        if together:
            out_uncond, out_cond = both(torch.cat([x, x]), level).out.chunk(2)
        else:
            out_uncond, out_cond = first(x, level).out, second(x, level).out
        return Output(out_uncond + scale * (out_cond - out_uncond), out_cond, out_uncond)

    return network


def denoiser(network: Network, prediction: str) -> Callable[[Tensor, Level], Prediction]:
    """`denoise(x, level) -> Prediction`, the one contract under all samplers."""

    def denoise(x: Tensor, level: Level) -> Prediction:
        out, cond, uncond = network(x, level)
        x0, eps, *_ = to_x0_eps(out, x, level.alpha, level.sigma, prediction)
        return Prediction(x0, eps, cond, uncond)

    return denoise
