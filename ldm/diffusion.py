"""The algebra of diffusion: what noise does to a latent, and what a network's output says about it.

Everything rests on one line, in the coordinates of the model (Kingma et al. 2021, equation 1):

    x = alpha * x0 + sigma * eps                                                                                     (1)

x0 is the clean latent, eps standard normal noise. Stable Diffusion keeps alpha^2 + sigma^2 = 1; FLUX has
alpha = 1 - sigma. Networks are trained to say one of four things about x, and any of them is as good as the pair
(x0, eps), because (1) and its definition are two equations for two unknowns.
"""

from typing import NamedTuple

from torch import Tensor

from ldm.errors import LDMError

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class Prediction(NamedTuple):
    """What a denoiser says of a noisy latent: the clean latent and the noise in it, both shaped as x.

    `cond` and `uncond` are the network's raw outputs with and without the prompt, where guidance made two.
    """

    x0: Tensor
    eps: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None


def add_noise(x0: Tensor, eps: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """Equation (1)."""
    return alpha * x0 + sigma * eps


def target(x0: Tensor, eps: Tensor, alpha: float | Tensor, sigma: float | Tensor, prediction: str) -> Tensor:
    """What the network is trained to output for (x0, eps): the inverse of `to_x0_eps`."""
    if prediction == "epsilon":  # Ho et al. 2020, equation 14
        return eps
    if prediction == "v_prediction":  # Salimans & Ho 2022, appendix D
        return alpha * eps - sigma * x0
    if prediction == "sample":
        return x0
    if prediction == "flow":  # Lipman et al. 2023, equation 20, with time running from data to noise
        return eps - x0
    raise unknown(prediction)


def to_x0_eps(out: Tensor, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, prediction: str) -> Prediction:
    """The pair (x0, eps) that (1) and the network's output `out` imply, each shaped as `x`.

    `epsilon` needs alpha > 0 and `sample` sigma > 0: at those ends the output says nothing about the other unknown.
    """
    if prediction == "epsilon":
        return Prediction((x - sigma * out) / alpha, out)
    if prediction == "v_prediction":
        # alpha^2 + sigma^2 = 1 makes (alpha, sigma) a rotation, so its inverse is the transpose.
        return Prediction(alpha * x - sigma * out, alpha * out + sigma * x)
    if prediction == "sample":
        return Prediction(out, (x - alpha * out) / sigma)
    if prediction == "flow":
        # alpha = 1 - sigma: x = x0 + sigma * (eps - x0).
        x0 = x - sigma * out
        return Prediction(x0, x0 + out)
    raise unknown(prediction)


def unknown(prediction: str) -> LDMError:
    return LDMError(f"Unknown prediction type {prediction!r}: ldm knows {', '.join(PREDICTIONS)}.")
