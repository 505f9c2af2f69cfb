"""Closures between the sampler and the network: they turn a UNet that reads text into `denoise(x, level)`.

A `Network` is what the UNet says of (x, level) in the model's own parametrisation. Guidance wraps networks; `denoiser`
turns the outermost into the prediction that samplers understand. No guidance at all is `conditional` alone: one run of
the UNet where `classifier_free` and `rescaled` take two, and `all_of` and `perpendicular_negative` one for each prompt
and one for none.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion import Prediction, to_x0_eps
from ldm.errors import LDMError
from ldm.models.blocks import Context
from ldm.models.flux import Flux, FluxResiduals, Prepared
from ldm.models.unet import Extras, Residuals, UNet
from ldm.schedules import Level


class Output(NamedTuple):
    """A network's output, and the two it was made of where guidance made it of two. All (B, C, h, w)."""

    out: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None


class Told(NamedTuple):
    """What the UNet is told beside latent and timestep, for one part of guidance: words, and what some models add."""

    context: Tensor  # (B, L, D)
    extras: Extras = Extras()

    @classmethod
    def join(cls, parts: Sequence["Told"]) -> "Told":
        """What all parts of a batch are told, one part after the other."""
        return cls(torch.cat([part.context for part in parts]), Extras.join([part.extras for part in parts]))


Network = Callable[[Tensor, Level], Output]
# What ControlNets add inside the UNet, or FLUX's transformer; None: nothing.
Controller = Callable[[Tensor, Level], Residuals | FluxResiduals | None]


def conditional(
    unet: UNet | Flux,
    context: Tensor,
    extras: Extras = Extras(),
    controller: Controller = lambda x, level: None,
    times: Sequence[float] = (),
) -> Network:
    """The UNet, or FLUX's transformer, reading `context` (B, L, D): what doesn't change is computed here, once.

    A `controller` (`ldm.control`) says what ControlNets add inside it; `times` are the timesteps of the run.
    """
    prepared: Context | Prepared = unet.prepare(context, extras, times)

    def network(x: Tensor, level: Level) -> Output:
        read = x.to(unet.dtype)  # guidance and samplers calculate in the dtype of `x`: float32 where the UNet's is half
        return Output(unet(read, level.t, prepared, extras, controller(read, level)).to(x.dtype))

    return network


def joined(network: Network, channels: Tensor) -> Network:
    """A network that reads `channels` (B, C', h, w) behind the latent's own: a mask, a masked picture, a depth."""
    return lambda x, level: network(torch.cat([x, channels], dim=1), level)


# (uncond, cond), or where there are more prompts (uncond, cond_1, ..., cond_K); each (B, C, h, w)
Halves = Callable[[Tensor, Level], Sequence[Tensor]]


def halves_together(network: Network, parts: int = 2) -> Halves:
    """Both halves of guidance in one run, of a network told what the unconditional pictures and then the others are.

    With K prompts there are 1 + K `parts`.
    """
    return lambda x, level: network(torch.cat([x] * parts), level).out.chunk(parts)


def halves_apart(*networks: Network) -> Halves:
    """The halves one after the other, the unconditional network's first: half the memory."""
    return lambda x, level: [network(x, level).out for network in networks]


def classifier_free(halves: Halves, scale: float) -> Network:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, equation 6; the paper's w is scale - 1).

    `scale` 0 ignores the prompt, 1 is the plain conditional model. A negative prompt stands in the empty one's place.
    """

    def network(x: Tensor, level: Level) -> Output:
        uncond, cond = halves(x, level)
        return Output(uncond + scale * (cond - uncond), cond, uncond)

    return network


def text_and_image(halves: Halves, scale: float, image_scale: float) -> Network:
    """Two guidances, to the sentence and to the picture that is edited (Brooks et al. 2023, InstructPix2Pix, eq. 3).

    `halves` gives three parts: without both, with the picture alone, with both.
    """

    def network(x: Tensor, level: Level) -> Output:
        uncond, image, cond = halves(x, level)
        return Output(uncond + scale * (cond - image) + image_scale * (image - uncond), cond, uncond)

    return network


def rescaled(halves: Halves, scale: float, rescale: float) -> Network:
    """Classifier-free guidance whose spread is brought back to that of cond (Lin et al. 2023, "flawed", section 3.4).

    A large scale makes the output too large, and pictures overexposed. `rescale` is the paper's phi: 0 changes nothing,
    1 gives every picture the standard deviation of its cond; the paper draws with 0.7 and scale 7.5.
    """
    if not 0 <= rescale <= 1:
        raise LDMError(f"The rescale of guidance must lie between 0 (changes nothing) and 1 (fully), not {rescale}.")
    guided = classifier_free(halves, scale)

    def network(x: Tensor, level: Level) -> Output:
        out, cond, uncond = guided(x, level)
        # Each picture's own, or its neighbours in the batch would change it.
        factor = cond.std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True)  # (B, 1, 1, 1), equations 14, 15
        return Output(out * (rescale * factor + (1 - rescale)), cond, uncond)  # equation 16

    return network


def all_of(halves: Halves, weights: Sequence[float]) -> Network:
    """Prompts composed: uncond + sum_k w_k * (cond_k - uncond) (Liu et al. 2022, composable diffusion: AND).

    `halves` gives K + 1 parts, `weights` has K numbers, each that prompt's guidance scale; a negative one means NOT, as
    in the paper's code. One prompt is `classifier_free`. The output's `cond` is the first prompt's.
    """
    if not weights or not all(map(math.isfinite, weights)):
        raise LDMError(f"all_of needs a finite weight for each prompt, at least one; it was given {list(weights)}.")

    def network(x: Tensor, level: Level) -> Output:
        uncond, *conds = halves(x, level)
        if len(conds) != len(weights):
            raise LDMError(
                f"all_of was given {len(weights)} weights for {len(conds)} prompts: "
                "give one for each, and none for the unconditional part."
            )
        pull = sum(w * (cond - uncond) for w, cond in zip(weights, conds, strict=True))
        return Output(uncond + pull, conds[0], uncond)

    return network


def perpendicular_negative(halves: Halves, scale: float, weight: float = 1.0) -> Network:
    """Perp-Neg: a negative prompt that takes away nothing the prompt asks for (Armandpour et al. 2023).

    uncond + scale * (pos - weight * neg_perp), with pos = cond - uncond and neg_perp the component of
    neg = negative - uncond perpendicular to pos. This is the form of the authors' code, for one negative prompt, and of
    ComfyUI's PerpNeg, whose neg_scale is `weight`. `halves` gives (uncond, cond, negative).
    """
    if not 0 <= weight < math.inf:
        raise LDMError(
            f"The weight of a perpendicular negative prompt says how hard it pushes away: 0 or more, not {weight}."
        )

    def network(x: Tensor, level: Level) -> Output:
        uncond, cond, negative = halves(x, level)
        pos, neg = cond - uncond, negative - uncond
        return Output(uncond + scale * (pos - weight * perpendicular(neg, pos)), cond, uncond)

    return network


def perpendicular(v: Tensor, u: Tensor) -> Tensor:
    """v - (v.u / u.u) u: picture by picture, the component of `v` perpendicular to `u`; all (B, C, h, w)."""
    wide = torch.promote_types(v.dtype, torch.float32)  # over a large latent u.u leaves the range of float16
    dot = (v.to(wide) * u.to(wide)).sum((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    square = u.to(wide).square().sum((1, 2, 3), keepdim=True)
    # u is 0 where the prompt is the empty one; to that every v is perpendicular.
    along = dot / torch.where(square > 0, square, 1)
    return (v - along * u).to(v.dtype)


def within(guided: Network, plain: Network, low: float, high: float) -> Network:
    """Guidance in the middle of the road alone, low < sigma/alpha <= high (Kynkäänniemi et al. 2024, equation 6).

    Their sigma is the noise on a picture left at its own size: ours over alpha, in every family of models, and infinite
    where alpha is 0. Stable Diffusion's falls from 14.6 to 0.03, and for SDXL the paper takes (0.28, 5.42]; (0, inf] is
    guidance throughout. Outside, `plain` runs: the conditional network, one evaluation and not two.
    """
    if not 0 <= low < high:
        raise LDMError(
            f"Guidance was limited to sigma/alpha in ({low}, {high}]: give two numbers with 0 <= low < high."
        )

    def network(x: Tensor, level: Level) -> Output:
        ratio = level.sigma / level.alpha if level.alpha else math.inf
        return guided(x, level) if low < ratio <= high else plain(x, level)

    return network


def denoiser(network: Network, prediction: str) -> Callable[[Tensor, Level], Prediction]:
    """`denoise(x, level) -> Prediction`, the one contract under all samplers."""

    def denoise(x: Tensor, level: Level) -> Prediction:
        out, cond, uncond = network(x, level)
        x0, eps, *_ = to_x0_eps(out, x, level.alpha, level.sigma, prediction)
        return Prediction(x0, eps, cond, uncond)

    return denoise
