"""A latent as a sequence of patches, and where each of them is: rotary embedding on (text, y, x) (Su et al. 2021).

Everything here is computed on the CPU and in float64, whatever is around it, and sent where it is asked for.
Shapes: B batch, C channels of the latent, H, W its positions, N = H/2 * W/2 patches, L text tokens, W_h a head's width.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

PATCH = 2  # positions of the latent along a side of a patch; the JSON's `patch_size` 1 means a patch of what is packed
THETA = 10000  # rotary embedding: the slowest frequency is almost 1 / THETA


def pack(x: Tensor) -> Tensor:
    """Latents as a sequence of patches of 2x2 positions, row by row: (B, C, H, W) -> (B, N, P = 4C), channels first."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, N, 4C) -> (B, C, `height`, `width`)."""
    b, _, p = patches.shape
    x = patches.view(b, height // PATCH, width // PATCH, p // PATCH**2, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, p // PATCH**2, height, width)


def places(tokens: int, height: int, width: int) -> Tensor:
    """(text, y, x) of every token of the sequence, text first: (L + N, 3).

    The text's are all zero, for a caption has no place in the picture; a patch's first number is zero, too.
    """
    ids = torch.zeros(height // PATCH, width // PATCH, 3, device="cpu")
    ids[..., 1] = torch.arange(height // PATCH, device="cpu")[:, None]
    ids[..., 2] = torch.arange(width // PATCH, device="cpu")[None, :]
    return torch.cat([torch.zeros(tokens, 3, device="cpu"), ids.flatten(0, 1)])


def rotary_angles(ids: Tensor, axes: Sequence[int], theta: float = THETA) -> Tensor:
    """By how much each pair of a head's numbers is turned at each place `ids` (N, 3): (N, W_h/2), float64.

    place * theta^(-2i/d), pair i of the d numbers that belong to an axis (Su et al. 2021, equation 15).
    """
    turns = [theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device=ids.device) / d) for d in axes]
    return torch.cat([ids[:, k, None].double() * turn for k, turn in enumerate(turns)], dim=1)


@lru_cache(maxsize=8)  # the same at every step, and in every run of that size
@torch.inference_mode(False)  # what is made in that mode could be used in no training afterwards
def rotary_table(tokens: int, height: int, width: int, axes: tuple[int, ...], like: tuple) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, each (L + N, 1, W_h/2), of the (device, dtype) `like`."""
    device, dtype = like
    angles = rotary_angles(places(tokens, height, width), axes)[:, None]
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (2i, 2i+1) of a head's numbers by its place's angle; x (B, L + N, heads, W_h).

    After it q.k depends on places by their difference alone (Su et al. 2021, equation 16).
    """
    cos, sin = rotary
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
