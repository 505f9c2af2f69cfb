"""Half precision where it helps, and float32 where half is too narrow."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ldm.errors import LDMError, say_on_stderr
from ldm.guidance import Network, Output
from ldm.models.vae import VAE
from ldm.schedules import Level


def autocasting(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager:
    """torch's autocast: weights stay as they are, products and convolutions are done in `dtype`. None: nothing."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise LDMError(f"autocast computes in bfloat16 or float16, not in {dtype}: set one of them, or None.")
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def cast(network: Network, dtype: torch.dtype | None) -> Network:
    """The network under autocast. The latent, and with it the sampler's sums, keep the dtype they have."""
    if dtype is None:
        return network

    def inside(x: Tensor, level: Level) -> Output:
        with autocasting(dtype, x.device):
            return Output(*(each if each is None else each.to(x.dtype) for each in network(x, level)))

    return inside


def narrowed(network: Network, dtype: torch.dtype) -> Network:
    """A network that takes latents in the loop's dtype, made of one that takes them in `dtype`, the UNet's."""

    def inside(x: Tensor, level: Level) -> Output:
        return Output(*(each if each is None else each.to(x.dtype) for each in network(x.to(dtype), level)))

    return inside


def in_range(vae: VAE, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function`, which runs the VAE, of `x` in the VAE's dtype; in float32 where that is too narrow for what it makes.

    SDXL's VAE goes beyond float16's 65504 inside, and what comes out is NaN: a black picture, if nobody looks.
    """
    dtype, autocast = vae.dtype, x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
    y = function(x.to(dtype))
    if torch.isfinite(y).all() or (dtype.itemsize >= 4 and not autocast):
        return y
    narrow = torch.get_autocast_dtype(x.device.type) if autocast else dtype
    say_on_stderr(f"The VAE goes beyond the range of {str(narrow).removeprefix('torch.')}: it is run again in float32.")
    try:
        with torch.autocast(x.device.type, enabled=False):
            return function(x.to(vae.to(torch.float32).dtype))
    finally:
        vae.to(dtype)  # its numbers survive the journey bit for bit
